#include "trunk.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "activation.h"
#include "add_norm.h"
#include "linear.h"
#include "parallel.h"

namespace ic {
namespace {

// What lies between the kernels, in one piece of memory; in huge pages where it is large, as it is
// for whole prompts.
class Memory {
 public:
  explicit Memory(size_t bytes) {
    const size_t unit = bytes >= 2 * kPage ? kPage : kLine;
    bytes = (bytes + unit - 1) / unit * unit;
    data_.reset(static_cast<char*>(std::aligned_alloc(unit, bytes)));
    if (!data_) throw std::bad_alloc();
    if (unit == kPage) (void)madvise(data_.get(), bytes, MADV_HUGEPAGE);
  }
  template <class T = void>
  T* take(int64_t bytes) {
    char* at = data_.get() + used_;
    used_ += rounded(bytes);
    return reinterpret_cast<T*>(at);
  }
  static size_t rounded(int64_t bytes) {
    return (static_cast<size_t>(bytes) + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr size_t kLine = 64, kPage = size_t{2} << 20;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> data_;
  size_t used_ = 0;
};

struct Sizes {  // in bytes
  int64_t x, y, qkv, heads, up, act, stats, lse, scratch;

  explicit Sizes(const TrunkArgs& a) {
    const AttentionArgs& t = a.attention;
    const int64_t n = t.queries, size = size_of(t.dtype);
    x = n * a.width * 4;
    y = n * a.width * size;
    qkv = n * (t.heads + 2 * t.kv_heads) * t.dim * size;
    heads = n * t.heads * t.dim * size;
    act = n * a.mlp_width * size;
    up = act * (a.gated ? 2 : 1);
    stats = n * 2 * 4;
    lse = n * t.heads * 4;
    scratch = t.threads * (attention_plan(t.dim).forward_floats + 1) * 4;
  }
  size_t total() const {
    size_t sum = 0;
    for (int64_t bytes : {x, y, y, qkv, heads, up, act, stats, lse, scratch})
      sum += Memory::rounded(bytes);
    return sum;
  }
};

class Trunk {
 public:
  explicit Trunk(const TrunkArgs& a) : Trunk(a, Sizes(a)) {}

  void run() {
    embed();
    const void* branch = nullptr;
    for (const TrunkLayer* layer = a_.layers; layer < a_.layers + a_.count; ++layer) {
      add_norm(branch, layer->norm1, y_);
      multiply(layer->qkv, y_, qkv_);
      if (layer->q_norm) norm_heads(*layer);
      attend(*layer);
      multiply(layer->out, heads_, branch_);
      add_norm(branch_, layer->norm2, y_);
      multiply(layer->up, y_, up_);
      activate();
      multiply(layer->down, act_, branch_);
      branch = branch_;
    }
    add_norm(branch, a_.norm, a_.hidden);
  }

 private:
  Trunk(const TrunkArgs& a, const Sizes& sizes)
      : a_(a), attention_(a.attention), n_(a.attention.queries), memory_(sizes.total()) {
    x_ = memory_.take<float>(sizes.x);
    y_ = memory_.take(sizes.y);
    branch_ = memory_.take(sizes.y);
    qkv_ = memory_.take(sizes.qkv);
    heads_ = memory_.take(sizes.heads);
    up_ = memory_.take(sizes.up);
    act_ = memory_.take(sizes.act);
    stats_ = memory_.take<float>(sizes.stats);
    attention_.lse = memory_.take<float>(sizes.lse);
    attention_.workspace = memory_.take<float>(sizes.scratch);
  }

  int64_t rows_of_heads() const { return attention_.heads + 2 * attention_.kv_heads; }

  // Head `first` of every token's queries, keys and values.
  AttentionTensor part(int64_t first) const {
    const int64_t head = attention_.dim;
    char* data = static_cast<char*>(qkv_) + first * head * size_of(attention_.dtype);
    return {data, 0, rows_of_heads() * head, head};
  }

  void embed() {
    const AttentionPages& pages = attention_.pages;
    const int32_t* cu = attention_.cu_q;
    for (int64_t b = 0; b < attention_.sequences; ++b)
      for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
        float* x = x_ + i * a_.width;
        const float* token = a_.embed + a_.tokens[i] * a_.width;
        if (!a_.positions) {
          std::copy(token, token + a_.width, x);
          continue;
        }
        const float* position = a_.positions + (pages.cache_seqlens[b] + i - cu[b]) * a_.width;
        for (int64_t c = 0; c < a_.width; ++c) x[c] = token[c] + position[c];
      }
  }

  void add_norm(const void* branch, const TrunkNorm& norm, void* y) {
    AddNormArgs args{};
    args.x = x_;
    args.branch = branch;
    args.weight = norm.weight;
    args.bias = norm.bias;
    args.total = x_;
    args.y = y;
    args.stats = stats_;
    args.rows = n_;
    args.width = args.x_row = args.branch_row = a_.width;
    args.branch_dtype = args.y_dtype = attention_.dtype;
    args.eps = a_.eps;
    args.threads = attention_.threads;
    add_norm_cpu(args);
  }

  // In place: a row is read before it is written.
  void norm_heads(const TrunkLayer& layer) {
    const int64_t heads = attention_.heads, kv_heads = attention_.kv_heads;
    const int64_t grain = 16384 / ((heads + kv_heads) * attention_.dim) + 1;
    parallel_rows(n_, grain, attention_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norm_heads(i, 0, heads, layer.q_norm);
        norm_heads(i, heads, kv_heads, layer.k_norm);
      }
    });
  }

