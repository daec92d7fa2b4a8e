// Torch tensors at the border, without torch: a view over DLPack's C exchange API (torch >= 2.11)
// and its pybind11 caster. A view borrows: it lives as long as the Python argument it came from.
// 0.3 us per tensor.
//
// The structs are the ABI of the DLPack 1.x specification (https://dmlc.github.io/dlpack), written
// out here because five of them are all that is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

#include "check.h"
#include "dtype.h"

namespace ic {

namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows; no stream synchronisation
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

static_assert(sizeof(void*) == 8 && sizeof(Tensor) == 48);
static_assert(offsetof(Tensor, shape) == 24 && offsetof(Tensor, byte_offset) == 40);
static_assert(sizeof(ManagedTensor) == 64);
static_assert(offsetof(ExchangeApi, tensor_from_object) == 40 && sizeof(ExchangeApi) == 56);

inline constexpr int32_t kCpu = 1, kCuda = 2;
inline constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6;

// torch.Tensor's table, found once.
inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  static const ExchangeApi* found = [type]() -> const ExchangeApi* {
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (!capsule) {
      PyErr_Clear();
      return nullptr;
    }
    auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    for (; api && api->version.major != 1; api = api->previous) {
    }
    if (PyErr_Occurred()) PyErr_Clear();
    return api;
  }();
  return found;
}

}  // namespace dlpack

class TensorView {
 public:
  int ndim() const { return t_.ndim; }
  int64_t size(int i) const { return t_.shape[i < 0 ? i + t_.ndim : i]; }
  int64_t stride(int i) const { return t_.strides[i < 0 ? i + t_.ndim : i]; }  // in elements
  bool is_cuda() const { return t_.device.type == dlpack::kCuda; }
  int device() const { return t_.device.id; }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < t_.ndim; ++i) n *= t_.shape[i];
    return n;
  }

  Dtype dtype() const {
    const auto [code, bits, lanes] = t_.dtype;
    if (code == dlpack::kFloat && bits == 32) return Dtype::kFloat32;
    if (code == dlpack::kBFloat && bits == 16) return Dtype::kBFloat16;
    if (code == dlpack::kFloat && bits == 16) return Dtype::kFloat16;
    if (code == dlpack::kInt && bits == 32) return Dtype::kInt32;
    if (code == dlpack::kInt && bits == 64) return Dtype::kInt64;
    if (code == dlpack::kBool && bits == 8) return Dtype::kBool;
    if (code == dlpack::kUInt && bits == 8) return Dtype::kUInt8;
    fail(__FILE_NAME__, __LINE__, "tensor of an unsupported element type: DLPack code ", int{code},
         ", ", int{bits}, " bits");
  }

  // The first element, of whatever type dtype() says.
  void* raw() const { return static_cast<char*>(t_.data) + t_.byte_offset; }

  // The first element; the type must be the tensor's.
  template <class T>
  T* data() const {
    IC_CHECK(is<T>(), "tensor of ", sizeof(T), "-byte elements expected, got DLPack code ",
             int{t_.dtype.code}, ", ", int{t_.dtype.bits}, " bits");
    return static_cast<T*>(raw());
  }

  void* stream() const {  // torch's current stream of the tensor's device
    void* out = nullptr;
    IC_CHECK(api_->current_stream(t_.device.type, t_.device.id, &out) == 0, "no current stream");
    return out;
  }

  bool load(PyObject* object) {
    api_ = dlpack::exchange_api(Py_TYPE(object));
    if (!api_ || !api_->tensor_from_object) return false;
    if (api_->tensor_from_object(object, &t_) == 0) return true;
    throw pybind11::error_already_set();
  }

 private:
  template <class T>
  bool is() const {
    const Dtype d = dtype();
    using U = std::remove_const_t<T>;
    if constexpr (std::is_same_v<U, float>) return d == Dtype::kFloat32;
    if constexpr (std::is_same_v<U, BFloat16>) return d == Dtype::kBFloat16;
    if constexpr (std::is_same_v<U, Float16>) return d == Dtype::kFloat16;
    if constexpr (std::is_same_v<U, int32_t>) return d == Dtype::kInt32;
    if constexpr (std::is_same_v<U, int64_t>) return d == Dtype::kInt64;
    if constexpr (std::is_same_v<U, bool>) return d == Dtype::kBool;
    if constexpr (std::is_same_v<U, uint8_t>) return d == Dtype::kUInt8 || d == Dtype::kBool;
    return false;
  }

  dlpack::Tensor t_{};
  const dlpack::ExchangeApi* api_ = nullptr;
};

}  // namespace ic

namespace pybind11::detail {

template <>
struct type_caster<ic::TensorView> {
  PYBIND11_TYPE_CASTER(ic::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    return PyObject_HasAttrString(reinterpret_cast<PyObject*>(Py_TYPE(source.ptr())),
                                  "__dlpack_c_exchange_api__") &&
           value.load(source.ptr());
  }
};

}  // namespace pybind11::detail
