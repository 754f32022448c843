"""Prompts in, trajectories out: the host's side of decoding (spec section 3).

Decoding runs in jitted chunks of steps (`decode.run_chunk`). Between chunks the host
collects finished rows, refills them with waiting responses, and picks the shapes of
the next chunk: how many rows, lanes and slots it has. In the causal variant it also
lays closed blocks out anew. Shapes come from short lists, so few are ever compiled.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pr1_jax import decode, kv_cache, model, sharding
from pr1_jax.rows import Rows
from pr1_jax.trajectory import Trajectory

_FEWEST_ROWS, _FEWEST_SLOTS, _FEWEST_PROMPT_TOKENS = 8, 64, 64  # smallest shapes
_REJOIN_ROWS = 8  # at most


def _doubling(smallest: int, largest: int) -> list[int]:
    """`smallest`, twice it, … up to half of `largest`, and `largest`."""
    sizes = []
    while smallest <= largest / 2:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, largest]


class Sampler:
    """Decodes any number of responses through a fixed batch of rows."""

    def __init__(
        self,
        config: model.ModelConfig | None,
        vocab: decode.Vocab,
        settings: decode.Settings,
        *,
        rows: int,
        group_size: int = 1,
        prompts_per_prefill: int | None = None,
        lane_buckets: Sequence[float] = (1.0, 2.0),
        steps_per_chunk: int = 32,
        refill_share: float = 0.0625,
        decode_fn: decode.DecodeFn | None = None,
    ):
        """Nothing is compiled yet.

        Args:
          config: the model; None where `decode_fn` needs no cache.
          rows: responses decoded at the same time.
          group_size: rows that can share one copy of their prompt.
          prompts_per_prefill: prompts a prefill takes, at most; default `rows`.
          lane_buckets: compiled sizes of the list of live lanes, in units of `rows`.
            1 (main streams only) and `num_paths` are always there.
          steps_per_chunk: decode steps between two looks of the host.
          refill_share: finished rows are refilled once they are this share of all.
          decode_fn: stands in for the model (tests).
        """
        self.config, self.vocab, self.settings = config, vocab, settings
        self.rows, self.seats = rows, min(group_size, rows)
        groups = -(-rows // self.seats)
        # A group that is not quite done keeps its prompt's place: with fewer places,
        # rows would wait for the longest response of some group.
        self.places = rows if self.seats == 1 else min(rows, 5 * groups // 2 + 2)
        self.prompts_per_prefill = min(prompts_per_prefill or rows, self.places)
        self.row_sizes = [n for n in (rows // 4, rows // 2) if n >= _FEWEST_ROWS]
        self.row_sizes.append(rows)
        longest = settings.max_response_tokens
        self.slot_sizes = _doubling(max(_FEWEST_SLOTS, -(-longest // 8)), longest)
        self.prompt_sizes = _doubling(_FEWEST_PROMPT_TOKENS, settings.max_prompt_tokens)
        self._prompt_size = self.prompt_sizes[0]
        shares = {1.0, float(settings.num_paths), *map(float, lane_buckets)}
        self._lane_shares = sorted(s for s in shares if 1 <= s <= settings.num_paths)
        if not settings.max_blocks:
            self._lane_shares = [1.0]
        self._refill_rows = max(1, round(refill_share * rows))
        self.run_chunk = functools.partial(
            decode.run_chunk,
            steps=steps_per_chunk,
            decode=decode_fn or kv_cache.model_decode(config, self.seats),
            vocab=vocab,
            settings=settings,
        )
        self._made: _Programs | None = None
        self.stats: dict[str, float] = {}

    def _prepare(self, params) -> Any:
        """Makes the jitted pieces at the first call; converted parameters."""
        if self._made is None:
            self._made = _Programs(self, jax.tree.leaves(params)[0].sharding)
        return self._made.convert(params)

    def empty(self, slots: int, prompt_tokens: int) -> decode.State:
        """A state of idle rows."""
        cache = prompts = None
        if self.config is not None:
            cache = kv_cache.empty(self.config, self.rows, slots)
            prompts = decode.Prompts(
                np.zeros(self.places, np.int32),
                kv_cache.empty(self.config, self.places, prompt_tokens),
            )
        return decode.init_state(self.settings, self.rows, slots, cache, prompts)

    def _lane_sizes(self, rows: int) -> list[int]:
        shares = self._lane_shares
        if rows < self.rows:  # soon over: not worth more than one compilation
            shares = shares[-1:]
        return sorted({round(share * rows) for share in shares})

    def _start(self, params, state: decode.State, key, admission, ids):
        """Prefills the prompts of an admission and starts its rows."""
        prompts = state.prompts
        if prompts is not None and (admission.places < len(prompts.length)).any():
            prompts = self._made.prefill(
                params,
                prompts,
                admission.prompts,
                admission.prompt_lengths,
                admission.places,
            )
        rows = admission.new, admission.seats, admission.lengths, admission.last_tokens
        return self._made.admit(without_slots(state), key, ids, *rows).replace(
            cache=state.cache,
            prompts=prompts,
            slot_block=state.slot_block,
            slot_path=state.slot_path,
        )

    def warm_up(self, params) -> None:
        """Compiles, on idle batches, all shapes of the fewest slots that there are.

        Where responses outgrow those, or prompts the shortest prompt size, more
        shapes are compiled as they come.
        """
        params = self._prepare(params)
        for rows in self.row_sizes:
            state = self._made.init(self.slot_sizes[0], self._prompt_size)
            host = self._rows([[0]], 1)
            for size in reversed(self.row_sizes):
                if rows < size < self.rows:
                    self._made.take(
                        self._made.take(state, *host.take(size)), *host.take(rows)
                    )
                    host = self._rows([[0]], 1)
            if rows == self.rows:
                admission = host.admit(self.prompts_per_prefill, self._prompt_size)
                start = admission._replace(new=np.zeros_like(admission.new))
                key, ids = jax.random.key(0), host.response
                state = self._start(params, state, key, start, ids)
            else:
                state = self._made.take(state, *host.take(rows))
            for num_lanes in self._lane_sizes(rows):
                state, _, _ = self._made.chunk(num_lanes)(params, state, np.int32(0))
            if self.settings.variant == "causal" and self.settings.max_blocks:
                state = self._lay_out(params, state, host, [])
            jax.block_until_ready(state)

    def sample(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        samples: int,
        key: jax.Array,
        *,
        first: int = 0,
        on_finished: Callable[[int, Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decodes `samples` responses to every prompt.

        `stats` then tells what it took: `prefill_sec`, `decode_sec`, `decode_steps`,
        and `useful_row_steps`, the share of row-steps that wrote something.

        Args:
          prompts: token ids, each 1 to `max_prompt_tokens` long.
          key: PRNG key; response i (prompt-major) draws from `fold_in(key, first + i)`,
            so what is sampled does not depend on how rows are batched.
          first: number of the first response, where these are a part of more.
          on_finished: called with i and response i as soon as it is complete.

        Returns:
          Trajectories, prompt-major.

        Raises:
          ValueError: a prompt is empty or longer than its budget.
        """
        limit = self.settings.max_prompt_tokens
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; "
                    f"rollout.max_prompt_tokens={limit}"
                )
        began = time.perf_counter()
        longest = max((len(prompt) for prompt in prompts), default=1)
        self._prompt_size = max(self._prompt_size, _fit(self.prompt_sizes, longest))
        params = self._prepare(params)
        state = self._made.init(self.slot_sizes[0], self._prompt_size)
        host = self._rows(prompts, samples)
        prefill_sec = 0.0
        steps = row_steps = useful = 0
        while host.waiting or host.occupied.any():
            prefill_began = time.perf_counter()
            while host.waiting and host.num_idle >= self._enough_idle(host):
                admission = host.admit(self.prompts_per_prefill, self._prompt_size)
                if admission is None:
                    break
                ids = host.response + first
                state = self._start(params, state, key, admission, ids)
            jax.block_until_ready(state.prompts)
            prefill_sec += time.perf_counter() - prefill_began

            state = self._fit(host, state)
            num_lanes = self._pick_lanes(host)
            stop = max(self._enough_idle(host), host.num_idle + 1)
            state, log, taken = self._made.chunk(num_lanes)(
                params, state, np.int32(stop)
            )
            # Copies: views would be of buffers that the next call takes over.
            host.phase, host.live = np.array(state.phase), np.array(state.live)
            taken = int(taken)
            useful += host.record(jax.device_get(log), taken)
            steps += taken
            row_steps += taken * len(host.occupied)
            for index in host.collect():
                if on_finished is not None:
                    on_finished(index, host.results[index])
            state = self._close_blocks(params, state, host)
        self.stats = {
            "prefill_sec": prefill_sec,
            "decode_sec": time.perf_counter() - began - prefill_sec,
            "decode_steps": steps,
            "useful_row_steps": useful / max(row_steps, 1),
        }
        return host.results

    def _rows(self, prompts: Sequence[Sequence[int]], samples: int) -> Rows:
        return Rows(
            prompts,
            samples,
            self.settings,
            self.vocab,
            rows=self.rows,
            places=self.places,
            seats=self.seats,
        )

    def _enough_idle(self, host: Rows) -> int:
        """Idle rows at which decoding stops: to refill them, or to go on with fewer."""
        if host.waiting:
            return min(self._refill_rows, len(host.waiting))
        rows = len(host.occupied)
        return rows - max((n for n in self.row_sizes if n < rows), default=0)

    def _fit(self, host: Rows, state: decode.State) -> decode.State:
        """The state with as few rows, and as many slots, as are needed."""
        rows = len(host.occupied)
        if not host.waiting:
            size = _fit(self.row_sizes, rows - host.num_idle)
            if size < rows:
                state = self._made.take(state, *host.take(size))
        slots = _fit(self.slot_sizes, host.num_slots_needed)
        if slots > state.slot_path.shape[1]:
            state = self._made.grow(state, slots)
        return state

    def _pick_lanes(self, host: Rows) -> int:
        """The fewest compiled lanes that can feed all live ones."""
        sizes = self._lane_sizes(len(host.occupied))
        rows = len(host.occupied)
        inside = host.live[:, 1:].any()  # as many lanes as rows are for main streams
        needed = int(host.live.sum())
        return next(n for n in sizes if n >= needed and not (inside and n == rows))

    def _close_blocks(self, params, state: decode.State, host: Rows) -> decode.State:
        """Causal variant: lays out the blocks that wait to be joined."""
        while (rows := np.flatnonzero(host.phase == decode.JOIN)).size:
            rows = rows[:_REJOIN_ROWS]
            state = self._lay_out(params, state, host, rows)
            host.close_block(rows)
        return state

    def _lay_out(self, params, state: decode.State, host: Rows, rows: Sequence[int]):
        """Recomputes the open blocks of up to `_REJOIN_ROWS` rows."""
        blocks = [host.open_block(row) for row in rows]
        T = _fit(self.slot_sizes, max(map(len, blocks), default=1))
        tokens = np.zeros((_REJOIN_ROWS, T), np.int32)
        first, length = np.zeros((2, _REJOIN_ROWS), np.int32)
        padded = np.full(_REJOIN_ROWS, len(host.occupied), np.int32)
        for i, (row, inside) in enumerate(zip(rows, blocks)):
            tokens[i, : len(inside)] = host.fields["token"][row, inside]
            first[i], length[i], padded[i] = inside.min(), len(inside), row
        return self._made.rejoin(params, state, padded, tokens, first, length)


