// A step's tensors in: which parameters have a gradient now, where everything lies, and what of that changed.
//
// Python is asked only about what is new (a first gradient, replaced state, another layout); everything else is read
// and checked here, through DLPack's exchange API, in about 0.1 us a tensor.
#pragma once
#include <Python.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "device_step.h"
#include "step.h"
#include "tensor.h"

namespace fusedopt {

// Everything known of one parameter of an optimizer.
struct Slot {
  Ref param, state_dict, owners;
  Ref spec, grad_spec;  // of a DTensor: how it and its gradient are placed, null otherwise
  Ref part;             // of a DTensor: the part of it that lies in this process
  static constexpr int kMaxItems = 12;
  std::pair<Ref, Ref> state_items[kMaxItems];  // the dict as it was when bound
  int n_items = 0;
  int32_t group = 0;
  int32_t holders = 0;  // who holds parts of it, as Python numbers them: sums over them are kept apart
  int rule = -1;

  dlpack::Device device{};
  bool on_device = false;  // its step counter is advanced where it lies, by a backend that reads DevicePlan

  bool ready = false;   // bound, and only pointers can have changed since: checked natively
  bool active = false;  // takes part in this step
  bool idle = false;    // bound without a gradient, for its average alone
  bool fresh = false;   // has a state buffer but no step counter, and has not stepped
  int was = 0;          // in the last step: active, and with a gradient
  int wave = 0;         // tensors that share memory step one after the other

  Layout layout;
  Dtype dtype{}, grad_dtype{}, state_dtype{};
  void* data = nullptr;
  const void* grad = nullptr;  // null: has none
  void* states[kMaxStates]{};
  int n_states = 0;
  void* step = nullptr;  // float or double; float if on_device
  bool step_is_double = false;
  Extras extras{};
  Origin origin{};
};

// Tensors of a slot, as Python gives them.
struct Binding {
  PyObject* param;       // the parameter, a DTensor's part here, or a real view of either
  PyObject* grad;        // of its layout; None: the average alone moves
  PyObject* state_dict;  // the optimizer's entry, or None
  PyObject* states;      // tuple of the rule's tensors in it, or views of them
  PyObject* scales;      // tuple of their codes' scales, empty where they are not codes
  PyObject* master;      // or None
  PyObject* ema;         // or None
  PyObject* step;        // scalar tensor, or None: then `fresh` says whether this is the first step
  PyObject* owners;      // kept as long as the pointers are
  PyObject* spec;        // of a DTensor, or None
  PyObject* grad_spec;   // of its gradient; or None
  int32_t holders;       // see Slot
  int64_t index;         // of the parameter, see Extras
  Origin origin;
  bool fresh;
  bool lasting;    // all are the optimizer's own objects, so that the next gather may check natively
  bool on_device;  // see Slot
};

class Table {
 public:
  // Walk param_groups; rules[i] is the rule of group i. Returns the slots that Python must look at: they have a
  // gradient but are new, or changed in more than a pointer. Slots without a gradient sleep, unless `averages`: then
  // they take part for their averages.
  std::vector<int64_t> gather(PyObject* param_groups, PyObject* state, const std::vector<int>& rules, bool averages);

  // Take slot i into this step. Throws std::invalid_argument, with nothing changed, where a tensor does not fit.
  void bind(int64_t i, const Binding& binding);

  // Work out in which waves the active slots step. Returns a number that changes when anything but a gradient's address
  // did.
  uint64_t settle();

  // Advance the step counters and lay out the active slots that are not on_device, grouped by rule and dtypes, in as
  // many launches as needed.
  std::vector<Launch> launches(const std::vector<Group>& groups, int threads, const Precision* precision);

  PyObject* updated();  // list of the parameters that have a gradient, and DTensors' parts; borrowed
  std::vector<bool> active() const;
  int64_t size() const { return int64_t(slots_.size()); }
  uint64_t filled() const { return filled_; }  // changes when a slot has another parameter
  const Slot& slot(int64_t i) const { return slots_.at(size_t(i)); }
  const std::vector<Slot>& slots() const { return slots_; }

  int visit(visitproc visit, void* arg);
  void clear();

 private:
  bool refresh(Slot& slot, PyObject* grad);
  bool refresh_parts(Slot& slot, Ref* param, Ref* grad);
  bool state_unchanged(const Slot& slot) const;
  void notice_replaced_state(PyObject* state);

  std::vector<Slot> slots_;
  std::vector<std::pair<Ref, Ref>> state_order_;  // optimizer.state as it was at the last gather
  std::vector<Row> rows_;
  Ref updated_;
  bool moved_ = true;
  uint64_t filled_ = 0;
  uint64_t version_ = 0;
};

// The active on_device slots of one device, laid out; kept from step to step, so that only what changed is sent.
class DevicePlan {
 public:
  std::vector<DeviceLaunch>& lay_out(Table& table, int32_t device);

 private:
  uint64_t version_ = 0;
  std::vector<DeviceLaunch> launches_;
  std::vector<std::vector<size_t>> slots_;  // of each launch's rows
};

}  // namespace fusedopt