  void norm_heads(int64_t token, int64_t first, int64_t count, const float* weight) {
    const AttentionTensor heads = part(first);
    float stats[2];
    AddNormArgs args{};
    args.weight = weight;
    args.stats = stats;
    args.rows = 1;
    args.width = args.x_row = attention_.dim;
    args.x_dtype = args.y_dtype = attention_.dtype;
    args.eps = a_.eps;
    args.threads = 1;
    for (int64_t h = 0; h < count; ++h) {
      const int64_t at = token * heads.token + h * heads.head;
      args.y = static_cast<char*>(heads.data) + at * size_of(attention_.dtype);
      args.x = args.y;
      add_norm_cpu(args);
    }
  }

  void attend(const TrunkLayer& layer) {
    attention_.q = part(0);
    attention_.pages.k_new = part(attention_.heads);
    attention_.pages.v_new = part(attention_.heads + attention_.kv_heads);
    attention_.k.data = layer.keys;
    attention_.v.data = layer.values;
    attention_.out = {heads_, 0, attention_.heads * attention_.dim, attention_.dim};
    attention_cpu(attention_);
  }

  void multiply(const TrunkLinear& by, void* x, void* y) {
    LinearArgs args{};
    args.form = LinearForm::kForward;
    args.a = {x, by.columns, attention_.dtype};
    args.b = {const_cast<void*>(by.weight), by.columns, attention_.dtype};
    args.c = {y, by.rows, attention_.dtype};
    args.rows = n_;
    args.columns = by.rows;
    args.depth = by.columns;
    args.panel = by.panel;
    args.bias = by.bias;
    args.bias_dtype = attention_.dtype;
    args.threads = attention_.threads;
    linear_cpu(args);
  }

  void activate() {
    ActivationArgs args{};
    args.x = up_;
    args.out = act_;
    args.rows = n_;
    args.width = args.out_row = a_.mlp_width;
    args.x_row = a_.mlp_width * (a_.gated ? 2 : 1);
    args.gated = a_.gated;
    args.dtype = attention_.dtype;
    args.threads = attention_.threads;
    activation_cpu(args);
  }

  const TrunkArgs& a_;
  AttentionArgs attention_;
  int64_t n_;
  Memory memory_;
  float *x_, *stats_;
  void *y_, *branch_, *qkv_, *heads_, *up_, *act_;
};

}  // namespace

void trunk_cpu(const TrunkArgs& a) {
  if (a.attention.queries > 0) Trunk(a).run();
}

}  // namespace ic