class _Programs:
    """The jitted pieces of a sampler, on the mesh of its parameters.

    Where states live is said once for all pieces, since a piece is compiled anew for
    inputs that lie elsewhere: keys and values split over `tensor` by head, if they
    can be, the rest whole everywhere.
    """

    def __init__(self, sampler: Sampler, params_sharding: jax.sharding.Sharding):
        config, vocab, seats = sampler.config, sampler.vocab, sampler.seats
        state = jax.eval_shape(lambda: sampler.empty(1, 1))
        places = whole = None
        if isinstance(params_sharding, NamedSharding):
            mesh = params_sharding.mesh
            whole = sharding.replicated(mesh)
            heads = whole
            if config is not None and config.num_kv_heads % mesh.shape["tensor"] == 0:
                heads = NamedSharding(mesh, PartitionSpec(None, "tensor"))
            places = jax.tree.map(lambda x: heads if x.ndim == 4 else whole, state)
        prompts, bare = places, places
        if places is not None:
            prompts, bare = places.prompts, without_slots(places)
        jit = functools.partial(jax.jit, out_shardings=places)
        self.init = jit(sampler.empty, static_argnums=(0, 1))
        self.admit = jax.jit(_admit, donate_argnums=0, out_shardings=bare)
        self.grow = jit(kv_cache.grow, static_argnums=1)
        self.take = jit(kv_cache.take)
        rejoin = functools.partial(kv_cache.rejoin, config, vocab, seats)
        self.rejoin = jit(rejoin, donate_argnums=1)
        self.convert = lambda params: params
        if config is not None:
            prefill = functools.partial(kv_cache.prefill, config)
            self.prefill = jax.jit(prefill, donate_argnums=1, out_shardings=prompts)
            convert = functools.partial(kv_cache.decoding_params, config)
            self.convert = jax.jit(convert)
        self._run_chunk, self._places, self._whole = sampler.run_chunk, places, whole
        self._chunks: dict[int, Callable[..., Any]] = {}

    def chunk(self, num_lanes: int) -> Callable[..., Any]:
        """`decode.run_chunk` for so many lanes."""
        if num_lanes not in self._chunks:
            self._chunks[num_lanes] = jax.jit(
                functools.partial(self._run_chunk, num_lanes=num_lanes),
                donate_argnums=1,
                out_shardings=(self._places, self._whole, self._whole),
            )
        return self._chunks[num_lanes]


def without_slots(state: decode.State) -> decode.State:
    """What of a state has no slots, so that work on it is compiled once."""
    return state.replace(cache=None, prompts=None, slot_block=None, slot_path=None)


def _admit(state: decode.State, base_key, ids, *rows) -> decode.State:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base_key, ids)
    return decode.admit(state, *rows, keys)


def _fit(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that will do."""
    return next(size for size in sizes if size >= needed)
