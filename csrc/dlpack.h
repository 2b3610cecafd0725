// The part of DLPack's C ABI (https://dmlc.github.io/dlpack, v1.2+) that reads a Python tensor without its framework's
// headers. Declarations only; the layout is fixed by that specification.
#pragma once
#include <cstdint>

namespace fusedopt::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kROCM = 10, kCUDAManaged = 13, kOneAPI = 14 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
  friend bool operator==(Device a, Device b) { return a.type == b.type && a.id == b.id; }
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // ndim elements, borrowed from the tensor
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

struct ExchangeApi {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // non-owning; 0 on success, else a Python error is set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

inline constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
inline constexpr uint32_t kMajorVersion = 1;

}  // namespace fusedopt::dlpack
