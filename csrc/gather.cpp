#include "gather.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fusedopt {
namespace {

PyObject* interned(const char* name) {
  PyObject* string = PyUnicode_InternFromString(name);
  if (!string) throw PythonError();
  return string;
}

// `tensor.grad`, its descriptor looked up once for a run of tensors of one type.
class GradReader {
 public:
  Ref operator()(PyObject* tensor) {
    PyTypeObject* type = Py_TYPE(tensor);
    if (type != type_) {
      static PyObject* const name = interned("grad");
      type_ = type;
      descriptor_ = Ref::borrow(_PyType_Lookup(type, name));
      get_ = descriptor_.get() ? Py_TYPE(descriptor_.get())->tp_descr_get : nullptr;
    }
    PyObject* grad = get_ ? get_(descriptor_.get(), tensor, reinterpret_cast<PyObject*>(type))
                          : PyObject_GetAttrString(tensor, "grad");
    if (!grad) throw PythonError();
    return Ref::steal(grad);
  }

 private:
  PyTypeObject* type_ = nullptr;
  Ref descriptor_;
  descrgetfunc get_ = nullptr;
};

// A view can carry the negative bit (the imaginary part of a conjugate), which DLPack does not tell. Such views of more
// than one element have gaps between them and go to Python for that: asking every gradient would cost 40 ns each.
bool is_negated(PyObject* tensor) {
  static PyObject* const method = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), "is_neg");
  if (!method) throw PythonError();
  const Ref result = Ref::steal(PyObject_Vectorcall(method, &tensor, 1, nullptr));
  if (!result.get()) throw PythonError();
  return result.get() == Py_True;
}

// A DTensor's attribute; null, without an error, where there is none.
Ref attribute(PyObject* tensor, PyObject* name) {
  PyObject* value = PyObject_GetAttr(tensor, name);
  if (!value) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw PythonError();
    PyErr_Clear();
  }
  return Ref::steal(value);
}

// Whether a DTensor is placed as `known`, which is replaced by the equal one that it has now.
bool placed_as(PyObject* tensor, Ref& known) {
  static PyObject* const name = interned("_spec");
  Ref spec = attribute(tensor, name);
  if (!spec.get() || !known.get()) return false;
  if (spec.get() == known.get()) return true;
  const int equal = PyObject_RichCompareBool(spec.get(), known.get(), Py_EQ);
  if (equal < 0) throw PythonError();
  if (equal) known = std::move(spec);
  return equal != 0;
}

// Never null: that stands for no gradient, and an empty tensor's memory may be there.
const void* address(const dlpack::Tensor& tensor) {
  static const char nothing = 0;
  return tensor.data ? tensor.data : &nothing;
}

}  // namespace

std::vector<int64_t> Table::gather(PyObject* param_groups, PyObject* state, const std::vector<int>& rules,
                                   bool averages) {
  static PyObject* const params_key = interned("params");
  notice_replaced_state(state);
  std::vector<int64_t> attention;
  GradReader grad_of;
  size_t i = 0;
  const Py_ssize_t n_groups = PyList_Size(param_groups);
  if (n_groups < 0) throw PythonError();
  for (Py_ssize_t group = 0; group < n_groups; ++group) {
    PyObject* params = PyDict_GetItemWithError(PyList_GET_ITEM(param_groups, group), params_key);
    const Ref held = Ref::borrow(params);
    if (!params || !PyList_Check(params)) {
      PyErr_Format(PyExc_TypeError, "param_groups[%zd]['params'] must be a list", group);
      throw PythonError();
    }
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k, ++i) {
      PyObject* param = PyList_GET_ITEM(params, k);
      if (i == slots_.size()) slots_.emplace_back();
      if (slots_[i].param.get() != param) {
        slots_[i] = Slot();
        slots_[i].param = Ref::borrow(param);
        ++filled_;
      }
      Slot& slot = slots_[i];
      if (slot.group != group || slot.rule != rules[size_t(group)]) {
        slot.ready = false;
        slot.group = int32_t(group);
        slot.rule = rules[size_t(group)];
      }
      slot.active = false;
      const Ref grad = grad_of(param);
      if (grad.get() == Py_None && !averages) continue;
      if (refresh(slot, grad.get()))
        slot.active = true;
      else {
        slot.ready = false;
        attention.push_back(int64_t(i));
      }
    }
  }
  moved_ |= i < slots_.size();
  filled_ += i < slots_.size();
  slots_.erase(slots_.begin() + ptrdiff_t(i), slots_.end());
  return attention;
}

