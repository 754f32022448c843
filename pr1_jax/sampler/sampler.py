"""Prompts in, trajectories out: the host's side of decoding (docs/method.md, section 3).

Decoding runs in jitted chunks of steps (`loop.run_chunk`). Between chunks the host
collects finished rows, refills them with waiting responses, and picks the shapes of the
next chunk: how many rows, lanes and slots it has. In the causal variant it also lays
closed blocks out anew.

On several devices rows are split into shards, over `data` and `fsdp`. Each shard holds
its rows' prompts and caches, and decodes them by itself; the shards only agree on when
to stop. What is sampled does not depend on how many there are.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.model.backend import Backend
from pr1_jax.model.xla import Xla
from pr1_jax.sampler.forward import Blocks, model_decode
from pr1_jax.sampler.loop import Decoding
from pr1_jax.sampler.programs import Programs, without_slots
from pr1_jax.sampler.rows import Admission, Queue, Shards
from pr1_jax.sampler.schedule import Batching, Schedule, fit
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.sampler.state import JOIN, DecodeFn, State
from pr1_jax.trajectory import Trajectory

_REJOIN_ROWS = 8  # at most


@dataclasses.dataclass
class Figures:
    """What a call of the sampler took."""

    prefill_sec: float = 0.0
    decode_sec: float = 0.0
    decode_steps: int = 0
    row_steps: int = 0  # rows times steps
    wrote: int = 0  # row-steps that wrote something

    @property
    def useful_row_steps(self) -> float:
        """Share of row-steps that wrote something."""
        return self.wrote / max(self.row_steps, 1)


class Sampler:
    """Decodes any number of responses through a fixed batch of rows.

    Attributes:
      backend, vocab, settings: as given. schedule: the shapes that follow.
    """

    def __init__(
        self,
        backend: Backend | None,
        vocab: Vocab,
        settings: Settings,
        batching: Batching,
        *,
        decode_fn: DecodeFn | None = None,
    ):
        """Nothing is compiled yet.

        Args:
          backend: computes the model; None where `decode_fn` needs no cache.
          decode_fn: stands in for the model (tests).

        Raises:
          ValueError: paths have no room for their labels.
        """
        settings.check_vocab(vocab)
        self.backend, self.vocab, self.settings = backend, vocab, settings
        self.schedule = Schedule(settings, batching)
        decode_fn = decode_fn or model_decode(backend, self.schedule.readers)
        draw = Xla.draw if backend is None else backend.draw
        self._decoding = Decoding(decode_fn, draw, vocab, settings)
        self._prompt_size = self.schedule.prompt_sizes[0]
        self._programs: Programs | None = None

    def _make(self, params) -> Programs:
        sharding = jax.tree.leaves(params)[0].sharding
        return Programs(self.backend, self._decoding, self.schedule, sharding)

    def _prepare(self, params) -> Any:
        """Makes the jitted pieces at the first call; converted parameters."""
        if self._programs is None:
            self._programs = self._make(params)
        return self._programs.convert(params)

    def lower(
        self, abstract_params, *, slots: int, prompt_tokens: int, num_lanes: int
    ) -> dict[str, jax.stages.Lowered]:
        """The prefill and a chunk of decoding, for the devices of these parameters.

        Args:
          abstract_params: tree of jax.ShapeDtypeStruct with shardings on one mesh.
          slots: of a response's cache. num_lanes: of one shard.
        """
        programs = self._make(abstract_params)
        params = programs.abstract_params(abstract_params)
        state = programs.abstract_state(slots, prompt_tokens)
        wide = self.schedule.shards * self.schedule.prompts_per_prefill
        prompts = np.zeros((wide, prompt_tokens), np.int32)
        lengths, entries = np.zeros((2, wide), np.int32)
        prefill = programs.prefill.lower(
            params, state.prompts, prompts, lengths, entries
        )
        chunk = programs.chunk(num_lanes).lower(params, state, np.int32(0))
        return {"prefill": prefill, "decode": chunk}

    def warm_up(self, params, prompt_tokens: int = 1) -> None:
        """Compiles, on idle batches, all shapes of the fewest slots that there are.

        Where responses outgrow those, or prompts the size that `prompt_tokens` fit
        in, more shapes are compiled as they come.
        """
        self._fit_prompts(prompt_tokens)
        params = self._prepare(params)
        programs, schedule = self._programs, self.schedule
        for rows in schedule.row_sizes:
            state = programs.init(schedule.slot_sizes[0], self._prompt_size)
            for size in schedule.row_sizes:
                if rows < size < schedule.rows:  # as a batch shrinks in two steps
                    host = self._host([[0]], 1)
                    some = programs.take(state, *host.take(size))
                    programs.take(some, *host.take(rows))
            host = self._host([[0]], 1)
            if rows == schedule.rows:
                admission = host.admit(schedule.prompts_per_prefill, self._prompt_size)
                start = admission._replace(new=np.zeros_like(admission.new))
                key, ids = jax.random.key(0), host.response
                state = self._start(params, state, key, start, ids)
            else:
                state = programs.take(state, *host.take(rows))
            for num_lanes in schedule.lane_sizes(rows):
                state, _, _ = programs.chunk(num_lanes)(params, state, np.int32(0))
            if self.settings.variant == "causal" and self.settings.max_blocks:
                state = self._lay_out(params, state, host, [[]] * schedule.shards)
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
    ) -> tuple[list[Trajectory], Figures]:
        """Decodes `samples` responses to every prompt.

        Args:
          prompts: token ids, each 1 to `max_prompt_tokens` long.
          key: PRNG key; response i (prompt-major) draws from `fold_in(key, ids[i])`,
            so what is sampled does not depend on how rows are batched.
          ids: the responses' numbers, where these are a part of more; default 0, 1, ….
          on_finished: called with i and response i as soon as it is complete.
          on_chunk: called after every chunk with the responses that are not, by i, as
            far as they are written. What it raises ends the sampling.

        Returns:
          Trajectories, prompt-major, and what they took.

        Raises:
          ValueError: a prompt is empty or longer than its budget.
        """
        self._check(prompts)
        began = time.perf_counter()
        if ids is None:
            ids = np.arange(len(prompts) * samples)
        ids = np.asarray(ids, np.int32)
        self._fit_prompts(max((len(prompt) for prompt in prompts), default=1))
        params = self._prepare(params)
        state = self._programs.init(self.schedule.slot_sizes[0], self._prompt_size)
        host, figures = self._host(prompts, samples), Figures()
        while host.queue.waiting or host.most_occupied:
            prefill_began = time.perf_counter()
            state = self._refill(params, state, host, key, ids)
            figures.prefill_sec += time.perf_counter() - prefill_began
            state = self._decode(params, state, host, figures)
            for index in host.collect():
                if on_finished is not None:
                    on_finished(index, host.queue.results[index])
            if on_chunk is not None:
                on_chunk(host.unfinished())
            state = self._close_blocks(params, state, host)
        figures.decode_sec = time.perf_counter() - began - figures.prefill_sec
        return host.queue.results, figures

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        limit = self.settings.max_prompt_tokens
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; "
                    f"rollout.max_prompt_tokens={limit}"
                )

    def _fit_prompts(self, tokens: int) -> None:
        """Makes the prompt cache wide enough; it stays so in later calls."""
        size = fit(self.schedule.prompt_sizes, tokens)
        self._prompt_size = max(self._prompt_size, size)

    def _host(self, prompts: Sequence[Sequence[int]], samples: int) -> Shards:
        queue = Queue(prompts, samples)
        return Shards(queue, self.settings, self.vocab, self.schedule)

    # --- Between chunks -------------------------------------------------------------

    def _refill(self, params, state: State, host: Shards, key, ids) -> State:
        """Starts waiting responses while enough rows are idle."""
        while host.queue.waiting and host.num_idle >= self._enough_idle(host):
            admission = host.admit(self.schedule.prompts_per_prefill, self._prompt_size)
            if not admission.new.any():
                break
            state = self._start(params, state, key, admission, ids[host.response])
        jax.block_until_ready(state.prompts)
        return state

    def _start(self, params, state: State, key, admission: Admission, ids) -> State:
        """Prefills the prompts of an admission and starts its rows."""
        prompts = state.prompts
        is_used = admission.entries < self.schedule.entries
        if prompts is not None and is_used.any():
            prompts = self._programs.prefill(
                params,
                prompts,
                admission.prompts,
                admission.prompt_lengths,
                admission.entries,
            )
        rows = (
            admission.new,
            admission.readers,
            admission.lengths,
            admission.last_tokens,
        )
        return self._programs.admit(without_slots(state), key, ids, *rows).replace(
            cache=state.cache,
            prompts=prompts,
            slot_block=state.slot_block,
            slot_path=state.slot_path,
        )

    def _decode(self, params, state: State, host: Shards, figures: Figures) -> State:
        """A chunk of steps in the shapes that are needed."""
        state = self._fit(host, state)
        num_lanes = self.schedule.lanes(
            host.rows, host.num_lanes_needed, host.is_inside_block
        )
        stop = max(self._enough_idle(host), host.num_idle + 1)
        chunk = self._programs.chunk(num_lanes)
        state, log, taken = chunk(params, state, np.int32(stop))
        # Copies: views would be of buffers that the next call takes over.
        phase, live = np.array(state.phase), np.array(state.live)
        taken = int(taken)
        figures.wrote += host.record(phase, live, jax.device_get(log), taken)
        figures.decode_steps += taken
        figures.row_steps += taken * len(phase)
        return state

    def _enough_idle(self, host: Shards) -> int:
        return self.schedule.enough_idle(host.rows, len(host.queue.waiting))

    def _fit(self, host: Shards, state: State) -> State:
        """The state with as few rows, and as many slots, as are needed."""
        if not host.queue.waiting:
            size = fit(self.schedule.row_sizes, host.most_occupied)
            if size < host.rows:
                state = self._programs.take(state, *host.take(size))
        slots = fit(self.schedule.slot_sizes, host.num_slots_needed)
        if slots > state.slot_path.shape[1]:
            state = self._programs.grow(state, slots)
        return state

    # --- The causal variant ---------------------------------------------------------

    def _close_blocks(self, params, state: State, host: Shards) -> State:
        """Lays out the blocks that wait to be joined."""
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
        blocks = []  # index among the arguments, row, shard, its path tokens
        for number, (shard, some) in enumerate(zip(host.shards, rows)):
            for i, row in enumerate(some):
                index = number * _REJOIN_ROWS + i
                blocks.append((index, row, shard, shard.open_block(row)))
        wide = self.schedule.shards * _REJOIN_ROWS
        longest = max((len(block[-1]) for block in blocks), default=1)
        tokens = np.zeros((wide, fit(self.schedule.slot_sizes, longest)), np.int32)
        first, length = np.zeros((2, wide), np.int32)
        padded = np.full(wide, host.rows, np.int32)
        for index, row, shard, inside in blocks:
            tokens[index, : len(inside)] = shard.fields["token"][row, inside]
            padded[index] = row
            first[index], length[index] = inside.min(), len(inside)
        some = Blocks(padded, tokens, first, length)
        return self._programs.rejoin(params, state, some)
