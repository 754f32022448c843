"""Every objective of pr1_jax.losses against NumPy in float64, value and gradient.

The reference goes through one response after the other, and differentiates by complex
steps. Batches hold the same responses one a row, or several.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pr1_jax import losses

LENGTHS = (7, 3, 6, 5, 4)  # of the last one nothing is trained
ADVANTAGES = np.array([1.3, -0.8, -1.7, 0.4, 2.0], np.float32)
ROWS = [[2, 0], [3], [4, 1], [], []]
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
KL_COEF = 0.3


def made_up(seed=0):
    """Log-probs of each response by name, and its mask: some ratios are clipped."""
    rng = np.random.default_rng(seed)
    responses = []
    for n in LENGTHS:
        old = rng.normal(-1.5, 0.5, n)
        near = {"logps": 0.3, "ref": 0.4, "sampled": 0.4}
        x = {name: old + rng.normal(0, s, n) for name, s in near.items()}
        x = {name: np.float32(v) for name, v in x.items()} | {"old": np.float32(old)}
        responses.append(x | {"mask": rng.random(n) < 0.75})
    responses[-1]["mask"][:] = False
    return responses


CASE = made_up()


def batch(responses, rows):
    """Arrays by name, [rows, 16], garbage outside of responses; and where each stands."""
    arrays = {name: np.full((len(rows), 16), -3.7, np.float32) for name in responses[0]}
    arrays["mask"] = np.zeros((len(rows), 16), bool)
    start = np.tile(np.arange(16, dtype=np.int32), (len(rows), 1))
    spread, places = np.zeros((len(rows), 16), np.float32), {}
    for row, numbers in enumerate(rows):
        end = 0
        for n in numbers:
            first, end = end, end + LENGTHS[n]
            places[n] = row, slice(first, end)
            start[places[n]], spread[places[n]] = first, ADVANTAGES[n]
            for name, x in responses[n].items():
                arrays[name][places[n]] = x
    return arrays | {"start": start, "advantages": spread}, places


def alone(responses=CASE):
    arrays, places = batch(responses, [[n] for n in range(len(LENGTHS))])
    return arrays | {"start": None, "advantages": ADVANTAGES}, places


PACKED = "several in a row"
BATCHES = {"a response a row": alone(), PACKED: batch(CASE, ROWS)}


@functools.cache
def compiled(objective, kl_estimator, dual_clip=0.0):
    """value_and_gradient(logps, batch, weights, importance)."""

    def loss(logps, batch, weights, importance):
        return losses.grpo_loss(
            logps,
            batch["old"],
            batch["advantages"],
            weights,
            batch["start"],
            objective=objective,
            dual_clip=dual_clip,
            ref_logps=batch["ref"],
            kl_coef=KL_COEF if kl_estimator else 0.0,
            kl_estimator=kl_estimator or "k3",
            importance=importance,
            **CLIPS,
        )[0]

    return jax.jit(jax.value_and_grad(loss))


def importance(batch, mode, **bounds):
    if not mode:
        return np.ones(batch["old"].shape, np.float32)
    names = ("old", "sampled", "mask", "start")
    weights = losses.importance_weights(*(batch[n] for n in names), mode=mode, **bounds)
    return np.asarray(weights)


BOUNDS = {"cap": 1.4, "floor": 0.6}


def reference(logps, aggregation, objective, kl_estimator, mode, dual_clip=0.0):
    """The loss of responses whose log-probs may be complex.

    What has no gradient is computed from their real parts.
    """
    clip = lambda x, low, high: x if low <= x.real <= high else min(max(x, low), high)
    pick = lambda of, *xs: of(xs, key=lambda x: x.real)
    trained = [n for n, r in enumerate(CASE) if r["mask"].any()]
    total = 0.0
    for n in trained:
        tokens = np.flatnonzero(CASE[n]["mask"])
        of = {name: np.float64(x) for name, x in CASE[n].items()}
        advantage = np.float64(ADVANTAGES[n])
        change = (logps[n] - of["old"])[tokens]
        mismatch = (of["old"] - of["sampled"])[tokens]
        if mode and mode.startswith("sequence"):
            mismatch = np.full(len(tokens), mismatch.sum())
        in_response = 0.0
        for i, t in enumerate(tokens):
            ratio = np.exp(change[i])
            if objective == "gspo":  # the gradient of a token is its own
                ratio = np.exp(change.real.mean() + change[i] - change[i].real)
            if objective == "cispo":
                gain = np.clip(ratio.real, 0.8, 1.28) * advantage * logps[n][t]
            else:
                gain = pick(min, ratio * advantage, clip(ratio, 0.8, 1.28) * advantage)
            if dual_clip and advantage < 0:
                gain = pick(max, gain, dual_clip * advantage)
            if mode:
                r = np.exp(mismatch[i])
                if mode.endswith("truncate"):
                    gain = gain * np.clip(r, BOUNDS["floor"], BOUNDS["cap"])
                else:
                    gain = gain * (r if BOUNDS["floor"] <= r <= BOUNDS["cap"] else 0)
            if kl_estimator:
                d = logps[n][t] - of["ref"][t]
                kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
                value = kl[kl_estimator[:2]]
                if kl_estimator.endswith("+"):
                    value = value.real + kl["k2"] - kl["k2"].real
                gain = gain - KL_COEF * value
            in_response = in_response + gain
        all_tokens = sum(CASE[n]["mask"].sum() for n in trained)
        total = (
            total
            - in_response
            / {
                "token_mean": all_tokens,
                "response_mean": len(tokens) * len(trained),
                "constant": len(CASE) * 9,
            }[aggregation]
        )
    return total


def derivative(function, logps):
    """The gradient of a function of responses' log-probs, of each response."""
    grads = [np.zeros(len(x)) for x in logps]
    for n, t in ((n, t) for n, x in enumerate(logps) for t in range(len(x))):
        moved = [x.astype(complex) for x in logps]
        moved[n][t] += 1e-30j
        grads[n][t] = np.imag(function(moved)) / 1e-30
    return grads


