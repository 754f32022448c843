"""States with other numbers of rows and slots."""

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.model.backend import Backend
from pr1_jax.sampler.schedule import Schedule
from pr1_jax.sampler.settings import Settings
from pr1_jax.sampler.state import PromptCache, State, init_state


def empty(
    backend: Backend | None,
    settings: Settings,
    schedule: Schedule,
    slots: int,
    prompt_tokens: int,
) -> State:
    """A state of idle rows, of all shards; without caches where there is no backend."""
    rows, entries = (n * schedule.shards for n in (schedule.rows, schedule.entries))
    cache = prompts = None
    if backend is not None:
        cache = backend.empty_cache(rows, slots)
        prompts = backend.empty_cache(entries, prompt_tokens)
        prompts = PromptCache(np.zeros(entries, np.int32), prompts)
    limited = schedule.limited
    return init_state(settings, rows, slots, cache, prompts, limited=limited)


def grow(backend: Backend | None, state: State, slots: int) -> State:
    """The same state over more response slots."""
    more = slots - state.slot_path.shape[1]
    pad = lambda labels: jnp.pad(labels, [(0, 0), (0, more)])
    return state.replace(
        slot_block=pad(state.slot_block),
        slot_path=pad(state.slot_path),
        cache=backend.grow_cache(state.cache, slots) if state.cache else None,
    )


def take(state: State, rows, entries, readers) -> State:
    """Some rows of a state and some entries of its prompt cache.

    Args:
      rows: [B'] int32. entries: [M'] int32.
      readers: [B'] int32, as `State.reader`, of the entries that are taken.
    """
    some_prompts = jax.tree.map(lambda x: x[entries], state.prompts)
    some_rows = jax.tree.map(lambda x: x[rows], state.replace(prompts=None))
    return some_rows.replace(reader=readers, prompts=some_prompts)
