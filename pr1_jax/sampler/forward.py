"""The model's side of decoding: prefill, a step over the cache, the causal rejoin.

A row's keys and values lie in two parts. Those of its prompt are kept once for all
rows that respond to it; every group of rows reads them together. Those of its response
are its own, in as many slots as the batch has come to need. Both parts are attended
to apart and merged by their normalisers.

Token-wise work (embedding, projections, MLP, head) runs on a flat list of live lanes;
attention regroups them by row. Keys are held as [B, K, H, S] and values as
[B, K, S, H]: in this order both products of a decode step read memory along its last
axis. With the kernels of `cpu_kernels`, keys of 16 slots stand together.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pr1_jax import layout
from pr1_jax.kernels import attention
from pr1_jax.kernels.attention import group_queries, ungroup_queries
from pr1_jax.kernels.cpu import decoding
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.cpu import pack_matrices
from pr1_jax.model.forward import forward, logits
from pr1_jax.model.params import compute_params, fuse_projections
from pr1_jax.sampler.cache import packed, rows_of
from pr1_jax.sampler.settings import END_PARALLEL, Vocab
from pr1_jax.sampler.state import (
    DONE,
    NEWLINE,
    DecodeFn,
    Lanes,
    Prompts,
    State,
    lane_paths,
)


def decoding_config(config: ModelConfig) -> ModelConfig:
    """The config that goes with `decoding_params`."""
    return dataclasses.replace(config, scan_layers=False, remat=False, fused=True)


def decoding_params(config: ModelConfig, params: Any) -> Any:
    """Parameters as the decode loop reads them: in its dtype, layers apart and fused.

    With `config.cpu_kernels`, matrices are packed, too. A cast, or a layer's slice of a
    stack, is thereby made once and not at every step.
    """
    params = dict(compute_params(config, params))
    if config.scan_layers:
        stacked = params.pop("layers")
        for i in range(config.num_layers):
            params[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
    for i in range(config.num_layers):
        name = f"layer_{i}"
        params[name] = fuse_projections(config, params[name])
    return pack_matrices(config, params) if config.cpu_kernels else params


_QUERIES = 256  # whose scores a rejoin holds at once


class Part(NamedTuple):
    """Attention over a part of the keys, to be merged with others."""

    out: jax.Array  # [B, K, Q, H] float32, not normalised
    top: jax.Array  # [B, K, Q, 1] float32, greatest score
    total: jax.Array  # [B, K, Q, 1] float32, sum of exp(score − top)


def mask_bias(mask, config: ModelConfig) -> jax.Array:
    """What to add to the scores [B, K, T · R, S] under a mask, bool [B, T, S].

    It is the same for all layers, and made once: XLA would make it anew in each.
    """
    bias = jnp.where(mask, 0.0, attention.NEG_INF)[:, None]
    bias = jnp.repeat(bias, config.num_heads // config.num_kv_heads, axis=2)
    return jax.lax.optimization_barrier(bias)


def attend_part(q, keys, values, bias) -> Part:
    """Attends to some of the keys.

    Args:
      q: [B, K, Q, H]. keys: [B, K, H, S]. values: [B, K, S, H].
      bias: float32, of `mask_bias`; broadcasts to [B, K, Q, S]. Where it hides all,
        the part has no weight beside one that it does not hide.
    """
    scores = jnp.einsum("BKQH,BKHS->BKQS", q, keys, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5 + bias
    top = scores.max(axis=-1, keepdims=True)
    probs = jnp.exp(scores - top)
    out = jnp.einsum(
        "BKQS,BKSH->BKQH",
        probs.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return Part(out, top, probs.sum(axis=-1, keepdims=True))


def merge(a: Part, b: Part) -> jax.Array:
    """Attention [B, K, Q, H] over the keys of both parts."""
    top = jnp.maximum(a.top, b.top)
    weight_a, weight_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    total = a.total * weight_a + b.total * weight_b
    return (a.out * weight_a + b.out * weight_b) / total


def slot_mask(state: State) -> jax.Array:
    """Which response slots each lane's query may see, bool [B, P, S].

    Every emitted token is fed in the step after it, so at attention time the slots
    before `emitted` are filled, this step's own included.
    """
    path = lane_paths(state)
    block = jnp.where(path > 0, state.blocks[:, None], 0)
    labels = layout.visible_labels(
        block[..., None],
        path[..., None],
        state.slot_block[:, None],
        state.slot_path[:, None],
    )
    filled = jnp.arange(state.slot_path.shape[1]) < state.emitted[:, None]
    return labels & filled[:, None]


def _prompt_bias(prompts: Prompts) -> jax.Array:
    """What to add to the scores of prompts, [M, 1, 1, T]."""
    T = prompts.cache[0][1].shape[2]
    seen = jnp.arange(T) < prompts.length[:, None]
    bias = jnp.where(seen, 0.0, attention.NEG_INF)[:, None, None]
    return jax.lax.optimization_barrier(bias)


def _attend_prompts(q, keys, values, bias, state: State, seats: int) -> Part:
    """Attends to each row's prompt; a prompt's keys are read once for all its rows.

    Args:
      q: [B, K, Q, H]. keys: [M, K, H, T]. values: [M, K, T, H]. bias: [M, 1, 1, T].
      seats: rows that a prompt can have. With one, row b reads prompt b.
    """
    (B, K, Q, H), M = q.shape, keys.shape[0]
    if seats == 1:
        return attend_part(q, keys, values, bias)
    seat = jnp.where(state.phase == DONE, M * seats, state.seat)
    seated = jnp.full(M * seats, B).at[seat].set(jnp.arange(B), mode="drop")
    q = q.at[seated].get(mode="fill", fill_value=0).reshape(M, seats, K, Q, H)
    part = attend_part(q.swapaxes(1, 2).reshape(M, K, -1, H), keys, values, bias)

    def unseat(x):
        x = x.reshape(M, K, seats, Q, -1).swapaxes(1, 2)
        return x.reshape(M * seats, K, Q, -1)[jnp.minimum(seat, M * seats - 1)]

    return Part(*map(unseat, part))


def model_decode(config: ModelConfig, seats: int) -> DecodeFn:
    """The real decode function: feeds lanes through the model and its cache.

    Args:
      seats: rows that a prompt in `State.prompts` can have.
    """
    config = decoding_config(config)

    if config.cpu_kernels:
        return _decode_on_cpu(config, seats)

    def decode_lanes(params, lanes: Lanes, state: State, num_lanes: int):
        B, P = state.token.shape
        P = 1 if num_lanes == B else P  # no lane but the first of a row is live
        bias = mask_bias(slot_mask(state)[:, :P], config)
        prompt_bias = _prompt_bias(state.prompts)
        # A prompt's last token is in its cache already: written past the end, dropped.
        slot = jnp.where(lanes.slot < 0, bias.shape[-1], lanes.slot)
        # Where each of the B · P lanes stands in the flat list (dead ones: anywhere).
        place = jnp.clip(jnp.cumsum(state.live[:, :P].ravel()) - 1, 0)
        index = jnp.clip(lanes.index, 0, B * P - 1)

        def attend(q, k, v, cache):
            (keys, values), prompt_cache = cache
            keys = keys.at[lanes.row, :, :, slot].set(k, mode="drop")
            values = values.at[lanes.row, :, slot].set(v, mode="drop")
            q = (q[place] if P > 1 else q).reshape(B, P, *q.shape[1:])
            grouped = group_queries(q, k.shape[-2])
            own = attend_part(grouped, keys, values, bias)
            shared = _attend_prompts(grouped, *prompt_cache, prompt_bias, state, seats)
            out = ungroup_queries(merge(own, shared), q)
            out = out.reshape(B * P, *q.shape[2:])
            return (out[index] if P > 1 else out), (keys, values)

        caches = tuple(zip(state.cache, state.prompts.cache))
        hidden, cache = forward(
            config, params, lanes.token, lanes.position, attend, caches
        )
        return logits(params, hidden), cache

    return decode_lanes


def _decode_on_cpu(config: ModelConfig, seats: int) -> DecodeFn:
    """`model_decode` with the attention of `cpu_kernels`, by lane and not by row."""

    def decode_lanes(params, lanes: Lanes, state: State, num_lanes: int):
        paths = lane_paths(state)
        if num_lanes == len(paths):  # lane 0 of every row, maybe the last of its block
            paths = paths[:, 0]
        else:
            paths = paths.ravel().at[lanes.index].get(mode="fill", fill_value=0)
        blocks = state.blocks.at[lanes.row].get(mode="fill", fill_value=0)
        blocks = jnp.where(paths > 0, blocks, 0)
        prompt = jnp.minimum(state.seat // seats, len(state.prompts.length) - 1)

        def attend(q, k, v, cache):
            own, shared = cache
            return decoding.attend(
                *(q, k, v, own, shared),
                lanes=(lanes.row, lanes.slot, blocks, paths),
                filled=state.emitted,
                slot_labels=(state.slot_block, state.slot_path),
                prompt=prompt,
                prompt_length=state.prompts.length,
            )

        caches = tuple(zip(state.cache, state.prompts.cache))
        hidden, cache = forward(
            *(config, params, lanes.token, lanes.position, attend, caches),
            live=lanes.live,
        )
        return logits(params, hidden, lanes.live), cache

    return decode_lanes


def prefill(
    config: ModelConfig, params, prompts: Prompts, tokens, lengths, places
) -> Prompts:
    """Puts keys and values of prompts in their places; no logits.

    Args:
      tokens: [W, T] int32, right-padded. lengths: [W] int32.
      places: [W] int32 among the M prompts; M = unused, and so are all that follow.
    """
    config = decoding_config(config)
    zeros = jnp.zeros_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    live = tokens.shape[1] * jnp.sum(places < len(prompts.length))

    def attend(q, k, v, cache):
        out = attention.label_attention(q, k, v, zeros, zeros, implementation="xla")
        fresh = packed(config, k.transpose(0, 2, 3, 1)), v.transpose(0, 2, 1, 3)
        return out, tuple(
            old.at[places].set(new, mode="drop") for old, new in zip(cache, fresh)
        )

    args = tokens, positions, attend, prompts.cache
    _, cache = forward(config, params, *args, live=live)
    length = prompts.length.at[places].set(lengths, mode="drop")
    return Prompts(length, cache)


def rejoin(
    config: ModelConfig,
    vocab: Vocab,
    seats: int,
    params,
    state: State,
    rows,
    tokens,
    first_slot,
    length,
) -> State:
    """Causal variant: recomputes closed blocks' keys and values in canonical order.

    Args:
      rows: [W] int32, waiting rows; B = unused, and so are all that follow.
      tokens: [W, T] int32, each block's path tokens in canonical order.
      first_slot: [W] int32, slot of the first of them; they lie side by side.
      length: [W] int32.

    Returns:
      The state, with `</Parallel>` pending on lane 0 of those rows.
    """
    (B, P), T, S = state.token.shape, tokens.shape[1], state.slot_path.shape[1]
    row, offset = jnp.clip(rows, 0, B - 1), jnp.arange(T)
    slot = jnp.where(offset < length[:, None], first_slot[:, None] + offset, S)

    cache = state.cache
    if cache is not None:
        config = decoding_config(config)
        prompt = jnp.minimum(state.seat[row] // seats, len(state.prompts.length) - 1)
        prompt_bias = _prompt_bias(state.prompts)[prompt]

        def attend(q, k, v, cache):
            (keys, values), shared = cache
            if config.cpu_kernels:
                chunk, place = decoding.packed_slot(slot)
                keys = keys.at[rows[:, None], :, chunk, :, place].set(k, mode="drop")
            else:
                keys = keys.at[rows[:, None], :, :, slot].set(k, mode="drop")
            values = values.at[rows[:, None], :, slot].set(v, mode="drop")
            own = rows_of((keys, values), row)
            prompts = rows_of(shared, prompt)
            out = []
            for first in range(0, T, _QUERIES):
                some = slice(first, first + _QUERIES)
                bias = mask_bias(jnp.arange(S) <= slot[:, some, None], config)
                grouped = group_queries(q[:, some], k.shape[-2])
                part = attend_part(grouped, *own, bias)
                part = merge(part, attend_part(grouped, *prompts, prompt_bias))
                out.append(ungroup_queries(part, q[:, some]))
            return jnp.concatenate(out, axis=1), (keys, values)

        positions = (state.prompt_length[row] + first_slot)[:, None] + offset
        caches = tuple(zip(state.cache, state.prompts.cache))
        args = tokens, positions, attend, caches
        cache = forward(config, params, *args, live=T * jnp.sum(rows < B))[1]

    lane0 = jnp.zeros((B, P), bool).at[rows, 0].set(True, mode="drop")
    joined = lane0.any(axis=1)
    end = state.emitted[:, None]
    return state.replace(
        cache=cache,
        token=jnp.where(lane0, vocab.special_ids[END_PARALLEL], state.token),
        position=jnp.where(lane0, state.prompt_length[:, None] + end, state.position),
        slot=jnp.where(lane0, end, state.slot),
        live=state.live | lane0,
        phase=jnp.where(joined, NEWLINE, state.phase),
        emitted=state.emitted + joined,
    )
