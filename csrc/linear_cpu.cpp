// linear on the CPU.
//
// A task is a range of c's rows and a few panels of 64 of its columns. It packs its panels of b, as
// much of the sum at a time as L2 holds, and walks the rows by tiles of a few, which a panel meets
// while the tile is in L1. So each task packs what it needs and nothing is shared: packing costs 2
// to 5 % of the multiplications from some 100 rows on, and needs no memory that grows with the
// matrices. Where the sum does not fit, the sums of all rows wait in L2 for its next part; c itself
// holds them if it can.
//
// Up to kStreamRows rows, as in generating, reading b is all the work: a task turns 16 x 16 words
// of b around in registers and multiplies them there. Up to kByColumns rows c is formed by columns:
// rows of b as they lie in memory, times the packed rows of a. A b that was packed before
// (linear_pack) takes the first way with any number of rows, and is one stream from memory.
#include "linear.h"
#include "parallel.h"
#include "tile.h"

namespace ic::IC_ISA {
namespace {

IC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
IC_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
IC_INLINE int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
IC_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// ---- elements ----

template <class T>
struct Rows {
  T* first;
  int64_t row;
  IC_INLINE T* operator()(int64_t i) const { return first + i * row; }
};

// f(rows of m from its element (row, column) on)
template <class T, class F>
IC_INLINE void call_with(const LinearMatrix& m, int64_t row, int64_t column, const F& f) {
  f(Rows<T>{static_cast<T*>(m.data) + row * m.row + column, m.row});
}
template <bool kPairs = false, class F>
IC_INLINE void with_rows(const LinearMatrix& m, int64_t row, int64_t column, const F& f) {
  if (kPairs || m.dtype == Dtype::kBFloat16) return call_with<BFloat16>(m, row, column, f);
  if constexpr (!kPairs) {
    if (m.dtype == Dtype::kFloat16) return call_with<Float16>(m, row, column, f);
    call_with<float>(m, row, column, f);
  }
}

template <class T>
IC_INLINE void store_some(T* to, Vec x, int64_t n) {
  if (n >= kLanes) {
    store(to, x);
  } else {
    store_partial(to, x, static_cast<int>(n));
  }
}

// c[row + i][column + j] = round(sums[i][j] + bias[column + j]), rows x n of them, n at most a
// panel; added to what is there if the arguments say so. Sums of kMatrix are rounded by the
// machine's instruction, which takes denormals for 0 as the unit does.
IC_INLINE void store_sums(const LinearArgs& g, [[maybe_unused]] Word word, int64_t row,
                          int64_t column, int64_t rows, int64_t n, const float* sums, int64_t ld) {
  const LinearMatrix bias{const_cast<void*>(g.bias), 0, g.bias_dtype};
  Vec more[kPanel / kLanes];
  for (int64_t j = 0; j < n; j += kLanes) {
    more[j / kLanes] = broadcast(0.0f);
    if (g.bias)
      with_rows(bias, 0, column + j,
                [&](auto from) { more[j / kLanes] = load_words<false>(from.first, n - j); });
  }
  const auto sum = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const Vec x = load(sums + i * ld + j);
    return g.bias ? x + more[j / kLanes] : x;
  };
  with_rows(g.c, row, column, [&](auto to) {
#if defined(__AVX512F__)
    if constexpr (__is_same(decltype(to), Rows<BFloat16>)) {
      if (word == Word::kMatrix) {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < n; j += 2 * kLanes) {
            const int64_t left = smaller(2 * kLanes, n - j);
            float words[kLanes];
            float* at = left < 2 * kLanes ? words : reinterpret_cast<float*>(to(i) + j);
            const Vec later = left > kLanes ? sum(i, j + kLanes) : broadcast(0.0f);
            store_neighbours<Word::kMatrix>(at, sum(i, j), later);
            if (at == words) __builtin_memcpy(to(i) + j, words, left * sizeof(BFloat16));
          }
        return;
      }
    }
#endif
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vec x = sum(i, j);
        store_some(to(i) + j, g.accumulate ? load_words<false>(to(i) + j, n - j) + x : x, n - j);
      }
  });
}

// ---- how the work is cut ----

