"""What happened at which step, found by simple rules that a person can check.

A figure *moved* by z at a step: its distance from the median of up to 20 steps before,
over their spread (1.4826 · median absolute deviation, and at least one point of a per
cent figure, 2 % of any other's median). Steps before are those of the same stage; rewards, and what follows from them,
are compared with steps of the same reward, or every window of a schedule were news.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pr1_jax.report import reading
from pr1_jax.workdir import alarms, metric_table

WINDOW = 20  # steps before
_ENOUGH = 8  # of them that have the figure
_SHARP = 8.0  # a change with such a z is an event, if it is also large: _WATCHED
_MOST = 0.5  # of the groups of a stage without signal, which is worth a sentence
_QUIET = 20  # steps in which the same figure makes no second event
_NOT_MOVES = ("alarm/", "data/", "optim/lr", "optim/skipped", "reward/tiered")
_MACHINE = ("perf/step_sec", "perf/tokens_per_sec")
_BY_REWARD = ("reward/", "rollout/degenerate_groups")
# Figures whose sharp changes are events: the least change that counts, and the least
# share of the value before.
_WATCHED = {
    "reward/mean": (0.2, 0.3),
    "rollout/accuracy": (0.1, 0.3),
    "policy/entropy": (0.02, 0.3),
    "rollout/total_tokens": (3.0, 0.3),
    "rollout/sequential_steps": (3.0, 0.3),
    "rollout/parallel_ratio": (0.1, 0.3),
    "rollout/format_ok": (0.1, 0.1),
    "rollout/finished": (0.1, 0.1),
    "rollout/undecided": (0.05, 0.3),
    "rollout/logp_gap_max": (1e-3, 3.0),
    "optim/grad_norm": (1.0, 4.0),
    "loss/sft": (0.2, 0.3),
}


@dataclasses.dataclass(frozen=True)
class Event:
    """Something to look at, from `row` to `last_row`.

    Attributes:
      kind: "alarm", "skipped", "change" or "stage".
      name: of the alarm or the stage; "" for a change.
      text: one line.
      metrics: that changed.
    """

    kind: str
    name: str
    stage: str
    step: int
    row: int
    last_row: int
    text: str
    metrics: tuple[str, ...] = ()


def moves(run: reading.Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """z and the median before, both float [rows], by metric; NaN where too few are."""
    by_stage = [np.arange(first, first + n) for _, first, n in run.stages]
    by_reward = []
    for rows in by_stage:
        names = np.array([run.reward_names[i] for i in rows])
        by_reward += [rows[names == name] for name in dict.fromkeys(names.tolist())]
    found = {}
    for metric, values in run.columns.items():
        if metric.startswith((*_NOT_MOVES, "reward/weight_")):
            continue
        if metric.startswith("perf/") and metric not in _MACHINE:
            continue
        z, before = np.full(len(values), np.nan), np.full(len(values), np.nan)
        is_share = metric_table.describe(metric).form == "share"
        for rows in by_reward if metric.startswith(_BY_REWARD) else by_stage:
            z[rows], before[rows] = _scores(values[rows], is_share=is_share)
        found[metric] = z, before
    return found


def _scores(values: np.ndarray, *, is_share: bool) -> tuple[np.ndarray, np.ndarray]:
    """z and median of the window before, of one stretch of steps [N]."""
    padded = np.concatenate([np.full(WINDOW, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: len(values)]
    before = _median(windows)
    spread = 1.4826 * _median(np.abs(windows - before[:, None]))
    # Of a figure that never moved before, the least change would be endless news.
    spread = np.maximum(spread, 0.01 if is_share else 0.02 * np.abs(before) + 1e-9)
    z = np.clip((values - before) / spread, -99, 99)
    enough = np.isfinite(windows).sum(axis=1) >= _ENOUGH
    return np.where(enough, z, np.nan), np.where(enough, before, np.nan)


def _median(windows: np.ndarray) -> np.ndarray:
    """Median of each row's finite values, [N, W] -> [N]; NaN of none."""
    count = np.isfinite(windows).sum(axis=1)
    ordered = np.sort(np.where(np.isfinite(windows), windows, np.inf), axis=1)
    low = np.maximum(count - 1, 0) // 2
    high = np.minimum(count // 2, windows.shape[1] - 1)
    rows = np.arange(len(windows))
    with np.errstate(invalid="ignore"):
        middle = (ordered[rows, low] + ordered[rows, high]) / 2
    return np.where(count > 0, middle, np.nan)


def largest(
    found: dict[str, tuple[np.ndarray, np.ndarray]], row: int, count: int = 8
) -> list[tuple[str, float, float]]:
    """Metric, z and median before of what moved most at a row, first things first."""
    order = [*metric_table.METRICS]
    place = lambda name: order.index(name) if name in order else len(order)
    rows = [(n, float(z[row]), float(m[row])) for n, (z, m) in found.items()]
    rows = [r for r in rows if np.isfinite(r[1]) and abs(r[1]) >= 3]
    return sorted(rows, key=lambda r: (-min(abs(r[1]), 20.0), place(r[0])))[:count]


def find(
    run: reading.Run, found: dict[str, tuple[np.ndarray, np.ndarray]]
) -> list[Event]:
    """All events of a run in order; `found` is what `moves` returned."""
    events = [*_alarms(run), *_changes(run, found), *_boundaries(run)]
    return sorted(events, key=lambda e: (e.row, e.kind))


def _event(run: reading.Run, kind: str, name: str, row: int, last: int, *words):
    at = run.rows[row]
    return Event(kind, name, at["stage"], at["step"], row, last, *words)


def _alarms(run: reading.Run) -> Iterator[Event]:
    for metric, values in run.columns.items():
        group, _, name = metric.partition("/")
        if group != "alarm":
            continue
        kind = "skipped" if name == "skipped" else "alarm"
        for first, last in _stretches(values == 1, run):
            known = alarms.ALARMS.get(name)
            steps = last - first + 1
            text = known.title if known else name
            text += f" for {steps} steps" if steps > 1 else ""
            yield _event(run, kind, name, first, last, text)
    if "alarm/skipped" not in run.columns:  # written before there were alarms
        skipped = run.columns.get("optim/skipped", np.zeros(0))
        for first, last in _stretches(skipped > 0, run):
            text = alarms.ALARMS["skipped"].title
            yield _event(run, "skipped", "skipped", first, last, text)


def _stretches(mask: np.ndarray, run: reading.Run) -> Iterator[tuple[int, int]]:
    """First and last row of each stretch that is True, within one stage."""
    start = None
    for row, holds in enumerate(mask.tolist()):
        new_stage = row and run.rows[row]["stage"] != run.rows[row - 1]["stage"]
        if start is not None and (not holds or new_stage):
            yield start, row - 1
            start = None
        if holds and start is None:
            start = row
    if start is not None:
        yield start, len(mask) - 1


def _changes(
    run: reading.Run, found: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Iterator[Event]:
    by_row: dict[int, dict[str, str]] = {}
    for metric, (least, share) in _WATCHED.items():
        if metric not in found:
            continue
        (z, before), values = found[metric], run.columns[metric]
        change = np.abs(values - before)
        sharp = (np.abs(z) >= _SHARP) & (change >= least)
        sharp &= change >= share * np.abs(before)
        quiet_until = -1
        for row in np.flatnonzero(sharp).tolist():
            if row > quiet_until:
                words = metric_table.describe(metric)
                was, now = words.write(before[row]), words.write(values[row])
                by_row.setdefault(row, {})[metric] = f"{words.label} {was} → {now}"
                quiet_until = row + _QUIET
    for row, changed in by_row.items():
        texts = [*changed.values()]
        more = f", and {len(texts) - 3} more" if len(texts) > 3 else ""
        yield _event(
            run, "change", "", row, row, ", ".join(texts[:3]) + more, tuple(changed)
        )


def _boundaries(run: reading.Run) -> Iterator[Event]:
    planned = run.config.get
    for name, first, count in run.stages:
        section = planned(name)
        steps = section.get("steps", count) if isinstance(section, dict) else count
        text = f"{name} begins" if count < steps else f"{name} begins, {steps} steps"
        yield _event(run, "stage", name, first, first + count - 1, text)


def rows_of_interest(events: Sequence[Event]) -> list[int]:
    """Rows of alarms, skipped updates and changes, those of more kinds first."""
    weight: dict[int, int] = {}
    for event in events:
        if event.kind in ("alarm", "skipped", "change"):
            weight[event.row] = weight.get(event.row, 0) + 1
    return sorted(weight, key=lambda row: (-weight[row], row))


def facts(run: reading.Run) -> list[str]:
    """Sentences on what no step stands out by, and a reader must know all the same."""
    return [
        f"{stage}: {text}"
        for stage, first, count in run.stages
        for tell in (_dropped, _dull)
        if (text := tell(run, slice(first, first + count)))
    ]


def _dull(run: reading.Run, rows: slice) -> str:
    """How many groups taught nothing, where they are most of them."""
    shares = run.columns.get("rollout/degenerate_groups", np.zeros(0))[rows]
    shares = shares[np.isfinite(shares)]
    if not len(shares) or shares.mean() < _MOST:
        return ""
    return (
        f"{100 * shares.mean():.0f}% of the groups had no signal: their responses all "
        "got the same reward, and nothing was learned from them."
    )


def _dropped(run: reading.Run, rows: slice) -> str:
    """How many records of the data were left out, and why."""
    last = {
        name.removeprefix("data/"): values[rows][np.isfinite(values[rows])][-1:]
        for name, values in run.columns.items()
        if name.startswith("data/")
    }
    counts = {name: int(value[0]) for name, value in last.items() if len(value)}
    kept = counts.pop("kept", 0)
    dropped = {
        name.removeprefix("dropped_").replace("_", " "): count
        for name, count in counts.items()
        if name.startswith("dropped_") and count
    }
    if not dropped:
        return ""
    words = [f"{count:,} {reason}" for reason, count in dropped.items()]
    total = kept + sum(dropped.values())
    return f"kept {kept:,} of {total:,} records: {', '.join(words)}."
