"""Suites of plain decoding: speed against the limits, what it scales with, prompts."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from pr1_jax.bench import timing
from pr1_jax.bench.plans import Plan
from pr1_jax.bench.report import Plot, Table
from pr1_jax.bench.shapes import Bench
from pr1_jax.model import costs
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching, fit
from pr1_jax.sampler.settings import Settings


def plain_sampler(
    bench: Bench, *, rows: int, prompt: int, response: int, **kwargs
) -> Sampler:
    """Decodes without blocks; every response is as long as it may be."""
    settings = Settings(
        max_prompt_tokens=prompt, max_response_tokens=response, max_blocks=0
    )
    batching = Batching(rows=rows, **kwargs)
    return Sampler(bench.backend, bench.endless_vocab, settings, batching)


def work(
    bench: Bench,
    sampler: Sampler,
    prompts: Sequence[np.ndarray],
    samples: int = 1,
) -> timing.Work:
    """A call of the sampler, with what it says of itself."""

    def call() -> Mapping[str, float]:
        responses, figures = sampler.sample(bench.params, prompts, samples, bench.key)
        return {
            "prefill_sec": figures.prefill_sec,
            "decode_sec": figures.decode_sec,
            "decode_steps": figures.decode_steps,
            "useful_row_steps": figures.useful_row_steps,
            "tokens": sum(len(response.tokens) for response in responses),
            "step_ms": 1e3 * figures.decode_sec / figures.decode_steps,
        }

    return call


def sampling(bench: Bench) -> list[Table]:
    """As many prompts as rows, each answered at full length."""
    sizes, config = bench.sizes, bench.config
    rows, prompt, response = sizes.rows, sizes.prompt_tokens, sizes.response_tokens
    sampler = plain_sampler(bench, rows=rows, prompt=prompt, response=response)
    prompts = bench.prompts([prompt] * rows)
    _ = bench.params  # not among what the first call compiles
    call = work(bench, sampler, prompts)
    runs = timing.alternate({"": call}, bench.repeats)[""]

    prefill = costs.prefill(config, rows=rows, tokens=prompt)
    prefill_sec = prefill.seconds(bench.limits)
    decode_sec = costs.decode_seconds(
        config, bench.limits, rows=rows, prompt=prompt, tokens=response
    )
    tokens = rows * response
    row = lambda what, spread, limit, count: {
        "part": what,
        "seconds": spread,
        "limit seconds": limit,
        "share of limit": spread.rate(limit),
        "tokens per second": spread.rate(count),
    }
    table = [
        row("all", runs.sec, prefill_sec + decode_sec, tokens),
        row("prefill", runs["prefill_sec"], prefill_sec, rows * prompt),
        row("decode", runs["decode_sec"], decode_sec, tokens),
    ]
    table[2]["ms per step"] = runs["step_ms"]
    table[2]["limit ms per step"] = 1e3 * decode_sec / response
    table[0]["first call adds seconds"] = runs.compile_sec
    title = f"{rows} prompts × {prompt} tokens → {response} tokens"
    note = (
        "limit: the larger of FLOPs / peak and bytes / bandwidth, step by step; bytes "
        "are the weights once a step and the used keys and values."
    )
    return [Table(title, table, note)]


def _swept(
    bench: Bench,
    title: str,
    column: str,
    points: Mapping[int, tuple[timing.Work, float, int]],
    note: str = "",
    unit: str = "ms per step",
) -> Table:
    """A table and a panel over what was swept.

    Args:
      points: of each value the work, its limit in ms a step, and tokens a step.
    """
    works = {str(value): work for value, (work, _, _) in points.items()}
    runs = timing.alternate(works, bench.repeats)
    rows = []
    for value, (_, limit_ms, lanes) in points.items():
        run = runs[str(value)]
        row = {
            column: value,
            "ms per step": run["step_ms"],
            "limit ms per step": limit_ms,
            "share of limit": run["step_ms"].rate(limit_ms),
            "µs per token": run["decode_sec"].over(run["tokens"]).times(1e6),
            "limit µs per token": 1e3 * limit_ms / lanes,
        }
        rows.append(row)
    return Table(title, rows, note, Plot(column, (unit,), (f"limit {unit}",)))


def _capacity_point(bench: Bench, prompt: int, response: int):
    """Prompts and responses of `used_tokens` tokens, where more would fit."""
    rows, used = bench.sizes.rows, bench.sizes.used_tokens
    changes = {"max_prompt_tokens": prompt, "max_response_tokens": response}
    planned = [Plan(used, tail=used)] * rows
    sampler = bench.planned(planned, rows=rows, changes=changes)
    call = work(bench, sampler, bench.prompts([used] * rows))
    return call, _limit_ms(bench, rows, used, used), rows


def _plain_point(bench: Bench, rows: int, prompt: int, response: int):
    sampler = plain_sampler(bench, rows=rows, prompt=prompt, response=response)
    call = work(bench, sampler, bench.prompts([prompt] * rows))
    return call, _limit_ms(bench, rows, prompt, response), rows


def _limit_ms(bench: Bench, rows: int, prompt: int, tokens: int) -> float:
    seconds = costs.decode_seconds(
        bench.config, bench.limits, rows=rows, prompt=prompt, tokens=tokens
    )
    return 1e3 * seconds / tokens


def _paths_point(bench: Bench, num_paths: int):
    """A block that is nearly all of the response."""
    sizes, rows = bench.sizes, bench.sizes.rows
    length = sizes.lane_path_tokens
    plan = Plan(sizes.prompt_tokens, (2,), ((length,) * num_paths,), (2,), 1)
    sampler = bench.planned([plan] * rows, rows=rows, num_paths=num_paths)
    call = work(bench, sampler, bench.prompts([plan.prompt] * rows))
    steps = (
        costs.decode_step(
            bench.config,
            rows=rows,
            prompt=plan.prompt,
            response=2 + step * num_paths,
            lanes=num_paths,
        ).seconds(bench.limits)
        for step in range(length)
    )
    return call, 1e3 * sum(steps) / length, rows * num_paths


def sweeps(bench: Bench) -> list[Table]:
    """Cost of a step, or a token, against what should and what should not matter."""
    sizes, rows = bench.sizes, bench.sizes.rows
    used, prompt = sizes.used_tokens, sizes.prompt_tokens
    point = functools.partial(_plain_point, bench)
    capacity = functools.partial(_capacity_point, bench)
    swept = functools.partial(_swept, bench)
    return [
        swept(
            f"Capacity for responses, {used} used",
            "max response tokens",
            {n: capacity(used, n) for n in sizes.capacities},
        ),
        swept(
            f"Capacity for prompts, {used} used",
            "max prompt tokens",
            {n: capacity(n, used) for n in sizes.prompt_capacities},
        ),
        swept(
            "Length of responses",
            "response tokens",
            {n: point(rows, prompt, n) for n in sizes.response_lengths},
        ),
        swept(
            "Length of prompts",
            "prompt tokens",
            {n: point(rows, n, used) for n in sizes.prompt_lengths},
        ),
        swept(
            "Rows",
            "rows",
            {n: point(n, prompt, used) for n in sizes.row_counts},
            unit="µs per token",
        ),
        swept(
            "Paths of a block",
            "paths",
            {n: _paths_point(bench, n) for n in sizes.path_counts},
            f"a block of {sizes.lane_path_tokens} tokens a path and 8 tokens around it; "
            "ms per step are over all steps, the limit is of those in the block.",
            unit="µs per token",
        ),
    ]


def prompts(bench: Bench) -> list[Table]:
    """Long prompts with several responses each: kept once a group or once a row."""
    sizes = bench.sizes
    rows, length, tokens = (
        sizes.groups * sizes.group_size,
        sizes.long_prompt,
        sizes.used_tokens,
    )
    asked = bench.prompts([length] * sizes.groups)
    samplers, responses = {}, {}
    for group_size in (sizes.group_size, 1):
        samplers[group_size] = plain_sampler(
            bench, rows=rows, prompt=length, response=tokens, group_size=group_size
        )
        responses[group_size], _ = samplers[group_size].sample(
            bench.params, asked, sizes.group_size, bench.key
        )
    works = {
        str(size): work(bench, sampler, asked, sizes.group_size)
        for size, sampler in samplers.items()
    }
    runs = timing.alternate(works, bench.repeats)
    drawn = [np.concatenate([r.tokens for r in rs]) for rs in responses.values()]
    equal = float(np.mean(drawn[0] == drawn[1]))
    if bench.config.dtype == "float32":  # else rounding soon parts them
        assert equal > 0.9, equal
    table = []
    for size, sampler in samplers.items():
        run, schedule = runs[str(size)], sampler.schedule
        kept = schedule.entries * fit(schedule.prompt_sizes, length)
        table.append(
            {
                "group_size": size,
                "seconds": run.sec,
                "prefill seconds": run["prefill_sec"],
                "decode seconds": run["decode_sec"],
                "prompt cache MB": costs.cache_bytes(bench.config, kept) / 1e6,
                "ratio": run.sec.over(runs[str(sizes.group_size)].sec),
                "share of equal tokens": equal,
            }
        )
    title = (
        f"{sizes.groups} prompts × {length} tokens, {sizes.group_size} responses each "
        f"of {tokens}"
    )
    note = (
        "group_size: rows that share a copy of their prompt. ratio: of seconds, to the "
        "first. share of equal tokens: both draw alike; rounding can part them."
    )
    return [Table(title, table, note)]
