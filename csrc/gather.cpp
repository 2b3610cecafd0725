#include "gather.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

namespace fusedopt {
namespace {

PyObject* interned(const char* name) {
  PyObject* string = PyUnicode_InternFromString(name);
  if (!string) throw PythonError();
  return string;
}

const dlpack::ExchangeApi* exchange_api(PyObject* tensor) {
  static const dlpack::ExchangeApi* api = [&] {
    const Ref capsule =
        Ref::steal(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), "__dlpack_c_exchange_api__"));
    if (!capsule.get()) throw PythonError();
    const auto* found =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.get(), dlpack::kExchangeCapsule));
    while (found && found->header.version.major != dlpack::kMajorVersion)
      found = reinterpret_cast<const dlpack::ExchangeApi*>(found->header.previous);
    if (!found || !found->tensor_from_object) {
      if (!PyErr_Occurred())
        PyErr_SetString(PyExc_RuntimeError, "this torch offers no DLPack C exchange API of major version 1");
      throw PythonError();
    }
    return found;
  }();
  return api;
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

}  // namespace

int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
      return 8;
    case Dtype::kF32:
      return 4;
    default:
      return 2;
  }
}

Dtype dtype_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return Dtype::kOther;
  if (type.code == dlpack::kBfloat && type.bits == 16) return Dtype::kBF16;
  if (type.code != dlpack::kFloat) return Dtype::kOther;
  return type.bits == 64 ? Dtype::kF64 : type.bits == 32 ? Dtype::kF32 : type.bits == 16 ? Dtype::kF16 : Dtype::kOther;
}

const char* name_of(Dtype dtype) {
  static constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "other"};
  return kNames[int(dtype)];
}

Dtype dtype_named(const std::string& name) {
  for (Dtype dtype : {Dtype::kF64, Dtype::kF32, Dtype::kBF16, Dtype::kF16})
    if (name == name_of(dtype)) return dtype;
  return Dtype::kOther;
}

bool read_tensor(PyObject* object, dlpack::Tensor* out) {
  if (exchange_api(object)->tensor_from_object(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  if (out->data) return true;
  for (int d = 0; d < out->ndim; ++d)
    if (out->shape[d] == 0) return true;
  return false;
}

Layout::Layout(const dlpack::Tensor& t) : ndim(t.ndim), numel(1) {
  if (t.ndim > kMaxDims) throw std::invalid_argument("more than 8 dimensions");
  std::copy(t.shape, t.shape + ndim, shape);
  std::copy(t.strides, t.strides + ndim, strides);
  for (int d = 0; d < ndim; ++d) numel *= shape[d];
}

bool Layout::same(const dlpack::Tensor& t) const {
  if (t.ndim != ndim) return false;
  for (int d = 0; d < ndim; ++d)
    if (t.shape[d] != shape[d]) return false;
  for (int d = 0; d < ndim; ++d)
    if (t.strides[d] != strides[d] && shape[d] != 1 && numel != 0) return false;
  return true;
}

bool is_dense(const dlpack::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, extent
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1) dims.emplace_back(t.strides[d], t.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, extent] : dims) {
    if (stride != expected) return false;
    expected *= extent;
  }
  return true;
}

std::vector<int64_t> Table::gather(PyObject* param_groups, PyObject* state, const std::vector<int>& rules) {
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
      }
      Slot& slot = slots_[i];
      if (slot.group != group || slot.rule != rules[size_t(group)]) {
        slot.ready = false;
        slot.group = int32_t(group);
        slot.rule = rules[size_t(group)];
      }
      slot.active = false;
      const Ref grad = grad_of(param);
      if (grad.get() == Py_None) continue;
      if (refresh(slot, grad.get()))
        slot.active = true;
      else {
        slot.ready = false;
        attention.push_back(int64_t(i));
      }
    }
  }
  moved_ |= i < slots_.size();
  slots_.erase(slots_.begin() + ptrdiff_t(i), slots_.end());
  return attention;
}

