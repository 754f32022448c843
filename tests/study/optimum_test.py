"""The optimum of the task `partner` is that of its texts."""

import itertools

import numpy as np
import pytest

from pr1_jax import tags
from pr1_jax.data import partner, tasks
from pr1_jax.study import optimum

TASK = partner.Partner()
TOKENIZER = TASK.tokenizer()


def num_tokens(text):
    return len(TOKENIZER.encode(text, continues=True))


def problems(n):
    rng = np.random.default_rng(0)
    return [partner.make_problem(partner.FAMILIES["hard"], rng) for _ in range(n)]


@pytest.mark.parametrize("limit", [1, 4, 5, 8, 16])
def test_reach_counts_the_tokens_of_a_search(limit):
    for problem in problems(20):
        text, found = partner.search(problem, 1, limit)
        if not found:
            assert optimum.reach(num_tokens(text)) == limit
            assert optimum.reach(num_tokens(text) - 1) == limit - 1


@pytest.mark.parametrize("num_paths", [2, 4])
def test_a_response_takes_the_steps_that_the_optimum_counts(num_paths):
    """The longest path and all that is not in a path, EOS included."""
    [problem] = problems(1)
    rng = np.random.default_rng(1)
    text = partner.make_trace(problem, rng, 1.0, paths=num_paths)
    paths = [part.split(tags.END_PATH)[0] for part in text.split(tags.PATH)[1:]]
    longest = max(map(num_tokens, paths))
    outside = text
    for path in paths:
        outside = outside.replace(path, "", 1)
    outside = outside.replace(tags.PATH + tags.END_PATH, "", num_paths - 1)
    steps = num_tokens(outside) + 1 + longest
    assert steps == optimum.BLOCK_TOKENS + optimum.ANSWER_TOKENS + longest
    lone = partner.make_trace(problem, rng, 0.0)
    said = lone.split("\nFinal Answer:")[0]
    assert num_tokens(lone) + 1 == num_tokens(said) + optimum.ANSWER_TOKENS


def test_the_figures_of_two_paths_by_hand():
    # 38 steps: 35 of a lone search are two rows of 13, a letter and two numbers.
    assert optimum.lone(38) == 10 / 16
    # A labelled path has 38 - 3 - 8 - 1 = 26: two rows, half of the list.
    assert optimum.divided(38, 2) == 1.0
    assert optimum.divided(37, 2) == 14 / 16
    # Two random rows of four: the same one, or one beside it, or the opposite one.
    assert optimum.alike(38, 2) == pytest.approx((0.5 + 2 * 0.75 + 1) / 4)
    assert optimum.alike(25, 4) == pytest.approx(1 - (3 / 4) ** 4)
    assert optimum.divided(25, 4) == 1.0
    assert optimum.lone(0) == optimum.best(55, 2) == 1.0


@pytest.mark.parametrize("num_paths", [2, 3, 4])
def test_no_policy_of_its_kind_does_better(num_paths):
    """By trying all rows, and random distributions of them."""
    rng = np.random.default_rng(0)
    for deadline in (20, 28, 38, 60):
        k = optimum.path_reach(deadline, num_paths)
        seen = [{(4 * row + i) % 16 for i in range(k)} for row in range(4)]
        for shares in rng.dirichlet(np.ones(4), 30):
            mean = sum(
                np.prod([shares[row] for row in rows])
                * len(set().union(*(seen[row] for row in rows)))
                for rows in itertools.product(range(4), repeat=num_paths)
            )
            assert mean / 16 <= optimum.alike(deadline, num_paths) + 1e-3
        assert optimum.alike(deadline, num_paths) <= optimum.divided(
            deadline, num_paths, label_tokens=0
        )


def test_more_time_never_hurts():
    for of in (
        optimum.lone,
        lambda d: optimum.divided(d, 2),
        lambda d: optimum.alike(d, 4),
    ):
        values = [of(deadline) for deadline in range(1, 70)]
        assert values == sorted(values)


def test_the_task_names_its_work():
    text = " A 51>55 no 12>16 no 51>55 no"
    assert tasks.make("partner").work(text) == ("51>55", "12>16")
