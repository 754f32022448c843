"""Steps of decoding: which lanes are fed, the model, the draw; and the loop over them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pr1_jax import policy
from pr1_jax.sampler.draw import draw
from pr1_jax.sampler.machine import advance, next_bans
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.sampler.state import DONE, JOIN, DecodeFn, Emission, Lanes, State


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
    params,
    state: State,
    *,
    decode_fn: DecodeFn,
    num_lanes: int,
    vocab: Vocab,
    settings: Settings,
    kernels: bool = False,
) -> tuple[State, Emission]:
    """Feeds every live lane and emits the next tokens; arguments as of `run_chunk`."""
    B, P = state.token.shape
    lanes = _live_lanes(state, num_lanes)
    logits, cache = decode_fn(params, lanes, state, num_lanes)
    row = jnp.clip(lanes.row, 0, B - 1)
    bans = next_bans(state, settings)
    logits = policy.policy_logits(
        logits,
        bans[row],
        special_ids=vocab.special_ids,
        num_tokens=vocab.num_tokens,
        temperature=settings.temperature or 1.0,
    )
    logits = policy.truncated(logits, top_k=settings.top_k, top_p=settings.top_p)
    greedy = settings.temperature == 0
    draws = draw(
        *(logits, state.key[row], lanes.slot + 1),
        greedy=greedy,
        live=lanes.live,
        kernels=kernels,
    )
    if num_lanes == B:
        pad = [(0, 0), (0, P - 1)]
        drawn, logps = (jnp.pad(x[:, None], pad) for x in draws)
    else:
        place = jnp.clip(jnp.cumsum(state.live.ravel()) - 1, 0)
        drawn, logps = (x[place].reshape(B, P) for x in draws)
    state = state.replace(cache=cache)
    return advance(state, drawn, logps, bans, vocab=vocab, settings=settings)


def run_chunk(
    params,
    state: State,
    stop_at_done,
    *,
    steps: int,
    decode_fn: DecodeFn,
    num_lanes: int,
    vocab: Vocab,
    settings: Settings,
    kernels: bool = False,
    axes: Sequence[str] = (),
) -> tuple[State, Emission, jax.Array]:
    """Up to `steps` steps; stops early when there is nothing to do or no room.

    Args:
      stop_at_done: scalar int32; stops once so many rows are done (or wait to join).
      num_lanes: lanes that a step can feed, static; B = only lane 0 of a row is live.
      kernels: whether those of `cpu_kernels` run here.
      axes: mesh axes over which rows are split, each shard with a state of its own;
        all shards stop at the same step.

    Returns:
      The state, emissions stacked [steps, B, P], and the number of steps taken.
    """
    B, P = state.token.shape
    S = state.slot_path.shape[1]
    one = functools.partial(
        *(step, params),
        decode_fn=decode_fn,
        num_lanes=num_lanes,
        vocab=vocab,
        settings=settings,
        kernels=kernels,
    )
    blank = jax.eval_shape(one, state)[1]
    log = jax.tree.map(lambda x: jnp.full((steps, *x.shape), -1, x.dtype), blank)

    everywhere = lambda count: jax.lax.psum(count, axes) if axes else count

    def cond(carry):
        state, _, taken = carry
        waits = (state.phase == DONE) | (state.phase == JOIN)
        idle = everywhere(waits.sum())
        inside = state.live[:, 1:].any() | (state.live.sum() > num_lanes)
        crowded = inside if num_lanes == B else state.live.sum() > num_lanes
        if S < settings.max_response_tokens:  # else a response never outgrows them
            used = jnp.where(state.phase == DONE, 0, state.emitted)
            crowded |= (used + P > S).any()
        crowded = everywhere(crowded.astype(jnp.int32)) > 0
        return (taken < steps) & (idle < stop_at_done) & ~crowded

    def body(carry):
        state, log, taken = carry
        state, emission = one(state)
        log = jax.tree.map(lambda all_, x: all_.at[taken].set(x), log, emission)
        return state, log, taken + 1

    return jax.lax.while_loop(cond, body, (state, log, jnp.int32(0)))