struct Plan {
  Word word;
  int64_t tile;          // rows of a tile
  int64_t words, chunk;  // of the sum; of a part of it, a multiple of a block
  int64_t rows, panels;  // of a task
  int64_t panel;         // columns of one
  bool packed;           // rows of a are not words as they lie in memory
  bool b_packed;         // b is panels as they lie in memory
  bool in_place;         // c may hold its own sums
  int64_t row_tasks, panel_tasks;

  bool whole() const { return chunk >= words; }
  // Floats of scratch: b, a, sums.
  int64_t b_floats() const { return b_packed ? 0 : panels * panel * chunk; }
  int64_t a_floats(bool by_columns) const {
    if (by_columns) return round_up(rows, kLanes) * lda();
    return packed ? tile * lda() : 0;
  }
  // Words between rows of a that are packed: seldom a power of two.
  int64_t lda() const { return round_up(chunk, kLanes) + kLanes; }
  int64_t sum_floats() const { return whole() ? tile * kPanel : rows * panels * kPanel; }
};

Plan plan_of(const LinearArgs& g) {
  Plan p{};
  const bool pairs = g.a.dtype == Dtype::kBFloat16 && g.b.dtype == Dtype::kBFloat16;
  const bool by_columns = g.form == LinearForm::kWeight;
  p.word = pairs ? pair_word() : Word::kFloat;
  p.tile = tile_rows(p.word);
  p.words = ceil_div(g.depth, elements_of(p.word));
  p.packed = pairs ? g.depth % 2 != 0 || g.a.row % 2 != 0 : g.a.dtype != Dtype::kFloat32;
  p.in_place = g.c.dtype == Dtype::kFloat32 && !g.accumulate;
  p.b_packed = g.panel > 0;
  p.panel = p.b_packed ? g.panel : kPanel;
  // Up to 384 KB of L2 for b's panels. The rest of its 1 MB is for the sums of a task's rows, and
  // in the weights' gradient for a's part too, so that parts there are short.
  constexpr int64_t kWhole = 1024, kPanelWords = 96 * 1024;
  const int64_t part = by_columns ? 128 : 512;
  const bool whole = p.b_packed || p.words <= (by_columns ? part : kWhole);
  p.chunk = whole ? larger(1, p.words) : part;
  const int64_t all_panels = larger(1, ceil_div(g.columns, p.panel));
  const int64_t most = by_columns ? 6 : larger(1, smaller(8, kPanelWords / (p.chunk * p.panel)));
  p.panels = smaller(most, all_panels);
  const int64_t all_rows = round_up(larger(1, g.rows), p.tile);
  p.rows = smaller(all_rows, by_columns ? 288 : p.whole() ? 1024 : 384);
  const auto tasks = [&] { return ceil_div(all_rows, p.rows) * ceil_div(all_panels, p.panels); };
  const int64_t wanted = g.threads > 1 ? 4 * g.threads : 1;
  while (tasks() < wanted && p.panels > 1) p.panels = (p.panels + 1) / 2;
  while (tasks() < wanted && p.rows > 48) p.rows = round_up(p.rows / 2, p.tile);
  p.row_tasks = ceil_div(all_rows, p.rows);
  p.panel_tasks = ceil_div(all_panels, p.panels);
  return p;
}

// Tasks in a piece of the thread pool: half a million flops and bytes take some 5 microseconds.
int64_t grain_of(const LinearArgs& g, int64_t tasks) {
  const double work = 2.0 * g.rows * g.columns * g.depth + 4.0 * g.columns * g.depth;
  const double pieces = work * 2e-6 + 1.0;
  return pieces >= static_cast<double>(tasks) ? 1 : ceil_div(tasks, static_cast<int64_t>(pieces));
}

// ---- many rows ----

template <bool kPairs>
class Task {
 public:
  Task(const LinearArgs& args, const Plan& plan) : g_(args), plan_(plan) {
    const bool by_columns = g_.form == LinearForm::kWeight;
    b_ = scratch(plan.b_floats() + plan.a_floats(by_columns) + plan.sum_floats());
    a_ = b_ + plan.b_floats();
    sums_ = a_ + plan.a_floats(by_columns);
  }

