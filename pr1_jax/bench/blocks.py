"""Suites of parallel blocks: against requests, a step's cost in a block, refilling."""

import functools
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from pr1_jax.bench import limits, plans, timing
from pr1_jax.bench.plans import Plan
from pr1_jax.bench.report import Plot, Table
from pr1_jax.bench.request_programs import Programs
from pr1_jax.bench.requests import decode_requests
from pr1_jax.bench.sampling import KEY, work
from pr1_jax.bench.shapes import Bench

_OURS, _REQUESTS, _COPIES = "ours", "requests", "requests, ideal cache"
_SEQUENTIAL = "sequential"


def blocks(bench: Bench) -> list[Table]:
    """Parallel blocks against the published scheme, on lengths of real traces."""
    programs = Programs(
        bench.config,
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
        "in one stream. Rows of requests: the fastest of those tried. ratio: median "
        "seconds, to ours. steps: of the batch; critical path: decode steps of a "
        "response one after another, on average."
    )
    plot = Plot("paths", ("ratio to ours",), by="scheme", bars=True)
    return [Table("Parallel blocks, same tokens", rows, note, plot)]


def _schemes(bench: Bench, programs: Programs, num_paths: int) -> list[dict]:
    """Rows of the table for one number of paths."""
    config, vocab, key = bench.config, bench.vocab, jax.random.key(KEY)
    N = bench.sizes.rows
    tokens = bench.plan_tokens
    planned, factor = plans.make_plans(bench.traces, N, num_paths, tokens)
    prompts = bench.prompts([plan.prompt for plan in planned])
    ours = plans.planned_sampler(
        config, vocab, planned, key, rows=N, num_paths=num_paths
    )
    alone = [plan.sequential() for plan in planned]
    one_stream = plans.planned_sampler(config, vocab, alone, key, rows=N)

    def sample(sampler) -> Mapping[str, float]:
        responses = sampler.sample(bench.params, prompts, 1, key)
        return {
            "tokens": sum(len(r.tokens) for r in responses),
            "steps": sampler.stats["decode_steps"],
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
                "ratio to ours": run.sec.median / runs[_OURS].sec.median,
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


def lanes(bench: Bench) -> list[Table]:
    """Milliseconds a step with none, some or all rows in a block, at equal slots."""
    table = lane_steps(bench, bench.sizes.rows, bench.sizes.paths)
    return [
        Table(
            f"A decode step of {bench.sizes.rows} rows, {table[0]['slots']} slots each",
            table,
            "lanes: fed by the compiled step; live: of them in use. relative: to main "
            "streams. Whole chunks alone count, between whose ends no path ended.",
        )
    ]


def lane_steps(
    bench: Bench, rows: int, path_counts: Sequence[int]
) -> list[dict[str, object]]:
    """Rows of the table: each is a mix of rows in a block and rows that are not."""
    sizes, length = bench.sizes, bench.sizes.lane_path_tokens
    begin = 4
    prompt, in_block = sizes.prompt_tokens, {}
    for paths in path_counts:
        in_block[paths] = Plan(prompt, (begin,), ((length,) * paths,), (2,), 1)
    outside = Plan(prompt, tail=begin + length)
    room = max(plan.room for plan in in_block.values())
    few = min(path_counts)
    mixes = [(few, 0.0), (few, 0.25), (few, 0.5), (few, 1.0)]
    mixes += [(paths, 1.0) for paths in path_counts if paths != few]
    works, clocks, expected = {}, {}, {}
    for paths in path_counts:
        chosen = [share for p, share in mixes if p == paths]
        planned = []
        for share in chosen:
            inside = round(share * rows)
            planned += [in_block[paths]] * inside + [outside] * (rows - inside)
        # Buckets matter where some rows are in a block, with the fewest paths.
        for lane_buckets in sizes.lane_buckets if paths == few else [(1, paths)]:
            key = jax.random.key(KEY)
            clock = plans.planned_sampler(
                bench.config,
                bench.vocab,
                planned,
                key,
                rows=rows,
                num_paths=paths,
                changes={"max_response_tokens": room},
                kind=timing.ChunkClock,
                lane_buckets=lane_buckets,
                steps_per_chunk=sizes.lane_steps_per_chunk,
            )
            clock.slot_sizes = clock.slot_sizes[-1:]  # as many for all
            clock.row_sizes = clock.row_sizes[-1:]
            for i, share in enumerate(chosen):
                inside = round(share * rows)
                name = f"{paths} {share} {lane_buckets}"
                works[name] = functools.partial(_sample_part, bench, clock, i * rows)
                clocks[name] = clock
                expected[name] = (
                    paths,
                    share,
                    lane_buckets,
                    rows + inside * (paths - 1),
                )

    chunks = {name: [] for name in works}
    for repeat in range(1 + bench.repeats):
        for name, call in works.items():
            clocks[name].chunks.clear()
            call()
            if repeat:
                chunks[name] += clocks[name].chunks
    table, base = [], None
    for name, (paths, share, lane_buckets, live) in expected.items():
        steps = sizes.lane_steps_per_chunk
        whole = [c for c in chunks[name] if c.live == (live, live) and c.steps == steps]
        if not whole:
            raise ValueError(f"no whole chunk with {live} live lanes: longer paths")
        spread = timing.Spread(tuple(1e3 * chunk.sec / steps for chunk in whole))
        base = base or spread.median
        inside = round(share * rows)
        cost = _mixed_cost(bench, rows, inside, paths, prompt, begin, length)
        table.append(
            {
                "paths": paths,
                "rows in a block": inside,
                "lane buckets": ", ".join(f"{x:g}" for x in lane_buckets),
                "lanes": whole[0].lanes,
                "live": live,
                "ms per step": spread,
                "relative": spread.median / base,
                "tokens relative": live / rows,
                "limit ms per step": 1e3 * cost,
                "share of limit": spread.rate(1e3 * cost),
                "slots": room,
            }
        )
    return table


def _sample_part(bench: Bench, sampler, first: int) -> None:
    prompts = bench.prompts([bench.sizes.prompt_tokens] * sampler.rows)
    ids = first + np.arange(len(prompts))
    sampler.sample(bench.params, prompts, 1, jax.random.key(KEY), ids=ids)


def _mixed_cost(
    bench: Bench,
    rows: int,
    inside: int,
    paths: int,
    prompt: int,
    begin: int,
    length: int,
) -> float:
    """Limit, in seconds, of a step half way through the block."""
    seen_outside = prompt + begin + length // 2
    seen_inside = prompt + begin + paths * length // 2
    lanes = rows - inside + inside * paths
    cost = limits.forward_cost(
        bench.config,
        tokens=lanes,
        pairs=(rows - inside) * seen_outside + inside * paths * seen_inside,
        cached=(rows - inside) * seen_outside + inside * seen_inside,
        logits=lanes,
    )
    return cost.seconds(bench.limits)


def refill(bench: Bench) -> list[Table]:
    """How busy rows are kept on real lengths, in groups that share a prompt."""
    sizes, key = bench.sizes, jax.random.key(KEY)
    G, most = sizes.group_size, max(sizes.refill_responses)
    planned, _ = plans.make_plans(bench.traces, most, 2, bench.plan_tokens)
    # A group has one prompt.
    prompts = bench.prompts([planned[i].prompt for i in range(0, most, G)])
    sampler = plans.planned_sampler(
        bench.config, bench.vocab, planned, key, rows=sizes.rows, group_size=G
    )

    works = {}
    for count in sizes.refill_responses:
        works[str(count)] = work(bench, sampler, prompts[: count // G], G)
    runs = timing.alternate(works, bench.repeats)
    table = []
    for count in sizes.refill_responses:
        run = runs[str(count)]
        found = run.figures[-1]
        per_token = timing.Spread(
            tuple(1e6 * f["sec"] / f["tokens"] for f in run.figures)
        )
        table.append(
            {
                "responses": count,
                "rows": sizes.rows,
                "useful share of row-steps": found["useful_row_steps"],
                "tokens": found["tokens"],
                "steps": found["decode_steps"],
                "seconds": run.sec,
                "µs per token": per_token,
            }
        )
    title = f"Real lengths, 2 paths, {G} responses a prompt"
    note = f"Lengths: {bench.traces_from}."
    return [Table(title, table, note)]
