// Layers of a decoder on CPU, forward and backward, float32; see training.py.

#include "cpu_training.h"

namespace {

// C [M, N] = A [M, D] · panels [D, N], plus what there is to add; rows of A stand
// `stride` apart.
void Times(const float* a, int64_t stride, int64_t M, int64_t D, const float* panels,
           int64_t N, float* c, const float* plus = nullptr) {
  for (int64_t n = 0; n < N; n += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, N - n);
    TimesPanel(a, stride, M, D, panels + n * D,
               {c + n, plus ? plus + n : nullptr, N, columns, false});
  }
}

// h = x / rms(x) · scale of D numbers, and back from its gradient dh: dx, plus what there
// is to add; the scale's is added to dscale. h may be null.
void NormalizeBack(const float* x, const float* scale, int64_t D, float eps,
                   const float* dh, const float* plus, float* h, float* dx,
                   float* dscale) {
  Vec squares{}, products{};
  float square = 0, product = 0;
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    squares += Load(x + d) * Load(x + d);
    products += Load(x + d) * Load(scale + d) * Load(dh + d);
  }
  for (int i = 0; i < W; ++i) square += squares[i], product += products[i];
  for (; d < D; ++d) square += x[d] * x[d], product += x[d] * scale[d] * dh[d];
  const float by = 1.0f / std::sqrt(square / D + eps);
  const float back = product * by * by * by / D;
  for (d = 0; d + W <= D; d += W) {
    const Vec y = Load(x + d) * by, gradient = Load(dh + d);
    const Vec from = gradient * Load(scale + d) * by - Load(x + d) * back;
    if (h) Store(h + d, y * Load(scale + d));
    Store(dx + d, plus ? Load(plus + d) + from : from);
    Store(dscale + d, Load(dscale + d) + gradient * y);
  }
  for (; d < D; ++d) {
    const float y = x[d] * by;
    if (h) h[d] = y * scale[d];
    dx[d] = dh[d] * scale[d] * by - x[d] * back + (plus ? plus[d] : 0.0f);
    dscale[d] += dh[d] * y;
  }
}

void NormalizeRows(const float* x, const float* scale, int64_t m, int64_t D, float eps,
                   float* y) {
  for (int64_t i = 0; i < m * D; i += D) Normalize(x + i, scale, D, eps, y + i);
}

void NormalizeRowsBack(const float* x, const float* scale, int64_t m, int64_t D,
                       float eps, const float* dh, const float* plus, float* h,
                       float* dx, float* dscale) {
  for (int64_t i = 0; i < m * D; i += D) {
    NormalizeBack(x + i, scale, D, eps, dh + i, plus ? plus + i : nullptr, h + i, dx + i,
                  dscale);
  }
}

// Sums over rows, kept apart by task, so that their order is always the same.
template <int number>
struct Sums {
  int64_t tasks, D;
  float* parts;

  Sums(int64_t tasks, int64_t D)
      : tasks(tasks), D(D), parts(Kept<number>(tasks * D)) {
    std::fill(parts, parts + tasks * D, 0.0f);
  }
  float* Of(int64_t task) const { return parts + task * D; }
  void Put(float* to) const {
    std::fill(to, to + D, 0.0f);
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t d = 0; d < D; ++d) to[d] += parts[i * D + d];
    }
  }
};

// x [M, D], normalised if there is a scale, times kernel [D, N], plus what there is to
// add → y [M, N].
ffi::Error Linear(ffi::ThreadPool pool, Floats x, Floats kernel, Floats scale,
                  Floats plus, Out y, float eps) {
  const int64_t M = x.dimensions()[0], D = x.dimensions()[1];
  const int64_t N = kernel.dimensions()[1];
  const float* panels = Pack<1>(pool, kernel.typed_data(), D, N, false);
  Parallel(pool, Blocks(M), M * D * N, [&](int64_t task) {
    const int64_t i = task * kBlock, m = std::min(kBlock, M - i);
    const float* a = x.typed_data() + i * D;
    if (scale.element_count()) {
      float* h = Kept<2>(kBlock * D);
      NormalizeRows(a, scale.typed_data(), m, D, eps, h);
      a = h;
    }
    Times(a, D, m, D, panels, N, y->typed_data() + i * N,
          plus.element_count() ? plus.typed_data() + i * N : nullptr);
  });
  return ffi::Error::Success();
}

