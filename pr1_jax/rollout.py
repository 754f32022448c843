"""From problems to scored responses: sampling, verification, rewards, advantages."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np

from pr1_jax import (
    answers,
    answers_string,
    losses,
    metrics,
    processes,
    rewards,
    stopping,
    tags,
)
from pr1_jax.data import Problem
from pr1_jax.sampler import Sampler
from pr1_jax.tokenizer import Tokenizer
from pr1_jax.trajectory import Trajectory

_THREADS = 4  # of a `Scorer`; all they do is wait, mostly


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
    def string_correct(self) -> bool:
        """What the published string checker says, for comparison."""
        return answers_string.check(self.text, self.problem.answer)

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
        return self.verdict == answers.CORRECT


def trace(t: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a viewer needs of each of the T response tokens, EOS included.

    Joined, `pieces` are the text and the EOS token's where one was written. Prompt
    tokens are not listed: they have positions 0, 1, …, block 0 and path 0.
    """
    logps = [round(float(x), 3) + 0.0 for x in t.logps]  # no -0.0
    return {
        "prompt_tokens": len(t.prompt),
        "pieces": tokenizer.pieces(t.tokens),
        "logps": metrics.plain(logps),
        "forced": t.forced.astype(int).tolist(),
        "positions": t.positions.tolist(),
        "block": t.block.tolist(),
        "path": t.path.tolist(),
    }


def everyones_facts(scored: Sequence[Scored], samples: int) -> list[Facts]:
    """Facts of all processes' responses, `samples` to each problem, problem-major."""
    mine = [dataclasses.asdict(s.facts) for s in scored]
    return [Facts(**found) for found in processes.gather(mine, samples)]


class Scorer:
    """Verifies responses in threads as they come, while the device works on others.

    A context manager; its threads wait for the verifier's worker processes.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        samples: int,
        tokenizer: Tokenizer,
        *,
        timeout_sec: float,
    ):
        """Responses are problem-major, `samples` of them to each problem."""
        self._problems, self._samples = problems, samples
        self._tokenizer, self._timeout_sec = tokenizer, timeout_sec
        self._threads = ThreadPoolExecutor(_THREADS)
        self._futures: dict[int, Future[Scored]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, index: int, trajectory: Trajectory) -> None:
        """Takes response number `index`."""
        problem = self._problems[index // self._samples]
        self._futures[index] = self._threads.submit(self._score, problem, trajectory)

    def results(self) -> list[Scored]:
        """All responses in order, once they are verified."""
        return [self._futures[i].result() for i in sorted(self._futures)]

    def _score(self, problem: Problem, trajectory: Trajectory) -> Scored:
        text = self._tokenizer.decode(trajectory.tokens)
        found = answers.check(text, problem.answer, timeout_sec=self._timeout_sec)
        format_ok = not tags.check_format(text)
        return Scored(problem, trajectory, text, found.verdict, found.reason, format_ok)


def sample_and_score(
    sampler: Sampler,
    params: Any,
    problems: Sequence[Problem],
    samples: int,
    key: jax.Array,
    tokenizer: Tokenizer,
    *,
    timeout_sec: float,
    first: int = 0,
) -> tuple[list[Scored], dict[str, float]]:
    """Samples responses and verifies each as soon as it is complete.

    Arguments are those of `Sampler.sample` and `answers.check`, but for:

    Args:
      problems: this process's share of all (`processes.share`).
      first: number of the first response to all of them.

    Raises:
      stopping.Stopped: this process was told to stop.

    Returns:
      The responses, problem-major, and what took how long; `perf/verify_sec` is what
      verification took after the last response was sampled.
    """
    began = time.perf_counter()
    prompts = [problem.prompt for problem in problems]
    numbers = processes.numbers(len(problems))[:, None] * samples + np.arange(samples)
    with Scorer(problems, samples, tokenizer, timeout_sec=timeout_sec) as scorer:

        def add(index: int, response: Trajectory) -> None:
            stopping.give_up()
            scorer.add(index, response)

        sampler.sample(
            params,
            prompts,
            samples,
            key,
            ids=first + numbers.ravel(),
            on_finished=add,
        )
        scored = scorer.results()
    took, stats = time.perf_counter() - began, sampler.stats
    return scored, {
        "perf/prefill_sec": stats["prefill_sec"],
        "perf/decode_sec": stats["decode_sec"],
        "perf/verify_sec": took - stats["prefill_sec"] - stats["decode_sec"],
        "perf/useful_row_steps": stats["useful_row_steps"],
    }


def describe(facts: Sequence[Facts]) -> dict[str, float]:
    """Means over responses, as `rollout/…` metrics."""
    mean = lambda values: float(np.mean([float(v) for v in values]))
    total = mean(f.total_tokens for f in facts)
    steps = mean(f.sequential_steps for f in facts)
    return {
        "rollout/accuracy": mean(f.correct for f in facts),
        "rollout/undecided": mean(f.verdict == answers.UNDECIDED for f in facts),
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
    metrics.replace_file(path, "".join(lines).encode("utf-8", "surrogatepass"))