  void run(int64_t row_task, int64_t panel_task) {
    row_ = row_task * plan_.rows;
    end_row_ = smaller(g_.rows, row_ + plan_.rows);
    column_ = panel_task * plan_.panels * plan_.panel;
    end_column_ = smaller(g_.columns, column_ + plan_.panels * plan_.panel);
    if (plan_.b_packed) b_ = static_cast<float*>(g_.b.data) + column_ * plan_.words;
    for (int64_t word = 0; word == 0 || word < plan_.words; word += plan_.chunk) {
      words_ = smaller(plan_.chunk, plan_.words - word);
      if (!plan_.b_packed) pack_b(word);
      if (g_.form == LinearForm::kWeight) pack_columns_of_a(word);
      for (int64_t m = row_; m < end_row_; m += plan_.tile) add_part(m, word);
    }
  }

 private:
  static constexpr int64_t kElements = kPairs ? 2 : 1;

  void pack_b(int64_t word) {
    const int64_t k = word * kElements, depth = smaller(words_ * kElements, g_.depth - k);
    float* to = b_;
    for (int64_t j = column_; j < end_column_; j += kPanel, to += words_ * kPanel) {
      const int64_t n = smaller(kPanel, end_column_ - j);
      if (g_.form == LinearForm::kForward) {
        with_rows<kPairs>(g_.b, j, k, [&](auto rows) { pack_columns<kPairs>(rows, n, depth, to); });
      } else {
        with_rows<kPairs>(g_.b, k, j,
                          [&](auto rows) { pack_rows<kPairs>(rows, n, depth, to, kPanel); });
      }
    }
  }

  void pack_columns_of_a(int64_t word) {
    const int64_t k = word * kElements, depth = smaller(words_ * kElements, g_.depth - k);
    const int64_t n = end_row_ - row_;
    with_rows<kPairs>(g_.a, k, row_, [&](auto rows) {
      if constexpr (kPairs) {
        if (plan_.word == Word::kMatrix) return pack_across(rows, n, depth, a_, plan_.lda());
      }
      pack_rows<kPairs>(rows, n, depth, a_, round_up(plan_.rows, kLanes));
    });
  }

  // The part from `word` on of the sums of a tile of rows from m on.
  void add_part(int64_t m, int64_t word) {
    const bool matrix = plan_.word == Word::kMatrix;
    const bool a_by_columns = g_.form == LinearForm::kWeight && !matrix;
    const int64_t rows = smaller(plan_.tile, end_row_ - m);
    const bool last = word + words_ >= plan_.words;
    Tile tile{a_, b_, sums_};
    tile.lda = plan_.lda();
    tile.ldb = plan_.panel;
    tile.depth = words_;
    tile.chain = kLinearBlock;
    tile.keep = word == 0 ? nullptr : kOnes;
    if (a_by_columns) {
      tile.lda = round_up(plan_.rows, kLanes);
      tile.a = a_ + m - row_;
    } else if (g_.form == LinearForm::kWeight) {
      tile.a = a_ + (m - row_) * tile.lda;
    } else if (plan_.packed) {
      pack_rows_of_a(m, rows, word, tile.lda);
    } else {
      tile.lda = g_.a.row / kElements;
      const float* a = static_cast<const float*>(g_.a.data) + m * tile.lda + word;
      tile.a = a;
      if (matrix) fetch(a + plan_.tile * tile.lda, tile.lda, end_row_ - m - plan_.tile);
    }
    const float* b = b_;
    for (int64_t j = column_; j < end_column_; j += plan_.panel, b += words_ * plan_.panel) {
      const int64_t n = smaller(plan_.panel, end_column_ - j);
      // Sums form where they are to stay if there is room for whole vectors of them.
      const bool in_place = plan_.in_place && n % kLanes == 0;
      tile.ldc = in_place ? g_.c.row : plan_.whole() ? kPanel : plan_.panels * kPanel;
      tile.c = in_place        ? static_cast<float*>(g_.c.data) + m * tile.ldc + j
               : plan_.whole() ? sums_
                               : sums_ + (m - row_) * tile.ldc + j - column_;
      tile.b = b;
      if (a_by_columns) {
        multiply<Layout::kColumns>(plan_.word, tile, rows, round_up(n, kLanes));
      } else {
        multiply(plan_.word, tile, rows, round_up(n, kLanes));
      }
      if (last && (g_.bias || !in_place))
        store_sums(g_, plan_.word, m, j, rows, n, tile.c, tile.ldc);
    }
  }

