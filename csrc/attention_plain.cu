#include "attention.cuh"

namespace ic {
void attention_plain_cuda(const AttentionArgs&, void*) { IC_CHECK(false, "attention: no such CUDA kernel yet"); }
void attention_plain_backward_cuda(const AttentionBackwardArgs&, void*) { IC_CHECK(false, "attention: no such CUDA kernel yet"); }
}  // namespace ic
