"""Puts a report together: one HTML file that asks the network for nothing.

Whatever comes from models, data and configs is JSON inside one `<script>` that is data
and never runs; the page's own code shows it as text.
"""

import collections
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pr1_jax import diversity, rewards
from pr1_jax.report import charts, differences, events, history, reading, traces
from pr1_jax.system import files
from pr1_jax.workdir import alarms, metric_table

_FOLDER = pathlib.Path(__file__).parent / "assets"
_SCRIPTS = (
    "base.js",
    "charts.js",
    "steps.js",
    "tables.js",
    "trace.js",
    "mask.js",
    "responses.js",
    "start.js",
)
_ROWS = 4000  # steps of a run that are drawn, at most
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def write(
    workdirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    steps: Sequence[str] = (),
) -> str | os.PathLike[str]:
    """Writes the report of a run, or of several side by side; returns its path.

    Args:
      out: the file to write; None: `report.html` in the only workdir.
      steps: whose responses are embedded in full, as texts.

    Raises:
      ValueError, OSError: names the argument, or the file, and what is wrong with it.
    """
    if not workdirs:
        raise ValueError(
            "name the workdir of a run: python -m pr1_jax.report runs/quickstart"
        )
    if len(workdirs) > 1 and not out:
        raise ValueError(
            "--out is missing: several runs need a file to go to, --out=compare.html"
        )
    out = out or os.path.join(workdirs[0], "report.html")
    if os.path.isdir(out):
        raise ValueError(f"--out={out} is a folder; name a file")
    if wrong := [step for step in steps if not step.strip().isdecimal()]:
        given = ",".join(steps)
        raise ValueError(f"--steps={given}: {wrong[0]!r} is not the number of a step")
    runs = [reading.read(workdir) for workdir in workdirs]
    made = []
    for run, name in zip(runs, _names(runs)):
        analyses = history.History(run.path).update(run)
        asked = traces.steps_named(run, [int(step) for step in steps])
        share = traces.BUDGET // len(runs)
        made.append(describe(run, analyses, name=name, asked=asked, budget=share))
    configs = [run.config for run in runs]
    files.replace_file(out, assemble(made, differences.between(configs)))
    return out


def _names(runs: Sequence[reading.Run]) -> list[str]:
    """Names that tell the runs apart."""
    names = [run.name for run in runs]
    if len({*names}) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def describe(
    run: reading.Run,
    analyses: Mapping[str, Mapping[str, float]],
    *,
    name: str = "",
    asked: Sequence[reading.Source] = (),
    budget: int = traces.BUDGET,
    shelf: traces.Shelf | None = None,
) -> dict[str, Any]:
    """A run as the page's data; arguments are those of `traces.embed`."""
    by_step = {(s.stage, s.step): analyses.get(s.name, {}) for s in run.sources}
    rows = [
        _with(row, by_step.get((row["stage"], row["step"]), {}), "rollout/")
        for row in run.rows
    ]
    evaluations = [
        (title, at, _with(values, analyses.get(title, {}), "eval/"))
        for title, at, values in run.evaluations
    ]
    run = dataclasses.replace(run, rows=rows, evaluations=evaluations)
    moved = events.moves(run)
    happened = events.find(run, moved)
    interesting = events.rows_of_interest(happened)
    responses, left_out = traces.embed(
        run, interesting, asked=asked, budget=budget, shelf=shelf
    )
    shown = _thinned(len(rows), {e.row for e in happened})
    index = {row: i for i, row in enumerate(shown)}
    base, fields = differences.from_base(run.config)
    settings = {stage: run.config.get(stage) for stage, _, _ in run.stages}
    return {
        "name": name or run.name,
        "workdir": str(run.path),
        "experiment": str(run.config.get("name", "")),
        "variant": str(run.config.get("variant", "structured")),
        "grammar": dataclasses.asdict(run.grammar),
        "finished": bool(run.summary.get("finished")),
        "planned": {
            stage: section["steps"]
            for stage, section in settings.items()
            if isinstance(section, Mapping) and isinstance(section.get("steps"), int)
        },
        "stages": _stages(run, shown),
        "steps": [rows[i]["step"] for i in shown],
        "rewards": [run.reward_names[i] for i in shown],
        "windows": [dataclasses.asdict(window) for window in run.windows],
        "schedule": _rewards(run),
        "values": {
            metric: [_short(values[i]) for i in shown]
            for metric, values in run.columns.items()
            if np.isfinite(values).any()
        },
        "moves": [
            [[n, round(z, 1), _short(m)] for n, z, m in events.largest(moved, i)]
            for i in shown
        ],
        "events": [
            dataclasses.asdict(e)
            | {"row": index[e.row], "last_row": index.get(e.last_row, index[e.row])}
            for e in happened
        ],
        "facts": events.facts(run),
        "evaluations": [
            {"name": title, "at": int(np.searchsorted(shown, at)), "values": _plain(v)}
            for title, at, v in evaluations
        ],
        "benchmarks": run.benchmarks,
        "base": base,
        "fields": fields,
        "responses": responses,
        "left_out": left_out,
    }


