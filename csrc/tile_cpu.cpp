// The register-blocked products of tile.h, one function for each word, layout and size of tile; and
// those by the matrix unit.
#include "tile.h"

#if defined(__AVX512F__)
#include "amx.h"
#endif

namespace ic::IC_ISA {
namespace {

template <Word kWord, int kRows, int kVecs, Layout kLayout>
void multiply_tile(const Tile& t) noexcept {
  constexpr int kWide = kVecs * kParts;
  constexpr bool kColumns = kLayout == Layout::kColumns;
  const float* keep = t.keep;
  const char *a = static_cast<const char*>(t.a), *b = static_cast<const char*>(t.b);
  int64_t left = t.depth;
  do {
    NativeFloat sum[kRows][kWide];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) sum[m][j] = NativeFloat{};
    for (int64_t k = left < t.chain ? left : t.chain; k > 0; --k) {
      NativeInt x[kWide];
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) __builtin_memcpy(&x[j], b + sizeof x[j] * j, sizeof x[j]);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        int32_t word;
        __builtin_memcpy(&word, a + (kColumns ? m : m * t.lda) * sizeof word, sizeof word);
        const NativeInt y = NativeInt{} + word;
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) sum[m][j] = multiply_add<kWord>(y, x[j], sum[m][j]);
      }
      a += (kColumns ? t.lda : 1) * sizeof(float);
      b += t.ldb * sizeof(float);
    }
    if (keep) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const NativeFloat factor = keep[m] - NativeFloat{};
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) {
          NativeFloat before;
          __builtin_memcpy(&before, t.c + m * t.ldc + kNativeLanes * j, sizeof before);
          sum[m][j] = fma(before, factor, sum[m][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j)
        __builtin_memcpy(t.c + m * t.ldc + kNativeLanes * j, &sum[m][j], sizeof sum[m][j]);
    keep = kOnes;
    left -= t.chain;
  } while (left > 0);
}

template <int kWord, int kLayout, int kRow, int kVec>
constexpr void fill(TileTable& table) {
  table.at[kWord][kLayout][kRow][kVec] =
      multiply_tile<static_cast<Word>(kWord), kRow + 1, kVec + 1, static_cast<Layout>(kLayout)>;
  if constexpr (kVec + 1 < kTileVecs) {
    fill<kWord, kLayout, kRow, kVec + 1>(table);
  } else if constexpr (kRow + 1 < kTileRows) {
    fill<kWord, kLayout, kRow + 1, 0>(table);
  } else if constexpr (kLayout == 0) {
    fill<kWord, 1, 0, 0>(table);
  } else if constexpr (kWord + 1 < static_cast<int>(Word::kMatrix)) {
    fill<kWord + 1, 0, 0, 0>(table);
  }
}

constexpr TileTable full_table() {
  TileTable table{};
  fill<0, 0, 0, 0>(table);
  return table;
}

}  // namespace

constinit const TileTable kTiles = full_table();

