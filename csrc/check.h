// IC_CHECK(condition, "op: what must hold, got ", value, ...): throws std::runtime_error that ends
// in file:line. For the border and the launchers; kernels themselves never throw, exit or print.
#pragma once

#include <sstream>
#include <stdexcept>

namespace ic {

// The file's name in a path, as __FILE_NAME__ has it.
inline const char* file_name(const char* path) {
  const char* name = path;
  for (; *path; ++path)
    if (*path == '/') name = path + 1;
  return name;
}

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  message << " (" << file << ":" << line << ")";
  throw std::runtime_error(message.str());
}

}  // namespace ic

#define IC_CHECK(condition, ...)                                        \
  do {                                                                  \
    if (!(condition)) ::ic::fail(__FILE_NAME__, __LINE__, __VA_ARGS__); \
  } while (false)
