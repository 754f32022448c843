"""Suite of decode steps with none, some or all rows inside a block."""

import dataclasses
import functools
import statistics

import numpy as np

from pr1_jax.bench.plans import Plan
from pr1_jax.bench.shapes import Bench
from pr1_jax.bench.timing import ChunkClock
from pr1_jax.model import costs
from pr1_jax.system.tables import Spread, Table

_BEGIN = 4  # tokens before a block
_PATH_PLAN = 3  # tokens of the plan of a path
_NOTE = (
    "live: lanes in use; the step is compiled for the next of the buckets times the "
    "rows. slots: of a row's response that are in use half way, on average. relative: "
    "to main streams after as many steps, at equal slots: to main streams that have as "
    "many tokens; by turns. ms: medians of a turn's chunks between whose ends no path "
    "ended."
)


_PLANNED_NOTE = (
    "All rows are inside a block, which has as many paths as the row wrote plans. paths: "
    "of the rows, in turn. relative: to a batch in which all have the most."
)


def lanes(bench: Bench) -> list[Table]:
    """Milliseconds a step with none, some or all rows in a block; then of planned ones."""
    name = f"A decode step of {bench.sizes.rows} rows"
    return [
        Table(name, steps(bench), _NOTE),
        Table(f"{name} in planned blocks", planned_steps(bench), _PLANNED_NOTE),
    ]


