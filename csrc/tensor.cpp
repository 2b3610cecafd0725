#include "tensor.h"

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fusedopt {
namespace {

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

}  // namespace

int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
      return 8;
    case Dtype::kF32:
      return 4;
    case Dtype::kCode:
      return 1;
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
  static constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "8bit", "other"};
  return kNames[int(dtype)];
}

Dtype dtype_named(const std::string& name) {
  for (Dtype dtype : {Dtype::kF64, Dtype::kF32, Dtype::kBF16, Dtype::kF16, Dtype::kCode})
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

}  // namespace fusedopt
