// What the kernels on CPU have in common: vectors, threads, tiles of a matrix product.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float Vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t Int __attribute__((vector_size(4 * W), aligned(4)));

inline Vec Load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline void Store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }
inline Vec Fill(float x) { return Vec{} + x; }

// What f makes of a vector's n numbers: of its two halves, of the halves of that, ….
template <int n>
struct Folded {
  typedef float Half __attribute__((vector_size(2 * n)));
  template <typename X, typename F>
  static float Of(const X& x, const F& f) {
    Half low, high;
    std::memcpy(&low, &x, sizeof(Half));
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(Half), sizeof(Half));
    return Folded<n / 2>::Of(f(low, high), f);
  }
};
template <>
struct Folded<2> {
  template <typename X, typename F>
  static float Of(const X& x, const F& f) {
    return f(x[0], x[1]);
  }
};

inline float Sum(Vec x) {
  return Folded<W>::Of(x, [](auto a, auto b) { return a + b; });
}

constexpr float kHidden = -1e30f;  // score of a slot that is not seen

// exp(x) of x ≤ 0 to 2 units in the last place; 0 below −87.
inline Vec Exp(Vec x) {
  const Vec magic = Fill(12582912.0f);  // 1.5 · 2^23: rounds to an integer
  const Vec safe = x < -87.0f ? Fill(-87.0f) : x;
  const Vec n = (safe * 1.44269504088896341f + magic) - magic;
  const Vec r = (safe - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec y = Fill(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Int power = (__builtin_convertvector(n, Int) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < -87.0f ? Vec{} : y * scale;
}

// The greatest of n numbers, a multiple of W.
inline float Greatest(const float* x, int64_t n) {
  Vec top = Load(x);
  for (int64_t s = W; s < n; s += W) {
    const Vec y = Load(x + s);
    top = y > top ? y : top;
  }
  return Folded<W>::Of(top, [](auto a, auto b) { return a > b ? a : b; });
}

// x = exp(x − max x) of n scores, a multiple of W; their greatest, and the sum.
inline std::pair<float, float> Softmax(float* x, int64_t n) {
  const float most = Greatest(x, n);
  Vec sum{};
  for (int64_t s = 0; s < n; s += W) {
    const Vec y = Exp(Load(x + s) - most);
    Store(x + s, y);
    sum += y;
  }
  return {most, Sum(sum)};
}

constexpr int64_t kGrain = 1 << 17;  // multiply-adds that are worth a thread's waking
constexpr int kSpins = 1000;         // before a thread that waits lets others run

// As many threads of the pool as `cost`, in multiply-adds, is worth.
inline int64_t Threads(ffi::ThreadPool& pool, int64_t cost) {
  return std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), cost / kGrain));
}

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Tasks 0 to count − 1, of which none waits for another. Each is told which one the same
// thread will most likely do next; from `count` on: none.
struct Phase {
  int64_t count;
  std::function<void(int64_t, int64_t)> task;
};

