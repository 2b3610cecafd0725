// fusedopt._native: the gather and the CPU engine. Nothing but argument passing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "cpu/dispatch.h"
#include "gather.h"
#include "rules.h"

namespace py = pybind11;
using namespace fusedopt;

#if defined(FUSEDOPT_CUDA)
namespace fusedopt {
void bind_cuda(py::module_&);
}
#endif

namespace {

template <class Call>
decltype(auto) checked(const Call& call) {
  try {
    return call();
  } catch (const PythonError&) {
    throw py::error_already_set();
  }
}

std::vector<Group> groups_from(const std::vector<std::pair<std::vector<double>, double>>& values) {
  std::vector<Group> groups;
  for (const auto& [hyper, grad_factor] : values) {
    if (hyper.size() > size_t(kMaxHyper)) throw std::invalid_argument("too many hyperparameters");
    Group group{};
    std::copy(hyper.begin(), hyper.end(), group.hyper);
    group.grad_factor = grad_factor;
    groups.push_back(group);
  }
  return groups;
}

py::list rules() {
  py::list list;
#define FUSEDOPT_DESCRIBE(R) \
  list.append(               \
      py::make_tuple(R<float>::kName, R<float>::kHyper, R<float>::kStateNames, R<float>::kStates, R<float>::kSigned));
  namespace isa = fusedopt::FUSEDOPT_ISA;
  using namespace isa;
  FUSEDOPT_RULES(FUSEDOPT_DESCRIBE)
#undef FUSEDOPT_DESCRIBE
  return list;
}

// A CPU tensor argument. None gives data = null.
dlpack::Tensor any_tensor(py::handle object, const char* name) {
  dlpack::Tensor t{};
  if (object.is_none()) return t;
  checked([&] {
    if (!read_tensor(object.ptr(), &t))
      throw std::invalid_argument(std::string(name) + " has no memory that can be read");
    return 0;
  });
  if (t.device.type != dlpack::kCPU) throw std::invalid_argument(std::string(name) + " is not on the CPU");
  return t;
}

void require(bool fits, const dlpack::Tensor& t, const char* name) {
  if (t.data && !fits) throw std::invalid_argument(std::string(name) + " has a dtype that does not fit");
}

dlpack::Tensor tensor(py::handle object, const char* name, std::initializer_list<Dtype> dtypes) {
  const dlpack::Tensor t = any_tensor(object, name);
  require(std::find(dtypes.begin(), dtypes.end(), dtype_of(t.dtype)) != dtypes.end(), t, name);
  return t;
}

dlpack::Tensor indices(py::handle object, const char* name) {
  const dlpack::Tensor t = any_tensor(object, name);
  require(t.dtype.code == dlpack::kInt && t.dtype.bits == 64, t, name);
  return t;
}

dlpack::Tensor flags(py::handle object, const char* name) {
  const dlpack::Tensor t = any_tensor(object, name);
  require(t.dtype.code == dlpack::kBool, t, name);
  return t;
}

// The strides of a matrix as CrossEntropyArgs has it.
void matrix_strides(const dlpack::Tensor& t, const char* name, const CrossEntropyArgs& a, int64_t* stride,
                    int64_t* class_stride) {
  const int last = t.ndim - 1;
  const bool fits =
      t.ndim == (a.pixels ? 3 : 2) && t.shape[1] == a.classes && t.shape[0] * (a.pixels ? t.shape[2] : 1) == a.rows;
  if (!fits || (t.shape[last] > 1 && t.strides[last] != 1))
    throw std::invalid_argument(std::string(name) +
                                " must be (rows, classes) with class stride 1, or (batch, classes, pixels) with pixel "
                                "stride 1, as logits are");
  *stride = t.strides[0];
  *class_stride = t.strides[1];
}

void* vector_of(const dlpack::Tensor& t, const char* name, int64_t n) {
  if (t.data && (t.ndim != 1 || t.shape[0] != n || (n > 1 && t.strides[0] != 1)))
    throw std::invalid_argument(std::string(name) + " must be contiguous with " + std::to_string(n) + " elements");
  return t.data;
}

// torch's words first, then where and what would fit.
void check_target(const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t i = 0; i < rows; ++i)
    if (target[i] != ignore_index && (target[i] < 0 || target[i] >= classes))
      throw py::index_error("Target " + std::to_string(target[i]) + " is out of bounds. (at flat position " +
                            std::to_string(i) + "; expected 0 <= target < " + std::to_string(classes) +
                            " or ignore_index=" + std::to_string(ignore_index) + ")");
}

