// device.h where there is no CUDA: the emulator.
#include "../device.h"

#include <string.h>

namespace ic {

DeviceInfo device_info() { return {0, 0, 1, ""}; }

bool device_name(int, char* name, int* major, int* minor) {
  strcpy(name, "emulator");
  *major = 9;
  *minor = 0;
  return true;
}

DeviceGuard::DeviceGuard(int device) : before_(device) {}
DeviceGuard::~DeviceGuard() {}

}  // namespace ic
