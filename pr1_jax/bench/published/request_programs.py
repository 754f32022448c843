"""The baselines' side of the device: decode steps, prefills and copies of requests."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pr1_jax import policy
from pr1_jax.bench.plans import follow
from pr1_jax.kernels.cpu.decoding import pack_keys
from pr1_jax.model.backend import Backend
from pr1_jax.model.cpu import Cpu
from pr1_jax.model.forward import forward
from pr1_jax.model.xla import Step
from pr1_jax.sampler.forward import prefill
from pr1_jax.sampler.settings import SUMMARY_OPEN, Vocab
from pr1_jax.sampler.state import PromptCache


@flax.struct.dataclass
class State:
    """B rows that decode a request each; [B] but for the cache."""

    token: jax.Array  # int32, pending: to be fed
    position: jax.Array  # int32
    slot: jax.Array  # int32, the pending token's
    base: jax.Array  # int32; slots before it are seen, and those from `start` on
    start: jax.Array  # int32
    wait: jax.Array  # int32, tokens to force first: newline, <Summary>
    left: jax.Array  # int32, tokens to draw
    last: jax.Array  # int32, the one that is drawn last
    feeds_last: jax.Array  # bool, whether that one is fed as well
    live: jax.Array  # bool
    key: jax.Array  # PRNG keys
    count: jax.Array  # int32, steps
    cache: Any = None  # of `Backend.empty_cache`


def _step(
    backend: Backend, vocab: Vocab, params, state: State
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Feeds all live rows; what each drew, −1 where nothing, and its log-prob."""
    B, S = state.token.shape[0], state.cache[0][1].shape[2]
    slots = jnp.arange(S)
    mine = (slots >= state.start[:, None]) & (slots <= state.slot[:, None])
    seen = mine | (slots < state.base[:, None])
    if isinstance(backend, Cpu):  # which computes live rows alone, if they come first
        row = jnp.nonzero(state.live, size=B, fill_value=B)[0]
        in_list = jnp.clip(jnp.cumsum(state.live) - 1, 0)
        live = state.live.sum(dtype=jnp.int32)
    else:
        row = jnp.where(state.live, jnp.arange(B), B)
        in_list, live = jnp.arange(B), None
    index = jnp.minimum(row, B - 1)
    # As of a decode step: all is one block, of which a row with a gap sees path 1.
    gap = (state.start > state.base).astype(jnp.int32)[:, None]
    step = Step(
        row=row,
        index=row,
        slot=state.slot[index],
        count=live,
        live=state.live[:, None],
        block=gap,
        path=gap,
        filled=state.slot + 1,
        slot_block=jnp.ones((B, S), jnp.int32),
        slot_path=jnp.where(seen, 1, 2),
    )
    hidden, cache = forward(
        backend,
        params,
        state.token[index],
        state.position[index],
        backend.step_attention(step),
        tuple((own, None) for own in state.cache),
        live=live,
    )
    draws = state.live & (state.wait == 0) & (state.left > 0)
    wanted = jnp.where(draws & (state.left == 1), state.last, -1)
    logits = policy.policy_logits(
        follow(backend.logits(params, hidden, live), wanted[index], vocab),
        jnp.zeros(B, jnp.int32),
        special_ids=vocab.special_ids,
        num_tokens=vocab.num_tokens,
    )
    found = backend.draw(logits, state.key[index], state.count[index], live)
    drawn, logps = (x[in_list] for x in found)
    forced = jnp.where(
        state.wait == 2, vocab.newline_id, vocab.special_ids[SUMMARY_OPEN]
    )
    left = state.left - (state.wait == 0)
    on = lambda x: x + state.live
    state = state.replace(
        token=jnp.where(state.wait > 0, forced, drawn),
        position=on(state.position),
        slot=on(state.slot),
        wait=jnp.maximum(state.wait - 1, 0),
        left=left,
        live=state.live & (left > -state.feeds_last.astype(jnp.int32)),
        count=on(state.count),
        cache=cache,
    )
    return state, (jnp.where(draws, drawn, -1), logps)


def _run_chunk(backend, vocab, steps: int, params, state: State, stop):
    """Up to `steps` steps, until `stop` more rows have ended."""
    step = functools.partial(_step, backend, vocab, params)
    shape, rows = (steps, *state.token.shape), state.live.sum()
    log = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)

    def cond(carry):
        state, _, taken = carry
        return (taken < steps) & (rows - state.live.sum() < stop)

    def body(carry):
        state, log, taken = carry
        state, drawn = step(state)
        log = jax.tree.map(lambda all_, x: all_.at[taken].set(x), log, drawn)
        return state, log, taken + 1

    return jax.lax.while_loop(cond, body, (state, log, jnp.int32(0)))


