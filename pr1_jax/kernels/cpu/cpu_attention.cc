// Attention over whole sequences on CPU, forward and backward, float32; see
// training.py.

#include "cpu_training.h"

namespace {

// All panels of B [D, N], one after another.
void Pack(const float* b, int64_t stride, int64_t D, int64_t N, bool is_transposed,
          float* to) {
  for (int64_t n = 0; n < N; n += kColumns) {
    PackPanel(b, stride, D, N, is_transposed, n, to + n * D);
  }
}

// One sequence and key/value head of attention: T tokens, R queries each. Sequences come
// in rows of G, whose first S tokens stand there once: S, then T − S of each sequence.
struct Head {
  int64_t G, S, T, N, K, H, R, b, k;
  const int32_t *block, *path;  // [T]

  Head(const Floats& q, const Floats& keys, const Ints& blocks, const Ints& paths,
       int64_t shared, int64_t task)
      : G(blocks.dimensions()[0] / q.dimensions()[0]), S(shared),
        T(blocks.dimensions()[1]), N(q.dimensions()[2]), K(keys.dimensions()[2]),
        H(q.dimensions()[3]), R(N / K), b(task / K), k(task % K) {
    block = blocks.typed_data() + b * T, path = paths.typed_data() + b * T;
  }
  // Queries of shared tokens are the first sequence's.
  int64_t First() const { return b % G ? S : 0; }
  // Rows of queries that are handled together, of whole tokens.
  int64_t Tokens() const { return std::max<int64_t>(1, 4 * kRows / R); }
  int64_t Token(int64_t t) const {  // place among all of them
    return b / G * (S + G * (T - S)) + (t < S ? t : b % G * (T - S) + t);
  }
  int64_t Query(int64_t t, int64_t r) const { return (Token(t) * N + k * R + r) * H; }
  int64_t Key(int64_t t) const { return (Token(t) * K + k) * H; }

