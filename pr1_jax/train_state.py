"""Training state, optimizer, and the SFT and GRPO updates.

An update is a pure function of a state and a batch of micro-batches. Token weights are
made for the whole batch first, so micro-batches, and shards, only add up.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pr1_jax import attention, cpu_training, losses, model, sharding
from pr1_jax.trajectory import Batch

SCHEDULES = ("constant", "cosine")


@flax.struct.dataclass
class TrainState:
    """All that an update changes."""

    step: jax.Array  # int32, updates so far
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. `steps` counts updates; warm-up is linear, from 0."""

    lr: float
    steps: int
    schedule: str = "constant"
    warmup_share: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global norm; 0 = no clipping
    tag_lr_multiplier: float = 1.0  # of the tags' embedding (and output) rows

    def learning_rate(self) -> optax.Schedule:
        """Learning rate by update, from 0."""
        warmup = round(self.warmup_share * self.steps)
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(self.lr, max(self.steps - warmup, 1))
        elif self.schedule == "constant":
            after = optax.constant_schedule(self.lr)
        else:
            raise ValueError(f"schedule={self.schedule!r} is not one of {SCHEDULES}")
        start = optax.linear_schedule(self.lr / max(warmup, 1), self.lr, max(warmup, 1))
        return optax.join_schedules([start, after], [warmup])


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """What makes logits a policy, and how much of it is held in memory at once."""

    special_ids: tuple[int, ...]
    num_tokens: int | None = None  # ids from here on are padding of the vocabulary
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    logits_chunk: int = 0  # positions; 0 = all
    max_trained: int = 0  # from the first trained token of a row to its last; 0 = any
    query_chunk: int = 512
    attention: str = "auto"  # of `attention.IMPLEMENTATIONS`
    lengths: tuple[int, ...] = ()  # a micro-batch is cut to the shortest that holds it


@dataclasses.dataclass(frozen=True)
class GrpoSettings:
    """Switches of the GRPO loss (spec section 4)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    aggregation: str = "token_mean"
    constant: float = 1.0  # normaliser of `constant`, in tokens


def make_optimizer(
    settings: OptimizerSettings, tag_ids: tuple[int, ...] = ()
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; a non-finite gradient skips the update."""
    parts = []
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    parts.append(optax.scale_by_adam(settings.b1, settings.b2, settings.eps))
    if settings.weight_decay:
        # By name: stacked norm scales and biases have two axes as well.
        decays = lambda path, _: path[-1].key in ("kernel", "embedding", "head")
        matrices = functools.partial(jax.tree_util.tree_map_with_path, decays)
        parts.append(optax.add_decayed_weights(settings.weight_decay, matrices))
    if settings.tag_lr_multiplier != 1.0:
        parts.append(_scale_rows(tag_ids, settings.tag_lr_multiplier))
    parts.append(optax.scale_by_learning_rate(settings.learning_rate()))
    forever = jnp.iinfo(jnp.int32).max
    return optax.apply_if_finite(optax.chain(*parts), max_consecutive_errors=forever)


