// The product under every matrix product on the CPU, and how its operands are packed.
//
//   c[m][j] = keep[m] c[m][j] + sum over k of a(m, k) b[k][j]
//
// Operands are made of 32-bit words: a float32, or two bfloat16 that are neighbours along the sum,
// the earlier one in the low half. A sum is cut into chains of `chain` words, each from 0, which
// are added up in their order, so an element's bits do not depend on the tile that it falls into. A
// tile of kTileRows rows and kTileVecs vectors of 16 columns fills the register file with its sums:
// for each word of a column it loads a row of b once, and one word of a for each row.
//
// Where the machine multiplies matrices itself, the same operands go to its registers of 16 x 16
// words, and a sum is one chain over groups of sixteen words, which begins with keep[m] c[m][j].
#pragma once

#include "isa.h"
#include "simd.h"

namespace ic::IC_ISA {

// What a word holds and how it is multiplied. kPair is the machine's instruction (pair_word() says
// whether there is one), kSplit does the same in two fused multiply-adds, the later element first:
// the instruction's own order, and its bits as long as no operand and no sum is denormal. kMatrix
// are pairs in groups of sixteen, as the matrix unit multiplies them (amx.h): the chains of a
// group's earlier and of its later elements are added up (Halves), and that to the sum.
enum class Word : int { kFloat, kPair, kSplit, kMatrix };

// Elements in a word, along the sum.
constexpr int64_t elements_of(Word word) { return word == Word::kFloat ? 1 : 2; }

// Words that are multiplied as one: a sum may begin and end only between such groups, where
// operands that are shorter hold 0.
constexpr int64_t words_at_once(Word word) { return word == Word::kMatrix ? 16 : 1; }

// The word for pairs of bfloat16 here.
IC_INLINE Word pair_word() {
#if defined(__AVX512F__)
  if (has_matrix_unit()) return Word::kMatrix;
  if (has_bfloat16_dot()) return Word::kPair;
#endif
  return Word::kSplit;
}

#if defined(__x86_64__) && !defined(__AVX2__)
inline constexpr int kTileRows = 3, kTileVecs = 1;
#elif defined(__AVX512F__)
inline constexpr int kTileRows = 6, kTileVecs = 4;
#else
inline constexpr int kTileRows = 6, kTileVecs = 1;
#endif

// Rows of a tile at most.
inline constexpr int64_t kMatrixRows = 32;
constexpr int64_t tile_rows(Word word) { return word == Word::kMatrix ? kMatrixRows : kTileRows; }

inline constexpr int64_t kOneChain = int64_t{1} << 62;

// Strides, depth and chain in words; kMatrix ignores `chain`.
struct Tile {
  const void *a, *b;
  float* c;
  const float* keep = nullptr;  // (rows,); null: c is only written
  int64_t lda = 0, ldb = 0, ldc = 0, depth = 0;
  int64_t chain = kOneChain;
};

// For `keep`: add to what is there.
inline constexpr float kOnes[kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

enum class Layout : int { kRows, kColumns };  // a(m, k) = a[m * lda + k], or a[k * lda + m]

struct TileTable {  // by word, layout of a, rows - 1 and vectors - 1
  void (*at[3][2][kTileRows][kTileVecs])(const Tile&) noexcept;
};
extern const TileTable kTiles;

#if defined(__AVX512F__)
// kMatrix: here c goes on, keep[m] c[m][j] + (..): the sum's chain begins with it.
void multiply_matrix(const Tile& t, int64_t rows, int64_t columns) noexcept;
void release_matrix_unit() noexcept;
#else
inline void multiply_matrix(const Tile&, int64_t, int64_t) noexcept {}
inline void release_matrix_unit() noexcept {}
#endif

// Around products of kMatrix on a thread: others may use the unit's registers in between.
class MatrixUnit {
 public:
  explicit MatrixUnit(Word word) : used_(word == Word::kMatrix) {}
  ~MatrixUnit() {
    if (used_) release_matrix_unit();
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

 private:
  bool used_;
};

// `rows` at most tile_rows(word), `columns` a multiple of 16; kMatrix takes layout kRows.
template <Layout kLayout = Layout::kRows>
IC_INLINE void multiply(Word word, Tile t, int64_t rows, int64_t columns) {
  if (word == Word::kMatrix) return multiply_matrix(t, rows, columns);
  const auto& tiles = kTiles.at[static_cast<int>(word)][static_cast<int>(kLayout)][rows - 1];
  const float* b = static_cast<const float*>(t.b);
  for (int64_t left = columns / kLanes; left > 0; left -= kTileVecs) {
    t.b = b;
    tiles[(left < kTileVecs ? left : kTileVecs) - 1](t);
    b += kTileVecs * kLanes;
    t.c += kTileVecs * kLanes;
  }
}

// Any number of rows.
template <Layout kLayout = Layout::kRows>
IC_INLINE void multiply_rows(Word word, Tile t, int64_t rows, int64_t columns) {
  const int64_t step = tile_rows(word);
  for (; rows > 0; rows -= step) {
    multiply<kLayout>(word, t, rows < step ? rows : step, columns);
    t.a = static_cast<const float*>(t.a) + step * (kLayout == Layout::kRows ? t.lda : 1);
    t.c += step * t.ldc;
    if (t.keep && t.keep != kOnes) t.keep += step;
  }
}

// ---- words and their product ----

// The halves of pairs as float32.
IC_INLINE NativeFloat early_half(NativeInt pair) { return (NativeFloat)(pair << 16); }
IC_INLINE NativeFloat late_half(NativeInt pair) {
  return (NativeFloat)(pair & (NativeInt{} + static_cast<int32_t>(0xffff0000)));
}

IC_INLINE Vec early_halves(Vec pairs) {
  for (int p = 0; p < kParts; ++p) pairs.part[p] = early_half((NativeInt)pairs.part[p]);
  return pairs;
}
IC_INLINE Vec late_halves(Vec pairs) {
  for (int p = 0; p < kParts; ++p) pairs.part[p] = late_half((NativeInt)pairs.part[p]);
  return pairs;
}

// c + a b of the words a and b. For kMatrix not the order of its sums.
template <Word kWord>
IC_INLINE NativeFloat multiply_add(NativeInt a, NativeInt b, NativeFloat c) {
  if constexpr (kWord == Word::kFloat) return fma((NativeFloat)a, (NativeFloat)b, c);
#if defined(__AVX512F__)
  if constexpr (kWord == Word::kPair || kWord == Word::kMatrix) {
    // Not part of x86-64-v4, hence no intrinsic: pair_word() says whether it may run.
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#endif
  return fma(early_half(a), early_half(b), fma(late_half(a), late_half(b), c));
}

template <Word kWord>
IC_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int p = 0; p < kParts; ++p)
    c.part[p] = multiply_add<kWord>((NativeInt)a.part[p], (NativeInt)b.part[p], c.part[p]);
  return c;
}

// A group's part of a sum of kMatrix, by vectors; the unit's own bits, denormals aside, which it
// takes for 0.
struct Halves {
  Vec early = broadcast(0.0f), late = broadcast(0.0f);

  IC_INLINE void add(Vec a_early, Vec b_early, Vec a_late, Vec b_late) {
    early = fma(a_early, b_early, early);
    late = fma(a_late, b_late, late);
  }
  IC_INLINE Vec sum() const { return early + late; }
};

// ---- sums become words ----

// Bits of bfloat16 in the high halves.
IC_INLINE VecInt round_to_high_half(Vec x) {
  const VecInt b = bits(x), odd = shift_right(b, 16) & broadcast_int(1);
  const VecInt rounded = b + odd + broadcast_int(0x7fff);
  return select(x == x, rounded, b | broadcast_int(0x400000));
}

// The machine has instructions for pairs of bfloat16.
template <Word kWord>
constexpr bool kNativePairs = kWord == Word::kPair || kWord == Word::kMatrix;

// 32 neighbours along the sum as 16 words.
template <Word kWord>
IC_INLINE void store_neighbours(float* to, Vec first, Vec second) {
  if constexpr (kNativePairs<kWord>) {
#if defined(__AVX512F__)
    NativeFloat words;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(words) : "v"(second.part[0]), "v"(first.part[0]));
    __builtin_memcpy(to, &words, sizeof words);
#endif
  } else {
    store(reinterpret_cast<BFloat16*>(to), first);
    store(reinterpret_cast<BFloat16*>(to) + kLanes, second);
  }
}

// ---- packing: rows of a tensor become words, padded with 0 ----

// Word i is (early[i], late[i]); from n on 0.
IC_INLINE Vec interleave(const BFloat16* early, const BFloat16* late, int64_t n) {
  Vec r;
#if defined(__AVX512F__)
  const __mmask16 first = n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, early));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, late));
  r.part[0] = (NativeFloat)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  int32_t word[kLanes];
  for (int i = 0; i < kLanes; ++i) word[i] = i < n ? early[i].bits | late[i].bits << 16 : 0;
  __builtin_memcpy(&r, word, sizeof r);
