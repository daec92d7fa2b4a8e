#include <cuda_runtime_api.h>

#include <cstring>

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

}  // namespace ic
