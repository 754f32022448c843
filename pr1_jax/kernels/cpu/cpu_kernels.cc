// Kernels of a decode step on CPU, float32; see decoding.py.

#include "cpu_kernels.h"

namespace {

// How many of M rows are wanted, the first ones: all, if nothing is said.
int64_t Live(const Ints& live, int64_t M) {
  return live.element_count() ? std::clamp<int64_t>(live.typed_data()[0], 0, M) : M;
}

// A matrix [D, N] in panels [count, D, kColumns], zeros behind the last column.
struct Packed {
  const float* panels;
  int64_t count, D;

  explicit Packed(const Floats& x)
      : panels(x.typed_data()), count(x.dimensions()[0]), D(x.dimensions()[1]) {}
  const float* Panel(int64_t i) const {
    return i < count ? panels + i * D * kColumns : nullptr;
  }
};

bool ArePacked(std::initializer_list<const Floats*> all) {
  return std::all_of(all.begin(), all.end(),
                     [](const Floats* x) { return x->dimensions()[2] == kColumns; });
}

ffi::Error NotPacked() {
  return ffi::Error::InvalidArgument("packed for another processor");
}

// c [M, N] = a [M, D] · b, a task a panel; plus what there is to add, or gated, as of
// `Place`.
Phase Product(const float* a, int64_t M, const Packed& b, int64_t N, float* c,
              const float* plus = nullptr, bool is_gated = false) {
  const int64_t width = is_gated ? W : kColumns;
  return {b.count, [=](int64_t panel, int64_t next) {
            const int64_t n = panel * width;
            TimesPanel(a, b.D, M, b.D, b.Panel(panel),
                       {c + n, plus ? plus + n : nullptr, N, std::min(width, N - n),
                        is_gated},
                       b.Panel(next));
          }};
}

// y = x / rms(x) · scale, of M rows of D.
Phase Norm(const float* x, const float* scale, int64_t M, int64_t D, float eps, float* y) {
  constexpr int64_t kSome = 8;  // rows
  return {(M + kSome - 1) / kSome, [=](int64_t task, int64_t) {
            for (int64_t i = task * kSome; i < std::min(M, (task + 1) * kSome); ++i) {
              Normalize(x + i * D, scale, D, eps, y + i * D);
            }
          }};
}

// x [M, D] · packed → [M, N]. Here and below, rows that are not live are left as they were.
ffi::Error Project(ffi::ThreadPool pool, Floats x, Floats packed, Ints live,
                   ffi::ResultBuffer<ffi::F32> out) {
  if (!ArePacked({&packed})) return NotPacked();
  const int64_t M = Live(live, x.dimensions()[0]), cost = M * packed.element_count();
  Parallel(pool, cost, {Product(x.typed_data(), M, Packed(packed), out->dimensions()[1],
                                out->typed_data())});
  return ffi::Error::Success();
}

// x [M, D], normalised, · packed, plus a bias, as [M, K, R + 2, H] → q [M, K · R, H], k and
// v [M, K, H]; q and k normalised, where there is a scale, and rotated by angles
// [M, H / 2].
ffi::Error ProjectHeads(ffi::ThreadPool pool, Floats x, Floats packed, Floats scale,
                        Floats bias, Floats q_scale, Floats k_scale, Floats sines,
                        Floats cosines, Ints live, ffi::ResultBuffer<ffi::F32> q,
                        ffi::ResultBuffer<ffi::F32> k, ffi::ResultBuffer<ffi::F32> v,
                        float eps) {
  if (!ArePacked({&packed})) return NotPacked();
  const int64_t M = Live(live, x.dimensions()[0]), D = x.dimensions()[1];
  const int64_t K = k->dimensions()[1], H = k->dimensions()[2];
  const int64_t R = q->dimensions()[1] / K, heads = K * (R + 2);
  const Packed b(packed);
  float* normalized = Kept<21>(M * D);
  // Head `head` of row i, of the product.
  auto put = [&](int64_t i, int64_t head, const float* from) {
    const int64_t kv = i * K + head / (R + 2), r = head % (R + 2);
    const float* sine = sines.typed_data() + i * (H / 2);
    const float* cosine = cosines.typed_data() + i * (H / 2);
    if (r < R) {
      float* to = q->typed_data() + (kv * R + r) * H;
      RotateHead(from, OrNull(q_scale), sine, cosine, H, eps, to);
    } else if (r == R) {
      float* to = k->typed_data() + kv * H;
      RotateHead(from, OrNull(k_scale), sine, cosine, H, eps, to);
    } else {
      std::memcpy(v->typed_data() + kv * H, from, 4 * H);
    }
  };
  // A task has whole heads and whole panels.
  const int64_t columns = std::lcm<int64_t>(H, kColumns), panels = columns / kColumns;
  const int64_t tasks = (b.count + panels - 1) / panels;
  auto product = [&](int64_t task, int64_t next) {
    float* some = Kept<22>(kBlock * columns);
    const int64_t first = task * panels, last = std::min(b.count, first + panels);
    const int64_t head = task * columns / H;
    const int64_t end = std::min(heads, head + columns / H);
    for (int64_t i = 0; i < M; i += kBlock) {
      const int64_t m = std::min(kBlock, M - i);
      for (int64_t panel = first; panel < last; ++panel) {
        TimesPanel(normalized + i * D, D, m, D, b.Panel(panel),
                   {some + (panel - first) * kColumns, nullptr, columns, kColumns, false},
                   b.Panel(panel + 1 < last ? panel + 1 : next * panels));
      }
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t j = head; j < end; ++j) {
          float* from = some + row * columns + (j - head) * H;
          const float* add = bias.typed_data() + j * H;
          if (bias.element_count()) {
            for (int64_t h = 0; h < H; ++h) from[h] += add[h];
          }
          put(i + row, j, from);
        }
      }
    }
  };
  Parallel(pool, M * packed.element_count(),
           {Norm(x.typed_data(), scale.typed_data(), M, D, eps, normalized),
            {tasks, product}});
  return ffi::Error::Success();
}

