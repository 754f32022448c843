"""What happened at which step, found by simple rules that a person can check.

A metric *moved* by z at a step: z is its distance from the median of up to 20 steps
before, over their spread. The spread is 1.4826 times the median absolute deviation, and
at least 0.01 for a share and 2 % of the median for any other metric. The steps before
are those of the same stage. Rewards, and what follows from them, are compared with steps
of the same reward; otherwise every window of a schedule would be news.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pr1_jax.report import reading
from pr1_jax.workdir import alarms, metric_table

WINDOW = 20  # steps before
_ENOUGH = 8  # of them that have the metric
_SHARP = 8.0  # a change with such a z is an event if it is large, too: _WATCHED
_MOST = 0.5  # a larger share of groups without signal is worth a sentence
_LAST = 10  # steps that tell how a stage ended
_QUIET = 20  # steps in which the same metric or alarm makes no second event
_NOT_MOVES = ("alarm/", "data/", "optim/lr", "optim/skipped", "reward/tiered")
_NOT_MOVES += ("reward/not_finite",)
_MACHINE = ("perf/step_sec", "perf/tokens_per_sec")
_BY_REWARD = ("reward/", "rollout/degenerate_groups")
# Metrics whose sharp changes are events: the least change that counts, and the least
# one as a share of the value before.
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
      metrics: those that changed.
    """

    kind: str
    name: str
    stage: str
    step: int
    row: int
    last_row: int
    text: str
    metrics: tuple[str, ...] = ()


Moves = dict[str, tuple[np.ndarray, np.ndarray]]


def moves(run: reading.Run) -> Moves:
    """z and the median before, both float [rows], by metric; NaN where too few are."""
    by_stage = [np.arange(first, first + n) for _, first, n in run.stages]
    by_reward = []
    for rows in by_stage:
        names = np.array([run.reward_names[i] for i in rows])
        by_reward += [rows[names == name] for name in dict.fromkeys(names.tolist())]
    moved = {}
    for metric, values in run.columns.items():
        if metric.startswith((*_NOT_MOVES, "reward/weight_")):
            continue
        if metric.startswith("perf/") and metric not in _MACHINE:
            continue
        z, before = np.full(len(values), np.nan), np.full(len(values), np.nan)
        is_share = metric_table.describe(metric).form == "share"
        for rows in by_reward if metric.startswith(_BY_REWARD) else by_stage:
            z[rows], before[rows] = _scores(values[rows], is_share=is_share)
        moved[metric] = z, before
    return moved


