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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pr1_jax import layout

# Phases: what a row writes next.
MAIN, FORK, PATHS, NEWLINE, SUMMARY_TAG, SUMMARY, JOIN, DONE = range(8)


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Token ids that the runtime knows. `special_ids` are the six tags, then EOS."""

    special_ids: tuple[int, ...]
    newline_id: int
    num_tokens: int | None = None  # ids from here on are never written

    @classmethod
    def of(cls, tokenizer) -> "Vocab":
        """The ids of a tokenizer."""
        ids = (*tokenizer.tag_ids.values(), tokenizer.eos_id)
        special_ids = tuple(int(i) for i in ids)
        return cls(special_ids, int(tokenizer.newline_id), tokenizer.vocab_size)


# Bits of `bans`, in the order of `Vocab.special_ids`.
PARALLEL, END_PARALLEL, PATH, END_PATH, SUMMARY_OPEN, END_SUMMARY, EOS = range(7)
_ALL = 0b1111111
_BANS_MAIN = _ALL & ~(1 << PARALLEL) & ~(1 << EOS)
_BANS_PATH = _ALL & ~(1 << END_PATH)
_BANS_SUMMARY = _ALL & ~(1 << END_SUMMARY)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How responses are decoded. Lengths are in tokens and count tags.

    Budgets are planned before a fork, so a block always closes: `<Parallel>` is
    allowed only where the smallest block, a summary of `summary_reserve` and an
    answer of `answer_reserve` still fit after it. A path's budget is what remains
    after those, divided by the paths.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    num_paths: int = 2
    max_blocks: int = 4  # 0 = `<Parallel>` is always banned (ordinary decoding)
    min_path_tokens: int = 4
    max_path_tokens: int = 0  # 0 = no other limit than the plan
    max_summary_tokens: int = 0  # 0 = no other limit than the plan
    summary_reserve: int = 8
    answer_reserve: int = 8
    temperature: float = 1.0  # 0 = greedy, with log-probs at temperature 1
    top_k: int = 0
    top_p: float = 1.0
    variant: str = "structured"
    ban_illegal: bool = True  # ban tags, and EOS, that are illegal in a state

    def __post_init__(self):
        def need(name, ok, what):
            if not ok:
                raise ValueError(f"rollout.{name}={getattr(self, name)} {what}")

        need("max_prompt_tokens", self.max_prompt_tokens >= 1, "must be at least 1")
        need("max_response_tokens", self.max_response_tokens >= 1, "must be at least 1")
        need("num_paths", 2 <= self.num_paths <= 8, "must be from 2 to 8")
        need("max_blocks", self.max_blocks >= 0, "must not be negative")
        need("min_path_tokens", self.min_path_tokens >= 2, "must hold both tags (2)")
        limit = self.max_path_tokens
        need(
            "max_path_tokens",
            limit == 0 or limit >= self.min_path_tokens,
            f"must be 0 or at least min_path_tokens={self.min_path_tokens}",
        )
        need("max_summary_tokens", self.max_summary_tokens >= 0, "must not be negative")
        need("summary_reserve", self.summary_reserve >= 1, "must hold </Summary> (1)")
        need("answer_reserve", self.answer_reserve >= 0, "must not be negative")
        need("temperature", self.temperature >= 0, "must not be negative")
        need("top_k", self.top_k >= 0, "must not be negative")
        need("top_p", 0 < self.top_p <= 1, "must be in (0, 1]")
        known = self.variant in layout.VARIANTS
        need("variant", known, f"is not one of {layout.VARIANTS}")

    @property
    def smallest_block(self) -> int:
        """Tokens that must be left after `<Parallel>`: paths, closing tags, reserves."""
        closing = 3  # </Parallel>, newline, <Summary>
        paths = self.num_paths * self.min_path_tokens
        return paths + closing + self.summary_reserve + self.answer_reserve

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.max_prompt_tokens + self.max_response_tokens


@flax.struct.dataclass
class Prompts:
    """The prompts that rows respond to, M of up to T tokens; of `kv_cache`."""

    length: jax.Array  # [M] int32
    cache: Any  # one (keys [M, K, H, T], values [M, K, T, H]) a layer


@flax.struct.dataclass
class State:
    """Decoding state of B rows of P lanes over S response slots."""

    # Lanes, [B, P]. A live lane has a pending token: emitted, not yet fed.
    token: jax.Array  # int32
    position: jax.Array  # int32
    slot: jax.Array  # int32, the pending token's; −1 for a prompt's last
    live: jax.Array  # bool
    count: jax.Array  # int32, tokens emitted in this path
    # Rows, [B].
    phase: jax.Array  # int32
    emitted: jax.Array  # int32, response tokens so far
    prompt_length: jax.Array  # int32
    seat: jax.Array  # int32, prompt · seats of each + the row's place among them
    blocks: jax.Array  # int32, blocks opened; the open one's label
    path_budget: jax.Array  # int32, of the open block
    summary_end: jax.Array  # int32, `emitted` by which the summary has closed
    furthest: jax.Array  # int32, greatest position in the open block
    key: jax.Array  # PRNG keys
    # Slots, [B, S].
    slot_block: jax.Array  # int32
    slot_path: jax.Array  # int32
    cache: Any  # one (keys [B, K, H, S], values [B, K, S, H]) a layer
    prompts: Prompts | None


@flax.struct.dataclass
class Emission:
    """What one step wrote, [B, P]. `token` is −1 where a lane wrote nothing."""

    token: jax.Array  # int32
    logp: jax.Array  # float32, 0 where forced
    position: jax.Array  # int32
    block: jax.Array  # int32
    path: jax.Array  # int32
    bans: jax.Array  # int32
    forced: jax.Array  # bool


@flax.struct.dataclass
class Lanes:
    """Flat list of the L lanes to feed. `index` is row · P + lane, B · P = unused.

    The first `live` of them are in use, or any where `live` is None.
    """

    index: jax.Array  # [L] int32
    row: jax.Array  # [L] int32, B = unused
    token: jax.Array  # [L] int32
    position: jax.Array  # [L] int32
    slot: jax.Array  # [L] int32
    live: jax.Array | None = None  # scalar int32


# decode(params, lanes, state, num_lanes) -> logits [L, V], cache
DecodeFn = Callable[[Any, Lanes, State, int], tuple[jax.Array, Any]]


def init_state(
    settings: Settings,
    rows: int,
    slots: int,
    cache: Any = None,
    prompts: Prompts | None = None,
) -> State:
    """A state in which every row is done, over the caches of `kv_cache` or none."""
    B, P, S = rows, settings.num_paths, slots
    lanes, row = jnp.zeros((B, P), jnp.int32), jnp.zeros(B, jnp.int32)
    return State(
        token=lanes,
        position=lanes,
        slot=lanes,
        live=lanes.astype(bool),
        count=lanes,
        phase=jnp.full(B, DONE, jnp.int32),
        emitted=row,
        prompt_length=row,
        seat=row,
        blocks=row,
        path_budget=row,
        summary_end=row,
        furthest=row,
        key=jax.random.split(jax.random.key(0), B),
        slot_block=jnp.zeros((B, S), jnp.int32),
        slot_path=jnp.zeros((B, S), jnp.int32),
        cache=cache,
        prompts=prompts,
    )


def admit(state: State, new, seats, lengths, last_tokens, keys) -> State:
    """Starts new responses in some rows; touches nothing that has slots.

    A prompt's last token is left pending: feeding it again gives the first logits, so
    that the prefill makes none. What the row's slots held is hidden by `emitted`.

    Args:
      new: [B] bool, rows that start.
      seats, lengths, last_tokens: [B] int32, of their prompts.
      keys: [B] PRNG keys of the new responses.
    """
    lane0 = jnp.arange(state.token.shape[1]) == 0
    pick = lambda value, old: jnp.where(
        new.reshape(-1, *(1,) * (old.ndim - 1)), value, old
    )
    return state.replace(
        token=pick(jnp.where(lane0, last_tokens[:, None], 0), state.token),
        position=pick((lengths - 1)[:, None], state.position),
        slot=pick(-1, state.slot),
        live=pick(lane0[None], state.live),
        count=pick(0, state.count),
        phase=pick(MAIN, state.phase),
        emitted=pick(0, state.emitted),
        prompt_length=pick(lengths, state.prompt_length),
        seat=pick(seats, state.seat),
        blocks=pick(0, state.blocks),
        furthest=pick(0, state.furthest),
        key=jax.random.wrap_key_data(
            pick(jax.random.key_data(keys), jax.random.key_data(state.key))
        ),
    )


# --- The state machine --------------------------------------------------------------


def lane_paths(state: State) -> jax.Array:
    """Path label of every lane's pending token, [B, P]; 0 outside a block."""
    inside = (state.phase == PATHS)[:, None]
    return jnp.where(inside, jnp.arange(state.token.shape[1]) + 1, 0)


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
