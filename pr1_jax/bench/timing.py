"""Repeated timings: what is compared takes turns, after one call of each to warm up."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import jax

from pr1_jax.sampler.sampler import Sampler
from pr1_jax.system.tables import Spread


@dataclasses.dataclass
class Runs:
    """One of several works: seconds of its first call, figures of its other calls."""

    first_sec: float
    figures: list[dict[str, float]]

    def __getitem__(self, name: str) -> Spread:
        return Spread(tuple(figures[name] for figures in self.figures))

    @property
    def sec(self) -> Spread:
        """Seconds of a call."""
        return self["sec"]

    @property
    def compile_sec(self) -> float:
        """What the first call took above the others."""
        return max(self.first_sec - self.sec.median, 0.0)


# A piece of work. What it returns, if anything, is noted beside its seconds.
Work = Callable[[], Mapping[str, float] | None]


def alternate(works: Mapping[str, Work], repeats: int) -> dict[str, Runs]:
    """Calls every work once, then all in turns `repeats` times."""
    runs = {name: Runs(_call(work)["sec"], []) for name, work in works.items()}
    for _ in range(repeats):
        for name, work in works.items():
            runs[name].figures.append(_call(work))
    return runs


def _call(work: Work) -> dict[str, float]:
    began = time.perf_counter()
    figures = dict(work() or {})
    return {"sec": time.perf_counter() - began} | figures


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One chunk of a `ChunkClock`."""

    live: tuple[int, int]  # lanes, before and after
    steps: int
    sec: float


class ChunkClock(Sampler):
    """A sampler that notes how long its chunks took, in `chunks`; slower between them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.chunks: list[Chunk] = []

    def _make(self, params):
        programs = super()._make(params)
        chunk = programs.chunk
        programs.chunk = lambda lanes: self._clocked(chunk(lanes))
        return programs

    def _clocked(self, program):
        def run(params, state, stop):
            before = int(state.live.sum())
            began = time.perf_counter()
            out = jax.block_until_ready(program(params, state, stop))
            sec = time.perf_counter() - began
            live = before, int(out[0].live.sum())
            self.chunks.append(Chunk(live, int(out[2]), sec))
            return out

        return run
