"""Suites of parallel blocks: against requests, and rows that are refilled."""

import functools
import sys
from collections.abc import Mapping

import jax
import numpy as np

from pr1_jax.bench import plans, timing
from pr1_jax.bench.plans import Plan
from pr1_jax.bench.published.request_programs import Programs
from pr1_jax.bench.published.requests import decode_requests
from pr1_jax.bench.report import Plot, Table
from pr1_jax.bench.sampling import KEY, work
from pr1_jax.bench.shapes import Bench

_OURS, _REQUESTS, _COPIES = "ours", "requests", "requests, ideal cache"
_SEQUENTIAL = "sequential"


def blocks(bench: Bench) -> list[Table]:
    """Parallel blocks against the published scheme, on lengths of real traces."""
    programs = Programs(
        bench.backend,
        bench.vocab,
        prefill_rows=bench.shape.prefill_rows,
        prefill_lengths_per_octave=bench.shape.prefill_lengths_per_octave,
    )
    rows = [
        row for paths in bench.sizes.paths for row in _schemes(bench, programs, paths)
    ]
    note = (
        f"Lengths: {bench.traces_from}. {_REQUESTS}: every path, summary and "
        f"continuation is a request of its own whose context is prefilled again, as "
        f"published. {_COPIES}: contexts are copied from the rows that wrote them, all "
        f"paths' too, which a real prefix cache cannot. {_SEQUENTIAL}: as many tokens "
        "in one stream. Rows of requests: the fastest of those tried. ratio: of seconds, "
        "to ours, by turns. steps: of the batch; critical path: decode steps of a "
        "response one after another, on average."
    )
    plot = Plot("paths", ("ratio to ours",), by="scheme", bars=True)
    return [Table("Parallel blocks, same tokens", rows, note, plot)]


def _schemes(bench: Bench, programs: Programs, num_paths: int) -> list[dict]:
    """Rows of the table for one number of paths."""
    backend, vocab, key = bench.backend, bench.vocab, jax.random.key(KEY)
    N = bench.sizes.rows
    tokens = bench.plan_tokens
    planned, factor = plans.make_plans(bench.traces, N, num_paths, tokens)
    prompts = bench.prompts([plan.prompt for plan in planned])
    ours = plans.planned_sampler(
        backend, vocab, planned, key, rows=N, num_paths=num_paths
    )
    alone = [plan.sequential() for plan in planned]
    one_stream = plans.planned_sampler(backend, vocab, alone, key, rows=N)

    def sample(sampler) -> Mapping[str, float]:
        responses, figures = sampler.sample(bench.params, prompts, 1, key)
        return {
            "tokens": sum(len(r.tokens) for r in responses),
            "steps": figures.decode_steps,
            "critical": float(np.mean([r.sequential_steps for r in responses])),
            "prefilled": sum(map(len, prompts)),
        }

    def request(rows: int, copies: bool) -> Mapping[str, float]:
        result = decode_requests(
            programs, bench.params, prompts, planned, key, rows=rows, copies=copies
        )
        return {
            "tokens": sum(map(len, result.tokens)),
            "steps": result.steps,
            "critical": float(np.mean([_critical(plan, copies) for plan in planned])),
            "prefilled": result.prefilled_tokens,
        }

    works: dict[str, timing.Work] = {_OURS: functools.partial(sample, ours)}
    fastest = {}
    for name, copies in ((_REQUESTS, False), (_COPIES, True)):
        choices = sorted({N, N * num_paths // 2, N * num_paths})
        tried = {
            str(rows): functools.partial(request, rows, copies) for rows in choices
        }
        runs = timing.alternate(tried, 1)
        best = min(tried, key=lambda rows: runs[rows].sec.median)
        _tell(num_paths, f"{name}, by rows", runs)
        fastest[name] = int(best)
        works[name] = tried[best]
    works[_SEQUENTIAL] = functools.partial(sample, one_stream)
    runs = timing.alternate(works, bench.repeats)
    _tell(num_paths, "all", runs)

    rows = []
    for name, run in runs.items():
        found = run.figures[-1]
        rows.append(
            {
                "paths": num_paths,
                "scheme": name,
                "seconds": run.sec,
                "ratio to ours": run.sec.over(runs[_OURS].sec),
                "tokens": found["tokens"],
                "prefilled tokens": found["prefilled"],
                "steps": found["steps"],
                "critical path": found["critical"],
                "rows": fastest.get(name, N),
                "lengths scaled by": factor,
            }
        )
    assert len({row["tokens"] for row in rows}) == 1
    return rows


def _tell(num_paths: int, what: str, runs: Mapping[str, timing.Runs]) -> None:
    """Says how far a suite of many minutes has come."""
    sec = ", ".join(f"{name} {run.sec.median:.2f} s" for name, run in runs.items())
    print(f"  {num_paths} paths, {what}: {sec}", file=sys.stderr, flush=True)


def _critical(plan: Plan, copies: bool) -> int:
    """Decode steps of a response as requests; prefills are none.

    `<Path>` is fed, never drawn; copied contexts also feed the three tags of a join,
    and each `<Parallel>` and `</Path>`.
    """
    longest = sum(max(paths) - 1 for paths in plan.paths)
    steps = sum(plan.main) + longest + sum(plan.summaries) + plan.tail
    return steps + (2 + 2) * len(plan.paths) * copies


def refill(bench: Bench) -> list[Table]:
    """How busy rows are kept on real lengths, in groups that share a prompt."""
    sizes, key = bench.sizes, jax.random.key(KEY)
    G, most = sizes.group_size, max(sizes.refill_responses)
    planned, _ = plans.make_plans(bench.traces, most, 2, bench.plan_tokens)
    # A group has one prompt.
    prompts = bench.prompts([planned[i].prompt for i in range(0, most, G)])
    sampler = plans.planned_sampler(
        bench.backend, bench.vocab, planned, key, rows=sizes.rows, group_size=G
    )

    works = {}
    for count in sizes.refill_responses:
        works[str(count)] = work(bench, sampler, prompts[: count // G], G)
    runs = timing.alternate(works, bench.repeats)
    table = []
    for count in sizes.refill_responses:
        run = runs[str(count)]
        found = run.figures[-1]
        table.append(
            {
                "responses": count,
                "rows": sizes.rows,
                "useful share of row-steps": found["useful_row_steps"],
                "tokens": found["tokens"],
                "steps": found["decode_steps"],
                "seconds": run.sec,
                "µs per token": run.sec.over(run["tokens"]).times(1e6),
            }
        )
    title = f"Real lengths, 2 paths, {G} responses a prompt"
    note = f"Lengths: {bench.traces_from}."
    return [Table(title, table, note)]
