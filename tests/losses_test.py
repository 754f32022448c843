"""Tests of pr1_jax.losses: laws, and small cases worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pr1_jax import losses

# --- Weights and SFT ----------------------------------------------------------------

MASK = np.array([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


def test_token_weights_by_hand():
    weights = functools.partial(losses.token_weights, MASK)
    np.testing.assert_allclose(weights(), MASK / 3)
    per_response = [[0, 1 / 4, 1 / 4, 0], [0, 0, 1 / 2, 0], [0] * 4]  # 2 have tokens
    np.testing.assert_allclose(weights(aggregation="response_mean"), per_response)
    np.testing.assert_allclose(weights(aggregation="constant", constant=5), MASK / 15)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_token_weights_are_the_same_where_a_row_holds_several(aggregation):
    rng = np.random.default_rng(0)
    alone = rng.random((6, 9)) < 0.6
    alone[2] = False  # a response of which nothing is trained
    rows = [[3, 1], [], [0, 2, 5], [4], [], []]  # as many as there are responses
    lengths, T = [9, 5, 4, 7, 9, 3], 16
    mask, start = np.zeros((6, T), bool), np.tile(np.arange(T), (6, 1))
    places = {}
    for row, numbers in enumerate(rows):
        end = 0
        for n in numbers:
            first, end = end, end + lengths[n]
            alone[n, lengths[n] :] = False
            mask[row, first:end], start[row, first:end] = alone[n, : lengths[n]], first
            places[n] = row, slice(first, end)
    weights = functools.partial(
        losses.token_weights, aggregation=aggregation, constant=5
    )
    got, expected = np.array(weights(mask, start)), np.asarray(weights(alone))
    for n, place in places.items():
        np.testing.assert_allclose(got[place], expected[n, : lengths[n]], rtol=1e-6)
        got[place] = 0
    assert (got == 0).all() and (expected > 0).sum() > 10


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_token_weights_of_nothing_are_zero(aggregation):
    weights = losses.token_weights(np.zeros((2, 3)), aggregation=aggregation)
    assert (np.asarray(weights) == 0).all()


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="aggregation='mean' is not one of"):
        losses.token_weights(MASK, aggregation="mean")


def test_sft_loss_is_the_mean_cross_entropy_of_the_kept_tokens():
    logps = jnp.log(jnp.array([[0.9, 0.5, 0.25, 0.9], [0.9, 0.9, 0.125, 0.9]]))
    weights = losses.token_weights(MASK[:2])
    expected = (1 + 2 + 3) / 3 * np.log(2)
    np.testing.assert_allclose(losses.sft_loss(logps, weights), expected, rtol=1e-6)


# --- Advantages ---------------------------------------------------------------------


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("value", [0.1, 1.2, -1.0, 1e6 + 0.1])
def test_equal_rewards_give_exactly_no_advantage(value, normalize_std):
    for size in (3, 5, 7, 8):
        got = losses.advantages([[value] * size], normalize_std=normalize_std)
        assert (np.asarray(got) == 0).all()


def test_advantages_by_hand():
    rewards = [[1.0, -1.0, -1.0, 1.0], [3.0, 0.0, 0.0, 0.0]]
    centred = np.array([[1, -1, -1, 1], [2.25, -0.75, -0.75, -0.75]])
    dr_grpo = losses.advantages(rewards, normalize_std=False)
    np.testing.assert_allclose(dr_grpo, centred, rtol=1e-6)
    alone = losses.advantages(rewards[1:])  # a group does not touch another
    np.testing.assert_array_equal(alone[0], losses.advantages(rewards)[1])
    std = np.array([[1.0], [1.6875**0.5]])  # (2.25² + 3 · 0.75²) / 4 = 1.6875
    np.testing.assert_allclose(losses.advantages(rewards), centred / std, rtol=1e-5)


def test_advantages_by_the_spread_of_other_rewards():
    rewards = [[1.5, 1.0, -1.0, -1.0], [1.5, 1.25, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    of = np.sign(rewards)
    got = losses.advantages(rewards, spread_of=of)
    expected = [[1.375, 0.875, -1.125, -1.125], [0.3125, 0.0625, -0.1875, -0.1875]]
    np.testing.assert_allclose(got, [*expected, [0.0] * 4], atol=2e-6)
    plain = losses.advantages(rewards, normalize_std=False, spread_of=of)
    np.testing.assert_allclose(plain, got, atol=2e-6)
    own = losses.advantages(rewards, spread_of=rewards)
    np.testing.assert_array_equal(own, losses.advantages(rewards))


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_group_with_a_reward_that_is_no_number_is_left_out(value, normalize_std):
    rewards = np.float32([[1, -1, -1, 1], [3, 0, 0, 0], [1, -1, -1, -1]])
    before = np.asarray(losses.advantages(rewards, normalize_std=normalize_std))
    rewards[1, 2:] = value  # two of 3e38 have no finite sum
    got = np.asarray(losses.advantages(rewards, normalize_std=normalize_std))
    assert (got[1] == 0).all()
    np.testing.assert_array_equal(got[[0, 2]], before[[0, 2]])


# --- GRPO ---------------------------------------------------------------------------


def grpo(ratios, advantages, **kwargs):
    """Loss and metrics of a batch of one token a response, equal weights."""
    ratios = jnp.asarray(ratios, jnp.float32)[:, None]
    old = jnp.full_like(ratios, -1.3)
    weights = jnp.full_like(ratios, 1 / len(ratios))
    advantages = jnp.asarray(advantages, jnp.float32)
    return losses.grpo_loss(old + jnp.log(ratios), old, advantages, weights, **kwargs)


def test_ratio_one_gives_minus_the_mean_advantage():
    loss, metrics = grpo([1.0, 1.0, 1.0], [2.0, -1.0, 0.5])
    np.testing.assert_allclose(loss, -0.5, rtol=1e-6)
    assert metrics["clip_fraction"] == metrics["ratio_max_error"] == 0
    assert metrics["approx_kl"] == 0


@pytest.mark.parametrize(
    "ratio, advantage, gain, clipped",
    [
        (1.5, 2.0, 2.56, True),  # gain is capped at 1 + 0.28
        (1.25, 2.0, 2.5, False),
        (0.5, 2.0, 1.0, False),  # a loss of probability is never flattered
        (0.5, -2.0, -1.6, True),  # capped at 1 - 0.2
        (0.9, -2.0, -1.8, False),
        (1.5, -2.0, -3.0, False),
    ],
)
def test_clipping_by_hand(ratio, advantage, gain, clipped):
    clips = {"clip_low": 0.2, "clip_high": 0.28}
    loss, metrics = grpo([ratio], [advantage], **clips)
    np.testing.assert_allclose(loss, -gain, rtol=1e-5)
    assert metrics["clip_fraction"] == clipped
    np.testing.assert_allclose(metrics["ratio_max_error"], abs(ratio - 1), rtol=1e-5)
    k3 = ratio - 1 - np.log(ratio)
    np.testing.assert_allclose(metrics["approx_kl"], k3, rtol=1e-4)
    slope = jax.grad(lambda r: grpo([r], [advantage], **clips)[0])(ratio)
    np.testing.assert_allclose(slope, 0 if clipped else -advantage, rtol=1e-5)


def test_importance_by_hand():
    # The gains are 1.1 · 2 and, clipped, 1.2 · 1.
    gains = {"clip_low": 0.2, "clip_high": 0.2}
    loss, metrics = grpo([1.1, 1.5], [2.0, 1.0], **gains)
    np.testing.assert_allclose(loss, -(2.2 + 1.2) / 2, rtol=1e-5)
    old = jnp.log(jnp.array([[0.5], [0.8]]))
    sampled = jnp.log(jnp.array([[0.625], [0.2]]))
    weights = losses.importance_weights(old, sampled, True, cap=2.0)
    np.testing.assert_allclose(weights, [[0.8], [2.0]], rtol=1e-5)
    corrected, again = grpo([1.1, 1.5], [2.0, 1.0], importance=weights, **gains)
    np.testing.assert_allclose(corrected, -(0.8 * 2.2 + 2 * 1.2) / 2, rtol=1e-5)
    assert again == metrics


def test_weights_choose_what_counts():
    rng = np.random.default_rng(0)
    logps, old, ref = rng.normal(-1, 0.1, (3, 2, 4)).astype(np.float32)
    weights = np.array([[0, 0.5, 0, 0.2], [0, 0, 0.3, 0]], np.float32)
    masked = weights == 0

    @jax.jit
    def value_and_gradient(logps, old, ref):
        loss = lambda logps: losses.grpo_loss(
            logps, old, jnp.array([1.0, -2.0]), weights, ref_logps=ref, kl_coef=0.1
        )
        return jax.value_and_grad(loss, has_aux=True)(logps)

    (loss, metrics), gradient = value_and_gradient(logps, old, ref)
    assert (np.asarray(gradient)[masked] == 0).all()
    assert (np.asarray(gradient)[~masked] != 0).all()
    for garbage in (50.0, -1e9, np.nan):  # what is masked may hold anything
        other = [np.where(masked, garbage, x) for x in (old, ref)]
        (same, same_metrics), same_gradient = value_and_gradient(logps, *other)
        assert same == loss
        np.testing.assert_array_equal(same_gradient, gradient)
        jax.tree.map(np.testing.assert_array_equal, same_metrics, metrics)


@jax.jit
def value_and_gradient(logps, old, ref, sampled, advantages, weights):
    """Of the whole objective, its KL term and importance weights included."""

    def loss(logps):
        importance = losses.importance_weights(old, sampled, weights > 0, cap=2.0)
        kl = {"ref_logps": ref, "kl_coef": 0.1}
        return losses.grpo_loss(
            logps, old, advantages, weights, importance=importance, **kl
        )

    return jax.value_and_grad(loss, has_aux=True)(logps)


ANY = st.floats(width=32, allow_nan=False) | st.floats(-30, 0, width=32)
LOGPS = st.lists(ANY, min_size=6, max_size=6)


@settings(max_examples=300, deadline=None)
@given(LOGPS, LOGPS, LOGPS, LOGPS, st.sampled_from([1.0, 0.0, -2.5]))
def test_loss_and_gradient_are_finite_whatever_the_log_probs_are(
    logps, old, ref, sampled, advantage
):
    given_ = [np.float32(x).reshape(2, 3) for x in (logps, old, ref, sampled)]
    weights = np.float32([[0.5, 0.25, 0], [0.25, 0, 0]])
    advantages = np.float32([advantage, 1.0])
    (loss, metrics), gradient = value_and_gradient(*given_, advantages, weights)
    for x in jax.tree.leaves((loss, metrics, gradient)):
        assert np.isfinite(x).all()
    assert (np.asarray(gradient)[weights == 0] == 0).all()
    assert metrics["ref_kl"] >= -1e-6 and metrics["approx_kl"] >= -1e-6


@pytest.mark.parametrize("log_ratio", [19.0, 21.0, 89.0, 1e4, np.inf])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_gradients_of_ratios_that_overflow_by_hand(log_ratio, advantage):
    """None without an advantage, none where the ratio is clipped."""
    old, weights = jnp.array([[-log_ratio]]), jnp.ones((1, 1))
    loss = lambda new: losses.grpo_loss(new, old, jnp.array([advantage]), weights)[0]
    value, slope = jax.value_and_grad(loss)(jnp.zeros((1, 1)))
    bounded = np.exp(min(log_ratio, losses.MAX_LOG_RATIO))
    expected = -1.2 * advantage if advantage >= 0 else bounded
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    moves = advantage < 0 and log_ratio < losses.MAX_LOG_RATIO
    np.testing.assert_allclose(slope, bounded if moves else 0, rtol=1e-5)


def test_bounds_change_no_bit_of_ordinary_ratios():
    rng = np.random.default_rng(0)
    old = rng.normal(-3, 2, (64, 40)).astype(np.float32)
    logps, ref, sampled = (old + rng.normal(0, s, old.shape) for s in (0.3, 3, 0.1))
    args = [np.float32(x) for x in (logps, old, ref, sampled)]
    advantages = rng.normal(size=64).astype(np.float32)
    weights = np.float32(rng.random(old.shape) < 0.8) / old.size
    got = value_and_gradient(*args, advantages, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_log_ratio", lambda a, b: a - b)
        again = lambda *args: value_and_gradient.__wrapped__(*args)
        plain = jax.jit(again)(*args, advantages, weights)
    jax.tree.map(np.testing.assert_array_equal, got, plain)


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_masked_token_may_be_impossible(value):
    logps, weights = np.float32([[value, -1.0]]), np.float32([[0, 1]])
    loss, slope = jax.value_and_grad(losses.sft_loss)(logps, weights)
    assert loss == 1 and slope.tolist() == [[0, -1]]
    grpo = lambda x: losses.grpo_loss(
        *(x, logps, np.ones(1), weights), ref_logps=logps, kl_coef=0.1
    )[0]
    loss, slope = jax.value_and_grad(grpo)(logps)
    assert loss == -1 and slope.tolist() == [[0, -1]]


# --- KL -----------------------------------------------------------------------------


def test_k3_is_never_negative_and_zero_at_equality():
    logps = np.linspace(-8, -1e-3, 40, dtype=np.float32)
    kl = np.asarray(losses.kl_estimate(logps[:, None], logps))
    assert (kl >= -1e-6).all()
    assert (np.diag(kl) == 0).all()
    by_hand = losses.kl_estimate(-1.0, -1.0 + np.log(2))
    np.testing.assert_allclose(by_hand, 1 - np.log(2), 1e-5)


def test_k3_is_unbiased():
    """Its mean over the policy's tokens is the KL divergence, computed directly."""
    logits = np.random.default_rng(0).normal(size=(2, 9)) * 2
    policy, reference = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mean = (np.exp(policy) * losses.kl_estimate(policy, reference)).sum()
    expected = (np.exp(policy) * (policy - reference)).sum()
    np.testing.assert_allclose(mean, expected, 1e-4)


