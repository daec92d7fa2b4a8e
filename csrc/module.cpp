// The table of contents: one block per op, tensor views -> Args. The only place that knows stream, device and
// the GIL. Python (instructcore/ops) has checked shapes and types and allocated the outputs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "gae.h"
#include "isa.h"
#include "ppo_advantage.h"
#include "ppo_loss.h"
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

ic::GaeArgs gae_args(const TensorView& rewards, const TensorView& values, const OptionalView& mask,
                     const OptionalView& cu_seqlens, const OptionalView& dones,
                     const OptionalView& bootstrap, const TensorView& advantages,
                     const TensorView& returns, float gamma, float lambda, int threads) {
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
  return args;
}

void gae(TensorView rewards, TensorView values, OptionalView mask, OptionalView cu_seqlens,
         OptionalView dones, OptionalView bootstrap, TensorView advantages, TensorView returns,
         float gamma, float lambda, int threads) {
  run_on_cpu("gae", rewards, ic::gae_cpu,
             gae_args(rewards, values, mask, cu_seqlens, dones, bootstrap, advantages, returns, gamma,
                      lambda, threads));
}

// ---- ppo_advantage ----

void ppo_advantage(TensorView scores, TensorView logprobs, TensorView ref_logprobs, TensorView values,
                   TensorView mask, OptionalView score_index, OptionalView cu_seqlens,
                   OptionalView dones, OptionalView bootstrap, TensorView advantages,
                   TensorView returns, TensorView rewards, TensorView stats, TensorView workspace,
                   float kl_coef, float gamma, float lambda, float reward_clip, bool whiten_rewards,
                   bool whiten, bool unbiased, int threads) {
  ic::PpoAdvantageArgs args{};
  args.gae = gae_args(rewards, values, mask, cu_seqlens, dones, bootstrap, advantages, returns, gamma,
                      lambda, threads);
  args.scores = scores.data<const float>();
  args.logprobs = logprobs.data<const float>();
  args.ref_logprobs = ref_logprobs.data<const float>();
  args.mask = mask.data<const uint8_t>();
  args.score_index = data_or_null<const int64_t>(score_index);
  args.rewards = rewards.data<float>();
  args.row_moments = static_cast<ic::Moments*>(workspace.raw());
  args.stats = stats.data<float>();
  args.kl_coef = kl_coef;
  args.reward_clip = reward_clip;
  args.whiten_rewards = whiten_rewards;
  args.whiten = whiten;
  args.unbiased = unbiased;
  if (score_index && !logprobs.is_cuda())
    for (int64_t b = 0; b < args.gae.rows; ++b) {
      const int64_t length = args.gae.cu_seqlens
                                 ? args.gae.cu_seqlens[b + 1] - args.gae.cu_seqlens[b]
                                 : args.gae.steps;
      IC_CHECK(args.score_index[b] >= -1 && (args.score_index[b] < length || length == 0),
               "ppo_advantage: score_index must be within its row of ", length, " steps, or -1, got ",
               args.score_index[b], " at ", b);
    }
  run_on_cpu("ppo_advantage", logprobs, ic::ppo_advantage_cpu, args);
}

void whiten_advantages(TensorView advantages, OptionalView mask, TensorView mean, TensorView var,
                       TensorView out, int threads) {
  const ic::WhitenArgs args{
      advantages.data<const float>(), data_or_null<const uint8_t>(mask), mean.data<const float>(),
      var.data<const float>(),        out.data<float>(),                 advantages.numel(),
      threads};
  run_on_cpu("whiten_advantages", advantages, ic::whiten_cpu, args);
}

// ---- ppo_loss ----

