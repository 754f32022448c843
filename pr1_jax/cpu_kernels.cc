// Kernels of a decode step on CPU, float32; see cpu_kernels.py.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
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

constexpr int64_t kGrain = 1 << 17;  // multiply-adds that are worth a thread's waking

// Runs task(0), …, task(count − 1) on the threads of the pool and this one, on as many
// as `cost`, in multiply-adds, is worth. Waits for none that has not begun, so that it
// ends also where all other threads are taken.
template <typename Task>
void Parallel(ffi::ThreadPool& pool, int64_t count, int64_t cost, const Task& task) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), cost / kGrain);
  const int64_t helpers = std::min(threads, count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &task] {
    // `task` lives as long as some index is not done.
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      task(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (shared->done.load(std::memory_order_acquire) < count) {
    std::this_thread::yield();
  }
}

// out[i, s] = q[i] · keys[:, s] for s < n; also writes what is up to W past them.
template <int Q, int V>
void Scores(const float* q, int64_t H, const float* keys, int64_t S, int64_t n,
            float* out, int64_t stride) {
  int64_t s = 0;
  for (; s + V * W <= S && s < n; s += V * W) {
    Vec sum[Q][V] = {};
    for (int64_t h = 0; h < H; ++h) {
      for (int v = 0; v < V; ++v) {
        const Vec key = Load(keys + h * S + s + v * W);
        for (int i = 0; i < Q; ++i) sum[i][v] += key * q[i * H + h];
      }
    }
    for (int i = 0; i < Q; ++i) {
      for (int v = 0; v < V; ++v) Store(out + i * stride + s + v * W, sum[i][v]);
    }
  }
  for (; s + W <= S && s < n; s += W) {
    Vec sum[Q] = {};
    for (int64_t h = 0; h < H; ++h) {
      const Vec key = Load(keys + h * S + s);
      for (int i = 0; i < Q; ++i) sum[i] += key * q[i * H + h];
    }
    for (int i = 0; i < Q; ++i) Store(out + i * stride + s, sum[i]);
  }
  for (; s < n; ++s) {
    for (int i = 0; i < Q; ++i) {
      float sum = 0;
      for (int64_t h = 0; h < H; ++h) sum += keys[h * S + s] * q[i * H + h];
      out[i * stride + s] = sum;
    }
  }
}

// out[i, h] += sum over s < n of probs[i, s] · values[s, h], for h from `first` on; how
// far it came.
template <int Q, int V>
int64_t Weigh(const float* probs, int64_t stride, const float* values, int64_t H,
              int64_t n, float* out, int64_t first) {
  int64_t h = first;
  for (; h + V * W <= H; h += V * W) {
    Vec sum[Q][V];
    for (int i = 0; i < Q; ++i) {
      for (int v = 0; v < V; ++v) sum[i][v] = Load(out + i * H + h + v * W);
    }
    for (int64_t s = 0; s < n; ++s) {
      for (int v = 0; v < V; ++v) {
        const Vec value = Load(values + s * H + h + v * W);
        for (int i = 0; i < Q; ++i) sum[i][v] += value * probs[i * stride + s];
      }
    }
    for (int i = 0; i < Q; ++i) {
      for (int v = 0; v < V; ++v) Store(out + i * H + h + v * W, sum[i][v]);
    }
  }
  return h;
}

// Keys [H, S] and values [S, H] of one head, of which the first n are seen.
struct Slots {
  const float* keys;
  const float* values;
  int64_t S, n;
};

template <int Q>
void ScoresOf(const float* q, int64_t H, const Slots& x, float* out, int64_t stride) {
  Scores<Q, Q == 3 ? 3 : Q == 4 ? 2 : 4>(q, H, x.keys, x.S, x.n, out, stride);
}

template <int Q>
void WeighOf(const float* probs, int64_t stride, const Slots& x, int64_t H,
             float* out) {
  int64_t h = Weigh<Q, Q <= 2 ? 4 : 2>(probs, stride, x.values, H, x.n, out, 0);
  h = Weigh<Q, 2>(probs, stride, x.values, H, x.n, out, h);
  h = Weigh<Q, 1>(probs, stride, x.values, H, x.n, out, h);
  for (; h < H; ++h) {
    for (int i = 0; i < Q; ++i) {
      for (int64_t s = 0; s < x.n; ++s) {
        out[i * H + h] += x.values[s * H + h] * probs[i * stride + s];
      }
    }
  }
}

// Calls f with 4, 3, 2 or 1 as constant and the place of the first, until `count` are
// done.
template <typename F>
void ByFour(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) f(std::integral_constant<int, 4>(), i);
  if (count - i == 3) f(std::integral_constant<int, 3>(), i);
  if (count - i == 2) f(std::integral_constant<int, 2>(), i);
  if (count - i == 1) f(std::integral_constant<int, 1>(), i);
}

