"""The study in words: a table and a list of claims an experiment, from `results.json`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pr1_jax.study import cells
from pr1_jax.system.tables import Table

Results = Mapping[str, Any]

TITLES = {
    "phase": "When blocks live: rewards by deadlines",
    "division": "Division of work",
    "tables": "The paper's tables 3 and 4, and figure 3",
    "scaffold": "Scaffold: forced exploration first (figure 4)",
    "shortcuts": "What the published code's shortcuts cost",
    "planned": "Blocks that the model plans: how many paths, when",
}
_UNITS = {
    "points": (100, " points"),
    "nats": (1, " nats"),
    "steps": (1, " steps"),
    "paths": (1, " paths"),
    "times": (1, ""),
    "": (1, ""),
}
_NOT_RUN = "not measured"


def with_interval(interval: Mapping[str, float], scale: float = 1.0) -> str:
    """`88.7 (85.7 to 91.4)`; a value alone where no luck is involved."""
    value, low, high = (_number(scale * interval[n]) for n in ("value", "low", "high"))
    return value if not interval["number_of_seeds"] else f"{value} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"


def measured(part: Mapping[str, Any]) -> str:
    """What was measured of a part of a claim."""
    if part["measured"] is None:
        return f"{part['text']}: {_NOT_RUN}"
    scale, unit = _UNITS[part["unit"]]
    sign = "+" if part["measured"]["value"] > 0 else ""
    return f"{part['text']}: {sign}{with_interval(part['measured'], scale)}{unit}"


def table(results: Results, experiment: str) -> str:
    """What the cells of an experiment came to; Markdown."""
    rows = []
    for name in cells.MEMBERS[experiment]:
        if name not in results["cells"]:
            continue
        cell = results["cells"][name]
        metrics, took = cell["metrics"], [sec for sec in cell["seconds"] if sec]
        rows.append(
            {
                "cell": cell["title"],
                "seeds": str(len(cell["seeds"])),
                "accuracy": with_interval(metrics["accuracy"], 100),
                "with a block": with_interval(metrics["parallel_ratio"], 100),
                "before RL": _mean(metrics, "before_parallel_ratio", 100),
                "distinct work": _mean(metrics, "work_division", 100),
                "identical paths": _mean(metrics, "identical_paths", 100),
                "tokens": _mean(metrics, "total_tokens"),
                "sequential steps": _mean(metrics, "sequential_steps"),
                **_paths(metrics, experiment),
                "divided at step": ", ".join(map(_step, cell.get("divided_at", ()))),
                "min": f"{sum(took) / len(took) / 60:.1f}" if took else "",
            }
        )
    return Table("", rows).markdown()


def _paths(metrics: Mapping[str, Any], experiment: str) -> dict[str, str]:
    """Columns of planned blocks."""
    figures = {
        "paths of a block": "num_paths",
        "before RL, paths": "before_num_paths",
        "searches at once": "searches",
    }
    shown = figures if experiment == "planned" else {}
    return {column: _mean(metrics, metric) for column, metric in shown.items()}


def _mean(metrics: Mapping[str, Any], metric: str, scale: float = 1.0) -> str:
    """The mean over the seeds that have a figure, if one has."""
    known = [x for x in metrics.get(metric, {}).get("by_seed", ()) if x is not None]
    return f"{scale * sum(known) / len(known):.1f}" if known else ""


def _step(step: float | None) -> str:
    return "never" if step is None else f"{step:.0f}"


def dense_table(results: Results) -> str:
    """Dense masks against the exact rule; Markdown."""
    rows = [
        {
            "tokens": str(f["tokens"]),
            "MB dense": f"{f['dense_bytes'] / 1e6:.1f}",
            "MB exact": f"{f['exact_bytes'] / 1e6:.1f}",
            "ms dense": f"{1e3 * f['dense_sec']:.1f}",
            "ms exact": f"{1e3 * f['exact_sec']:.1f}",
            "largest difference": f"{f['max_difference']:.1e}",
        }
        for f in results["dense"]
    ]
    return Table("", rows).markdown()


def theory_table(results: Results) -> str:
    """The optimum of two paths by deadline, and where rewards are predicted to end."""
    percent = lambda share: f"{100 * share:.0f}"
    rows = [
        {
            "deadline": deadline,
            "lone search": percent(of["lone"]),
            "random rows": percent(of["alike"]),
            "divided rows": percent(of["divided"]),
            **{
                f"blocks, {cells.REWARDS[name].title}": percent(normalised)
                for name, (_, normalised) in of["ratios"].items()
            },
        }
        for deadline, of in results["theory"].items()
    ]
    return Table("", rows).markdown()


def planned_theory_table(results: Results) -> str:
    """The optimum of planned blocks by deadline."""
    percent = lambda share: f"{100 * share:.0f}"
    rows = [
        {
            "deadline": deadline,
            "lone search": percent(of["by_paths"]["1"]),
            **{f"{k} planned paths": percent(of["by_paths"][k]) for k in "234"},
            "best number": " or ".join(map(str, of["paths"])),
            "four labelled paths without plans": percent(of["labelled"]),
        }
        for deadline, of in results["planned_theory"].items()
    ]
    return Table("", rows).markdown()


def overview(results: Results) -> str:
    """How many claims came to which verdict; Markdown."""
    counts = Counter(claim["verdict"] for claim in results["claims"])
    said = ", ".join(f"{count} × *{verdict}*" for verdict, count in counts.items())
    return f"{len(results['claims'])} claims: {said}.\n"


def claims(results: Results, experiment: str) -> str:
    """One line a claim: what is claimed, what was measured, the verdict; Markdown."""
    rows = [
        {
            "claim": claim["claim"],
            "paper": claim["paper"],
            "measured, 95 % interval": "; ".join(map(measured, claim["parts"])),
            "verdict": f"**{claim['verdict']}**",
        }
        for claim in results["claims"]
        if claim["experiment"] == experiment
    ]
    return Table("", rows).markdown()


def readme(results: Results, experiments: Sequence[str]) -> str:
    """The README of a study's folder."""
    parts = ["# The paper in miniature\n\n"]
    parts += [f"- {name}: {value}\n" for name, value in results["about"].items()]
    parts += ["\n", overview(results)]
    for name in experiments:
        parts += [f"\n## {TITLES[name]}\n\n", f"![{name}]({name}.png)\n\n"]
        parts += [claims(results, name), "\n", table(results, name)]
        if name == "phase":
            parts += ["\nIn per cent, by arithmetic:\n\n", theory_table(results)]
        if name == "planned":
            theory = planned_theory_table(results)
            parts += ["\nThe best accuracy in per cent, by arithmetic:\n\n", theory]
        if name == "shortcuts":
            parts += ["\n", dense_table(results)]
    return "".join(parts)
