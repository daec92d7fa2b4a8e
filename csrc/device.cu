#include <cuda_runtime_api.h>

#include <cstring>

#include "check.h"
#include "device.h"

namespace ic {

DeviceInfo device_info() {
  DeviceInfo info{0, 0, -1, ""};
  cudaRuntimeGetVersion(&info.runtime);
  cudaDriverGetVersion(&info.driver);
  const cudaError_t error = cudaGetDeviceCount(&info.devices);
  if (error != cudaSuccess) {
    info.devices = -1;
    info.message = cudaGetErrorString(error);
    cudaGetLastError();
  }
  return info;
}

bool device_name(int device, char* name, int* major, int* minor) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  std::strncpy(name, properties.name, 255);
  name[255] = 0;
  *major = properties.major;
  *minor = properties.minor;
  return true;
}

namespace {

void check(cudaError_t error) {
  IC_CHECK(error == cudaSuccess, "current device: ", cudaGetErrorString(error));
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&before_));
  if (device != before_) check(cudaSetDevice(device));
  if (device == before_) before_ = -1;  // nothing to undo
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace ic
