// What CUDA sees of this machine, and the current device. The queries are safe without a driver:
// they never throw.
#pragma once

namespace ic {

struct DeviceInfo {
  int driver;   // CUDA version the driver serves, 13000 for 13.0; 0: no driver
  int runtime;  // CUDA version this module was built with
  int devices;  // -1: the runtime cannot start (no driver, or one too old)
  const char* message;
};
DeviceInfo device_info();

// Fills name (256 bytes) and compute capability; false where there is no such device.
bool device_name(int device, char* name, int* major, int* minor);

// Makes `device` current, as launches need it, and the one before current again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

}  // namespace ic