LOGPS = [np.float64(r["logps"]) for r in CASE]


def check(expected, gradients, found, name):
    _, places = BATCHES[name]
    value, slope = found
    np.testing.assert_allclose(value, expected, atol=1e-6, rtol=1e-6)
    slope = np.array(slope)
    for n, place in places.items():
        np.testing.assert_allclose(slope[place], gradients[n], atol=1e-6, rtol=1e-6)
        slope[place] = 0
    assert (slope == 0).all()


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
@pytest.mark.parametrize("kl_estimator", [None, *losses.KL_ESTIMATORS])
def test_all_combinations(objective, kl_estimator):
    """Objective, aggregation, KL and importance weights, and both ways to fill rows."""
    dual_clip = 1.1 if objective != "cispo" and kl_estimator is None else 0.0
    # A KL estimate is of single tokens: how rows are filled is nothing to it.
    batches = (
        dict(BATCHES) if kl_estimator in (None, "k3") else {PACKED: BATCHES[PACKED]}
    )
    modes = (None, *losses.IMPORTANCE)
    for aggregation, mode in itertools.product(losses.AGGREGATIONS, modes):
        settings = (aggregation, objective, kl_estimator, mode, dual_clip)
        expected = reference([x + 0j for x in LOGPS], *settings).real
        gradients = derivative(lambda x, s=settings: reference(x, *s), LOGPS)
        assert max(np.abs(g).max() for g in gradients) > 0.01
        for name, (arrays, _) in batches.items():
            weights = losses.token_weights(
                arrays["mask"], arrays["start"], aggregation=aggregation, constant=9
            )
            given = importance(arrays, mode, **BOUNDS)
            call = compiled(objective, kl_estimator, dual_clip)
            found = call(arrays["logps"], arrays, weights, given)
            check(expected, gradients, found, name)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_gspo_has_the_value_and_the_gradient_of_the_paper(aggregation):
    """Equation 5 of arXiv 2507.18071: here a response's ratio is all that has one."""

    def paper(logps):
        total, tokens = 0.0, [r["mask"].sum() for r in CASE]
        for n, r in enumerate(CASE[:-1]):
            ratio = np.exp((logps[n] - r["old"])[r["mask"]].mean())
            clipped = (
                ratio if 0.8 <= ratio.real <= 1.28 else np.clip(ratio.real, 0.8, 1.28)
            )
            both = (
                ratio * np.float64(ADVANTAGES[n]),
                clipped * np.float64(ADVANTAGES[n]),
            )
            weight = {
                "response_mean": 1 / 4,
                "token_mean": tokens[n] / sum(tokens),
                "constant": tokens[n] / 45,
            }[aggregation]
            total = total - weight * min(both, key=lambda x: x.real)
        return total

    expected = paper([x + 0j for x in LOGPS]).real
    gradients = derivative(paper, LOGPS)
    for name, (arrays, _) in BATCHES.items():
        weights = losses.token_weights(
            arrays["mask"], arrays["start"], aggregation=aggregation, constant=9
        )
        call = compiled("gspo", None)
        check(
            expected,
            gradients,
            call(arrays["logps"], arrays, weights, importance(arrays, None)),
            name,
        )


