"""SFT and GRPO losses, their relatives, advantages, token weights: pure functions.

See docs/method.md, section 4; docs/objectives.md says which switches make which paper.
Log-probs of tokens are those of `policy`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

AGGREGATIONS = ("token_mean", "response_mean", "constant")
OBJECTIVES = ("grpo", "gspo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")
IMPORTANCE = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BASELINES = ("group", "leave_one_out", "batch", "group_then_batch")

# Log-ratios are at most this, so that their exponential is finite, and what a batch sums
# of it. No probability grows by this factor, 5e8, in a step unless something is broken.
MAX_LOG_RATIO = 20.0
_LARGEST = 1e15  # of a log-prob that is not finite; its square is


def token_weights(
    loss_mask,
    start=None,
    *,
    aggregation: str = "token_mean",
    constant: float = 1.0,
):
    """Weight of every token in a batch's loss; the loss is a weighted sum.

    Weights are made once for a whole mini-batch, so its micro-batches and its shards
    only add up.

    Args:
      loss_mask: [B, T] bool or 0/1; as many rows as there are responses.
      start: [B, T] int32 as of `trajectory.Batch`, where a row holds several responses,
        and others none. None: each row is a response.
      aggregation: `token_mean` (1 / tokens of the batch), `response_mean` (mean over
        responses of each one's mean) or `constant` (1 / (B · constant), Dr. GRPO).
      constant: normaliser in tokens, for `constant` only.

    Returns:
      [B, T] float32.

    Raises:
      ValueError: unknown aggregation.
    """
    mask = jnp.asarray(loss_mask, jnp.float32)
    if aggregation == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if aggregation == "response_mean" and start is not None:
        tokens = response_sums(jnp.asarray(loss_mask, jnp.int32), start)
        is_first = start == jnp.arange(start.shape[-1])
        responses = (is_first & (tokens > 0)).sum()
        return mask / jnp.maximum(tokens, 1) / jnp.maximum(responses, 1)
    if aggregation == "response_mean":
        per_response = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1.0)
        return per_response / jnp.maximum((mask.sum(-1) > 0).sum(), 1)
    if aggregation == "constant":
        return mask / (mask.shape[0] * constant)
    raise ValueError(f"aggregation={aggregation!r} is not one of {AGGREGATIONS}")


def response_sums(x, start=None):
    """The sum over each token's response, at each of its tokens, [..., T] as `x`.

    No response has a part in the sum of another in its row, whatever its numbers are.

    Args:
      x: [..., T] float32 or int32. start: as of `token_weights`, [..., T].
    """
    if start is None:
        return jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape)
    return _sums_of_several(x, start)


@jax.jit
def _sums_of_several(x, start):
    T = x.shape[-1]
    is_first = start == jnp.arange(T)
    end = [(0, 0)] * (x.ndim - 1) + [(0, 1)]
    is_last = jnp.pad(is_first[..., 1:], end, constant_values=True)
    last = jnp.where(is_last, jnp.arange(T), T)
    last = jax.lax.cummin(last, axis=x.ndim - 1, reverse=True)

    def join(left, right):
        (before, begun), (x, begins) = left, right
        return jnp.where(begins, x, before + x), begun | begins

    so_far, _ = jax.lax.associative_scan(join, (x, is_first), axis=-1)
    return jnp.take_along_axis(so_far, last, axis=-1)


def sft_loss(logps, weights):
    """Cross-entropy: −Σ weights · logps. Both [B, T] float32; scalar float32."""
    return -jnp.sum(weights * jnp.where(weights > 0, logps, 0.0))


# --- Advantages ---------------------------------------------------------------------


def advantages(
    rewards, *, baseline: str = "group", normalize_std: bool = True, spread_of=None
):
    """Advantages: rewards less a baseline, divided by how far they spread.

    | `baseline`         | is subtracted                   | what divides       |
    |--------------------|---------------------------------|--------------------|
    | `group`            | mean of the group               | std of the group   |
    | `leave_one_out`    | mean of the group's others      | std of the group   |
    | `batch`            | mean of the batch               | std of the batch   |
    | `group_then_batch` | mean of the group               | std of what is left |

    The last is over the batch. These are GRPO (arXiv 2402.03300), RLOO (arXiv 2402.14740;
    without a division), REINFORCE++ and REINFORCE++-baseline (arXiv 2501.03262).

    Args:
      rewards: [groups, G] float, of the whole batch where the baseline is of it.
      normalize_std: divide, by std + 1e-6; `group` without is Dr. GRPO (arXiv 2503.20783).
      spread_of: [groups, G] float whose std divides, and 1 where they are all equal:
        `rewards` without a part that must not be blown up. None = `rewards`.

    Returns:
      [groups, G] float32; zero where all rewards of a group (or of the batch, if the
      baseline is of it) are equal, and in a group in which one is not finite.

    Raises:
      ValueError: unknown baseline.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} is not one of {BASELINES}")
    rewards = jnp.asarray(rewards, jnp.float32)
    centred = _centred(rewards, baseline)
    if normalize_std:
        of = rewards if spread_of is None else jnp.asarray(spread_of, jnp.float32)
        centred = centred / _spread(of, baseline)
    usable = jnp.isfinite(rewards + centred).all(axis=-1, keepdims=True)
    return jnp.where(usable, centred, 0.0)