// What stands before the product for dy [M, N]: dx [M, D], dkernel [D, N], dscale.
ffi::Error LinearBack(ffi::ThreadPool pool, Floats x, Floats kernel, Floats scale,
                      Floats dy, Out dx, Out dkernel, Out dscale, float eps) {
  const int64_t M = x.dimensions()[0], D = x.dimensions()[1];
  const int64_t N = kernel.dimensions()[1];
  const bool is_normalized = scale.element_count();
  const float* panels = Pack<1>(pool, kernel.typed_data(), N, D, true);
  float* h = is_normalized ? Kept<3>(M * D) : nullptr;
  const Sums<4> scales(Blocks(M), is_normalized ? D : 0);
  Parallel(pool, Blocks(M), M * D * N, [&](int64_t task) {
    const int64_t i = task * kBlock, m = std::min(kBlock, M - i);
    float* to = dx->typed_data() + i * D;
    if (!is_normalized) {
      Times(dy.typed_data() + i * N, N, m, N, panels, D, to);
      return;
    }
    float* dh = Kept<2>(kBlock * D);
    Times(dy.typed_data() + i * N, N, m, N, panels, D, dh);
    NormalizeRowsBack(x.typed_data() + i * D, scale.typed_data(), m, D, eps, dh, nullptr,
                      h + i * D, to, scales.Of(task));
  });
  const float* a = is_normalized ? h : x.typed_data();
  Gradients(pool, M, {{a, D, dy.typed_data(), N, dkernel->typed_data()}});
  if (is_normalized) scales.Put(dscale->typed_data());
  return ffi::Error::Success();
}

// y = x + (silu(h · gate) · (h · up)) · down with h = x / rms(x) · scale; x [M, D], gate
// and up [D, F], down [F, D]. Also h · gate and h · up [M, F].
ffi::Error Mlp(ffi::ThreadPool pool, Floats x, Floats scale, Floats gate, Floats up,
               Floats down, Out y, Out gates, Out ups, float eps) {
  const int64_t M = x.dimensions()[0], D = x.dimensions()[1];
  const int64_t F = gate.dimensions()[1];
  const float* gate_panels = Pack<1>(pool, gate.typed_data(), D, F, false);
  const float* up_panels = Pack<3>(pool, up.typed_data(), D, F, false);
  const float* down_panels = Pack<4>(pool, down.typed_data(), F, D, false);
  Parallel(pool, Blocks(M), 3 * M * D * F, [&](int64_t task) {
    const int64_t i = task * kBlock, m = std::min(kBlock, M - i);
    const float* from = x.typed_data() + i * D;
    float* h = Kept<2>(kBlock * D);
    NormalizeRows(from, scale.typed_data(), m, D, eps, h);
    float* g = gates->typed_data() + i * F;
    float* u = ups->typed_data() + i * F;
    float* a = Kept<5>(kBlock * F);
    Times(h, D, m, D, gate_panels, F, g);
    Times(h, D, m, D, up_panels, F, u);
    int64_t n = 0;
    for (; n + W <= m * F; n += W) Store(a + n, Silu(Load(g + n)) * Load(u + n));
    for (; n < m * F; ++n) a[n] = g[n] / (1.0f + std::exp(-g[n])) * u[n];
    Times(a, F, m, F, down_panels, D, y->typed_data() + i * D, from);
  });
  return ffi::Error::Success();
}

// What stands before y's gradient dy [M, D].
ffi::Error MlpBack(ffi::ThreadPool pool, Floats x, Floats scale, Floats gate, Floats up,
                   Floats down, Floats gates, Floats ups, Floats dy, Out dx, Out dscale,
                   Out dgate, Out dup, Out ddown, float eps) {
  const int64_t M = x.dimensions()[0], D = x.dimensions()[1];
  const int64_t F = gate.dimensions()[1];
  const float* gate_panels = Pack<1>(pool, gate.typed_data(), F, D, true);
  const float* up_panels = Pack<3>(pool, up.typed_data(), F, D, true);
  const float* down_panels = Pack<4>(pool, down.typed_data(), D, F, true);
  float* h = Kept<6>(M * D);
  float* a = Kept<7>(3 * M * F);
  float *dg = a + M * F, *du = dg + M * F;
  const Sums<8> scales(Blocks(M), D);
  Parallel(pool, Blocks(M), 3 * M * D * F, [&](int64_t task) {
    const int64_t i = task * kBlock, m = std::min(kBlock, M - i);
    float* da = Kept<5>(kBlock * F);
    Times(dy.typed_data() + i * D, D, m, D, down_panels, F, da);
    const float* g = gates.typed_data() + i * F;
    const float* u = ups.typed_data() + i * F;
    auto back = [&](int64_t n, auto x, auto up, auto gradient, auto s, auto put) {
      const auto silu = x * s;
      put(a + i * F + n, silu * up);
      put(dg + i * F + n, gradient * up * (s + silu * (1.0f - s)));
      put(du + i * F + n, gradient * silu);
    };
    int64_t n = 0;
    for (; n + W <= m * F; n += W) {
      const Vec x = Load(g + n);
      back(n, x, Load(u + n), Load(da + n), Sigmoid(x), Store);
    }
    for (; n < m * F; ++n) {
      const float s = 1.0f / (1.0f + std::exp(-g[n]));
      back(n, g[n], u[n], da[n], s, [](float* to, float x) { *to = x; });
    }
    float* dh = Kept<2>(kBlock * D);
    Times(dg + i * F, F, m, F, gate_panels, D, dh);
    Times(du + i * F, F, m, F, up_panels, D, dh, dh);
    NormalizeRowsBack(x.typed_data() + i * D, scale.typed_data(), m, D, eps, dh,
                      dy.typed_data() + i * D, h + i * D, dx->typed_data() + i * D,
                      scales.Of(task));
  });
  Gradients(pool, M, {{h, D, dg, F, dgate->typed_data()},
                      {h, D, du, F, dup->typed_data()},
                      {a, F, dy.typed_data(), D, ddown->typed_data()}});
  scales.Put(dscale->typed_data());
  return ffi::Error::Success();
}

