"""The published way to decode blocks, at its best: every part is a new request.

A main stream up to `<Parallel>` is a request; then each path, the summary and what
follows it are one each (spec section 3). Requests are batched as they come: rows that
end are refilled, and the batch and its cache have as many rows and slots as are in
use, to the next compiled size. The model, the attention over a part of the keys and
the draw are those of the sampler. Two ways to come by a request's context:

* prefilled anew, as published: plain causal, in canonical order, in padded batches;
* `copies`: an ideal prefix cache. The keys and values of the context are copied from
  the rows that wrote them, those of all paths too. No real one could do so: behind
  its first path a summary's context was never a prefix. Positions and visibility are
  then the structured ones, so that it computes what the sampler does.
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

_FEWEST_ROWS, _FEWEST_SLOTS, _FEWEST_COPIES = 8, 64, 8
_SHORTEST_PREFILL = 32


@dataclasses.dataclass(eq=False)
class Request:
    """A part of a response, decoded by itself.

    Attributes:
      response: its number. kind: "main", "path" or "summary". block, path: from 0.
      context: tokens before the first that it draws; the last of them is pending.
      draws: tokens to draw. last: the one to end with.
      position, slot: of the pending token. base, start, wait, feeds_last: as in `State`.
      parents: requests whose rows are copied; None where the context is prefilled.
      bounds: [P] first slot of what comes from each parent.
      tokens, logps: what was drawn. ended: and fed, where that is asked for.
    """

    response: int
    kind: str
    block: int
    path: int
    context: list[int]
    draws: int
    last: int
    position: int
    slot: int
    base: int = 0
    start: int = 0
    wait: int = 0
    feeds_last: bool = False
    parents: tuple["Request", ...] | None = None
    bounds: tuple[int, ...] = (0,)
    row: int = -1
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    ended: bool = False

    @property
    def slots(self) -> int:
        """Slots that its row needs."""
        return self.slot + self.wait + self.draws + 1


class _Response:
    """One response: which requests come when, and its tokens so far."""

    def __init__(self, index: int, prompt, plan: Plan, vocab: Vocab, copies):
        self.index, self.plan, self.vocab, self.copies = index, plan, vocab, copies
        self.prompt = [int(token) for token in prompt]
        self.tokens: list[int] = []  # canonical
        self.logps: list[float] = []  # 0 where forced
        self.paths: list[Request] = []  # of the open block, those that have ended
        self.position = len(prompt) - 1  # of the last token, while contexts are copied

    def main(self, block: int, parent: Request | None = None) -> Request:
        """The main stream before a block, or the tail."""
        plan, ids = self.plan, self.vocab.special_ids
        is_tail = block == len(plan.main)
        context = self.prompt + self.tokens
        copies = parent is not None and self.copies
        return Request(
            self.index,
            "main",
            block,
            0,
            context,
            plan.tail if is_tail else plan.main[block],
            ids[EOS if is_tail else PARALLEL],
            position=self.position if copies else len(context) - 1,
            slot=len(context) - 1,
            feeds_last=self.copies and not is_tail,
            parents=(parent,) if copies else None,
        )

    def follow(self, ended: Request) -> list[Request]:
        """The requests that begin when one has ended; none at the end."""
        ids = self.vocab.special_ids
        if ended.kind == "path":
            self.paths.append(ended)
            if len(self.paths) < len(self.plan.paths[ended.block]):
                return []
            paths = sorted(self.paths, key=lambda path: path.path)
            self.paths = []
            for path in paths:
                self._write([ids[PATH], *path.tokens], [0.0, *path.logps])
            return [self._summary(ended.block, paths)]
        self._write(ended.tokens, ended.logps)
        self.position = ended.position + ended.wait + ended.draws
        if ended.kind == "summary":
            return [self.main(ended.block + 1, ended)]
        if ended.last == ids[EOS]:
            return []
        return self._fork(ended)

    def _write(self, tokens, logps) -> None:
        self.tokens += tokens
        self.logps += logps

    def _fork(self, parent: Request) -> list[Request]:
        ids, context = self.vocab.special_ids, self.prompt + self.tokens
        requests, start = [], len(context)
        for path, length in enumerate(self.plan.paths[parent.block]):
            request = Request(
                self.index,
                "path",
                parent.block,
                path,
                [*context, ids[PATH]],
                length - 1,
                ids[END_PATH],
                position=len(context),
                slot=len(context),
            )
            if self.copies:  # each where it will stand when the block is joined
                request.position, request.slot = self.position + 1, start
                request.base, request.start = len(context), start
                request.feeds_last, request.parents = True, (parent,)
            start += length
            requests.append(request)
        return requests

    def _summary(self, block: int, paths: list[Request]) -> Request:
        ids = self.vocab.special_ids
        tags = [ids[END_PARALLEL], self.vocab.newline_id]
        tags.append(ids[SUMMARY_OPEN])
        pending = len(self.prompt) + len(self.tokens)
        self._write(tags, [0.0] * len(tags))
        context = self.prompt + self.tokens
        request = Request(
            self.index,
            "summary",
            block,
            0,
            context,
            self.plan.summaries[block],
            ids[END_SUMMARY],
            position=len(context) - 1,
            slot=len(context) - 1,
        )
        if self.copies:
            furthest = self.position + max(self.plan.paths[block])
            request.position, request.slot = furthest + 1, pending
            request.wait, request.parents = 2, tuple(paths)
            request.bounds = tuple(path.start for path in paths)
        return request


@dataclasses.dataclass
class Result:
    """What a run did.

    Attributes:
      tokens, logps: of every response in canonical order; log-prob 0 where forced.
      requests: in the order in which they ended.
      prefilled_tokens: without padding. steps: of the batch.
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
    copies: bool,
) -> Result:
    """Decodes a response to every prompt by its plan.

    Args:
      key: PRNG key. rows: requests at the same time, at most.
      copies: an ideal prefix cache; see above.

    Raises:
      ValueError: the rows do not hold a block's paths, whose contexts are copied.
    """
    return _Run(programs, params, prompts, plans, key, rows, copies).finish()


