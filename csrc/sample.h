// sample: draws a token from each row of logits by the Gumbel-max trick, and its log-probability.
//
//   z = logits + bias; penalties; -inf where not allowed; over the temperature
//   kept: the top_k largest; of these the shortest prefix with mass >= top_p; z >= max + ln(min_p)
//         ("prefix": of the row in falling order, the lower index first among equals)
//   token = argmax over kept v of z[v] + g[v], g = -ln(-ln(1 - u)), u = f(seed, position, v)
//   logprob = ln softmax(logits)[token];  sampled_logprob = ln softmax(z over kept)[token]
//   temperature <= 0: token = argmax z, the lowest of equals, and sampled_logprob = logprob
// A row with NaN or +inf in it, or with nothing left to draw, gives token -1 and NaN.
//
// u comes from Philox 4x32-10, the counter-based generator of Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011). Its key is the seed; its counter is (c, position's low
// and high word, 0), where tokens t, t + 16, t + 32 and t + 48 of each 64 share c = 16 (t / 64) + t
// % 16 and take one word each, so that a vector of 16 counters yields the words of 64 consecutive
// tokens in order.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

// A setting of each row, or of all.
template <class T>
struct Control {
  const T* rows;   // null: `all` holds for every row
  int64_t stride;  // in elements
  T all;
  IC_HOST_DEVICE T at(int64_t row) const { return rows ? rows[row * stride] : all; }
};

struct SampleArgs {
  const void* logits;        // (N, V), rows logits_row apart
  const float* bias;         // (N, V), or (V,) with bias_row 0; null: none
  const int32_t* generated;  // (N, V) counts; null: nothing yet
  const uint8_t* prompt;     // (N, V), 1 = occurs in the prompt; null: none does
  const uint8_t* allowed;    // (N, V), 1 = may be drawn; null: all may
  int64_t rows, vocab;
  int64_t logits_row, bias_row, generated_row, prompt_row, allowed_row;  // strides in elements
  Control<float> temperature, top_p, min_p, repetition, presence, frequency;
  Control<int64_t> top_k, seed, position;
  int64_t* tokens;                     // (N,)
  float *logprobs, *sampled_logprobs;  // (N,)
  // On the CPU (slots, 3, padded_vocab): values, weights, adjusted logits. On CUDA nothing.
  float* workspace;
  int64_t slots, padded_vocab;  // padded_vocab: V up to a multiple of 16
  Dtype dtype;
  int threads;
};

struct PhiloxProduct {
  uint32_t high, low;
};

IC_HOST_DEVICE PhiloxProduct multiply_wide(uint32_t a, uint32_t m) {
  const uint64_t product = static_cast<uint64_t>(a) * m;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}

// Ten rounds on a counter of four words, for one counter (uint32_t) or a vector of them.
template <class Word>
IC_HOST_DEVICE void philox4x32(Word (&counter)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const auto first = multiply_wide(counter[0], 0xD2511F53u);
    const auto second = multiply_wide(counter[2], 0xCD9E8D57u);
    counter[0] = second.high ^ counter[1] ^ key0;
    counter[1] = second.low;
    counter[2] = first.high ^ counter[3] ^ key1;
    counter[3] = first.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

IC_CPU_KERNEL(sample_cpu, SampleArgs)
void sample_cuda(const SampleArgs&, void* stream);

}  // namespace ic
