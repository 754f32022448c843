"""Tests of pr1_jax.training: laws of the updates, the optimizer by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pr1_jax import layout, tags
from pr1_jax.kernels import attention
from pr1_jax.model.forward import forward
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.training import update as update_module
from pr1_jax.training.logps import PolicySettings
from pr1_jax.training.logps import policy_logps as logps_policy_logps
from pr1_jax.training.logps import trained_logps as logps_trained_logps
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import TrainState
from pr1_jax.training.update import GrpoSettings
from pr1_jax.trajectory import Trajectory, pack
from tests.helpers import tiny
from tests.helpers.tiny import ONE_LAYER as CONFIG
from tests.helpers.tiny import VOCAB

VOCAB_SIZE, LENGTH, ROWS = 24, 16, 4
SPECIAL_IDS = VOCAB.special_ids
TAG_IDS = dict(zip(tags.TAGS, SPECIAL_IDS))
XLA = Xla(CONFIG)
POLICY = PolicySettings(special_ids=SPECIAL_IDS, temperature=0.8)
# A large eps: Adam's first step would else be the sign of the rounding errors.
OPTIMIZER = make_optimizer(
    OptimizerSettings(lr=1e-2, steps=10, eps=1e-3, weight_decay=0.1)
)
random_params = functools.partial(tiny.random_params, CONFIG)
GRPO = GrpoSettings(aggregation="response_mean", kl_coef=0.1)


@functools.cache
def fresh_state():
    params = random_params()
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params))


def random_trajectory(rng, *, text_tokens=2):
    """One block of two paths with ragged lengths, as if sampled."""
    text = lambda: rng.integers(16, VOCAB_SIZE, rng.integers(0, text_tokens)).tolist()
    a, end_a, b, end_b, c, end_c = SPECIAL_IDS[:6]
    paths = [b, *text(), end_b, b, *text(), end_b]
    tokens = np.array([a, *paths, end_a, 2, c, *text(), end_c, 1], np.int32)
    prompt = rng.integers(16, VOCAB_SIZE, rng.integers(1, 3))
    parsed = layout.structured(tokens, TAG_IDS, len(prompt))
    labels = {k: v[len(prompt) :] for k, v in parsed._asdict().items()}
    forced = np.isin(tokens, [b, end_a, 2, c])
    # Some ban that the token itself, and the forced ones, do not break.
    bans = np.where(forced | (tokens == a), 0, 1 << 0).astype(np.int32)
    return Trajectory(
        prompt=prompt,
        tokens=tokens,
        **labels,
        forced=forced,
        bans=bans,
        logps=np.where(forced, 0, rng.normal(-3, 0.3, len(tokens))),
        finished=True,
        sequential_steps=0,
    )


def make_batch(*, micro_batches=2, forced_only=False, seed=0, **kwargs):
    """Leading axes [micro-batches, ROWS / micro-batches]; one row is empty."""
    rng = np.random.default_rng(seed)
    rows = [random_trajectory(rng) for _ in range(ROWS - 1)]
    if forced_only:
        rows = [dataclasses.replace(t, forced=np.ones_like(t.forced)) for t in rows]
    advantages = rng.normal(size=ROWS)
    batch = pack(
        [*rows, None], LENGTH, variant="structured", advantages=advantages, **kwargs
    )
    return jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)


@functools.cache
def compiled(kind, **kwargs):
    """A jitted update; `ref_logps` follows the batch for `grpo`."""
    update = getattr(update_module, f"{kind}_update")
    settings = {"backend": XLA, "optimizer": OPTIMIZER, "policy": POLICY} | kwargs
    return jax.jit(functools.partial(update, **settings))


def run(kind, state, batch, **kwargs):
    if kind == "sft":
        return compiled("sft", **kwargs)(state, batch)
    ref_logps = np.where(batch.loss_mask, batch.old_logps - 0.2, 0)
    update = compiled("grpo", **{"grpo": GRPO, **kwargs})
    return update(state, batch, ref_logps.astype(np.float32))


@jax.jit
def policy_logps(params, batch):
    """Log-probs of a batch with leading axes [micro-batches, B]."""
    one = lambda b: logps_policy_logps(XLA, params, b, POLICY)[0]
    return jax.lax.map(one, batch)


def largest_difference(a, b):
    gaps = jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)
    return max(jax.tree.leaves(gaps))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_metrics(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(
            value, found[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


# --- Updates ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_micro_batches_only_add_up(kind):
    one, one_metrics = run(kind, fresh_state(), make_batch(micro_batches=1))
    two, two_metrics = run(kind, fresh_state(), make_batch(micro_batches=2))
    assert largest_difference(one.params, fresh_state().params) > 1e-3
    assert largest_difference(one.params, two.params) < 1e-5
    assert int(one.step) == int(two.step) == 1
    assert one_metrics["grad_norm"] > 1e-2 and one_metrics["skipped"] == 0
    assert_same_metrics(two_metrics, one_metrics)


@pytest.mark.parametrize("kind", ["grpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_cutting_micro_batches_to_their_length_changes_nothing(kind):
    batch = make_batch(micro_batches=2)
    T = batch.tokens.shape[-1]
    short = np.array(batch.loss_mask)
    short[0, :, T // 2 :] = False  # the first micro-batch can be cut, the other not
    batch = batch.replace(loss_mask=short)
    cut = dataclasses.replace(POLICY, lengths=(T // 2, 2 * T))
    whole, whole_metrics = run(kind, fresh_state(), batch)
    found, metrics = run(kind, fresh_state(), batch, policy=cut)
    assert largest_difference(whole.params, fresh_state().params) > 1e-3
    assert largest_difference(whole.params, found.params) < 1e-5
    assert_same_metrics(metrics, whole_metrics)
    trained_logps = functools.partial(logps_trained_logps, XLA, policy=cut)
    logps = jax.jit(trained_logps)(random_params(), batch)
    np.testing.assert_allclose(
        np.where(short, logps, 0),
        np.where(short, policy_logps(random_params(), batch), 0),
        atol=1e-5,
    )
    assert (np.asarray(logps)[0, :, T // 2 :] == 0).all()  # it was cut there


PROMPT_TOKENS = 5


def grouped_batch(prompts=PROMPT_TOKENS, **kwargs):
    """Two micro-batches of two groups of two rows, all of a group with its prompt."""
    rng = np.random.default_rng(0)
    rows = [random_trajectory(rng) for _ in range(8)]
    for i, row in enumerate(rows):
        prompt = np.random.default_rng(i // 2).integers(16, VOCAB_SIZE, prompts)
        moved = row.positions - len(row.prompt) + prompts
        rows[i] = dataclasses.replace(row, prompt=prompt, positions=moved)
    batch = pack(
        rows, 20, variant="structured", advantages=rng.normal(size=8), **kwargs
    )
    return jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)


def grouped_policy(*shared_lengths, **kwargs):
    return dataclasses.replace(
        POLICY, group_rows=2, shared_lengths=shared_lengths, **kwargs
    )


def test_a_prompt_computed_once_for_its_group_changes_nothing():
    batch = grouped_batch(shared=[PROMPT_TOKENS] * 8)
    whole, whole_metrics = run("grpo", fresh_state(), batch)
    for policy in (
        grouped_policy(PROMPT_TOKENS),
        grouped_policy(3, PROMPT_TOKENS + 1),  # a part of it
        grouped_policy(2, PROMPT_TOKENS, lengths=(5, 19), max_trained=15),
    ):
        found, metrics = run("grpo", fresh_state(), batch, policy=policy)
        assert largest_difference(whole.params, fresh_state().params) > 1e-3
        assert largest_difference(whole.params, found.params) < 1e-5
        assert_same_metrics(metrics, whole_metrics)
        logps = logps_trained_logps(XLA, random_params(), batch, policy)
        np.testing.assert_allclose(
            np.where(batch.loss_mask, logps, 0),
            np.where(batch.loss_mask, policy_logps(random_params(), batch), 0),
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "allowed, shared_lengths, computed_once",
    [
        ([5, 5, 5, 5, 5, 5, 5, 5], (3, 5), 5),
        ([5, 4, 5, 5, 3, 3, 3, 3], (3, 5), 3),
        ([5, 5, 5, 2, 2, 5, 5, 5], (3, 5), 0),
        ([0, 0, 0, 0, 0, 0, 0, 0], (3, 5), 0),
        ([5, 5, 5, 5, 5, 5, 5, 5], (), 0),
    ],
)
def test_no_more_is_shared_than_all_rows_allow(allowed, shared_lengths, computed_once):
    """What is computed once is read from the first row of a group alone."""
    batch = grouped_batch(shared=allowed)
    policy = grouped_policy(*shared_lengths)
    logps = jax.jit(
        functools.partial(logps_trained_logps, XLA, policy=policy),
    )
    before = np.where(batch.loss_mask, logps(random_params(), batch), 0)
    for place in range(PROMPT_TOKENS):
        tokens = batch.tokens.copy()
        tokens[:, 1::2, place] = 3
        other = batch.replace(tokens=tokens)
        after = np.where(batch.loss_mask, logps(random_params(), other), 0)
        moved = (np.abs(after - before) > 1e-5).any(axis=-1)
        assert not moved[:, ::2].any()
        assert (moved[:, 1::2] == (place >= computed_once)).all()


def test_logits_of_prompts_are_not_needed():
    """Log-probs and the update are the same where only trained tokens have logits."""
    batch = make_batch(micro_batches=2)
    mask = np.asarray(batch.loss_mask)
    end = mask.shape[-1] - mask[..., ::-1].argmax(-1)
    size = int(np.where(mask.any(-1), end - mask.argmax(-1), 0).max())
    assert size < mask.shape[-1] - 1
    cut = dataclasses.replace(POLICY, max_trained=size)
    trained_logps = functools.partial(logps_trained_logps, XLA)
    logps, whole_logps = (
        np.where(mask, trained_logps(random_params(), batch, policy=policy), 0)
        for policy in (cut, POLICY)
    )
    np.testing.assert_allclose(logps, whole_logps, atol=1e-5)
    assert (whole_logps[mask] < 0).all()
    whole, whole_metrics = run("grpo", fresh_state(), batch)
    found, metrics = run("grpo", fresh_state(), batch, policy=cut)
    assert largest_difference(whole.params, fresh_state().params) > 1e-3
    assert largest_difference(whole.params, found.params) < 1e-5
    assert_same_metrics(metrics, whole_metrics)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_no_gradient_through_forced_tokens_but_by_the_switch(kind):
    _, metrics = run(kind, fresh_state(), make_batch(forced_only=True))
    assert metrics["grad_norm"] == metrics[f"loss/{kind}"] == 0
    batch = make_batch(forced_only=True, train_on_forced=True)
    _, metrics = run(kind, fresh_state(), batch)
    assert metrics["grad_norm"] > 1e-2 and metrics["skipped"] == 0


def test_what_is_recorded_at_masked_tokens_does_not_matter():
    batch = make_batch()
    noise = np.random.default_rng(1).normal(size=batch.old_logps.shape)
    changed = batch.replace(
        old_logps=np.where(batch.loss_mask, batch.old_logps, noise).astype(np.float32)
    )
    assert_same(*(run("grpo", fresh_state(), b)[0] for b in (batch, changed)))


def test_policy_logps_are_of_the_token_itself_under_its_bans():
    """A ban on a token's rivals at t raises its own log-prob, entry t and no other."""
    batch = make_batch()
    free = batch.replace(bans=np.zeros_like(batch.bans))
    banned = free.bans.copy()
    spot = 0, 1, 6
    banned[spot] = 0b1111111 & ~sum(
        1 << i for i, token in enumerate(SPECIAL_IDS) if token == batch.tokens[spot]
    )
    before = np.asarray(policy_logps(random_params(), free))
    after = np.asarray(policy_logps(random_params(), free.replace(bans=banned)))
    changed = after != before
    assert changed[spot] and changed.sum() == 1
    assert after[spot] > before[spot]
    assert (before[..., 0] == 0).all() and (before[..., 1:] < 0).all()


