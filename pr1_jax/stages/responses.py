"""Verified responses on the host: of them metrics and files are made."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from absl import logging

from pr1_jax import diversity, losses, rewards, tags
from pr1_jax.answers import published
from pr1_jax.answers.verdicts import CORRECT, UNDECIDED, Result
from pr1_jax.data import tasks
from pr1_jax.data.prompts import Problem
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.system import files, processes
from pr1_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Response:
    """One response with all that is known of it on the host.

    Its fields but the last two are its record in a file.

    Attributes:
      question, answer: the problem, and the reference.
      response: the text, tags visible and EOS left out.
      verdict, reason: what the verifier says, and why.
      num_blocks: blocks that were recorded while it was sampled.
      format_ok: the text's format check has no fault.
      finished: ended with EOS, not cut off at its budget or deadline.
      total_tokens: of the response, EOS included.
      sequential_steps: decode steps on the critical path.
      string_correct: what the published string checker says, for comparison.
      identical_paths, path_likeness, work_division: figures of each block with two or
        more paths (`diversity.Diversity`), to four places; () in older records.
      num_paths: paths of each block, where blocks are planned; else ().
      trajectory: its tokens; None where only the record is known.
      parts: what the user's reward function gives it, by name.
    """

    question: str
    response: str
    answer: str
    verdict: str
    reason: str
    num_blocks: int
    format_ok: bool
    finished: bool
    total_tokens: int
    sequential_steps: int
    string_correct: bool
    identical_paths: tuple[bool, ...] = ()
    path_likeness: tuple[float, ...] = ()
    work_division: tuple[float, ...] = ()
    num_paths: tuple[int, ...] = ()
    trajectory: Trajectory | None = None
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        problem: Problem,
        trajectory: Trajectory,
        text: str,
        result: Result,
        *,
        grammar: tags.Grammar = tags.PLAIN,
    ) -> Self:
        """The response to a problem, by its tokens, its text and its verdict.

        Args:
          grammar: of responses, `Settings.grammar`.
        """
        blocks = diversity.of_response(text, tasks.work, grammar)
        return cls(
            question=problem.question,
            response=text,
            answer=problem.answer,
            verdict=result.verdict,
            reason=result.reason,
            num_blocks=trajectory.num_blocks,
            format_ok=not tags.check_format(text, grammar),
            finished=trajectory.finished,
            total_tokens=len(trajectory.tokens),
            sequential_steps=trajectory.sequential_steps,
            string_correct=published.check(text, problem.answer),
            identical_paths=tuple(b.identical_paths for b in blocks),
            path_likeness=tuple(round(b.path_likeness, 4) for b in blocks),
            work_division=tuple(round(b.work_division, 4) for b in blocks),
            num_paths=trajectory.num_paths if grammar.planned else (),
            trajectory=trajectory,
        )

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """The response of a record; what else is in the record is left out."""
        fields = {name: record[name] for name in _RECORD if name not in _OF_BLOCKS}
        return cls(
            **fields, **{name: tuple(record.get(name, ())) for name in _OF_BLOCKS}
        )

    def record(self) -> dict[str, Any]:
        """What is written of it as JSON."""
        values = {name: getattr(self, name) for name in _RECORD}
        return {n: [*x] if isinstance(x, tuple) else x for n, x in values.items()}

    @property
    def correct(self) -> bool:
        """Whether the answer is equivalent to the reference."""
        return self.verdict == CORRECT

    def reward(self, weights: Mapping[str, float]) -> float:
        """Its reward under the weights of a step (`rewards.weights`)."""
        return rewards.weighted(
            weights,
            correct=self.correct,
            num_blocks=self.num_blocks,
            format_ok=self.format_ok,
        )


_BESIDE = ("trajectory", "parts")  # the record
_RECORD = [f.name for f in dataclasses.fields(Response) if f.name not in _BESIDE]
_OF_BLOCKS = (*diversity.FIGURES, "num_paths")
_TEXTS = {name: "" for name in ("question", "response", "answer", "reason")}


def trace(t: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a viewer needs to know of each of the T response tokens, EOS included.

    Joined, `pieces` are the text and the EOS token's where one was written. Prompt
    tokens are not listed: they have positions 0, 1, …, block 0 and path 0.
    """
    logps = [round(float(x), 3) + 0.0 for x in t.logps]  # no -0.0
    return {
        "prompt_tokens": len(t.prompt),
        "pieces": tokenizer.pieces(t.tokens, continues=True),
        "logps": files.plain(logps),
        "forced": t.forced.astype(int).tolist(),
        "positions": t.positions.tolist(),
        "block": t.block.tolist(),
        "path": t.path.tolist(),
    }


