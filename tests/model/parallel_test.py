"""Tests of pr1_jax.model.parallel: activations split by length are what they are whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from pr1_jax.model import parallel
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.forward import forward
from pr1_jax.model.params import init_params, param_shardings, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.system.mesh import batch_sharding, make_mesh, training

QWEN2 = ModelConfig(
    vocab_size=16,
    num_layers=2,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=24,
    qk_norm=False,
    qkv_bias=True,
    scan_layers=True,
    remat=True,
    remat_policy="attention",
)
TOKENS = np.random.default_rng(0).integers(0, 16, (8, 12)).astype(np.int32)


def random_params():
    rng = np.random.default_rng(0)
    draw = lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype)
    return jax.tree.map(draw, unbox(init_params(QWEN2, jax.random.key(0))))


def loss_and_gradient(params, tokens, **changes):
    """Of all hidden states, which are returned as well."""
    backend = Xla(dataclasses.replace(QWEN2, **changes))
    labels = jnp.zeros_like(tokens)
    attend = backend.training_attention(labels, labels)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(params):
        hidden, _ = forward(backend, params, tokens, positions, attend)
        return jnp.sin(3 * hidden).sum(), hidden

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def on_one_device():
    return jax.device_get(jax.jit(loss_and_gradient)(random_params(), TOKENS))


@pytest.mark.parametrize("remat", [False, True])
def test_split_by_length_equals_whole(remat):
    mesh = make_mesh(2, 2, 2)
    places = param_shardings(QWEN2, mesh)
    params = jax.device_put(random_params(), places)
    tokens = jax.device_put(TOKENS, batch_sharding(mesh))
    function = functools.partial(loss_and_gradient, remat=remat)
    with training(mesh):
        got = jax.jit(function, out_shardings=((None, None), places))(params, tokens)
    (_, hidden), _ = got
    assert hidden.sharding.shard_shape(hidden.shape) == (2, 6, 16)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, jax.device_get(got), on_one_device())
    for leaf in jax.tree.leaves(on_one_device()):
        assert np.abs(leaf).max() > 0.01


def test_without_remat_nothing_gathered_is_kept(capsys):
    config = dataclasses.replace(QWEN2, remat=False)
    layer = jax.tree.map(lambda x: x[0], random_params()["layers"])
    x = jnp.zeros((4, 12, 16))

    def products(layer, x):
        q, k = parallel.project_in(config, [layer["q"], layer["k"]], x)
        return parallel.project_out(config, layer["o"], q, 2).sum() + k.sum()

    with training(make_mesh(2, 2, 2)):
        print_saved_residuals(products, layer, x)
    for line in capsys.readouterr().out.splitlines():
        assert "from the argument" in line or "f32[4,12,4,4]" in line, line  # q


@pytest.mark.parametrize(
    "sizes, shape, changes",
    [
        ((8, 1, 1), (8, 12, 16), {}),  # nothing to split between
        ((2, 2, 2), (4, 11, 16), {}),
        ((2, 2, 2), (6, 12, 16), {}),
        ((2, 2, 2), (4, 16), {}),  # no sequences
        ((1, 2, 4), (4, 12, 16), {}),  # more parts than key heads
        ((1, 4, 2), (4, 12, 18), {"width": 18}),
        ((2, 2, 2), (4, 12, 16), {"mlp_width": 25}),
    ],
)
def test_what_does_not_divide_stays_whole(sizes, shape, changes):
    splits = parallel.splits_lengths
    config = dataclasses.replace(QWEN2, **changes)
    assert not splits(config, jnp.zeros(shape))
    with training(make_mesh(*sizes)):
        assert not splits(config, jnp.zeros(shape))
    with training(make_mesh(2, 2, 2)):
        assert splits(QWEN2, jnp.zeros((4, 12, 16)))