class _Run:
    """The host's loop over one batch of responses."""

    def __init__(self, programs: Programs, params, prompts, plans, key, rows, copies):
        self.programs, self.params = programs, programs.convert(params)
        self.key, self.most_rows, self.copies = key, rows, copies
        vocab = programs.vocab
        self.responses = [
            _Response(i, prompt, plan, vocab, copies)
            for i, (prompt, plan) in enumerate(zip(prompts, plans))
        ]
        self.unstarted = deque(self.responses)
        self.open = 0  # responses that have begun and not ended
        self.queue: deque[Request] = deque()
        most_paths = max((len(p) for plan in plans for p in plan.paths), default=1)
        self.most_paths = most_paths
        # Rows of ended requests are kept until they are copied, so that responses
        # must not begin for whose paths there would be no room.
        self.most_open = max(rows // most_paths, 1) if copies else len(plans)
        if copies and rows < most_paths:
            raise ValueError(f"rows={rows} do not hold {most_paths} paths")
        self.occupant: list[Request | None] = [None] * _size(_FEWEST_ROWS, 1, rows)
        self.state = self._blank(len(self.occupant), _FEWEST_SLOTS)
        self.requests: list[Request] = []
        self.prefilled = self.steps = self.number = 0

    def finish(self) -> Result:
        """Runs to the end."""
        while self.queue or self.unstarted or self.live:
            self._admit(self._admission())
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
        return [r for r in self.occupant if r is not None and not r.ended]

    def _blank(self, rows: int, slots: int) -> State:
        zero = jnp.zeros(rows, jnp.int32)
        names = {f.name for f in dataclasses.fields(State)} - {"key", "cache"}
        fields = dict.fromkeys(names, zero) | dict.fromkeys(
            ("live", "feeds_last"), zero.astype(bool)
        )
        cache = self.programs.backend.empty_cache(rows, slots)
        keys = jax.random.split(jax.random.key(0), rows)
        return jax.tree.map(jnp.copy, State(**fields, key=keys, cache=cache))

    def _admission(self) -> list[Request]:
        """The requests that begin now, and out of the rows those that they copy."""
        while self.unstarted and self.open < self.most_open:
            self.queue.append(self.unstarted.popleft().main(0))
            self.open += 1
        if self.copies:  # there is room for all
            chosen = list(self.queue)
            self.queue.clear()
        else:
            room = min(self.most_rows - len(self.live), len(self.queue))
            chosen = [self.queue.popleft() for _ in range(room)]
        return chosen

    def _admit(self, chosen: list[Request]) -> None:
        if not chosen:
            return
        read = {p for request in chosen for p in request.parents or ()}
        kept = [r for r in self.occupant if r is not None]
        slots = max(r.slots for r in [*kept, *chosen])
        # Rows that are read now may be written now, but all of them must be there.
        needed = max(len(kept), len(kept) - len(read) + len(chosen))
        self._resize(kept, _size(_FEWEST_ROWS, needed, self.most_rows), slots)
        for row, occupant in enumerate(self.occupant):
            if occupant in read:
                self.occupant[row] = None
        sources = {parent: parent.row for parent in read}
        free = (row for row, r in enumerate(self.occupant) if r is None)
        for request, row in zip(chosen, list(free)):
            request.row = row
            self.occupant[row] = request
        self._prefill([r for r in chosen if r.parents is None and r.slot > 0])
        self._copy([r for r in chosen if r.parents is not None], sources)
        self._start(chosen)

    def _resize(self, kept: list[Request], rows: int, slots: int) -> None:
        have_rows, have_slots = len(self.occupant), self.state.cache[0][0].shape[-1]
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
        per_octave = self.programs.lengths_per_octave
        padded = lambda r: _finer_size(_SHORTEST_PREFILL, r.slot, per_octave)
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

    def _copy(self, requests: list[Request], sources: dict[Request, int]) -> None:
        if not requests:
            return
        forks = [r for r in requests if len(r.parents) == 1]
        joins = [r for r in requests if len(r.parents) > 1]
        B = len(self.occupant)
        W, V = (_size(_FEWEST_COPIES, len(some)) for some in (forks, joins))
        to, source = np.full(W, B, np.int32), np.zeros(W, np.int32)
        for i, r in enumerate(forks):
            to[i], source[i] = r.row, sources[r.parents[0]]
        to_join = np.full(V, B, np.int32)
        joined, bounds = np.zeros((2, V, self.most_paths), np.int32)
        for i, r in enumerate(joins):
            P = len(r.parents)
            to_join[i] = r.row
            joined[i, :P] = [sources[parent] for parent in r.parents]
            bounds[i, :P] = r.bounds
            bounds[i, P:] = np.iinfo(np.int32).max
        cache = self.programs.copy(
            self.state.cache, (to, source), (to_join, joined, bounds)
        )
        self.state = self.state.replace(cache=cache)

    def _start(self, requests: list[Request]) -> None:
        B = len(self.occupant)
        new, numbers = np.zeros(B, bool), np.zeros(B, np.int32)
        fields = {
            name: np.zeros(B, np.int32)
            for name in ("position", "slot", "base", "start", "wait", "left", "last")
        }
        token, feeds_last = np.zeros(B, np.int32), np.zeros(B, bool)
        for r in requests:
            new[r.row], numbers[r.row] = True, self.number
            self.number += 1
            for name, values in fields.items():
                values[r.row] = getattr(r, "draws" if name == "left" else name)
            feeds_last[r.row] = r.feeds_last
            token[r.row] = (
                self.programs.vocab.special_ids[END_PARALLEL]
                if r.wait
                else r.context[-1]
            )
        fresh = State(
            **fields,
            token=token,
            feeds_last=feeds_last,
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
                self._end(r)

    def _end(self, request: Request) -> None:
        request.ended = True
        self.requests.append(request)
        response = self.responses[request.response]
        following = response.follow(request)
        # First what is under way, then responses that have not begun.
        self.queue.extendleft(reversed(following))
        is_read = self.copies and (following or request.kind == "path")
        if not is_read:
            self.occupant[request.row] = None
        if not following and request.kind == "main":
            self.open -= 1


def _size(smallest: int, needed: int, largest: int | None = None) -> int:
    """The least of `smallest`, twice it, … that will do; `largest` is one as well."""
    size = smallest
    while size < needed:
        size *= 2
    return size if largest is None else min(size, max(largest, needed))


def _finer_size(smallest: int, needed: int, per_octave: int) -> int:
    """Of sizes that double every `per_octave` equal steps, the least that will do."""
    top = _size(smallest, needed)
    if top == smallest:
        return top
    step = top // 2 // per_octave
    return -(-needed // step) * step