def test_a_response_and_a_masked_token_leave_others_alone():
    """Whatever numbers they have: another's sequence ratio and weight stay, to the bit."""
    for objective, mode in itertools.product(losses.OBJECTIVES, losses.IMPORTANCE):
        for arrays, places in BATCHES.values():
            weights = losses.token_weights(arrays["mask"], arrays["start"])
            call = compiled(objective, "k3")
            given = functools.partial(importance, mode=mode, **BOUNDS)
            _, before = call(arrays["logps"], arrays, weights, given(arrays))
            for garbage in (-np.inf, np.nan, 1e30):
                other = {
                    n: arrays[n].copy() for n in ("old", "ref", "sampled", "logps")
                }
                for x in other.values():
                    x[~arrays["mask"]] = garbage
                    x[places[0]] = -np.inf if np.isnan(garbage) else garbage
                moved = arrays | other
                _, after = call(moved["logps"], moved, weights, given(moved))
                for n in (1, 2, 3, 4):
                    np.testing.assert_array_equal(after[places[n]], before[places[n]])
                assert (np.asarray(after)[~arrays["mask"]] == 0).all()


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
@pytest.mark.parametrize("kl_estimator", losses.KL_ESTIMATORS)
def test_extreme_ratios_are_finite(objective, kl_estimator):
    arrays, _ = BATCHES[PACKED]
    weights = losses.token_weights(arrays["mask"], arrays["start"])
    call = compiled(objective, kl_estimator)
    extremes = (-np.inf, -1e30, -1e4, -100.0, 0.0, 100.0, np.inf)
    for new, old in itertools.permutations(extremes, 2):
        odd = arrays | {name: np.where(arrays["mask"], old, x) for name, x in
                        arrays.items() if name in ("old", "ref")}  # fmt: skip
        odd["sampled"] = np.where(arrays["mask"], new, arrays["sampled"])
        for mode in losses.IMPORTANCE:
            given = importance(odd, mode, cap=1e8)
            assert np.isfinite(given).all()
        logps = np.where(arrays["mask"], new, arrays["logps"]).astype(np.float32)
        for x in call(logps, odd, weights, given):
            assert np.isfinite(x).all(), (new, old)


@pytest.mark.parametrize("objective", ["gspo", "cispo"])
def test_sharded_is_unsharded(objective):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays, _ = batch(CASE, [*ROWS, [], [], []])
    weights = np.asarray(losses.token_weights(arrays["mask"], arrays["start"]))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    call = compiled(objective, "k3+")
    given = importance(arrays, "sequence_mask", **BOUNDS)
    inputs = arrays["logps"], arrays, weights, given
    expected = call(*inputs)
    found = call(*jax.tree.map(put, inputs))
    assert len(found[1].sharding.device_set) == 8
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected
    )


# --- Worked by hand -----------------------------------------------------------------


def test_sums_of_responses_by_hand():
    x = jnp.array([[1, 2, 3, 4, 5, 6]])
    start = jnp.array([[0, 0, 2, 2, 2, 5]])
    np.testing.assert_array_equal(losses.response_sums(x), [[21] * 6])
    np.testing.assert_array_equal(
        losses.response_sums(x, start), [[3, 3, 12, 12, 12, 6]]
    )
    huge = jnp.float32([[1e15, 1e15, 0.1, 0.2, 0.3, 0.0]])
    np.testing.assert_allclose(
        losses.response_sums(huge, start)[0, 2:], [0.6, 0.6, 0.6, 0], rtol=1e-6
    )


