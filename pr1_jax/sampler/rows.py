"""What the host knows of one call of the sampler: the queue, the rows, the records.

Rows are split over shards of the devices. A shard's rows, and the prompts that they
read, are numbered from 0; `Shards` has them all, one shard after the other, as the
arrays on the devices do.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pr1_jax.sampler.schedule import Schedule
from pr1_jax.sampler.settings import END_PARALLEL, Settings, Vocab
from pr1_jax.sampler.state import DONE, MAIN, NEWLINE, Emission, Limits
from pr1_jax.trajectory import Trajectory

_FIELDS = [f.name for f in dataclasses.fields(Emission)]


class Admission(NamedTuple):
    """Rows that start, [B] each, and the prompts to prefill for them, W of them.

    Of several shards, one after the other.
    """

    new: np.ndarray  # bool
    readers: np.ndarray  # int32, as `State.reader`
    lengths: np.ndarray  # int32, of the rows' prompts
    last_tokens: np.ndarray  # int32
    prompts: np.ndarray  # [W, T] int32, right-padded
    prompt_lengths: np.ndarray  # [W] int32
    entries: np.ndarray  # [W] int32, of the prompt cache; as many as it has = unused


@dataclasses.dataclass(frozen=True)
class Request:
    """A response that is wanted.

    Attributes:
      prompt: token ids, int32. prompt_number: those that respond to one prompt have the
        same, and others have others.
      id: what its draws are numbered by.
      limits: of its own, as single numbers; None = the settings'.
    """

    prompt: np.ndarray
    prompt_number: int
    id: int
    limits: Limits | None = None


class Queue:
    """Responses that wait or are written, and those that are done, by number."""

    def __init__(self):
        self.requests: dict[int, Request] = {}
        self.waiting: deque[int] = deque()
        self.results: dict[int, Trajectory] = {}
        self._responses, self._prompts = itertools.count(), itertools.count()

    def add(
        self, prompt: Sequence[int], ids: Sequence[int], limits: Limits | None = None
    ) -> list[int]:
        """Puts a response for each id at the end; their numbers."""
        tokens, prompt_number = np.asarray(prompt, np.int32), next(self._prompts)
        numbers = [next(self._responses) for _ in ids]
        for number, id_ in zip(numbers, ids):
            self.requests[number] = Request(tokens, prompt_number, int(id_), limits)
        self.waiting.extend(numbers)
        return numbers


class Rows:
    """Which response each row decodes, which prompt it reads, what it has written.

    Of one shard. A prompt has an entry in the prompt cache while rows read it. What a
    row reads is numbered entry by entry, `readers` numbers each: see `State.reader`.
    """

    def __init__(
        self, queue: Queue, settings: Settings, vocab: Vocab, schedule: Schedule
    ):
        rows = schedule.rows
        self.queue, self.settings, self.vocab = queue, settings, vocab
        self.entries, self.readers = schedule.entries, schedule.readers
        self.prompt = np.full(self.entries, -1)  # which one each entry holds
        # By row.
        self.occupied = np.zeros(rows, bool)
        self.response = np.zeros(rows, np.int32)  # which response it decodes
        self.reader = np.zeros(rows, np.int32)
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
        """Starts waiting responses in idle rows, as far as rows and entries go.

        Args:
          num_prompts: prompts to prefill, at most. prompt_tokens: their padded length.
          most: responses to start, at most.
        """
        B, queue = len(self.occupied), self.queue
        new = np.zeros(B, bool)
        lengths, last_tokens = np.ones((2, B), np.int32)
        padded = np.zeros((num_prompts, prompt_tokens), np.int32)
        prompt_lengths = np.ones(num_prompts, np.int32)
        entries = np.full(num_prompts, self.entries, np.int32)
        fresh = 0
        for row in np.flatnonzero(~self.occupied)[:most]:
            if not queue.waiting:
                break
            request = queue.requests[queue.waiting[0]]
            prompt, tokens = request.prompt_number, request.prompt
            reader = self._free_reader(row, prompt)
            if reader is None:
                entry = self._free_entry(row)
                if entry is None or fresh == num_prompts:
                    break
                self.prompt[entry] = prompt
                padded[fresh, : len(tokens)] = tokens
                prompt_lengths[fresh], entries[fresh] = len(tokens), entry
                fresh += 1
                reader = entry * self.readers
            new[row], self.reader[row] = True, reader
            lengths[row], last_tokens[row] = len(tokens), tokens[-1]
            self.response[row] = queue.waiting.popleft()
            self.occupied[row] = self.live[row, 0] = True
            self.phase[row] = MAIN
            self.count[row] = self.steps[row] = 0
        return Admission(
            new, self.reader, lengths, last_tokens, padded, prompt_lengths, entries
        )

    def _free_reader(self, row: int, prompt: int) -> int | None:
        """A free number at an entry that holds this prompt already."""
        if self.readers == 1:  # row b reads entry b
            return row if self.prompt[row] == prompt else None
        taken = self.reader[self.occupied]
        for entry in np.flatnonzero(self.prompt == prompt):
            readers = entry * self.readers + np.arange(self.readers)
            free = readers[~np.isin(readers, taken)]
            if free.size:
                return free[0]
        return None

    def _free_entry(self, row: int) -> int | None:
        """An entry whose prompt no row reads."""
        if self.readers == 1:
            return row
        read = self.reader[self.occupied] // self.readers
        free = np.flatnonzero(~np.isin(np.arange(self.entries), read))
        return free[0] if free.size else None

    def take(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keeps the occupied rows and some idle ones, `size` in all.

        Returns:
          The rows and the entries that are kept, and the rows' new `State.reader`.
        """
        rows = np.argsort(~self.occupied, kind="stable")[:size]
        if self.readers == 1:
            kept = rows
        else:
            read = np.unique(self.reader[self.occupied] // self.readers)
            others = np.setdiff1d(np.arange(self.entries), read)
            kept = np.concatenate([read, others])[: min(self.entries, size)]
        index = np.zeros(self.entries, np.int32)  # of the entries that are kept
        index[kept] = np.arange(len(kept))
        entry, number = np.divmod(self.reader[rows], self.readers)
        self.prompt, self.entries = self.prompt[kept], len(kept)
        for name in ("occupied", "response", "phase", "live", "count", "steps"):
            setattr(self, name, getattr(self, name)[rows])
        self.fields = {name: values[rows] for name, values in self.fields.items()}
        self.reader = (index[entry] * self.readers + number).astype(np.int32)
        if self.readers == 1:
            self.reader = np.arange(size, dtype=np.int32)
        return rows, kept, self.reader

    def record(self, log: Emission, taken: int) -> int:
        """Appends a chunk's emissions; returns the row-steps that wrote something."""
        wrote = log.token[:taken] >= 0  # [taken, B, P]
        step, row, lane = np.nonzero(wrote)
        order = np.lexsort((lane, step, row))
        step, row, lane = step[order], row[order], lane[order]
        new = np.bincount(row, minlength=len(self.count))
        start = np.cumsum(new) - new
        index = self.count[row] + np.arange(len(row)) - start[row]
        for name, values in self.fields.items():
            values[row, index] = getattr(log, name)[step, row, lane]
        self.count += new
        active = wrote.any(axis=2)
        self.steps += active.sum(axis=0)
        return int(active.sum())

    def open_block(self, row: int) -> np.ndarray:
        """Indices of the newest block's path tokens, in canonical order."""
        block, path = (
            self.fields[f][row, : self.count[row]] for f in ("block", "path")
        )
        inside = np.flatnonzero((block == block.max()) & (path > 0))
        return inside[np.argsort(path[inside], kind="stable")]

    def close_block(self, rows: np.ndarray) -> None:
        """Records the `</Parallel>` that a rejoin wrote."""
        for row in rows:
            index = self.count[row]
            for values in self.fields.values():
                values[row, index] = 0
            self.fields["token"][row, index] = self.vocab.special_ids[END_PARALLEL]
            self.fields["forced"][row, index] = 1
            self.live[row, 0] = True
        self.phase[rows] = NEWLINE
        self.count[rows] += 1
        self.steps[rows] += 1

    def collect(self) -> list[int]:
        """Turns finished rows into trajectories and frees them; their numbers."""
        rows = np.flatnonzero(self.occupied & (self.phase == DONE))
        numbers = self.response[rows].tolist()
        for row, number in zip(rows, numbers):
            self.occupied[row] = False
            self.queue.results[number] = self._trajectory(row)
            del self.queue.requests[number]
        return numbers

    def drop(self, numbers: set[int]) -> np.ndarray:
        """Frees the rows of some responses; which these were, bool [B]."""
        rows = self.occupied & np.isin(self.response, list(numbers))
        self.occupied[rows] = self.live[rows] = False
        self.phase[rows] = DONE
        return rows

    def unfinished(self) -> dict[int, Trajectory]:
        """The responses that are being written, as far as they are, by number."""
        rows = np.flatnonzero(self.occupied)
        return {int(self.response[row]): self._trajectory(row) for row in rows}

    def _trajectory(self, row: int) -> Trajectory:
        n = self.count[row]
        record = {name: values[row, :n] for name, values in self.fields.items()}
        in_main = bool(n) and record["path"][-1] == 0
        finished = in_main and record["token"][-1] in self.vocab.eos_ids
        prompt = self.queue.requests[int(self.response[row])].prompt
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

    def __init__(
        self, queue: Queue, settings: Settings, vocab: Vocab, schedule: Schedule
    ):
        self.queue = queue
        self.shards = [
            Rows(queue, settings, vocab, schedule) for _ in range(schedule.shards)
        ]

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
    def requests(self) -> list[Request | None]:
        """What each row decodes; None where it is idle."""
        known = self.queue.requests
        return [
            known[int(number)] if is_occupied else None
            for shard in self.shards
            for number, is_occupied in zip(shard.response, shard.occupied)
        ]

    def admit(self, num_prompts: int, prompt_tokens: int) -> Admission:
        """`Rows.admit` of every shard; where few wait, each gets as many groups."""
        parts = []
        for i, shard in enumerate(self.shards):
            groups = -(-len(self.queue.waiting) // shard.readers)
            most = -(-groups // (len(self.shards) - i)) * shard.readers
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

    def drop(self, numbers: set[int]) -> np.ndarray:
        """Forgets some responses and frees their rows; which these were, bool [B]."""
        queue = self.queue
        queue.waiting = deque(n for n in queue.waiting if n not in numbers)
        rows = np.concatenate([shard.drop(numbers) for shard in self.shards])
        for number in numbers:
            queue.requests.pop(number, None)
        return rows

    def collect(self) -> list[int]:
        """Turns finished rows into trajectories and frees them; their numbers."""
        return [index for shard in self.shards for index in shard.collect()]

    def unfinished(self) -> dict[int, Trajectory]:
        """The responses that are being written, as far as they are, by number."""
        responses: dict[int, Trajectory] = {}
        for shard in self.shards:
            responses |= shard.unfinished()
        return responses
