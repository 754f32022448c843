"""Which responses the page carries, within a budget, and how they are written in it.

A response has short fields and, where it was recorded, its trace: pieces of text,
log-probs in hundredths of a nat, and labels as spans (tokens, position of the first,
block, path, forced) within which positions count up by one.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pr1_jax.report import analysis, reading
from pr1_jax.tags import PLAIN, Grammar

BUDGET = 8_000_000  # bytes of responses in a page
_MANY, _FEW = 16, 2  # responses of a source that is of interest, and of any other
_LOOK_AT = 32  # records of a file to choose from, or four times those chosen
_EVENTS, _SPREAD = 16, 8  # steps, at most
# Responses of the sources of interest, of the others, and whether those have traces;
# the first that fits into the budget.
_PLANS = (
    *((many, _FEW, True) for many in (_MANY, 12, 8, 6, 4, 3, 2)),
    *((many, _FEW, False) for many in (4, 2, 1)),
    (1, 1, False),
)

Encoded = list[tuple[dict[str, Any], int]]  # records, and their sizes as JSON


class Shelf:
    """The encoded responses of each source; a file that has changed is read again."""

    def __init__(self):
        self._chosen: dict[reading.Source, tuple[Any, Encoded]] = {}

    def take(
        self, counts: Mapping[reading.Source, int], grammar: Grammar = PLAIN
    ) -> dict[reading.Source, Encoded]:
        """So many encoded records of each source, or all; forgets other sources.

        Args:
          grammar: as `encode`.
        """
        held, self._chosen = self._chosen, {}
        for source, count in counts.items():
            stamp = [(p.stat().st_size, p.stat().st_mtime_ns) for p in source.paths]
            stamp.append(count)
            if source not in held or held[source][0] != stamp:
                records = reading.read_records(source, max(_LOOK_AT, 4 * count))
                mixed = _mixed(records, count)
                held[source] = stamp, [_sized(encode(r, grammar)) for r in mixed]
            self._chosen[source] = held[source]
        return {source: encoded for source, (_, encoded) in self._chosen.items()}


def steps_named(run: reading.Run, named: Sequence[int]) -> list[reading.Source]:
    """The sources of these steps.

    Raises:
      ValueError: the run has no responses of one of them.
    """
    sources = []
    for step in named:
        at = [source for source in run.sources if source.step == step]
        if not at:
            steps = sorted(s.step for s in run.sources if s.step is not None)
            have = f"steps {steps[0]} to {steps[-1]}" if steps else "none of any step"
            raise ValueError(
                f"--steps={step}: {run.path} has no responses of that step (it has "
                f"{have})"
            )
        sources += at
    return sources


def embed(
    run: reading.Run,
    interesting: Sequence[int],
    *,
    asked: Sequence[reading.Source] = (),
    budget: int = BUDGET,
    shelf: Shelf | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """Picks responses: a few of each step, more of sources of interest.

    Those are evaluations, first, last and evenly spread steps, and `interesting` rows.

    Args:
      interesting: rows to show, with the one before each, most wanted first.
      asked: sources to embed in full, beside the budget.
      budget: bytes of responses.
      shelf: that of the update before, so that little is read again.

    Returns:
      Name, stage, step and records of each source, in the order of sampling, and what
      a reader should know of what is left out.
    """
    wanted = [s for s in _wanted(run, interesting) if s not in asked]
    others = [s for s in run.sources if s not in asked and s not in {*wanted}]
    counts = dict.fromkeys(wanted, _MANY) | dict.fromkeys(others, _FEW)
    chosen = _fit(wanted, others, (shelf or Shelf()).take(counts, run.grammar), budget)
    chosen = {source: [r for r, _ in pairs] for source, pairs in chosen.items()}
    for source in asked:
        chosen[source] = [encode(r, run.grammar) for r in reading.read_records(source)]
    groups = [
        {"name": s.name, "stage": s.stage, "step": s.step, "records": chosen[s]}
        for s in run.sources
        if chosen.get(s)
    ]
    return groups, _left_out(run, chosen)


def _wanted(run: reading.Run, interesting: Sequence[int]) -> list[reading.Source]:
    """Sources by priority, each once."""
    evaluations = [s for s in run.sources if s.step is None]
    steps = [s for s in run.sources if s.step is not None]
    by_step = {(s.stage, s.step): s for s in steps}
    rows = [run.rows[max(at, 0)] for i in interesting[:_EVENTS] for at in (i, i - 1)]
    keys = [(row["stage"], row["step"]) for row in rows]
    of_rows = [by_step[key] for key in keys if key in by_step]
    ends, spread = [], []
    for _, group in itertools.groupby(steps, key=lambda s: s.stage):
        of_stage = list(group)
        ends += [of_stage[0], of_stage[-1]]
        last = len(of_stage) - 1
        spread += [of_stage[round(i * last / _SPREAD)] for i in range(1, _SPREAD)]
    return list(dict.fromkeys([*evaluations, *of_rows, *ends, *spread]))


def _mixed(records: Sequence[Mapping[str, Any]], count: int) -> list[Mapping]:
    """Some records of each verdict, with and without blocks.

    Traced ones come first, and other questions before further responses to one.
    """
    asked: Counter[Any] = Counter()
    kinds: dict[tuple, list] = {}
    ranks = []
    for record in records:
        question = str(record.get("question"))
        ranks.append(("trace" not in record, asked[question]))
        asked[question] += 1
    for i in sorted(range(len(records)), key=ranks.__getitem__):
        kind = (str(records[i].get("verdict")), bool(records[i].get("num_blocks")))
        kinds.setdefault(kind, []).append(records[i])
    turns = itertools.zip_longest(*kinds.values())
    return [r for turn in turns for r in turn if r is not None][:count]


def _fit(
    wanted: Sequence[reading.Source],
    others: Sequence[reading.Source],
    encoded: Mapping[reading.Source, Encoded],
    budget: int,
) -> dict[reading.Source, Encoded]:
    """The responses that fit: fewer of each, then texts alone, then fewer sources."""
    for many, few, traced in _PLANS:
        chosen = {s: encoded[s][:many] for s in wanted}
        for source in others:
            pairs = encoded[source][:few]
            chosen[source] = pairs if traced else [_text_alone(r) for r, _ in pairs]
        sizes = {s: sum(size for _, size in pairs) for s, pairs in chosen.items()}
        if sum(sizes.values()) <= budget:
            return chosen
    left = budget - sum(sizes[s] for s in wanted)
    strides = (others[::k] for k in range(2, len(others)))
    spread = next((x for x in strides if sum(sizes[s] for s in x) <= left), ())
    fitting, used = {}, 0
    for source in (*wanted, *spread):
        if used + sizes[source] <= budget:
            fitting[source] = chosen[source]
            used += sizes[source]
    return fitting


def _text_alone(record: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """An encoded record without its trace, and its size."""
    alone = {name: x for name, x in record.items() if name != "trace"}
    if "trace" in record:
        alone["response"] = "".join(record["trace"]["pieces"])
    return _sized(alone)


def _sized(record: dict[str, Any]) -> tuple[dict[str, Any], int]:
    return record, len(json.dumps(record, separators=(",", ":")))


def _left_out(run: reading.Run, chosen: Mapping[reading.Source, Any]) -> str:
    if not run.sources:
        return "This run has kept no responses."
    steps = [s for s in run.sources if s.step is not None]
    shown = [s for s in steps if s in chosen]
    if not steps:
        return f"All responses are in {run.path}/rollouts."
    of = "every step" if shown == steps else f"{len(shown)} of {len(steps)} steps"
    return (
        f"Here are some responses of {of} and of the evaluations; all are in "
        f"{run.path}/rollouts. To add all of a step: "
        f"python -m pr1_jax.report {run.path} --steps={steps[-1].step}"
    )


def encode(record: Mapping[str, Any], grammar: Grammar = PLAIN) -> dict[str, Any]:
    """A rollout record as the page holds it; fields of a wrong type are left empty.

    Args:
      grammar: of responses.
    """
    text = lambda name: x if isinstance(x := record.get(name), str) else ""
    number = lambda name: x if isinstance(x := record.get(name), int | float) else None
    out = {
        "question": text("question"),
        "answer": text("answer"),
        "verdict": text("verdict"),
        "reason": text("reason"),
        "reward": number("reward"),
        "saved": number("reward_latency"),
        "blocks": number("num_blocks"),
        "tokens": number("total_tokens"),
        "steps": number("sequential_steps"),
        "format_ok": bool(record.get("format_ok", True)),
        "finished": bool(record.get("finished", True)),
    }
    if asked := analysis.asked(text("question")):
        out["asked"] = asked
    if paths := analysis.figures_of_paths({"response": text("response")}, grammar):
        out["identical"] = [x.identical_paths for x in paths]
        out["division"] = [round(x.work_division, 4) for x in paths]
    trace = _encode_trace(record.get("trace"))
    return out | ({"trace": trace} if trace else {"response": text("response")})


def _encode_trace(trace: Any) -> dict[str, Any] | None:
    """None where it is missing or torn."""
    names = ("pieces", "logps", "forced", "positions", "block", "path")
    if not isinstance(trace, Mapping) or not {*names} <= trace.keys():
        return None
    columns = [trace[name] for name in names]
    if not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return None
    pieces, logps, *labels = columns
    spans: list[list[int]] = []
    try:
        for forced, position, block, path in zip(*labels):
            kind = [int(block), int(path), int(forced)]
            last = spans[-1] if spans else None
            if last and last[2:] == kind and last[0] + last[1] == position:
                last[0] += 1
            else:
                spans.append([1, int(position), *kind])
        return {
            "prompt": int(trace.get("prompt_tokens") or 0),
            "pieces": [str(piece) for piece in pieces],
            "surprise": [
                round(100 * min(max(-float(x), 0.0), 99.0)) if x is not None else 9900
                for x in logps
            ],
            "spans": spans,
        }
    except (TypeError, ValueError, OverflowError):
        return None
