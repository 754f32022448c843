"""From responses to advantages: baselines of a batch, parts, punishment of length."""

import functools

import jax
import numpy as np
import pytest

from pr1_jax import losses, rewards
from pr1_jax.answers.verdicts import CORRECT, INCORRECT
from pr1_jax.stages.responses import Response, group_advantages, group_rewards
from pr1_jax.system import processes

ACCURACY = {"accuracy": 1.0}


def response(correct, tokens=10, steps=10, **parts):
    return Response(
        question="What is 2·3?",
        response="",
        answer="6",
        verdict=CORRECT if correct else INCORRECT,
        reason="made up",
        num_blocks=0,
        format_ok=True,
        finished=True,
        total_tokens=tokens,
        sequential_steps=steps,
        string_correct=correct,
        parts={f"function.{name}": value for name, value in parts.items()},
    )


OVERLONG = functools.partial(rewards.overlong, max_tokens=100, max_steps=60, buffer=20)


def test_long_responses_by_hand():
    """The worked example of docs/method.md, section 5; the spread has a part in it."""
    lengths = [(80, 30), (85, 30), (85, 50), (100, 30)]
    group = [response(True, *lengths[i]) for i in range(4)]
    found = group_rewards(group, ACCURACY, 4, overlong=OVERLONG)
    np.testing.assert_allclose(found.overlong, [0, -0.25, -0.5, -1])
    np.testing.assert_allclose(found.total, [1, 0.75, 0.5, 0])
    _, advantages, figures = group_advantages(
        group, ACCURACY, 4, normalize_std=True, overlong=OVERLONG
    )
    values = np.array([1, 0.75, 0.5, 0])
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(advantages, expected, rtol=1e-4)
    assert figures["reward/overlong"] == -1.75 / 4
    _, _, figures = group_advantages(group, ACCURACY, 4, normalize_std=True)
    assert "reward/overlong" not in figures


def test_a_kl_divergence_is_taken_off_but_not_in_the_spread():
    """Else it would be all the spread of a group that is right throughout."""
    group = [response(True), response(True), response(False), response(False)] * 2
    group[6:] = [response(True)] * 2
    kl = np.array([0.1, 0.3, 0, 0, 0.2, 0, 0, 0])
    found, advantages, figures = group_advantages(
        group, ACCURACY, 4, normalize_std=True, kl=kl
    )
    expected = [0.9 + 0.1, 0.7 + 0.1, -1 + 0.1, -1 + 0.1, -0.15, 0.05, 0.05, 0.05]
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_array_equal(found.total, [1, 1, -1, -1, 1, 1, 1, 1])
    assert figures["rollout/degenerate_groups"] == 0.5


def test_parts_are_normalised_each_when_asked():
    """So that a function's hundreds do not drown what is right."""
    right, words = [1, 0, 0, 0, 1, 1, 0, 0], [0, 100, 0, 100, 100, 0, 0, 0]
    found = [
        response(r, steps=5 + i % 4, words=w)
        for i, (r, w) in enumerate(zip(right, words))
    ]
    weights = {"schedule": 2.0, "function.words": 1.0}
    ask = functools.partial(
        group_advantages,
        *(found, ACCURACY, 4),
        normalize_std=True,
        latency_coef=0.5,
        part_weights=weights,
    )
    paid, advantages, _ = ask(normalize_parts=True)
    arrays = [np.reshape(x, (2, 4)) for x in (right, words, paid.latency)]
    normed = [
        (x - x.mean(axis=1, keepdims=True)) / np.maximum(x.std(axis=1), 1e-9)[:, None]
        for x in arrays
    ]
    total = 2 * normed[0] + normed[1] + 0.5 * normed[2]
    np.testing.assert_allclose(advantages, (total / total.std()).ravel(), atol=1e-4)
    _, drowned, _ = ask()
    assert drowned[0] < 0 < advantages[0]  # right, and without words


@pytest.mark.parametrize("baseline", losses.BASELINES)
@pytest.mark.parametrize("normalize_parts", [False, True])
def test_several_processes_have_the_advantages_of_one(
    baseline, normalize_parts, monkeypatch
):
    """Their batch is that of all of them, and each takes its own groups."""
    rng = np.random.default_rng(0)
    groups = [[response(rng.random() < 0.5, words=rng.random()) for _ in range(4)]
              for _ in range(6)]  # fmt: skip
    ask = lambda groups: group_advantages(
        [r for group in groups for r in group],
        ACCURACY,
        4,
        normalize_std=True,
        normalize_parts=normalize_parts,
        baseline=baseline,
        part_weights={"schedule": 1.0, "function.words": 1.0},
    )
    said, real = [], processes.gather
    monkeypatch.setattr(
        processes, "gather", lambda rows, size: said.append(rows) or real(rows, size)
    )
    _, whole, figures = ask(groups)
    monkeypatch.setattr(processes, "gather", lambda rows, size: said[0])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        _, own, of_all = ask(groups[index::2])
        np.testing.assert_array_equal(own, whole.reshape(6, 4)[index::2].ravel())
        assert of_all == figures
