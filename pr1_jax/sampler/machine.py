"""Decoding of parallel blocks as one jitted loop over one cache (spec section 3).

Every row decodes one response. A row has `num_paths` lanes: lane 0 carries the main
stream, and inside a block lane p carries path p + 1, all at the same time. A step
feeds the pending token of every live lane, draws (or forces) the next one, and moves
the row's state machine, by `where` alone. Fork and join recompute and copy nothing:

* a token takes the next free slot of its row's cache when it is emitted, whichever
  lane wrote it, since rotary positions are applied at write time;
* slots carry the labels (block, path) of their token. A query sees a slot if it is
  filled and `layout.visible_labels` says so. When a block closes, its row's queries
  are main stream again, and so see every path;
* a prompt is kept once for all rows that respond to it, and each row has a seat there.

Here is the state machine; steps are made of it in `decode_loop`, and what the model does
in one is in `kv_cache`. The order of emission is undone on the host.
"""

import functools

import jax
import jax.numpy as jnp

from pr1_jax.sampler.settings import (
    END_PARALLEL,
    END_PATH,
    END_SUMMARY,
    EOS,
    PARALLEL,
    PATH,
    SUMMARY_OPEN,
    Settings,
    Vocab,
)
from pr1_jax.sampler.state import (
    DONE,
    FORK,
    JOIN,
    MAIN,
    NEWLINE,
    PATHS,
    SUMMARY,
    SUMMARY_TAG,
    Emission,
    State,
)

_ALL = 0b1111111
_BANS_MAIN = _ALL & ~(1 << PARALLEL) & ~(1 << EOS)
_BANS_PATH = _ALL & ~(1 << END_PATH)
_BANS_SUMMARY = _ALL & ~(1 << END_SUMMARY)


def next_bans(state: State, settings: Settings) -> jax.Array:
    """Bans [B] int32 of the next draw: illegal tags and EOS, blocks that do not fit."""
    left = settings.max_response_tokens - state.emitted
    fits = (left - 1 >= settings.smallest_block) & (state.blocks < settings.max_blocks)
    legal = settings.ban_illegal
    return jnp.select(
        [state.phase == PATHS, state.phase == SUMMARY],
        [_BANS_PATH if legal else 0, _BANS_SUMMARY if legal else 0],
        (_BANS_MAIN if legal else 0) | jnp.where(fits, 0, 1 << PARALLEL),
    ).astype(jnp.int32)


