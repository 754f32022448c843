"""The state of decoding, and what one step writes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.sampler.settings import Settings

# Phases: what a row writes next.
MAIN, FORK, PATHS, NEWLINE, SUMMARY_TAG, SUMMARY, JOIN, DONE = range(8)
PLAN_TAG, IN_PLAN, LIST = range(8, 11)  # where blocks are planned

NEVER = 2**30  # sequential steps that no response takes


@flax.struct.dataclass
class PromptCache:
    """The prompts that rows respond to: M entries of up to T tokens."""

    length: jax.Array  # [M] int32
    cache: Any  # keys and values of M rows and T slots, as the backend has them


@flax.struct.dataclass
class Limits:
    """Limits of single responses, [B] each, within those that settings have for all."""

    tokens: Any  # int32, of the response
    steps: Any  # int32, sequential ones; None = no other limit than the tokens
    blocks: Any  # int32
    paths: Any  # int32, of a block, from 2; where it is planned, at most
    temperature: Any  # float32; 0 = greedy, with log-probs at temperature 1
    top_p: Any  # float32

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """What settings have for all responses, as single numbers."""
        return cls(
            settings.max_response_tokens,
            settings.max_sequential_steps or None,
            settings.max_blocks,
            settings.num_paths,
            settings.temperature,
            settings.top_p,
        )

    @classmethod
    def stack(cls, limits: Sequence["Limits"]) -> "Limits":
        """Those of single responses, [B]; without a limit of steps none is ever met."""

        def column(name):
            kind = np.float32 if name in ("temperature", "top_p") else np.int32
            values = [getattr(x, name) for x in limits]
            return np.array([NEVER if x is None else x for x in values], kind)

        return cls(
            **{field.name: column(field.name) for field in dataclasses.fields(cls)}
        )


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
    steps: jax.Array  # int32, sequential steps so far: a block's longest path counts
    prompt_length: jax.Array  # int32
    # int32: the prompt's entry · the rows that it can have + the row's number among them.
    reader: jax.Array
    blocks: jax.Array  # int32, blocks opened; the open one's label
    path_budget: jax.Array  # int32, of the open block
    text_end: jax.Array  # int32, `emitted` by which the plan or summary has closed
    furthest: jax.Array  # int32, greatest position in the open block
    key: jax.Array  # PRNG keys
    plans: jax.Array | None  # int32, of the open block; None where none is planned
    # Slots, [B, S].
    slot_block: jax.Array  # int32
    slot_path: jax.Array  # int32
    cache: Any  # keys and values, as the backend has them; None without a model
    prompts: PromptCache | None
    limits: Limits | None = None  # None: all responses have those of the settings


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
    prompts: PromptCache | None = None,
    *,
    limited: bool = False,
) -> State:
    """A state in which every row is done.

    Args:
      limited: whether each response has `Limits` of its own.
    """
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
        steps=row,
        prompt_length=row,
        reader=row,
        blocks=row,
        path_budget=row,
        text_end=row,
        furthest=row,
        key=jax.random.split(jax.random.key(0), B),
        plans=row if settings.planned else None,
        slot_block=jnp.zeros((B, S), jnp.int32),
        slot_path=jnp.zeros((B, S), jnp.int32),
        cache=cache,
        prompts=prompts,
        limits=Limits.stack([Limits.of(settings)] * B) if limited else None,
    )


def admit(
    state: State, new, readers, lengths, last_tokens, keys, limits: Limits | None = None
) -> State:
    """Starts new responses in some rows; touches nothing that has slots.

    A prompt's last token is left pending: feeding it again gives the first logits, so
    that the prefill makes none. What the row's slots held is hidden by `emitted`.

    Args:
      new: [B] bool, rows that start.
      readers: [B] int32, as `State.reader`.
      lengths, last_tokens: [B] int32, of their prompts.
      keys: [B] PRNG keys of the new responses.
      limits: of the new responses, where the state has some.
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
        steps=pick(0, state.steps),
        prompt_length=pick(lengths, state.prompt_length),
        reader=pick(readers, state.reader),
        blocks=pick(0, state.blocks),
        furthest=pick(0, state.furthest),
        key=jax.random.wrap_key_data(
            pick(jax.random.key_data(keys), jax.random.key_data(state.key))
        ),
        limits=jax.tree.map(pick, limits, state.limits),
    )


def drop(state: State, rows) -> State:
    """Ends the responses of some rows, [B] bool, where they are."""
    return state.replace(
        live=state.live & ~rows[:, None], phase=jnp.where(rows, DONE, state.phase)
    )


def lane_paths(state: State) -> jax.Array:
    """Path label of every lane's pending token, [B, P]; 0 outside a block."""
    inside = (state.phase == PATHS)[:, None]
    return jnp.where(inside, jnp.arange(state.token.shape[1]) + 1, 0)