def test_policy_logps_are_of_the_logits_at_the_temperature():
    batch = jax.tree.map(lambda x: x[0], make_batch())
    batch = batch.replace(bans=np.zeros_like(batch.bans))

    @jax.jit
    def logits_of(params):
        def attend(q, k, v, cache):
            labels = batch.block, batch.path
            return attention.label_attention(q, k, v, *labels), cache

        inputs = batch.tokens, batch.positions, attend
        hidden, _ = forward(XLA, params, *inputs)
        return XLA.logits(params, hidden)

    every = jax.nn.log_softmax(logits_of(random_params())[:, :-1] / POLICY.temperature)
    tokens = batch.tokens[:, 1:, None]
    expected = np.take_along_axis(np.asarray(every), tokens, -1)[..., 0]
    got = policy_logps(random_params(), jax.tree.map(lambda x: x[None], batch))
    np.testing.assert_allclose(got[0, :, 1:], expected, atol=1e-5)


def test_first_update_after_sampling_has_ratio_one():
    batch = make_batch()
    old = np.where(batch.loss_mask, policy_logps(random_params(), batch), 0)
    _, metrics = run("grpo", fresh_state(), batch.replace(old_logps=old))
    assert metrics["ratio_max_error"] < 1e-5 and metrics["gap_max"] < 1e-5
    assert metrics["clip_fraction"] == 0
    state, _ = run("grpo", fresh_state(), batch.replace(old_logps=old))
    _, metrics = run("grpo", state, batch.replace(old_logps=old))
    assert metrics["ratio_max_error"] > 1e-3  # so the first figure said something