#if defined(__AVX512F__)
namespace {

// ---- the matrix unit ----
//
// Registers 0 to 3 hold sums, 4 and 5 a's rows, 6 and 7 b's columns: 32 x 32 sums and a load for
// each product, the fewest that there can be. b comes from L2: fetched a group ahead, the products
// go at 1.9 TFLOP/s of the unit's 2.85 (an Emerald Rapids core, zeros), at 1.0 without.

// Rows of the two halves of a tile and words of a group that the registers have; 0: none yet.
struct MatrixState {
  int8_t upper = 0, lower = 0, words = 0;
  bool operator==(const MatrixState&) const = default;
};
thread_local MatrixState matrix_state;

void set_shapes(int64_t upper, int64_t lower, int64_t words) {
  const MatrixState wanted{static_cast<int8_t>(upper), static_cast<int8_t>(lower),
                           static_cast<int8_t>(words)};
  if (matrix_state == wanted) return;
  matrix_state = wanted;
  if (lower == 0) lower = upper;  // unused
  const int64_t rows[] = {upper, upper, lower, lower, upper, lower, words, words};
  amx::Shapes s;
  for (int i = 0; i < 8; ++i) {
    s.bytes[i] = static_cast<uint16_t>(4 * (i == 4 || i == 5 ? words : kLanes));
    s.rows[i] = static_cast<uint8_t>(rows[i]);
  }
  amx::configure(s);
}

// kHalves x kColumns registers of sums from c on, over `groups` groups of `words` words.
template <int kHalves, int kColumns>
IC_INLINE void add_groups(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                          int64_t ldc, int64_t groups, bool fresh) {
  const int64_t half = kLanes * lda;
  const float* next_columns = b + kColumns * kLanes;
  if (fresh) {
    amx::zero<0>();
    if constexpr (kColumns > 1) amx::zero<1>();
    if constexpr (kHalves > 1) amx::zero<2>();
    if constexpr (kHalves > 1 && kColumns > 1) amx::zero<3>();
  } else {
    amx::load<0>(c, ldc);
    if constexpr (kColumns > 1) amx::load<1>(c + kLanes, ldc);
    if constexpr (kHalves > 1) amx::load<2>(c + kLanes * ldc, ldc);
    if constexpr (kHalves > 1 && kColumns > 1) amx::load<3>(c + kLanes * ldc + kLanes, ldc);
  }
  for (int64_t i = 0; i < groups; ++i, a += kLanes, b += kLanes * ldb) {
    // What comes next goes to L1 while this group is multiplied.
    const float* next = i + 1 < groups ? b + kLanes * ldb : next_columns;
#pragma GCC unroll 1
    for (int r = 0; r < kLanes; ++r, next += ldb) {
      __builtin_prefetch(next);
      if constexpr (kColumns > 1) __builtin_prefetch(next + kLanes);
    }
    amx::load<4>(a, lda);
    amx::load<6>(b, ldb);
    amx::multiply_add<0, 4, 6>();
    if constexpr (kColumns > 1) {
      amx::load<7>(b + kLanes, ldb);
      amx::multiply_add<1, 4, 7>();
    }
    if constexpr (kHalves > 1) {
      amx::load<5>(a + half, lda);
      amx::multiply_add<2, 5, 6>();
      if constexpr (kColumns > 1) amx::multiply_add<3, 5, 7>();
    }
  }
  amx::store<0>(c, ldc);
  if constexpr (kColumns > 1) amx::store<1>(c + kLanes, ldc);
  if constexpr (kHalves > 1) amx::store<2>(c + kLanes * ldc, ldc);
  if constexpr (kHalves > 1 && kColumns > 1) amx::store<3>(c + kLanes * ldc + kLanes, ldc);
}

template <int kHalves>
void multiply_columns_of(const float* a, const Tile& t, int64_t columns, int64_t first,
                         int64_t groups, bool fresh) {
  const float* b = static_cast<const float*>(t.b) + first * t.ldb;
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    add_groups<kHalves, 2>(a + first, t.lda, b + j, t.ldb, t.c + j, t.ldc, groups, fresh);
  if (j < columns)
    add_groups<kHalves, 1>(a + first, t.lda, b + j, t.ldb, t.c + j, t.ldc, groups, fresh);
}

}  // namespace

void release_matrix_unit() noexcept {
  if (matrix_state == MatrixState{}) return;
  matrix_state = {};
  amx::release();
}

void multiply_matrix(const Tile& t, int64_t rows, int64_t columns) noexcept {
  if (t.keep && t.keep != kOnes)
    for (int64_t m = 0; m < rows; ++m)
      if (t.keep[m] != 1.0f)
        for (int64_t j = 0; j < columns; j += kLanes) {
          float* c = t.c + m * t.ldc + j;
          store(c, load(c) * broadcast(t.keep[m]));
        }
  const int64_t upper = rows < kLanes ? rows : kLanes, lower = rows - upper;
  const auto add = [&](int64_t first, int64_t groups, int64_t words, bool fresh) {
    set_shapes(upper, lower, words);
    const float* a = static_cast<const float*>(t.a);
    lower > 0 ? multiply_columns_of<2>(a, t, columns, first, groups, fresh)
              : multiply_columns_of<1>(a, t, columns, first, groups, fresh);
  };
  const int64_t whole = t.depth / kLanes, left = t.depth % kLanes;
  if (whole > 0 || left == 0) add(0, whole, kLanes, !t.keep);
  if (left > 0) add(whole * kLanes, 1, left, !t.keep && whole == 0);
}
#endif

}  // namespace ic::IC_ISA