def _scale_rows(rows: tuple[int, ...], factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of some rows of the embedding and the head."""

    def update(updates, params=None):
        del params
        scale = lambda x: x.at[jnp.array(rows)].multiply(factor)
        named = {n: scale(updates[n]) for n in ("embedding", "head") if n in updates}
        return updates | named

    return optax.stateless(update)


def abstract_state(
    abstract_params: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a state; moments are sharded like parameters.

    Args:
      abstract_params: tree of jax.ShapeDtypeStruct, or arrays, with shardings.
    """
    everywhere = sharding.replicated(mesh)
    struct = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    params = jax.tree.map(lambda x: struct(x, x.sharding), abstract_params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: struct(moment, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: struct(x, everywhere),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(step, params, opt_state)


def from_params(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A fresh state around given parameters."""
    new = lambda params: TrainState(jnp.int32(0), params, optimizer.init(params))
    places = shardings_of(abstract_state(params, optimizer, mesh))
    return jax.jit(new, out_shardings=places)(params)


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)


def policy_logps(
    config: model.ModelConfig, params: Any, batch: Batch, policy: PolicySettings
) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced log-probs and entropies of a batch, both [B, T] float32.

    Entry t speaks of token t, predicted at t − 1; entry 0 is 0. So are those before the
    first trained token where `policy.max_trained` is set: prompts need no logits.
    """

    def attend(q, k, v, cache):
        if config.cpu_kernels:
            return cpu_training.attention(q, k, v, batch.block, batch.path), cache
        out = attention.label_attention(
            q,
            k,
            v,
            batch.block,
            batch.path,
            query_chunk=policy.query_chunk,
            implementation=policy.attention,
        )
        return out, cache

    hidden, _ = model.forward(config, params, batch.tokens, batch.positions, attend)
    wanted, restore = _trained_span(batch.loss_mask[:, 1:], policy.max_trained)
    out = losses.sequence_logps(
        wanted(hidden[:, :-1]),
        lambda hidden: model.logits(params, hidden),
        wanted(batch.tokens[:, 1:]),
        wanted(batch.bans[:, 1:]),
        special_ids=policy.special_ids,
        num_tokens=policy.num_tokens,
        temperature=policy.temperature or 1.0,
        top_k=policy.top_k,
        top_p=policy.top_p,
        chunk=policy.logits_chunk,
    )
    logps, entropies = (jnp.pad(restore(x), [(0, 0), (1, 0)]) for x in out)
    return logps, entropies


def _trained_span(loss_mask: jax.Array, size: int) -> tuple[Callable, Callable]:
    """Cuts `size` positions from each row, from its first trained one, and undoes it.

    Args:
      loss_mask: bool [B, T]. size: 0 = all.

    Returns:
      [B, T, …] to [B, size, …], and [B, size] to [B, T] with 0 elsewhere.
    """
    T = loss_mask.shape[1]
    if not 0 < size < T:
        return (lambda x: x), (lambda x: x)
    first = jnp.minimum(jnp.argmax(loss_mask, axis=1), T - size)[:, None]

    def cut(x):
        index = first + jnp.arange(size)
        return jnp.take_along_axis(x, jnp.expand_dims(index, range(2, x.ndim)), axis=1)

    def restore(x):
        index = jnp.arange(T) - first
        found = jnp.take_along_axis(x, jnp.clip(index, 0, size - 1), axis=1)
        return jnp.where((index >= 0) & (index < size), found, 0.0)

    return cut, restore


def trained_logps(
    config: model.ModelConfig, params: Any, batch: Batch, policy: PolicySettings
) -> jax.Array:
    """Log-probs of trained tokens, of a batch with leading axes [micro-batches, B].

    Returns:
      [micro-batches, B, T] float32; without meaning where `loss_mask` is off.
    """

    def one(batch):
        T = batch.tokens.shape[-1]

        def logps(batch):
            found, _ = policy_logps(config, params, batch, policy)
            return jnp.pad(found, [(0, 0), (0, T - found.shape[1])])

        return _at_length(logps, policy.lengths, batch.loss_mask, batch)

    return jax.lax.map(one, batch)


def _at_length(
    function: Callable[..., Any],
    lengths: tuple[int, ...],
    loss_mask: jax.Array,
    *inputs: Any,
) -> Any:
    """Calls a function on inputs that are cut behind the last trained token.

    What stands behind it changes no earlier logit. The cut is at the shortest of
    `lengths` that will do, so that all of them are compiled, and one is run.

    Args:
      loss_mask: bool [B, T]. inputs: trees of [B, T, …] and [B].
    """
    T = loss_mask.shape[1]
    lengths = (*sorted(n for n in lengths if n < T), T)
    used = jnp.max(jnp.where(loss_mask, jnp.arange(1, T + 1), 0))

    def branch(n):
        cut = lambda x: x[:, :n] if x.ndim > 1 else x
        return lambda *inputs: function(*jax.tree.map(cut, inputs))

    index = jnp.searchsorted(jnp.array(lengths), used)
    return jax.lax.switch(index, [branch(n) for n in lengths], *inputs)


def sft_update(
    state: TrainState,
    batch: Batch,
    *,
    config: model.ModelConfig,
    optimizer: optax.GradientTransformation,
    policy: PolicySettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One SFT step on a batch with leading axes [micro-batches, B]."""

    def loss_fn(params, batch, weights):
        logps, _ = policy_logps(config, params, batch, policy)
        return losses.sft_loss(logps, weights), {}

    weights = _batch_weights(batch.loss_mask)
    inputs = (batch, weights)
    state, loss, metrics = _update(state, loss_fn, inputs, optimizer, policy.lengths)
    return state, {"loss/sft": loss, **metrics}


def grpo_update(
    state: TrainState,
    batch: Batch,
    ref_logps: jax.Array | None = None,
    *,
    config: model.ModelConfig,
    optimizer: optax.GradientTransformation,
    policy: PolicySettings,
    grpo: GrpoSettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One GRPO step on a mini-batch with leading axes [micro-batches, B]."""

    def loss_fn(params, batch, weights, ref_logps):
        logps, entropies = policy_logps(config, params, batch, policy)
        loss, metrics = losses.grpo_loss(
            logps,
            batch.old_logps,
            batch.advantages,
            weights,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            ref_logps=ref_logps,
            kl_coef=grpo.kl_coef,
            importance=batch.importance,
        )
        gap = jnp.abs(logps - batch.old_logps) * batch.loss_mask
        count = jnp.maximum(all_tokens, 1)
        metrics |= {
            "entropy": jnp.sum(entropies * batch.loss_mask) / count,
            "gap_mean": jnp.sum(gap) / count,
            "gap_max": jnp.max(gap),
        }
        return loss, metrics

    all_tokens = batch.loss_mask.sum()
    weights = _batch_weights(
        batch.loss_mask, aggregation=grpo.aggregation, constant=grpo.constant
    )
    inputs = (batch, weights, ref_logps)
    state, loss, metrics = _update(state, loss_fn, inputs, optimizer, policy.lengths)
    return state, {"loss/grpo": loss, **metrics}


def _batch_weights(loss_mask: jax.Array, **kwargs: Any) -> jax.Array:
    """`losses.token_weights` over all micro-batches, [micro-batches, B, T]."""
    flat = loss_mask.reshape(-1, loss_mask.shape[-1])
    return losses.token_weights(flat, **kwargs).reshape(loss_mask.shape)


def _update(state, loss_fn, inputs, optimizer, lengths):
    """Sums gradients over micro-batches and applies them."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def micro_step(total, inputs):
        at_length = functools.partial(grad_fn, state.params)
        loss_mask = inputs[0].loss_mask
        (loss, metrics), grads = _at_length(at_length, lengths, loss_mask, *inputs)
        maxima = {k: v for k, v in metrics.items() if k.endswith(("_max", "max_error"))}
        sums = {k: v for k, v in metrics.items() if k not in maxima}
        added = jax.tree.map(jnp.add, total[0], (loss, sums, grads))
        return (added, jax.tree.map(jnp.maximum, total[1], maxima)), None

    first = jax.tree.map(lambda x: x[0], inputs)
    (_, metrics), _ = jax.eval_shape(grad_fn, state.params, *first)
    zero = lambda keep: {
        k: jnp.zeros(()) for k in metrics if k.endswith(("_max", "max_error")) == keep
    }
    grads = jax.tree.map(jnp.zeros_like, state.params)
    start = ((jnp.zeros(()), zero(False), grads), zero(True))
    ((loss, sums, grads), maxima), _ = jax.lax.scan(micro_step, start, inputs)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = sums | maxima
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["skipped"] = (~opt_state.last_finite).astype(jnp.float32)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), loss, metrics