  // The next tile's rows, at most `rows`, on their way to L2.
  void fetch(const float* a, int64_t lda, int64_t rows) const {
    for (int64_t i = 0; i < smaller(rows, plan_.tile); ++i)
      for (int64_t k = 0; k < words_; k += kLanes) __builtin_prefetch(a + i * lda + k, 0, 2);
  }

  void pack_rows_of_a(int64_t m, int64_t rows, int64_t word, int64_t lda) {
    const int64_t k = word * kElements, depth = smaller(words_ * kElements, g_.depth - k);
    with_rows<kPairs>(g_.a, m, k, [&](auto from) {
      for (int64_t i = 0; i < rows; ++i) pack_row<kPairs>(from(i), depth, a_ + i * lda);
    });
  }

  const LinearArgs& g_;
  const Plan& plan_;
  float *b_, *a_, *sums_;
  int64_t row_ = 0, end_row_ = 0, column_ = 0, end_column_ = 0, words_ = 0;
};

template <bool kPairs>
void run_tasks(const LinearArgs& g, const Plan& plan) {
  const int64_t tasks = plan.row_tasks * plan.panel_tasks;
  parallel_rows(tasks, grain_of(g, tasks), g.threads, [&](int64_t begin, int64_t end) {
    const MatrixUnit guard(plan.word);
    Task<kPairs> task(g, plan);
    for (int64_t i = begin; i < end; ++i) task.run(i / plan.panel_tasks, i % plan.panel_tasks);
  });
}

// ---- few rows: forward only ----

// Rows at most: their sums and 16 vectors of b fill the registers. From kAcross rows on a is
// packed, the same word of all rows side by side.
#if defined(__AVX512F__)
constexpr int64_t kStreamRows = 14;
#else
constexpr int64_t kStreamRows = 4;
#endif
constexpr int64_t kAcross = 5;

// Columns `column` .. + 15 of c, which has kRows rows or one less; a: their words, lda apart.
template <Word kWord, int kRows, class T>
void stream_columns(const LinearArgs& g, const float* a, int64_t lda, Rows<T> b, int64_t column) {
  constexpr bool kPairs = kWord != Word::kFloat;
  constexpr int64_t kElements = kPairs ? 2 : 1;
  const int64_t n = smaller(kLanes, g.columns - column), words = ceil_div(g.depth, kElements);
  Vec sum[kRows];
  for (int m = 0; m < kRows; ++m) sum[m] = broadcast(0.0f);
  for (int64_t first = 0; first < words; first += kLinearBlock) {
    const int64_t end = smaller(words, first + kLinearBlock);
    Vec chain[kRows];
    for (int m = 0; m < kRows; ++m) chain[m] = broadcast(0.0f);
    const auto add = [&](int64_t word, const Vec& x) __attribute__((always_inline)) {
      for (int m = 0; m < kRows; ++m)
        chain[m] = multiply_add<kWord>(
            broadcast(kRows < kAcross ? a[m * lda + word] : a[word * kLanes + m]), x, chain[m]);
    };
    for (int64_t word = first; word < end; word += kLanes) {
      Vec tile[kLanes];
      load_columns<kPairs>(b, n, word * kElements, g.depth, tile);
      if (end - word >= kLanes) {
        IC_UNROLL_COLUMNS
        for (int64_t i = 0; i < kLanes; ++i) add(word + i, tile[i]);
      } else {
        IC_UNROLL_COLUMNS
        for (int64_t i = 0; i < kLanes; ++i)
          if (i < end - word) add(word + i, tile[i]);
      }
    }
    for (int m = 0; m < kRows; ++m) sum[m] = first == 0 ? chain[m] : sum[m] + chain[m];
  }
  for (int64_t m = 0; m < g.rows; ++m) {
    float row[kLanes];
    store(row, sum[m]);
    store_sums(g, kWord, m, column, 1, n, row, kLanes);
  }
}

