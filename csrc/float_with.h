// float, but for divisions and square roots, which are Ops's.
#pragma once
#include "element.h"

namespace fusedopt::FUSEDOPT_ISA {

template <class Ops>
struct float_with {
  float x;

  float_with() = default;
  template <class A>
  FUSEDOPT_HD float_with(A value) : x(float(value)) {}

  friend FUSEDOPT_HD float_with operator+(float_with a, float_with b) { return a.x + b.x; }
  friend FUSEDOPT_HD float_with operator-(float_with a, float_with b) { return a.x - b.x; }
  friend FUSEDOPT_HD float_with operator*(float_with a, float_with b) { return a.x * b.x; }
  friend FUSEDOPT_HD float_with operator/(float_with a, float_with b) { return Ops::divide(a.x, b.x); }
  FUSEDOPT_HD float_with& operator+=(float_with b) { return *this = *this + b; }
  FUSEDOPT_HD float_with& operator-=(float_with b) { return *this = *this - b; }
  FUSEDOPT_HD float_with& operator*=(float_with b) { return *this = *this * b; }
  friend FUSEDOPT_HD bool operator<(float_with a, float_with b) { return a.x < b.x; }
  friend FUSEDOPT_HD bool operator>(float_with a, float_with b) { return a.x > b.x; }
  friend FUSEDOPT_HD bool operator!=(float_with a, float_with b) { return a.x != b.x; }
};

template <class Ops>
FUSEDOPT_HD float_with<Ops> sqrt_of(float_with<Ops> a) {
  return Ops::root(a.x);
}

template <class Ops>
FUSEDOPT_HD float_with<Ops> choose(bool c, float_with<Ops> a, float_with<Ops> b) {
  return c ? a.x : b.x;
}

template <class E, class Ops>
FUSEDOPT_HD void store(E& to, float_with<Ops> value) {
  store(to, value.x);
}

}  // namespace fusedopt::FUSEDOPT_ISA
