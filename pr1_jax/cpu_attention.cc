// Attention over whole sequences on CPU, forward and backward, float32; see
// cpu_training.py.

#include "cpu_training.h"

namespace {

// All panels of B [D, N], one after another.
void Pack(const float* b, int64_t stride, int64_t D, int64_t N, bool is_transposed,
          float* to) {
  for (int64_t n = 0; n < N; n += kColumns) {
    PackPanel(b, stride, D, N, is_transposed, n, to + n * D);
  }
}

// One sequence and key/value head of attention: T tokens, of which those from `first`
// on have R queries each.
struct Head {
  int64_t b, k, Q, T, N, K, H, R, first;
  const int32_t *block, *path;  // [T]

  Head(const Floats& q, const Floats& keys, const Ints& blocks, const Ints& paths,
       int64_t task)
      : Q(q.dimensions()[1]), T(keys.dimensions()[1]), N(q.dimensions()[2]),
        K(keys.dimensions()[2]), H(q.dimensions()[3]), R(N / K), first(T - Q) {
    b = task / K, k = task % K;
    block = blocks.typed_data() + b * T, path = paths.typed_data() + b * T;
  }
  // Rows of queries that are handled together, of whole tokens.
  int64_t Tokens() const { return std::max<int64_t>(1, 4 * kRows / R); }
  int64_t Query(int64_t t, int64_t r) const {  // place in [B, Q, N, H]
    return ((b * Q + t - first) * N + k * R + r) * H;
  }
  int64_t Key() const { return (b * T * K + k) * H; }  // place in [B, T, K, H]
  int64_t KeyStride() const { return K * H; }
  int64_t Normaliser(int64_t t, int64_t r) const {  // place in [B, N, Q]
    return (b * N + k * R + r) * Q + t - first;
  }

  // Copies queries, or what is shaped like them, of tokens from `t` on.
  void Take(const float* from, int64_t t, int64_t n, float by, float* to) const {
    for (int64_t i = 0; i < n; ++i) {
      const float* x = from + Query(t + i / R, i % R);
      for (int64_t h = 0; h < H; ++h) to[i * H + h] = x[h] * by;
    }
  }
  // Products of n rows with all keys, or values, up to a token's.
  void Against(const float* rows, int64_t n, const float* panels, int64_t end,
               float* out) const {
    const int64_t stride = Padded(T);
    for (int64_t s = 0; s < end; s += kColumns) {
      TimesPanel(rows, H, n, H, panels + s * H,
                 {out + s, nullptr, stride, kColumns, false});
    }
  }
  // Sums of values, or keys, of tokens up to one, weighted for each of n rows.
  void Weigh(const float* weights, int64_t n, const float* panels, int64_t end,
             float* out) const {
    for (int64_t h = 0; h < H; h += kColumns) {
      TimesPanel(weights, Padded(T), n, end, panels + h * T,
                 {out + h, nullptr, H, std::min<int64_t>(kColumns, H - h), false});
    }
  }
  // Hides what token t does not see of `width` scores.
  void Hide(float* x, int64_t t, int64_t width) const {
    std::fill(x + t + 1, x + width, kHidden);
    if (path[t] == 0) return;
    for (int64_t s = 0; s < t; ++s) {
      const bool seen = block[s] != block[t] || path[s] == path[t];
      x[s] = seen ? x[s] : kHidden;
    }
  }
};

// q [B, Q, N, H] of the last tokens, k and v [B, T, K, H], block and path [B, T] → out
// like q, and the logarithm of each softmax's sum [B, N, Q].
ffi::Error Attention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints block,
                     Ints path, Out out, Out normaliser) {
  const int64_t tasks = q.dimensions()[0] * k.dimensions()[2];
  const int64_t cost = q.element_count() * q.dimensions()[1];
  const float scale = 1.0f / std::sqrt(static_cast<float>(q.dimensions()[3]));
  Parallel(pool, tasks, cost, [&](int64_t task) {
    const Head head(q, k, block, path, task);
    const int64_t T = head.T, H = head.H, R = head.R, stride = Padded(T);
    const int64_t most = head.Tokens() * R;
    float* keys = Kept<1>(stride * H);
    float* values = Kept<2>(T * Padded(H));
    float* rows = Kept<3>(most * H);
    float* scores = Kept<4>(most * stride);
    const int64_t from = head.Key(), apart = head.KeyStride();
    Pack(k.typed_data() + from, apart, H, T, true, keys);
    Pack(v.typed_data() + from, apart, T, H, false, values);
    for (int64_t t = head.first; t < T; t += head.Tokens()) {
      const int64_t end = std::min(T, t + head.Tokens()), n = (end - t) * R;
      head.Take(q.typed_data(), t, n, scale, rows);
      head.Against(rows, n, keys, end, scores);
      for (int64_t i = 0; i < n; ++i) {
        float* x = scores + i * stride;
        head.Hide(x, t + i / R, Padded(end));
        const auto [top, total] = Softmax(x, Padded(end));
        normaliser->typed_data()[head.Normaliser(t + i / R, i % R)] =
            top + std::log(total);
        for (int64_t s = 0; s < Padded(end); s += W) Store(x + s, Load(x + s) / total);
      }
      head.Weigh(scores, n, values, end, rows);
      for (int64_t i = 0; i < n; ++i) {
        std::memcpy(out->typed_data() + head.Query(t + i / R, i % R), rows + i * H,
                    4 * H);
      }
    }
  });
  return ffi::Error::Success();
}