// The denominator of a mean over class indices: how many rows, or how much weight, count.
double target_total(py::handle target_object, py::handle weight_object, int64_t ignore_index, int64_t classes) {
  const dlpack::Tensor t = indices(target_object, "target");
  const int64_t rows = t.ndim == 1 ? t.shape[0] : 0;
  const auto* target = static_cast<const int64_t*>(vector_of(t, "target", rows));
  check_target(target, rows, classes, ignore_index);
  const dlpack::Tensor weight = tensor(weight_object, "weight", {Dtype::kF32, Dtype::kF64});
  vector_of(weight, "weight", classes);
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] == ignore_index) continue;
    total += !weight.data                            ? 1
             : dtype_of(weight.dtype) == Dtype::kF64 ? static_cast<const double*>(weight.data)[target[i]]
                                                     : static_cast<const float*>(weight.data)[target[i]];
  }
  return total;
}

// weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale
using Rule = std::tuple<py::object, int64_t, double, double, std::optional<double>, double>;

struct CrossEntropyCall {
  py::handle logits, target, grad, upstream, loss, lse, argmax, correct, entropy;
  const Rule& rule;
  double weight_sum, grad_factor;
};

CrossEntropyArgs arguments(const CrossEntropyCall& c) {
  const auto& [weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale] = c.rule;
  const dlpack::Tensor logits = tensor(c.logits, "logits", {Dtype::kF64, Dtype::kF32, Dtype::kBF16, Dtype::kF16});
  if (logits.ndim != 2 && logits.ndim != 3)
    throw std::invalid_argument("logits must be (rows, classes) or (batch, classes, pixels)");
  CrossEntropyArgs a{};
  a.dtype = dtype_of(logits.dtype);
  const auto same = {a.dtype};
  const auto compute = {a.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32};
  a.pixels = logits.ndim == 3 ? logits.shape[2] : 0;
  a.rows = logits.shape[0] * (a.pixels ? a.pixels : 1);
  a.classes = logits.shape[1];
  a.logits = logits.data;
  matrix_strides(logits, "logits", a, &a.logits_stride, &a.logits_class_stride);
  dlpack::Tensor probe{};
  checked([&] { return read_tensor(c.target.ptr(), &probe); });
  if (probe.dtype.code == dlpack::kInt) {
    a.target = static_cast<const int64_t*>(vector_of(indices(c.target, "target"), "target", a.rows));
    check_target(a.target, a.rows, a.classes, ignore_index);
  } else {
    const dlpack::Tensor probabilities = tensor(c.target, "target", same);
    a.probabilities = probabilities.data;
    matrix_strides(probabilities, "target", a, &a.probabilities_stride, &a.probabilities_class_stride);
  }
  a.weight = vector_of(tensor(weight, "weight", compute), "weight", a.classes);
  a.weight_sum = c.weight_sum;
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.z_loss = z_loss;
  a.softcap = softcap.value_or(0);
  a.logit_scale = logit_scale;
  if (!c.grad.is_none()) {
    const dlpack::Tensor grad = tensor(c.grad, "grad", same);
    a.grad = grad.data;
    matrix_strides(grad, "grad", a, &a.grad_stride, &a.grad_class_stride);
  }
  a.grad_factor = c.grad_factor;
  a.upstream = vector_of(tensor(c.upstream, "upstream", compute), "upstream", a.rows);
  a.loss = vector_of(tensor(c.loss, "loss", compute), "loss", a.rows);
  a.lse = vector_of(tensor(c.lse, "lse", compute), "lse", a.rows);
  a.argmax = static_cast<int64_t*>(vector_of(indices(c.argmax, "argmax"), "argmax", a.rows));
  a.correct = static_cast<bool*>(vector_of(flags(c.correct, "correct"), "correct", a.rows));
  a.entropy = vector_of(tensor(c.entropy, "entropy", compute), "entropy", a.rows);
  return a;
}

// Dense tensors, one element for one element of the first as they lie in memory.
void* alike(const dlpack::Tensor& t, const char* name, const dlpack::Tensor& first) {
  bool same = t.ndim == first.ndim && is_dense(t);
  for (int d = 0; same && d < t.ndim; ++d)
    same = t.shape[d] == first.shape[d] && (t.shape[d] == 1 || t.strides[d] == first.strides[d]);
  if (!same) throw std::invalid_argument(std::string(name) + " must be dense, with input's shape and strides");
  return t.data;
}