def _scores(values: np.ndarray, *, is_share: bool) -> tuple[np.ndarray, np.ndarray]:
    """z and median of the window before, of one stretch of steps [N]."""
    padded = np.concatenate([np.full(WINDOW, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: len(values)]
    before = _median(windows)
    spread = 1.4826 * _median(np.abs(windows - before[:, None]))
    # Without a least spread, a still metric would make news of any change.
    spread = np.maximum(spread, 0.01 if is_share else 0.02 * np.abs(before) + 1e-9)
    z = np.clip((values - before) / spread, -99, 99)
    enough = np.isfinite(windows).sum(axis=1) >= _ENOUGH
    return np.where(enough, z, np.nan), np.where(enough, before, np.nan)


def _median(windows: np.ndarray) -> np.ndarray:
    """Median of each row's finite values, [N, W] -> [N]; NaN of none."""
    return np.ma.median(np.ma.masked_invalid(windows), axis=1).filled(np.nan)


def largest(moved: Moves, row: int, count: int = 8) -> list[tuple[str, float, float]]:
    """Metric, z and median before of what moved most at a row, first things first."""
    order = {name: i for i, name in enumerate(metric_table.METRICS)}
    rows = [(n, float(z[row]), float(m[row])) for n, (z, m) in moved.items()]
    rows = [r for r in rows if np.isfinite(r[1]) and abs(r[1]) >= 3]
    rows.sort(key=lambda r: (-min(abs(r[1]), 20.0), order.get(r[0], len(order))))
    return rows[:count]


def find(run: reading.Run, moved: Moves) -> list[Event]:
    """All events of a run in order; `moved` is what `moves` returned."""
    events = [*_alarms(run), *_changes(run, moved), *_boundaries(run)]
    return sorted(events, key=lambda e: (e.row, e.kind != "stage", e.kind))


def _event(run: reading.Run, kind: str, name: str, row: int, last: int, *words):
    at = run.rows[row]
    return Event(kind, name, at["stage"], at["step"], row, last, *words)


def _alarms(run: reading.Run) -> Iterator[Event]:
    for metric, values in run.columns.items():
        group, _, name = metric.partition("/")
        if group != "alarm":
            continue
        kind = "skipped" if name == "skipped" else "alarm"
        for rows in _stretches(values == 1, run):
            first, last, steps = rows[0], rows[-1], rows[-1] - rows[0] + 1
            text = alarms.ALARMS[name].title if name in alarms.ALARMS else name
            if len(rows) < steps:
                text += f" in {len(rows)} of {steps} steps"
            elif steps > 1:
                text += f" for {steps} steps"
            yield _event(run, kind, name, first, last, text)


def _stretches(mask: np.ndarray, run: reading.Run) -> list[list[int]]:
    """Rows that are True, apart where more than `_QUIET` are not, or at a new stage."""
    stage = lambda row: run.rows[row]["stage"]
    stretches: list[list[int]] = []
    for row in np.flatnonzero(mask).tolist():
        before = stretches[-1][-1] if stretches else None
        joins = before is not None and row - before <= _QUIET
        if joins and stage(before) == stage(row):
            stretches[-1].append(row)
        else:
            stretches.append([row])
    return stretches


def _changes(run: reading.Run, moved: Moves) -> Iterator[Event]:
    by_row: dict[int, dict[str, str]] = {}
    for metric, (least, share) in _WATCHED.items():
        if metric not in moved:
            continue
        (z, before), values = moved[metric], run.columns[metric]
        change = np.abs(values - before)
        sharp = (np.abs(z) >= _SHARP) & (change >= least)
        sharp &= change >= share * np.abs(before)
        quiet_until = -1
        for row in np.flatnonzero(sharp).tolist():
            if row > quiet_until:
                words = metric_table.describe(metric)
                was, now = words.write(before[row]), words.write(values[row])
                change_in_words = f"{was} → {now}".replace("-", "−")
                by_row.setdefault(row, {})[metric] = f"{words.label} {change_in_words}"
                quiet_until = row + _QUIET
    for row, changed in by_row.items():
        texts = [*changed.values()]
        more = f", and {len(texts) - 3} more" if len(texts) > 3 else ""
        yield _event(
            run, "change", "", row, row, ", ".join(texts[:3]) + more, tuple(changed)
        )


def _boundaries(run: reading.Run) -> Iterator[Event]:
    for name, first, count in run.stages:
        section = run.config.get(name)
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
    """Sentences about whole stages that a reader should know before the events."""
    return [
        f"{stage}: {text}"
        for stage, first, count in run.stages
        for tell in (_dropped, _without_signal)
        if (text := tell(run, slice(first, first + count)))
    ]


def _without_signal(run: reading.Run, rows: slice) -> str:
    """What share of the groups taught nothing, where it is large."""
    shares = run.columns.get("rollout/degenerate_groups", np.zeros(0))[rows]
    shares = shares[np.isfinite(shares)]
    if not len(shares) or max(shares.mean(), shares[-_LAST:].mean()) < _MOST:
        return ""
    return (
        f"{100 * shares.mean():.0f}% of the groups had no signal "
        f"({100 * shares[-_LAST:].mean():.0f}% in the last steps): their responses all "
        "got the same reward, and nothing was learned from them."
    )


def _dropped(run: reading.Run, rows: slice) -> str:
    """How many records of a stage's data were left out so far, and why."""
    counts = {}
    for name, values in run.columns.items():
        known = values[rows][np.isfinite(values[rows])]
        if name.startswith(("data/kept", "data/dropped_")) and known[-1:].any():
            counts[name.removeprefix("data/dropped_")] = int(known[-1])
    total, kept = sum(counts.values()), counts.pop("data/kept", 0)
    if not counts:
        return ""
    words = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()]
    return f"kept {kept:,} of {total:,} records read: {', '.join(words)}."
