"""Figures of an evaluation, against brute force and cases worked by hand."""

import itertools

import numpy as np
import pytest

from pr1_jax import evaluate
from pr1_jax.data import tasks, traces
from pr1_jax.data.prompts import Problem
from pr1_jax.stages import evaluation, rollout

ANSWERS = ("7", "8", "9")
BLOCK = (
    "<Parallel><Path>left 1+2 no </Path><Path>right 3+4 yes</Path></Parallel>\n"
    "<Summary>3+4 yes</Summary>"
)


def scored(responses, samples):
    """Scored responses to made-up problems whose answers are 7, 8, 9."""
    tokenizer = tasks.make_tokenizer()
    prompt = np.array(tokenizer.encode("Which two add to 7? 1 2 3 4\n"), np.int32)
    trajectories = [
        traces.from_text(prompt, text, tokenizer, variant="structured")
        for text in responses
    ]
    problems = [Problem("?", a, prompt) for a in ANSWERS[: len(responses) // samples]]
    with rollout.Scorer(problems, samples, tokenizer, timeout_sec=5.0) as scorer:
        for i, response in enumerate(trajectories):
            scorer.add(i, response)
        return scorer.results()


def test_pass_at_k_is_the_share_of_draws_with_a_correct_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            drawn = itertools.combinations([i < c for i in range(n)], k)
            expected = np.mean([any(samples) for samples in drawn])
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_one_sample_and_of_all():
    assert evaluate.pass_at_k(16, 4, 1) == pytest.approx(0.25)
    assert evaluate.pass_at_k(16, 1, 16) == 1.0
    assert evaluate.pass_at_k(16, 0, 16) == 0.0
    # Too large for floats on the way: C(5000, 2500) has 1,500 digits.
    assert evaluate.pass_at_k(5000, 1, 2500) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1), (4, 2, -1)]
)
def test_pass_at_k_says_what_is_wrong(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        evaluate.pass_at_k(n, c, k)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_interval_covers_the_true_mean_most_of_the_time(share):
    rng = np.random.default_rng(0)
    found = [evaluate.interval(rng.random(100) < share, seed) for seed in range(200)]
    covered = np.mean([low <= share <= high for low, high in found])
    assert 0.89 <= covered <= 0.99
    width = np.mean([high - low for low, high in found])
    assert width == pytest.approx(
        2 * 1.96 * np.sqrt(share * (1 - share) / 100), rel=0.1
    )


def test_interval_holds_the_mean_and_repeats_itself():
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    low, high = evaluate.interval(values)
    assert 0.0 <= low < np.mean(values) < high <= 1.0
    assert evaluate.interval(values) == (low, high)
    assert evaluate.interval([0.75] * 9) == (0.75, 0.75)
    assert evaluate.interval([0.75]) == (0.75, 0.75)


def facts(responses, samples):
    return [s.facts for s in scored(responses, samples)]


def test_summarize_by_hand():
    responses = (
        f"{BLOCK}\nFinal Answer: 7",  # problem 1: right, with a block
        "\nFinal Answer: 7",  # right, without
        "\nFinal Answer: 9",  # problem 2: wrong
        "\nFinal Answer: 3",
        "\nFinal Answer: 9",  # problem 3: right once
        f"{BLOCK}{BLOCK}\nFinal Answer: 8",
    )
    found = evaluation.summarize(facts(responses, samples=2), samples=2)
    assert found["eval/accuracy"] == pytest.approx(3 / 6)
    assert found["eval/pass_at_k"] == pytest.approx(2 / 3)
    assert found["eval/parallel_ratio"] == pytest.approx(2 / 6)
    assert found["eval/num_blocks"] == pytest.approx(3 / 6)
    assert 0.0 <= found["eval/accuracy_low"] < 0.5 < found["eval/accuracy_high"] <= 1.0
    # Over problems, not over responses: means 1, 0, 0.5 of three problems.
    low, high = evaluate.interval([1.0, 0.0, 0.5])
    assert (found["eval/accuracy_low"], found["eval/accuracy_high"]) == (low, high)
    # One sequential step fewer for every token of the shorter path: 6 in each block.
    saved = found["eval/total_tokens"] - found["eval/sequential_steps"]
    shorter = len(tasks.make_tokenizer().encode("<Path>left 1+2 no </Path>"))
    assert saved == pytest.approx(3 * shorter / 6)
    assert all(name.startswith("eval/") for name in found)


def test_one_sample_a_problem_makes_pass_at_k_the_accuracy():
    responses = ("\nFinal Answer: 7", "\nFinal Answer: 7", "\nFinal Answer: 9")
    found = evaluation.summarize(facts(responses, samples=1), samples=1)
    assert found["eval/pass_at_k"] == found["eval/accuracy"] == pytest.approx(2 / 3)
