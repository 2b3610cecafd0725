// Python's tensors as C++ sees them: references, layouts, and DLPack's exchange API, which tells where a tensor lies.
#pragma once
#include <Python.h>

#include <cstdint>
#include <string>

#include "dlpack.h"
#include "step.h"

namespace fusedopt {

// A borrowed Python exception: thrown where the Python error indicator is set.
struct PythonError {};

// An owned reference.
class Ref {
 public:
  Ref() = default;
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  static Ref steal(PyObject* object) { return Ref(object); }
  Ref(Ref&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Ref& operator=(Ref&& other) noexcept {
    PyObject* old = object_;
    object_ = other.object_;
    other.object_ = nullptr;
    Py_XDECREF(old);  // last: it may run Python code that looks at this object
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// Shape and strides. Held in place, as all that a gather looks at: following pointers is most of its time.
struct Layout {
  static constexpr int kMaxDims = 8;
  int32_t ndim = 0;
  int64_t numel = 0;
  int64_t shape[kMaxDims], strides[kMaxDims];

  Layout() = default;
  explicit Layout(const dlpack::Tensor& tensor);  // throws std::invalid_argument beyond kMaxDims
  bool same(const dlpack::Tensor& tensor) const;  // same shape, same strides where they matter
};

// No gaps, no overlap, any order of dimensions.
bool is_dense(const dlpack::Tensor& tensor);

int64_t size_of(Dtype dtype);
Dtype dtype_of(const dlpack::DataType& type);
const char* name_of(Dtype dtype);
Dtype dtype_named(const std::string& name);  // as torch prints it, without "torch."

// Reads a tensor's memory; false (no Python error set) where it has none: sparse, meta, a wrapper subclass.
bool read_tensor(PyObject* object, dlpack::Tensor* out);

}  // namespace fusedopt