def _start(state: State, new, fresh: State) -> State:
    """Starts requests in the rows `new`; neither state has a cache."""
    pick = lambda value, old: jnp.where(new, value, old)
    key_data = jax.random.key_data
    key = jnp.where(new[:, None], key_data(fresh.key), key_data(state.key))
    rest = jax.tree.map(pick, fresh.replace(key=None), state.replace(key=None))
    return rest.replace(key=jax.random.wrap_key_data(key))


def _resize(backend: Backend, state: State, rows, slots: int) -> State:
    """The rows [B'] of a state, over so many slots or more."""
    rest = jax.tree.map(lambda x: x[rows], state)
    return rest.replace(cache=backend.grow_cache(rest.cache, slots))


def _insert(cache, fresh, rows):
    """Puts prefilled keys and values [W, …] into rows [W]; B = unused."""

    def put(old, new, axis: int):
        T = min(old.shape[axis], new.shape[axis])
        some = (slice(None),) * (axis - 1) + (slice(T),)
        return old.at[(rows, *some)].set(new[(slice(None), *some)], mode="drop")

    return tuple(
        (put(keys, new_keys, 3 if keys.ndim == 4 else 2), put(values, new_values, 2))
        for (keys, values), (new_keys, new_values) in zip(cache, fresh)
    )


def _copy(cache, forks, joins):
    """Copies the rows of ended requests into those of new ones.

    All is read before anything is written.

    Args:
      forks: rows [W] to write and rows [W] to read; B = unused.
      joins: rows [W] to write, rows [W, P] to read, and bounds [W, P]: what is read
        from the p-th of them begins at that slot.
    """
    (to, source), (to_join, sources, bounds) = forks, joins

    def joined(x, slots):
        out = x[sources[:, 0]]
        for p in range(1, sources.shape[1]):
            behind = slots >= bounds[:, p].reshape(-1, *(1,) * (x.ndim - 1))
            out = jnp.where(behind, x[sources[:, p]], out)
        return out

    def put(x, slots):  # slots: broadcasts to x[0]
        copies, joint = x[source], joined(x, slots)
        return x.at[to].set(copies, mode="drop").at[to_join].set(joint, mode="drop")

    def put_both(keys, values):
        slots = jnp.arange(values.shape[2])[None]
        of_keys = slots if keys.ndim == 4 else pack_keys(slots)
        return put(keys, of_keys), put(values, slots[..., None])

    return tuple(put_both(*layer) for layer in cache)


class Programs:
    """The compiled pieces; one set serves plans with any number of paths."""

    def __init__(
        self,
        backend: Backend,
        vocab: Vocab,
        *,
        steps_per_chunk: int = 32,
        prefill_rows: Sequence[int] = (1, 4, 16),
        prefill_lengths_per_octave: int = 4,
    ):
        """Nothing is compiled yet. The defaults are the sampler's, where it has them.

        Args:
          prefill_rows, prefill_lengths_per_octave: shapes that prefills are padded to.
        """
        self.backend, self.vocab = backend, vocab
        self.prefill_rows = sorted(prefill_rows, reverse=True)
        self.lengths_per_octave = prefill_lengths_per_octave
        chunk = functools.partial(_run_chunk, backend, vocab, steps_per_chunk)
        self.chunk = jax.jit(chunk, donate_argnums=1)
        self.start = jax.jit(_start, donate_argnums=0)
        self.resize = jax.jit(functools.partial(_resize, backend), static_argnums=2)
        self.insert = jax.jit(_insert, donate_argnums=0)
        self.copy = jax.jit(_copy, donate_argnums=0)
        self.fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
        self.convert = jax.jit(backend.prepare)
        self.prefill = jax.jit(self._prefilled)

    def _prefilled(self, params, tokens, lengths):
        """Keys and values of contexts [W, T], as in a cache of W rows."""
        W, T = tokens.shape
        cache = self.backend.empty_cache(W, T)
        prompts = PromptCache(jnp.zeros(W, jnp.int32), cache)
        return prefill(
            self.backend, params, prompts, tokens, lengths, jnp.arange(W)
        ).cache
