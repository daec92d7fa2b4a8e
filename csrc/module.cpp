// The table of contents: one block per op, tensor views -> Args. The only place that knows stream, device and
// the GIL. Python (instructcore/ops) has checked shapes and types and allocated the outputs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "gae.h"
#include "isa.h"
#include "tensor.h"

namespace py = pybind11;
using ic::TensorView;
using OptionalView = std::optional<TensorView>;

namespace {

template <class T>
T* data_or_null(const OptionalView& view) {
  return view ? view->data<T>() : nullptr;
}

int64_t stride_or_zero(const OptionalView& view, int dim) { return view ? view->stride(dim) : 0; }

// A CPU kernel follows cu_seqlens without further checks, so they are made here: 0 <= .. non-decreasing .. <= n.
void check_cu_seqlens(const char* op, const TensorView& cu_seqlens, int64_t n) {
  if (cu_seqlens.is_cuda()) return;
  const int32_t* cu = cu_seqlens.data<const int32_t>();
  int64_t before = 0;
  for (int64_t i = 0; i < cu_seqlens.size(0); ++i) {
    IC_CHECK(cu[i] >= before && cu[i] <= n, op, ": cu_seqlens must not decrease and stay within 0..", n,
             ", got ", cu[i], " at ", i);
    before = cu[i];
  }
}

// Runs a CPU kernel without the GIL. `op` has no CUDA kernel as yet: say so.
template <class Args>
void run_on_cpu(const char* op, const TensorView& where, void (*cpu)(const Args&), const Args& args) {
  IC_CHECK(!where.is_cuda(), op, ": this build has no CUDA kernel for it; move the tensors to the CPU");
  py::gil_scoped_release unlocked;
  cpu(args);
}

// ---- build ----

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isa"] = ic::isa_name(ic::current_isa());
  info["isa_supported"] = ic::isa_name(ic::best_isa());
  py::list devices;
#ifdef IC_CUDA
  const ic::DeviceInfo cuda = ic::device_info();
  char name[256];
  int major, minor;
  for (int i = 0; i < cuda.devices; ++i)
    if (ic::device_name(i, name, &major, &minor))
      devices.append(py::str("{} (sm_{}{})").format(name, major, minor));
  info["cuda"] = true;
  info["cuda_version"] = cuda.runtime;
  info["driver"] = cuda.driver;
  info["device_message"] = cuda.message;
#else
  info["cuda"] = false;
  info["cuda_version"] = 0;
  info["driver"] = 0;
  info["device_message"] = "";
#endif
  info["cuda_ops"] = false;  // ops with CUDA kernels in this build
  info["devices"] = devices;
  return info;
}

void set_isa(const std::string& name) {
#define IC_LEVEL(level) \
  if (name == #level) return ic::set_isa(ic::Isa::level);
  IC_ISA_LEVELS(IC_LEVEL)
#undef IC_LEVEL
  ic::fail(__FILE_NAME__, __LINE__, "set_isa: unknown instruction set ", name);
}

py::list isa_levels() {
  py::list names;
#define IC_LEVEL(level) \
  if (ic::Isa::level <= ic::best_isa()) names.append(#level);
  IC_ISA_LEVELS(IC_LEVEL)
#undef IC_LEVEL
  return names;
}

// ---- gae ----

void gae(TensorView rewards, TensorView values, OptionalView mask, OptionalView cu_seqlens,
         OptionalView dones, OptionalView bootstrap, TensorView advantages, TensorView returns,
         float gamma, float lambda, int threads) {
  const bool packed = cu_seqlens.has_value();
  if (packed) check_cu_seqlens("gae", *cu_seqlens, rewards.size(0));
  ic::GaeArgs args{};
  args.rewards = rewards.raw();
  args.values = values.raw();
  args.mask = data_or_null<const uint8_t>(mask);
  args.dones = data_or_null<const uint8_t>(dones);
  args.bootstrap = data_or_null<const float>(bootstrap);
  args.cu_seqlens = data_or_null<const int32_t>(cu_seqlens);
  args.advantages = advantages.data<float>();
  args.returns = returns.data<float>();
  args.rows = packed ? cu_seqlens->size(0) - 1 : rewards.size(0);
  args.steps = rewards.size(-1);
  args.rewards_row = packed ? 0 : rewards.stride(0);
  args.rewards_step = rewards.stride(-1);
  args.values_row = packed ? 0 : values.stride(0);
  args.values_step = values.stride(-1);
  args.mask_row = packed ? 0 : stride_or_zero(mask, 0);
  args.mask_step = stride_or_zero(mask, -1);
  args.dones_row = packed ? 0 : stride_or_zero(dones, 0);
  args.dones_step = stride_or_zero(dones, -1);
  args.rewards_dtype = rewards.dtype();
  args.values_dtype = values.dtype();
  args.gamma = gamma;
  args.lambda = lambda;
  args.threads = threads;
  run_on_cpu("gae", rewards, ic::gae_cpu, args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "instructcore's kernels; use them through instructcore.ops";

  m.def("build_info", &build_info);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("isa_levels", &isa_levels);

  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("cu_seqlens"),
        py::arg("dones"), py::arg("bootstrap"), py::arg("advantages"), py::arg("returns"),
        py::arg("gamma"), py::arg("lambda_"), py::arg("threads"));
}