#endif
  return r;
}

// The words of the first n elements; from n on 0. Pairs are neighbours of a bfloat16 row, floats
// elements of any type.
template <bool kPairs, class T>
IC_INLINE Vec load_words(const T* from, int64_t n) {
  if constexpr (!kPairs) {
    return n >= kLanes ? load(from) : load_partial(from, static_cast<int>(n), 0.0f);
  } else {
    Vec r;
    if (n >= 2 * kLanes) {
      __builtin_memcpy(&r, from, sizeof r);
    } else {
#if defined(__AVX512F__)
      r.part[0] = (NativeFloat)_mm512_maskz_loadu_epi16((1u << n) - 1, from);
#else
      BFloat16 element[2 * kLanes] = {};
      for (int64_t i = 0; i < n; ++i) element[i] = from[i];
      __builtin_memcpy(&r, element, sizeof r);
#endif
    }
    return r;
  }
}

// One row along the sum, as an operand a: whole vectors of words.
template <bool kPairs, class T>
IC_INLINE void pack_row(const T* from, int64_t n, float* to) {
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes;
  for (int64_t i = 0; i < n; i += kStep, to += kLanes)
    store(to, load_words<kPairs>(from + i, n - i));
}

// Panels of b: kPanel columns at a time, each (words, kPanel).
inline constexpr int64_t kPanel = 64;