def advance(
    state: State, drawn, logps, bans, *, vocab: Vocab, settings: Settings
) -> tuple[State, Emission]:
    """Moves the state machine by one step.

    Args:
      drawn, logps: [B, P], the draw of every lane that was live.
      bans: [B], under which it was drawn.
    """
    B, P = state.token.shape
    ids = vocab.special_ids
    phase, emitted = state.phase, state.emitted
    lane = jnp.arange(P)[None]
    lane0 = lane == 0
    in_phase = lambda *phases: functools.reduce(
        jnp.logical_or, [phase == p for p in phases]
    )[:, None]

    # Paths: a lane whose `</Path>` was just fed is over; the last one joins the block.
    was_path = in_phase(PATHS)
    over = was_path & state.live & (state.token == ids[END_PATH])
    live = state.live & ~over
    joined = (phase == PATHS) & ~live.any(axis=1)
    causal = settings.variant == "causal"
    closes = joined & (not causal)

    # What each lane writes: a draw, or a forced token (−1 = draw).
    budget_over = state.count + 1 >= state.path_budget[:, None]
    eos_in_path = state.token == ids[EOS]
    summary_over = (emitted + 1 >= state.summary_end)[:, None] | (
        state.token == ids[EOS]
    )
    forced = jnp.select(
        [
            in_phase(FORK),
            closes[:, None] & lane0,
            was_path & (budget_over | eos_in_path),
            in_phase(NEWLINE),
            in_phase(SUMMARY_TAG),
            in_phase(SUMMARY) & summary_over,
        ],
        [
            ids[PATH],
            ids[END_PARALLEL],
            ids[END_PATH],
            vocab.newline_id,
            ids[SUMMARY_OPEN],
            ids[END_SUMMARY],
        ],
        -1,
    )
    single = in_phase(MAIN, NEWLINE, SUMMARY_TAG, SUMMARY) | closes[:, None]
    emit = in_phase(FORK) | (was_path & live) | (single & lane0)
    token = jnp.where(forced >= 0, forced, drawn)

    # Slots in order of emission; positions side by side inside a block.
    rank = jnp.cumsum(emit, axis=1) - emit
    slot = emitted[:, None] + rank
    position = jnp.where(
        closes[:, None], state.furthest[:, None] + 1, state.position + 1
    )
    position = jnp.where(in_phase(FORK), state.position[:, :1] + 1, position)
    path = jnp.where(in_phase(FORK) | (was_path & live), lane + 1, 0)
    block = jnp.where(path > 0, state.blocks[:, None], 0)
    count = jnp.where(in_phase(FORK), 1, state.count + 1)

    # The next phase, by the token that lane 0 wrote.
    first = token[:, 0]
    opens = (phase == MAIN) & (first == ids[PARALLEL]) & ((bans >> PARALLEL) & 1 == 0)
    total = emitted + emit.sum(axis=1)
    left = settings.max_response_tokens - total
    at_end = (phase == MAIN) & ((first == ids[EOS]) | (left <= 0))
    summary_closed = (phase == SUMMARY) & (first == ids[END_SUMMARY])
    next_phase = jnp.select(
        [
            opens,
            at_end | (summary_closed & (left <= 0)),
            phase == FORK,
            closes,
            joined,
            phase == NEWLINE,
            phase == SUMMARY_TAG,
            summary_closed,
        ],
        [FORK, DONE, PATHS, NEWLINE, JOIN, SUMMARY_TAG, SUMMARY, MAIN],
        phase,
    )
    new_live = emit & (next_phase != DONE)[:, None]

    # Budgets: of the paths when a block opens, of the summary when it begins.
    plan = left - 3 - settings.summary_reserve - settings.answer_reserve
    path_budget = plan // P
    if settings.max_path_tokens:
        path_budget = jnp.minimum(path_budget, settings.max_path_tokens)
    summary_end = settings.max_response_tokens - settings.answer_reserve
    summary_end = jnp.broadcast_to(summary_end, (B,))
    if settings.max_summary_tokens:
        summary_end = jnp.minimum(summary_end, total + settings.max_summary_tokens)
    furthest = jnp.where(emit & (path > 0), position, 0).max(axis=1)

    emission = Emission(
        token=jnp.where(emit, token, -1),
        logp=jnp.where(emit & (forced < 0), logps, 0.0),
        position=position,
        block=block,
        path=path,
        bans=jnp.where(emit & (forced < 0), bans[:, None], 0),
        forced=emit & (forced >= 0),
    )
    row, S = jnp.arange(B)[:, None], state.slot_path.shape[1]
    label = lambda labels, value: labels.at[row, jnp.where(emit, slot, S)].set(
        value, mode="drop"
    )
    state = state.replace(
        token=jnp.where(emit, token, state.token),
        position=jnp.where(emit, position, state.position),
        slot=jnp.where(emit, slot, state.slot),
        live=new_live,
        count=count,
        phase=next_phase,
        emitted=total,
        blocks=state.blocks + opens,
        path_budget=jnp.where(opens, path_budget, state.path_budget),
        summary_end=jnp.where(phase == SUMMARY_TAG, summary_end, state.summary_end),
        furthest=jnp.maximum(jnp.where(opens, 0, state.furthest), furthest),
        slot_block=label(state.slot_block, block),
        slot_path=label(state.slot_path, path),
    )
    return state, emission