template <Word kWord, class T>
void stream_rows(const LinearArgs& g, const float* a, int64_t lda, Rows<T> b, int64_t column) {
  if (g.rows == 1) return stream_columns<kWord, 1>(g, a, lda, b, column);
  if (g.rows == 2) return stream_columns<kWord, 2>(g, a, lda, b, column);
  if (g.rows == 3) return stream_columns<kWord, 3>(g, a, lda, b, column);
  if (g.rows == 4) return stream_columns<kWord, 4>(g, a, lda, b, column);
#if defined(__AVX512F__)
  if (g.rows <= 6) return stream_columns<kWord, 6>(g, a, lda, b, column);
  if (g.rows <= 8) return stream_columns<kWord, 8>(g, a, lda, b, column);
  if (g.rows <= 10) return stream_columns<kWord, 10>(g, a, lda, b, column);
  if (g.rows <= 12) return stream_columns<kWord, 12>(g, a, lda, b, column);
  stream_columns<kWord, 14>(g, a, lda, b, column);
#endif
}

template <bool kPairs>
void stream(const LinearArgs& g, const Plan& plan) {
  const float* a = static_cast<const float*>(g.a.data);
  int64_t lda = g.a.row / elements_of(plan.word);
  if (g.rows >= kAcross) {
    float* packed = scratch(plan.words * kLanes);
    with_rows<kPairs>(
        g.a, 0, 0, [&](auto rows) { pack_columns<kPairs>(rows, g.rows, g.depth, packed, kLanes); });
    a = packed;
  } else if (plan.packed) {
    lda = round_up(plan.words, kLanes);
    float* packed = scratch(g.rows * lda);
    with_rows<kPairs>(g.a, 0, 0, [&](auto from) {
      for (int64_t m = 0; m < g.rows; ++m) pack_row<kPairs>(from(m), g.depth, packed + m * lda);
    });
    a = packed;
  }
  const int64_t tasks = ceil_div(g.columns, kLanes);
  parallel_rows(tasks, grain_of(g, tasks), g.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      with_rows<kPairs>(g.b, i * kLanes, 0, [&](auto b) {
        if constexpr (!kPairs) {
          stream_rows<Word::kFloat>(g, a, lda, b, i * kLanes);
        } else if (plan.word == Word::kSplit) {
          stream_rows<Word::kSplit>(g, a, lda, b, i * kLanes);
        } else {
          stream_rows<Word::kPair>(g, a, lda, b, i * kLanes);
        }
      });
  });
}

// ---- up to a panel of rows, c by columns: forward only ----

constexpr int64_t kByColumns = kPanel;  // rows at most
constexpr int64_t kColumnsAtOnce = 48;

// Rows of b are words as they lie in memory, and a's take up to 768 KB of L2; the matrix unit,
// which reads them once for 32 columns and not for 6, takes 1 MB.
bool fits_by_columns(const LinearArgs& g, const Plan& plan) {
  const bool words = plan.word == Word::kFloat ? g.b.dtype == Dtype::kFloat32
                                               : g.depth % 2 == 0 && g.b.row % 2 == 0;
  const int64_t most = (plan.word == Word::kMatrix ? 256 : 192) * 1024;
  return words && g.rows <= kByColumns && plan.words * round_up(g.rows, kLanes) <= most;
}

