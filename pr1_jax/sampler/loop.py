"""Steps of decoding: which lanes are fed, the model, the draw; and the loop over them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pr1_jax import policy
from pr1_jax.sampler.machine import advance, next_bans
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.sampler.state import DONE, JOIN, DecodeFn, Emission, Lanes, State


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a decode step is made of.

    Attributes:
      decode: maps lanes and a state to logits, as the model does or a script in tests.
      draw: draws from policy logits, as `categorical.draw` does.
    """

    decode: DecodeFn
    draw: Callable[..., tuple[jax.Array, jax.Array]]
    vocab: Vocab
    settings: Settings


def _live_lanes(state: State, num_lanes: int) -> Lanes:
    """The flat list of live lanes; `num_lanes` = B takes lane 0 of every row."""
    B, P = state.token.shape
    if num_lanes == B:
        row = jnp.where(state.live[:, 0], jnp.arange(B), B)
        lane0 = (state.token[:, 0], state.position[:, 0], state.slot[:, 0])
        return Lanes(jnp.arange(B), row, *lane0)
    index = jnp.nonzero(state.live.ravel(), size=num_lanes, fill_value=B * P)[0]
    take = lambda x: x.ravel().at[index].get(mode="fill", fill_value=0)
    fields = take(state.token), take(state.position), take(state.slot)
    return Lanes(index, index // P, *fields, state.live.sum(dtype=jnp.int32))


def step(
    params, state: State, decoding: Decoding, num_lanes: int
) -> tuple[State, Emission]:
    """Feeds every live lane and emits the next tokens; arguments as of `run_chunk`."""
    settings, vocab = decoding.settings, decoding.vocab
    with jax.named_scope("rows"):
        lanes = _live_lanes(state, num_lanes)
        bans = next_bans(state, vocab, settings)
    logits, cache = decoding.decode(params, lanes, state, num_lanes)
    with jax.named_scope("draw"):
        drawn, logps = _draw(logits, lanes, state, bans, decoding, num_lanes)
    with jax.named_scope("rows"):
        state = state.replace(cache=cache)
        return advance(state, drawn, logps, bans, vocab=vocab, settings=settings)


def _draw(
    logits: jax.Array,
    lanes: Lanes,
    state: State,
    bans: jax.Array,
    decoding: Decoding,
    num_lanes: int,
) -> tuple[jax.Array, jax.Array]:
    """Tokens and log-probs of live lanes, [B, P] each, from logits [num_lanes, V]."""
    settings, vocab = decoding.settings, decoding.vocab
    B, P = state.token.shape
    row = jnp.clip(lanes.row, 0, B - 1)
    at = functools.partial(
        policy.policy_logits,
        logits,
        bans[row],
        special_ids=vocab.ban_ids,
        num_tokens=vocab.num_tokens,
    )
    random = lambda logits: decoding.draw(
        logits, state.key[row], lanes.slot + 1, lanes.live
    )
    if state.limits is None:
        logits = at(temperature=settings.temperature or 1.0)
        logits = policy.truncated(logits, top_k=settings.top_k, top_p=settings.top_p)
        draws = random(logits) if settings.temperature else _likeliest(logits)
    else:
        temperature, top_p = state.limits.temperature[row], state.limits.top_p[row]
        is_greedy = temperature == 0
        logits = at(temperature=jnp.where(is_greedy, 1.0, temperature)[:, None])
        logits = policy.truncated(logits, top_k=settings.top_k)
        logits = policy.truncated_each(logits, top_p)
        both = zip(_likeliest(logits), random(logits))
        draws = tuple(jnp.where(is_greedy, *pair) for pair in both)
    if num_lanes == B:
        pad = [(0, 0), (0, P - 1)]
        return tuple(jnp.pad(x[:, None], pad) for x in draws)
    in_list = jnp.clip(jnp.cumsum(state.live.ravel()) - 1, 0)
    return tuple(x[in_list].reshape(B, P) for x in draws)


def _likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens and their log-probs."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, policy.token_logps(logits, tokens)


def run_chunk(
    params,
    state: State,
    stop_at_done,
    decoding: Decoding,
    *,
    steps: int,
    num_lanes: int,
    axes: Sequence[str] = (),
) -> tuple[State, Emission, jax.Array]:
    """Up to `steps` steps; stops early when there is nothing to do or no slot is left.

    Args:
      stop_at_done: scalar int32; stops once so many rows are done (or wait to join).
      num_lanes: lanes that a step can feed, static; B = only lane 0 of a row is live.
      axes: mesh axes over which rows are split, each shard with a state of its own;
        all shards stop at the same step.

    Returns:
      The state, emissions stacked [steps, B, P], and the number of steps taken.
    """
    blank = jax.eval_shape(lambda x: step(params, x, decoding, num_lanes)[1], state)
    log = jax.tree.map(lambda x: jnp.full((steps, *x.shape), -1, x.dtype), blank)
    everywhere = lambda count: jax.lax.psum(count, axes) if axes else count

    def cond(carry):
        state, _, taken = carry
        waits = (state.phase == DONE) | (state.phase == JOIN)
        idle = everywhere(waits.sum())
        outgrown = _outgrows(state, num_lanes, decoding.settings).astype(jnp.int32)
        is_outgrown = everywhere(outgrown) > 0
        return (taken < steps) & (idle < stop_at_done) & ~is_outgrown

    def body(carry):
        state, log, taken = carry
        state, emission = step(params, state, decoding, num_lanes)
        log = jax.tree.map(lambda all_, x: all_.at[taken].set(x), log, emission)
        return state, log, taken + 1

    return jax.lax.while_loop(cond, body, (state, log, jnp.int32(0)))


def _outgrows(state: State, num_lanes: int, settings: Settings) -> jax.Array:
    """Whether the next step may need more lanes, or more slots, than there are."""
    (B, P), S = state.token.shape, state.slot_path.shape[1]
    too_many = state.live.sum() > num_lanes
    if num_lanes == B:
        too_many |= state.live[:, 1:].any()
    if S < settings.max_response_tokens:  # else a response never outgrows them
        used = jnp.where(state.phase == DONE, 0, state.emitted)
        too_many |= (used + P > S).any()
    return too_many