double mse(py::handle input, py::handle target, py::handle grad, double grad_factor, int threads) {
  const dlpack::Tensor x = tensor(input, "input", {Dtype::kF64, Dtype::kF32, Dtype::kBF16, Dtype::kF16});
  MseArgs a{};
  a.dtype = dtype_of(x.dtype);
  a.input = alike(x, "input", x);
  a.target = alike(tensor(target, "target", {a.dtype}), "target", x);
  if (!grad.is_none()) a.grad = alike(tensor(grad, "grad", {a.dtype}), "grad", x);
  a.grad_factor = grad_factor;
  a.numel = 1;
  for (int d = 0; d < x.ndim; ++d) a.numel *= x.shape[d];
  py::gil_scoped_release release;
  return cpu_mse(a, threads);
}

int visit_table(PyObject* self, visitproc visit, void* arg) {
#if PY_VERSION_HEX >= 0x03090000
  Py_VISIT(Py_TYPE(self));
#endif
  if (!py::detail::is_holder_constructed(self)) return 0;
  return py::cast<Table&>(py::handle(self)).visit(visit, arg);
}

int clear_table(PyObject* self) {
  if (py::detail::is_holder_constructed(self)) py::cast<Table&>(py::handle(self)).clear();
  return 0;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "fusedopt's native core: tensors in through DLPack, loops for the CPU, and CUDA kernels where built.";
  m.def(
      "rules", rules,
      "(name, hyperparameters, states, number of states, bit mask of the signed states) of every rule, in the order of "
      "their index");
  m.def("has_openmp", has_openmp);
  m.def("cpu_isa", [] { return std::string(cpu_isa()); }, "The instruction set in use.");
  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (const char* const* isa = cpu_isas(); *isa; ++isa) names.emplace_back(*isa);
        return names;
      },
      "Instruction sets that this build holds and this machine runs, best first.");
  m.def("use_cpu_isa", [](const std::string& name) { return use_cpu_isa(name.c_str()); });
  m.def(
      "advise_huge_pages",
      [](py::handle object) {
        dlpack::Tensor t;
        if (!checked([&] { return read_tensor(object.ptr(), &t); }) || t.device.type != dlpack::kCPU) return;
        int64_t bytes = t.dtype.bits / 8;
        for (int d = 0; d < t.ndim; ++d) bytes *= t.shape[d];
        advise_huge_pages(t.data, bytes);
      },
      "Ask for huge pages behind a contiguous CPU tensor that has not been touched yet.");
  m.def("obstacle", [](py::handle object) -> std::string {
    dlpack::Tensor t;
    if (!checked([&] { return read_tensor(object.ptr(), &t); }))
      return "no memory of its own (meta, fake or wrapper tensor)";
    if (t.ndim > Layout::kMaxDims) return "more than " + std::to_string(Layout::kMaxDims) + " dimensions";
    return is_dense(t) ? "" : "strides with gaps or overlaps";
  });
  m.def("cpu_can_step", [](int rule, const std::string& param, const std::string& grad, const std::string& state) {
    Launch launch{};
    launch.rule = rule;
    launch.param = dtype_named(param);
    launch.grad = dtype_named(grad);
    launch.state = dtype_named(state);
    return cpu_can_step(launch);
  });

  py::class_<Table>(m, "Table", py::module_local(), py::custom_type_setup([](PyHeapTypeObject* heap) {
                      heap->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
                      heap->ht_type.tp_traverse = visit_table;
                      heap->ht_type.tp_clear = clear_table;
                    }),
                    "The tensors of an optimizer's steps; see gather.h.")
      .def(py::init<>())
      .def("__len__", &Table::size)
      .def("filled", &Table::filled, "A number that changes when a slot has another parameter.")
      .def("gather",
           [](Table& t, py::handle param_groups, py::handle state, const std::vector<int>& rules, bool averages) {
             return checked([&] { return t.gather(param_groups.ptr(), state.ptr(), rules, averages); });
           })
      .def(
          "bind",
          [](Table& t, int64_t i, py::handle param, py::handle grad, py::handle state_dict, py::handle states,
             py::handle scales, py::handle master, py::handle ema, py::handle step, py::handle owners, py::handle spec,
             py::handle grad_spec, int32_t holders, int64_t index, const std::array<int64_t, 3>& origin, bool fresh,
             bool lasting, bool on_device) {
            checked([&] {
              t.bind(i, {param.ptr(),
                         grad.ptr(),
                         state_dict.ptr(),
                         states.ptr(),
                         scales.ptr(),
                         master.ptr(),
                         ema.ptr(),
                         step.ptr(),
                         owners.ptr(),
                         spec.ptr(),
                         grad_spec.ptr(),
                         holders,
                         index,
                         {origin[0], origin[1], origin[2]},
                         fresh,
                         lasting,
                         on_device});
              return 0;
            });
          },
          py::arg("slot"), py::kw_only(), py::arg("param"), py::arg("grad"), py::arg("state_dict"), py::arg("states"),
          py::arg("scales") = py::tuple(), py::arg("master") = py::none(), py::arg("ema") = py::none(), py::arg("step"),
          py::arg("owners"), py::arg("spec") = py::none(), py::arg("grad_spec") = py::none(), py::arg("holders") = 0,
          py::arg("index"), py::arg("origin") = std::array<int64_t, 3>{0, 1, 1}, py::arg("fresh"), py::arg("lasting"),
          py::arg("on_device") = false)
      .def(
          "slot",
          [](const Table& t, int64_t i) {
            const Slot& slot = t.slot(i);
            return py::make_tuple(py::reinterpret_borrow<py::object>(slot.param.get()), slot.group);
          },
          "(parameter, group index) of a slot")
      .def("active", &Table::active)
      .def("updated", [](Table& t) { return checked([&] { return py::reinterpret_borrow<py::object>(t.updated()); }); })
      .def(
          "cpu_step",
          [](Table& t, const std::vector<std::pair<std::vector<double>, double>>& groups, int threads,
             const std::optional<std::tuple<double, bool, uint64_t>>& choice) {
            const std::vector<Group> group_values = groups_from(groups);
            Precision precision{};
            if (choice) std::tie(precision.ema_weight, precision.stochastic, precision.seed) = *choice;
            const std::vector<Launch> launches = t.launches(group_values, threads, choice ? &precision : nullptr);
            py::gil_scoped_release release;
            for (const Launch& launch : launches) cpu_step(launch);
            return launches.size();
          },
          py::arg("groups"), py::arg("threads"), py::arg("precision") = std::nullopt,
          "One step of every active slot; returns the number of launches. `precision`: see step.h.")
      .def(
          "cpu_sum_squares",
          [](const Table& t, int threads) {
            std::map<int32_t, std::vector<Array>> grads;
            for (const Slot& slot : t.slots())
              if (slot.active && slot.grad && !slot.on_device)
                grads[slot.holders].push_back({slot.grad, slot.grad_dtype, slot.layout.numel});
            py::gil_scoped_release release;
            std::map<int32_t, double> sums;
            for (const auto& [holders, arrays] : grads) sums[holders] = cpu_sum_squares(arrays, threads);
            return sums;
          },
          "Of the gradients of every active slot on the CPU, by their holders.");

  py::class_<DevicePlan>(m, "DevicePlan", py::module_local(), "The tables of an optimizer's steps on one device.")
      .def(py::init<>())
      .def(
          "lay_out",
          [](DevicePlan& plan, Table& table, int32_t device) {
            py::list list;
            const auto view = [](auto& vector) {
              return py::memoryview::from_memory(vector.data(), ssize_t(vector.size() * sizeof(vector[0])));
            };
            for (DeviceLaunch& launch : checked([&]() -> auto& { return plan.lay_out(table, device); })) {
              if (launch.rows_changed) launch.map_chunks();
              list.append(py::make_tuple(
                  launch.rule, py::make_tuple(name_of(launch.param), name_of(launch.grad), name_of(launch.state)),
                  view(launch.rows), view(launch.grads), view(launch.row_of_chunk),
                  launch.rows_changed || launch.grads_changed, launch.holders));
            }
            return list;
          },
          "[(rule, dtypes, rows, gradients, row of each chunk, changed, holders)] of the active slots on a device, as "
          "step.h has them, in memory that is this plan's until its next lay_out.");

  m.def("cpu_mse", mse, "The sum of squares, and grad = grad_factor * (input - target) where it is not None.");
  m.def("target_total", target_total);
  m.def("cpu_cross_entropy_forward", [](py::handle logits, py::handle target, const Rule& rule, double weight_sum,
                                        py::handle grad, double grad_factor, py::handle loss, py::handle lse,
                                        py::handle argmax, py::handle correct, py::handle entropy, int threads) {
    const CrossEntropyArgs a = arguments(
        {logits, target, grad, py::none(), loss, lse, argmax, correct, entropy, rule, weight_sum, grad_factor});
    py::gil_scoped_release release;
    cpu_cross_entropy_forward(a, threads);
  });
  m.def("cpu_cross_entropy_backward",
        [](py::handle logits, py::handle target, const Rule& rule, double weight_sum, py::handle grad,
           double grad_factor, py::handle upstream, py::handle lse, int threads) {
          const py::none none;
          const CrossEntropyArgs a =
              arguments({logits, target, grad, upstream, none, lse, none, none, none, rule, weight_sum, grad_factor});
          py::gil_scoped_release release;
          cpu_cross_entropy_backward(a, threads);
        });
#if defined(FUSEDOPT_CUDA)
  bind_cuda(m);
#endif
}