// Sixteen columns stay in registers where there are as many, if no index is variable.
#if defined(__AVX512F__)
#define IC_UNROLL_COLUMNS _Pragma("GCC unroll 16")
#else
#define IC_UNROLL_COLUMNS _Pragma("GCC unroll 1")
#endif

// Words of the first n of 16 rows, row(0) .. row(n - 1), from element k on, up to `depth`, as
// columns: 16 vectors, of which those past the rows' ends are 0.
template <bool kPairs, class RowOf>
IC_INLINE void load_columns(const RowOf& row, int64_t n, int64_t k, int64_t depth,
                            Vec (&tile)[kLanes]) {
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes;
  if (n >= kLanes && depth - k >= kStep) {
    IC_UNROLL_COLUMNS
    for (int64_t i = 0; i < kLanes; ++i) {
      tile[i] = load_words<kPairs>(row(i) + k, kStep);
      if (k + 4 * kStep < depth) __builtin_prefetch(row(i) + k + 4 * kStep);
    }
  } else {
    IC_UNROLL_COLUMNS
    for (int64_t i = 0; i < kLanes; ++i)
      tile[i] = i < n ? load_words<kPairs>(row(i) + k, depth - k) : broadcast(0.0f);
  }
  transpose(tile);
}

// b from rows along the sum: row(i) is column i of b, `depth` elements long. Columns past n, up to
// a whole vector, are 0; `panel`: how many a panel has. Sixteen rows are read side by side to their
// ends, not a panel's 64.
template <bool kPairs, class RowOf>
IC_INLINE void pack_columns(const RowOf& row, int64_t n, int64_t depth, float* to,
                            int64_t panel = kPanel) {
  constexpr int64_t kElements = kPairs ? 2 : 1;
  const int64_t words = (depth + kElements - 1) / kElements;
  for (int64_t i0 = 0; i0 < n; i0 += kLanes) {
    decltype(row(0)) rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = row(i0 + i < n ? i0 + i : n - 1);
    const auto from = [&](int64_t i) __attribute__((always_inline)) { return rows[i]; };
    float* columns = to + i0 / panel * panel * words + i0 % panel;
    for (int64_t word = 0; word < words; word += kLanes) {
      Vec tile[kLanes];
      load_columns<kPairs>(from, n - i0, word * kElements, depth, tile);
      const int64_t left = words - word;
      float* at = columns + word * panel;
      if (left >= kLanes) {
        IC_UNROLL_COLUMNS
        for (int64_t i = 0; i < kLanes; ++i) store(at + i * panel, tile[i]);
      } else {
        IC_UNROLL_COLUMNS
        for (int64_t i = 0; i < kLanes; ++i)
          if (i < left) store(at + i * panel, tile[i]);
      }
    }
  }
}