// Pointers of this step, if nothing but pointers changed.
bool Table::refresh(Slot& slot, PyObject* grad) {
  if (!slot.ready || !state_unchanged(slot)) return false;
  dlpack::Tensor p, g;
  if (!read_tensor(slot.param.get(), &p) || !read_tensor(grad, &g)) return false;
  if (!(p.device == slot.device) || !(g.device == slot.device)) return false;
  if (dtype_of(p.dtype) != slot.dtype || dtype_of(g.dtype) != slot.grad_dtype) return false;
  if (!slot.layout.same(p) || !slot.layout.same(g)) return false;
  if (slot.layout.numel == 1 && is_negated(grad)) return false;
  moved_ |= p.data != slot.data;
  slot.data = p.data;
  slot.grad = g.data;
  return true;
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

void Table::bind(int64_t i, PyObject* param, PyObject* grad, PyObject* state_dict, PyObject* states, PyObject* step,
                 PyObject* owners, bool fresh, bool lasting, bool on_device) {
  Slot& slot = slots_.at(size_t(i));
  dlpack::Tensor p;
  const auto read = [&](PyObject* object, const char* what) {
    dlpack::Tensor t;
    if (!read_tensor(object, &t)) throw std::invalid_argument(std::string(what) + " has no memory that can be read");
    if (object != param && !(t.device == p.device))
      throw std::invalid_argument(std::string(what) + " is on another device than its parameter");
    return t;
  };
  p = read(param, "the parameter");
  if (!on_device && p.device.type != dlpack::kCPU) throw std::invalid_argument("the parameter is not on the CPU");
  const dlpack::Tensor g = read(grad, "the gradient");
  Layout layout(p);
  if (!is_dense(p)) throw std::invalid_argument("the parameter is not dense");
  if (!layout.same(g)) throw std::invalid_argument("the gradient's shape or strides differ from the parameter's");
  const Py_ssize_t n_states = PyTuple_Size(states);
  if (n_states < 0) throw PythonError();
  if (n_states > kMaxStates) throw std::invalid_argument("too many states");
  void* pointers[kMaxStates]{};
  Dtype state_dtype = dtype_of(p.dtype);
  for (Py_ssize_t s = 0; s < n_states; ++s) {
    const dlpack::Tensor t = read(PyTuple_GET_ITEM(states, s), "a state");
    if (!layout.same(t)) throw std::invalid_argument("a state's shape or strides differ from the parameter's");
    if (s > 0 && dtype_of(t.dtype) != state_dtype) throw std::invalid_argument("states of different dtypes");
    state_dtype = dtype_of(t.dtype);
    pointers[s] = t.data;
  }
  void* counter = nullptr;
  bool counter_is_double = false;
  if (step != Py_None) {
    const dlpack::Tensor t = read(step, "the step counter");
    const Dtype dtype = dtype_of(t.dtype);
    if (Layout(t).numel != 1 || (dtype != Dtype::kF32 && (on_device || dtype != Dtype::kF64)))
      throw std::invalid_argument("the step counter is not a float scalar");
    counter = t.data;
    counter_is_double = dtype == Dtype::kF64;
  }

  slot.state_dict = Ref::borrow(state_dict == Py_None ? nullptr : state_dict);
  slot.owners = Ref::borrow(owners);
  slot.n_items = 0;
  if (PyObject* dict = slot.state_dict.get()) {
    lasting &= PyDict_GET_SIZE(dict) <= Slot::kMaxItems;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (lasting && PyDict_Next(dict, &position, &key, &value))
      slot.state_items[slot.n_items++] = {Ref::borrow(key), Ref::borrow(value)};
  }
  slot.fresh = fresh || (slot.fresh && pointers[0] == slot.states[0]);
  slot.layout = std::move(layout);
  slot.dtype = dtype_of(p.dtype);
  slot.grad_dtype = dtype_of(g.dtype);
  slot.state_dtype = state_dtype;
  slot.data = p.data;
  slot.grad = g.data;
  std::copy(pointers, pointers + kMaxStates, slot.states);
  slot.n_states = int(n_states);
  slot.step = counter;
  slot.step_is_double = counter_is_double;
  slot.device = p.device;
  slot.on_device = on_device;
  slot.ready = lasting;
  slot.active = true;
  moved_ = true;
}

// Parameters that share memory (tied by .data, say) step in order, in waves of their own: two threads must not meet
// there. Looked at only when a pointer or the set of active tensors changed.
uint64_t Table::settle() {
  bool changed = moved_;
  for (Slot& slot : slots_) {
    changed |= slot.active != slot.was_active;
    slot.was_active = slot.active;
  }
  if (!changed) return version_;
  moved_ = false;
  ++version_;
  updated_ = Ref();
  struct Range {
    const char *begin, *end;
    size_t slot;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.wave = 0;
    if (!slot.active || slot.layout.numel == 0) continue;
    const auto add = [&](void* data, Dtype dtype) {
      const char* begin = static_cast<const char*>(data);
      ranges.push_back({begin, begin + slot.layout.numel * size_of(dtype), i});
    };
    add(slot.data, slot.dtype);
    for (int s = 0; s < slot.n_states; ++s) add(slot.states[s], slot.state_dtype);
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<std::pair<size_t, size_t>> clashes;  // earlier slot, later slot
  for (size_t a = 0; a < ranges.size(); ++a)
    for (size_t b = a + 1; b < ranges.size() && ranges[b].begin < ranges[a].end; ++b)
      if (ranges[a].slot != ranges[b].slot) clashes.push_back(std::minmax(ranges[a].slot, ranges[b].slot));
  std::sort(clashes.begin(), clashes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  for (const auto& [earlier, later] : clashes)
    slots_[later].wave = std::max(slots_[later].wave, slots_[earlier].wave + 1);
  return version_;
}

static auto launch_key(const Slot& s) { return std::tuple(s.wave, s.rule, s.dtype, s.grad_dtype, s.state_dtype); }

template <class S>
static void sort_into_launches(std::vector<S*>& order) {
  const auto before = [](const Slot* a, const Slot* b) { return launch_key(*a) < launch_key(*b); };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
}

std::vector<Launch> Table::launches(const std::vector<Group>& groups, int threads) {
  settle();
  std::vector<Slot*> order;
  order.reserve(slots_.size());
  for (Slot& slot : slots_)
    if (slot.active && !slot.on_device) order.push_back(&slot);
  sort_into_launches(order);

  rows_.clear();
  rows_.reserve(order.size());
  std::vector<Launch> launches;
  for (size_t i = 0; i < order.size(); ++i) {
    Slot& slot = *order[i];
    if (i == 0 || launch_key(*order[i - 1]) != launch_key(slot))
      launches.push_back(
          {slot.rule, slot.dtype, slot.grad_dtype, slot.state_dtype, rows_.data() + i, 0, groups.data(), threads});
    ++launches.back().n_rows;
    double step = slot.fresh ? 1 : 2;
    if (slot.step)
      step = slot.step_is_double ? (*static_cast<double*>(slot.step) += 1) : (*static_cast<float*>(slot.step) += 1);
    slot.fresh = false;
    Row row{slot.data, slot.grad, {}, slot.layout.numel, step, slot.group};
    std::copy(slot.states, slot.states + kMaxStates, row.state);
    rows_.push_back(row);
  }
  return launches;
}

std::vector<DeviceLaunch>& DevicePlan::lay_out(Table& table, int32_t device) {
  const std::vector<Slot>& slots = table.slots();
  const uint64_t version = table.settle();
  if (version == version_) {
    for (size_t l = 0; l < launches_.size(); ++l) {
      DeviceLaunch& launch = launches_[l];
      launch.rows_changed = launch.grads_changed = false;
      for (size_t r = 0; r < launch.grads.size(); ++r) {
        const void* grad = slots[slots_[l][r]].grad;
        launch.grads_changed |= grad != launch.grads[r];
        launch.grads[r] = grad;
      }
    }
    return launches_;
  }
  version_ = version;
  launches_.clear();
  slots_.clear();
  std::vector<const Slot*> order;
  for (const Slot& slot : slots)
    if (slot.active && slot.on_device && slot.device.id == device) order.push_back(&slot);
  sort_into_launches(order);
  for (size_t i = 0; i < order.size(); ++i) {
    const Slot& slot = *order[i];
    if (i == 0 || launch_key(*order[i - 1]) != launch_key(slot)) {
      launches_.push_back({slot.rule, slot.dtype, slot.grad_dtype, slot.state_dtype, {}, {}, 0, true, true, {}});
      slots_.emplace_back();
    }
    DeviceLaunch& launch = launches_.back();
    DeviceRow row{slot.data, {}, static_cast<float*>(slot.step), slot.layout.numel, launch.chunks, int64_t(slot.group)};
    std::copy(slot.states, slot.states + kMaxStates, row.state);
    launch.rows.push_back(row);
    launch.grads.push_back(slot.grad);
    launch.chunks += (slot.layout.numel + kChunk - 1) / kChunk;
    slots_.back().push_back(size_t(&slot - slots.data()));
  }
  return launches_;
}

PyObject* Table::updated() {
  if (updated_.get()) return updated_.get();
  Ref list = Ref::steal(PyList_New(0));
  if (!list.get()) throw PythonError();
  for (const Slot& slot : slots_)
    if (slot.active && PyList_Append(list.get(), slot.param.get()) != 0) throw PythonError();
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
