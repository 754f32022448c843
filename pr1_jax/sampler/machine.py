"""Decoding of parallel blocks as one jitted loop over one cache (docs/method.md, section 3).

Every row decodes one response. A row has `num_paths` lanes: lane 0 carries the main
stream, and inside a block lane p carries path p + 1, all at the same time. A step
feeds the pending token of every live lane, draws (or forces) the next one, and moves
the row's state machine, by `where` alone. Fork and join recompute and copy nothing:

* a token takes the next free slot of its row's cache when it is emitted, whichever
  lane wrote it, since rotary positions are applied at write time;
* slots carry the labels (block, path) of their token. A query sees a slot if it is
  filled and `layout.visible_labels` says so. When a block closes, its row's queries
  are main stream again, and so see every path;
* a prompt is kept once for all rows that respond to it.

Where blocks are planned (docs/method.md, section 10), lane 0 writes the plans, and a
block has as many live lanes as plans.

Here is the state machine. `loop` makes steps of it, and `forward` holds what the model
does in one. The host undoes the order of emission.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax import policy
from pr1_jax.sampler.settings import (
    END_PARALLEL,
    END_PATH,
    END_PLAN,
    END_SUMMARY,
    EOS,
    PARALLEL,
    PATH,
    PLAN,
    SUMMARY_OPEN,
    Settings,
    Vocab,
)
from pr1_jax.sampler.state import (
    DONE,
    FORK,
    IN_PLAN,
    JOIN,
    LIST,
    MAIN,
    NEWLINE,
    PATHS,
    PLAN_TAG,
    SUMMARY,
    SUMMARY_TAG,
    Emission,
    Limits,
    State,
)
from pr1_jax.tags import MIN_PATHS

_TAGS = (1 << EOS) - 1  # bits of the six tags


def next_bans(state: State, vocab: Vocab, settings: Settings) -> jax.Array:
    """Bans [B] int32 of the next draw: illegal tags and EOS, blocks that do not fit."""
    all_ = (1 << len(vocab.ban_ids)) - 1
    plan, end_plan = (1 << (len(vocab.ban_ids) + i) for i in (PLAN, END_PLAN))
    tags = _TAGS | (plan | end_plan if settings.planned else 0)
    in_main = tags & ~(1 << PARALLEL)
    in_path, in_summary = all_ & ~(1 << END_PATH), all_ & ~(1 << END_SUMMARY)
    limits = state.limits or Limits.of(settings)
    left = limits.tokens - state.emitted
    smallest = settings.smallest_block_of(limits.paths)
    fits = (left - 1 >= smallest) & (state.blocks < limits.blocks)
    if limits.steps is not None:
        steps_left = limits.steps - state.steps
        fits &= steps_left - 1 >= settings.smallest_block_steps
    legal = settings.ban_illegal
    phases = [(PATHS, in_path if legal else 0), (SUMMARY, in_summary if legal else 0)]
    if settings.planned:
        in_list = all_ & ~(plan | 1 << PATH) | 1 << policy.ORDINARY
        phases += [(IN_PLAN, all_ & ~end_plan if legal else 0), (LIST, in_list)]
    return jnp.select(
        [state.phase == phase for phase, _ in phases],
        [bans for _, bans in phases],
        (in_main if legal else 0) | jnp.where(fits, 0, 1 << PARALLEL),
    ).astype(jnp.int32)


def advance(
    state: State, drawn, logps, bans, *, vocab: Vocab, settings: Settings
) -> tuple[State, Emission]:
    """Moves the state machine by one step.

    Args:
      drawn, logps: [B, P], the draw of every lane that was live.
      bans: [B] int32, bits that were banned in these draws.
    """
    P, S = state.token.shape[1], state.slot_path.shape[1]
    lane = jnp.arange(P)[None]
    live, joined = _after_paths(state, vocab)
    closes = joined & (settings.variant != "causal")
    fork = _forks(state, drawn, vocab)
    forced, in_path = _forced(state, closes, vocab), _is_in(state, PATHS) & live
    planning = (PLAN_TAG, IN_PLAN, LIST) if settings.planned else ()
    single = _is_in(state, MAIN, NEWLINE, SUMMARY_TAG, SUMMARY, *planning)
    single |= closes[:, None]
    emit = fork | in_path | (single & (lane == 0))
    token = jnp.where(forced >= 0, forced, drawn)
    if settings.planned:  # whatever was drawn from logits that are no numbers
        token = jnp.where(fork, vocab.special_ids[PATH], token)

    # Slots in order of emission; positions side by side inside a block.
    rank = jnp.cumsum(emit, axis=1) - emit
    slot = state.emitted[:, None] + rank
    position = jnp.where(
        closes[:, None], state.furthest[:, None] + 1, state.position + 1
    )
    position = jnp.where(fork, state.position[:, :1] + 1, position)
    path = jnp.where(fork | in_path, lane + 1, 0)
    block = jnp.where(path > 0, state.blocks[:, None], 0)

    total = state.emitted + emit.sum(axis=1)
    steps = state.steps + emit.any(axis=1)
    limits = state.limits or Limits.of(settings)
    left = _left(limits, total, steps)
    first = token[:, 0]
    phase, opens = _next_phase(state, first, bans, joined, closes, left, vocab)
    if settings.planned:
        plans = _next_plans(state, first, opens, total, steps, vocab, settings)
        number = plans.number
        phase = jnp.where(plans.phase >= 0, plans.phase, phase)
        paths = jnp.maximum(number, 1)
        ends = _budgets(state, plans.ended, paths, total, steps, settings)
        path_budget, text_end = ends[0], jnp.where(plans.begun, plans.end, ends[1])
    else:
        number, paths = None, limits.paths
        ends = _budgets(state, opens, paths, total, steps, settings)
        path_budget, text_end = ends
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
    written = jnp.arange(len(emit))[:, None], jnp.where(emit, slot, S)
    state = state.replace(
        token=jnp.where(emit, token, state.token),
        position=jnp.where(emit, position, state.position),
        slot=jnp.where(emit, slot, state.slot),
        live=emit & (phase != DONE)[:, None],
        count=jnp.where(fork, 1, state.count + 1),
        phase=phase,
        emitted=total,
        steps=steps,
        blocks=state.blocks + opens,
        path_budget=path_budget,
        text_end=text_end,
        plans=number,
        furthest=jnp.maximum(jnp.where(opens, 0, state.furthest), furthest),
        slot_block=state.slot_block.at[written].set(block, mode="drop"),
        slot_path=state.slot_path.at[written].set(path, mode="drop"),
    )
    return state, emission


def _left(limits: Limits, total, steps) -> jax.Array:
    """Tokens, and main-stream steps, that responses may still have, [B]."""
    left = limits.tokens - total
    return left if limits.steps is None else jnp.minimum(left, limits.steps - steps)


def _is_in(state: State, *phases: int) -> jax.Array:
    """Rows that are in one of some phases, [B, 1]."""
    return functools.reduce(jnp.logical_or, [state.phase == p for p in phases])[:, None]


def _forks(state: State, drawn, vocab: Vocab) -> jax.Array:
    """The lanes that write their `<Path>`, [B, P]; [B, 1] where all of a row do."""
    fork = _is_in(state, FORK)
    if not vocab.plan_ids and state.limits is None:
        return fork
    if not vocab.plan_ids:
        return fork & (jnp.arange(drawn.shape[1]) < state.limits.paths[:, None])
    fork |= _is_in(state, LIST) & (drawn[:, :1] != vocab.plan_ids[0])
    return fork & (jnp.arange(drawn.shape[1]) < state.plans[:, None])


def _is_eos(tokens, vocab: Vocab) -> jax.Array:
    """Which tokens are one of the EOS ids, bool."""
    return functools.reduce(jnp.logical_or, [tokens == i for i in vocab.eos_ids])


def _after_paths(state: State, vocab: Vocab) -> tuple[jax.Array, jax.Array]:
    """Lanes [B, P] that go on, and rows [B] whose last path is over.

    A path is over once its `</Path>` was fed; the last one joins the block.
    """
    end = state.token == vocab.special_ids[END_PATH]
    live = state.live & ~(_is_in(state, PATHS) & end)
    return live, (state.phase == PATHS) & ~live.any(axis=1)


def _forced(state: State, closes, vocab: Vocab) -> jax.Array:
    """The token that each lane must write, [B, P]; −1 = it draws one."""
    ids = vocab.special_ids
    lane0 = jnp.arange(state.token.shape[1])[None] == 0
    budget_over = state.count + 1 >= state.path_budget[:, None]
    wrote_eos = _is_eos(state.token, vocab)
    text_over = (state.emitted + 1 >= state.text_end)[:, None] | wrote_eos
    label = _label_tokens(state, vocab)
    forced = [
        (_is_in(state, FORK), ids[PATH]),
        (closes[:, None] & lane0, ids[END_PARALLEL]),
        *([(_is_in(state, PATHS) & (label >= 0), label)] if vocab.label_ids else []),
        (_is_in(state, PATHS) & (budget_over | wrote_eos), ids[END_PATH]),
        (_is_in(state, NEWLINE), vocab.newline_id),
        (_is_in(state, SUMMARY_TAG), ids[SUMMARY_OPEN]),
        (_is_in(state, SUMMARY) & text_over, ids[END_SUMMARY]),
    ]
    if vocab.plan_ids:
        plan, end_plan = vocab.plan_ids
        forced += [
            (_is_in(state, LIST) & ~lane0, ids[PATH]),
            (_is_in(state, PLAN_TAG), plan),
            (_is_in(state, IN_PLAN) & text_over, end_plan),
        ]
    return jnp.select(*map(list, zip(*forced)), -1)


def _label_tokens(state: State, vocab: Vocab) -> jax.Array:
    """The next token of each path's label, [B, P]; −1 = it is written, or there is none."""
    longest = max(map(len, vocab.label_ids), default=0)
    table = np.full((state.token.shape[1], longest + 1), -1, np.int32)
    for lane, label in zip(table, vocab.label_ids):
        lane[: len(label)] = label
    # A path of `count` tokens has `<Path>` and so many of its label but one.
    written = jnp.clip(state.count - 1, 0, longest)
    return jnp.asarray(table)[jnp.arange(len(table)), written]


