// The CUDA part of fusedopt._native. Nothing but argument passing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/cross_entropy.h"
#include "cuda/mse.h"
#include "cuda/runtime.h"
#include "cuda/step.h"
#include "gather.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

using GroupValues = std::tuple<std::vector<double>, double, uintptr_t, bool>;

// The tables of one optimizer on one stream of one device, or in one captured graph, and what of them is up there.
class CudaPlan {
 public:
  size_t lay_out(Table& table, int32_t device, size_t n_groups) {
    launches_ = &plan_.lay_out(table, device);
    device_ = device;
    return launches_->empty() ? 0 : cuda_step_bytes(*launches_, n_groups);
  }

  std::vector<std::pair<int32_t, int64_t>> chunks() const {
    std::vector<std::pair<int32_t, int64_t>> of_launch;
    for (const DeviceLaunch& launch : *launches_) of_launch.emplace_back(launch.holders, launch.chunks);
    return of_launch;
  }

  int step(const std::vector<GroupValues>& values, uintptr_t memory, uintptr_t found_inf, uintptr_t grad_scale,
           uintptr_t stream, const std::optional<std::tuple<double, bool, uint64_t>>& choice) {
    Precision precision{};
    if (choice) std::tie(precision.ema_weight, precision.stochastic, precision.seed) = *choice;
    return with_tables(values, memory, stream, [&](CudaStepArgs& args) {
      args.found_inf = reinterpret_cast<const float*>(found_inf);
      args.grad_scale = reinterpret_cast<const float*>(grad_scale);
      args.precision = choice ? &precision : nullptr;
      return cuda_step(args);
    });
  }

  int sum_squares(const std::vector<GroupValues>& values, uintptr_t memory, uintptr_t partial, uintptr_t total,
                  uintptr_t stream) {
    return with_tables(values, memory, stream, [&](const CudaStepArgs& args) {
      return cuda_sum_squares(args, reinterpret_cast<double*>(partial), reinterpret_cast<double*>(total));
    });
  }

 private:
  // Run work(args), which sends of the tables what is not up there yet.
  template <class Work>
  int with_tables(const std::vector<GroupValues>& values, uintptr_t memory, uintptr_t stream, const Work& work) {
    std::vector<DeviceGroup> groups;
    for (const auto& [hyper, grad_factor, lr, lr_is_double] : values) {
      if (hyper.size() > size_t(kMaxHyper)) throw std::invalid_argument("too many hyperparameters");
      DeviceGroup group{};
      std::copy(hyper.begin(), hyper.end(), group.hyper);
      group.grad_factor = grad_factor;
      group.lr = reinterpret_cast<const void*>(lr);
      group.lr_is_double = lr_is_double;
      groups.push_back(group);
    }
    CudaStepArgs args{};
    args.launches = launches_;
    args.groups = &groups;
    args.all_changed = memory != memory_ || groups.size() != sent_.size();
    args.groups_changed =
        args.all_changed || std::memcmp(groups.data(), sent_.data(), groups.size() * sizeof(DeviceGroup)) != 0;
    args.memory = reinterpret_cast<void*>(memory);
    args.device = device_;
    args.stream = reinterpret_cast<void*>(stream);
    memory_ = 0;  // if a launch fails, all goes up again
    const int launched = work(args);
    memory_ = memory;
    sent_.swap(groups);
    return launched;
  }

  DevicePlan plan_;
  std::vector<DeviceLaunch>* launches_ = nullptr;
  std::vector<DeviceGroup> sent_;
  uintptr_t memory_ = 0;
  int32_t device_ = 0;
};

// A tensor's memory on the device; null for None.
template <class T>
T* memory_of(py::handle object) {
  if (object.is_none()) return nullptr;
  dlpack::Tensor t{};
  if (!read_tensor(object.ptr(), &t)) throw std::invalid_argument("a tensor has no memory that can be read");
  return static_cast<T*>(t.data);
}

// Fields that Python sets: tensors for pointers, numbers for numbers.
template <class T>
void bind_field(py::class_<CudaCrossEntropyArgs>& cls, const char* name, T* CudaCrossEntropyArgs::* field) {
  cls.def_property(name, nullptr,
                   [field](CudaCrossEntropyArgs& args, py::handle tensor) { args.*field = memory_of<T>(tensor); });
}
template <class T>
void bind_field(py::class_<CudaCrossEntropyArgs>& cls, const char* name, T CudaCrossEntropyArgs::* field) {
  cls.def_property(name, nullptr, [field](CudaCrossEntropyArgs& args, T value) { args.*field = value; });
}