def test_update_raises_what_has_advantage():
    batch = make_batch().replace(advantages=np.float32([[1, 1], [-1, -1]]))
    old = np.where(batch.loss_mask, policy_logps(random_params(), batch), 0)
    state, _ = run("grpo", fresh_state(), batch.replace(old_logps=old))
    new = np.where(batch.loss_mask, policy_logps(state.params, batch), 0)
    gain = (new - old).sum(axis=(1, 2))
    assert gain[0] > 0 > gain[1]


def test_non_finite_gradient_skips_the_update_and_says_so():
    batch = make_batch()
    poison = batch.advantages.copy()
    poison[1, 0] = np.nan
    first, _ = run("grpo", fresh_state(), batch)
    skipped, metrics = run("grpo", first, batch.replace(advantages=poison))
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert_same(skipped.params, first.params)
    assert_same(skipped.opt_state.inner_state, first.opt_state.inner_state)
    again, metrics = run("grpo", skipped, batch)
    straight, _ = run("grpo", first, batch)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 0
    assert_same(again.params, straight.params)
    assert largest_difference(again.params, first.params) > 1e-4


def test_sft_loss_is_the_mean_over_tokens_and_falls():
    batch = make_batch()
    state, losses = fresh_state(), []
    for _ in range(4):
        state, metrics = run("sft", state, batch)
        losses.append(float(metrics["loss/sft"]))
    logps = np.asarray(policy_logps(random_params(), batch))
    np.testing.assert_allclose(losses[0], -logps[batch.loss_mask].mean(), rtol=1e-5)
    assert losses == sorted(losses, reverse=True)