// probs = exp(x − max x) of n scores, a multiple of W; their sum.
float Softmax(float* x, int64_t n) {
  Vec top = Load(x);
  for (int64_t s = W; s < n; s += W) {
    const Vec y = Load(x + s);
    top = y > top ? y : top;
  }
  float most = top[0];
  for (int i = 1; i < W; ++i) most = std::max(most, top[i]);
  Vec sum{};
  for (int64_t s = 0; s < n; s += W) {
    const Vec y = Exp(Load(x + s) - most);
    Store(x + s, y);
    sum += y;
  }
  float total = 0;
  for (int i = 0; i < W; ++i) total += sum[i];
  return total;
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// Attention of live lanes; names and shapes as in cpu_kernels.attend.
ffi::Error Attend(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats keys,
                  Floats values, Floats prompt_keys, Floats prompt_values, Ints row,
                  Ints slot, Ints block, Ints path, Ints filled, Ints slot_block,
                  Ints slot_path, Ints prompt, Ints prompt_length,
                  ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> new_keys,
                  ffi::ResultBuffer<ffi::F32> new_values) {
  const int64_t L = q.dimensions()[0], N = q.dimensions()[1], H = q.dimensions()[2];
  const int64_t B = keys.dimensions()[0], K = keys.dimensions()[1], R = N / K;
  const int64_t S = keys.dimensions()[3], T = prompt_keys.dimensions()[3];
  float* own_keys = new_keys->typed_data();
  float* own_values = new_values->typed_data();
  if (own_keys != keys.typed_data()) {
    std::memcpy(own_keys, keys.typed_data(), keys.size_bytes());
  }
  if (own_values != values.typed_data()) {
    std::memcpy(own_values, values.typed_data(), values.size_bytes());
  }
  const int32_t* rows = row.typed_data();
  std::memset(out->typed_data(), 0, out->size_bytes());
  std::vector<std::pair<int64_t, int64_t>> runs;  // lanes of a row stand side by side
  for (int64_t i = 0; i < L; ++i) {
    if (rows[i] >= B) continue;
    if (runs.empty() || runs.back().second != i || rows[i - 1] != rows[i]) {
      runs.emplace_back(i, i);
    }
    runs.back().second = i + 1;
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  const int64_t stride = T + S + 2 * W;
  int64_t slots = 0;  // that lanes attend to, all told
  for (const auto [first, last] : runs) {
    const int64_t b = rows[first], m = prompt.typed_data()[b];
    slots += (last - first) * (prompt_length.typed_data()[m] + filled.typed_data()[b]);
  }

  Parallel(pool, runs.size() * K, 2 * slots * N * H, [&](int64_t task) {
    thread_local std::vector<float> scratch;
    // A head of all rows before the next one: rows that share a prompt stand together.
    const int64_t head = task / runs.size();
    const auto [first, last] = runs[task % runs.size()];
    const int64_t b = rows[first], Q = (last - first) * R;
    const int64_t own = (b * K + head) * H * S;
    for (int64_t i = first; i < last; ++i) {
      const int64_t s = slot.typed_data()[i];
      if (s < 0 || s >= S) continue;
      const float* key = k.typed_data() + (i * K + head) * H;
      const float* value = v.typed_data() + (i * K + head) * H;
      for (int64_t h = 0; h < H; ++h) own_keys[own + h * S + s] = key[h];
      std::memcpy(own_values + own + s * H, value, 4 * H);
    }
    const int64_t shared =
        (static_cast<int64_t>(prompt.typed_data()[b]) * K + head) * H * T;
    const Slots before{prompt_keys.typed_data() + shared,
                       prompt_values.typed_data() + shared, T,
                       prompt_length.typed_data()[prompt.typed_data()[b]]};
    const Slots after{own_keys + own, own_values + own, S, filled.typed_data()[b]};
    const int64_t middle = (before.n + W - 1) / W * W;
    const int64_t width = middle + (after.n + W - 1) / W * W;

    scratch.resize(Q * (stride + H + 1));
    float* scores = scratch.data();
    float* queries = scores + Q * stride;
    float* total = queries + Q * H;
    for (int64_t i = 0; i < Q; ++i) {
      const float* from =
          q.typed_data() + ((first + i / R) * N + head * R + i % R) * H;
      for (int64_t h = 0; h < H; ++h) queries[i * H + h] = from[h] * scale;
    }
    ByFour(Q, [&](auto four, int64_t i) {
      float* x = scores + i * stride;
      ScoresOf<four>(queries + i * H, H, before, x, stride);
      ScoresOf<four>(queries + i * H, H, after, x + middle, stride);
    });
    for (int64_t i = 0; i < Q; ++i) {
      float* x = scores + i * stride;
      std::fill(x + before.n, x + middle, kHidden);
      std::fill(x + middle + after.n, x + width, kHidden);
      const int32_t lane_block = block.typed_data()[first + i / R];
      const int32_t lane_path = path.typed_data()[first + i / R];
      if (lane_path) {
        const int32_t* blocks = slot_block.typed_data() + b * S;
        const int32_t* paths = slot_path.typed_data() + b * S;
        for (int64_t s = 0; s < after.n; ++s) {
          const bool seen = blocks[s] != lane_block || paths[s] == lane_path;
          x[middle + s] = seen ? x[middle + s] : kHidden;
        }
      }
      total[i] = Softmax(x, width);
    }
    std::fill(queries, queries + Q * H, 0.0f);  // outputs take their place
    ByFour(Q, [&](auto four, int64_t i) {
      const float* x = scores + i * stride;
      WeighOf<four>(x, stride, before, H, queries + i * H);
      WeighOf<four>(x + middle, stride, after, H, queries + i * H);
    });
    for (int64_t i = 0; i < Q; ++i) {
      float* to = out->typed_data() + ((first + i / R) * N + head * R + i % R) * H;
      for (int64_t h = 0; h < H; ++h) to[h] = queries[i * H + h] / total[i];
    }
  });
  return ffi::Error::Success();
}

constexpr int kRows = W == 16 ? 12 : 6;  // of a tile of sums that registers hold
constexpr int kColumns = 2 * W;
constexpr int64_t kAhead = 32;  // rows of a panel that are asked for before their turn

// C [M, kColumns] = A [M, D] · B [D, kColumns]. is_first: B comes from memory.
template <int M, bool is_first>
void Tile(const float* a, int64_t D, const float* b, float* c, int64_t N,
          int64_t columns) {
  Vec sum[M][2] = {};
  for (int64_t d = 0; d < D; ++d) {
    if (is_first) __builtin_prefetch(b + (d + kAhead) * kColumns);
    const Vec left = Load(b + d * kColumns), right = Load(b + d * kColumns + W);
    for (int i = 0; i < M; ++i) {
      sum[i][0] += left * a[i * D + d];
      sum[i][1] += right * a[i * D + d];
    }
  }
  for (int i = 0; i < M; ++i) {
    if (columns == kColumns) {
      Store(c + i * N, sum[i][0]);
      Store(c + i * N + W, sum[i][1]);
    } else {
      float some[kColumns];
      Store(some, sum[i][0]);
      Store(some + W, sum[i][1]);
      std::memcpy(c + i * N, some, 4 * columns);
    }
  }
}

using TileOf = void (*)(const float*, int64_t, const float*, float*, int64_t, int64_t);
template <bool is_first, int... M>
constexpr std::array<TileOf, sizeof...(M)> TilesOf(std::integer_sequence<int, M...>) {
  return {Tile<M + 1, is_first>...};
}
template <bool is_first>  // of 1, …, kRows rows
constexpr auto kTiles = TilesOf<is_first>(std::make_integer_sequence<int, kRows>());

// x [M, D] times packed [ceil(N / kColumns), D, kColumns] → [M, N].
ffi::Error Project(ffi::ThreadPool pool, Floats x, Floats packed,
                   ffi::ResultBuffer<ffi::F32> out) {
  const int64_t M = x.dimensions()[0], D = x.dimensions()[1];
  const int64_t N = out->dimensions()[1], panels = packed.dimensions()[0];
  if (packed.dimensions()[2] != kColumns) {
    return ffi::Error::InvalidArgument("packed for another processor");
  }
  const float* a = x.typed_data();
  const int64_t tiles = (M + kRows - 1) / kRows;
  Parallel(pool, panels, M * D * N, [&](int64_t panel) {
    const float* b = packed.typed_data() + panel * D * kColumns;
    float* c = out->typed_data() + panel * kColumns;
    const int64_t columns = std::min<int64_t>(kColumns, N - panel * kColumns);
    for (int64_t tile = 0, i = 0; tile < tiles; ++tile) {
      const int64_t m = M / tiles + (tile < M % tiles);  // as even as can be
      (tile ? kTiles<false> : kTiles<true>)[m - 1](a + i * D, D, b, c + i * N, N, columns);
      i += m;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" int Columns() { return kColumns; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AttendHandler, Attend,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // q, k, v
        .Arg<Floats>().Arg<Floats>()  // keys, values
        .Arg<Floats>().Arg<Floats>()  // prompt_keys, prompt_values
        .Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>()  // row, slot, block, path
        .Arg<Ints>().Arg<Ints>().Arg<Ints>()  // filled, slot_block, slot_path
        .Arg<Ints>().Arg<Ints>()  // prompt, prompt_length
        .Ret<Floats>().Ret<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ProjectHandler, Project,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>());
