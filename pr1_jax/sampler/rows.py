"""What the host knows of one call of the sampler: the queue, the rows, the records.

Rows are split over shards of the devices. A shard's rows, and the prompts that they
read, are numbered from 0; `Shards` has them all, one shard after the other, as the
arrays on the devices do.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pr1_jax.sampler.settings import END_PARALLEL, EOS, Settings, Vocab
from pr1_jax.sampler.state import DONE, MAIN, NEWLINE, Emission
from pr1_jax.trajectory import Trajectory

_FIELDS = [f.name for f in dataclasses.fields(Emission)]


class Admission(NamedTuple):
    """Rows that start, [B] each, and the prompts to prefill for them, W of them.

    Of several shards, one after the other.
    """

    new: np.ndarray  # bool
    seats: np.ndarray  # int32
    lengths: np.ndarray  # int32, of the rows' prompts
    last_tokens: np.ndarray  # int32
    prompts: np.ndarray  # [W, T] int32, right-padded
    prompt_lengths: np.ndarray  # [W] int32
    places: np.ndarray  # [W] int32; the number of places = unused


class Queue:
    """Responses that wait, prompt-major, and those that are done."""

    def __init__(self, prompts: Sequence[Sequence[int]], samples: int):
        self.prompts = [np.asarray(p, np.int32) for p in prompts]
        self.samples = samples
        self.waiting = deque(range(len(prompts) * samples))
        self.results: list[Trajectory | None] = [None] * len(self.waiting)


class Rows:
    """Which response each row decodes, which prompt it reads, what it has written.

    Of one shard. A prompt has a place while rows respond to it, and a seat for each of
    them.
    """

    def __init__(
        self,
        queue: Queue,
        settings: Settings,
        vocab: Vocab,
        *,
        rows: int,
        places: int,
        seats: int,
    ):
        self.queue, self.settings, self.vocab = queue, settings, vocab
        self.places, self.seats = places, seats
        self.placed = np.full(places, -1)  # the prompt in each place
        # By row.
        self.occupied = np.zeros(rows, bool)
        self.response = np.zeros(rows, np.int32)  # which response it decodes
        self.seat = np.zeros(rows, np.int32)
        self.phase = np.full(rows, DONE)
        self.live = np.zeros((rows, settings.num_paths), bool)
        self.count = np.zeros(rows, np.int32)
        self.steps = np.zeros(rows, np.int32)
        # Records in order of emission, [rows, max_response_tokens] each.
        shape = (rows, settings.max_response_tokens)
        self.fields = {
            name: np.zeros(shape, np.float32 if name == "logp" else np.int32)
            for name in _FIELDS
        }

    @property
    def num_idle(self) -> int:
        """Rows without a response."""
        return int((~self.occupied).sum())

    @property
    def num_slots_needed(self) -> int:
        """Slots without which some row cannot take its next step."""
        used = self.count[self.occupied].max(initial=0) + self.settings.num_paths
        return min(int(used), self.settings.max_response_tokens)

    def admit(self, num_prompts: int, prompt_tokens: int, most: int) -> Admission:
        """Starts waiting responses in idle rows, as far as rows and places go.

        Args:
          num_prompts: prompts to prefill, at most. prompt_tokens: their padded length.
          most: responses to start, at most.
        """
        B, queue = len(self.occupied), self.queue
        new = np.zeros(B, bool)
        lengths, last_tokens = np.ones((2, B), np.int32)
        padded = np.zeros((num_prompts, prompt_tokens), np.int32)
        prompt_lengths = np.ones(num_prompts, np.int32)
        places = np.full(num_prompts, self.places, np.int32)
        fresh = 0
        for row in np.flatnonzero(~self.occupied)[:most]:
            if not queue.waiting:
                break
            prompt = queue.waiting[0] // queue.samples
            tokens = queue.prompts[prompt]
            seat = self._free_seat(row, prompt)
            if seat is None:
                place = self._free_place(row)
                if place is None or fresh == num_prompts:
                    break
                self.placed[place] = prompt
                padded[fresh, : len(tokens)] = tokens
                prompt_lengths[fresh], places[fresh] = len(tokens), place
                fresh += 1
                seat = place * self.seats
            new[row], self.seat[row] = True, seat
            lengths[row], last_tokens[row] = len(tokens), tokens[-1]
            self.response[row] = queue.waiting.popleft()
            self.occupied[row] = self.live[row, 0] = True
            self.phase[row] = MAIN
            self.count[row] = self.steps[row] = 0
        return Admission(
            new, self.seat, lengths, last_tokens, padded, prompt_lengths, places
        )

    def _free_seat(self, row: int, prompt: int) -> int | None:
        """A seat at a place where this prompt lies already."""
        if self.seats == 1:  # row b sits at place b
            return row if self.placed[row] == prompt else None
        taken = self.seat[self.occupied]
        for place in np.flatnonzero(self.placed == prompt):
            seats = place * self.seats + np.arange(self.seats)
            free = seats[~np.isin(seats, taken)]
            if free.size:
                return free[0]
        return None

    def _free_place(self, row: int) -> int | None:
        """A place whose prompt no row reads."""
        if self.seats == 1:
            return row
        read = self.seat[self.occupied] // self.seats
        free = np.flatnonzero(~np.isin(np.arange(self.places), read))
        return free[0] if free.size else None

    def take(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keeps the occupied rows and some idle ones, `size` in all.

        Returns:
          The rows and the places that are kept, and the rows' new seats.
        """
        rows = np.argsort(~self.occupied, kind="stable")[:size]
        if self.seats == 1:
            kept = rows
        else:
            read = np.unique(self.seat[self.occupied] // self.seats)
            others = np.setdiff1d(np.arange(self.places), read)
            kept = np.concatenate([read, others])[: min(self.places, size)]
        where = np.zeros(self.places, np.int32)
        where[kept] = np.arange(len(kept))
        place, seat = np.divmod(self.seat[rows], self.seats)
        self.placed, self.places = self.placed[kept], len(kept)
        for name in ("occupied", "response", "phase", "live", "count", "steps"):
            setattr(self, name, getattr(self, name)[rows])
        self.fields = {name: values[rows] for name, values in self.fields.items()}
        self.seat = (where[place] * self.seats + seat).astype(np.int32)
        if self.seats == 1:
            self.seat = np.arange(size, dtype=np.int32)
        return rows, kept, self.seat

    def record(self, log: Emission, taken: int) -> int:
        """Appends a chunk's emissions; returns the row-steps that wrote something."""
        wrote = log.token[:taken] >= 0  # [taken, B, P]
        step, row, lane = np.nonzero(wrote)
        order = np.lexsort((lane, step, row))
        step, row, lane = step[order], row[order], lane[order]
        new = np.bincount(row, minlength=len(self.count))
        start = np.cumsum(new) - new
        place = self.count[row] + np.arange(len(row)) - start[row]
        for name, values in self.fields.items():
            values[row, place] = getattr(log, name)[step, row, lane]
        self.count += new
        active = wrote.any(axis=2)
        self.steps += active.sum(axis=0)
        return int(active.sum())

    def open_block(self, row: int) -> np.ndarray:
        """Places of the newest block's path tokens, in canonical order."""
        block, path = (
            self.fields[f][row, : self.count[row]] for f in ("block", "path")
        )
        places = np.flatnonzero((block == block.max()) & (path > 0))
        return places[np.argsort(path[places], kind="stable")]

    def close_block(self, rows: np.ndarray) -> None:
        """Records the `</Parallel>` that a rejoin wrote."""
        for row in rows:
            place = self.count[row]
            for values in self.fields.values():
                values[row, place] = 0
            self.fields["token"][row, place] = self.vocab.special_ids[END_PARALLEL]
            self.fields["forced"][row, place] = 1
            self.live[row, 0] = True
        self.phase[rows] = NEWLINE
        self.count[rows] += 1
        self.steps[rows] += 1

    def collect(self) -> list[int]:
        """Turns finished rows into trajectories and frees them; their numbers."""
        rows = np.flatnonzero(self.occupied & (self.phase == DONE))
        for row in rows:
            self.occupied[row] = False
            self.queue.results[self.response[row]] = self._trajectory(row)
        return self.response[rows].tolist()

    def unfinished(self) -> dict[int, Trajectory]:
        """The responses that are being written, as far as they are, by number."""
        rows = np.flatnonzero(self.occupied)
        return {int(self.response[row]): self._trajectory(row) for row in rows}

    def _trajectory(self, row: int) -> Trajectory:
        n = self.count[row]
        record = {name: values[row, :n] for name, values in self.fields.items()}
        eos = self.vocab.special_ids[EOS]
        finished = bool(n) and record["token"][-1] == eos and record["path"][-1] == 0
        prompt = self.queue.prompts[self.response[row] // self.queue.samples]
        # Canonical order: a block's tokens stand where its first one does, path by path.
        index = np.arange(n)
        block, path = record["block"], record["path"]
        first = np.full(block.max(initial=0) + 1, n)
        np.minimum.at(first, block, index)
        anchor = np.where(path > 0, first[block], index)
        order = np.lexsort((index, path, anchor))
        record = {name: values[order] for name, values in record.items()}
        positions = record["position"]
        if self.settings.variant == "causal":
            positions = np.arange(len(prompt), len(prompt) + n, dtype=np.int32)
        return Trajectory(
            prompt=prompt,
            tokens=record["token"],
            positions=positions,
            block=record["block"],
            path=record["path"],
            forced=record["forced"].astype(bool),
            bans=record["bans"],
            logps=record["logp"],
            finished=bool(finished),
            sequential_steps=int(self.steps[row]),
        )


class Shards:
    """The rows of all shards."""

    def __init__(self, count: int, queue: Queue, *args, **kwargs):
        """Arguments are those of `Rows`."""
        self.queue = queue
        self.shards = [Rows(queue, *args, **kwargs) for _ in range(count)]

    @property
    def rows(self) -> int:
        """Rows of a shard."""
        return len(self.shards[0].occupied)

    @property
    def num_idle(self) -> int:
        """Rows without a response."""
        return sum(shard.num_idle for shard in self.shards)

    @property
    def most_occupied(self) -> int:
        """Rows with a response in the shard that has the most of them."""
        return self.rows - min(shard.num_idle for shard in self.shards)

    @property
    def num_slots_needed(self) -> int:
        """Slots without which some row cannot take its next step."""
        return max(shard.num_slots_needed for shard in self.shards)

    @property
    def num_lanes_needed(self) -> int:
        """Live lanes of the shard that has the most of them."""
        return max(int(shard.live.sum()) for shard in self.shards)

    @property
    def is_inside_block(self) -> bool:
        """Whether some row is inside a block."""
        return any(shard.live[:, 1:].any() for shard in self.shards)

    @property
    def response(self) -> np.ndarray:
        """Which response each row decodes."""
        return np.concatenate([shard.response for shard in self.shards])

    def admit(self, num_prompts: int, prompt_tokens: int) -> Admission:
        """`Rows.admit` of every shard; where few wait, each gets as many groups."""
        parts = []
        for i, shard in enumerate(self.shards):
            groups = -(-len(self.queue.waiting) // shard.seats)
            most = -(-groups // (len(self.shards) - i)) * shard.seats
            parts.append(shard.admit(num_prompts, prompt_tokens, most))
        return Admission(*map(np.concatenate, zip(*parts)))

    def take(self, size: int) -> tuple[np.ndarray, ...]:
        """`Rows.take` of every shard."""
        parts = [shard.take(size) for shard in self.shards]
        return tuple(map(np.concatenate, zip(*parts)))

    def record(
        self, phase: np.ndarray, live: np.ndarray, log: Emission, taken: int
    ) -> int:
        """Notes what a chunk did; returns the row-steps that wrote something."""
        useful = 0
        for i, shard in enumerate(self.shards):
            mine = slice(i * self.rows, (i + 1) * self.rows)
            shard.phase, shard.live = phase[mine], live[mine]
            part = {n: getattr(log, n)[:, mine] for n in _FIELDS}
            useful += shard.record(Emission(**part), taken)
        return useful

    def collect(self) -> list[int]:
        """Turns finished rows into trajectories and frees them; their numbers."""
        return [index for shard in self.shards for index in shard.collect()]

    def unfinished(self) -> dict[int, Trajectory]:
        """The responses that are being written, as far as they are, by number."""
        found: dict[int, Trajectory] = {}
        for shard in self.shards:
            found |= shard.unfinished()
        return found