void bind_cross_entropy(py::module_& m) {
  py::class_<CudaCrossEntropyArgs> args(m, "CudaCrossEntropyArgs", py::module_local(),
                                        "See csrc/cuda/cross_entropy.h.");
  args.def(py::init([] { return CudaCrossEntropyArgs{}; }));
  args.def_property("dtype", nullptr,
                    [](CudaCrossEntropyArgs& a, const std::string& name) { a.dtype = dtype_named(name); });
#define FUSEDOPT_FIELD(name) bind_field(args, #name, &CudaCrossEntropyArgs::name);
  FUSEDOPT_FIELD(logits)
  FUSEDOPT_FIELD(rows)
  FUSEDOPT_FIELD(classes)
  FUSEDOPT_FIELD(logits_stride)
  FUSEDOPT_FIELD(target)
  FUSEDOPT_FIELD(probabilities)
  FUSEDOPT_FIELD(probabilities_stride)
  FUSEDOPT_FIELD(weight)
  FUSEDOPT_FIELD(ignore_index)
  FUSEDOPT_FIELD(label_smoothing)
  FUSEDOPT_FIELD(z_loss)
  FUSEDOPT_FIELD(logit_scale)
  FUSEDOPT_FIELD(softcap)
  FUSEDOPT_FIELD(grad)
  FUSEDOPT_FIELD(grad_stride)
  FUSEDOPT_FIELD(grad_factor)
  FUSEDOPT_FIELD(upstream)
  FUSEDOPT_FIELD(loss)
  FUSEDOPT_FIELD(lse)
  FUSEDOPT_FIELD(argmax)
  FUSEDOPT_FIELD(correct)
  FUSEDOPT_FIELD(entropy)
#undef FUSEDOPT_FIELD
  m.def("cuda_cross_entropy", [](const CudaCrossEntropyArgs& a, bool forward, int device, uintptr_t stream) {
    cuda_cross_entropy(a, forward ? CudaPass::kForward : CudaPass::kBackward, device, reinterpret_cast<void*>(stream));
  });
  m.attr("CUDA_PARTIALS") = kPartials;
  m.def("cuda_target_factor",
        [](py::handle target, int64_t rows, py::handle weight, int64_t classes, int64_t ignore_index, bool mean,
           py::handle partial, py::handle factor, py::handle bad, int device, uintptr_t stream) {
          cuda_target_factor(memory_of<const int64_t>(target), rows, memory_of<const float>(weight), classes,
                             ignore_index, mean, memory_of<double>(partial), memory_of<float>(factor),
                             memory_of<BadTarget>(bad), device, reinterpret_cast<void*>(stream));
        });
  m.def("cuda_total_loss", [](py::handle losses, int64_t rows, py::handle factor, py::handle partial, py::handle loss,
                              int device, uintptr_t stream) {
    cuda_total_loss(memory_of<const float>(losses), rows, memory_of<const float>(factor), memory_of<double>(partial),
                    memory_of<float>(loss), device, reinterpret_cast<void*>(stream));
  });
  m.def("cuda_scale", [](py::handle tensor, const std::string& dtype, int64_t numel, py::handle factor, int device,
                         uintptr_t stream) {
    cuda_scale(memory_of<void>(tensor), dtype_named(dtype), numel, memory_of<const float>(factor), device,
               reinterpret_cast<void*>(stream));
  });
}

MseArgs mse_args(py::handle input, py::handle target, py::handle grad, double grad_factor, const std::string& dtype,
                 int64_t numel) {
  return {dtype_named(dtype),
          memory_of<const void>(input),
          memory_of<const void>(target),
          memory_of<void>(grad),
          grad_factor,
          numel};
}

void bind_mse(py::module_& m) {
  m.attr("CUDA_MSE_PARTIALS") = kMsePartials;
  m.def("cuda_mse",
        [](py::handle input, py::handle target, py::handle grad, double grad_factor, const std::string& dtype,
           int64_t numel, double factor, py::handle partial, py::handle loss, int device, uintptr_t stream) {
          cuda_mse(mse_args(input, target, grad, grad_factor, dtype, numel), factor, memory_of<double>(partial),
                   memory_of<float>(loss), device, reinterpret_cast<void*>(stream));
        });
  m.def("cuda_mse_backward",
        [](py::handle input, py::handle target, py::handle grad, double grad_factor, const std::string& dtype,
           int64_t numel, py::handle upstream, int device, uintptr_t stream) {
          cuda_mse_backward(mse_args(input, target, grad, grad_factor, dtype, numel), memory_of<const float>(upstream),
                            device, reinterpret_cast<void*>(stream));
        });
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_cross_entropy(m);
  bind_mse(m);
  m.def(
      "cuda_probe",
      [] {
        CudaProbe probe;
        {
          py::gil_scoped_release release;  // the driver takes up to seconds to start
          probe = probe_cuda();
        }
        py::list devices;
        for (const CudaDevice& device : probe.devices)
          devices.append(py::make_tuple(device.name, device.major, device.minor, device.multiprocessors));
        return py::make_tuple(probe.driver, probe.runtime, probe.error, probe.message, devices);
      },
      "(driver version, runtime version, error name or \"\", its text, [(name, major, minor, multiprocessors)])");
  m.def("cuda_can_step", [](int rule, const std::string& param, const std::string& grad, const std::string& state) {
    return cuda_can_step(rule, dtype_named(param), dtype_named(grad), dtype_named(state));
  });
  py::class_<CudaPlan>(m, "CudaPlan", py::module_local(), "The tables of an optimizer's steps on one stream.")
      .def(py::init<>())
      .def(
          "lay_out",
          [](CudaPlan& plan, Table& table, int32_t device, size_t n_groups) {
            try {
              return plan.lay_out(table, device, n_groups);
            } catch (const PythonError&) {
              throw py::error_already_set();
            }
          },
          "Lay out the active slots on a device; returns the bytes of device memory that step() needs, 0: nothing to "
          "do")
      .def("chunks", &CudaPlan::chunks, "(holders, partial sums that sum_squares() writes) of each launch, in order.")
      .def("sum_squares", &CudaPlan::sum_squares, py::arg("groups"), py::arg("memory"), py::arg("partial"),
           py::arg("total"), py::arg("stream"), "Of the gradients that lay_out() laid out.")
      .def("step", &CudaPlan::step, py::arg("groups"), py::arg("memory"), py::arg("found_inf"), py::arg("grad_scale"),
           py::arg("stream"), py::arg("precision") = std::nullopt,
           "Launch what lay_out() laid out; returns the number of kernels. `precision`: see step.h.");
}

}  // namespace fusedopt