def _next_phase(state: State, first, bans, joined, closes, left, vocab: Vocab):
    """The phase [B] of each row, by the token `first` [B] that lane 0 wrote.

    Args:
      left: [B], tokens, and main-stream steps, that the response may still have.

    Returns:
      The phases, and which rows open a block, bool [B].
    """
    ids, phase = vocab.special_ids, state.phase
    may_open = (bans >> PARALLEL) & 1 == 0
    opens = (phase == MAIN) & (first == ids[PARALLEL]) & may_open
    at_end = (phase == MAIN) & (_is_eos(first, vocab) | (left <= 0))
    summary_closed = (phase == SUMMARY) & (first == ids[END_SUMMARY])
    phases = [
        (opens, FORK),
        (at_end | (summary_closed & (left <= 0)), DONE),
        (phase == FORK, PATHS),
        (closes, NEWLINE),
        (joined, JOIN),
        (phase == NEWLINE, SUMMARY_TAG),
        (phase == SUMMARY_TAG, SUMMARY),
        (summary_closed, MAIN),
    ]
    return jnp.select(*map(list, zip(*phases)), phase), opens


class _Plans(NamedTuple):
    """What becomes of the plans of a block, [B] each."""

    number: jax.Array  # int32, of plans that are open or closed
    phase: jax.Array  # int32, of rows among plans; −1 elsewhere
    begun: jax.Array  # bool, those that have just written `<Plan>`
    ended: jax.Array  # bool, those that have just written `</Plan>`
    end: jax.Array  # int32, `emitted` by which a plan that has begun has closed