// Pointers of this step, if nothing but pointers changed.
bool Table::refresh(Slot& slot, PyObject* grad) {
  if (!slot.ready || !state_unchanged(slot)) return false;
  Ref param = Ref::borrow(slot.param.get()), part_of_grad = Ref::borrow(grad);
  if (slot.spec.get() && !refresh_parts(slot, &param, &part_of_grad)) return false;
  grad = part_of_grad.get();
  dlpack::Tensor p, g;
  const auto same = [&](PyObject* tensor, dlpack::Tensor& t, Dtype dtype) {
    return read_tensor(tensor, &t) && t.device == slot.device && dtype_of(t.dtype) == dtype && slot.layout.same(t);
  };
  if (!same(param.get(), p, slot.dtype)) return false;
  if (grad != Py_None) {
    if (slot.idle || !same(grad, g, slot.grad_dtype)) return false;
    if (slot.layout.numel == 1 && is_negated(grad)) return false;
  }
  moved_ |= p.data != slot.data;
  slot.data = p.data;
  slot.grad = grad == Py_None ? nullptr : address(g);
  return true;
}

// Of a DTensor and its gradient, placed as they were: the parts that lie here.
bool Table::refresh_parts(Slot& slot, Ref* param, Ref* grad) {
  static PyObject* const name = interned("_local_tensor");
  if (!placed_as(param->get(), slot.spec)) return false;
  *param = attribute(param->get(), name);
  if (!param->get()) return false;
  if (param->get() != slot.part.get()) {
    slot.part = Ref::borrow(param->get());
    moved_ = true;
  }
  if (grad->get() == Py_None) return true;
  if (!placed_as(grad->get(), slot.grad_spec)) return false;
  *grad = attribute(grad->get(), name);
  return grad->get() != nullptr;
}

bool Table::state_unchanged(const Slot& slot) const {
  PyObject* dict = slot.state_dict.get();
  if (!dict) return true;
  if (PyDict_GET_SIZE(dict) != slot.n_items) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (int k = 0; k < slot.n_items; ++k) {
    const auto& item = slot.state_items[k];
    if (!PyDict_Next(dict, &position, &key, &value) || key != item.first.get() || value != item.second.get())
      return false;
  }
  return true;
}

// optimizer.state walked in its own order: looking each parameter up would call Tensor.__hash__, a Python function.
void Table::notice_replaced_state(PyObject* state) {
  if (!PyDict_Check(state)) {
    PyErr_SetString(PyExc_TypeError, "optimizer.state must be a dict");
    throw PythonError();
  }
  bool same = size_t(PyDict_GET_SIZE(state)) == state_order_.size();
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (size_t i = 0; same && i < state_order_.size(); ++i)
    same = PyDict_Next(state, &position, &key, &value) && key == state_order_[i].first.get() &&
           value == state_order_[i].second.get();
  if (same) return;
  std::vector<std::pair<Ref, Ref>> order;
  position = 0;
  while (PyDict_Next(state, &position, &key, &value)) order.emplace_back(Ref::borrow(key), Ref::borrow(value));
  state_order_.swap(order);
  for (Slot& slot : slots_) {
    PyObject* found = PyDict_GetItemWithError(state, slot.param.get());
    if (!found && PyErr_Occurred()) throw PythonError();
    if (found != slot.state_dict.get()) slot.ready = false;
  }
}

