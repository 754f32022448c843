"""Suite of parallel blocks against the published scheme of requests."""

import functools
import sys
from collections.abc import Mapping

import numpy as np

from pr1_jax.bench import plans, timing
from pr1_jax.bench.plans import Plan
from pr1_jax.bench.published.request_programs import Programs
from pr1_jax.bench.published.requests import decode_requests
from pr1_jax.bench.shapes import Bench
from pr1_jax.system.tables import Table

_OURS, _REQUESTS, _SEQUENTIAL = "ours", "requests", "sequential"


def blocks(bench: Bench) -> list[Table]:
    """Parallel blocks against the published scheme, on lengths of real traces."""
    programs = Programs(
        bench.backend, bench.vocab, prefill_rows=bench.shape.prefill_rows
    )
    rows = [
        row for paths in bench.sizes.paths for row in _schemes(bench, programs, paths)
    ]
    note = (
        f"Lengths: deciles of 338 published cold-start traces. {_REQUESTS}: every path, summary and "
        "continuation is a request of its own whose context is prefilled again, as "
        f"published. {_SEQUENTIAL}: as many tokens in one stream. Rows of requests: the "
        "fastest of those tried. ratio: of seconds, to ours, by turns. steps: of the "
        "batch; critical path: decode steps of a response one after another, on average."
    )
    return [Table("Parallel blocks, same tokens", rows, note)]


def _schemes(bench: Bench, programs: Programs, num_paths: int) -> list[dict]:
    """Rows of the table for one number of paths."""
    N = bench.sizes.rows
    planned, factor = plans.make_plans(
        plans.builtin_traces(), N, num_paths, bench.sizes.plan_tokens
    )
    prompts = bench.prompts([plan.prompt for plan in planned])
    ours = bench.planned(planned, rows=N, num_paths=num_paths)
    one_stream = bench.planned([plan.sequential() for plan in planned], rows=N)

    def sample(sampler) -> Mapping[str, float]:
        responses, figures = sampler.sample(bench.params, prompts, 1, bench.key)
        return {
            "tokens": sum(len(r.tokens) for r in responses),
            "steps": figures.decode_steps,
            "critical": float(np.mean([r.sequential_steps for r in responses])),
            "prefilled": sum(map(len, prompts)),
        }

    def request(rows: int) -> Mapping[str, float]:
        result = decode_requests(
            programs, bench.params, prompts, planned, bench.key, rows=rows
        )
        return {
            "tokens": sum(map(len, result.tokens)),
            "steps": result.steps,
            "critical": float(np.mean([_critical(plan) for plan in planned])),
            "prefilled": result.prefilled_tokens,
        }

    choices = sorted({N, N * num_paths // 2, N * num_paths})
    tried = {str(rows): functools.partial(request, rows) for rows in choices}
    runs = timing.alternate(tried, 1)
    _tell(num_paths, f"{_REQUESTS}, by rows", runs)
    best = min(tried, key=lambda rows: runs[rows].sec.median)
    works: dict[str, timing.Work] = {
        _OURS: functools.partial(sample, ours),
        _REQUESTS: tried[best],
        _SEQUENTIAL: functools.partial(sample, one_stream),
    }
    runs = timing.alternate(works, bench.repeats)
    _tell(num_paths, "all", runs)
    rows = [
        {
            "paths": num_paths,
            "scheme": name,
            "seconds": run.sec,
            "ratio to ours": run.sec.over(runs[_OURS].sec),
            "tokens": run.figures[-1]["tokens"],
            "prefilled tokens": run.figures[-1]["prefilled"],
            "steps": run.figures[-1]["steps"],
            "critical path": run.figures[-1]["critical"],
            "rows": int(best) if name == _REQUESTS else N,
            "lengths scaled by": factor,
        }
        for name, run in runs.items()
    ]
    assert len({row["tokens"] for row in rows}) == 1
    return rows


def _tell(num_paths: int, what: str, runs: Mapping[str, timing.Runs]) -> None:
    """Prints how far the suite has come, since it takes many minutes."""
    sec = ", ".join(f"{name} {run.sec.median:.2f} s" for name, run in runs.items())
    print(f"  {num_paths} paths, {what}: {sec}", file=sys.stderr, flush=True)


def _critical(plan: Plan) -> int:
    """Decode steps of a response as requests; prefills are none, and feed `<Path>`."""
    longest = sum(max(paths) - 1 for paths in plan.paths)
    return sum(plan.main) + longest + sum(plan.summaries) + plan.tail