// Runs phases, each when the one before it is done, on so many threads as `cost` is worth,
// this one among them. Waits for none that has not begun, so that it ends also where all
// other threads are taken.
inline void Parallel(ffi::ThreadPool& pool, int64_t cost, std::vector<Phase> phases) {
  int64_t most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.count);
  const int64_t helpers = std::min(Threads(pool, cost), most) - 1;
  if (helpers < 1) {
    for (const Phase& phase : phases) {
      for (int64_t i = 0; i < phase.count; ++i) phase.task(i, i + 1);
    }
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  struct Shared {
    std::vector<Phase> phases;
    std::vector<State> states;
  };
  auto shared = std::make_shared<Shared>();
  shared->states = std::vector<State>(phases.size());
  shared->phases = std::move(phases);
  auto work = [shared, threads = helpers + 1] {
    for (size_t p = 0; p < shared->phases.size(); ++p) {
      const Phase& phase = shared->phases[p];
      auto& [next, done] = shared->states[p];
      // A thread takes tasks that stand side by side, ever fewer. What they refer to lives
      // as long as some index is not done.
      for (int64_t first = next.load(); first < phase.count;) {
        const int64_t n = std::max<int64_t>(1, (phase.count - first) / (2 * threads));
        if (!next.compare_exchange_weak(first, first + n)) continue;
        for (int64_t i = first; i < first + n; ++i) {
          phase.task(i, i + 1 < first + n ? i + 1 : next.load());
        }
        done.fetch_add(n, std::memory_order_release);
        first = next.load();
      }
      for (int spins = 0; done.load(std::memory_order_acquire) < phase.count; ++spins) {
        spins < kSpins ? Pause() : std::this_thread::yield();
      }
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
}

template <typename Task>
void Parallel(ffi::ThreadPool& pool, int64_t count, int64_t cost, const Task& task) {
  Parallel(pool, cost, {{count, [&task](int64_t i, int64_t) { task(i); }}});
}

// A thread's memory, kept from call to call: new pages cost as much as what is done in
// them. What was asked for by the same number before is gone.
template <int number>
float* Kept(int64_t size) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr int kRows = W == 16 ? 12 : 6;  // of a tile of sums that registers hold
constexpr int kColumns = 2 * W;
constexpr int64_t kAhead = 32;  // rows of a panel that are asked for before their turn
constexpr int64_t kBlock = 8 * kRows;  // rows of activations that a task has

inline int64_t Blocks(int64_t M) { return (M + kBlock - 1) / kBlock; }

// 1 / (1 + exp(−x)).
inline Vec Sigmoid(Vec x) {
  const Vec e = Exp(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : Fill(1.0f)) / (e + 1.0f);
}

inline Vec Silu(Vec x) { return x * Sigmoid(x); }

// y = x / rms(x) · scale, of D numbers.
inline void Normalize(const float* x, const float* scale, int64_t D, float eps,
                      float* y) {
  Vec sum{};
  int64_t d = 0;
  for (; d + W <= D; d += W) sum += Load(x + d) * Load(x + d);
  float total = Sum(sum);
  for (; d < D; ++d) total += x[d] * x[d];
  const float by = 1.0f / std::sqrt(total / D + eps);
  for (d = 0; d + W <= D; d += W) Store(y + d, Load(x + d) * by * Load(scale + d));
  for (; d < D; ++d) y[d] = x[d] * by * scale[d];
}

// One head of H numbers, normalised if there is a scale, and rotated by H / 2 angles.
inline void RotateHead(const float* x, const float* scale, const float* sine,
                       const float* cosine, int64_t H, float eps, float* to) {
  const int64_t half = H / 2;
  if (scale) {
    float* normalized = Kept<20>(H);
    Normalize(x, scale, H, eps, normalized);
    x = normalized;
  }
  for (int64_t h = 0; h < half; ++h) {
    to[h] = x[h] * cosine[h] - x[half + h] * sine[h];
    to[half + h] = x[half + h] * cosine[h] + x[h] * sine[h];
  }
}

// What may be left out.
inline const float* OrNull(const Floats& x) {
  return x.element_count() ? x.typed_data() : nullptr;
}

// Where a tile's sums go: the first of `columns` of N in a row. Added to those of
// `plus`, if it is not null. is_gated: half of a panel is silu's, times the other half.
struct Place {
  float* c;
  const float* plus;
  int64_t N, columns;
  bool is_gated;

  // Of a whole tile, which nothing is added to or done with?
  bool IsPlain() const { return columns == kColumns && !plus && !is_gated; }

  void Put(int64_t i, Vec left, Vec right) const {
    float* to = c + i * N;
    const float* more = plus ? plus + i * N : nullptr;
    if (is_gated) left = Silu(left) * right;
    if (columns == (is_gated ? W : kColumns)) {
      Store(to, more ? Load(more) + left : left);
      if (!is_gated) Store(to + W, more ? Load(more + W) + right : right);
      return;
    }
    float some[kColumns];
    Store(some, left);
    Store(some + W, right);
    for (int64_t n = 0; n < columns; ++n) to[n] = more ? more[n] + some[n] : some[n];
  }
};

// C [M, kColumns] = A [M, D] · B [D, kColumns]. has_next: asks for as much of what is read
// next as B has; to ask at run time would cost 5 %.
template <int M, bool has_next>
void Tile(const float* a, int64_t stride, int64_t D, const float* b, const float* next,
          const Place& place) {
  Vec sum[M][2];  // zeroed one by one: all at once, they would begin in memory
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    sum[i][0] = sum[i][1] = Vec{};
    for (int line = 0; line < kColumns; line += 16) {
      __builtin_prefetch(place.c + i * place.N + line, 1);
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    for (int line = 0; line < kColumns; line += 16) {
      __builtin_prefetch(b + (d + kAhead) * kColumns + line);
      if (has_next) __builtin_prefetch(next + d * kColumns + line, 0, 2);
    }
    const Vec left = Load(b + d * kColumns), right = Load(b + d * kColumns + W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      sum[i][0] += left * a[i * stride + d];
      sum[i][1] += right * a[i * stride + d];
    }
  }
  if (place.IsPlain()) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      Store(place.c + i * place.N, sum[i][0]);
      Store(place.c + i * place.N + W, sum[i][1]);
    }
    return;
  }
  Vec all[M][2];  // else `sum` would live in memory
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) all[i][0] = sum[i][0], all[i][1] = sum[i][1];
  for (int i = 0; i < M; ++i) place.Put(i, all[i][0], all[i][1]);
}

using TileOf = void (*)(const float*, int64_t, int64_t, const float*, const float*,
                        const Place&);
template <bool has_next, int... M>
constexpr std::array<TileOf, sizeof...(M)> TilesOf(std::integer_sequence<int, M...>) {
  return {Tile<M + 1, has_next>...};
}
template <bool has_next>  // of 1, …, kRows rows
constexpr auto kTiles = TilesOf<has_next>(std::make_integer_sequence<int, kRows>());

// The same of any number of rows, which stand `stride` apart. next: the panel that will be
// read after this one, or null.
inline void TimesPanel(const float* a, int64_t stride, int64_t M, int64_t D,
                       const float* b, Place place, const float* next = nullptr) {
  const int64_t tiles = (M + kRows - 1) / kRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = M / tiles + (tile < M % tiles);  // as even as can be
    const auto& of_rows = next && tile == 1 ? kTiles<true> : kTiles<false>;
    of_rows[m - 1](a, stride, D, b, next, place);
    a += m * stride;
    place.c += m * place.N;
    if (place.plus) place.plus += m * place.N;
  }
}

}  // namespace
