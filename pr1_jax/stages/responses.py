"""Responses with all that is known of them on the host."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pr1_jax import losses, rewards
from pr1_jax.answers import published
from pr1_jax.answers.verdicts import CORRECT, UNDECIDED
from pr1_jax.data.prompts import Problem
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.system import files, processes
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
        return self.verdict == CORRECT

    @property
    def string_correct(self) -> bool:
        """What the published string checker says, for comparison."""
        return published.check(self.text, self.problem.answer)

    @property
    def total_tokens(self) -> int:
        """Tokens of the response."""
        return len(self.trajectory.tokens)

    @property
    def facts(self) -> "Facts":
        """What other processes want to know of it."""
        return Facts(
            verdict=self.verdict,
            format_ok=self.format_ok,
            string_correct=self.string_correct,
            num_blocks=self.trajectory.num_blocks,
            finished=self.trajectory.finished,
            total_tokens=self.total_tokens,
            sequential_steps=self.trajectory.sequential_steps,
        )

    def record(self) -> dict[str, Any]:
        """What is written of it as JSON, tags visible."""
        return {
            "question": self.problem.question,
            "response": self.text,
            "answer": self.problem.answer,
            "verdict": self.verdict,
            "reason": self.reason,
            "num_blocks": self.trajectory.num_blocks,
            "format_ok": self.format_ok,
            "finished": self.trajectory.finished,
            "total_tokens": self.total_tokens,
            "sequential_steps": self.trajectory.sequential_steps,
        }

    def trace(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """`trace` of its tokens."""
        return trace(self.trajectory, tokenizer)

    def reward(self, name: str) -> float:
        """The reward `name` of this response."""
        return rewards.reward(
            name,
            correct=self.correct,
            num_blocks=self.trajectory.num_blocks,
            format_ok=self.format_ok,
        )


@dataclasses.dataclass(frozen=True)
class Facts:
    """What metrics are made of: a response without its tokens and text."""

    verdict: str
    format_ok: bool
    string_correct: bool
    num_blocks: int
    finished: bool
    total_tokens: int
    sequential_steps: int

    @property
    def correct(self) -> bool:
        """Whether the answer is equivalent to the reference."""
        return self.verdict == CORRECT


def trace(t: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a viewer needs of each of the T response tokens, EOS included.

    Joined, `pieces` are the text and the EOS token's where one was written. Prompt
    tokens are not listed: they have positions 0, 1, …, block 0 and path 0.
    """
    logps = [round(float(x), 3) + 0.0 for x in t.logps]  # no -0.0
    return {
        "prompt_tokens": len(t.prompt),
        "pieces": tokenizer.pieces(t.tokens),
        "logps": files.plain(logps),
        "forced": t.forced.astype(int).tolist(),
        "positions": t.positions.tolist(),
        "block": t.block.tolist(),
        "path": t.path.tolist(),
    }


def everyones_facts(scored: Sequence[Scored], samples: int) -> list[Facts]:
    """Facts of all processes' responses, `samples` to each problem, problem-major."""
    mine = [dataclasses.asdict(s.facts) for s in scored]
    return [Facts(**found) for found in processes.gather(mine, samples)]


def describe(facts: Sequence[Facts]) -> dict[str, float]:
    """Means over responses, as `rollout/…` metrics."""
    mean = lambda values: float(np.mean([float(v) for v in values]))
    total = mean(f.total_tokens for f in facts)
    steps = mean(f.sequential_steps for f in facts)
    return {
        "rollout/accuracy": mean(f.correct for f in facts),
        "rollout/undecided": mean(f.verdict == UNDECIDED for f in facts),
        "rollout/parallel_ratio": mean(f.num_blocks > 0 for f in facts),
        "rollout/num_blocks": mean(f.num_blocks for f in facts),
        "rollout/format_ok": mean(f.format_ok for f in facts),
        "rollout/finished": mean(f.finished for f in facts),
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

    Also returns metrics of all processes' rewards, with the share of groups whose
    rewards are all equal.
    """
    mine = np.array([s.reward(name) for s in scored], np.float32)
    advantages = losses.advantages(
        mine.reshape(-1, group_size), normalize_std=normalize_std
    )
    values = np.array(processes.gather(mine.tolist(), group_size), np.float32)
    groups = values.reshape(-1, group_size)
    found = {
        "reward/mean": float(values.mean()),
        "reward/std": float(values.std()),
        "reward/tiered": float(name == "tiered"),
        "rollout/degenerate_groups": float((np.ptp(groups, axis=1) == 0).mean()),
    }
    return mine, np.asarray(advantages).reshape(-1), found


def write_responses(
    path: str | pathlib.Path,
    scored: Sequence[Scored],
    values: Sequence[float] | None = None,
    *,
    traces: int = 0,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes responses as JSON lines, tags visible; replaces the file as a whole.

    Of several processes each writes a file of its own: `NAME-00000-of-00002.jsonl`.

    Args:
      traces: so many of the first records in the file get a `trace`.
      tokenizer: of these responses; needed for traces.
    """
    lines = []
    for i, s in enumerate(scored):
        record = s.record()
        if values is not None:
            record["reward"] = round(float(values[i]), 6)
        if i < traces:
            record["trace"] = s.trace(tokenizer)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path = processes.own_path(pathlib.Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_file(path, "".join(lines).encode("utf-8", "surrogatepass"))