# --- Optimizer ----------------------------------------------------------------------


def first_update(gradients, params=None, *, tag_rows=(), **settings):
    """What the optimizer adds to parameters in its first step, at lr = 1."""
    settings = OptimizerSettings(lr=1.0, steps=10, **settings)
    optimizer = make_optimizer(settings, tag_rows)
    params = jax.tree.map(jnp.zeros_like, gradients) if params is None else params
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_gradients_are_clipped_by_their_global_norm():
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # norm 5
    adam = lambda g: -g / (g + 1)  # the first step with eps = 1
    for clip_norm, scale in ((1.0, 0.2), (2.5, 0.5), (7.0, 1.0), (0.0, 1.0)):
        got = first_update(gradients, eps=1.0, clip_norm=clip_norm)
        np.testing.assert_allclose(got["a"], [adam(3 * scale)], rtol=1e-5)
        np.testing.assert_allclose(got["b"], [adam(4 * scale)], rtol=1e-5)


@pytest.mark.parametrize("names", [("embedding",), ("embedding", "head")])
def test_tag_rows_alone_learn_faster(names):
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(names, (6, 3)) | {"other": (6, 3)}
    draw = lambda: {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    gradients, params = draw(), draw()
    plain = first_update(gradients, params, tag_rows=(1, 4))
    faster = first_update(gradients, params, tag_rows=(1, 4), tag_lr_multiplier=5.0)
    factor = np.where(np.isin(np.arange(6), [1, 4]), 5.0, 1.0)[:, None]
    for name in names:
        np.testing.assert_allclose(faster[name], plain[name] * factor, rtol=1e-6)
    np.testing.assert_array_equal(faster["other"], plain["other"])


def test_weight_decay_is_of_matrices_and_decoupled():
    # Stacked norm scales have two axes too, so names decide.
    names = ("kernel", "embedding", "head", "scale")
    params = {name: jnp.full((2, 2), 3.0) for name in names}
    nothing = jax.tree.map(jnp.zeros_like, params)
    got = first_update(nothing, params, weight_decay=0.1)
    for name in names[:3]:
        np.testing.assert_allclose(got[name], -0.3, rtol=1e-6)
    assert (np.asarray(got["scale"]) == 0).all()


def test_moments_follow_adam():
    settings = OptimizerSettings(
        lr=0.1, steps=10, b1=0.5, b2=0.75, eps=1e-8, clip_norm=0.0
    )
    optimizer = make_optimizer(settings)
    params = {"a": jnp.array([1.0])}
    state = optimizer.init(params)
    for gradient in (2.0, -1.0):
        updates, state = optimizer.update({"a": jnp.array([gradient])}, state, params)
        params = optax.apply_updates(params, updates)
    # Step 1: -0.1 · sign. Step 2: m = (0.5·2·0.5 - 0.5) / 0.75 = 0, whatever v is.
    np.testing.assert_allclose(params["a"], [0.9], rtol=1e-5)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, {0: 2.0, 9: 2.0}),
        ({"warmup_share": 0.4}, {0: 0.5, 2: 1.25, 4: 2.0, 9: 2.0}),
        ({"schedule": "cosine"}, {0: 2.0, 5: 1.0, 10: 0.0, 12: 0.0}),
        (
            {"schedule": "cosine", "warmup_share": 0.2},
            {0: 1.0, 1: 1.5, 2: 2.0, 6: 1.0, 8: 1 - 0.5**0.5, 10: 0.0},
        ),
        ({"schedule": "cosine", "warmup_share": 1.0}, {0: 0.2, 5: 1.1}),
    ],
)
def test_learning_rate_by_hand(settings, expected):
    rate = OptimizerSettings(lr=2.0, steps=10, **settings).learning_rate()
    got = {step: float(rate(step)) for step in expected}
    assert got == pytest.approx(expected, abs=1e-6)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule='linear' is not one of"):
        OptimizerSettings(lr=1.0, steps=1, schedule="linear").learning_rate()


