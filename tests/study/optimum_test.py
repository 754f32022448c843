"""The optimum of the task `partner` is that of its texts."""

import itertools
import re

import numpy as np
import pytest

from pr1_jax import tags
from pr1_jax.data import partner
from pr1_jax.study import optimum
from tests.helpers.command import ROOT

TOKENIZER = partner.Partner().tokenizer()
TOKENIZER.use_plans()


def num_tokens(text):
    return len(TOKENIZER.encode(text, continues=True))


def problems(n, rows=2):
    rng = np.random.default_rng(0)
    return [partner.make_problem(partner.FAMILIES["hard"], rows, rng) for _ in range(n)]


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("limit", [1, 5, 6, 10, 11, 20])
def test_reach_counts_the_tokens_of_a_search(limit, rows):
    for problem in problems(20, rows):
        text, found = partner.search(problem, 1, limit)
        if not found:
            assert optimum.reach(num_tokens(text), rows) == limit
            assert optimum.reach(num_tokens(text) - 1, rows) == limit - 1


@pytest.mark.parametrize("num_paths", [2, 4])
def test_a_response_takes_the_steps_that_the_optimum_counts(num_paths):
    """The longest path and all that is not in a path, EOS included."""
    [problem] = problems(1, num_paths)
    rng = np.random.default_rng(1)
    text = partner.make_trace(problem, rng, 1.0)
    paths = [part.split(tags.END_PATH)[0] for part in text.split(tags.PATH)[1:]]
    assert len(paths) == num_paths
    longest = max(map(num_tokens, paths))
    outside = text
    for path in paths:
        outside = outside.replace(path, "", 1)
    outside = outside.replace(tags.PATH + tags.END_PATH, "", num_paths - 1)
    assert num_tokens(outside) + 1 == optimum.BLOCK_TOKENS
    steps = optimum.BLOCK_TOKENS + longest
    reached = optimum.path_reach(steps, num_paths)
    assert optimum.reach(longest, num_paths) == reached
    lone = partner.make_trace(problem, rng, 0.0)
    said = lone.split("\nFinal Answer:")[0]
    seen = optimum.lone(num_tokens(lone), num_paths) * optimum.NUMBERS
    assert seen == optimum.reach(num_tokens(said), num_paths)


def test_the_figures_by_hand():
    # 43 steps: 41 of a lone search are a row of 31 tokens, a letter and three numbers.
    assert optimum.lone(43) == 13 / 20
    # A labelled path has 43 - 11 - 1 = 31: a row.
    assert optimum.divided(43, 2) == 1.0
    assert optimum.divided(42, 2) == 18 / 20
    assert optimum.alike(43, 2) == optimum.alike(42, 2) == 0.75
    # Four rows of 16 tokens.
    assert optimum.divided(28, 4) == 1.0
    assert optimum.alike(28, 4) == pytest.approx(1 - (3 / 4) ** 4)
    assert optimum.lone(28, 4) == 8 / 20
    assert optimum.lone(0) == optimum.best(66, 2) == 1.0


@pytest.mark.parametrize("num_paths", [2, 4])
def test_no_paths_that_draw_alike_see_more(num_paths):
    """By random distributions of their rows."""
    rng = np.random.default_rng(0)
    for deadline in (20, 28, 43, 60):
        seen = optimum.path_reach(deadline, num_paths)
        for shares in rng.dirichlet(np.ones(num_paths), 30):
            mean = sum(
                np.prod([shares[row] for row in rows]) * len({*rows}) * seen
                for rows in itertools.product(range(num_paths), repeat=num_paths)
            )
            best = optimum.alike(deadline, num_paths)
            assert mean / optimum.NUMBERS <= best + 1e-9


def test_more_time_never_hurts():
    for of in (
        optimum.lone,
        lambda deadline: optimum.divided(deadline, 2),
        lambda deadline: optimum.alike(deadline, 4),
    ):
        values = [of(deadline) for deadline in range(1, 80)]
        assert values == sorted(values)


def test_a_planned_block_takes_what_the_optimum_counts():
    """Steps of its critical path, and tokens in all, with labels of one token and EOS."""
    rng, counts = np.random.default_rng(0), set()
    for problem in problems(60, 4):
        text = partner.make_trace(problem, rng, 1.0, planned=True)
        said = [part.split(tags.END_PATH)[0] for part in text.split(tags.PATH)[1:]]
        counts.add(n := len(said))
        tokens = num_tokens(text) + n + 1  # a label each, EOS
        searched = [num_tokens(path) for path in said]
        steps = tokens - sum(searched) + max(searched) - (n - 1) * 3
        seen = optimum.reach(max(searched), 4)
        for wanted, given in ((seen, steps), (seen - 1, steps - 1)):
            spans = {2: [10, 10], 3: [10, 5, 5], 4: [5] * 4}[n]
            together = sum(min(wanted, one) for one in spans) / optimum.NUMBERS
            assert optimum.planned(given, n) == together
    assert counts == {2, 3, 4}


def test_the_figures_of_planned_blocks_by_hand():
    # 50 steps: 11 of a block, 6 of two plans and a label leave 32: two rows of 16 tokens.
    assert optimum.planned(50, 2) == 1.0
    assert optimum.planned(49, 2) == 18 / 20
    # 40 steps: 11, 12 of four plans and a label leave 16: a row.
    assert optimum.planned(40, 4) == 1.0
    # 88 tokens: 9 outside of paths, 12 of plans; 16 each of four with 3 tags and label: 13.
    assert optimum.planned(40, 4, tokens=88) == optimum.planned(0, 4, tokens=88) == 0.8
    # As the method's table says.
    method = (ROOT / "docs" / "method.md").read_text()
    table = re.search(r"\| deadline \| 28 .*?\n\n", method, re.DOTALL)[0]
    head, _, *rows = table.strip().split("\n")
    assert len(rows) == 4
    for number, row in enumerate(rows, 1):
        for deadline, said in list(zip(head.split("|"), row.split("|")))[2:-1]:
            shares = optimum.shares_planned(int(deadline), tokens=96)
            assert round(100 * shares[number]) == int(said), (deadline, number)
    # More paths as the deadline falls, until none fits.
    found = [optimum.best_planned(steps, tokens=88) for steps in (66, 50, 40, 24)]
    assert found == [(1.0, [1, 2]), (1.0, [2]), (0.8, [4]), (0.3, [1])]