  // Copies queries, or what is shaped like them, of tokens from `t` on.
  void Take(const float* from, int64_t t, int64_t n, float by, float* to) const {
    for (int64_t i = 0; i < n; ++i) {
      const float* x = from + Query(t + i / R, i % R);
      for (int64_t h = 0; h < H; ++h) to[i * H + h] = x[h] * by;
    }
  }
  // Keys, or values, of all tokens, side by side [T, H].
  const float* All(const float* from) const {
    float* to = Kept<10>(T * H);
    for (int64_t t = 0; t < T; ++t) std::memcpy(to + t * H, from + Key(t), 4 * H);
    return to;
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

// q [B / G, S + G (T − S), N, H], k and v [B / G, …, K, H], block and path [B, T] → out
// like q, and the logarithm of each softmax's sum.
ffi::Error Attention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints block,
                     Ints path, Out out, Out normaliser, int64_t shared) {
  const int64_t tasks = block.dimensions()[0] * k.dimensions()[2];
  const int64_t cost = q.element_count() * block.dimensions()[1];
  const float scale = 1.0f / std::sqrt(static_cast<float>(q.dimensions()[3]));
  Parallel(pool, tasks, cost, [&](int64_t task) {
    const Head head(q, k, block, path, shared, task);
    const int64_t T = head.T, H = head.H, R = head.R, stride = Padded(T);
    const int64_t most = head.Tokens() * R;
    float* keys = Kept<1>(stride * H);
    float* values = Kept<2>(T * Padded(H));
    float* rows = Kept<3>(most * H);
    float* scores = Kept<4>(most * stride);
    float* totals = Kept<5>(most);
    Pack(head.All(k.typed_data()), H, H, T, true, keys);
    Pack(head.All(v.typed_data()), H, T, H, false, values);
    for (int64_t t = head.First(); t < T; t += head.Tokens()) {
      const int64_t end = std::min(T, t + head.Tokens()), n = (end - t) * R;
      head.Take(q.typed_data(), t, n, scale, rows);
      head.Against(rows, n, keys, end, scores);
      for (int64_t i = 0; i < n; ++i) {
        float* x = scores + i * stride;
        head.Hide(x, t + i / R, Padded(end));
        const auto [top, total] = Softmax(x, Padded(end));
        normaliser->typed_data()[head.Query(t + i / R, i % R) / H] =
            top + std::log(total);
        totals[i] = total;
      }
      head.Weigh(scores, n, values, end, rows);
      for (int64_t i = 0; i < n; ++i) {
        float* to = out->typed_data() + head.Query(t + i / R, i % R);
        for (int64_t h = 0; h < H; ++h) to[h] = rows[i * H + h] / totals[i];
      }
    }
  });
  return ffi::Error::Success();
}

// Gradients of queries, keys and values for out's, dout. parts [2, B, K, S, H]: what each
// sequence adds to those of shared keys and values.
ffi::Error AttentionBack(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints block,
                         Ints path, Floats out, Floats normaliser, Floats dout, Out dq,
                         Out dk, Out dv, Out parts, int64_t shared) {
  const int64_t tasks = block.dimensions()[0] * k.dimensions()[2];
  const int64_t cost = q.element_count() * block.dimensions()[1];
  const float scale = 1.0f / std::sqrt(static_cast<float>(q.dimensions()[3]));
  Parallel(pool, tasks, 3 * cost, [&](int64_t task) {
    const Head head(q, k, block, path, shared, task);
    const int64_t S = head.S, T = head.T, H = head.H, R = head.R, stride = Padded(T);
    const int64_t most = head.Tokens() * R;
    float* keys = Kept<1>(stride * H);  // [H, T]
    float* values = Kept<2>(stride * H);
    float* keys_back = Kept<3>(T * Padded(H));  // [T, H]
    float* queries = Kept<4>(most * H);
    float* outs = Kept<5>(most * H);
    float* gradients = Kept<6>(most * H);
    float* probs = Kept<7>(most * stride);
    float* dscores = Kept<8>(most * stride);
    float* sums = Kept<9>(2 * T * H);  // of keys and of values
    Pack(head.All(v.typed_data()), H, H, T, true, values);
    const float* all_keys = head.All(k.typed_data());
    Pack(all_keys, H, H, T, true, keys);
    Pack(all_keys, H, T, H, false, keys_back);
    std::fill_n(sums, 2 * T * H, 0.0f);
    for (int64_t t = head.First(); t < T; t += head.Tokens()) {
      const int64_t end = std::min(T, t + head.Tokens()), n = (end - t) * R;
      head.Take(q.typed_data(), t, n, scale, queries);
      head.Take(out.typed_data(), t, n, 1.0f, outs);
      head.Take(dout.typed_data(), t, n, 1.0f, gradients);
      head.Against(queries, n, keys, end, probs);
      head.Against(gradients, n, values, end, dscores);
      for (int64_t i = 0; i < n; ++i) {
        float *x = probs + i * stride, *y = dscores + i * stride;
        head.Hide(x, t + i / R, Padded(end));
        const float by = normaliser.typed_data()[head.Query(t + i / R, i % R) / H];
        float own = 0;  // what a score's own output takes back
        for (int64_t h = 0; h < H; ++h) own += outs[i * H + h] * gradients[i * H + h];
        for (int64_t s = 0; s < Padded(end); s += W) {
          const Vec prob = Exp(Load(x + s) - by);
          Store(x + s, prob);
          Store(y + s, prob * (Load(y + s) - own));
        }
      }
      TransposedTimes(dscores, stride, queries, H, n, end, H, sums, H, true);
      TransposedTimes(probs, stride, gradients, H, n, end, H, sums + T * H, H, true);
      head.Weigh(dscores, n, keys_back, end, outs);
      for (int64_t i = 0; i < n; ++i) {
        float* to = dq->typed_data() + head.Query(t + i / R, i % R);
        for (int64_t h = 0; h < H; ++h) to[h] = outs[i * H + h] * scale;
      }
    }
    for (int64_t t = S; t < T; ++t) {
      std::memcpy(dk->typed_data() + head.Key(t), sums + t * H, 4 * H);
      std::memcpy(dv->typed_data() + head.Key(t), sums + (T + t) * H, 4 * H);
    }
    float* part = parts->typed_data() + task * S * H;
    std::memcpy(part, sums, 4 * S * H);
    std::memcpy(part + tasks * S * H, sums + T * H, 4 * S * H);
  });
  // The first sequence of each row adds up what all of them gave, in their order.
  Parallel(pool, shared ? tasks : 0, cost, [&](int64_t task) {
    const Head head(q, k, block, path, shared, task);
    if (head.First()) return;
    for (int64_t is_value = 0; is_value < 2; ++is_value) {
      const float* part =
          parts->typed_data() + (is_value * tasks + task) * head.S * head.H;
      for (int64_t t = 0; t < head.S; ++t) {
        float* to = (is_value ? dv : dk)->typed_data() + head.Key(t);
        for (int64_t h = 0; h < head.H; ++h) {
          to[h] = 0;
          for (int64_t g = 0; g < head.G; ++g) {
            to[h] += part[(g * head.K * head.S + t) * head.H + h];
          }
        }
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
        .Ret<Floats>().Ret<Floats>()
        .Attr<int64_t>("shared"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AttentionBackHandler, AttentionBack,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Ints>().Arg<Ints>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // out, normaliser, dout
        .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<int64_t>("shared"));