def everyones(responses: Sequence[Response], samples: int) -> list[Response]:
    """All processes' responses, without texts and tokens.

    Args:
      responses: of this process, problem-major, `samples` to each problem.
    """
    mine = [response.record() | _TEXTS for response in responses]
    return [Response.read(record) for record in processes.gather(mine, samples)]


def describe(responses: Sequence[Response]) -> dict[str, float]:
    """Means over responses, the same for a training step and an evaluation.

    Figures of paths, and their number, are means over blocks, and are left out where no
    block has any.
    """

    def mean(of: Callable[[Response], float]) -> float:
        return float(np.mean([float(of(r)) for r in responses]))

    blocks = {n: [x for r in responses for x in getattr(r, n)] for n in _OF_BLOCKS}
    total = mean(lambda r: r.total_tokens)
    steps = mean(lambda r: r.sequential_steps)
    return {
        "accuracy": mean(lambda r: r.correct),
        "undecided": mean(lambda r: r.verdict == UNDECIDED),
        "parallel_ratio": mean(lambda r: r.num_blocks > 0),
        "num_blocks": mean(lambda r: r.num_blocks),
        "format_ok": mean(lambda r: r.format_ok),
        "finished": mean(lambda r: r.finished),
        "total_tokens": total,
        "sequential_steps": steps,
        "self_parallelism": total / max(steps, 1e-9),
        **{name: float(np.mean(of)) for name, of in blocks.items() if of},
    }


class Rewards(NamedTuple):
    """Rewards of responses in their parts, all [responses] float32.

    Attributes:
      total: what the response is rewarded with, the sum of the parts.
      schedule: by the weights of the step.
      latency: for its short critical path (`rewards.saving`); 0 where it is not paid.
      function: by the user's reward function, its parts weighted.
      overlong: for coming close to its limit (`rewards.overlong`); 0 where it is not.
      kl: taken off the total, for advantages alone; 0 in what `group_rewards` gives.
      parts: of the schedule and the function, by name, not weighted; none without a
        function.
    """

    total: np.ndarray
    schedule: np.ndarray
    latency: np.ndarray
    function: np.ndarray
    overlong: np.ndarray
    kl: np.ndarray
    parts: Mapping[str, np.ndarray]


def group_rewards(
    responses: Sequence[Response],
    weights: Mapping[str, float],
    group_size: int,
    latency_coef: float = 0.0,
    part_weights: Mapping[str, float] | None = None,
    overlong: Callable[[int, int], float] | None = None,
) -> Rewards:
    """Rewards of responses, group-major.

    Args:
      weights: of the step's rewards; those that are not named have weight 0.
      latency_coef: reward of saving the whole critical path, for responses that are
        correct and that the weights reward with more than 0.
      part_weights: of the schedule and of the parts of the user's function
        (`rewards.part_weights`); None without a function.
      overlong: gives a response's punishment from its total tokens and sequential steps;
        None = 0.
    """
    schedule = np.array([r.reward(weights) for r in responses], np.float32)
    paid = [r.correct and bool(x > 0) for r, x in zip(responses, schedule)]
    steps = [r.sequential_steps for r in responses]
    groups = [slice(i, i + group_size) for i in range(0, len(paid), group_size)]
    savings = [x for group in groups for x in rewards.saving(steps[group], paid[group])]
    latency = np.array(savings, np.float32) * np.float32(latency_coef)
    punished = nothing = np.zeros_like(schedule)
    if overlong:
        lengths = [(r.total_tokens, r.sequential_steps) for r in responses]
        punished = np.array([overlong(*x) for x in lengths], np.float32)
    if not part_weights:
        total = schedule + latency + punished
        return Rewards(total, schedule, latency, nothing, punished, nothing, {})
    parts = {
        name: np.array([r.parts[name] for r in responses], np.float32)
        for name in part_weights
        if name != rewards.SCHEDULE
    }
    function = sum(np.float32(part_weights[name]) * x for name, x in parts.items())
    parts = {rewards.SCHEDULE: schedule, **parts}
    schedule = np.float32(part_weights[rewards.SCHEDULE]) * schedule
    total = schedule + function + latency + punished
    return Rewards(total, schedule, latency, function, punished, nothing, parts)


