"""Figures of an evaluation, against brute force and worked by hand."""

import doctest
import itertools

import numpy as np
import pytest

from pr1_jax import evaluate


def test_worked_examples_hold():
    tried = doctest.testmod(evaluate, optionflags=doctest.ELLIPSIS)
    assert tried.attempted == 1 and tried.failed == 0


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


@pytest.mark.parametrize("n", [1, 16, 400])
def test_an_interval_has_a_width_where_nothing_was_correct(n):
    """Of n problems without a success 3 / n is the bound by rule of thumb."""
    low, high = evaluate.interval([0.0] * n)
    assert low == 0.0 and 3 / (n + 3) < high < 4 / (n + 3)
    assert evaluate.interval([1.0] * n) == pytest.approx((1 - high, 1.0))
    low, high = evaluate.interval([0.75] * n)
    assert 0 < low < 0.75 < high < 1


def test_the_interval_of_one_sample_a_problem_is_wilsons():
    # Newcombe, Statistics in Medicine 17, 1998, table I: 81 of 263, 15 of 148, 1 of 29.
    for correct, n, bounds in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (1, 29, (0.0061, 0.1718)),
    ):
        found = evaluate.interval([1.0] * correct + [0.0] * (n - correct))
        assert found == pytest.approx(bounds, abs=5.1e-5)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_small_shares_are_covered(share):
    """Of 30 problems: a bootstrap covers 2 % in less than half of all cases."""
    rng = np.random.default_rng(0)
    found = [evaluate.interval(rng.random(30) < share) for _ in range(1000)]
    assert np.mean([low <= share <= high for low, high in found]) > 0.93


def test_the_interval_of_an_average():
    """Of one group it is the group's; of m alike its width is that over sqrt(m)."""
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    low, high = evaluate.interval(values)
    assert evaluate.interval_of_average([values]) == pytest.approx((low, high))
    mean, four = np.mean(values), evaluate.interval_of_average([values] * 4)
    assert four == pytest.approx((mean - (mean - low) / 2, mean + (high - mean) / 2))
    low, high = evaluate.interval_of_average([[0.0] * 30, [0.0] * 30])
    assert low == 0.0 < high < evaluate.interval([0.0] * 30)[1]
    # As of all problems together, where groups are equally large and alike.
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, (4, 200)) / 4
    found = evaluate.interval_of_average(groups)
    assert found == pytest.approx(evaluate.interval(groups.ravel()), abs=0.004)


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
