"""Caches of keys and values."""

import jax
import jax.numpy as jnp

from pr1_jax.kernels.cpu import decoding
from pr1_jax.model.config import ModelConfig
from pr1_jax.sampler.state import State


def empty(config: ModelConfig, rows: int, slots: int):
    """Zeros: one (keys [rows, K, H, slots], values [rows, K, slots, H]) a layer.

    With `config.cpu_kernels`, here and in all that is given such a cache, keys are packed
    (`cpu_kernels.pack_keys`).
    """
    K, H = config.num_kv_heads, config.head_dim
    zeros = lambda *shape: jnp.zeros((rows, K, *shape), config.dtype)
    return tuple(
        (packed(config, zeros(H, slots)), zeros(slots, H))
        for _ in range(config.num_layers)
    )


def packed(config: ModelConfig, keys):
    return decoding.pack_keys(keys) if config.cpu_kernels else keys


def rows_of(layer, rows):
    """Keys [W, K, H, S], whether packed or not, and values [W, K, S, H] of some rows."""
    keys, values = (x[rows] for x in layer)
    if keys.ndim == 5:
        keys = decoding.unpack_keys(keys)[..., : values.shape[2]]
    return keys, values


def with_slots(cache, slots: int):
    """The same cache over more slots; over as many as it has, if these are no more."""

    def pad(x, axis, size):
        more = max(size - x.shape[axis], 0)
        return jnp.pad(x, [(0, more * (i == axis)) for i in range(x.ndim)])

    def pad_keys(keys):
        if keys.ndim == 4:
            return pad(keys, 3, slots)
        return pad(keys, 2, decoding.packed_slot(slots - 1)[0] + 1)

    return tuple((pad_keys(keys), pad(values, 2, slots)) for keys, values in cache)


def grow(state: State, slots: int) -> State:
    """The same state over more response slots."""
    more = slots - state.slot_path.shape[1]
    pad = lambda labels: jnp.pad(labels, [(0, 0), (0, more)])
    return state.replace(
        slot_block=pad(state.slot_block),
        slot_path=pad(state.slot_path),
        cache=with_slots(state.cache, slots) if state.cache else None,
    )


def take(state: State, rows, prompts, seats) -> State:
    """Some rows of a state and some of its prompts.

    Args:
      rows: [B'] int32. prompts: [M'] int32.
      seats: [B'] int32, the rows' seats among the prompts that are taken.
    """
    some_prompts = jax.tree.map(lambda x: x[prompts], state.prompts)
    some_rows = jax.tree.map(lambda x: x[rows], state.replace(prompts=None))
    return some_rows.replace(seat=seats, prompts=some_prompts)
