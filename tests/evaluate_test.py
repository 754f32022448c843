"""Figures of an evaluation, against brute force and worked by hand."""

import itertools

import numpy as np
import pytest

from pr1_jax import evaluate


def test_pass_at_k_is_the_share_of_draws_with_a_correct_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            drawn = itertools.combinations([i < c for i in range(n)], k)
            expected = np.mean([any(samples) for samples in drawn])
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
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
    normal = 2 * 1.96 * np.sqrt(share * (1 - share) / 100)
    assert width == pytest.approx(normal, rel=0.1)


def test_interval_holds_the_mean_and_repeats_itself():
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    low, high = evaluate.interval(values)
    assert 0.0 <= low < np.mean(values) < high <= 1.0
    assert evaluate.interval(values) == (low, high)
    assert evaluate.interval([0.75] * 9) == (0.75, 0.75)
    assert evaluate.interval([0.75]) == (0.75, 0.75)


def test_summarize_by_hand():
    # Of three problems both samples are correct, one, none.
    correct = np.array([[True, True], [False, True], [False, False]])
    figures = evaluate.summarize(correct)
    assert figures["accuracy"] == pytest.approx(3 / 6)
    assert figures["pass_at_k"] == pytest.approx(2 / 3)
    # Over problems, not over samples.
    bounds = figures["accuracy_low"], figures["accuracy_high"]
    assert bounds == evaluate.interval([1.0, 0.5, 0.0])
    bounds = figures["pass_at_k_low"], figures["pass_at_k_high"]
    assert bounds == evaluate.interval([1.0, 1.0, 0.0])
    one = evaluate.summarize(np.array([[True], [True], [False]]))
    assert one["pass_at_k"] == one["accuracy"] == pytest.approx(2 / 3)