// qkv [M, K, R + 2, H] → q [M, K · R, H], k and v [M, K, H]; q and k normalised, where
// there is a scale, and rotated by angles [M, H / 2].
ffi::Error Split(ffi::ThreadPool pool, Floats qkv, Floats q_scale, Floats k_scale,
                 Floats sines, Floats cosines, Out q, Out k, Out v, float eps) {
  const int64_t M = qkv.dimensions()[0], K = qkv.dimensions()[1];
  const int64_t R = qkv.dimensions()[2] - 2, H = qkv.dimensions()[3], half = H / 2;
  Parallel(pool, Blocks(M), 4 * M * K * (R + 2) * H, [&](int64_t task) {
    for (int64_t i = task * kBlock; i < std::min(M, (task + 1) * kBlock); ++i) {
      const float* sine = sines.typed_data() + i * half;
      const float* cosine = cosines.typed_data() + i * half;
      for (int64_t j = i * K; j < (i + 1) * K; ++j) {
        const float* from = qkv.typed_data() + j * (R + 2) * H;
        for (int64_t r = 0; r < R; ++r) {
          RotateHead(from + r * H, OrNull(q_scale), sine, cosine, H, eps,
                     q->typed_data() + (j * R + r) * H);
        }
        RotateHead(from + R * H, OrNull(k_scale), sine, cosine, H, eps,
                   k->typed_data() + j * H);
        std::memcpy(v->typed_data() + j * H, from + (R + 1) * H, 4 * H);
      }
    }
  });
  return ffi::Error::Success();
}

// Back from there: dqkv [M, K, R + 2, H] and the scales' gradients.
ffi::Error SplitBack(ffi::ThreadPool pool, Floats qkv, Floats q_scale, Floats k_scale,
                     Floats sines, Floats cosines, Floats dq, Floats dk, Floats dv,
                     Out dqkv, Out dq_scale, Out dk_scale, float eps) {
  const int64_t M = qkv.dimensions()[0], K = qkv.dimensions()[1];
  const int64_t R = qkv.dimensions()[2] - 2, H = qkv.dimensions()[3], half = H / 2;
  const Sums<1> q_sums(Blocks(M), H);
  const Sums<3> k_sums(Blocks(M), H);
  Parallel(pool, Blocks(M), 8 * M * K * (R + 2) * H, [&](int64_t task) {
    float* straight = Kept<2>(H);  // the gradient before the rotation
    auto back = [&](const float* x, const Floats& scale, int64_t i, const float* dy,
                    float* dx, float* dscale) {
      const float* sine = sines.typed_data() + i * half;
      const float* cosine = cosines.typed_data() + i * half;
      float* to = scale.element_count() ? straight : dx;
      for (int64_t h = 0; h < half; ++h) {
        to[h] = dy[h] * cosine[h] + dy[half + h] * sine[h];
        to[half + h] = dy[half + h] * cosine[h] - dy[h] * sine[h];
      }
      if (!scale.element_count()) return;
      NormalizeBack(x, scale.typed_data(), H, eps, straight, nullptr, nullptr, dx,
                    dscale);
    };
    for (int64_t i = task * kBlock; i < std::min(M, (task + 1) * kBlock); ++i) {
      for (int64_t j = i * K; j < (i + 1) * K; ++j) {
        const float* x = qkv.typed_data() + j * (R + 2) * H;
        float* dx = dqkv->typed_data() + j * (R + 2) * H;
        for (int64_t r = 0; r < R; ++r) {
          back(x + r * H, q_scale, i, dq.typed_data() + (j * R + r) * H, dx + r * H,
               q_sums.Of(task));
        }
        back(x + R * H, k_scale, i, dk.typed_data() + j * H, dx + R * H,
             k_sums.Of(task));
        std::memcpy(dx + (R + 1) * H, dv.typed_data() + j * H, 4 * H);
      }
    }
  });
  if (q_scale.element_count()) q_sums.Put(dq_scale->typed_data());
  if (k_scale.element_count()) k_sums.Put(dk_scale->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LinearHandler, Linear,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
        .Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LinearBackHandler, LinearBack,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MlpHandler, Mlp,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>()                // x, scale
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // gate, up, down
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MlpBackHandler, MlpBack,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>()                // x, scale
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // gate, up, down
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // gates, ups, dy
        .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SplitHandler, Split,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>()  // qkv
        .Arg<Floats>().Arg<Floats>()  // q_scale, k_scale
        .Arg<Floats>().Arg<Floats>()  // sines, cosines
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SplitBackHandler, SplitBack,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // qkv, q_scale, k_scale
        .Arg<Floats>().Arg<Floats>()                // sines, cosines
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // dq, dk, dv
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("eps"));
