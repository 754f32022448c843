// Log-probs of tokens on CPU, forward and backward, float32; see training.py.

#include "cpu_training.h"

namespace {

constexpr int64_t kLogitRows = 3 * kRows;  // that a task holds logits of
constexpr float kLeast = -1e25f;           // logit of what is not banned
constexpr int64_t kOrdinary = 30;          // bit of bans: all but special ids; see policy.py

// Rows of hidden [M, D] times headᵀ [D, V], divided by the temperature, are logits, of
// which those of banned ids and from num_tokens on are hidden → log-probs of
// tokens [M], entropies [M], probabilities [M, V], and back [M, D] = head[token] −
// probabilities · head, which over the temperature is a log-prob's gradient of hidden.
ffi::Error Logps(ffi::ThreadPool pool, Floats hidden, Floats head, Ints tokens,
                 Ints bans, Ints special_ids, Out logps, Out entropies, Out probs,
                 Out back, float temperature, int64_t num_tokens) {
  const int64_t M = hidden.dimensions()[0], D = hidden.dimensions()[1];
  const int64_t V = head.dimensions()[0], width = Padded(V);
  const int64_t stride = width + W;  // rows a power of two apart would share cache lines
  const float* h = head.typed_data();
  const float* panels = Pack<1>(pool, h, D, V, true);
  const float* back_panels = Pack<3>(pool, h, V, D, false);
  const int64_t tasks = (M + kLogitRows - 1) / kLogitRows;
  Parallel(pool, tasks, 2 * M * D * V, [&](int64_t task) {
    const int64_t first = task * kLogitRows, m = std::min(kLogitRows, M - first);
    float* rows = Kept<2>(kLogitRows * stride);
    for (int64_t n = 0; n < V; n += kColumns) {
      TimesPanel(hidden.typed_data() + first * D, D, m, D, panels + n * D,
                 {rows + n, nullptr, stride, kColumns, false});
    }
    for (int64_t i = first; i < first + m; ++i) {
      float* x = rows + (i - first) * stride;
      for (int64_t n = 0; n < width; n += W) {
        const Vec y = Load(x + n) / temperature;
        Store(x + n, y < kLeast ? Fill(kLeast) : y);
      }
      std::fill(x + num_tokens, x + width, kHidden);
      const int32_t banned = bans.typed_data()[i], *ids = special_ids.typed_data();
      const auto count = static_cast<int64_t>(special_ids.element_count());
      if (count <= kOrdinary && banned >> kOrdinary & 1) {
        float special[kOrdinary];
        for (int64_t j = 0; j < count; ++j) special[j] = ids[j] < V ? x[ids[j]] : 0;
        std::fill(x, x + num_tokens, kHidden);
        for (int64_t j = 0; j < count; ++j) {
          if (ids[j] < V) x[ids[j]] = special[j];
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        if (banned >> j & 1 && ids[j] < V) x[ids[j]] = kHidden;
      }
      const int32_t token = tokens.typed_data()[i];
      const float chosen = x[token];
      const float top = Greatest(x, width);
      Vec sums{}, products{};
      for (int64_t n = 0; n < width; n += W) {
        const Vec y = Load(x + n) - top, prob = Exp(y);
        Store(x + n, prob);
        sums += prob;
        products += prob * y;
      }
      const float total = Sum(sums), product = Sum(products);
      float* kept = probs->typed_data() + i * V;
      for (int64_t n = 0; n < width; n += W) {
        const Vec prob = Load(x + n) / total;
        Store(x + n, prob);
        if (n + W <= V) Store(kept + n, prob);
      }
      std::copy(x + V / W * W, x + V, kept + V / W * W);
      logps->typed_data()[i] = chosen - top - std::log(total);
      entropies->typed_data()[i] = std::log(total) - product / total;
    }
    float* to = back->typed_data() + first * D;
    for (int64_t d = 0; d < D; d += kColumns) {
      TimesPanel(rows, stride, m, V, back_panels + d * V,
                 {to + d, nullptr, D, std::min<int64_t>(kColumns, D - d), false});
    }
    for (int64_t i = 0; i < m; ++i) {
      const float* row = h + tokens.typed_data()[first + i] * D;
      for (int64_t d = 0; d < D; ++d) to[i * D + d] = row[d] - to[i * D + d];
    }
  });
  return ffi::Error::Success();
}

// The gradient of head [V, D] for those of log-probs, divided by the temperature, [M].
ffi::Error LogpsBack(ffi::ThreadPool pool, Floats hidden, Ints tokens, Floats probs,
                     Floats dlogps, Out dhead) {
  const int64_t M = hidden.dimensions()[0], D = hidden.dimensions()[1];
  const int64_t V = probs.dimensions()[1];
  float* against = Kept<1>(M * D);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t d = 0; d < D; ++d) {
      against[i * D + d] = -dlogps.typed_data()[i] * hidden.typed_data()[i * D + d];
    }
  }
  Gradients(pool, M, {{against, D, probs.typed_data(), V, dhead->typed_data(), true}});
  for (int64_t i = 0; i < M; ++i) {
    float* row = dhead->typed_data() + tokens.typed_data()[i] * D;
    for (int64_t d = 0; d < D; ++d) row[d] -= against[i * D + d];
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LogpsHandler, Logps,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Floats>()              // hidden, head
        .Arg<Ints>().Arg<Ints>().Arg<Ints>()      // tokens, bans, special_ids
        .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<float>("temperature")
        .Attr<int64_t>("num_tokens"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LogpsBackHandler, LogpsBack,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>().Arg<Ints>().Arg<Floats>().Arg<Floats>()
        .Ret<Floats>());