def _with(
    line: Mapping[str, Any], analyses: Mapping[str, float], group: str
) -> dict[str, Any]:
    """A line of metrics and its analyses.

    Figures of paths are metrics today; in a line that was written before, those of the
    responses that were analysed stand for them.
    """
    names = {history.PREFIX + name: group + name for name in diversity.FIGURES}
    read = {names.get(name, name): value for name, value in analyses.items()}
    return {**line, **{name: x for name, x in read.items() if name not in line}}


def _thinned(rows: int, keep: set[int]) -> list[int]:
    """Rows to draw: all, or evenly spread ones and those to keep."""
    if rows <= _ROWS:
        return list(range(rows))
    spread = {round(i * (rows - 1) / (_ROWS - 1)) for i in range(_ROWS)}
    return sorted(spread | keep)


def _stages(run: reading.Run, shown: Sequence[int]) -> list[dict[str, Any]]:
    stages = []
    for stage, _, _ in run.stages:
        rows = [i for i, row in enumerate(shown) if run.rows[row]["stage"] == stage]
        stages.append({"name": stage, "first": rows[0], "count": len(rows)})
    return stages


def _rewards(run: reading.Run) -> str:
    """The schedule, how many steps each of its rewards was in force, and the bonus."""
    counts = collections.Counter(filter(None, run.reward_names))
    parts = [f"{name} in {n} step{'s' * (n > 1)}" for name, n in counts.items()]
    settings = run.config.get("reward", {})
    name = str(settings.get("schedule", ""))
    text = f"{name}: {', '.join(parts)}" if len(parts) > 1 else name
    bonus = settings.get("latency_coef") or 0.0
    return f"{text}, with {bonus:g} × the saved critical path" if bonus else text


def _reward_in_words(name: str) -> str:
    """What a reward gives to whom."""
    pays = functools.partial(rewards.reward, name, format_ok=True)
    with_block = pays(correct=True, num_blocks=1)
    without = pays(correct=True, num_blocks=0)
    text = f"{with_block:g} for a correct answer"
    if with_block != without:
        text += f" with a block, {without:g} for one without"
    wrong = pays(correct=False, num_blocks=0)
    return f"{text}, {wrong:g} otherwise.".replace("-", "−")


def _short(value: float) -> float | None:
    """Five digits are enough to draw and to read; None for no number."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _plain(line: Mapping[str, Any]) -> dict[str, float | None]:
    return {n: None if x is None else _short(x) for n, x in line.items() if "/" in n}


def assemble(
    runs: Sequence[Mapping[str, Any]], config_rows: Sequence[tuple[str, ...]]
) -> bytes:
    """The page, of what `describe` returned for each run."""
    values = [at["values"] for run in runs for at in (run, *run["evaluations"])]
    names = sorted({name for line in values for name in line})
    data = {
        "metrics": {n: dataclasses.asdict(metric_table.describe(n)) for n in names},
        "charts": [
            {"group": group, "charts": [dataclasses.asdict(c) for c in members]}
            for group, members in charts.CHARTS.items()
        ],
        "alarms": {
            name: {"title": a.title, "means": a.means, "look": a.look}
            for name, a in alarms.ALARMS.items()
        },
        "rewards": {
            **{name: _reward_in_words(name) for name in rewards.REWARDS},
            "latency": "for a correct answer, more the fewer sequential steps it took "
            "than the longest correct one of its group.",
        },
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "runs": list(runs),
        "fields": list(config_rows),
    }
    read = lambda name: _lean((_FOLDER / name).read_text(encoding="utf-8"))
    page = read("page.html").replace("/*STYLE*/", read("page.css"))
    page = page.replace("/*SCRIPT*/", "\n".join(map(read, _SCRIPTS)))
    return page.replace("/*DATA*/", embeddable(data)).encode()


def _lean(text: str) -> str:
    """Code without indentation, empty lines and lines that are comments."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def embeddable(value: Any) -> str:
    """JSON that cannot end a `<script>`, nor break a line of it, nor fail to encode.

    >>> embeddable("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(files.plain(value), ensure_ascii=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
