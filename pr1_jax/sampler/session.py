"""One batch of rows that decodes responses while others join and leave.

Decoding runs in jitted chunks of steps (`loop.run_chunk`). Between chunks the host
collects finished rows, refills them with waiting responses, and picks the shapes of the
next chunk: how many rows, lanes and slots it has. In the causal variant it also lays
closed blocks out anew.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.sampler.forward import Blocks
from pr1_jax.sampler.programs import Programs, without_slots
from pr1_jax.sampler.rows import Admission, Queue, Request, Shards
from pr1_jax.sampler.schedule import Schedule, fit
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.sampler.state import JOIN, Limits, State
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


class Session:
    """The rows of one batch, and the responses that wait for them.

    Attributes:
      figures: what has been done so far.
    """

    def __init__(
        self,
        programs: Programs,
        schedule: Schedule,
        settings: Settings,
        vocab: Vocab,
        params: Any,
        key: jax.Array,
        prompt_tokens: int,
    ):
        """All rows are idle.

        Args:
          params: as `Programs.convert` gives them.
          key: PRNG key; a response with number `id` draws from `fold_in(key, id)`, so
            what is sampled does not depend on how rows are batched.
          prompt_tokens: of the longest prompt, as one of `schedule.prompt_sizes`.
        """
        self._programs, self._schedule = programs, schedule
        self._settings, self._params, self._key = settings, params, key
        self._prompt_tokens = prompt_tokens
        self._vocab = vocab
        self._host = self._idle()
        self.figures = Figures()
        self._state = programs.init(schedule.slot_sizes[0], prompt_tokens)

    @property
    def is_busy(self) -> bool:
        """Whether a response waits or is written."""
        return bool(self._host.queue.requests)

    def add(
        self, prompt: Sequence[int], ids: Sequence[int], limits: Limits | None = None
    ) -> list[int]:
        """Lets a response for each id wait; their numbers in this session.

        Args:
          prompt: token ids, 1 to `prompt_tokens`.
          ids: what their draws are numbered by, int32.
          limits: of each, as single numbers; for a session with `Batching.limited`.
        """
        assert 1 <= len(prompt) <= self._prompt_tokens, len(prompt)
        assert limits is None or self._schedule.limited
        return self._host.queue.add(prompt, ids, limits)

    def drop(self, numbers: set[int]) -> None:
        """Forgets some responses, whether they wait or are written."""
        rows = self._host.drop(numbers)
        if rows.any():
            self._drop_rows(rows)

    def advance(self) -> dict[int, Trajectory]:
        """Starts what can start, and decodes a chunk; what it has finished, by number."""
        began = time.perf_counter()
        self._close_blocks()
        prefill_began = time.perf_counter()
        self._refill()
        prefill_sec = time.perf_counter() - prefill_began
        self._decode()
        numbers = self._host.collect()
        self.figures.prefill_sec += prefill_sec
        self.figures.decode_sec += time.perf_counter() - began - prefill_sec
        return {number: self._host.queue.results.pop(number) for number in numbers}

    def unfinished(self) -> dict[int, Trajectory]:
        """The responses that are being written, as far as they are, by number."""
        return self._host.unfinished()

    def warm_up(self, rows: int) -> None:
        """Compiles what an idle batch needs that has come to have so many rows.

        Only for this: the session is of no use afterwards.
        """
        programs, schedule = self._programs, self._schedule
        for size in schedule.row_sizes:
            if rows < size < schedule.rows:  # as a batch shrinks in two steps
                host = self._idle()
                some = programs.take(self._state, *host.take(size))
                programs.take(some, *host.take(rows))
        self._host = self._idle()
        if rows == schedule.rows:
            self.add([0], [0])
            admission = self._host.admit(
                schedule.prompts_per_prefill, self._prompt_tokens
            )
            self._start(admission._replace(new=np.zeros_like(admission.new)))
            self._drop_rows(np.zeros(len(admission.new), bool))
        else:
            self._state = programs.take(self._state, *self._host.take(rows))
        for num_lanes in schedule.lane_sizes(rows):
            chunk = programs.chunk(num_lanes)
            self._state, _, _ = chunk(self._params, self._state, np.int32(0))
        if self._settings.variant == "causal" and self._settings.max_blocks:
            self._lay_out([[]] * schedule.shards)
        jax.block_until_ready(self._state)

    # --- Between chunks -------------------------------------------------------------

    def _refill(self) -> None:
        """Starts waiting responses while enough rows are idle."""
        host, schedule = self._host, self._schedule
        while host.queue.waiting and host.num_idle >= self._enough_idle():
            admission = host.admit(schedule.prompts_per_prefill, self._prompt_tokens)
            if not admission.new.any():
                break
            self._start(admission)
        jax.block_until_ready(self._state.prompts)

    def _start(self, admission: Admission) -> None:
        """Prefills the prompts of an admission and starts its rows."""
        prompts = self._state.prompts
        is_used = admission.entries < self._schedule.entries
        if prompts is not None and is_used.any():
            prompts = self._programs.prefill(
                self._params,
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
        requests = self._host.requests
        ids = np.array([0 if r is None else r.id for r in requests], np.int32)
        limits = _limits(requests, self._settings) if self._schedule.limited else None
        bare = without_slots(self._state)
        bare = self._programs.admit(bare, self._key, ids, rows, limits)
        self._state = _with_slots(bare, self._state.replace(prompts=prompts))

    def _drop_rows(self, rows: np.ndarray) -> None:
        if self._schedule.limited:
            bare = self._programs.drop(without_slots(self._state), rows)
            self._state = _with_slots(bare, self._state)

    def _decode(self) -> None:
        """A chunk of steps in the shapes that are needed."""
        self._fit()
        host, figures = self._host, self.figures
        num_lanes = self._schedule.lanes(
            host.rows, host.num_lanes_needed, host.is_inside_block
        )
        stop = max(self._enough_idle(), host.num_idle + 1)
        chunk = self._programs.chunk(num_lanes)
        self._state, log, taken = chunk(self._params, self._state, np.int32(stop))
        # Copies: views would be of buffers that the next call takes over.
        phase, live = np.array(self._state.phase), np.array(self._state.live)
        taken = int(taken)
        figures.wrote += host.record(phase, live, jax.device_get(log), taken)
        figures.decode_steps += taken
        figures.row_steps += taken * len(phase)

    def _enough_idle(self) -> int:
        return self._schedule.enough_idle(
            self._host.rows, len(self._host.queue.waiting)
        )

    def _fit(self) -> None:
        """Leaves as few rows, and as many slots, as are needed."""
        host, schedule = self._host, self._schedule
        if not host.queue.waiting:
            size = fit(schedule.row_sizes, host.most_occupied)
            if size < host.rows:
                self._state = self._programs.take(self._state, *host.take(size))
        slots = fit(schedule.slot_sizes, host.num_slots_needed)
        if slots > self._state.slot_path.shape[1]:
            self._state = self._programs.grow(self._state, slots)

    def _idle(self) -> Shards:
        """The host's side of a batch in which every row is idle."""
        return Shards(Queue(), self._settings, self._vocab, self._schedule)

    # --- The causal variant ---------------------------------------------------------

    def _close_blocks(self) -> None:
        """Lays out the blocks that wait to be joined."""
        while True:
            rows = [
                np.flatnonzero(shard.phase == JOIN)[:_REJOIN_ROWS]
                for shard in self._host.shards
            ]
            if not any(map(len, rows)):
                return
            self._lay_out(rows)
            for shard, some in zip(self._host.shards, rows):
                shard.close_block(some)

    def _lay_out(self, rows: Sequence[Sequence[int]]) -> None:
        """Recomputes the open blocks of up to `_REJOIN_ROWS` rows of each shard."""
        host, schedule = self._host, self._schedule
        blocks = []  # index among the arguments, row, shard, its path tokens
        for number, (shard, some) in enumerate(zip(host.shards, rows)):
            for i, row in enumerate(some):
                index = number * _REJOIN_ROWS + i
                blocks.append((index, row, shard, shard.open_block(row)))
        wide = schedule.shards * _REJOIN_ROWS
        longest = max((len(block[-1]) for block in blocks), default=1)
        tokens = np.zeros((wide, fit(schedule.slot_sizes, longest)), np.int32)
        first, length = np.zeros((2, wide), np.int32)
        padded = np.full(wide, host.rows, np.int32)
        for index, row, shard, inside in blocks:
            tokens[index, : len(inside)] = shard.fields["token"][row, inside]
            padded[index] = row
            first[index], length[index] = inside.min(), len(inside)
        some = Blocks(padded, tokens, first, length)
        self._state = self._programs.rejoin(self._params, self._state, some)


def _with_slots(bare: State, state: State) -> State:
    """What `without_slots` has left of a state, with the slots of another."""
    return bare.replace(
        cache=state.cache,
        prompts=state.prompts,
        slot_block=state.slot_block,
        slot_path=state.slot_path,
    )


def _limits(requests: Sequence[Request | None], settings: Settings) -> Limits:
    """The limits [B] of what rows decode; those of the settings where they are idle."""
    all_ = Limits.of(settings)
    given = [all_ if r is None or r.limits is None else r.limits for r in requests]
    return Limits.stack(given)