def advantages_of_parts(
    parts: Mapping[str, jax.Array], weights: Mapping[str, float]
) -> jax.Array:
    """Advantages of rewards in parts, each of which is normalised by itself.

    Each part is centred and scaled in its group, the weighted sum of them is scaled by its
    spread over the batch. So no part is drowned by another that spreads more. GDPO (arXiv
    2601.05242).

    Args:
      parts: the rewards by name, each [groups, G] float, of the whole batch, unweighted.
      weights: of the same names.

    Returns:
      [groups, G] float32; zero in a group in which a reward is not finite.
    """
    stacked = jnp.stack([jnp.asarray(x, jnp.float32) for x in parts.values()])
    usable = jnp.isfinite(stacked).all(axis=(0, 2))[:, None]
    total = sum(weights[name] * advantages(x) for name, x in parts.items())
    total = jnp.where(usable, total, jnp.nan)
    return advantages(total, baseline="group_then_batch")


def _centred(x, baseline):
    """[groups, G] less its baseline: exactly 0 where it is the same throughout."""
    if baseline == "batch":
        kept = jnp.isfinite(x).all(axis=-1, keepdims=True)
        top, least = (f(jnp.where(kept, x, x0)) for f, x0 in _EXTREMES)
        return jnp.where(top == least, 0.0, x - x.mean(where=kept))
    centred = x - x.mean(axis=-1, keepdims=True)
    if baseline == "leave_one_out":
        centred = centred * (x.shape[-1] / (x.shape[-1] - 1))
    # Rounding of the mean must not be blown up to ±1 by a vanishing std.
    return jnp.where((x == x[..., :1]).all(axis=-1, keepdims=True), 0.0, centred)


_EXTREMES = ((jnp.max, -jnp.inf), (jnp.min, jnp.inf))


def _spread(x, baseline):
    """The std that divides advantages, + 1e-6, and 1 where there is no spread."""
    if baseline in ("batch", "group_then_batch"):
        centred = _centred(x, baseline)
        kept = jnp.isfinite(x + centred).all(axis=-1, keepdims=True)
        std = centred.std(where=kept)
        return jnp.where((jnp.where(kept, centred, 0.0) == 0).all(), 1.0, std + 1e-6)
    std = x.std(axis=-1, keepdims=True) + 1e-6
    return jnp.where((x == x[..., :1]).all(axis=-1, keepdims=True), 1.0, std)


# --- Objectives ---------------------------------------------------------------------


