"""The baseline's side of the device: decode steps and prefills of requests."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pr1_jax import policy
from pr1_jax.bench.plans import follow
from pr1_jax.model.backend import Backend
from pr1_jax.model.forward import forward
from pr1_jax.model.xla import Step
from pr1_jax.sampler.forward import prefill
from pr1_jax.sampler.settings import Vocab
from pr1_jax.sampler.state import PromptCache


@flax.struct.dataclass
class State:
    """B rows that decode a request each; [B] but for the cache."""

    token: jax.Array  # int32, pending: to be fed
    slot: jax.Array  # int32, the pending token's, which is its position, too
    left: jax.Array  # int32, tokens to draw
    last: jax.Array  # int32, the one that is drawn last
    live: jax.Array  # bool
    key: jax.Array  # PRNG keys
    count: jax.Array  # int32, steps
    cache: Any = None  # of `Backend.empty_cache`


def _step(
    backend: Backend, vocab: Vocab, params, state: State
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Feeds all live rows; what each drew, −1 where nothing, and its log-prob."""
    B, S = state.token.shape[0], state.cache[0][-1].shape[2]
    row = jnp.nonzero(state.live, size=B, fill_value=B)[0]  # live ones first
    index, count = jnp.minimum(row, B - 1), state.live.sum(dtype=jnp.int32)
    main = jnp.zeros((B, 1), jnp.int32)
    step = Step(
        row=row,
        index=row,
        slot=state.slot[index],
        count=count,
        live=state.live[:, None],
        block=main,
        path=main,
        filled=state.slot + 1,
        slot_block=jnp.zeros((B, S), jnp.int32),
        slot_path=jnp.zeros((B, S), jnp.int32),
    )
    hidden, cache = forward(
        backend,
        params,
        state.token[index],
        state.slot[index],
        backend.step_attention(step),
        tuple((own, None) for own in state.cache),
        live=count,
    )
    wanted = jnp.where(state.live & (state.left == 1), state.last, -1)
    logits = policy.policy_logits(
        follow(backend.logits(params, hidden, count), wanted[index], vocab),
        jnp.zeros(B, jnp.int32),
        special_ids=vocab.special_ids,
        num_tokens=vocab.num_tokens,
    )
    in_list = jnp.clip(jnp.cumsum(state.live) - 1, 0)
    drawn, logps = (
        x[in_list]
        for x in backend.draw(logits, state.key[index], state.count[index], count)
    )
    left = state.left - state.live
    emitted = jnp.where(state.live, drawn, -1), logps
    state = state.replace(
        token=drawn,
        slot=state.slot + state.live,
        left=left,
        live=state.live & (left > 0),
        count=state.count + state.live,
        cache=cache,
    )
    return state, emitted


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

    def put_layer(old, new):  # an entry's last array has its slots on axis 2
        *keys, values = zip(old, new, strict=True)
        keys = [put(x, y, 3 if x.ndim == 4 else 2) for x, y in keys]
        return *keys, put(*values, 2)

    return tuple(map(put_layer, cache, fresh))


class Programs:
    """The compiled pieces; one set serves plans with any number of paths."""

    def __init__(
        self,
        backend: Backend,
        vocab: Vocab,
        *,
        steps_per_chunk: int = 32,
        prefill_rows: Sequence[int],
    ):
        """Nothing is compiled yet. The defaults are the sampler's, where it has them.

        Args:
          prefill_rows: numbers of contexts that prefills are padded to.
        """
        self.backend, self.vocab = backend, vocab
        self.prefill_rows = sorted(prefill_rows, reverse=True)
        chunk = functools.partial(_run_chunk, backend, vocab, steps_per_chunk)
        self.chunk = jax.jit(chunk, donate_argnums=1)
        self.start = jax.jit(_start, donate_argnums=0)
        self.resize = jax.jit(functools.partial(_resize, backend), static_argnums=2)
        self.insert = jax.jit(_insert, donate_argnums=0)
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
