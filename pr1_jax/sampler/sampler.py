"""Prompts in, trajectories out: the host's side of decoding (spec section 3).

Decoding runs in jitted chunks of steps (`decode_loop`). Between chunks the host
collects finished rows, refills them with waiting responses, and picks the shapes of
the next chunk: how many rows, lanes and slots it has. In the causal variant it also
lays closed blocks out anew. Shapes come from short lists, so few are ever compiled.

On several devices rows are split into shards, over `data` and `fsdp`. Each shard holds
its rows' prompts and caches, and decodes them by itself; the shards only agree on when
to stop. What is sampled does not depend on how many there are.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.model.config import ModelConfig
from pr1_jax.sampler import loop
from pr1_jax.sampler.cache import empty
from pr1_jax.sampler.forward import model_decode
from pr1_jax.sampler.programs import Programs, without_slots
from pr1_jax.sampler.rows import Admission, Queue, Shards
from pr1_jax.sampler.schedule import (
    FEWEST_PROMPT_TOKENS,
    FEWEST_ROWS,
    FEWEST_SLOTS,
    doubling,
    fit,
)
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.sampler.state import JOIN, DecodeFn, Prompts, State, init_state
from pr1_jax.system import mesh
from pr1_jax.trajectory import Trajectory

_REJOIN_ROWS = 8  # at most


class Sampler:
    """Decodes any number of responses through a fixed batch of rows."""

    def __init__(
        self,
        config: ModelConfig | None,
        vocab: Vocab,
        settings: Settings,
        *,
        rows: int,
        shards: int = 1,
        group_size: int = 1,
        prompts_per_prefill: int | None = None,
        lane_buckets: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
        steps_per_chunk: int = 32,
        refill_share: float = 0.0625,
        decode_fn: DecodeFn | None = None,
    ):
        """Nothing is compiled yet.

        Args:
          config: the model; None where `decode_fn` needs no cache.
          rows: responses decoded at the same time, by all shards together; rounded up
            to a multiple of them.
          shards: parts that this process's devices split rows into.
          group_size: rows that can share one copy of their prompt.
          prompts_per_prefill: prompts a prefill takes, at most; default `rows`.
          lane_buckets: compiled sizes of the list of live lanes, in units of `rows`.
            1 (main streams only) and `num_paths` are always there, more never.
          steps_per_chunk: decode steps between two looks of the host.
          refill_share: finished rows are refilled once they are this share of all.
          decode_fn: stands in for the model (tests).
        """
        self.config, self.vocab, self.settings = config, vocab, settings
        self.shards = shards
        refill_rows = max(1, round(refill_share * rows))  # of all shards
        rows = -(-rows // shards)  # all that follows is of one shard
        self.rows, self.seats = rows, min(group_size, rows)
        groups = -(-rows // self.seats)
        # A group that is not quite done keeps its prompt's place: with fewer places,
        # rows would wait for the longest response of some group.
        self.places = rows if self.seats == 1 else min(rows, 5 * groups // 2 + 2)
        per_prefill = -(-(prompts_per_prefill or rows * shards) // shards)
        self.prompts_per_prefill = min(per_prefill, self.places)
        self.row_sizes = [n for n in (rows // 4, rows // 2) if n >= FEWEST_ROWS]
        self.row_sizes.append(rows)
        longest = settings.max_response_tokens
        self.slot_sizes = doubling(max(FEWEST_SLOTS, -(-longest // 8)), longest)
        self.prompt_sizes = doubling(FEWEST_PROMPT_TOKENS, settings.max_prompt_tokens)
        self._prompt_size = self.prompt_sizes[0]
        shares = {1.0, float(settings.num_paths), *map(float, lane_buckets)}
        self._lane_shares = sorted(s for s in shares if 1 <= s <= settings.num_paths)
        if not settings.max_blocks:
            self._lane_shares = [1.0]
        self._refill_rows = refill_rows
        self.run_chunk = functools.partial(
            loop.run_chunk,
            steps=steps_per_chunk,
            decode_fn=decode_fn or model_decode(config, self.seats),
            vocab=vocab,
            settings=settings,
            kernels=config is not None and config.cpu_kernels,
            axes=mesh.RULES["batch"] if shards > 1 else (),
        )
        self._made: Programs | None = None
        self.stats: dict[str, float] = {}

    def _prepare(self, params) -> Any:
        """Makes the jitted pieces at the first call; converted parameters."""
        if self._made is None:
            self._made = Programs(self, jax.tree.leaves(params)[0].sharding)
        return self._made.convert(params)

    def empty(self, slots: int, prompt_tokens: int) -> State:
        """A state of idle rows, of all shards."""
        rows, places = self.rows * self.shards, self.places * self.shards
        cache = prompts = None
        if self.config is not None:
            cache = empty(self.config, rows, slots)
            prompts = Prompts(
                np.zeros(places, np.int32),
                empty(self.config, places, prompt_tokens),
            )
        return init_state(self.settings, rows, slots, cache, prompts)

    def lower(
        self, abstract_params, *, slots: int, prompt_tokens: int, num_lanes: int
    ) -> dict[str, jax.stages.Lowered]:
        """The prefill and a chunk of decoding, for the devices of these parameters.

        Args:
          abstract_params: tree of jax.ShapeDtypeStruct with shardings on one mesh.
          slots: of a response's cache. num_lanes: of one shard.
        """
        made = Programs(self, jax.tree.leaves(abstract_params)[0].sharding)
        params = made.abstract_params(abstract_params)
        state = jax.eval_shape(lambda: made.init(slots, prompt_tokens))
        state = made.place(state)
        wide = self.shards * self.prompts_per_prefill
        admission = (
            np.zeros((wide, prompt_tokens), np.int32),
            *np.zeros((2, wide), np.int32),
        )
        return {
            "prefill": made.prefill.lower(params, state.prompts, *admission),
            "decode": made.chunk(num_lanes).lower(params, state, np.int32(0)),
        }

    def _lane_sizes(self, rows: int) -> list[int]:
        shares = self._lane_shares
        if rows < self.rows and self.settings.num_paths <= 2:
            shares = shares[-1:]  # soon over: not worth more than one compilation
        return sorted({round(share * rows) for share in shares})

    def _start(self, params, state: State, key, admission: Admission, ids):
        """Prefills the prompts of an admission and starts its rows."""
        prompts = state.prompts
        if prompts is not None and (admission.places < self.places).any():
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

    def warm_up(self, params, prompt_tokens: int = 1) -> None:
        """Compiles, on idle batches, all shapes of the fewest slots that there are.

        Where responses outgrow those, or prompts the size that `prompt_tokens` fit
        in, more shapes are compiled as they come.
        """
        size = fit(self.prompt_sizes, prompt_tokens)
        self._prompt_size = max(self._prompt_size, size)
        params = self._prepare(params)
        for rows in self.row_sizes:
            state = self._made.init(self.slot_sizes[0], self._prompt_size)
            host = self._host([[0]], 1)
            for size in reversed(self.row_sizes):
                if rows < size < self.rows:
                    self._made.take(
                        self._made.take(state, *host.take(size)), *host.take(rows)
                    )
                    host = self._host([[0]], 1)
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
                state = self._lay_out(params, state, host, [[]] * self.shards)
            jax.block_until_ready(state)

    def sample(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        samples: int,
        key: jax.Array,
        *,
        ids: Sequence[int] | None = None,
        on_finished: Callable[[int, Trajectory], None] | None = None,
        on_chunk: Callable[[dict[int, Trajectory]], None] | None = None,
    ) -> list[Trajectory]:
        """Decodes `samples` responses to every prompt.

        `stats` then tells what it took: `prefill_sec`, `decode_sec`, `decode_steps`,
        and `useful_row_steps`, the share of row-steps that wrote something.

        Args:
          prompts: token ids, each 1 to `max_prompt_tokens` long.
          key: PRNG key; response i (prompt-major) draws from `fold_in(key, ids[i])`,
            so what is sampled does not depend on how rows are batched.
          ids: the responses' numbers, where these are a part of more; default 0, 1, ….
          on_finished: called with i and response i as soon as it is complete.
          on_chunk: called after every chunk with the responses that are not, by i, as
            far as they are written. What it raises ends the sampling.

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
        if ids is None:
            ids = np.arange(len(prompts) * samples)
        ids = np.asarray(ids, np.int32)
        longest = max((len(prompt) for prompt in prompts), default=1)
        self._prompt_size = max(self._prompt_size, fit(self.prompt_sizes, longest))
        params = self._prepare(params)
        state = self._made.init(self.slot_sizes[0], self._prompt_size)
        host = self._host(prompts, samples)
        waiting, results = host.queue.waiting, host.queue.results
        prefill_sec = 0.0
        steps = row_steps = useful = 0
        while waiting or host.most_occupied:
            prefill_began = time.perf_counter()
            while waiting and host.num_idle >= self._enough_idle(host):
                admission = host.admit(self.prompts_per_prefill, self._prompt_size)
                if not admission.new.any():
                    break
                state = self._start(params, state, key, admission, ids[host.response])
            jax.block_until_ready(state.prompts)
            prefill_sec += time.perf_counter() - prefill_began

            state = self._fit(host, state)
            num_lanes = self._pick_lanes(host)
            stop = max(self._enough_idle(host), host.num_idle + 1)
            state, log, taken = self._made.chunk(num_lanes)(
                params, state, np.int32(stop)
            )
            # Copies: views would be of buffers that the next call takes over.
            phase, live = np.array(state.phase), np.array(state.live)
            taken = int(taken)
            useful += host.record(phase, live, jax.device_get(log), taken)
            steps += taken
            row_steps += taken * len(phase)
            for index in host.collect():
                if on_finished is not None:
                    on_finished(index, results[index])
            if on_chunk is not None:
                on_chunk(host.unfinished())
            state = self._close_blocks(params, state, host)
        self.stats = {
            "prefill_sec": prefill_sec,
            "decode_sec": time.perf_counter() - began - prefill_sec,
            "decode_steps": steps,
            "useful_row_steps": useful / max(row_steps, 1),
        }
        return results

    def _host(self, prompts: Sequence[Sequence[int]], samples: int) -> Shards:
        return Shards(
            self.shards,
            Queue(prompts, samples),
            self.settings,
            self.vocab,
            rows=self.rows,
            places=self.places,
            seats=self.seats,
        )

    def _enough_idle(self, host: Shards) -> int:
        """Idle rows at which decoding stops: to refill them, or to go on with fewer."""
        if host.queue.waiting:
            return min(self._refill_rows, len(host.queue.waiting))
        fewer = max((n for n in self.row_sizes if n < host.rows), default=0)
        return (host.rows - fewer) * self.shards

    def _fit(self, host: Shards, state: State) -> State:
        """The state with as few rows, and as many slots, as are needed."""
        if not host.queue.waiting:
            size = fit(self.row_sizes, host.most_occupied)
            if size < host.rows:
                state = self._made.take(state, *host.take(size))
        slots = fit(self.slot_sizes, host.num_slots_needed)
        if slots > state.slot_path.shape[1]:
            state = self._made.grow(state, slots)
        return state

    def _pick_lanes(self, host: Shards) -> int:
        """The fewest compiled lanes of a shard that can feed all live ones."""
        needed, inside = host.num_lanes_needed, host.is_inside_block
        fits = lambda n: n >= needed and not (inside and n == host.rows)
        return next(n for n in self._lane_sizes(host.rows) if fits(n))

    def _close_blocks(self, params, state: State, host: Shards) -> State:
        """Causal variant: lays out the blocks that wait to be joined."""
        while True:
            rows = [
                np.flatnonzero(shard.phase == JOIN)[:_REJOIN_ROWS]
                for shard in host.shards
            ]
            if not any(map(len, rows)):
                return state
            state = self._lay_out(params, state, host, rows)
            for shard, some in zip(host.shards, rows):
                shard.close_block(some)

    def _lay_out(self, params, state, host: Shards, rows: Sequence[Sequence[int]]):
        """Recomputes the open blocks of up to `_REJOIN_ROWS` rows of each shard."""
        blocks = []  # place among the arguments, row, shard, its path tokens
        for number, (shard, some) in enumerate(zip(host.shards, rows)):
            for i, row in enumerate(some):
                place = number * _REJOIN_ROWS + i
                blocks.append((place, row, shard, shard.open_block(row)))
        wide = self.shards * _REJOIN_ROWS
        T = fit(self.slot_sizes, max((len(block[-1]) for block in blocks), default=1))
        tokens = np.zeros((wide, T), np.int32)
        first, length = np.zeros((2, wide), np.int32)
        padded = np.full(wide, host.rows, np.int32)
        for place, row, shard, inside in blocks:
            tokens[place, : len(inside)] = shard.fields["token"][row, inside]
            padded[place] = row
            first[place], length[place] = inside.min(), len(inside)
        return self._made.rejoin(params, state, padded, tokens, first, length)
