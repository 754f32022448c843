"""The SFT and GRPO updates.

An update is a pure function of a state and a batch of micro-batches. Token weights are
made for the whole batch first, so micro-batches, and shards, only add up.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pr1_jax import losses
from pr1_jax.model.adapters import Frozen, policy_params
from pr1_jax.model.backend import Backend
from pr1_jax.training.logps import (
    PolicySettings,
    at_lengths,
    over_micro_batches,
    policy_logps,
)
from pr1_jax.training.state import TrainState
from pr1_jax.trajectory import Batch


@dataclasses.dataclass(frozen=True)
class GrpoSettings:
    """Switches of `losses.grpo_loss` and its token weights."""

    objective: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    aggregation: str = "token_mean"
    constant: float = 1.0  # normaliser of `constant`, in tokens


def sft_update(
    state: TrainState,
    batch: Batch,
    frozen: Frozen | None = None,
    *,
    backend: Backend,
    optimizer: optax.GradientTransformation,
    policy: PolicySettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One SFT step on a batch with leading axes [micro-batches, B].

    Args:
      frozen: weights that are not trained, where the state has adapters.
    """

    def loss_fn(params, batch, weights, *, shared):
        logps, _ = policy_logps(backend, params, batch, policy, shared)
        return losses.sft_loss(logps, weights), {}

    weights = _batch_weights(batch)
    inputs = (batch, weights)
    state, loss, metrics = _update(state, frozen, loss_fn, inputs, optimizer, policy)
    return state, {"loss/sft": loss, **metrics}


def grpo_update(
    state: TrainState,
    batch: Batch,
    ref_logps: jax.Array | None = None,
    frozen: Frozen | None = None,
    *,
    backend: Backend,
    optimizer: optax.GradientTransformation,
    policy: PolicySettings,
    grpo: GrpoSettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One GRPO step on a mini-batch with leading axes [micro-batches, B].

    It is skipped where an old log-prob of a trained token is not finite: its sampler had
    no distribution.

    Args:
      frozen: as of `sft_update`.
    """

    def loss_fn(params, batch, weights, ref_logps, *, shared):
        logps, entropies = policy_logps(backend, params, batch, policy, shared)
        loss, metrics = losses.grpo_loss(
            logps,
            batch.old_logps,
            batch.advantages,
            weights,
            batch.start,
            objective=grpo.objective,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            dual_clip=grpo.dual_clip,
            ref_logps=ref_logps,
            kl_coef=grpo.kl_coef,
            kl_estimator=grpo.kl_estimator,
            importance=batch.importance,
        )
        is_known = jnp.isfinite(jnp.where(batch.loss_mask, batch.old_logps, 0.0)).all()
        loss = loss * jnp.where(is_known, 1.0, jnp.nan)  # and so the gradient
        gap = jnp.where(batch.loss_mask, jnp.abs(logps - batch.old_logps), 0.0)
        count = jnp.maximum(all_tokens, 1)
        metrics |= {
            "entropy": jnp.sum(entropies * batch.loss_mask) / count,
            "gap_mean": jnp.sum(gap) / count,
            "gap_max": jnp.max(gap),
        }
        return loss, metrics

    all_tokens = batch.loss_mask.sum()
    weights = _batch_weights(
        batch, aggregation=grpo.aggregation, constant=grpo.constant
    )
    inputs = (batch, weights, ref_logps)
    state, loss, metrics = _update(state, frozen, loss_fn, inputs, optimizer, policy)
    return state, {"loss/grpo": loss, **metrics}


def _batch_weights(batch: Batch, **kwargs: Any) -> jax.Array:
    """`losses.token_weights` over all micro-batches, [micro-batches, B, T]."""
    shape = batch.loss_mask.shape
    flat = lambda x: None if x is None else x.reshape(-1, shape[-1])
    weights = losses.token_weights(flat(batch.loss_mask), flat(batch.start), **kwargs)
    return weights.reshape(shape)


def _update(state, frozen, loss_fn, inputs, optimizer, policy):
    """Sums gradients over micro-batches and applies them."""

    def of_trained(trained, *inputs, shared):
        return loss_fn(policy_params(frozen, trained), *inputs, shared=shared)

    grad_fn = jax.value_and_grad(of_trained, has_aux=True)

    def micro_step(total, _, *inputs):
        gradient = functools.partial(grad_fn, state.params)
        (loss, metrics), grads = at_lengths(gradient, policy, *inputs)
        maxima = {k: v for k, v in metrics.items() if k.endswith(("_max", "max_error"))}
        sums = {k: v for k, v in metrics.items() if k not in maxima}
        added = jax.tree.map(jnp.add, total[0], (loss, sums, grads))
        return added, jax.tree.map(jnp.maximum, total[1], maxima)

    first = jax.tree.map(lambda x: x[0], inputs)
    whole = functools.partial(grad_fn, shared=0)
    (_, metrics), _ = jax.eval_shape(whole, state.params, *first)
    zero = lambda keep: {
        k: jnp.zeros(()) for k in metrics if k.endswith(("_max", "max_error")) == keep
    }
    grads = jax.tree.map(jnp.zeros_like, state.params)
    start = ((jnp.zeros(()), zero(False), grads), zero(True))
    (loss, sums, grads), maxima = over_micro_batches(micro_step, start, *inputs)

    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = sums | maxima
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["skipped"] = (~opt_state.last_finite).astype(jnp.float32)
    metrics["skipped_in_a_row"] = opt_state.notfinite_count.astype(jnp.float32)
    with jax.named_scope("optimizer"):
        params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), loss, metrics
