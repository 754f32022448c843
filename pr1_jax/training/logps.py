"""Teacher-forced log-probs of the policy."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pr1_jax.model.adapters import with_rows
from pr1_jax.model.backend import Backend
from pr1_jax.model.forward import forward
from pr1_jax.model.params import head_of
from pr1_jax.model.xla import repeat_rows
from pr1_jax.policy import logps_and_entropies, sequence_logps
from pr1_jax.system.mesh import RULES
from pr1_jax.trajectory import Batch


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


def policy_logps(
    backend: Backend,
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
    params = with_rows(params)
    hidden = _predicting(backend, params, batch, policy.group_rows, shared)
    first = max(shared, 1)
    wanted, restore = _trained_span(batch.loss_mask[:, first:], policy.max_trained)

    @jax.named_scope("head")
    def of_rows(head, hidden, *rows):
        def logps_of(hidden, tokens, bans):
            return backend.token_logps(
                {"head": head},
                hidden,
                tokens,
                bans,
                logps_and_entropies,
                special_ids=policy.special_ids,
                num_tokens=policy.num_tokens,
                temperature=policy.temperature or 1.0,
                top_k=policy.top_k,
                top_p=policy.top_p,
            )

        share = policy.logits_chunk * len(hidden) / len(batch.tokens)
        return sequence_logps(hidden, logps_of, *rows, chunk=math.ceil(share))

    # A cast before, so that this is what devices send each other.
    head = head_of(params).astype(hidden.dtype)
    columns = hidden, batch.tokens[:, first:], batch.bans[:, first:]
    out = _by_rows(of_rows, head, *map(wanted, columns))
    logps, entropies = (jnp.pad(restore(x), [(0, 0), (first, 0)]) for x in out)
    return logps, entropies


def _by_rows(
    function: Callable[..., tuple[jax.Array, ...]], whole: jax.Array, *rows: jax.Array
) -> tuple[jax.Array, ...]:
    """Calls a function on each device's own rows, so that it adds up gradients once.

    Left to itself, XLA gathers `whole`, and adds up its gradient, in every chunk of a loop
    inside; or it cuts the product that makes the gradient, and adds up the parts.

    Args:
      function: called with `whole` and `rows`.
      whole: not split by rows. rows: [B, …].
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), RULES["batch"]
    if mesh.empty or math.prod(mesh.shape[axis] for axis in axes) == 1:
        return function(whole, *rows)
    return jax.shard_map(
        function,
        in_specs=(PartitionSpec(), *(PartitionSpec(axes),) * len(rows)),
        out_specs=PartitionSpec(axes),
        axis_names=set(axes),
        check_vma=False,
    )(whole, *rows)


def _predicting(
    backend: Backend, params: Any, batch: Batch, group_rows: int, shared: int
) -> jax.Array:
    """Final hidden states that predict the tokens from max(shared, 1) on, [B, …, D]."""
    # A row of the forward pass is a group: what its rows share, then the rest of each.
    (B, T), G = batch.tokens.shape, group_rows if shared else 1
    attend = backend.training_attention(
        batch.block, batch.path, batch.start, shared=shared, group_rows=G
    )
    tokens, positions = (
        _grouped(x, shared, G) for x in (batch.tokens, batch.positions)
    )
    hidden, _ = forward(backend, params, tokens, positions, attend)
    if not shared:
        return hidden[:, :-1]
    last = repeat_rows(hidden[:, shared - 1 : shared], G)
    rest = hidden[:, shared:].reshape(B, T - shared, -1)
    return jnp.concatenate([last, rest[:, :-1]], axis=1)


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
        inside = jnp.take_along_axis(x, jnp.clip(index, 0, size - 1), axis=1)
        return jnp.where((index >= 0) & (index < size), inside, 0.0)

    return cut, restore


def trained_logps(
    backend: Backend, params: Any, batch: Batch, policy: PolicySettings
) -> jax.Array:
    """Log-probs of trained tokens, of a batch with leading axes [micro-batches, B].

    Returns:
      [micro-batches, B, T] float32; without meaning where `loss_mask` is off.
    """

    T = batch.tokens.shape[-1]

    def logps(batch, *, shared):
        cut, _ = policy_logps(backend, params, batch, policy, shared)
        return jnp.pad(cut, [(0, 0), (0, T - cut.shape[1])])

    def one(every, index, batch):
        return every.at[index].set(at_lengths(logps, policy, batch))

    return over_micro_batches(one, jnp.zeros(batch.tokens.shape), batch)


def over_micro_batches(step: Callable[..., Any], total: Any, *inputs: Any) -> Any:
    """Calls total = step(total, index, *inputs) for each micro-batch in turn.

    Where rows hold several trajectories, the last micro-batches may have none: it ends
    before those.

    Args:
      inputs: trees with leading axis [micro-batches], the first a `Batch`.
    """
    mask = inputs[0].loss_mask
    count = len(mask)
    if inputs[0].start is None:
        one = lambda total, x: (step(total, *x), None)
        return jax.lax.scan(one, total, (jnp.arange(count), *inputs))[0]
    numbers = jnp.arange(1, count + 1)
    used = jnp.max(jnp.where(mask.any(axis=(1, 2)), numbers, 0))

    def one(carry):
        index, total = carry
        take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        return index + 1, step(total, index, *jax.tree.map(take, inputs))

    # The first condition tells a reader of the program how often it runs at most.
    is_left = lambda carry: (carry[0] < count) & (carry[0] < used)
    return jax.lax.while_loop(is_left, one, (jnp.int32(0), total))[1]


def at_lengths(
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