// What comes after attention in a layer: y = z + (silu(h · gate) · (h · up)) · down, with
// z = x + heads · o and h = z / rms(z) · scale; x and y [M, D], heads [M, N · H].
ffi::Error FinishLayer(ffi::ThreadPool pool, Floats x, Floats heads, Floats scale,
                       Floats o, Floats gate_up, Floats down, Ints live,
                       ffi::ResultBuffer<ffi::F32> y, float eps) {
  if (!ArePacked({&o, &gate_up, &down})) return NotPacked();
  const int64_t M = Live(live, x.dimensions()[0]), D = x.dimensions()[1];
  const int64_t F = down.dimensions()[1];
  const int64_t cost =
      M * (o.element_count() + gate_up.element_count() + down.element_count());
  float *h = Kept<21>(M * D), *a = Kept<23>(M * F), *to = y->typed_data();
  Parallel(pool, cost,
           {Product(heads.typed_data(), M, Packed(o), D, to, x.typed_data()),
            Norm(to, scale.typed_data(), M, D, eps, h),
            Product(h, M, Packed(gate_up), F, a, nullptr, true),
            Product(a, M, Packed(down), D, to, to)});
  return ffi::Error::Success();
}

// A number from 0 to 1 of each key, into which a count is folded, as its coarse and its
// fine part: the same as categorical.uniform, which loops on CPU.
ffi::Error Uniform(ffi::Buffer<ffi::U32> keys, Ints counts,
                   ffi::ResultBuffer<ffi::F32> out) {
  // Threefry-2x32 with 20 rounds (Salmon et al., 2011).
  using Pair = std::array<uint32_t, 2>;
  auto threefry = [](const Pair& key, Pair x) {
    constexpr int kTurns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const uint32_t all[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
    x[0] += all[0], x[1] += all[1];
    for (uint32_t i = 0; i < 5; ++i) {
      for (int turn : kTurns[i % 2]) {
        x[0] += x[1];
        x[1] = (x[1] << turn | x[1] >> (32 - turn)) ^ x[0];
      }
      x[0] += all[(i + 1) % 3];
      x[1] += all[(i + 2) % 3] + i + 1;
    }
    return x;
  };
  for (size_t i = 0; i < counts.element_count(); ++i) {
    const uint32_t* key = keys.typed_data() + 2 * i;
    const uint32_t count = counts.typed_data()[i];
    const Pair folded = threefry({key[0], key[1]}, {0, count});
    uint32_t words[2];
    for (uint32_t j = 0; j < 2; ++j) {
      const Pair bits = threefry(folded, {0, j});
      words[j] = bits[0] ^ bits[1];
    }
    float* parts = out->typed_data() + 2 * i;
    parts[0] = (words[0] >> 9) * 0x1p-23f;
    parts[1] = ((words[0] & 0x1FF) << 15 | words[1] >> 17) * 0x1p-47f;
  }
  return ffi::Error::Success();
}

// A draw from the softmax of each live row of logits [M, V], by inversion of its
// distribution function at a number below 1, the sum of two parts [M, 2]: tokens, and
// their log-probs. Sums are doubles, in which the most improbable tokens are not lost.
ffi::Error Draw(ffi::ThreadPool pool, Floats logits, Floats numbers, Ints live,
                ffi::ResultBuffer<ffi::S32> tokens, ffi::ResultBuffer<ffi::F32> logps) {
  const int64_t M = Live(live, logits.dimensions()[0]), V = logits.dimensions()[1];
  typedef double Wide __attribute__((vector_size(8 * W)));
  constexpr int64_t kGroup = 4 * W;  // tokens whose probabilities are summed first
  const int64_t groups = (V + kGroup - 1) / kGroup;
  std::fill_n(tokens->typed_data(), logits.dimensions()[0], 0);
  std::fill_n(logps->typed_data(), logits.dimensions()[0], 0.0f);
  Parallel(pool, M, 8 * M * V, [&](int64_t i) {
    thread_local std::vector<float> probs;
    thread_local std::vector<double> sums;
    probs.assign(groups * kGroup, kHidden);
    sums.assign(groups, 0.0);
    std::copy_n(logits.typed_data() + i * V, V, probs.begin());
    const auto [top, total] = Softmax(probs.data(), groups * kGroup);
    double all = 0;
    for (int64_t g = 0; g < groups; ++g) {
      Wide sum{};
      for (int64_t j = 0; j < kGroup; j += W) {
        sum += __builtin_convertvector(Load(probs.data() + g * kGroup + j), Wide);
      }
      for (int w = 0; w < W; ++w) sums[g] += sum[w];
      all += sums[g];
    }
    // The first at which the running sum is above the target; where rounding leaves
    // none, the last that adds to it.
    auto find = [](const auto* x, int64_t n, double target, double* before) {
      int64_t found = 0;
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        if (x[j] > 0) found = j, *before = sum;
        sum += x[j];
        if (sum > target) break;
      }
      return found;
    };
    const float* parts = numbers.typed_data() + 2 * i;
    const double target = (static_cast<double>(parts[0]) + parts[1]) * all;
    double before = 0, within = 0;
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
    ProjectHandler, Project,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Ints>()  // x, packed, live
        .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ProjectHeadsHandler, ProjectHeads,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()  // x, packed, scale, bias
        .Arg<Floats>().Arg<Floats>()  // q_scale, k_scale
        .Arg<Floats>().Arg<Floats>()  // sines, cosines
        .Arg<Ints>()                  // live
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FinishLayerHandler, FinishLayer,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // x, heads, scale
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // o, gate_up, down
        .Arg<Ints>()                                // live
        .Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    UniformHandler, Uniform,
    ffi::Ffi::Bind()
        .Arg<ffi::Buffer<ffi::U32>>().Arg<Ints>()  // keys, counts
        .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DrawHandler, Draw,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Ints>()  // logits, numbers, live
        .Ret<Ints>().Ret<Floats>());