// Columns of c are rows of b times the rows of a as columns: nothing of b is packed.
template <bool kPairs>
void multiply_by_columns(const LinearArgs& g, const Plan& plan) {
  constexpr int64_t kElements = kPairs ? 2 : 1;
  const int64_t panel = round_up(g.rows, kLanes);
  float* a = scratch(plan.words * panel);
  with_rows<kPairs>(g.a, 0, 0,
                    [&](auto rows) { pack_columns<kPairs>(rows, g.rows, g.depth, a, panel); });
  const int64_t unit = plan.word == Word::kMatrix ? kMatrixRows : kColumnsAtOnce;
  const int64_t tasks = ceil_div(g.columns, unit), lda = g.b.row / kElements;
  parallel_rows(tasks, grain_of(g, tasks), g.threads, [&](int64_t begin, int64_t end) {
    const MatrixUnit guard(plan.word);
    float sums[kColumnsAtOnce * kPanel];
    for (int64_t column = begin * unit; column < smaller(g.columns, end * unit); column += unit) {
      const int64_t n = smaller(unit, g.columns - column);
      const float* b = static_cast<const float*>(g.b.data) + column * lda;
      multiply_rows(plan.word, {b, a, sums, nullptr, lda, panel, kPanel, plan.words, kLinearBlock},
                    n, panel);
      for (int64_t m = 0; m < g.rows; m += kLanes)
        for (int64_t j = 0; j < n; j += kLanes) {
          float rows[kLanes * kLanes];
          columns_to_rows(sums + j * kPanel + m, kPanel, n - j, rows, kLanes);
          store_sums(g, plan.word, m, column + j, smaller(kLanes, g.rows - m),
                     smaller(kLanes, n - j), rows, kLanes);
        }
    }
  });
}

// ---- the bias ----

// Sixteen columns at most; out is their row. Blocks of 16 rows are added up pairwise: sums[i] is
// that of 2^i blocks, where the number of blocks so far has bit i.
void sum_columns(const LinearBiasArgs& g, int64_t column, int64_t n, const LinearMatrix& out) {
  constexpr int64_t kRows = 16;
  Vec sums[60];
  int64_t blocks = 0;
  with_rows(g.grad, 0, column, [&](auto rows) {
    for (int64_t first = 0; first < g.rows; first += kRows) {
      Vec sum = broadcast(0.0f);
      for (int64_t i = first; i < smaller(g.rows, first + kRows); ++i)
        sum = sum + load_words<false>(rows(i), n);
      Vec* to = sums;
      for (int64_t bits = blocks++; bits & 1; bits >>= 1) sum = *to++ + sum;
      *to = sum;
    }
  });
  Vec sum = broadcast(0.0f);
  for (int i = 0; blocks >> i > 0; ++i)
    if (blocks >> i & 1) sum = sum + sums[i];
  if (g.accumulate) sum = load_words<false>(static_cast<const float*>(g.out) + column, n) + sum;
  with_rows(out, 0, column, [&](auto to) { store_some(to.first, sum, n); });
}

}  // namespace

void linear_cpu(const LinearArgs& g) {
  if (g.rows == 0 || g.columns == 0) return;
  const Plan plan = plan_of(g);
  const bool pairs = plan.word != Word::kFloat, forward = g.form == LinearForm::kForward;
  if (plan.b_packed) return run_tasks<true>(g, plan);
  if (plan.word != Word::kMatrix && forward && g.rows <= kStreamRows)
    return pairs ? stream<true>(g, plan) : stream<false>(g, plan);
  if (forward && fits_by_columns(g, plan))
    return pairs ? multiply_by_columns<true>(g, plan) : multiply_by_columns<false>(g, plan);
  return pairs ? run_tasks<true>(g, plan) : run_tasks<false>(g, plan);
}

void linear_pack_cpu(const LinearPackArgs& g) {
  const int64_t panels = ceil_div(g.rows, g.panel), words = ceil_div(g.depth, 2);
  parallel_rows(panels, 65536 / (g.panel * words + 1) + 1, g.threads,
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i)
                    with_rows<true>(g.from, i * g.panel, 0, [&](auto rows) {
                      pack_columns<true>(rows, smaller(g.panel, g.rows - i * g.panel), g.depth,
                                         static_cast<float*>(g.to) + i * g.panel * words, g.panel);
                    });
                });
}

void linear_bias_cpu(const LinearBiasArgs& g) {
  const int64_t vectors = ceil_div(g.columns, kLanes);
  const LinearMatrix out{g.out, 0, g.out_dtype};
  parallel_rows(vectors, 65536 / (kLanes * larger(1, g.rows)) + 1, g.threads,
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) {
                    const int64_t column = i * kLanes;
                    sum_columns(g, column, smaller(kLanes, g.columns - column), out);
                  }
                });
}

}  // namespace ic::IC_ISA
