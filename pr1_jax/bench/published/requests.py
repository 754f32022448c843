"""The published way to decode blocks, at its best: every part is a new request.

A main stream up to `<Parallel>` is a request; then each path, the summary and what
follows it are one each (docs/method.md, section 3). A request's context is prefilled:
plain causal, in canonical order, in padded batches. Requests are batched as they come:
rows that end are refilled, and the batch and its cache have as many rows and slots as
are in use, to the next compiled size. The model, its attention and the draw are those of
the sampler.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.bench.plans import Plan
from pr1_jax.bench.published.request_programs import Programs, State
from pr1_jax.sampler.schedule import REFILL_SHARE
from pr1_jax.sampler.settings import (
    END_PARALLEL,
    END_PATH,
    END_SUMMARY,
    EOS,
    PARALLEL,
    PATH,
    SUMMARY_OPEN,
    Vocab,
)

_FEWEST_ROWS, _FEWEST_SLOTS = 8, 64
_SHORTEST_PREFILL = 32


@dataclasses.dataclass(eq=False)
class Request:
    """A part of a response, decoded by itself.

    Attributes:
      response: its number.
      kind: "main", "path" or "summary".
      block, path: from 0.
      context: tokens before the first that it draws; the last of them is pending.
      draws: tokens to draw.
      last: the one to end with.
      tokens, logps: what was drawn.
    """

    response: int
    kind: str
    block: int
    path: int
    context: list[int]
    draws: int
    last: int
    row: int = -1
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)

    @property
    def slot(self) -> int:
        """The pending token's."""
        return len(self.context) - 1

    @property
    def slots(self) -> int:
        """Slots that its row needs."""
        return self.slot + self.draws + 1


class _Response:
    """One response: which requests come when, and its tokens so far."""

    def __init__(self, index: int, prompt, plan: Plan, vocab: Vocab):
        self.index, self.plan, self.vocab = index, plan, vocab
        self.prompt = [int(token) for token in prompt]
        self.tokens: list[int] = []  # canonical
        self.logps: list[float] = []  # 0 where forced
        self.paths: list[Request] = []  # of the open block, those that have ended

    def _request(self, kind: str, block: int, draws: int, last: int, path: int = 0):
        context = self.prompt + self.tokens
        if kind == "path":
            context.append(self.vocab.special_ids[PATH])
        last = self.vocab.special_ids[last]
        return Request(self.index, kind, block, path, context, draws, last)

    def main(self, block: int) -> Request:
        """The main stream before a block, or the tail."""
        if block == len(self.plan.main):
            return self._request("main", block, self.plan.tail, EOS)
        return self._request("main", block, self.plan.main[block], PARALLEL)

    def follow(self, ended: Request) -> list[Request]:
        """The requests that begin when one has ended; none at the end."""
        ids, block = self.vocab.special_ids, ended.block
        if ended.kind == "path":
            self.paths.append(ended)
            if len(self.paths) < len(self.plan.paths[block]):
                return []
            for path in sorted(self.paths, key=lambda path: path.path):
                self._write([ids[PATH], *path.tokens], [0.0, *path.logps])
            self.paths = []
            forced = [ids[END_PARALLEL], self.vocab.newline_id, ids[SUMMARY_OPEN]]
            self._write(forced, [0.0] * len(forced))
            draws = self.plan.summaries[block]
            return [self._request("summary", block, draws, END_SUMMARY)]
        self._write(ended.tokens, ended.logps)
        if ended.kind == "summary":
            return [self.main(block + 1)]
        if block == len(self.plan.main):
            return []
        return [
            self._request("path", block, length - 1, END_PATH, path)
            for path, length in enumerate(self.plan.paths[block])
        ]

    def _write(self, tokens, logps) -> None:
        self.tokens += tokens
        self.logps += logps


@dataclasses.dataclass
class Result:
    """What a run did.

    Attributes:
      tokens, logps: of every response in canonical order; log-prob 0 where forced.
      requests: in the order in which they ended.
      prefilled_tokens: without padding.
      steps: of the batch.
    """

    tokens: list[list[int]]
    logps: list[list[float]]
    requests: list[Request]
    prefilled_tokens: int
    steps: int


def decode_requests(
    programs: Programs,
    params,
    prompts: Sequence[Sequence[int]],
    plans: Sequence[Plan],
    key: jax.Array,
    *,
    rows: int,
) -> Result:
    """Decodes a response to every prompt by its plan.

    Args:
      key: PRNG key.
      rows: requests at the same time, at most.
    """
    return _Run(programs, params, prompts, plans, key, rows).finish()


