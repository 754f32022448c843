// What the kernels of training on CPU have in common: memory, panels, Aᵀ · B.

#pragma once

#include "cpu_kernels.h"

namespace {

using Out = ffi::ResultBuffer<ffi::F32>;

constexpr int kTransposed = W == 16 ? 8 : 6;  // rows of a tile of Aᵀ · B
constexpr int64_t kDepth = 2048;              // summed before a tile is put back
constexpr int64_t kRowsAhead = 16;            // of A that are asked for before their turn
constexpr int64_t kGradientRows = 256;  // of a task's part of a weight's gradient

inline int64_t Padded(int64_t N) { return (N + kColumns - 1) / kColumns * kColumns; }

// A panel of B [D, N]: columns n to n + kColumns, zeros behind the last. B's rows, or
// with is_transposed its columns, stand `stride` apart.
inline void PackPanel(const float* b, int64_t stride, int64_t D, int64_t N,
                      bool is_transposed, int64_t n, float* to) {
  const int64_t columns = std::min<int64_t>(kColumns, N - n);
  if (columns < kColumns) std::fill(to, to + D * kColumns, 0.0f);
  for (int64_t d = 0; d < D; ++d) {
    float* row = to + d * kColumns;
    if (is_transposed) {
      for (int64_t i = 0; i < columns; ++i) row[i] = b[(n + i) * stride + d];
    } else if (columns == kColumns) {
      Store(row, Load(b + d * stride + n));
      Store(row + W, Load(b + d * stride + n + W));
    } else {
      std::memcpy(row, b + d * stride + n, 4 * columns);
    }
  }
}

// C [I, columns] = A [T, I]ᵀ · B [T, kColumns]; is_more: added to what is there.
template <int I>
void TransposedTile(const float* a, int64_t stride, const float* b, int64_t T, float* c,
                    int64_t N, int64_t columns, bool is_more) {
  Vec sum[I][2];  // as in `Tile`
  for (int i = 0; i < I; ++i) sum[i][0] = sum[i][1] = Vec{};
  for (int64_t t = 0; t < T; ++t) {
    __builtin_prefetch(a + (t + kRowsAhead) * stride);
    const Vec left = Load(b + t * kColumns), right = Load(b + t * kColumns + W);
    for (int i = 0; i < I; ++i) {
      sum[i][0] += left * a[t * stride + i];
      sum[i][1] += right * a[t * stride + i];
    }
  }
  for (int i = 0; i < I; ++i) {
    float* to = c + i * N;
    Place{to, is_more ? to : nullptr, N, columns, false}.Put(0, sum[i][0], sum[i][1]);
  }
}

using TransposedTileOf = void (*)(const float*, int64_t, const float*, int64_t, float*,
                                  int64_t, int64_t, bool);
template <int... I>
constexpr std::array<TransposedTileOf, sizeof...(I)> TransposedTilesOf(
    std::integer_sequence<int, I...>) {
  return {TransposedTile<I + 1>...};
}
constexpr auto kTransposedTiles =
    TransposedTilesOf(std::make_integer_sequence<int, kTransposed>());

// C [I, J] = A [T, I]ᵀ · B [T, J], each with the distance of its rows; is_more: added to
// what is there.
inline void TransposedTimes(const float* a, int64_t a_stride, const float* b,
                            int64_t b_stride, int64_t T, int64_t I, int64_t J, float* c,
                            int64_t N, bool is_more) {
  float* some = Kept<0>(kDepth * kColumns);
  for (int64_t j = 0; j < J; j += kColumns) {
    for (int64_t t = 0; t == 0 || t < T; t += kDepth) {  // zeros, if there are no rows
      const int64_t depth = std::min(kDepth, T - t);
      PackPanel(b + t * b_stride, b_stride, depth, J, false, j, some);
      for (int64_t i = 0; i < I; i += kTransposed) {
        kTransposedTiles[std::min<int64_t>(kTransposed, I - i) - 1](
            a + t * a_stride + i, a_stride, some, depth, c + i * N + j, N,
            std::min<int64_t>(kColumns, J - j), is_more || t > 0);
      }
    }
  }
}

// All panels of B [D, N], one after another; B is whole in memory.
template <int number>
const float* Pack(ffi::ThreadPool& pool, const float* b, int64_t D, int64_t N,
                  bool is_transposed) {
  float* to = Kept<number>(D * Padded(N));
  Parallel(pool, Padded(N) / kColumns, D * N, [&](int64_t panel) {
    const int64_t n = panel * kColumns;
    PackPanel(b, is_transposed ? D : N, D, N, is_transposed, n, to + n * D);
  });
  return to;
}

// A weight's gradient: c = a [M, I]ᵀ · b [M, J], as [I, J] or, if it is flipped, [J, I].
// a is best the one with shorter rows.
struct Gradient {
  const float* a;
  int64_t I;
  const float* b;
  int64_t J;
  float* c;
  bool is_flipped = false;
};

inline void Gradients(ffi::ThreadPool& pool, int64_t M, const std::vector<Gradient>& all) {
  struct Part {
    const Gradient* of;
    int64_t i, j;
  };
  std::vector<Part> parts;
  int64_t cost = 0;
  for (const Gradient& g : all) {
    cost += M * g.I * g.J;
    for (int64_t j = 0; j < g.J; j += kColumns) {
      for (int64_t i = 0; i < g.I; i += kGradientRows) parts.push_back({&g, i, j});
    }
  }
  Parallel(pool, parts.size(), cost, [&](int64_t task) {
    const auto [g, i, j] = parts[task];
    const int64_t rows = std::min(kGradientRows, g->I - i);
    const int64_t columns = std::min<int64_t>(kColumns, g->J - j);
    float* some = Kept<13>(kGradientRows * kColumns);
    float* c = g->is_flipped ? some : g->c + i * g->J + j;
    TransposedTimes(g->a + i, g->I, g->b + j, g->J, M, rows, columns, c,
                    g->is_flipped ? kColumns : g->J, false);
    if (!g->is_flipped) return;
    for (int64_t column = 0; column < columns; ++column) {
      float* to = g->c + (j + column) * g->I + i;
      for (int64_t row = 0; row < rows; ++row) to[row] = some[row * kColumns + column];
    }
  });
}

}  // namespace
