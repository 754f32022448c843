"""Updates of adapters: their gradient by the chain rule, and what they leave as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.model import adapters
from pr1_jax.model.backend import choose
from pr1_jax.model.params import abstract_params, boxed_shardings
from pr1_jax.model.xla import Xla
from pr1_jax.system import mesh as meshes
from pr1_jax.training.logps import policy_logps
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import TrainState
from pr1_jax.training.update import grpo_update
from tests.helpers import tiny
from tests.helpers.tiny import VOCAB, needs_kernels, random_adapters, random_params
from tests.training import update_test

# Sizes that a mesh of 2 · 2 · 2 divides; layers are recomputed as those of large models.
CONFIG = dataclasses.replace(
    tiny.QWEN3, scan_layers=True, remat=True, tie_embeddings=False
)
SETTINGS = adapters.Settings(
    2, 4.0, adapters.projections((adapters.ALL,)), VOCAB.tag_ids
)
FROZEN = adapters.Frozen(random_params(CONFIG), SETTINGS)
TRAINED = random_adapters(CONFIG, SETTINGS)


def loss(backend, params, batch):
    """Some number that depends on all log-probs."""
    logps, _ = policy_logps(backend, params, batch, update_test.POLICY)
    return jnp.sum(jnp.where(batch.loss_mask, logps * batch.advantages[:, None], 0.0))


@pytest.mark.parametrize("kernels", ["xla", pytest.param("cpu", marks=needs_kernels)])
def test_gradients_follow_from_those_of_merged_weights(kernels):
    """By the chain rule, in NumPy: dA = s · dW Bᵀ, dB = s · Aᵀ dW, and rows of dW."""
    backend = choose(CONFIG, kernels, training=True)
    batch = jax.tree.map(lambda x: x[0], update_test.make_batch(micro_batches=1))

    @jax.jit
    def gradients(frozen, trained, batch):
        of_policy = lambda x: loss(backend, frozen.with_adapters(x), batch)
        of_weights = functools.partial(loss, backend, batch=batch)
        merged = adapters.merge_all(frozen.with_adapters(trained))
        return jax.grad(of_policy)(trained), jax.grad(of_weights)(merged)

    found, dense = gradients(FROZEN, TRAINED, batch)
    for name, pair in TRAINED["layers"].items():
        a, b = (np.asarray(pair[x], np.float64) for x in "ab")
        stacked, rank = len(a), SETTINGS.rank
        a, b = a.reshape(stacked, -1, rank), b.reshape(stacked, rank, -1)
        kernel = np.asarray(dense["layers"][name]["kernel"], np.float64)
        kernel = kernel.reshape(stacked, a.shape[1], b.shape[2])
        wanted = {
            "a": SETTINGS.scale * kernel @ b.swapaxes(1, 2),
            "b": SETTINGS.scale * a.swapaxes(1, 2) @ kernel,
        }
        for x, value in wanted.items():
            given = np.asarray(found["layers"][name][x]).reshape(value.shape)
            np.testing.assert_allclose(given, value, rtol=1e-3, atol=2e-5, err_msg=name)
    for name, rows in found["rows"].items():
        wanted = dense[name][np.array(SETTINGS.row_ids)]
        np.testing.assert_allclose(rows, wanted, rtol=1e-3, atol=2e-5)
        assert np.abs(rows).max() > 1e-3


def test_gradients_of_adapters_take_fewer_flops_than_those_of_weights():
    """No gradient of a whole kernel is made on the way: a third of a plain update."""
    config = dataclasses.replace(CONFIG, remat=False)
    batch = jax.tree.map(lambda x: x[0], update_test.make_batch(micro_batches=1))

    def flops(settings):
        frozen = adapters.Frozen(FROZEN.params, settings)
        trained = random_adapters(CONFIG, settings)
        of_policy = lambda x, params: loss(
            Xla(config),
            dataclasses.replace(frozen, params=params).with_adapters(x),
            batch,
        )
        lowered = jax.jit(jax.grad(of_policy)).lower(trained, FROZEN.params)
        return lowered.cost_analysis()["flops"]

    def dense(params):
        of_weights = lambda x: loss(Xla(config), x, batch)
        return jax.jit(jax.grad(of_weights)).lower(params).cost_analysis()["flops"]

    alone = adapters.Settings(1, 1.0, SETTINGS.projections)  # and no rows
    assert flops(alone) < 0.8 * dense(FROZEN.params)


def updated(backend, frozen, trained, batch):
    """An update of adapters; which they are, and its metrics."""
    optimizer = update_test.OPTIMIZER
    state = TrainState(jnp.int32(0), trained, optimizer.init(trained))
    ref_logps = jnp.where(batch.loss_mask, batch.old_logps - 0.2, 0.0)
    update = functools.partial(
        grpo_update,
        backend=backend,
        optimizer=optimizer,
        policy=update_test.POLICY,
        grpo=update_test.GRPO,
    )
    state, metrics = jax.jit(update)(state, batch, ref_logps, frozen)
    return state, metrics


def test_an_update_on_eight_devices_is_that_on_one():
    batch = update_test.make_batch(micro_batches=1)
    expected, of_one = updated(Xla(CONFIG), FROZEN, TRAINED, batch)
    mesh = meshes.make_mesh(2, 2, 2)
    boxed = abstract_params(CONFIG), adapters.abstract_adapters(CONFIG, SETTINGS)
    where = boxed_shardings(boxed, mesh)
    params, trained = jax.device_put((FROZEN.params, TRAINED), where)
    down = trained["layers"]["down"]
    assert {*down["a"].sharding.spec} == {None, "tensor"}
    assert {*down["b"].sharding.spec} == {None, "fsdp"}
    with meshes.training(mesh):
        found, of_all = updated(
            Xla(CONFIG),
            adapters.Frozen(params, SETTINGS),
            trained,
            meshes.put_batch(batch, mesh),
        )
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, found.params, expected.params)
    update_test.assert_same_metrics(of_all, of_one)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), found.params, TRAINED)
    assert min(jax.tree.leaves(moved)) > 1e-4  # all of them are trained


def test_the_state_holds_adapters_alone():
    batch = update_test.make_batch(micro_batches=1)
    state, _ = jax.eval_shape(
        functools.partial(updated, Xla(CONFIG)), FROZEN, TRAINED, batch
    )
    sizes = sum(x.size for x in jax.tree.leaves(TRAINED))
    count = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert count == 2 * sizes
    assert jax.tree.structure(state.params) == jax.tree.structure(TRAINED)


def test_the_tags_rate_is_that_of_rows_and_decay_that_of_matrices():
    """Differences of rows do not decay: they would come back to the frozen ones."""
    ones = jax.tree.map(jnp.ones_like, TRAINED)
    nothing = jax.tree.map(jnp.zeros_like, TRAINED)

    def step(gradient, params, **fields):
        settings = OptimizerSettings(lr=0.1, steps=1, clip_norm=0.0, **fields)
        optimizer = make_optimizer(settings, SETTINGS.row_ids)
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    faster = step(ones, ones, tag_lr_multiplier=3.0)
    np.testing.assert_allclose(faster["rows"]["embedding"], -0.3, rtol=1e-5)
    np.testing.assert_allclose(faster["layers"]["o"]["a"], -0.1, rtol=1e-5)
    decayed = step(nothing, ones, weight_decay=0.5)
    assert not np.any(decayed["rows"]["head"])
    for x in "ab":
        np.testing.assert_allclose(decayed["layers"]["q"][x], -0.05, rtol=1e-5)


@pytest.mark.parametrize("policy", ["nothing", "dots"])
def test_no_dense_product_is_kept_for_the_backward_pass(policy):
    """Layers would keep of their adapters as much as they have weights."""
    config = dataclasses.replace(CONFIG, remat_policy=policy)
    batch = jax.tree.map(lambda x: x[0], update_test.make_batch(micro_batches=1))

    def backward(params, trained):
        frozen = adapters.Frozen(params, SETTINGS)
        of_policy = lambda x: loss(Xla(config), frozen.with_adapters(x), batch)
        return jax.vjp(of_policy, trained)[1]

    residuals = jax.eval_shape(backward, FROZEN.params, TRAINED)
    kept = [x.shape for x in jax.tree.leaves(residuals)]
    frozen = [x.shape for x in jax.tree.leaves(FROZEN.params["layers"])]
    for pair in TRAINED["layers"].values():
        rank, layers = SETTINGS.rank, len(pair["a"])
        sizes = pair["a"].size // rank // layers, pair["b"].size // rank // layers
        product = layers, *sizes  # of which only frozen weights may be kept
        assert kept.count(product) == frozen.count(product)