void ppo_loss(TensorView logprobs, TensorView old_logprobs, TensorView advantages, TensorView mask,
              OptionalView values, OptionalView old_values, OptionalView returns, OptionalView entropy,
              OptionalView ref_logprobs, OptionalView weights, OptionalView cu_seqlens,
              OptionalView normalizer, TensorView loss, TensorView sums, OptionalView grad_logprobs,
              OptionalView grad_values, OptionalView grad_entropy, TensorView workspace,
              int64_t segments, int64_t segment_tokens, bool by_sequence, float ratio_low,
              float ratio_high, float dual_clip, float value_clip_range, float value_coef,
              float entropy_coef, float kl_coef, int threads) {
  if (cu_seqlens) check_cu_seqlens("ppo_loss", *cu_seqlens, logprobs.numel());
  ic::PpoLossArgs args{};
  args.logprobs = logprobs.data<const float>();
  args.old_logprobs = old_logprobs.data<const float>();
  args.advantages = advantages.data<const float>();
  args.mask = mask.data<const uint8_t>();
  args.values = data_or_null<const float>(values);
  args.old_values = data_or_null<const float>(old_values);
  args.returns = data_or_null<const float>(returns);
  args.entropy = data_or_null<const float>(entropy);
  args.ref_logprobs = data_or_null<const float>(ref_logprobs);
  args.weights = data_or_null<const float>(weights);
  args.cu_seqlens = data_or_null<const int32_t>(cu_seqlens);
  args.normalizer = data_or_null<const float>(normalizer);
  args.loss = loss.data<float>();
  args.sums = sums.data<float>();
  args.grad_logprobs = data_or_null<float>(grad_logprobs);
  args.grad_values = data_or_null<float>(grad_values);
  args.grad_entropy = data_or_null<float>(grad_entropy);
  args.workspace = static_cast<double*>(workspace.raw());
  args.tokens = logprobs.numel();
  args.segments = segments;
  args.segment_tokens = segment_tokens;
  args.by_sequence = by_sequence;
  args.ratio_low = ratio_low;
  args.ratio_high = ratio_high;
  args.dual_clip = dual_clip;
  args.value_clip_range = value_clip_range;
  args.value_coef = value_coef;
  args.entropy_coef = entropy_coef;
  args.kl_coef = kl_coef;
  args.threads = threads;
  run_on_cpu("ppo_loss", logprobs, ic::ppo_loss_cpu, args);
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

  m.def("ppo_advantage", &ppo_advantage, py::arg("scores"), py::arg("logprobs"),
        py::arg("ref_logprobs"), py::arg("values"), py::arg("mask"), py::arg("score_index"),
        py::arg("cu_seqlens"), py::arg("dones"), py::arg("bootstrap"), py::arg("advantages"),
        py::arg("returns"), py::arg("rewards"), py::arg("stats"), py::arg("workspace"),
        py::arg("kl_coef"), py::arg("gamma"), py::arg("lambda_"), py::arg("reward_clip"),
        py::arg("whiten_rewards"), py::arg("whiten"), py::arg("unbiased"), py::arg("threads"));
  m.def("whiten_advantages", &whiten_advantages, py::arg("advantages"), py::arg("mask"),
        py::arg("mean"), py::arg("var"), py::arg("out"), py::arg("threads"));

  m.def("ppo_loss", &ppo_loss, py::arg("logprobs"), py::arg("old_logprobs"), py::arg("advantages"),
        py::arg("mask"), py::arg("values"), py::arg("old_values"), py::arg("returns"),
        py::arg("entropy"), py::arg("ref_logprobs"), py::arg("weights"), py::arg("cu_seqlens"),
        py::arg("normalizer"), py::arg("loss"), py::arg("sums"), py::arg("grad_logprobs"),
        py::arg("grad_values"), py::arg("grad_entropy"), py::arg("workspace"), py::arg("segments"),
        py::arg("segment_tokens"), py::arg("by_sequence"), py::arg("ratio_low"),
        py::arg("ratio_high"), py::arg("dual_clip"), py::arg("value_clip_range"),
        py::arg("value_coef"), py::arg("entropy_coef"), py::arg("kl_coef"), py::arg("threads"));
}
