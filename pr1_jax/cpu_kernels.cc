// Kernels of a decode step on CPU, float32; see cpu_kernels.py.

#include "cpu_kernels.h"

namespace {

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

// Asks for the first n of S numbers in each of some rows.
inline void Ask(const float* x, int64_t num_rows, int64_t S, int64_t n) {
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t s = 0; s < n; s += 16) __builtin_prefetch(x + row * S + s, 0, 2);
  }
}

// Keys [H, S] and values [S, H] of one head, of which the first n are seen.
struct Slots {
  const float* keys;
  const float* values;
  int64_t S, n;

  void AskKeys(int64_t H) const { Ask(keys, H, S, n); }
  void AskValues(int64_t H) const { Ask(values, 1, 0, n * H); }
};

template <int Q>
void ScoresOf(const float* q, int64_t H, const Slots& x, float* out, int64_t stride) {
  Scores<Q, W == 16 || Q < 3 ? 4 : Q == 3 ? 3 : 2>(q, H, x.keys, x.S, x.n, out, stride);
}

template <int Q>
void WeighOf(const float* probs, int64_t stride, const Slots& x, int64_t H,
             float* out) {
  int64_t h = Weigh<Q, W == 16 || Q <= 2 ? 4 : 2>(probs, stride, x.values, H, x.n, out, 0);
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
  for (const auto& [first, last] : runs) {
    const int64_t b = rows[first], m = prompt.typed_data()[b];
    slots += (last - first) * (prompt_length.typed_data()[m] + filled.typed_data()[b]);
  }

  // A head of all rows before the next one: rows that share a prompt stand together.
  const int64_t tasks = runs.size() * K, cost = 2 * slots * N * H;
  auto lanes_of = [&](int64_t task) { return runs[task % runs.size()]; };
  auto slots_of = [&](int64_t task) {
    const int64_t b = rows[lanes_of(task).first], head = task / runs.size();
    const int64_t own = (b * K + head) * H * S, m = prompt.typed_data()[b];
    const int64_t shared = (m * K + head) * H * T;
    return std::pair{Slots{prompt_keys.typed_data() + shared,
                           prompt_values.typed_data() + shared, T,
                           prompt_length.typed_data()[m]},
                     Slots{own_keys + own, own_values + own, S, filled.typed_data()[b]}};
  };
  const int64_t threads = Threads(pool, cost);
  Parallel(pool, tasks, cost, [&](int64_t task) {
    thread_local std::vector<float> scratch;
    const int64_t head = task / runs.size();
    const auto [first, last] = lanes_of(task);
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
    const auto [before, after] = slots_of(task);
    before.AskValues(H);
    after.AskValues(H);
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
      total[i] = Softmax(x, width).second;
    }
    if (task + threads < tasks) {  // most likely this thread's next
      const auto [next_before, next_after] = slots_of(task + threads);
      next_before.AskKeys(H);
      next_after.AskKeys(H);
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

// How many of M rows are wanted, the first ones: all, if nothing is said.
int64_t Live(const Ints& live, int64_t M) {
  return live.element_count() ? std::clamp<int64_t>(live.typed_data()[0], 0, M) : M;
}

// x [M, D], normalised if there is a scale, times packed [panels, D, kColumns], plus
// what there is to add → [M, N]. Rows that are not live are left as they were.
ffi::Error Project(ffi::ThreadPool pool, Floats x, Floats packed, Floats scale,
                   Floats plus, Ints live, ffi::ResultBuffer<ffi::F32> out, float eps,
                   bool is_gated) {
  const int64_t M = Live(live, x.dimensions()[0]), D = x.dimensions()[1];
  const int64_t N = out->dimensions()[1], panels = packed.dimensions()[0];
  if (packed.dimensions()[2] != kColumns) {
    return ffi::Error::InvalidArgument("packed for another processor");
  }
  const float* a = x.typed_data();
  std::vector<float> normalized;
  if (scale.element_count()) {
    normalized.resize(M * D);
    constexpr int64_t kSome = 64;  // rows
    Parallel(pool, (M + kSome - 1) / kSome, M * D, [&](int64_t task) {
      for (int64_t i = task * kSome; i < std::min(M, (task + 1) * kSome); ++i) {
        Normalize(a + i * D, scale.typed_data(), D, eps, normalized.data() + i * D);
      }
    });
    a = normalized.data();
  }
  const float* more = plus.element_count() ? plus.typed_data() : nullptr;
  const int64_t width = is_gated ? W : kColumns;
  const int64_t cost = M * D * kColumns * panels, threads = Threads(pool, cost);
  Parallel(pool, panels, cost, [&](int64_t panel) {
    const int64_t n = panel * width;
    const int64_t next = panel + threads;  // most likely this thread's
    const float* all = packed.typed_data();
    TimesPanel(a, D, M, D, all + panel * D * kColumns,
               {out->typed_data() + n, more ? more + n : nullptr, N,
                std::min(width, N - n), is_gated},
               next < panels ? all + next * D * kColumns : nullptr);
  });
  return ffi::Error::Success();
}

// qkv [M, K, R + 2, H] → q [M, K · R, H], k and v [M, K, H]; q and k normalised, where
// there is a scale, and rotated by angles [M, H / 2]. Of live rows.
ffi::Error Split(ffi::ThreadPool pool, Floats qkv, Floats q_scale, Floats k_scale,
                 Floats sines, Floats cosines, Ints live,
                 ffi::ResultBuffer<ffi::F32> q, ffi::ResultBuffer<ffi::F32> k,
                 ffi::ResultBuffer<ffi::F32> v, float eps) {
  const int64_t M = Live(live, qkv.dimensions()[0]), K = qkv.dimensions()[1];
  const int64_t R = qkv.dimensions()[2] - 2, H = qkv.dimensions()[3], half = H / 2;
  constexpr int64_t kSome = 16;  // rows
  Parallel(pool, (M + kSome - 1) / kSome, 4 * M * K * (R + 2) * H, [&](int64_t task) {
    thread_local std::vector<float> head;
    head.resize(H);
    auto rotate = [&](const float* x, const Floats& scale, int64_t i, float* to) {
      if (scale.element_count()) {
        Normalize(x, scale.typed_data(), H, eps, head.data());
        x = head.data();
      }
      const float* sine = sines.typed_data() + i * half;
      const float* cosine = cosines.typed_data() + i * half;
      for (int64_t h = 0; h < half; ++h) {
        to[h] = x[h] * cosine[h] - x[half + h] * sine[h];
        to[half + h] = x[half + h] * cosine[h] + x[h] * sine[h];
      }
    };
    for (int64_t i = task * kSome; i < std::min(M, (task + 1) * kSome); ++i) {
      for (int64_t j = i * K; j < (i + 1) * K; ++j) {
        const float* from = qkv.typed_data() + j * (R + 2) * H;
        for (int64_t r = 0; r < R; ++r) {
          rotate(from + r * H, q_scale, i, q->typed_data() + (j * R + r) * H);
        }
        rotate(from + R * H, k_scale, i, k->typed_data() + j * H);
        std::memcpy(v->typed_data() + j * H, from + (R + 1) * H, 4 * H);
      }
    }
  });
  return ffi::Error::Success();
}

// A draw from the softmax of each live row of logits [M, V], by inversion of its
// distribution function at a number below 1: tokens, and their log-probs.
ffi::Error Draw(ffi::ThreadPool pool, Floats logits, Floats uniform, Ints live,
                ffi::ResultBuffer<ffi::S32> tokens, ffi::ResultBuffer<ffi::F32> logps) {
  const int64_t M = Live(live, logits.dimensions()[0]), V = logits.dimensions()[1];
  constexpr int64_t kGroup = 4 * W;  // tokens whose probabilities are summed first
  const int64_t groups = (V + kGroup - 1) / kGroup;
  std::fill_n(tokens->typed_data(), logits.dimensions()[0], 0);
  std::fill_n(logps->typed_data(), logits.dimensions()[0], 0.0f);
  Parallel(pool, M, 8 * M * V, [&](int64_t i) {
    thread_local std::vector<float> probs, sums;
    probs.assign(groups * kGroup, kHidden);
    sums.resize(groups);
    std::copy_n(logits.typed_data() + i * V, V, probs.begin());
    const auto [top, total] = Softmax(probs.data(), groups * kGroup);
    float all = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const float* p = probs.data() + g * kGroup;
      const Vec sum = (Load(p) + Load(p + W)) + (Load(p + 2 * W) + Load(p + 3 * W));
      sums[g] = 0;
      for (int w = 0; w < W; ++w) sums[g] += sum[w];
      all += sums[g];
    }
    // The first at which the running sum is above the target; where rounding leaves
    // none, the last that adds to it.
    auto find = [](const float* x, int64_t n, float target, float* before) {
      int64_t found = 0;
      float sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        if (sum + x[j] > sum) found = j, *before = sum;
        sum += x[j];
        if (sum > target) break;
      }
      return found;
    };
    const float target = uniform.typed_data()[i] * all;
    float before = 0, within = 0;
    const int64_t g = find(sums.data(), groups, target, &before);
    const int64_t token =
        g * kGroup + find(probs.data() + g * kGroup, kGroup, target - before, &within);
    tokens->typed_data()[i] = token;
    logps->typed_data()[i] = logits.typed_data()[i * V + token] - (top + std::log(total));
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
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Ints>()
        .Ret<Floats>()
        .Attr<float>("eps").Attr<bool>("is_gated"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SplitHandler, Split,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>()  // qkv
        .Arg<Floats>().Arg<Floats>()  // q_scale, k_scale
        .Arg<Floats>().Arg<Floats>()  // sines, cosines
        .Arg<Ints>()                  // live
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DrawHandler, Draw,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Ints>()  // logits, uniform, live
        .Ret<Ints>().Ret<Floats>());