@dataclasses.dataclass(frozen=True)
class _Mix:
    """A batch in which some rows are inside a block and the others in main streams."""

    rows: int
    inside: int
    paths: int
    steps: int

    @property
    def live(self) -> int:
        """Lanes that are in use."""
        return self.rows + self.inside * (self.paths - 1)

    def plans(self, prompt: int) -> list[Plan]:
        """The plan of each row."""
        block = Plan(prompt, (_BEGIN,), ((self.steps,) * self.paths,), (2,), 1)
        outside = Plan(prompt, tail=_BEGIN + self.steps)
        return [block] * self.inside + [outside] * (self.rows - self.inside)

    @property
    def slots(self) -> tuple[int, int]:
        """Slots that a row uses half way, outside and inside a block."""
        return _BEGIN + self.steps // 2, _BEGIN + self.paths * self.steps // 2

    def seconds(self, bench: Bench) -> float:
        """Limit of a step half way."""
        outside, inside = (bench.sizes.prompt_tokens + n for n in self.slots)
        others = self.rows - self.inside
        cost = costs.forward(
            bench.config,
            tokens=self.live,
            pairs=others * outside + self.inside * self.paths * inside,
            cached=others * outside + self.inside * inside,
            logits=self.live,
        )
        return cost.seconds(bench.limits)


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A batch whose rows are all inside planned blocks, of `counts` paths in turn."""

    rows: int
    counts: tuple[int, ...]
    paths: int  # of a block, at most
    steps: int

    @property
    def each(self) -> list[int]:
        """Paths of each row."""
        return [self.counts[i % len(self.counts)] for i in range(self.rows)]

    @property
    def live(self) -> int:
        """Lanes that are in use."""
        return sum(self.each)

    def plans(self, prompt: int) -> list[Plan]:
        """The plan of each row."""
        return [
            Plan(prompt, (_BEGIN,), ((self.steps,) * n,), (2,), 1, _PATH_PLAN)
            for n in self.each
        ]


def planned_steps(bench: Bench) -> list[dict[str, object]]:
    """Rows of the table: all rows with two paths, some with more, all with the most."""
    sizes, most = bench.sizes, min(max(bench.sizes.paths), 4)
    mixes = [
        _Planned(sizes.rows, counts, most, sizes.lane_path_tokens)
        for counts in dict.fromkeys([(most,), (*range(2, most + 1),), (2,)])
    ]
    tokens = max(p.needs for mix in mixes for p in mix.plans(sizes.prompt_tokens))
    buckets = tuple(range(1, most + 1))
    spreads = _measured(bench, _works(bench, buckets, mixes, tokens))
    full, table = spreads[buckets, mixes[0]], []
    for (_, mix), spread in spreads.items():
        row = {
            "paths": ", ".join(map(str, mix.counts)),
            "live": mix.live,
            "ms per step": spread,
            "relative": spread.over(full),
            "lanes relative": mix.live / mixes[0].live,
        }
        table.append(row)
    return table


def steps(bench: Bench) -> list[dict[str, object]]:
    """Rows of the table, a mix each; all take turns, some in every repeat."""
    sizes = bench.sizes
    rows, length, path_counts = sizes.rows, sizes.lane_path_tokens, sizes.paths
    few = min(path_counts)
    some = [_Mix(rows, rows * i // 4, few, length) for i in (0, 1, 2, 4)]
    # Main streams that come to have as many tokens as the rows in a block.
    longer = {n: _Mix(rows, 0, few, n * length) for n in path_counts}
    full = {n: _Mix(rows, rows, n, length) for n in path_counts}
    first, *others = sizes.lane_buckets
    listed = [(first, [*some, *longer.values()])]
    listed += [(buckets, some) for buckets in others]
    listed += [((1, n), [full[n]]) for n in path_counts if n != few]
    most_tokens = max(
        p.needs for mix in full.values() for p in mix.plans(sizes.prompt_tokens)
    )

    works = {}
    for buckets, mixes in listed:
        works |= _works(bench, buckets, mixes, most_tokens)
    table, spreads = [], _measured(bench, works)
    for (buckets, mix), spread in spreads.items():
        limit_ms = 1e3 * mix.seconds(bench)
        share = mix.inside / rows
        outside, inside = mix.slots
        row = {
            "paths": mix.paths,
            "rows in a block": mix.inside,
            "lane buckets": ", ".join(f"{x:g}" for x in buckets),
            "live": mix.live,
            "slots": round(share * inside + (1 - share) * outside),
            "ms per step": spread,
            "relative": spread.over(spreads[first, some[0]]),
            "tokens relative": mix.live / rows,
            "limit ms per step": limit_ms,
            "share of limit": spread.rate(limit_ms),
        }
        if mix.inside == rows:
            equal = spreads[first, longer[mix.paths]]
            row["relative at equal slots"] = spread.over(equal)
        table.append(row)
    return table


def _measured(bench: Bench, works: dict) -> dict:
    """What each work measures; all take turns."""
    measured = {name: [] for name in works}
    for turn in range(1 + bench.repeats * bench.sizes.lane_turns):
        for name, work in works.items():
            step_ms = work()
            if turn:
                measured[name].append(step_ms)
    return {name: Spread(tuple(step_ms)) for name, step_ms in measured.items()}


def _works(bench: Bench, lane_buckets, mixes, most_tokens: int) -> dict:
    """Calls that measure milliseconds a step, by lane buckets and mix."""
    prompt = bench.sizes.prompt_tokens
    clock = bench.planned(
        [plan for mix in mixes for plan in mix.plans(prompt)],
        rows=bench.sizes.rows,
        num_paths=mixes[0].paths,
        response_tokens=most_tokens,
        kind=ChunkClock,
        lane_buckets=lane_buckets,
        steps_per_chunk=bench.sizes.lane_steps_per_chunk,
        one_size=True,
    )
    rows = clock.schedule.rows
    prompts = bench.prompts([prompt] * rows)

    def measure(first: int, live: int) -> float:
        clock.chunks.clear()
        ids = first + np.arange(rows)
        clock.sample(bench.params, prompts, 1, bench.key, ids=ids)
        steps = bench.sizes.lane_steps_per_chunk
        whole = [c for c in clock.chunks if c.live == (live, live) and c.steps == steps]
        if not whole:
            raise ValueError(f"no whole chunk with {live} live lanes: longer paths")
        return 1e3 / steps * statistics.median(chunk.sec for chunk in whole)

    return {
        (lane_buckets, mix): functools.partial(measure, i * rows, mix.live)
        for i, mix in enumerate(mixes)
    }