class _Run:
    """The host's loop over one batch of responses."""

    def __init__(self, programs: Programs, params, prompts, plans, key, rows: int):
        self.programs, self.params = programs, programs.convert(params)
        self.key, self.most_rows = key, rows
        self.responses = [
            _Response(i, prompt, plan, programs.vocab)
            for i, (prompt, plan) in enumerate(zip(prompts, plans))
        ]
        self.queue = deque(response.main(0) for response in self.responses)
        self.occupant: list[Request | None] = [None] * _size(_FEWEST_ROWS, 1, rows)
        self.state = self._blank(len(self.occupant), _FEWEST_SLOTS)
        self.requests: list[Request] = []
        self.prefilled = self.steps = self.number = 0

    def finish(self) -> Result:
        """Runs to the end."""
        while self.queue or self.live:
            free = min(self.most_rows - len(self.live), len(self.queue))
            self._admit([self.queue.popleft() for _ in range(free)])
            self._decode()
        return Result(
            [response.tokens for response in self.responses],
            [response.logps for response in self.responses],
            self.requests,
            self.prefilled,
            self.steps,
        )

    @property
    def live(self) -> list[Request]:
        """Requests that are being decoded."""
        return [r for r in self.occupant if r is not None]

    def _blank(self, rows: int, slots: int) -> State:
        names = {f.name for f in dataclasses.fields(State)} - {"key", "cache", "live"}
        state = State(
            **dict.fromkeys(names, jnp.zeros(rows, jnp.int32)),
            live=jnp.zeros(rows, bool),
            key=jax.random.split(jax.random.key(0), rows),
            cache=self.programs.backend.empty_cache(rows, slots),
        )
        return jax.tree.map(jnp.copy, state)  # each is donated by itself

    def _admit(self, chosen: list[Request]) -> None:
        if not chosen:
            return
        kept = self.live
        slots = max(r.slots for r in [*kept, *chosen])
        needed = len(kept) + len(chosen)
        self._resize(kept, _size(_FEWEST_ROWS, needed, self.most_rows), slots)
        free = [row for row, r in enumerate(self.occupant) if r is None]
        for request, row in zip(chosen, free):
            request.row = row
            self.occupant[row] = request
        self._prefill([r for r in chosen if r.slot > 0])
        self._start(chosen)

    def _resize(self, kept: list[Request], rows: int, slots: int) -> None:
        have_rows, have_slots = len(self.occupant), self.state.cache[0][-1].shape[2]
        slots = max(_size(_FEWEST_SLOTS, slots), have_slots)
        if rows == have_rows and slots == have_slots:
            return
        index = np.zeros(rows, np.int32)
        index[: len(kept)] = [request.row for request in kept]
        state = self.programs.resize(self.state, index, slots)
        alive = np.arange(rows) < len(kept)
        self.state = state.replace(live=state.live & alive)
        self.occupant = [*kept, *[None] * (rows - len(kept))]
        for row, request in enumerate(kept):
            request.row = row

    def _prefill(self, requests: list[Request]) -> None:
        """Contexts but for their pending tokens, those of like lengths together."""
        padded = lambda r: _prefill_size(r.slot)
        for T, group in itertools.groupby(sorted(requests, key=padded), padded):
            group = list(group)
            while group:
                sizes = self.programs.prefill_rows
                W = next((n for n in sizes if n <= len(group)), sizes[-1])
                batch, group = group[:W], group[W:]
                tokens, lengths = np.zeros((W, T), np.int32), np.ones(W, np.int32)
                rows = np.full(W, len(self.occupant), np.int32)
                for i, r in enumerate(batch):
                    tokens[i, : r.slot] = r.context[:-1]
                    lengths[i], rows[i] = r.slot, r.row
                fresh = self.programs.prefill(self.params, tokens, lengths)
                cache = self.programs.insert(self.state.cache, fresh, rows)
                self.state = self.state.replace(cache=cache)
                self.prefilled += int(sum(r.slot for r in batch))

    def _start(self, requests: list[Request]) -> None:
        B = len(self.occupant)
        new, fields = np.zeros(B, bool), np.zeros((5, B), np.int32)
        for r in requests:
            new[r.row] = True
            fields[:, r.row] = self.number, r.context[-1], r.slot, r.draws, r.last
            self.number += 1
        numbers, token, slot, left, last = fields
        fresh = State(
            token=token,
            slot=slot,
            left=left,
            last=last,
            live=new,
            key=self.programs.fold(self.key, numbers),
            count=np.zeros(B, np.int32),
        )
        cache = self.state.cache
        bare = self.programs.start(self.state.replace(cache=None), new, fresh)
        self.state = bare.replace(cache=cache)

    def _decode(self) -> None:
        """A chunk of steps; hands the requests that ended to their responses."""
        running = self.live
        stop = max(round(REFILL_SHARE * len(running)), 1)
        self.state, log, taken = self.programs.chunk(
            self.params, self.state, np.int32(stop)
        )
        (tokens, logps), live, taken = jax.device_get((log, self.state.live, taken))
        self.steps += int(taken)
        for r in running:
            drew = tokens[:taken, r.row] >= 0
            r.tokens += tokens[:taken, r.row][drew].tolist()
            r.logps += logps[:taken, r.row][drew].tolist()
            if not live[r.row]:
                self.requests.append(r)
                self.occupant[r.row] = None
                # First what is under way, then responses that have not begun.
                following = self.responses[r.response].follow(r)
                self.queue.extendleft(reversed(following))


def _size(smallest: int, needed: int, largest: int | None = None) -> int:
    """The least of `smallest`, twice it, … that will do; `largest` is one as well."""
    size = smallest
    while size < needed:
        size *= 2
    return size if largest is None else min(size, max(largest, needed))


def _prefill_size(needed: int) -> int:
    """The least length that will do, of those that double every four equal steps."""
    top = _size(_SHORTEST_PREFILL, needed)
    step = top if top == _SHORTEST_PREFILL else top // 8
    return -(-needed // step) * step
