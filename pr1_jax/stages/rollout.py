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
    functions = experiment.own if rewarded else experiment.own.without_rewards()
    began = time.perf_counter()
    numbers = processes.numbers(len(problems))[:, None] * samples + np.arange(samples)
    verified: dict[int, Future[Response]] = {}
    failed: list[OwnCodeError] = []
    threads = ThreadPoolExecutor(_THREADS + functions.calls_at_once)

    def judge(problem: Problem, trajectory: Trajectory) -> Response | None:
        try:
            return score(
                problem,
                trajectory,
                experiment.tokenizer,
                timeout_sec=experiment.config.reward.timeout_sec,
                grammar=experiment.settings.grammar,
                functions=functions,
            )
        except OwnCodeError as error:
            failed.append(error)
            return None

    def verify(index: int, trajectory: Trajectory) -> None:
        stopping.give_up()
        if failed and jax.process_count() == 1:
            raise failed[0]
        problem = problems[index // samples]
        verified[index] = threads.submit(judge, problem, trajectory)

    try:
        _, figures = sampler.sample(
            params,
            [problem.prompt for problem in problems],
            samples,
            key,
            ids=first + numbers.ravel(),
            on_finished=verify,
        )
        responses = [verified[i].result() for i in sorted(verified)]
    finally:
        threads.shutdown(cancel_futures=True)
    if functions.calls_at_once:  # all processes stop before the update, or none
        mine = str(failed[0]) if failed else ""
        if fault := processes.first_fault(mine):
            raise OwnCodeError(fault)
    took = time.perf_counter() - began
    return responses, {
        "perf/prefill_sec": figures.prefill_sec,
        "perf/decode_sec": figures.decode_sec,
        "perf/verify_sec": took - figures.prefill_sec - figures.decode_sec,
        "perf/useful_row_steps": figures.useful_row_steps,
    }
