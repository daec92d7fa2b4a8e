// attention on CUDA: which kernel does the work. float32 and mixed element types take the plain
// ones (attention_plain.cu), 16-bit ones the tensor cores.
#include "attention.cuh"

namespace ic {
namespace {

bool plain(const AttentionArgs& a) { return a.dtype == Dtype::kFloat32 || a.kv_dtype != a.dtype; }

// Positions are 32-bit inside the kernels.
void check_lengths(const AttentionArgs& a) {
  constexpr int64_t kMost = int64_t{1} << 30;
  IC_CHECK(a.queries < kMost && a.keys < kMost, "attention: at most 2^30 - 1 tokens on CUDA, got ",
           a.queries, " queries and ", a.keys, " keys");
}

}  // namespace

void attention_cuda(const AttentionArgs& a, void* stream) {
  check_lengths(a);
  if (plain(a)) return attention_plain_cuda(a, stream);
  // Not block_table: it is null where there is no sequence.
  if (a.pages.block_size > 0) return attention_paged_cuda(a, stream);
  attention_forward_cuda(a, stream);
}

void attention_backward_cuda(const AttentionBackwardArgs& b, void* stream) {
  check_lengths(b.forward);
  if (plain(b.forward)) return attention_plain_backward_cuda(b, stream);
  attention_mma_backward_cuda(b, stream);
}

int64_t attention_workspace_cuda(const AttentionArgs& a, bool paged) {
  if (plain(a)) return 1;
  return paged ? attention_paged_workspace(a) : attention_forward_workspace(a);
}

// delta of each query row and head
int64_t attention_backward_workspace_cuda(const AttentionArgs& a) {
  const int64_t rows = a.sequences * a.queries * a.heads;
  return rows > 0 ? rows : 1;
}

}  // namespace ic