// b, or a by columns, from rows across the sum: row(k) holds element k of each column. Columns past
// n, up to a whole vector, are 0; ld: words from one row of words to the next.
template <bool kPairs, class RowOf>
IC_INLINE void pack_rows(const RowOf& row, int64_t n, int64_t depth, float* to, int64_t ld) {
  if constexpr (kPairs) {
    const BFloat16 zeros[kLanes] = {};
    for (int64_t k = 0; k < depth; k += 2, to += ld) {
      const BFloat16 *early = row(k), *late = k + 1 < depth ? row(k + 1) : zeros;
      const int64_t step = k + 1 < depth ? 1 : 0;
      for (int64_t j = 0; j < n; j += kLanes)
        store(to + j, interleave(early + j, late + j * step, n - j));
    }
  } else {
    for (int64_t k = 0; k < depth; ++k, to += ld) {
      const auto* from = row(k);
      for (int64_t j = 0; j < n; j += kLanes) store(to + j, load_words<false>(from + j, n - j));
    }
  }
}

// a by rows of sums, from bfloat16 rows across the sum: row(k) holds element k of n rows, which
// become groups of sixteen words, 0 past the end, rows of a being ld words apart; those past n, up
// to a whole vector, are 0 too.
template <class RowOf>
IC_INLINE void pack_across(const RowOf& row, int64_t n, int64_t depth, float* to, int64_t ld) {
  const BFloat16 zeros[kLanes] = {};
  for (int64_t m = 0; m < n; m += kLanes) {
    for (int64_t k = 0; k < depth; k += 2 * kLanes) {
      Vec tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t early = k + 2 * i, late = early + 1;
        tile[i] = interleave(early < depth ? row(early) + m : zeros,
                             late < depth ? row(late) + m : zeros, n - m);
      }
      transpose(tile);
      for (int64_t i = 0; i < kLanes; ++i) store(to + (m + i) * ld + k / 2, tile[i]);
    }
  }
}

// ---- sums by columns become rows ----

// to[i][j] = from[j][i] for i, j < 16; rows of `from` from n on are not read.
IC_INLINE void columns_to_rows(const float* from, int64_t ld, int64_t n, float* to, int64_t to_ld) {
  Vec tile[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) tile[j] = load(from + (j < n ? j : n - 1) * ld);
  transpose(tile);
  for (int64_t i = 0; i < kLanes; ++i) store(to + i * to_ld, tile[i]);
}

}  // namespace ic::IC_ISA