void Table::bind(int64_t i, const Binding& b) {
  Slot& slot = slots_.at(size_t(i));
  dlpack::Tensor p;
  const auto read = [&](PyObject* object, const char* what) {
    dlpack::Tensor t;
    if (!read_tensor(object, &t)) throw std::invalid_argument(std::string(what) + " has no memory that can be read");
    if (object != b.param && !(t.device == p.device))
      throw std::invalid_argument(std::string(what) + " is on another device than its parameter");
    return t;
  };
  p = read(b.param, "the parameter");
  if (!b.on_device && p.device.type != dlpack::kCPU) throw std::invalid_argument("the parameter is not on the CPU");
  Layout layout(p);
  if (!is_dense(p)) throw std::invalid_argument("the parameter is not dense");
  const auto alike = [&](PyObject* object, const char* what) {
    const dlpack::Tensor t = read(object, what);
    if (!layout.same(t))
      throw std::invalid_argument(std::string(what) + "'s shape or strides differ from the parameter's");
    return t;
  };
  const bool idle = b.grad == Py_None;
  const dlpack::Tensor g = idle ? p : alike(b.grad, "the gradient");
  const Py_ssize_t n_states = PyTuple_Size(b.states), n_scales = PyTuple_Size(b.scales);
  if (n_states < 0 || n_scales < 0) throw PythonError();
  if (n_states > kMaxStates) throw std::invalid_argument("too many states");
  if (n_scales && n_scales != n_states) throw std::invalid_argument("not as many scales as states");
  void* pointers[kMaxStates]{};
  Dtype state_dtype = dtype_of(p.dtype);
  for (Py_ssize_t s = 0; s < n_states; ++s) {
    const dlpack::Tensor t = alike(PyTuple_GET_ITEM(b.states, s), "a state");
    const Dtype dtype = n_scales ? Dtype::kCode : dtype_of(t.dtype);
    if (dtype == Dtype::kCode && t.dtype.bits != 8) throw std::invalid_argument("codes that are not of 8 bits");
    if (s > 0 && dtype != state_dtype) throw std::invalid_argument("states of different dtypes");
    state_dtype = dtype;
    pointers[s] = t.data;
  }
  Extras extras{};
  extras.index = b.index;
  for (Py_ssize_t s = 0; s < n_scales; ++s) {
    const dlpack::Tensor t = read(PyTuple_GET_ITEM(b.scales, s), "a state's scales");
    if (dtype_of(t.dtype) != Dtype::kF32 || Layout(t).numel != (layout.numel + kCodeBlock - 1) / kCodeBlock)
      throw std::invalid_argument("a state's scales are not a float32 for each block of its codes");
    extras.scale[s] = static_cast<float*>(t.data);
  }
  if (b.master != Py_None) {
    const dlpack::Tensor t = alike(b.master, "the master weight");
    const bool fits = dtype_of(p.dtype) == Dtype::kBF16 ? t.dtype.code == dlpack::kInt && t.dtype.bits == 16
                                                        : dtype_of(t.dtype) == Dtype::kF32;
    if (!fits) throw std::invalid_argument("the master weight has a dtype that does not fit the parameter");
    extras.master = t.data;
  }
  if (b.ema != Py_None) {
    const dlpack::Tensor t = alike(b.ema, "the average");
    if (dtype_of(t.dtype) != (dtype_of(p.dtype) == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32))
      throw std::invalid_argument("the average has a dtype that does not fit the parameter");
    extras.ema = t.data;
  }
  void* counter = nullptr;
  bool counter_is_double = false;
  if (b.step != Py_None) {
    const dlpack::Tensor t = read(b.step, "the step counter");
    const Dtype dtype = dtype_of(t.dtype);
    if (Layout(t).numel != 1 || (dtype != Dtype::kF32 && (b.on_device || dtype != Dtype::kF64)))
      throw std::invalid_argument("the step counter is not a float scalar");
    counter = t.data;
    counter_is_double = dtype == Dtype::kF64;
  }

  bool lasting = b.lasting;
  const auto or_null = [](PyObject* object) { return Ref::borrow(object == Py_None ? nullptr : object); };
  slot.state_dict = or_null(b.state_dict);
  slot.spec = or_null(b.spec);
  slot.grad_spec = or_null(b.grad_spec);
  slot.part = slot.spec.get() ? Ref::borrow(b.param) : Ref();
  slot.holders = b.holders;
  slot.owners = Ref::borrow(b.owners);
  slot.n_items = 0;
  if (PyObject* dict = slot.state_dict.get()) {
    lasting &= PyDict_GET_SIZE(dict) <= Slot::kMaxItems;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (lasting && PyDict_Next(dict, &position, &key, &value))
      slot.state_items[slot.n_items++] = {Ref::borrow(key), Ref::borrow(value)};
  }
  slot.fresh = b.fresh || (slot.fresh && pointers[0] == slot.states[0]);
  slot.layout = std::move(layout);
  slot.dtype = dtype_of(p.dtype);
  slot.grad_dtype = dtype_of(g.dtype);
  slot.state_dtype = state_dtype;
  slot.data = p.data;
  slot.grad = idle ? nullptr : address(g);
  slot.idle = idle;
  slot.extras = extras;
  slot.origin = b.origin;
  std::copy(pointers, pointers + kMaxStates, slot.states);
  slot.n_states = int(n_states);
  slot.step = counter;
  slot.step_is_double = counter_is_double;
  slot.device = p.device;
  slot.on_device = b.on_device;
  slot.ready = lasting;
  slot.active = true;
  moved_ = true;
}

PyObject* Table::updated() {
  if (updated_.get()) return updated_.get();
  Ref list = Ref::steal(PyList_New(0));
  if (!list.get()) throw PythonError();
  for (const Slot& slot : slots_) {
    if (!slot.active || !slot.grad) continue;
    if (PyList_Append(list.get(), slot.param.get()) != 0) throw PythonError();
    if (slot.part.get() && PyList_Append(list.get(), slot.part.get()) != 0) throw PythonError();
  }
  updated_ = std::move(list);
  return updated_.get();
}

std::vector<bool> Table::active() const {
  std::vector<bool> flags;
  for (const Slot& slot : slots_) flags.push_back(slot.active);
  return flags;
}

int Table::visit(visitproc visit, void* arg) {
  for (const Slot& slot : slots_) {
    Py_VISIT(slot.param.get());
    Py_VISIT(slot.state_dict.get());
    Py_VISIT(slot.owners.get());
    Py_VISIT(slot.spec.get());
    Py_VISIT(slot.grad_spec.get());
    Py_VISIT(slot.part.get());
    for (int k = 0; k < slot.n_items; ++k) {
      Py_VISIT(slot.state_items[k].first.get());
      Py_VISIT(slot.state_items[k].second.get());
    }
  }
  for (const auto& [key, value] : state_order_) {
    Py_VISIT(key.get());
    Py_VISIT(value.get());
  }
  Py_VISIT(updated_.get());
  return 0;
}

void Table::clear() {
  std::vector<Slot> slots;
  std::vector<std::pair<Ref, Ref>> order;
  slots.swap(slots_);  // emptied first: releasing the references may run Python code that comes back here
  order.swap(state_order_);
  const Ref list = std::move(updated_);
}

}  // namespace fusedopt
