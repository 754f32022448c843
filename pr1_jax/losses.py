"""SFT and GRPO losses, advantages, token weights: pure functions.

See docs/method.md, section 4. Log-probs of tokens are those of `policy`.
"""

import jax
import jax.numpy as jnp

AGGREGATIONS = ("token_mean", "response_mean", "constant")

# Log-ratios are at most this, so that their exponential is finite, and what a batch sums
# of it. No probability grows by this factor, 5e8, in a step unless something is broken.
MAX_LOG_RATIO = 20.0
_LARGEST = 1e30  # of a log-prob that is not finite


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
        tokens, responses = _of_responses(jnp.asarray(loss_mask, jnp.int32), start)
        return mask / jnp.maximum(tokens, 1) / jnp.maximum(responses, 1)
    if aggregation == "response_mean":
        per_response = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1.0)
        return per_response / jnp.maximum((mask.sum(-1) > 0).sum(), 1)
    if aggregation == "constant":
        return mask / (mask.shape[0] * constant)
    raise ValueError(f"aggregation={aggregation!r} is not one of {AGGREGATIONS}")


def _of_responses(mask, start):
    """Trained tokens of each token's response, [B, T], and responses that have some.

    Args:
      mask: [B, T] int32. start: as of `token_weights`.
    """
    T = mask.shape[1]
    is_first = start == jnp.arange(T)
    is_last = jnp.pad(is_first[:, 1:], [(0, 0), (0, 1)], constant_values=True)
    done = jnp.cumsum(mask, axis=1)
    before = jax.lax.cummax(jnp.where(is_first, done - mask, 0), axis=1)
    after = jax.lax.cummin(jnp.where(is_last, done, T), axis=1, reverse=True)
    tokens = after - before
    return tokens, (is_first & (tokens > 0)).sum()


def sft_loss(logps, weights):
    """Cross-entropy: −Σ weights · logps. Both [B, T] float32; scalar float32."""
    return -jnp.sum(weights * jnp.where(weights > 0, logps, 0.0))


def advantages(rewards, *, normalize_std: bool = True, spread_of=None):
    """Group-relative advantages.

    Args:
      rewards: [groups, G] float.
      normalize_std: divide by std + 1e-6; off gives Dr. GRPO.
      spread_of: [groups, G] float whose std divides, and 1 in a group in which they are
        equal: `rewards` without a part that must not be blown up. None = `rewards`.

    Returns:
      [groups, G] float32; zero where all rewards of a group are equal, and where one of
      them is not finite.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    all_equal = lambda x: (x == x[..., :1]).all(axis=-1, keepdims=True)
    if normalize_std:
        of = rewards if spread_of is None else jnp.asarray(spread_of, jnp.float32)
        std = of.std(axis=-1, keepdims=True) + 1e-6
        centred = centred / jnp.where(all_equal(of), 1.0, std)
    # Rounding of the mean must not be blown up to ±1 by a vanishing std.
    equal = all_equal(rewards)
    usable = jnp.isfinite(rewards + centred).all(axis=-1, keepdims=True)
    return jnp.where(equal | ~usable, 0.0, centred)


def grpo_loss(
    logps,
    old_logps,
    advantages,
    weights,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logps=None,
    kl_coef: float = 0.0,
    importance=None,
):
    """Token-level clipped GRPO objective (docs/method.md, section 4), with DAPO's two clips.

    The loss and its gradient are finite whatever the log-probs are, but for NaN: a
    ratio above exp(MAX_LOG_RATIO) counts as that number, and gets no gradient.

    Args:
      logps, old_logps, weights: [B, T] float32; weights are 0 where masked.
      advantages: [B] float32, or [B, T] where a row holds several responses.
      clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high].
      ref_logps: [B, T] float32 of the reference policy; needed where kl_coef > 0.
      kl_coef: weight of the k3 estimate of KL(policy ‖ reference).
      importance: [B, T] float32, `truncated_importance` where responses were drawn
        from another policy than that of old_logps; None = 1.

    Returns:
      Scalar loss, and a dict of weighted-sum metrics, which add up over micro-batches
      (`ratio_max_error` is a maximum).
    """
    keep = weights > 0
    advantages = advantages.reshape(len(advantages), -1)
    log_ratio = jnp.where(keep, _log_ratio(logps, old_logps), 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    corrected = gain if importance is None else importance * gain
    loss = -jnp.sum(weights * corrected)
    metrics = {
        "clip_fraction": jnp.sum(weights * (gain < ratio * advantages)),
        "approx_kl": jnp.sum(weights * (ratio - 1.0 - log_ratio)),
        "ratio_max_error": jnp.max(jnp.abs(ratio - 1.0)),
    }
    if kl_coef:
        kept = lambda x: jnp.where(keep, x, 0.0)
        kl = jnp.sum(weights * k3_kl(kept(logps), kept(ref_logps)))
        metrics["ref_kl"] = kl
        loss = loss + kl_coef * kl
    return loss, metrics


def truncated_importance(old_logps, sampled_logps, *, cap: float):
    """Weights that correct for drawing from another policy than the old one.

    The ratio old / sampled, at most `cap`, by token (truncated importance sampling;
    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training").

    Args:
      old_logps: float32, of the trainer before the update.
      sampled_logps: float32 of the same shape, as the sampler recorded them.
      cap: greater than 0.
    """
    return jnp.minimum(jnp.exp(_log_ratio(old_logps, sampled_logps)), cap)


def k3_kl(logps, ref_logps):
    """Per-token k3 estimate of KL(policy ‖ reference) [B, T], never negative."""
    log_ratio = _log_ratio(ref_logps, logps)
    return jnp.exp(log_ratio) - 1.0 - log_ratio


def _log_ratio(logps, of_logps):
    """The logarithm of a ratio of probabilities: finite, at most MAX_LOG_RATIO."""
    finite = lambda x: jnp.clip(x, -_LARGEST, _LARGEST)
    return jnp.minimum(finite(logps) - finite(of_logps), MAX_LOG_RATIO)
