// The register-blocked products of tile.h, one function for each word, layout and size of tile.
#include "tile.h"

namespace ic::IC_ISA {
namespace {

template <Word kWord, int kRows, int kVecs, Layout kLayout>
void multiply_tile(const Tile& t) noexcept {
  constexpr int kWide = kVecs * kParts;
  constexpr bool kColumns = kLayout == Layout::kColumns;
  NativeFloat sum[kRows][kWide];
  const char *a = static_cast<const char*>(t.a), *b = static_cast<const char*>(t.b);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) sum[m][j] = NativeFloat{};
  for (int64_t k = 0; k < t.depth; ++k) {
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
  if (t.keep) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const NativeFloat keep = t.keep[m] - NativeFloat{};
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) {
        NativeFloat before;
        __builtin_memcpy(&before, t.c + m * t.ldc + kNativeLanes * j, sizeof before);
        sum[m][j] = fma(before, keep, sum[m][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j)
      __builtin_memcpy(t.c + m * t.ldc + kNativeLanes * j, &sum[m][j], sizeof sum[m][j]);
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
  } else if constexpr (kWord < 2) {
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

}  // namespace ic::IC_ISA