def test_kl_gradient_is_that_of_finite_differences():
    logps = np.array([[-1.0, -2.0, -0.5]])
    ref = np.array([[-1.4, -1.1, -0.5]], np.float32)
    weights = np.array([[0.25, 0.75, 1.0]], np.float32)

    def loss(logps):
        kl = {"ref_logps": ref, "kl_coef": 0.3}  # no advantage: the penalty alone
        return losses.grpo_loss(logps, logps, jnp.zeros(1), weights, **kl)[0]

    gradient = jax.grad(loss)(jnp.asarray(logps, jnp.float32))
    step = 1e-6
    k3 = lambda x: (weights * (np.exp(ref - x) - 1 - (ref - x)) * 0.3).sum()
    for i in range(3):
        shift = step * (np.arange(3) == i)
        expected = (k3(logps + shift) - k3(logps - shift)) / (2 * step)
        np.testing.assert_allclose(gradient[0, i], expected, rtol=1e-3, atol=1e-5)
    assert gradient[0, 2] == 0
    np.testing.assert_allclose(loss(logps), k3(logps), rtol=1e-5)
    none = losses.grpo_loss(logps, logps, jnp.ones(1), weights, ref_logps=ref)
    assert none[0] == -2 and "ref_kl" not in none[1]  # off by default