// Gradients of queries, keys and values for out's, dout.
ffi::Error AttentionBack(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints block,
                         Ints path, Floats out, Floats normaliser, Floats dout, Out dq,
                         Out dk, Out dv) {
  const int64_t tasks = q.dimensions()[0] * k.dimensions()[2];
  const int64_t cost = q.element_count() * q.dimensions()[1];
  const float scale = 1.0f / std::sqrt(static_cast<float>(q.dimensions()[3]));
  Parallel(pool, tasks, 3 * cost, [&](int64_t task) {
    const Head head(q, k, block, path, task);
    const int64_t T = head.T, H = head.H, R = head.R, stride = Padded(T);
    const int64_t most = head.Tokens() * R;
    float* keys = Kept<1>(stride * H);  // [H, T]
    float* values = Kept<2>(stride * H);
    float* keys_back = Kept<3>(T * Padded(H));  // [T, H]
    float* queries = Kept<4>(most * H);
    float* outs = Kept<5>(most * H);
    float* gradients = Kept<6>(most * H);
    float* probs = Kept<7>(most * stride);
    float* dscores = Kept<8>(most * stride);
    const int64_t from = head.Key(), apart = head.KeyStride();
    Pack(k.typed_data() + from, apart, H, T, true, keys);
    Pack(v.typed_data() + from, apart, H, T, true, values);
    Pack(k.typed_data() + from, apart, T, H, false, keys_back);
    for (int64_t s = 0; s < T; ++s) {
      std::fill_n(dk->typed_data() + from + s * apart, H, 0.0f);
      std::fill_n(dv->typed_data() + from + s * apart, H, 0.0f);
    }
    for (int64_t t = head.first; t < T; t += head.Tokens()) {
      const int64_t end = std::min(T, t + head.Tokens()), n = (end - t) * R;
      head.Take(q.typed_data(), t, n, scale, queries);
      head.Take(out.typed_data(), t, n, 1.0f, outs);
      head.Take(dout.typed_data(), t, n, 1.0f, gradients);
      head.Against(queries, n, keys, end, probs);
      head.Against(gradients, n, values, end, dscores);
      for (int64_t i = 0; i < n; ++i) {
        float *x = probs + i * stride, *y = dscores + i * stride;
        head.Hide(x, t + i / R, Padded(end));
        const float by = normaliser.typed_data()[head.Normaliser(t + i / R, i % R)];
        float shared = 0;  // what a score's own output takes back
        for (int64_t h = 0; h < H; ++h) shared += outs[i * H + h] * gradients[i * H + h];
        for (int64_t s = 0; s < Padded(end); s += W) {
          const Vec prob = Exp(Load(x + s) - by);
          Store(x + s, prob);
          Store(y + s, prob * (Load(y + s) - shared));
        }
      }
      AddTransposed(probs, stride, gradients, H, n, end, H, dv->typed_data() + from,
                    apart);
      AddTransposed(dscores, stride, queries, H, n, end, H, dk->typed_data() + from,
                    apart);
      head.Weigh(dscores, n, keys_back, end, outs);
      for (int64_t i = 0; i < n; ++i) {
        float* to = dq->typed_data() + head.Query(t + i / R, i % R);
        for (int64_t h = 0; h < H; ++h) to[h] = outs[i * H + h] * scale;
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AttentionHandler, Attention,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Ints>().Arg<Ints>()
        .Ret<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AttentionBackHandler, AttentionBack,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Ints>().Arg<Ints>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // out, normaliser, dout
        .Ret<Floats>().Ret<Floats>().Ret<Floats>());