def group_advantages(
    responses: Sequence[Response],
    weights: Mapping[str, float],
    group_size: int,
    *,
    normalize_std: bool,
    normalize_parts: bool = False,
    baseline: str = "group",
    latency_coef: float = 0.0,
    part_weights: Mapping[str, float] | None = None,
    overlong: Callable[[int, int], float] | None = None,
    kl: np.ndarray | None = None,
) -> tuple[Rewards, np.ndarray, dict[str, float]]:
    """Rewards and advantages of responses, group-major; advantages [responses] float32.

    Also returns metrics of all processes' rewards, with the share of groups that have
    no signal. A reward that is not finite is named in the log and counted; its group has
    no advantages, and is in no other figure of the rewards.

    Advantages are scaled by the spread of the rewards without what is paid for short
    critical paths: a few steps more or less must not weigh as much as right and wrong in a
    group that is right throughout.

    Args:
      weights, latency_coef, part_weights, overlong: as `group_rewards` has them.
      normalize_std, baseline: as `losses.advantages` has them.
      normalize_parts: advantages are `losses.advantages_of_parts`, instead.
      kl: [responses], taken off the rewards for advantages alone, and not of the spread.
    """
    found = group_rewards(
        responses, weights, group_size, latency_coef, part_weights, overlong
    )
    if kl is not None:
        found = found._replace(kl=np.float32(kl))
    mine = found.total
    for i in np.flatnonzero(~np.isfinite(mine)):
        text = "the reward %s of response %d to %r is no number; its group is left out"
        question = responses[i].question[:200]
        logging.warning(text, mine[i], i % group_size + 1, question)
    of_all = _everyones(found, group_size)
    groups = of_all.total
    if normalize_parts:
        parts = of_all.parts or {rewards.SCHEDULE: of_all.schedule}
        coefs = part_weights or {rewards.SCHEDULE: 1.0}
        advantages = losses.advantages_of_parts(
            {**parts, "latency": of_all.latency, "overlong": of_all.overlong},
            {**coefs, "latency": latency_coef, "overlong": 1.0},
        )
    else:
        advantages = losses.advantages(
            groups - of_all.kl,
            baseline=baseline,
            normalize_std=normalize_std,
            spread_of=of_all.schedule + of_all.function + of_all.overlong,
        )
    own = processes.numbers(len(responses) // group_size)
    is_usable = np.isfinite(groups).all(axis=1)
    usable = groups[is_usable].ravel()
    without_signal = len(groups) - sum(map(has_signal, groups))
    metrics = {
        "reward/mean": float(usable.mean()) if len(usable) else 0.0,
        "reward/std": float(usable.std()) if len(usable) else 0.0,
        "reward/not_finite": float((~np.isfinite(groups)).sum()),
        "reward/tiered": weights.get("tiered", 0.0),
        **{f"reward/weight_{n}": weights.get(n, 0.0) for n in rewards.REWARDS},
        "rollout/degenerate_groups": without_signal / len(groups),
    }
    mean = lambda x: float(x[is_usable].mean()) if len(usable) else 0.0
    if latency_coef:
        metrics["reward/latency"] = mean(of_all.latency)
    if overlong:
        metrics["reward/overlong"] = mean(of_all.overlong)
    for name, part in of_all.parts.items():
        metrics[f"reward/{name}"] = float(part.mean())
        metrics[f"reward/{name}_std"] = float(part.std())
    return found, np.asarray(advantages)[own].reshape(-1), metrics


def _everyones(mine: Rewards, group_size: int) -> Rewards:
    """Those of all processes, each [groups, group_size]."""
    *columns, parts = mine
    rows = np.stack([*columns, *parts.values()], axis=1).tolist()
    of_all = np.array(processes.gather(rows, group_size), np.float32)
    columns = [x.reshape(-1, group_size) for x in of_all.T]
    count = len(Rewards._fields) - 1
    return Rewards(*columns[:count], dict(zip(parts, columns[count:], strict=True)))


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group are numbers that differ, so that they teach."""
    return bool(np.isfinite(rewards).all()) and len({*map(float, rewards)}) > 1


def write_responses(
    path: pathlib.Path,
    responses: Sequence[Response],
    values: Sequence[float] | None = None,
    *,
    latency: Sequence[float] | None = None,
    parts: Mapping[str, Sequence[float]] | None = None,
    traces: int = 0,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes responses as JSON lines, tags visible; replaces the file as a whole.

    Each of several processes writes a file of its own: `NAME-00000-of-00002.jsonl`.

    Args:
      values: their rewards, if they have some; null where one is not finite.
      latency: what of them is for short critical paths, if such a reward is in force.
      parts: of them by name, as of `Rewards`.
      traces: so many of the first records in the file get a `trace`.
      tokenizer: of these responses; needed for traces.
    """
    records = [response.record() for response in responses]
    for name, column in (("reward", values), ("reward_latency", latency)):
        for record, value in zip(records, () if column is None else column):
            record[name] = files.plain(round(float(value), 6))
    for i, record in enumerate(records if parts else ()):
        shown = {name: round(float(x[i]), 6) for name, x in parts.items()}
        record["reward_parts"] = shown
    for record, response in zip(records[:traces], responses):
        record["trace"] = trace(response.trajectory, tokenizer)
    files.write_json_lines(processes.own_path(path), records)