def _next_plans(
    state: State, first, opens, total, steps, vocab: Vocab, settings: Settings
) -> _Plans:
    """Plans after a step in which lane 0 wrote `first` [B]; arguments as of `_budgets`."""
    phase, (plan, end_plan) = state.phase, vocab.plan_ids
    limits = state.limits or Limits.of(settings)
    begun = (phase == PLAN_TAG) | ((phase == LIST) & (first == plan))
    ended = (phase == IN_PLAN) & (first == end_plan)
    number = jnp.where(opens, 0, state.plans + begun)

    def spare(number):  # what the main stream may write before what must follow
        after = settings.after_paths
        after += settings.min_plan_tokens * jnp.maximum(MIN_PATHS - number, 0)
        paths = settings.min_path_tokens * jnp.maximum(number, MIN_PATHS)
        spare = limits.tokens - total - after - paths
        if limits.steps is not None:
            longest = settings.min_path_tokens
            steps_left = limits.steps - steps
            spare = jnp.minimum(spare, steps_left - after - longest)
        return spare

    one_more = (number < limits.paths) & (spare(number + 1) >= settings.min_plan_tokens)
    phases = [
        (opens | (ended & (number < MIN_PATHS)), PLAN_TAG),
        (begun, IN_PLAN),
        (ended & one_more, LIST),
        (ended, FORK),
        (phase == LIST, PATHS),
    ]
    end = total + spare(number)
    if settings.max_plan_tokens:
        end = jnp.minimum(end, total - 1 + settings.max_plan_tokens)
    phase = jnp.select(*map(list, zip(*phases)), -1)
    return _Plans(number, phase, begun, ended, end)


def _budgets(state: State, opens, paths, total, steps, settings: Settings):
    """Budgets [B] of the paths before they fork, and of the summary when it begins.

    Args:
      opens: bool [B], where nothing but paths is written before the block closes.
      paths: of the block, one number or [B].
      total, steps: [B], tokens and sequential steps of the responses.

    Returns:
      As `State.path_budget` and `State.text_end`.
    """
    limits = state.limits or Limits.of(settings)
    left, after = limits.tokens - total, settings.after_paths
    path_budget = (left - after) // paths
    if limits.steps is not None:
        path_budget = jnp.minimum(path_budget, limits.steps - steps - after)
    if settings.max_path_tokens:
        path_budget = jnp.minimum(path_budget, settings.max_path_tokens)
    text_end = limits.tokens - settings.answer_reserve
    if settings.max_summary_tokens:
        text_end = jnp.minimum(text_end, total + settings.max_summary_tokens)
    if limits.steps is not None:  # a token of the summary is a step
        step_end = total + limits.steps - steps - settings.answer_reserve
        text_end = jnp.minimum(text_end, step_end)
    begins = state.phase == SUMMARY_TAG
    return (
        jnp.where(opens, path_budget, state.path_budget),
        jnp.where(begins, text_end, state.text_end),
    )
