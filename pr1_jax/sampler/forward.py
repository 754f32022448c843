"""The model's side of decoding: prefill, a decode step over the cache, the causal rejoin.

A row's keys and values lie in two caches. Those of its prompt are kept once for all rows
that respond to it. Those of its response are its own, in as many slots as the batch has
come to need. Token-wise work (embedding, projections, MLP, head) runs on a flat list of
live lanes; how attention goes over both caches is the backend's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pr1_jax.model.backend import Backend
from pr1_jax.model.forward import forward
from pr1_jax.model.xla import Prompts, Step
from pr1_jax.sampler.settings import END_PARALLEL, Vocab
from pr1_jax.sampler.state import (
    DONE,
    NEWLINE,
    DecodeFn,
    Lanes,
    PromptCache,
    State,
    lane_paths,
)


def model_decode(backend: Backend, readers: int) -> DecodeFn:
    """The real decode function: feeds lanes through the model and its caches.

    Args:
      readers: rows that an entry of the prompt cache can have.
    """

    def decode_lanes(params, lanes: Lanes, state: State, num_lanes: int):
        B, P = state.token.shape
        P = 1 if num_lanes == B else P  # no lane but the first of a row is live
        path = lane_paths(state)[:, :P]
        prompts = _prompts(state, readers)
        none = len(prompts.length) * readers
        step = Step(
            row=lanes.row,
            index=lanes.index,
            slot=lanes.slot,
            count=lanes.live,
            live=state.live[:, :P],
            block=jnp.where(path > 0, state.blocks[:, None], 0),
            path=path,
            # Every emitted token is fed in the step after it, so that the slots before
            # `emitted` are filled when attention comes, this step's own included.
            filled=state.emitted,
            slot_block=state.slot_block,
            slot_path=state.slot_path,
            prompts=prompts,
            reader=jnp.where(state.phase == DONE, none, state.reader),
        )
        hidden, cache = forward(
            backend,
            params,
            lanes.token,
            lanes.position,
            backend.step_attention(step),
            _caches(state),
            live=lanes.live,
        )
        with jax.named_scope("head"):
            return backend.logits(params, hidden, lanes.live), cache

    return decode_lanes


def prefill(
    backend: Backend, params, prompts: PromptCache, tokens, lengths, entries
) -> PromptCache:
    """Puts keys and values of prompts into their entries of the cache; no logits.

    Args:
      tokens: [W, T] int32, right-padded. lengths: [W] int32.
      entries: [W] int32 among the M of the cache; M = unused, and so are all that follow.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    _, cache = forward(
        backend,
        params,
        tokens,
        positions,
        backend.prefill_attention(entries),
        prompts.cache,
        live=tokens.shape[1] * jnp.sum(entries < len(prompts.length)),
    )
    length = prompts.length.at[entries].set(lengths, mode="drop")
    return PromptCache(length, cache)


class Blocks(NamedTuple):
    """W blocks that are closed, one a row."""

    rows: jax.Array  # [W] int32, waiting rows; B = unused, and so are all that follow
    tokens: jax.Array  # [W, T] int32, path tokens in canonical order
    first_slot: jax.Array  # [W] int32, slot of the first of them; they lie side by side
    length: jax.Array  # [W] int32


def rejoin(
    backend: Backend | None,
    vocab: Vocab,
    readers: int,
    params,
    state: State,
    blocks: Blocks,
) -> State:
    """Causal variant: recomputes closed blocks' keys and values in canonical order.

    Args:
      backend: None where no cache is kept.

    Returns:
      The state, with `</Parallel>` pending on lane 0 of those rows.
    """
    rows, tokens, first_slot, length = blocks
    (B, P), T, S = state.token.shape, tokens.shape[1], state.slot_path.shape[1]
    row, offset = jnp.clip(rows, 0, B - 1), jnp.arange(T)
    cache = state.cache
    if backend is not None:
        slot = jnp.where(offset < length[:, None], first_slot[:, None] + offset, S)
        prompts = _prompts(state, readers)
        entry = jnp.minimum(state.reader[row] // readers, len(prompts.length) - 1)
        _, cache = forward(
            backend,
            params,
            tokens,
            (state.prompt_length[row] + first_slot)[:, None] + offset,
            backend.rejoin_attention(rows, slot, entry, prompts),
            _caches(state),
            live=T * jnp.sum(rows < B),
        )
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
        steps=state.steps + joined,
    )


def _prompts(state: State, readers: int) -> Prompts:
    slots = state.prompts.cache[0][-1].shape[2]
    return Prompts(state.prompts.length, slots, readers)


def _caches(state: State):
    """A row's own cache and its prompt's, by layer."""
    return tuple(zip(state.cache, state.prompts.cache))