def test_weight_decay_spares_norms_and_biases():
    config = dataclasses.replace(tiny.QWEN3, qkv_bias=True, scan_layers=True)
    optimizer = make_optimizer(OptimizerSettings(lr=1.0, steps=10, weight_decay=0.1))
    init = lambda: unbox(init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), jax.eval_shape(init))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        spared = path[-1].key in ("scale", "bias")
        np.testing.assert_allclose(update, 0.0 if spared else -0.1, rtol=1e-6)


def optimize(gradients, **settings):
    """Parameters [2] after each gradient, from 0, and the state at the end."""
    optimizer = make_optimizer(OptimizerSettings(lr=0.5, **settings))
    params = {"a": jnp.zeros(2)}
    state, course = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update({"a": jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        course.append(np.asarray(params["a"]))
    return course, state


@pytest.mark.parametrize("wrong", [[np.nan, 1], [1, np.inf], [3e19, 1], [2e19, 2e19]])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_the_schedule_goes_on_where_an_update_is_skipped(wrong, clip_norm):
    """Update n has the rate of n, so that a cosine ends; the rest is as without it."""
    settings = {"clip_norm": clip_norm, "b1": 0.0, "b2": 0.0, "eps": 1e-20}
    settings |= {"steps": 8, "schedule": "cosine"}
    gradients = [[1.0, -2.0]] * 2 + [wrong] * 3 + [[1.0, -2.0]] * 3
    course, state = optimize(gradients, **settings)
    assert (int(state.total_notfinite), int(state.notfinite_count)) == (3, 0)
    # As in checkpoints of older versions: with those skipped, all updates.
    assert int(optax.tree.get(state.inner_state[-1], "count")) == 5
    rate = OptimizerSettings(lr=0.5, **settings).learning_rate()
    applied = [0.0 if n in (2, 3, 4) else float(rate(n)) for n in range(8)]
    expected = np.cumsum(applied)[:, None] * [-1.0, 1.0]  # Adam without memory: signs
    np.testing.assert_allclose(course, expected, rtol=1e-5)
    _, state = optimize(gradients[:4], **settings)
    assert (int(state.total_notfinite), int(state.notfinite_count)) == (2, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_parameters_than_float32_are_refused(dtype):
    params = {"a": jnp.ones(2), "b": {"kernel": jnp.ones(2, dtype)}}
    with pytest.raises(ValueError, match=rf"parameter \['b'\]\['kernel'\] is {dtype};"):
        OPTIMIZER.init(params)


def test_a_parameter_moves_at_a_small_learning_rate():
    settings = OptimizerSettings(lr=1e-6, steps=100)
    optimizer = make_optimizer(settings)
    params = {"kernel": jnp.full(4, 0.02)}
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {
        jnp.dtype("float32")
    }
    updates, _ = optimizer.update({"kernel": jnp.full(4, 1e-5)}, state, params)
    moved = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_allclose(0.02 - moved, 1e-6, rtol=0.01)
