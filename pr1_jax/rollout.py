"""From problems to scored responses: sampling, verification, rewards, advantages."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax import answers, losses, metrics, rewards, tags
from pr1_jax.data import Problem
from pr1_jax.sampler import Sampler
from pr1_jax.tokenizer import Tokenizer
from pr1_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Scored:
    """A response with all that is known of it on the host."""

    problem: Problem
    trajectory: Trajectory
    text: str
    verdict: str
    reason: str
    format_ok: bool

    @property
    def correct(self) -> bool:
        """Whether the answer is equivalent to the reference."""
        return self.verdict == answers.CORRECT

    @property
    def total_tokens(self) -> int:
        """Tokens of the response."""
        return len(self.trajectory.tokens)

    def reward(self, name: str) -> float:
        """The reward `name` of this response."""
        return rewards.reward(
            name,
            correct=self.correct,
            num_blocks=self.trajectory.num_blocks,
            format_ok=self.format_ok,
        )


def score(
    problems: Sequence[Problem],
    trajectories: Sequence[Trajectory],
    tokenizer: Tokenizer,
    *,
    timeout_sec: float,
) -> list[Scored]:
    """Verifies responses; `trajectories` are problem-major, equally many a problem."""
    samples = len(trajectories) // len(problems)
    asked = [problem for problem in problems for _ in range(samples)]
    texts = [tokenizer.decode(t.tokens) for t in trajectories]
    results = answers.check_many(
        texts, [p.answer for p in asked], timeout_sec=timeout_sec
    )
    return [
        Scored(p, t, text, r.verdict, r.reason, not tags.check_format(text))
        for p, t, text, r in zip(asked, trajectories, texts, results, strict=True)
    ]


def sample_and_score(
    sampler: Sampler,
    params: Any,
    problems: Sequence[Problem],
    samples: int,
    key: jax.Array,
    tokenizer: Tokenizer,
    *,
    timeout_sec: float,
) -> tuple[list[Scored], dict[str, float]]:
    """Samples responses and verifies them; also returns what took how long."""
    began = time.perf_counter()
    prompts = [problem.prompt for problem in problems]
    trajectories = sampler.sample(params, prompts, samples, key)
    sampled = time.perf_counter()
    scored = score(problems, trajectories, tokenizer, timeout_sec=timeout_sec)
    return scored, {
        "perf/sample_sec": sampled - began,
        "perf/verify_sec": time.perf_counter() - sampled,
        "perf/useful_row_steps": sampler.stats["useful_row_steps"],
    }


def describe(scored: Sequence[Scored]) -> dict[str, float]:
    """Means over responses, as `rollout/…` metrics."""
    mean = lambda values: float(np.mean([float(v) for v in values]))
    total = mean(s.total_tokens for s in scored)
    steps = mean(s.trajectory.sequential_steps for s in scored)
    return {
        "rollout/accuracy": mean(s.correct for s in scored),
        "rollout/undecided": mean(s.verdict == answers.UNDECIDED for s in scored),
        "rollout/parallel_ratio": mean(s.trajectory.num_blocks > 0 for s in scored),
        "rollout/num_blocks": mean(s.trajectory.num_blocks for s in scored),
        "rollout/format_ok": mean(s.format_ok for s in scored),
        "rollout/finished": mean(s.trajectory.finished for s in scored),
        "rollout/total_tokens": total,
        "rollout/sequential_steps": steps,
        "rollout/self_parallelism": total / max(steps, 1e-9),
    }


def group_advantages(
    scored: Sequence[Scored],
    name: str,
    group_size: int,
    *,
    normalize_std: bool,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Rewards and advantages of responses, group-major, both [responses] float32.

    Also returns metrics, with the share of groups whose rewards are all equal.
    """
    values = np.array([s.reward(name) for s in scored], np.float32)
    groups = values.reshape(-1, group_size)
    advantages = np.asarray(losses.advantages(groups, normalize_std=normalize_std))
    found = {
        "reward/mean": float(values.mean()),
        "reward/std": float(values.std()),
        "reward/tiered": float(name == "tiered"),
        "rollout/degenerate_groups": float((np.ptp(groups, axis=1) == 0).mean()),
    }
    return values, advantages.reshape(-1), found


def write_responses(
    path: str | pathlib.Path,
    scored: Sequence[Scored],
    values: Sequence[float] | None = None,
) -> None:
    """Writes responses as JSON lines, tags visible; replaces the file as a whole."""
    lines = []
    for i, s in enumerate(scored):
        record = {
            "question": s.problem.question,
            "response": s.text,
            "answer": s.problem.answer,
            "verdict": s.verdict,
            "reason": s.reason,
            "num_blocks": s.trajectory.num_blocks,
            "format_ok": s.format_ok,
            "finished": s.trajectory.finished,
            "total_tokens": s.total_tokens,
            "sequential_steps": s.trajectory.sequential_steps,
        }
        if values is not None:
            record["reward"] = round(float(values[i]), 6)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.replace_file(path, "".join(lines).encode("utf-8", "surrogatepass"))
