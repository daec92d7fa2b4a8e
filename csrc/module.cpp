// The table of contents: one block per op, tensor views -> Args. The only place that knows stream,
// device and the GIL. Python (instructcore/ops) has checked shapes and types and allocated the
// outputs; for trunk, which is no op, all that is done here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <array>
#include <cmath>
#include <new>
#include <type_traits>
#include <vector>

#include "activation.h"
#include "add_norm.h"
#include "attention.h"
#include "cross_entropy.h"
#include "device.h"
#ifdef IC_EMULATED
#include "emulator/emulator.h"
#endif
#include "gae.h"
#include "isa.h"
#include "linear.h"
#include "pages.h"
#include "ppo_advantage.h"
#include "ppo_loss.h"
#include "rotary.h"
#include "sample.h"
#include "tensor.h"
#include "token_logprobs.h"
#include "trunk.h"

namespace py = pybind11;
using ic::TensorView;
using OptionalView = std::optional<TensorView>;

namespace {

template <class T>
T* data_or_null(const OptionalView& view) {
  return view ? view->data<T>() : nullptr;
}

int64_t stride_or_zero(const OptionalView& view, int dim) { return view ? view->stride(dim) : 0; }

// Whether a CUDA kernel does the work on such a tensor. The emulated module (csrc/emulator) runs
// them on the CPU's tensors.
bool on_gpu([[maybe_unused]] const TensorView& where) {
#ifdef IC_EMULATED
  return true;
#else
  return where.is_cuda();
#endif
}

// A CPU kernel follows cu_seqlens without further checks, so they are made here: 0 <= ..
// non-decreasing .. <= n.
void check_cu_seqlens(const char* op, const TensorView& cu_seqlens, int64_t n) {
  if (on_gpu(cu_seqlens)) return;
  const int32_t* cu = cu_seqlens.data<const int32_t>();
  int64_t before = 0;
  for (int64_t i = 0; i < cu_seqlens.size(0); ++i) {
    IC_CHECK(cu[i] >= before && cu[i] <= n, op,
             ": cu_seqlens must not decrease and stay within 0..", n, ", got ", cu[i], " at ", i);
    before = cu[i];
  }
}

#ifdef IC_CUDA
#define CUDA_KERNEL(name) ic::name
#else
#define CUDA_KERNEL(name) nullptr
#endif

// The ops that have CUDA kernels.
[[maybe_unused]] constexpr const char* kCudaOps[] = {
    "attention", "cross_entropy", "gae", "ppo_advantage", "ppo_loss", "sample", "token_logprobs"};

// Runs the kernel of `where`'s device without the GIL; a CUDA kernel on that device and torch's
// current stream of it. `cuda` is null where there is none.
template <class Args>
void run(const char* op, const TensorView& where,
         [[maybe_unused]] std::type_identity_t<void (*)(const Args&)> cpu,
         std::type_identity_t<void (*)(const Args&, void*)> cuda, const Args& args) {
  if (on_gpu(where)) {
    IC_CHECK(cuda, op, ": this build has no CUDA kernel for it; move the tensors to the CPU");
#ifdef IC_CUDA
    const ic::DeviceGuard current(where.device());
    void* stream = where.is_cuda() ? where.stream() : nullptr;
    py::gil_scoped_release unlocked;
    cuda(args, stream);
#endif
    return;
  }
#ifndef IC_EMULATED
  py::gil_scoped_release unlocked;
  cpu(args);
#endif
}

#ifdef IC_EMULATED
// order: first, last, random; arrival of asynchronous copies: late, early, random. For tests.
void set_schedule(const std::string& order, const std::string& arrival, uint64_t seed) {
  using namespace ic::emulator;
  ic::emulator::set_schedule({order == "first"  ? Order::kFirst
                              : order == "last" ? Order::kLast
                                                : Order::kRandom,
                              arrival == "late"    ? Arrival::kLate
                              : arrival == "early" ? Arrival::kEarly
                                                   : Arrival::kRandom,
                              seed});
}
#endif

// ---- build ----

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isa"] = ic::isa_name(ic::current_isa());
  info["bfloat16_dot"] = ic::has_bfloat16_dot();
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
  py::list cuda_ops;
#ifdef IC_CUDA
  for (const char* op : kCudaOps) cuda_ops.append(op);
#endif
  info["cuda_ops"] = cuda_ops;
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

// ---- activation ----

void activation(TensorView x, OptionalView grad, TensorView out, bool gated, int threads) {
  const ic::ActivationArgs args{x.raw(),
                                grad ? grad->raw() : nullptr,
                                out.raw(),
                                x.size(0),
                                x.size(1) / (gated ? 2 : 1),
                                x.stride(0),
                                stride_or_zero(grad, 0),
                                out.stride(0),
                                gated,
                                x.dtype(),
                                threads};
  run("activation", x, ic::activation_cpu, nullptr, args);
}

// ---- add_norm ----

void add_norm(TensorView x, OptionalView branch, TensorView weight, OptionalView bias,
              TensorView total, TensorView y, TensorView stats, float eps, int threads) {
  ic::AddNormArgs args{};
  args.x = x.raw();
  args.weight = weight.data<const float>();
  args.bias = data_or_null<const float>(bias);
  args.y = y.raw();
  args.stats = stats.data<float>();
  args.rows = x.size(0);
  args.width = x.size(1);
  args.x_row = x.stride(0);
  args.x_dtype = x.dtype();
  args.y_dtype = y.dtype();
  if (branch) {
    args.branch = branch->raw();
    args.branch_row = branch->stride(0);
    args.branch_dtype = branch->dtype();
    args.total = total.data<float>();
  }
  args.eps = eps;
  args.threads = threads;
  run("add_norm", x, ic::add_norm_cpu, nullptr, args);
}

void add_norm_backward(TensorView grad_y, OptionalView grad_total, TensorView total,
                       TensorView weight, TensorView stats, TensorView grad_x,
                       OptionalView grad_branch, TensorView sums, TensorView grad_weight,
                       OptionalView grad_bias, int threads) {
  ic::AddNormGradArgs args{};
  args.grad_y = grad_y.raw();
  args.grad_total = data_or_null<const float>(grad_total);
  args.total = total.raw();
  args.weight = weight.data<const float>();
  args.stats = stats.data<const float>();
  args.grad_x = grad_x.raw();
  args.grad_branch = grad_branch ? grad_branch->raw() : nullptr;
  args.sums = sums.data<float>();
  args.grad_weight = grad_weight.data<float>();
  args.grad_bias = data_or_null<float>(grad_bias);
  args.rows = total.size(0);
  args.width = total.size(1);
  args.grad_row = grad_y.stride(0);
  args.grad_total_row = stride_or_zero(grad_total, 0);
  args.total_row = total.stride(0);
  args.total_dtype = total.dtype();
  args.y_dtype = grad_y.dtype();
  args.threads = threads;
  run("add_norm", total, ic::add_norm_backward_cpu, nullptr, args);
}

// ---- attention ----

// Strides of (B, tokens, heads, D), or of packed (N, heads, D).
ic::AttentionTensor attention_tensor(const TensorView& t) {
  const bool packed = t.ndim() == 3;
  return {t.raw(), packed ? 0 : t.stride(0), t.stride(-3), t.stride(-2)};
}

ic::AttentionTensor attention_tensor(const OptionalView& t) {
  return t ? attention_tensor(*t) : ic::AttentionTensor{};
}

// `left` and `right` below 0 are unbounded.
ic::AttentionArgs attention_args(const char* op, const TensorView& q, const TensorView& k,
                                 const TensorView& v, const OptionalView& cu_q,
                                 const OptionalView& cu_k, const OptionalView& slopes,
                                 const OptionalView& sinks, const TensorView& out,
                                 const TensorView& lse, const TensorView& workspace, bool causal,
                                 float scale, int64_t left, int64_t right, float softcap,
                                 int threads) {
  if (cu_q) check_cu_seqlens(op, *cu_q, q.size(0));
  if (cu_k) check_cu_seqlens(op, *cu_k, k.size(0));
  ic::AttentionArgs args{};
  args.q = attention_tensor(q);
  args.k = attention_tensor(k);
  args.v = attention_tensor(v);
  args.out = attention_tensor(out);
  args.lse = lse.data<float>();
  args.cu_q = data_or_null<const int32_t>(cu_q);
  args.cu_k = data_or_null<const int32_t>(cu_k);
  args.slopes = data_or_null<const float>(slopes);
  args.slopes_batch = slopes && slopes->ndim() == 2 ? slopes->stride(0) : 0;
  args.sinks = data_or_null<const float>(sinks);
  args.sequences = cu_q ? cu_q->size(0) - 1 : q.size(0);
  args.queries = q.size(-3);
  args.keys = k.size(-3);
  args.heads = q.size(-2);
  args.kv_heads = k.size(-2);
  args.dim = q.size(-1);
  args.left = left < 0 ? ic::kAttentionUnbounded : left;
  args.right = causal ? 0 : right < 0 ? ic::kAttentionUnbounded : right;
  args.scale = scale;
  args.softcap = softcap;
  args.dtype = q.dtype();
  args.kv_dtype = k.dtype();
  args.workspace = workspace.data<float>();
  args.threads = threads;
  return args;
}

const char* attention_name(const OptionalView& cu_q) {
  return cu_q ? "attention_varlen" : "attention";
}

// (floats of scratch per thread forward, backward, keys of a backward task, its query rows, padded
// dim)
py::tuple attention_plan(int64_t dim) {
  const ic::AttentionPlan p = ic::attention_plan(dim);
  return py::make_tuple(p.forward_floats, p.backward_floats, p.back_keys, p.back_rows, p.padded);
}

// Floats of workspace that a call on q's device takes: 0 on the CPU, where it depends on the
// threads.
int64_t attention_workspace([[maybe_unused]] TensorView q, [[maybe_unused]] TensorView k,
                            [[maybe_unused]] OptionalView block_table,
                            [[maybe_unused]] bool backward) {
#ifdef IC_CUDA
  if (on_gpu(q)) {
    const ic::DeviceGuard current(q.device());
    ic::AttentionArgs args{};
    args.sequences = q.size(0);
    args.queries = q.size(-3);
    args.keys = block_table ? block_table->size(1) * k.size(1) : k.size(-3);
    args.heads = q.size(-2);
    args.kv_heads = k.size(-2);
    args.dim = q.size(-1);
    args.dtype = q.dtype();
    args.kv_dtype = k.dtype();
    if (q.ndim() == 3) args.sequences = block_table ? block_table->size(0) : 1;
    if (backward) return ic::attention_backward_workspace_cuda(args);
    return ic::attention_workspace_cuda(args, block_table.has_value());
  }
#endif
  return 0;
}

void attention(TensorView q, TensorView k, TensorView v, OptionalView cu_q, OptionalView cu_k,
               OptionalView slopes, OptionalView sinks, TensorView out, TensorView lse,
               TensorView workspace, bool causal, float scale, int64_t left, int64_t right,
               float softcap, int threads) {
  const char* op = attention_name(cu_q);
  run(op, q, ic::attention_cpu, CUDA_KERNEL(attention_cuda),
      attention_args(op, q, k, v, cu_q, cu_k, slopes, sinks, out, lse, workspace, causal, scale,
                     left, right, softcap, threads));
}

void attention_backward(TensorView q, TensorView k, TensorView v, OptionalView cu_q,
                        OptionalView cu_k, OptionalView slopes, OptionalView sinks, TensorView out,
                        TensorView lse, TensorView grad_out, OptionalView grad_lse,
                        TensorView grad_q, TensorView grad_k, TensorView grad_v,
                        OptionalView grad_sinks, TensorView workspace, OptionalView sums,
                        OptionalView turns, bool causal, float scale, int64_t left, int64_t right,
                        float softcap, int threads) {
  ic::AttentionBackwardArgs args{};
  const char* op = attention_name(cu_q);
  args.forward = attention_args(op, q, k, v, cu_q, cu_k, slopes, sinks, out, lse, workspace, causal,
                                scale, left, right, softcap, threads);
  args.grad_out = attention_tensor(grad_out);
  args.grad_q = attention_tensor(grad_q);
  args.grad_k = attention_tensor(grad_k);
  args.grad_v = attention_tensor(grad_v);
  args.grad_lse = data_or_null<const float>(grad_lse);
  args.grad_sinks = data_or_null<float>(grad_sinks);
  args.sums = data_or_null<float>(sums);
  args.turns = data_or_null<int32_t>(turns);
  args.turns_size = turns ? turns->numel() : 0;
  if (cu_k && !turns && !on_gpu(q)) {
    const int32_t* cu = args.forward.cu_k;
    const int64_t most = ic::attention_plan(args.forward.dim).back_keys;
    for (int64_t b = 0; b < args.forward.sequences; ++b)
      IC_CHECK(cu[b + 1] - cu[b] <= most, op,
               ": sequences must have at most max_seqlen_k keys, got ", cu[b + 1] - cu[b],
               " in sequence ", b);
  }
  run(op, q, ic::attention_backward_cpu, CUDA_KERNEL(attention_backward_cuda), args);
}

// Every block that a sequence uses, or will with its new tokens, must exist; positions must have
// angles.
void check_pages(const TensorView& block_table, const TensorView& cache_seqlens,
                 const TensorView& cu_q, const OptionalView& k_new, const OptionalView& cos,
                 int64_t blocks, int64_t block_size) {
  const int32_t *table = block_table.data<const int32_t>(),
                *held = cache_seqlens.data<const int32_t>();
  const int32_t* cu = cu_q.data<const int32_t>();
  for (int64_t b = 0; b < cache_seqlens.size(0); ++b) {
    const int64_t tokens = held[b] + (k_new ? cu[b + 1] - cu[b] : 0);
    IC_CHECK(held[b] >= 0, "attention_paged_: cache_seqlens must be 0 or more, got ", held[b],
             " at ", b);
    IC_CHECK(tokens <= block_table.size(1) * block_size, "attention_paged_: sequence ", b,
             " must fit block_table's ", block_table.size(1), " blocks of ", block_size, ", got ",
             tokens, " tokens");
    for (int64_t i = 0; i * block_size < tokens; ++i) {
      const int32_t block = table[b * block_table.stride(0) + i];
      IC_CHECK(block >= 0 && block < blocks, "attention_paged_: block_table must be within 0..",
               blocks - 1, " where tokens are, got ", block, " at (", b, ", ", i, ")");
    }
    IC_CHECK(!cos || tokens <= cos->size(0), "attention_paged_: cos and sin must reach position ",
             tokens - 1, ", got ", cos ? cos->size(0) : 0, " rows");
  }
}

void attention_paged(TensorView q, TensorView k_cache, TensorView v_cache, TensorView block_table,
                     TensorView cache_seqlens, TensorView cu_q, OptionalView k_new,
                     OptionalView v_new, OptionalView cos, OptionalView sin, OptionalView slopes,
                     OptionalView sinks, TensorView out, TensorView lse, TensorView workspace,
                     bool interleaved, bool causal, float scale, int64_t left, int64_t right,
                     float softcap, int threads) {
  ic::AttentionArgs args =
      attention_args("attention_paged_", q, k_cache, v_cache, cu_q, std::nullopt, slopes, sinks,
                     out, lse, workspace, causal, scale, left, right, softcap, threads);
  if (!on_gpu(q))
    check_pages(block_table, cache_seqlens, cu_q, k_new, cos, k_cache.size(0), k_cache.size(1));
  ic::AttentionPages& pages = args.pages;
  pages.block_table = block_table.data<const int32_t>();
  pages.cache_seqlens = cache_seqlens.data<const int32_t>();
  args.keys = block_table.size(1) * k_cache.size(1);
  pages.table_row = block_table.stride(0);
  pages.block_size = k_cache.size(1);
  pages.k_block = k_cache.stride(0);
  pages.v_block = v_cache.stride(0);
  pages.k_new = attention_tensor(k_new);
  pages.v_new = attention_tensor(v_new);
  pages.cos = data_or_null<const float>(cos);
  pages.sin = data_or_null<const float>(sin);
  pages.interleaved = interleaved;
  run("attention_paged_", q, ic::attention_cpu, CUDA_KERNEL(attention_cuda), args);
}

// ---- cross_entropy ----

int64_t elements_or_zero(const OptionalView& view) { return view ? view->numel() : 0; }

// A fresh tensor of bytes in pages.h's memory, as a DLPack capsule.
py::capsule take_pages(int64_t bytes) {
  using ic::dlpack::ManagedTensor;
  struct Block {
    ManagedTensor managed;
    ic::Pages pages;
    int64_t shape, stride;
  };
  const ic::Pages pages = ic::take_pages(bytes);
  if (!pages.data) throw std::bad_alloc();
  Block* block = new Block{{}, pages, bytes, 1};
  block->managed.tensor = {pages.data,    {ic::dlpack::kCpu, 0}, 1, {ic::dlpack::kUInt, 8, 1},
                           &block->shape, &block->stride,        0};
  block->managed.context = block;
  block->managed.deleter = [](ManagedTensor* self) {
    Block* owner = static_cast<Block*>(self->context);
    ic::give_pages(owner->pages);
    delete owner;
  };
  return py::capsule(&block->managed, "dltensor", [](PyObject* capsule) {
    // Whoever made a tensor of it has changed its name.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

// Asks for huge pages under a large fresh tensor before its first touch: page faults of 4 KB cost
// more than filling it. What the kernel answers is of no account.
void advise_huge_pages(TensorView fresh, int64_t bytes) {
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t at = reinterpret_cast<uintptr_t>(fresh.raw());
  const uintptr_t begin = (at + kPage - 1) & ~(kPage - 1), end = (at + bytes) & ~(kPage - 1);
  if (!fresh.is_cuda() && end > begin)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Counts the rows that are neither ignored nor masked and checks their targets; `total`, where
// given, gets the sum of their weights. On CUDA the host waits for nothing: no check, and -1 for
// the count.
int64_t check_targets(const char* op, TensorView targets, OptionalView mask, OptionalView weight,
                      OptionalView total, int64_t vocab, int64_t ignore_index) {
  const int64_t* t = targets.data<const int64_t>();
  const uint8_t* live = data_or_null<const uint8_t>(mask);
  const float* w = data_or_null<const float>(weight);
  if (on_gpu(targets)) {
    const ic::CrossEntropyTotalArgs args{
        t, w, data_or_null<float>(total), targets.numel(), vocab, ignore_index};
    if (total) run(op, targets, nullptr, CUDA_KERNEL(cross_entropy_total_cuda), args);
    return -1;
  }
  int64_t count = 0;
  double sum = 0.0;
  for (int64_t i = 0; i < targets.numel(); ++i) {
    if (t[i] == ignore_index || (live && !live[i])) continue;
    if (t[i] < 0 || t[i] >= vocab)
      throw py::index_error(std::string(op) + ": targets must be in [0, " + std::to_string(vocab) +
                            ") or " + std::to_string(ignore_index) + ", got " +
                            std::to_string(t[i]) + " at " + std::to_string(i));
    ++count;
    if (w) sum += w[t[i]];
  }
  if (total) *total->data<float>() = static_cast<float>(w ? sum : static_cast<double>(count));
  return count;
}

void cross_entropy(TensorView logits, TensorView targets, OptionalView weight, OptionalView total,
                   OptionalView grad_output, OptionalView losses, OptionalView stats,
                   OptionalView grad, int64_t ignore_index, float label_smoothing, float z_loss,
                   float softcap, int threads) {
  ic::CrossEntropyArgs args{};
  args.logits = logits.raw();
  args.targets = targets.data<const int64_t>();
  args.weight = data_or_null<const float>(weight);
  args.total = data_or_null<const float>(total);
  args.grad_output = data_or_null<const float>(grad_output);
  args.losses = data_or_null<float>(losses);
  args.stats = data_or_null<float>(stats);
  args.grad = grad ? grad->raw() : nullptr;
  args.rows = logits.size(0);
  args.vocab = logits.size(1);
  args.logits_row = logits.stride(0);
  args.grad_row = stride_or_zero(grad, 0);
  args.grad_output_row = elements_or_zero(grad_output) > 1 ? 1 : 0;
  args.ignore_index = ignore_index;
  args.dtype = logits.dtype();
  args.grad_dtype = grad ? grad->dtype() : args.dtype;
  args.label_smoothing = label_smoothing;
  args.z_loss = z_loss;
  args.softcap = softcap;
  args.threads = threads;
  run("cross_entropy", logits, ic::cross_entropy_cpu, CUDA_KERNEL(cross_entropy_cuda), args);
}

// out = sum of losses / total, in one fixed order; 0 where the total is 0.
void reduce_losses(TensorView losses, OptionalView total, TensorView out) {
  const float* loss = losses.data<const float>();
  if (on_gpu(losses)) {
    const ic::CrossEntropyReduceArgs args{loss, data_or_null<const float>(total), out.data<float>(),
                                          losses.numel()};
    return run("cross_entropy", losses, nullptr, CUDA_KERNEL(cross_entropy_reduce_cuda), args);
  }
  double sum = 0.0;
  for (int64_t i = 0; i < losses.numel(); ++i) sum += loss[i];
  const double divisor = total ? *total->data<const float>() : 1.0;
  *out.data<float>() = divisor == 0.0 ? 0.0f : static_cast<float>(sum / divisor);
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

// Bytes of workspace for rows of a (B, T), or of a packed (N,).
int64_t gae_workspace(TensorView rewards, OptionalView cu_seqlens) {
  if (!on_gpu(rewards)) return 0;
  return cu_seqlens ? ic::gae_workspace_bytes(cu_seqlens->size(0) - 1, rewards.size(0), true)
                    : ic::gae_workspace_bytes(rewards.size(0), rewards.size(1), false);
}

void gae(TensorView rewards, TensorView values, OptionalView mask, OptionalView cu_seqlens,
         OptionalView dones, OptionalView bootstrap, TensorView advantages, TensorView returns,
         OptionalView workspace, float gamma, float lambda, int threads) {
  ic::GaeArgs args = gae_args(rewards, values, mask, cu_seqlens, dones, bootstrap, advantages,
                              returns, gamma, lambda, threads);
  args.workspace = data_or_null<uint8_t>(workspace);
  run("gae", rewards, ic::gae_cpu, CUDA_KERNEL(gae_cuda), args);
}

// ---- linear ----

// A weight of (rows, depth) in panels, (panels, words, width): what is multiplied by it in the
// forward may be this, or the weight.
bool is_packed(const TensorView& weight) { return weight.ndim() == 3; }

bool fits_packed(const TensorView& packed, int64_t rows, int64_t depth) {
  const int64_t panel = packed.size(2);
  return panel > 0 && packed.size(1) == (depth + 1) / 2 &&
         packed.size(0) == (rows + panel - 1) / panel;
}

ic::LinearMatrix linear_matrix(const TensorView& t) { return {t.raw(), t.stride(0), t.dtype()}; }

void linear(ic::LinearForm form, const TensorView& a, const TensorView& b, const OptionalView& bias,
            const TensorView& c, bool accumulate, int threads) {
  ic::LinearArgs args{};
  args.form = form;
  args.a = linear_matrix(a);
  args.b = linear_matrix(b);
  args.c = linear_matrix(c);
  args.rows = c.size(0);
  args.columns = c.size(1);
  args.depth = form == ic::LinearForm::kForward ? a.size(1) : b.size(0);
  if (is_packed(b)) {
    args.panel = b.size(2);
    args.b.dtype = ic::Dtype::kBFloat16;
    IC_CHECK(form == ic::LinearForm::kForward && a.dtype() == ic::Dtype::kBFloat16 &&
                 fits_packed(b, args.columns, args.depth),
             "linear: a packed weight must be that of a bfloat16 (", args.columns, ", ", args.depth,
             ") matrix, and x of its type");
  }
  args.bias = bias ? bias->raw() : nullptr;
  args.bias_dtype = bias ? bias->dtype() : ic::Dtype::kFloat32;
  args.accumulate = accumulate;
  args.threads = threads;
  run("linear", c, ic::linear_cpu, nullptr, args);
}

void linear_pack(TensorView weight, TensorView to, int threads) {
  IC_CHECK(
      weight.dtype() == ic::Dtype::kBFloat16 && fits_packed(to, weight.size(0), weight.size(1)),
      "linear: only a bfloat16 weight is packed, into (panels, words, width)");
  const ic::LinearPackArgs args{linear_matrix(weight), to.raw(),   weight.size(0),
                                weight.size(1),        to.size(2), threads};
  run("linear", weight, ic::linear_pack_cpu, nullptr, args);
}

// y = x W^T + bias
void linear_forward(TensorView x, TensorView weight, OptionalView bias, TensorView y, int threads) {
  linear(ic::LinearForm::kForward, x, weight, bias, y, false, threads);
}

// dx = dy W
void linear_input(TensorView grad, TensorView weight, TensorView grad_x, int threads) {
  linear(ic::LinearForm::kInput, grad, weight, std::nullopt, grad_x, false, threads);
}

// dW = dy^T x, or dW += dy^T x of a float32 dW
void linear_weight(TensorView grad, TensorView x, TensorView grad_weight, bool accumulate,
                   int threads) {
  linear(ic::LinearForm::kWeight, grad, x, std::nullopt, grad_weight, accumulate, threads);
}

// db = the sum of dy's rows, or db += that of a float32 db
void linear_bias(TensorView grad, TensorView grad_bias, bool accumulate, int threads) {
  const ic::LinearBiasArgs args{
      linear_matrix(grad), grad_bias.raw(), grad_bias.dtype(), grad.size(0), grad.size(1),
      accumulate,          threads};
  run("linear", grad, ic::linear_bias_cpu, nullptr, args);
}

// ---- ppo_advantage ----

int64_t ppo_advantage_workspace(TensorView logprobs, OptionalView cu_seqlens) {
  const int64_t rows = cu_seqlens ? cu_seqlens->size(0) - 1 : logprobs.size(0);
  if (!on_gpu(logprobs)) return rows * static_cast<int64_t>(sizeof(ic::Moments));
  return ic::ppo_advantage_workspace_bytes(rows, logprobs.size(-1), cu_seqlens.has_value());
}

void ppo_advantage(TensorView scores, TensorView logprobs, TensorView ref_logprobs,
                   TensorView values, TensorView mask, OptionalView score_index,
                   OptionalView cu_seqlens, OptionalView dones, OptionalView bootstrap,
                   TensorView advantages, TensorView returns, TensorView rewards, TensorView stats,
                   TensorView workspace, float kl_coef, float gamma, float lambda,
                   float reward_clip, bool whiten_rewards, bool whiten, bool unbiased,
                   int threads) {
  ic::PpoAdvantageArgs args{};
  args.gae = gae_args(rewards, values, mask, cu_seqlens, dones, bootstrap, advantages, returns,
                      gamma, lambda, threads);
  args.scores = scores.data<const float>();
  args.logprobs = logprobs.data<const float>();
  args.ref_logprobs = ref_logprobs.data<const float>();
  args.mask = mask.data<const uint8_t>();
  args.score_index = data_or_null<const int64_t>(score_index);
  args.rewards = rewards.data<float>();
  args.row_moments = static_cast<ic::Moments*>(workspace.raw());
  args.gae.workspace = static_cast<uint8_t*>(workspace.raw());
  args.stats = stats.data<float>();
  args.kl_coef = kl_coef;
  args.reward_clip = reward_clip;
  args.whiten_rewards = whiten_rewards;
  args.whiten = whiten;
  args.unbiased = unbiased;
  if (score_index && !on_gpu(logprobs))
    for (int64_t b = 0; b < args.gae.rows; ++b) {
      const int64_t length = args.gae.cu_seqlens
                                 ? args.gae.cu_seqlens[b + 1] - args.gae.cu_seqlens[b]
                                 : args.gae.steps;
      IC_CHECK(args.score_index[b] >= -1 && (args.score_index[b] < length || length == 0),
               "ppo_advantage: score_index must be within its row of ", length,
               " steps, or -1, got ", args.score_index[b], " at ", b);
    }
  run("ppo_advantage", logprobs, ic::ppo_advantage_cpu, CUDA_KERNEL(ppo_advantage_cuda), args);
}

void whiten_advantages(TensorView advantages, OptionalView mask, TensorView mean, TensorView var,
                       TensorView out, int threads) {
  const ic::WhitenArgs args{advantages.data<const float>(),
                            data_or_null<const uint8_t>(mask),
                            mean.data<const float>(),
                            var.data<const float>(),
                            out.data<float>(),
                            advantages.numel(),
                            threads};
  run("whiten_advantages", advantages, ic::whiten_cpu, CUDA_KERNEL(whiten_cuda), args);
}

// ---- ppo_loss ----

int64_t ppo_loss_workspace(TensorView logprobs, int64_t segments, bool by_sequence) {
  if (!on_gpu(logprobs)) return segments * ic::kPpoSums;
  return ic::ppo_loss_workspace(logprobs.numel(), segments, by_sequence);
}

void ppo_loss(TensorView logprobs, TensorView old_logprobs, TensorView advantages, TensorView mask,
              OptionalView values, OptionalView old_values, OptionalView returns,
              OptionalView entropy, OptionalView ref_logprobs, OptionalView weights,
              OptionalView cu_seqlens, OptionalView normalizer, TensorView loss, TensorView sums,
              OptionalView grad_logprobs, OptionalView grad_values, OptionalView grad_entropy,
              TensorView workspace, int64_t segments, int64_t segment_tokens, bool by_sequence,
              float ratio_low, float ratio_high, float dual_clip, float value_clip_range,
              float value_coef, float entropy_coef, float kl_coef, int threads) {
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
  run("ppo_loss", logprobs, ic::ppo_loss_cpu, CUDA_KERNEL(ppo_loss_cuda), args);
}

// ---- rotary ----

// `q` is turned into the first heads of `out`, then `k`; `v` is copied after them.
void rotary(TensorView q, OptionalView k, OptionalView v, TensorView out, TensorView cos,
            TensorView sin, TensorView positions, bool back, int threads) {
  ic::RotaryArgs args{};
  char* to = static_cast<char*>(out.raw());
  const auto part = [&](const TensorView& from, bool turned) -> ic::RotaryPart {
    const ic::RotaryPart made{
        from.raw(),    to,           from.stride(0), from.stride(1), out.stride(0),
        out.stride(1), from.size(1), turned};
    to += from.size(1) * out.stride(1) * ic::size_of(out.dtype());
    return made;
  };
  args.parts[0] = part(q, true);
  if (k) args.parts[1] = part(*k, true);
  if (v) args.parts[2] = part(*v, false);
  args.cos = cos.data<const float>();
  args.sin = sin.data<const float>();
  args.positions = positions.data<const int32_t>();
  args.rows = q.size(0);
  args.dim = q.size(2);
  args.back = back;
  args.dtype = q.dtype();
  args.threads = threads;
  for (int64_t n = 0; n < args.rows; ++n)
    IC_CHECK(args.positions[n] >= 0 && args.positions[n] < cos.size(0),
             "rotary: positions must be in [0, ", cos.size(0), "), got ", args.positions[n], " at ",
             n);
  run("rotary", q, ic::rotary_cpu, nullptr, args);
}

// ---- sample ----

// A setting of each row, (N,) or 0-d, or else the same for all.
template <class T>
ic::Control<T> control(const OptionalView& rows, T all) {
  if (!rows) return {nullptr, 0, all};
  return {rows->data<const T>(), rows->ndim() ? rows->stride(0) : 0, all};
}

void sample(TensorView logits, OptionalView bias, OptionalView generated, OptionalView prompt,
            OptionalView allowed, const std::array<OptionalView, 9>& controls,
            const std::array<float, 6>& floats, const std::array<int64_t, 3>& integers,
            TensorView tokens, TensorView logprobs, TensorView sampled_logprobs,
            TensorView workspace, int threads) {
  ic::SampleArgs args{};
  args.logits = logits.raw();
  args.bias = data_or_null<const float>(bias);
  args.generated = data_or_null<const int32_t>(generated);
  args.prompt = data_or_null<const uint8_t>(prompt);
  args.allowed = data_or_null<const uint8_t>(allowed);
  args.rows = logits.size(0);
  args.vocab = logits.size(1);
  args.logits_row = logits.stride(0);
  args.bias_row = bias && bias->ndim() == 2 ? bias->stride(0) : 0;
  args.generated_row = stride_or_zero(generated, 0);
  args.prompt_row = stride_or_zero(prompt, 0);
  args.allowed_row = stride_or_zero(allowed, 0);
  args.temperature = control(controls[0], floats[0]);
  args.top_p = control(controls[1], floats[1]);
  args.min_p = control(controls[2], floats[2]);
  args.repetition = control(controls[3], floats[3]);
  args.presence = control(controls[4], floats[4]);
  args.frequency = control(controls[5], floats[5]);
  args.top_k = control(controls[6], integers[0]);
  args.seed = control(controls[7], integers[1]);
  args.position = control(controls[8], integers[2]);
  args.tokens = tokens.data<int64_t>();
  args.logprobs = logprobs.data<float>();
  args.sampled_logprobs = sampled_logprobs.data<float>();
  args.workspace = workspace.data<float>();
  args.slots = workspace.size(0);
  args.padded_vocab = workspace.size(2);
  args.dtype = logits.dtype();
  args.threads = threads;
  run("sample", logits, ic::sample_cpu, CUDA_KERNEL(sample_cuda), args);
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  ic::philox4x32(words, key[0], key[1]);
  return {words[0], words[1], words[2], words[3]};
}

// ---- token_logprobs ----

ic::TokenLogprobsArgs token_logprobs_args(const TensorView& logits, const TensorView& targets,
                                          const OptionalView& mask, const TensorView& temperature,
                                          const OptionalView& entropy, const TensorView& stats,
                                          int64_t ignore_index, int threads) {
  ic::TokenLogprobsArgs args{};
  args.logits = logits.raw();
  args.targets = targets.data<const int64_t>();
  args.mask = data_or_null<const uint8_t>(mask);
  args.temperature = temperature.data<const float>();
  args.entropy = data_or_null<float>(entropy);
  args.stats = stats.data<float>();
  args.rows = logits.size(0);
  args.vocab = logits.size(1);
  args.logits_row = logits.stride(0);
  args.temperature_row = temperature.ndim() > 0 ? 1 : 0;
  args.ignore_index = ignore_index;
  args.dtype = logits.dtype();
  args.threads = threads;
  return args;
}

void token_logprobs(TensorView logits, TensorView targets, OptionalView mask,
                    TensorView temperature, TensorView logprobs, OptionalView entropy,
                    TensorView lse, TensorView top1, TensorView stats, int64_t ignore_index,
                    int threads) {
  ic::TokenLogprobsArgs args = token_logprobs_args(logits, targets, mask, temperature, entropy,
                                                   stats, ignore_index, threads);
  args.logprobs = logprobs.data<float>();
  args.lse = lse.data<float>();
  args.top1 = top1.data<bool>();
  run("token_logprobs", logits, ic::token_logprobs_cpu, CUDA_KERNEL(token_logprobs_cuda), args);
}

void token_logprobs_backward(OptionalView grad_logprobs, OptionalView grad_entropy,
                             TensorView logits, TensorView targets, OptionalView mask,
                             TensorView temperature, OptionalView entropy, TensorView stats,
                             TensorView grad, int64_t ignore_index, int threads) {
  const ic::TokenLogprobsArgs forward = token_logprobs_args(logits, targets, mask, temperature,
                                                            entropy, stats, ignore_index, threads);
  const ic::TokenLogprobsGradArgs args{&forward,
                                       data_or_null<const float>(grad_logprobs),
                                       data_or_null<const float>(grad_entropy),
                                       grad.raw(),
                                       grad.stride(0),
                                       grad.dtype()};
  run("token_logprobs", logits, ic::token_logprobs_backward_cpu,
      CUDA_KERNEL(token_logprobs_backward_cuda), args);
}

// ---- trunk ----

#ifndef IC_EMULATED
// (rows, columns), or the packed weight of such a matrix.
ic::TrunkLinear trunk_linear(const TensorView& weight, const OptionalView& bias, ic::Dtype dtype,
                             int64_t rows, int64_t columns) {
  const bool packed = is_packed(weight);
  const bool fits = packed ? dtype == ic::Dtype::kBFloat16 && fits_packed(weight, rows, columns)
                           : weight.dtype() == dtype && weight.size(0) == rows &&
                                 weight.size(1) == columns && weight.stride(0) == columns;
  IC_CHECK(fits && !weight.is_cuda(), "trunk: a weight must be (", rows, ", ", columns,
           "), contiguous, of the compute type, on the CPU");
  return {weight.raw(), bias ? bias->raw() : nullptr, rows, columns, packed ? weight.size(2) : 0};
}

// What the kernels follow without further checks: Python has looked at none of it.
void check_trunk(const TensorView& tokens, const TensorView& cu_q, const TensorView& embed,
                 const OptionalView& positions, size_t layers, const std::vector<TensorView>& keys,
                 const std::vector<TensorView>& values, const TensorView& block_table,
                 const TensorView& held, const OptionalView& cos, const TensorView& hidden) {
  const char* op = "trunk";
  const int64_t n = tokens.size(0), sequences = held.size(0);
  for (const TensorView* where : {&tokens, &cu_q, &embed, &block_table, &held})
    IC_CHECK(!where->is_cuda(), op, ": tokens, weights and cache must be on the CPU");
  IC_CHECK(embed.size(1) == hidden.size(1) && embed.stride(0) == embed.size(1), op,
           ": the embedding must be contiguous, (vocabulary, ", hidden.size(1), ")");
  check_cu_seqlens(op, cu_q, n);
  const int32_t* cu = cu_q.data<const int32_t>();
  IC_CHECK(cu_q.size(0) == sequences + 1 && cu[0] == 0 && cu[sequences] == n, op,
           ": cu_seqlens must span the ", n, " tokens of ", sequences, " sequences");
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = tokens.data<const int64_t>()[i];
    IC_CHECK(token >= 0 && token < embed.size(0), op, ": tokens must be in 0..", embed.size(0) - 1,
             ", got ", token, " at ", i);
  }
  IC_CHECK(layers > 0 && keys.size() == layers && values.size() == layers, op,
           ": the cache must have the model's ", layers, " layers, got ", keys.size());
  for (const std::vector<TensorView>* side : {&keys, &values})
    for (const TensorView& cache : *side) {
      bool fits = cache.ndim() == 4 && cache.dtype() == hidden.dtype() && !cache.is_cuda();
      for (int i = 3, dense = 1; fits && i >= 0; dense *= static_cast<int>(cache.size(i--)))
        fits = cache.size(i) == keys[0].size(i) && cache.stride(i) == dense;
      IC_CHECK(fits, op, ": the caches must be contiguous, alike and of the compute type");
    }
  IC_CHECK(block_table.size(0) == sequences && held.stride(0) == 1, op, ": block_table must have ",
           sequences, " rows and seqlens be contiguous");
  check_pages(block_table, held, cu_q, tokens, cos, keys[0].size(0), keys[0].size(1));
  for (int64_t b = 0; positions && b < sequences; ++b) {
    const int64_t end = held.data<const int32_t>()[b] + cu[b + 1] - cu[b];
    IC_CHECK(end <= positions->size(0), op, ": a sequence must be within the context of ",
             positions->size(0), ", got ", end, " tokens");
  }
}

// `layers`: for each (norm1, norm1_bias, qkv, qkv_bias, q_norm, k_norm, out, out_bias, norm2,
// norm2_bias, up, up_bias, down, down_bias). The sequences' lengths in `held` advance.
void trunk(TensorView tokens, TensorView cu_q, TensorView embed, OptionalView positions,
           const std::vector<std::array<OptionalView, 14>>& layers, TensorView norm,
           OptionalView norm_bias, const std::vector<TensorView>& keys,
           const std::vector<TensorView>& values, TensorView block_table, TensorView held,
           OptionalView cos, OptionalView sin, TensorView hidden, int64_t heads, int64_t mlp_width,
           bool gated, float eps, int threads) {
  check_trunk(tokens, cu_q, embed, positions, layers.size(), keys, values, block_table, held, cos,
              hidden);
  const int64_t sequences = held.size(0), size = keys[0].size(1), kv_heads = keys[0].size(2),
                dim = keys[0].size(3), width = hidden.size(1);
  const int32_t* cu = cu_q.data<const int32_t>();
  const ic::Dtype dtype = hidden.dtype();
  std::vector<ic::TrunkLayer> stack;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [norm1, norm1_bias, qkv, qkv_bias, q_norm, k_norm, out, out_bias, norm2, norm2_bias,
                 up, up_bias, down, down_bias] = layers[i];
    stack.push_back({{norm1->data<const float>(), data_or_null<const float>(norm1_bias)},
                     {norm2->data<const float>(), data_or_null<const float>(norm2_bias)},
                     data_or_null<const float>(q_norm),
                     data_or_null<const float>(k_norm),
                     trunk_linear(*qkv, qkv_bias, dtype, (heads + 2 * kv_heads) * dim, width),
                     trunk_linear(*out, out_bias, dtype, width, heads * dim),
                     trunk_linear(*up, up_bias, dtype, (gated ? 2 : 1) * mlp_width, width),
                     trunk_linear(*down, down_bias, dtype, width, mlp_width),
                     keys[i].raw(),
                     values[i].raw()});
  }
  ic::TrunkArgs args{};
  args.tokens = tokens.data<const int64_t>();
  args.embed = embed.data<const float>();
  args.positions = data_or_null<const float>(positions);
  args.layers = stack.data();
  args.count = static_cast<int64_t>(stack.size());
  args.norm = {norm.data<const float>(), data_or_null<const float>(norm_bias)};
  args.hidden = hidden.raw();
  args.width = width;
  args.mlp_width = mlp_width;
  args.gated = gated;
  args.eps = eps;
  ic::AttentionArgs& attention = args.attention;
  attention.k = attention.v = {nullptr, 0, kv_heads * dim, dim};
  attention.cu_q = cu;
  ic::AttentionPages& pages = attention.pages;
  pages.block_table = block_table.data<const int32_t>();
  pages.cache_seqlens = held.data<const int32_t>();
  pages.table_row = block_table.stride(0);
  pages.block_size = size;
  pages.k_block = pages.v_block = size * kv_heads * dim;
  pages.cos = data_or_null<const float>(cos);
  pages.sin = data_or_null<const float>(sin);
  pages.interleaved = true;
  attention.sequences = sequences;
  attention.queries = tokens.size(0);
  attention.keys = block_table.size(1) * size;
  attention.heads = heads;
  attention.kv_heads = kv_heads;
  attention.dim = dim;
  attention.left = ic::kAttentionUnbounded;
  attention.scale = static_cast<float>(std::pow(static_cast<double>(dim), -0.5));
  attention.dtype = attention.kv_dtype = dtype;
  attention.threads = threads;
  run("trunk", tokens, ic::trunk_cpu, nullptr, args);
  for (int64_t b = 0; b < sequences; ++b) held.data<int32_t>()[b] += cu[b + 1] - cu[b];
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "instructcore's kernels; use them through instructcore.ops";

  m.def("build_info", &build_info);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("isa_levels", &isa_levels);
#ifdef IC_EMULATED
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("arrival"), py::arg("seed"));
#endif

  m.def("activation", &activation, py::arg("x"), py::arg("grad"), py::arg("out"), py::arg("gated"),
        py::arg("threads"));

  m.def("add_norm_sums", &ic::add_norm_sums, py::arg("rows"));
  m.def("add_norm", &add_norm, py::arg("x"), py::arg("branch"), py::arg("weight"), py::arg("bias"),
        py::arg("total"), py::arg("y"), py::arg("stats"), py::arg("eps"), py::arg("threads"));
  m.def("add_norm_backward", &add_norm_backward, py::arg("grad_y"), py::arg("grad_total"),
        py::arg("total"), py::arg("weight"), py::arg("stats"), py::arg("grad_x"),
        py::arg("grad_branch"), py::arg("sums"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("threads"));

  m.def("attention_plan", &attention_plan, py::arg("dim"));
  m.def("attention_workspace", &attention_workspace, py::arg("q"), py::arg("k"),
        py::arg("block_table"), py::arg("backward"));
  m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_q"),
        py::arg("cu_k"), py::arg("slopes"), py::arg("sinks"), py::arg("out"), py::arg("lse"),
        py::arg("workspace"), py::arg("causal"), py::arg("scale"), py::arg("left"),
        py::arg("right"), py::arg("softcap"), py::arg("threads"));
  m.def("attention_backward", &attention_backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("cu_q"), py::arg("cu_k"), py::arg("slopes"), py::arg("sinks"), py::arg("out"),
        py::arg("lse"), py::arg("grad_out"), py::arg("grad_lse"), py::arg("grad_q"),
        py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_sinks"), py::arg("workspace"),
        py::arg("sums"), py::arg("turns"), py::arg("causal"), py::arg("scale"), py::arg("left"),
        py::arg("right"), py::arg("softcap"), py::arg("threads"));
  m.def("attention_paged", &attention_paged, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
        py::arg("block_table"), py::arg("cache_seqlens"), py::arg("cu_q"), py::arg("k_new"),
        py::arg("v_new"), py::arg("cos"), py::arg("sin"), py::arg("slopes"), py::arg("sinks"),
        py::arg("out"), py::arg("lse"), py::arg("workspace"), py::arg("interleaved"),
        py::arg("causal"), py::arg("scale"), py::arg("left"), py::arg("right"), py::arg("softcap"),
        py::arg("threads"));

  m.def("take_pages", &take_pages, py::arg("bytes"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("fresh"), py::arg("bytes"));
  m.def("check_targets", &check_targets, py::arg("op"), py::arg("targets"), py::arg("mask"),
        py::arg("weight"), py::arg("total"), py::arg("vocab"), py::arg("ignore_index"));
  m.def("cross_entropy", &cross_entropy, py::arg("logits"), py::arg("targets"), py::arg("weight"),
        py::arg("total"), py::arg("grad_output"), py::arg("losses"), py::arg("stats"),
        py::arg("grad"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("z_loss"),
        py::arg("softcap"), py::arg("threads"));
  m.def("reduce_losses", &reduce_losses, py::arg("losses"), py::arg("total"), py::arg("out"));
  m.def("token_logprobs", &token_logprobs, py::arg("logits"), py::arg("targets"), py::arg("mask"),
        py::arg("temperature"), py::arg("logprobs"), py::arg("entropy"), py::arg("lse"),
        py::arg("top1"), py::arg("stats"), py::arg("ignore_index"), py::arg("threads"));
  m.def("token_logprobs_backward", &token_logprobs_backward, py::arg("grad_logprobs"),
        py::arg("grad_entropy"), py::arg("logits"), py::arg("targets"), py::arg("mask"),
        py::arg("temperature"), py::arg("entropy"), py::arg("stats"), py::arg("grad"),
        py::arg("ignore_index"), py::arg("threads"));

  m.def("gae_workspace", &gae_workspace, py::arg("rewards"), py::arg("cu_seqlens"));
  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("cu_seqlens"),
        py::arg("dones"), py::arg("bootstrap"), py::arg("advantages"), py::arg("returns"),
        py::arg("workspace"), py::arg("gamma"), py::arg("lambda_"), py::arg("threads"));

  m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("y"), py::arg("threads"));
  m.def("linear_panel", &ic::linear_panel);
  m.def("linear_pack", &linear_pack, py::arg("weight"), py::arg("to"), py::arg("threads"));
  m.def("linear_input", &linear_input, py::arg("grad"), py::arg("weight"), py::arg("grad_x"),
        py::arg("threads"));
  m.def("linear_weight", &linear_weight, py::arg("grad"), py::arg("x"), py::arg("grad_weight"),
        py::arg("accumulate"), py::arg("threads"));
  m.def("linear_bias", &linear_bias, py::arg("grad"), py::arg("grad_bias"), py::arg("accumulate"),
        py::arg("threads"));

  m.def("ppo_advantage_workspace", &ppo_advantage_workspace, py::arg("logprobs"),
        py::arg("cu_seqlens"));
  m.def("ppo_advantage", &ppo_advantage, py::arg("scores"), py::arg("logprobs"),
        py::arg("ref_logprobs"), py::arg("values"), py::arg("mask"), py::arg("score_index"),
        py::arg("cu_seqlens"), py::arg("dones"), py::arg("bootstrap"), py::arg("advantages"),
        py::arg("returns"), py::arg("rewards"), py::arg("stats"), py::arg("workspace"),
        py::arg("kl_coef"), py::arg("gamma"), py::arg("lambda_"), py::arg("reward_clip"),
        py::arg("whiten_rewards"), py::arg("whiten"), py::arg("unbiased"), py::arg("threads"));
  m.def("whiten_advantages", &whiten_advantages, py::arg("advantages"), py::arg("mask"),
        py::arg("mean"), py::arg("var"), py::arg("out"), py::arg("threads"));

  m.def("ppo_loss_workspace", &ppo_loss_workspace, py::arg("logprobs"), py::arg("segments"),
        py::arg("by_sequence"));
  m.def("ppo_loss", &ppo_loss, py::arg("logprobs"), py::arg("old_logprobs"), py::arg("advantages"),
        py::arg("mask"), py::arg("values"), py::arg("old_values"), py::arg("returns"),
        py::arg("entropy"), py::arg("ref_logprobs"), py::arg("weights"), py::arg("cu_seqlens"),
        py::arg("normalizer"), py::arg("loss"), py::arg("sums"), py::arg("grad_logprobs"),
        py::arg("grad_values"), py::arg("grad_entropy"), py::arg("workspace"), py::arg("segments"),
        py::arg("segment_tokens"), py::arg("by_sequence"), py::arg("ratio_low"),
        py::arg("ratio_high"), py::arg("dual_clip"), py::arg("value_clip_range"),
        py::arg("value_coef"), py::arg("entropy_coef"), py::arg("kl_coef"), py::arg("threads"));

  m.def("rotary", &rotary, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("cos"),
        py::arg("sin"), py::arg("positions"), py::arg("back"), py::arg("threads"));

  m.def("sample", &sample, py::arg("logits"), py::arg("bias"), py::arg("generated"),
        py::arg("prompt"), py::arg("allowed"), py::arg("controls"), py::arg("floats"),
        py::arg("integers"), py::arg("tokens"), py::arg("logprobs"), py::arg("sampled_logprobs"),
        py::arg("workspace"), py::arg("threads"));
  m.def("philox", &philox, py::arg("counter"), py::arg("key"));

#ifndef IC_EMULATED
  m.def("trunk", &trunk, py::arg("tokens"), py::arg("cu_q"), py::arg("embed"), py::arg("positions"),
        py::arg("layers"), py::arg("norm"), py::arg("norm_bias"), py::arg("keys"),
        py::arg("values"), py::arg("block_table"), py::arg("held"), py::arg("cos"), py::arg("sin"),
        py::arg("hidden"), py::arg("heads"), py::arg("mlp_width"), py::arg("gated"), py::arg("eps"),
        py::arg("threads"));
#endif
}
