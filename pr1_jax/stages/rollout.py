"""From problems to scored responses: sampling, verification, rewards, advantages."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pr1_jax.answers.verify import check
from pr1_jax.data.prompts import Problem
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.stages import own
from pr1_jax.stages.experiment import Experiment
from pr1_jax.stages.responses import Response
from pr1_jax.system import processes, stopping
from pr1_jax.tags import PLAIN, Grammar
from pr1_jax.trajectory import Trajectory
from pr1_jax.workers.own import OwnCodeError

_THREADS = 4  # that verify; they mostly wait for the verifier's worker processes


def score(
    problem: Problem,
    trajectory: Trajectory,
    tokenizer: Tokenizer,
    *,
    timeout_sec: float,
    grammar: Grammar = PLAIN,
    functions: own.Functions = own.NONE,
) -> Response:
    """Verifies a response to a problem, and calls the user's reward function if asked.

    Args:
      timeout_sec: that of `answers.check`.
      grammar: of responses, `Settings.grammar`.
      functions: of the user; where there is a verifier, it decides.

    Raises:
      OwnCodeError: such a function failed.
    """
    text = tokenizer.decode(trajectory.tokens, continues=True)
    if functions.verifier is None:
        result = check(text, problem.answer, timeout_sec=timeout_sec)
    else:
        result = own.UNVERIFIED
    response = Response.of(problem, trajectory, text, result, grammar=grammar)
    return own.judge(response, functions, tokenizer, grammar)


class _Judges:
    """Threads that score responses as soon as these are complete."""

    def __init__(self, experiment: Experiment, *, rewarded: bool):
        functions = experiment.own.functions
        self._functions = functions if rewarded else functions.without_rewards()
        self._settings = {
            "timeout_sec": experiment.config.reward.timeout_sec,
            "grammar": experiment.settings.grammar,
            "functions": self._functions,
        }
        self._tokenizer = experiment.tokenizer
        self._threads = ThreadPoolExecutor(_THREADS + self._functions.calls_at_once)
        self._scored: dict[int, Future[Response | None]] = {}
        self._failed: list[OwnCodeError] = []

    def ask(self, index: int, problem: Problem, trajectory: Trajectory) -> None:
        """Has a response scored; raises at once what has failed in a run of one process."""
        if self._failed and jax.process_count() == 1:
            raise self._failed[0]
        self._scored[index] = self._threads.submit(self._score, problem, trajectory)

    def _score(self, *response: Any) -> Response | None:
        try:
            return score(*response, self._tokenizer, **self._settings)
        except OwnCodeError as error:
            self._failed.append(error)
            return None

    def responses(self) -> list[Response]:
        """All responses in order; if a function failed, all processes raise that here."""
        found = [self._scored[i].result() for i in sorted(self._scored)]
        if self._functions.calls_at_once:
            mine = str(self._failed[0]) if self._failed else ""
            if fault := processes.first_fault(mine):
                raise OwnCodeError(fault)
        return found

    def close(self) -> None:
        """Waits for what is being scored."""
        self._threads.shutdown(cancel_futures=True)


def sample_and_score(
    experiment: Experiment,
    sampler: Sampler,
    params: Any,
    problems: Sequence[Problem],
    samples: int,
    key: jax.Array,
    *,
    first: int = 0,
    rewarded: bool = False,
) -> tuple[list[Response], dict[str, float]]:
    """Samples responses, and verifies each in a thread as soon as it is complete.

    Args:
      problems: this process's share of all (`processes.share`).
      samples: responses to each problem.
      key: of their draws, together with a response's number.
      first: number of the first response to all problems.
      rewarded: whether the user's reward function is asked, too.

    Returns:
      The responses, problem-major, and what took how long; `perf/verify_sec` is what
      verification took after the last response was sampled.

    Raises:
      stopping.Stopped: this process was told to stop.
      OwnCodeError: a function of the user failed, at any process.
    """
    began = time.perf_counter()
    numbers = processes.numbers(len(problems))[:, None] * samples + np.arange(samples)
    judges = _Judges(experiment, rewarded=rewarded)

    def verify(index: int, trajectory: Trajectory) -> None:
        stopping.give_up()
        judges.ask(index, problems[index // samples], trajectory)

    try:
        _, figures = sampler.sample(
            params,
            [problem.prompt for problem in problems],
            samples,
            key,
            ids=first + numbers.ravel(),
            on_finished=verify,
        )
        responses = judges.responses()
    finally:
        judges.close()
    took = time.perf_counter() - began
    return responses, {
        "perf/prefill_sec": figures.prefill_sec,
        "perf/decode_sec": figures.decode_sec,
        "perf/verify_sec": took - figures.prefill_sec - figures.decode_sec,
        "perf/useful_row_steps": figures.useful_row_steps,
    }
