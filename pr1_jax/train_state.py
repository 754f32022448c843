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
import numpy as np
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
    # Rows of a micro-batch come in groups of so many. First tokens that the rows of each
    # group share are computed once, as many as the largest of these numbers allows.
    group_rows: int = 1
    shared_lengths: tuple[int, ...] = ()

    def sizes(self, max_tokens: int) -> list[tuple[int, tuple[int, ...]]]:
        """What micro-batches are cut to, ascending, each with what rows may share."""
        numbers = (0, *sorted(self.shared_lengths)) if self.group_rows > 1 else (0,)
        lengths = (*sorted(n for n in self.lengths if n < max_tokens), max_tokens)
        return [(n, tuple(s for s in numbers if s < n)) for n in lengths]

    def size_of(self, used: int, common: int, max_tokens: int) -> tuple[int, int]:
        """What a micro-batch is cut to, and how many first tokens are shared.

        Args:
          used: tokens of its longest row. common: first tokens that rows have in common.
        """
        size, numbers = next(x for x in self.sizes(max_tokens) if x[0] >= used)
        return size, max(s for s in numbers if s <= common)


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
    config: model.ModelConfig,
    params: Any,
    batch: Batch,
    policy: PolicySettings,
    shared: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced log-probs and entropies of a batch, both [B, T] float32.

    Entry t speaks of token t, predicted at t − 1; entry 0 is 0. So are those before the
    first trained token where `policy.max_trained` is set: prompts need no logits.

    Args:
      shared: first tokens, untrained, that the rows of each group of
        `policy.group_rows` have in common: they are computed once for all of them.
    """
    hidden = _predicting(config, params, batch, policy, shared)
    first = max(shared, 1)
    wanted, restore = _trained_span(batch.loss_mask[:, first:], policy.max_trained)
    settings = {
        "special_ids": policy.special_ids,
        "num_tokens": policy.num_tokens,
        "temperature": policy.temperature or 1.0,
    }
    limits = {"top_k": policy.top_k, "top_p": policy.top_p}

    def logps_of(hidden, *targets):
        if config.cpu_kernels and not policy.top_k and policy.top_p >= 1.0:
            head = model.head(params).astype(hidden.dtype)
            return cpu_training.token_logps(hidden, head, *targets, **settings)
        logits = model.logits(params, hidden)
        return losses.logps_and_entropies(logits, *targets, **settings, **limits)

    out = losses.sequence_logps(
        wanted(hidden),
        logps_of,
        wanted(batch.tokens[:, first:]),
        wanted(batch.bans[:, first:]),
        chunk=policy.logits_chunk,
    )
    logps, entropies = (jnp.pad(restore(x), [(0, 0), (first, 0)]) for x in out)
    return logps, entropies


def _predicting(
    config: model.ModelConfig,
    params: Any,
    batch: Batch,
    policy: PolicySettings,
    shared: int,
) -> jax.Array:
    """Final hidden states that predict the tokens from max(shared, 1) on, [B, …, D]."""
    # A row of the forward pass is a group: what its rows share, then the rest of each.
    (B, T), G = batch.tokens.shape, policy.group_rows if shared else 1
    grouped = lambda x: _grouped(x, shared, G)
    rest = lambda x: x[:, shared:].reshape(B, T - shared, *x.shape[2:])

    def to_all(x):  # [B / G, …] to [B, …]
        every = jnp.broadcast_to(x[:, None], (B // G, G, *x.shape[1:]))
        return every.reshape(B, *x.shape[1:])

    def attend(q, k, v, cache):
        labels = batch.block, batch.path
        if config.cpu_kernels:
            return cpu_training.attention(q, k, v, *labels, shared), cache
        attention_of = functools.partial(
            attention.label_attention,
            query_chunk=policy.query_chunk,
            implementation=policy.attention,
        )
        if not shared:
            return attention_of(q, k, v, *labels), cache
        first = [x[:, :shared] for x in (q, k, v)]
        nothing = jnp.zeros((B // G, shared), jnp.int32)
        of_shared = attention_of(*first, nothing, nothing)
        whole = lambda x: jnp.concatenate([to_all(x[:, :shared]), rest(x)], axis=1)
        of_rest = attention_of(rest(q), whole(k), whole(v), *labels)
        of_rest = of_rest.reshape(B // G, -1, *q.shape[2:])
        return jnp.concatenate([of_shared, of_rest], axis=1), cache

    tokens, positions = grouped(batch.tokens), grouped(batch.positions)
    hidden, _ = model.forward(config, params, tokens, positions, attend)
    if not shared:
        return hidden[:, :-1]
    last = to_all(hidden[:, shared - 1 : shared])
    return jnp.concatenate([last, rest(hidden)[:, :-1]], axis=1)


def _grouped(x: jax.Array, shared: int, group_rows: int) -> jax.Array:
    """[B, T] to [B / G, shared + G (T − shared)]: G rows in one, what they share once."""
    rows = x.reshape(-1, group_rows, x.shape[1])
    rest = rows[:, :, shared:].reshape(len(rows), -1)
    return jnp.concatenate([rows[:, 0, :shared], rest], axis=1)


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

        def logps(batch, *, shared):
            found, _ = policy_logps(config, params, batch, policy, shared)
            return jnp.pad(found, [(0, 0), (0, T - found.shape[1])])

        return _at_lengths(logps, policy, batch)

    return jax.lax.map(one, batch)


def _at_lengths(
    function: Callable[..., Any], policy: PolicySettings, batch: Batch, *inputs: Any
) -> Any:
    """Calls a function on inputs that are cut behind the last trained token.

    What stands behind it changes no earlier logit. The cut is at the shortest of
    `policy.lengths` that will do, and first tokens are shared by the largest of
    `policy.shared_lengths` that all rows of the batch allow. All pairs of the two are
    compiled, and one is run.

    Args:
      function: called with the batch, `inputs`, and `shared` by name.
      inputs: trees of [B, T, …] and [B].
    """
    T = batch.loss_mask.shape[1]
    used = jnp.max(jnp.where(batch.loss_mask, jnp.arange(1, T + 1), 0))

    def branch(n, shared):
        cut = lambda x: x[:, :n] if x.ndim > 1 else x
        shape = functools.partial(function, shared=shared)
        return lambda *inputs: shape(*jax.tree.map(cut, inputs))

    lengths, numbers = zip(*policy.sizes(T))
    branches = [branch(n, s) for n, some in zip(lengths, numbers) for s in some]
    # A longer row may share all that a shorter one may.
    counts = np.array([len(some) for some in numbers])
    length = jnp.searchsorted(jnp.array(lengths), used)
    common = jnp.min(batch.shared)
    index = jnp.searchsorted(jnp.array(numbers[-1]), common, side="right") - 1
    index = jnp.minimum(index, jnp.array(counts - 1)[length])
    first = jnp.array(np.cumsum(counts) - counts)[length]
    return jax.lax.switch(first + index, branches, batch, *inputs)


def sft_update(
    state: TrainState,
    batch: Batch,
    *,
    config: model.ModelConfig,
    optimizer: optax.GradientTransformation,
    policy: PolicySettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One SFT step on a batch with leading axes [micro-batches, B]."""

    def loss_fn(params, batch, weights, *, shared):
        logps, _ = policy_logps(config, params, batch, policy, shared)
        return losses.sft_loss(logps, weights), {}

    weights = _batch_weights(batch.loss_mask)
    inputs = (batch, weights)
    state, loss, metrics = _update(state, loss_fn, inputs, optimizer, policy)
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

    def loss_fn(params, batch, weights, ref_logps, *, shared):
        logps, entropies = policy_logps(config, params, batch, policy, shared)
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
    state, loss, metrics = _update(state, loss_fn, inputs, optimizer, policy)
    return state, {"loss/grpo": loss, **metrics}


def _batch_weights(loss_mask: jax.Array, **kwargs: Any) -> jax.Array:
    """`losses.token_weights` over all micro-batches, [micro-batches, B, T]."""
    flat = loss_mask.reshape(-1, loss_mask.shape[-1])
    return losses.token_weights(flat, **kwargs).reshape(loss_mask.shape)


def _update(state, loss_fn, inputs, optimizer, policy):
    """Sums gradients over micro-batches and applies them."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def micro_step(total, inputs):
        at_lengths = functools.partial(grad_fn, state.params)
        (loss, metrics), grads = _at_lengths(at_lengths, policy, *inputs)
        maxima = {k: v for k, v in metrics.items() if k.endswith(("_max", "max_error"))}
        sums = {k: v for k, v in metrics.items() if k not in maxima}
        added = jax.tree.map(jnp.add, total[0], (loss, sums, grads))
        return (added, jax.tree.map(jnp.maximum, total[1], maxima)), None

    first = jax.tree.map(lambda x: x[0], inputs)
    whole = functools.partial(grad_fn, shared=0)
    (_, metrics), _ = jax.eval_shape(whole, state.params, *first)
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
