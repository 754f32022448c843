"""From problems to scored responses: sampling, verification, rewards, advantages."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np

from pr1_jax.answers.verify import check
from pr1_jax.data.prompts import Problem
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.stages.responses import Response
from pr1_jax.system import processes, stopping
from pr1_jax.trajectory import Trajectory

_THREADS = 4  # of a `Scorer`; all they do is wait, mostly


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
        self._futures: dict[int, Future[Response]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, index: int, trajectory: Trajectory) -> None:
        """Takes response number `index`."""
        problem = self._problems[index // self._samples]
        self._futures[index] = self._threads.submit(self._score, problem, trajectory)

    def results(self) -> list[Response]:
        """All responses in order, once they are verified."""
        return [self._futures[i].result() for i in sorted(self._futures)]

    def _score(self, problem: Problem, trajectory: Trajectory) -> Response:
        text = self._tokenizer.decode(trajectory.tokens)
        result = check(text, problem.answer, timeout_sec=self._timeout_sec)
        return Response.of(problem, trajectory, text, result)


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
) -> tuple[list[Response], dict[str, float]]:
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

        _, figures = sampler.sample(
            params,
            prompts,
            samples,
            key,
            ids=first + numbers.ravel(),
            on_finished=add,
        )
        scored = scorer.results()
    took = time.perf_counter() - began
    return scored, {
        "perf/prefill_sec": figures.prefill_sec,
        "perf/decode_sec": figures.decode_sec,
        "perf/verify_sec": took - figures.prefill_sec - figures.decode_sec,
        "perf/useful_row_steps": figures.useful_row_steps,
    }