@pytest.mark.parametrize(
    "ratio, advantage, gain, slope",
    [
        (2.0, -1.0, -2.0, -1.0),
        (4.0, -1.0, -3.0, 0.0),  # no less than 3 · A
        (4.0, 1.0, 1.2, 0.0),  # the other clip
        (0.5, -1.0, -0.8, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio, advantage, gain, slope):
    clips = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
    call = lambda r: losses.clipped_gain(r, jnp.float32(advantage), **clips)
    (found, is_clipped), found_slope = jax.value_and_grad(call, has_aux=True)(ratio)
    np.testing.assert_allclose([found, found_slope], [gain, slope], rtol=1e-6)
    assert is_clipped == (slope == 0)


def test_cispo_by_hand():
    """A clipped token keeps a gradient, of the size that the clip leaves it."""
    ratio, clips = jnp.array([0.5, 1.1, 4.0]), {"clip_low": 1.0, "clip_high": 2.0}
    call = lambda x: losses.cispo_gain(x, ratio, 2.0, **clips)[0].sum()
    logps = jnp.array([-1.0, -2.0, -0.5])
    value, slope = jax.value_and_grad(call)(logps)
    np.testing.assert_allclose(slope, [1.0, 2.2, 6.0], rtol=1e-6)
    np.testing.assert_allclose(value, -1.0 - 4.4 - 3.0, rtol=1e-6)
    _, clipped = losses.cispo_gain(logps, ratio, 2.0, **clips)
    assert clipped.tolist() == [False, False, True]


def test_gspo_by_hand():
    """Ratios 2 and 1/8 of a response are one ratio of 1/2; the forced token is none."""
    log_ratio = jnp.log(jnp.array([[2.0, 100.0, 1 / 8]]))
    keep = jnp.array([[True, False, True]])
    ratio = jnp.exp(losses.sequence_log_ratio(log_ratio, keep))
    np.testing.assert_allclose(ratio, [[0.5, 1.0, 0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    "mode, expected",
    [
        # Ratios 4, (1/2), 1/8 | 2, 3 have products 1/2 and 6. The second is not drawn.
        ("token_truncate", [3, 1, 0.4, 2, 3]),
        ("token_mask", [0, 1, 0, 2, 3]),
        ("sequence_truncate", [0.5, 0.5, 0.5, 3, 3]),
        ("sequence_mask", [0.5, 0.5, 0.5, 0, 0]),
    ],
)
def test_importance_by_hand(mode, expected):
    old = jnp.log(jnp.array([[4, 1 / 2, 1 / 8, 2, 3]]))
    weights = losses.importance_weights(
        old,
        jnp.zeros((1, 5)),
        jnp.array([[True, False, True, True, True]]),
        jnp.array([[0, 0, 0, 3, 3]]),
        mode=mode,
        cap=3.0001,
        floor=0.4,
    )
    np.testing.assert_allclose(weights, [expected], rtol=1e-3)


def test_gradients_of_kl_estimates_are_those_of_what_they_stand_for():
    """Over all tokens of a policy: 0, KL(policy ‖ ref), KL(ref ‖ policy) (2506.09477)."""
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(size=(2, 9))
    softmax = lambda x: jnp.exp(x - jax.nn.logsumexp(x))
    ref = jax.nn.log_softmax(ref)
    policy = softmax(logits)
    kl = lambda p, q: jnp.sum(p * (jnp.log(p) - jnp.log(q)))
    forward, backward = jax.jit(
        lambda x: (
            jax.grad(lambda x: kl(softmax(x), jnp.exp(ref)))(x),
            jax.grad(lambda x: kl(jnp.exp(ref), softmax(x)))(x),
        )
    )(logits)
    stands_for = {"k1": 0 * forward, "k3": backward}
    for estimator in losses.KL_ESTIMATORS:
        mean = lambda x, e=estimator: jnp.sum(
            policy * losses.kl_estimate(jax.nn.log_softmax(x), ref, e)
        )
        value, slope = jax.jit(jax.value_and_grad(mean))(logits)
        expected = stands_for.get(estimator, forward)
        np.testing.assert_allclose(slope, expected, atol=1e-6)
        if estimator != "k2":  # whose value is near the divergence, no more
            np.testing.assert_allclose(value, kl(policy, jnp.exp(ref)), rtol=1e-5)
    assert np.abs(forward - backward).max() > 0.01


@pytest.mark.parametrize("field", ["objective", "kl_estimator"])
def test_unknown_names_are_named(field):
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match=f"{field}='best' is not one of"):
        losses.grpo_loss(
            one, one, one[0], one, ref_logps=one, kl_coef=1.0, **{field: "best"}
        )
    with pytest.raises(ValueError, match="importance='best' is not one of"):
        losses.importance_weights(one, one, True, mode="best", cap=1.0)
    with pytest.raises(ValueError, match="baseline='best' is not one of"):
        losses.advantages(one, baseline="best")


# --- Advantages ---------------------------------------------------------------------

REWARDS = np.array([[1.0, -1.0, -1.0, 1.0], [3.0, 0.0, 0.0, 0.0], [2.0] * 4])


def test_leave_one_out_by_hand():
    found = losses.advantages(REWARDS, baseline="leave_one_out", normalize_std=False)
    expected = [[4 / 3, -4 / 3, -4 / 3, 4 / 3], [3, -1, -1, -1], [0] * 4]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_baselines_of_the_batch_by_hand():
    ask = functools.partial(losses.advantages, REWARDS)
    np.testing.assert_allclose(
        ask(baseline="batch", normalize_std=False), REWARDS - 11 / 12, rtol=1e-6
    )
    np.testing.assert_allclose(
        ask(baseline="batch"), (REWARDS - 11 / 12) / (REWARDS.std() + 1e-6), rtol=1e-5
    )
    centred = REWARDS - REWARDS.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        ask(baseline="group_then_batch"), centred / (centred.std() + 1e-6), rtol=1e-5
    )


@pytest.mark.parametrize("baseline", losses.BASELINES)
@pytest.mark.parametrize("normalize_std", [True, False])
def test_laws_of_baselines(baseline, normalize_std):
    ask = functools.partial(
        losses.advantages, baseline=baseline, normalize_std=normalize_std
    )
    for value in (0.1, -1.0, 1e6 + 0.1):  # rounding is not blown up
        assert (np.asarray(ask(np.full((5, 4), value))) == 0).all()
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 4)).astype(np.float32)
    before = np.asarray(ask(rewards))
    assert abs(before.sum()) < 1e-4
    np.testing.assert_allclose(ask(rewards + 8), before, atol=1e-4)
    # A group with a reward that is no number is as if it were not there.
    for value in (np.nan, np.inf):
        odd = np.concatenate([rewards, [[1, 2, value, 3]]])
        found = np.asarray(ask(odd))
        assert (found[-1] == 0).all()
        np.testing.assert_allclose(found[:-1], before, rtol=1e-5)
    # What is not of the spread does not blow up where nothing else differs.
    bonus = rng.uniform(0, 0.01, size=(5, 4))
    found = ask(1 + bonus, spread_of=np.ones((5, 4)))
    np.testing.assert_allclose(
        found, ask(1 + bonus) if not normalize_std else
        losses.advantages(bonus, baseline=baseline, normalize_std=False), atol=1e-6,
    )  # fmt: skip


def test_parts_are_normalised_each():
    """A part that spreads a hundred times as much does not drown another (2601.05242)."""
    right = np.array([[1.0, 0, 1, 0], [1, 1, 1, 1]])
    short = np.array([[0.0, 0, 100, 100], [0, 100, 0, 0]])
    weights = {"right": 2.0, "short": 1.0}
    parts = {"right": right, "short": short}
    found = np.asarray(losses.advantages_of_parts(parts, weights))
    scaled = [[1, -1, 3, -1], [-(3**-0.5), 3**0.5, -(3**-0.5), -(3**-0.5)]]
    scaled = np.array([[2 - 1, -2 - 1, 2 + 1, -2 + 1], scaled[1]])
    np.testing.assert_allclose(found, scaled / scaled.std(), rtol=1e-4)
    again = losses.advantages_of_parts(parts | {"short": 7 + 30 * short}, weights)
    np.testing.assert_allclose(again, found, rtol=1e-4)
    parts["right"] = np.where(right > 5, 0, right)
    parts["right"][1, 2] = np.nan
    found = np.asarray(losses.advantages_of_parts(parts, weights))
    np.testing.assert_allclose(found[0], scaled[0] / scaled[0].std(), rtol=1e-4)
    assert (found[1] == 0).all()