def grpo_loss(
    logps,
    old_logps,
    advantages,
    weights,
    start=None,
    *,
    objective: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    ref_logps=None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    importance=None,
):
    """GRPO's objective (docs/method.md, section 4), or a relative of it, as a loss.

    The loss and its gradient are finite whatever the log-probs are, but for NaN: a
    ratio above exp(MAX_LOG_RATIO) counts as that number, and gets no gradient.

    Args:
      logps, old_logps, weights: [B, T] float32; weights are 0 where masked.
      advantages: [B] float32, or [B, T] where a row holds several responses.
      start: [B, T] int32 where a row holds several, as of `token_weights`.
      objective: `grpo` (`clipped_gain` of each token's ratio), `gspo` (that of each
        response's, `sequence_log_ratio`) or `cispo` (`cispo_gain`).
      clip_low, clip_high, dual_clip: as of `clipped_gain`.
      ref_logps: [B, T] float32 of the reference policy; needed where kl_coef > 0.
      kl_coef: weight of the estimate of KL(policy ‖ reference).
      kl_estimator: of `kl_estimate`.
      importance: [B, T] float32, `importance_weights` of the gain where responses were
        drawn from another policy than that of old_logps; None = 1.

    Returns:
      Scalar loss, and a dict of weighted-sum metrics, which add up over micro-batches
      (`ratio_max_error` is a maximum).

    Raises:
      ValueError: unknown objective or KL estimator.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not one of {OBJECTIVES}")
    keep = weights > 0
    kept = lambda x: jnp.where(keep, x, 0.0)
    advantages = advantages.reshape(len(advantages), -1)
    log_ratio = jnp.where(keep, _log_ratio(logps, old_logps), 0.0)
    ratio = jnp.exp(log_ratio)
    clips = {"clip_low": clip_low, "clip_high": clip_high}
    if objective == "cispo":
        gain, is_clipped = cispo_gain(kept(logps), ratio, advantages, **clips)
    else:
        of = ratio
        if objective == "gspo":
            of = jnp.exp(sequence_log_ratio(log_ratio, keep, start))
        gain, is_clipped = clipped_gain(of, advantages, dual_clip=dual_clip, **clips)
    corrected = gain if importance is None else importance * gain
    loss = -jnp.sum(weights * corrected)
    metrics = {
        "clip_fraction": jnp.sum(weights * is_clipped),
        "approx_kl": jnp.sum(weights * (ratio - 1.0 - log_ratio)),
        "ratio_max_error": jnp.max(jnp.abs(ratio - 1.0)),
    }
    if kl_coef:
        estimate = kl_estimate(kept(logps), kept(ref_logps), kl_estimator)
        kl = jnp.sum(weights * estimate)
        metrics["ref_kl"] = kl
        loss = loss + kl_coef * kl
    return loss, metrics


def clipped_gain(
    ratio, advantages, *, clip_low: float, clip_high: float, dual_clip: float = 0.0
):
    """PPO's clipped gain with DAPO's two clips (arXiv 1707.06347, 2503.14476).

    min(ρ A, clip(ρ) A), and where A < 0 no less than `dual_clip` · A (arXiv 1912.09729;
    the same as the two-sided clip of INTELLECT-2, arXiv 2505.07291).

    Args:
      ratio, advantages: float32 of shapes that broadcast.
      clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high].
      dual_clip: above 1; 0 = none.

    Returns:
      The gain, and where it was clipped, so that it has no gradient.
    """
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    is_clipped = gain < ratio * advantages
    if dual_clip:
        least = jnp.where(advantages < 0, dual_clip * advantages, -jnp.inf)
        is_clipped |= gain < least
        gain = jnp.maximum(gain, least)
    return gain, is_clipped


def cispo_gain(logps, ratio, advantages, *, clip_low: float, clip_high: float):
    """CISPO's gain: a clipped importance weight times A · log-prob (arXiv 2506.13585).

    The weight has no gradient, and so a clipped token keeps one. The paper clips from above
    alone, which is clip_low = 1.

    Args and returns are those of `clipped_gain`, and
      logps: float32, as they are trained.
    """
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    weight = jax.lax.stop_gradient(clipped)
    return weight * advantages * _finite(logps), ratio != clipped


def sequence_log_ratio(log_ratio, keep, start=None):
    """GSPO's: the mean log-ratio of a response's tokens, at each (arXiv 2507.18071).

    Its gradient at a token is that of the token's own log-ratio, as in GSPO-token. Summed
    over a response whose tokens have one weight and one advantage, this is the gradient of
    GSPO.

    Args:
      log_ratio: [B, T] float32. keep: [B, T] bool, trained tokens.
      start: as of `grpo_loss`.
    """
    total = response_sums(jnp.where(keep, log_ratio, 0.0), start)
    mean = total / jnp.maximum(response_sums(keep.astype(jnp.float32), start), 1.0)
    own = log_ratio - jax.lax.stop_gradient(log_ratio)
    return jnp.where(keep, jax.lax.stop_gradient(mean) + own, 0.0)


def importance_weights(
    old_logps,
    sampled_logps,
    drawn,
    start=None,
    *,
    mode: str = "token_truncate",
    cap: float,
    floor: float = 0.0,
):
    """Weights that correct for drawing from another policy than the old one.

    The ratio old / sampled, by token, or of a whole response: the product over its tokens.
    `…_truncate` brings it into [floor, cap] (truncated importance sampling; Yao et al. 2025,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"). `…_mask` drops
    what is outside, with weight 0: tokens (IcePop, arXiv 2510.18855) or responses (Liu et
    al. 2025, "When Speed Kills Stability").

    Args:
      old_logps: [..., T] float32, of the trainer before the update.
      sampled_logps: [..., T] float32, as the sampler recorded them.
      drawn: [..., T] bool, trained tokens that the sampler drew; no ratio is of others.
      start: [..., T] int32 where a row holds several responses, as of `token_weights`.
      mode: one of `IMPORTANCE`.
      cap, floor: greater than 0; not negative.

    Returns:
      [..., T] float32. Of a token that was not drawn it is 1, or its response's.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in IMPORTANCE:
        raise ValueError(f"importance={mode!r} is not one of {IMPORTANCE}")
    log_ratio = jnp.where(drawn, _log_ratio(old_logps, sampled_logps), 0.0)
    if mode.startswith("sequence"):
        log_ratio = response_sums(log_ratio, start)
    ratio = jnp.exp(log_ratio)
    if mode.endswith("truncate"):
        weights = jnp.clip(ratio, floor, cap)
    else:
        weights = jnp.where((floor <= ratio) & (ratio <= cap), ratio, 0.0)
    return weights if mode.startswith("sequence") else jnp.where(drawn, weights, 1.0)


def kl_estimate(logps, ref_logps, estimator: str = "k3"):
    """Per-token estimate of KL(policy ‖ reference), of tokens drawn from the policy.

    With d = log-prob − reference log-prob: k1 = d, k2 = d² / 2, k3 = exp(−d) − 1 + d
    (http://joschu.net/blog/kl-approx.html). In a loss what counts is the gradient, whose
    mean is 0 for k1, the gradient of KL(policy ‖ reference) for k2, and the gradient of
    KL(reference ‖ policy) for k3 (arXiv 2506.09477). `k1+` and `k3+` have the value of k1
    and k3 and the gradient of k2, as in verl.

    Args:
      logps, ref_logps: float32 of one shape.

    Raises:
      ValueError: unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={estimator!r} is not one of {KL_ESTIMATORS}")
    if estimator == "k3":
        log_ratio = _log_ratio(ref_logps, logps)
        return jnp.exp(log_ratio) - 1.0 - log_ratio
    difference = _finite(logps) - _finite(ref_logps)
    if estimator == "k1":
        return difference
    k2 = jnp.square(difference) / 2
    if estimator == "k2":
        return k2
    value = jax.lax.stop_gradient(kl_estimate(logps, ref_logps, estimator[:2]))
    return value + k2 - jax.lax.stop_gradient(k2)


def _log_ratio(logps, of_logps):
    """The logarithm of a ratio of probabilities: finite, at most MAX_LOG_RATIO."""
    return jnp.minimum(_finite(logps) - _finite(of_logps), MAX_LOG_RATIO)


def _finite(logps):
    return jnp.clip(logps, -_LARGEST, _LARGEST)
