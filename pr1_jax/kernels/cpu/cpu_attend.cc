// Attention of a decode step on CPU, float32; see decoding.py.

#include "cpu_kernels.h"

namespace {

constexpr int64_t kSlots = 16;  // whose keys stand together: [S / kSlots, H, kSlots]

// Where key h of slot s is, of one head.
inline int64_t KeyAt(int64_t s, int64_t h, int64_t H) {
  return s / kSlots * kSlots * H + h * kSlots + s % kSlots;
}

// Asks for numbers x to x + n, which will be read soon.
template <int n>
void Ask(const float* x) {
  for (int i = 0; i < n; i += 16) __builtin_prefetch(x + i, 0, 2);
}

// Keeps x in a register: GCC would read it again for each product that it is in.
inline void Hold(Vec& x) {
#ifdef __AVX__
  asm("" : "+v"(x));
#endif
}

// out[i, s] = q[i] · keys[s] for s from `first` to n, and up to kSlots past it, V vectors
// of them at once; how far it came. On its way asks for as many of the keys that come next.
template <int Q, int V>
int64_t Scores(const float* q, int64_t H, const float* keys, const float* next, int64_t n,
               float* out, int64_t stride, int64_t first) {
  int64_t s = first;
  for (; s + V * W <= (n + kSlots - 1) / kSlots * kSlots; s += V * W) {
    Vec sum[Q][V] = {};
    int64_t at[V];
    for (int v = 0; v < V; ++v) at[v] = KeyAt(s + v * W, 0, H);
    for (int64_t h = 0; h < H; ++h) {
      Vec key[V];
      for (int v = 0; v < V; ++v) {
        Ask<W>(next + at[v] + h * kSlots);
        Hold(key[v] = Load(keys + at[v] + h * kSlots));
      }
      for (int i = 0; i < Q; ++i) {
        for (int v = 0; v < V; ++v) sum[i][v] += key[v] * q[i * H + h];
      }
    }
    for (int i = 0; i < Q; ++i) {
      for (int v = 0; v < V; ++v) Store(out + i * stride + s + v * W, sum[i][v]);
    }
  }
  return s;
}

// out[i, h] += sum over s < n of probs[i, s] · values[s, h], for h from `first` on; how
// far it came. On its way asks for as many of the values that come next.
template <int Q, int V>
int64_t Weigh(const float* probs, int64_t stride, const float* values, const float* next,
              int64_t H, int64_t n, float* out, int64_t first) {
  int64_t h = first;
  for (; h + V * W <= H; h += V * W) {
    Vec sum[Q][V];
    for (int i = 0; i < Q; ++i) {
      for (int v = 0; v < V; ++v) sum[i][v] = Load(out + i * H + h + v * W);
    }
    for (int64_t s = 0; s < n; ++s) {
      Ask<V * W>(next + s * H + h);
      Vec value[V];
      for (int v = 0; v < V; ++v) Hold(value[v] = Load(values + s * H + h + v * W));
      for (int i = 0; i < Q; ++i) {
        for (int v = 0; v < V; ++v) sum[i][v] += value[v] * probs[i * stride + s];
      }
    }
    for (int i = 0; i < Q; ++i) {
      for (int v = 0; v < V; ++v) Store(out + i * H + h + v * W, sum[i][v]);
    }
  }
  return h;
}

// Keys and values [S, H] of one head, of which the first n are seen.
struct Slots {
  const float* keys;
  const float* values;
  int64_t n;
};

template <int Q>
void ScoresOf(const float* q, int64_t H, const Slots& x, const Slots& next, float* out,
              int64_t stride) {
  constexpr int V = W == 16 || Q < 3 ? 4 : Q == 3 ? 3 : 2;
  int64_t s = Scores<Q, V>(q, H, x.keys, next.keys, x.n, out, stride, 0);
  s = Scores<Q, 2>(q, H, x.keys, next.keys, x.n, out, stride, s);
  Scores<Q, 1>(q, H, x.keys, next.keys, x.n, out, stride, s);
}

template <int Q>
void WeighOf(const float* probs, int64_t stride, const Slots& x, const Slots& next,
             int64_t H, float* out) {
  constexpr int V = W == 16 || Q <= 2 ? 4 : 2;
  int64_t h = Weigh<Q, V>(probs, stride, x.values, next.values, H, x.n, out, 0);
  h = Weigh<Q, 2>(probs, stride, x.values, next.values, H, x.n, out, h);
  h = Weigh<Q, 1>(probs, stride, x.values, next.values, H, x.n, out, h);
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

// Attention of live lanes; names and shapes as in decoding.attend.
ffi::Error Attend(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats keys,
                  Floats values, Floats prompt_keys, Floats prompt_values, Ints row,
                  Ints slot, Ints block, Ints path, Ints filled, Ints slot_block,
                  Ints slot_path, Ints prompt, Ints prompt_length,
                  ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> new_keys,
                  ffi::ResultBuffer<ffi::F32> new_values) {
  const int64_t L = q.dimensions()[0], N = q.dimensions()[1], H = q.dimensions()[2];
  const int64_t B = keys.dimensions()[0], K = keys.dimensions()[1], R = N / K;
  const int64_t S = values.dimensions()[2], T = prompt_values.dimensions()[2];
  auto are_packed = [H](const Floats& keys, const Floats& values) {
    const auto x = keys.dimensions();
    return x.size() == 5 && x[3] == H && x[4] == kSlots &&
           x[2] * kSlots >= values.dimensions()[2];
  };
  if (!are_packed(keys, values) || !are_packed(prompt_keys, prompt_values)) {
    return ffi::Error::InvalidArgument("keys are not packed, or fewer than values");
  }
  // Of one head: numbers of its keys, in a row's cache and in a prompt's.
  const int64_t own_size = keys.dimensions()[2] * kSlots * H;
  const int64_t prompt_size = prompt_keys.dimensions()[2] * kSlots * H;
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
  const int64_t stride = T + S + 2 * kSlots;
  int64_t slots = 0;  // that lanes attend to, all told
  for (const auto& [first, last] : runs) {
    const int64_t b = rows[first], m = prompt.typed_data()[b];
    slots += (last - first) * (prompt_length.typed_data()[m] + filled.typed_data()[b]);
  }

  // A head of all rows before the next one: rows that share a prompt stand together.
  const int64_t tasks = runs.size() * K, cost = 2 * slots * N * H;
  auto lanes_of = [&](int64_t task) { return runs[task % runs.size()]; };
  auto slots_of = [&](int64_t task) {
    const int64_t b = rows[lanes_of(task).first], head = task / runs.size();
    const int64_t m = prompt.typed_data()[b], own = b * K + head, shared = m * K + head;
    return std::pair{Slots{prompt_keys.typed_data() + shared * prompt_size,
                           prompt_values.typed_data() + shared * T * H,
                           prompt_length.typed_data()[m]},
                     Slots{own_keys + own * own_size, own_values + own * S * H,
                           filled.typed_data()[b]}};
  };
  auto attend = [&](int64_t task, int64_t next) {
    const int64_t head = task / runs.size();
    const auto [first, last] = lanes_of(task);
    const int64_t b = rows[first], Q = (last - first) * R;
    const int64_t own = b * K + head;
    for (int64_t i = first; i < last; ++i) {
      const int64_t s = slot.typed_data()[i];
      if (s < 0 || s >= S) continue;
      const float* key = k.typed_data() + (i * K + head) * H;
      const float* value = v.typed_data() + (i * K + head) * H;
      float* to = own_keys + own * own_size;
      for (int64_t h = 0; h < H; ++h) to[KeyAt(s, h, H)] = key[h];
      std::memcpy(own_values + (own * S + s) * H, value, 4 * H);
    }
    const auto [before, after] = slots_of(task);
    const auto [next_before, next_after] = slots_of(next < tasks ? next : task);
    const int64_t middle = (before.n + kSlots - 1) / kSlots * kSlots;
    const int64_t width = middle + (after.n + kSlots - 1) / kSlots * kSlots;

    float* scores = Kept<24>(Q * (stride + H + 1));
    float* queries = scores + Q * stride;
    float* total = queries + Q * H;
    for (int64_t i = 0; i < Q; ++i) {
      const float* from =
          q.typed_data() + ((first + i / R) * N + head * R + i % R) * H;
      for (int64_t h = 0; h < H; ++h) queries[i * H + h] = from[h] * scale;
    }
    ByFour(Q, [&](auto four, int64_t i) {
      float* x = scores + i * stride;
      ScoresOf<four>(queries + i * H, H, before, next_before, x, stride);
      ScoresOf<four>(queries + i * H, H, after, next_after, x + middle, stride);
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
      total[i] = Softmax(x, width).second;
    }
    std::fill(queries, queries + Q * H, 0.0f);  // outputs take their place
    ByFour(Q, [&](auto four, int64_t i) {
      const float* x = scores + i * stride;
      WeighOf<four>(x, stride, before, next_before, H, queries + i * H);
      WeighOf<four>(x + middle, stride, after, next_after, H, queries + i * H);
    });
    for (int64_t i = 0; i < Q; ++i) {
      float* to = out->typed_data() + ((first + i / R) * N + head * R + i % R) * H;
      for (int64_t h = 0; h < H; ++h) to[h] = queries[i * H + h] / total[i];
    }
  };
  Parallel(pool, cost, {{tasks, attend}});
  return ffi::Error::Success();
}

}  // namespace

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
