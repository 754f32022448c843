"""Tests of pr1_jax.kernels.heads: the kernels, interpreted, against `model.layers`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.kernels import heads, pallas
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.forward import forward
from pr1_jax.model.layers import rms_norm, rotary_angles, rotate
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.system.mesh import RULES, make_mesh

EPS = 1e-5
ALONE = {"mesh": None, "batch": None, "heads": None, "interpret": True}


def random_inputs(B, T, N, K, H, seed=0):
    """q, k, v, scales [2, H], and cotangents of q, k and v as attention reads them."""
    rng = np.random.default_rng(seed)
    made = (B, K, N // K, H, T), (B, K, T, H), (B, K, T, H)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (2, H), *made
    q, k, v, scales, *back = [rng.normal(size=x).astype(np.float32) for x in shapes]
    return (3 * q, k / 3, v, scales), tuple(back)


def angles_of(B, T, H, seed=0):
    positions = np.random.default_rng(seed).integers(0, 4 * T, (B, T))
    return rotary_angles(jnp.array(positions), H, 1e4)


def reference(q, k, v, scales, angles):
    """What XLA makes of them, laid out alike."""
    (B, T, N, H), K = q.shape, k.shape[2]
    if scales is not None:
        q, k = (
            rms_norm({"scale": scale}, x, EPS)
            for x, scale in zip((q, k), scales, strict=True)
        )
    q, k = rotate(q, angles), rotate(k, angles)
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 4, 1)
    return q, k.swapaxes(1, 2), v.swapaxes(1, 2)


def kernels(q, k, v, scales, angles, tile=0, how=ALONE):
    raw = heads.Raw(angles, scales, EPS)
    return heads.arranged(q, k, v, raw, tile=tile, **how)


def value_and_gradient(function, inputs, back):
    out, pull = jax.vjp(function, *inputs)
    return out, pull(back)


def assert_close(got, expected, **tolerance):
    def one(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, **tolerance)

    jax.tree.map(one, got, expected)


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(
    "N, K, H, T, tile",
    [
        (4, 2, 128, 96, 32),
        (6, 2, 64, 48, 16),  # two heads fill a register's lanes
        (3, 1, 64, 48, 0),  # an odd one does not
        (2, 2, 192, 16, 8),
    ],
)
def test_equals_layers_in_value_and_gradient(N, K, H, T, tile, has_norms):
    inputs, back = random_inputs(2, T, N, K, H)
    angles = angles_of(2, T, H)
    if not has_norms:
        inputs = *inputs[:3], None
    got, expected = (
        jax.jit(functools.partial(value_and_gradient, function))(inputs, back)
        for function in (
            lambda *x: kernels(*x, angles, tile),
            lambda *x: reference(*x, angles),
        )
    )
    assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_bfloat16_is_rounded_once():
    inputs, back = random_inputs(1, 32, 2, 1, 64)
    angles = angles_of(1, 32, 64)
    short = lambda x: jax.tree.map(lambda x: x.astype(jnp.bfloat16), x)
    inputs, back = (*short(inputs[:3]), inputs[3]), short(back)
    got = value_and_gradient(lambda *x: kernels(*x, angles), inputs, back)
    exact = value_and_gradient(
        lambda *x: reference(*x, angles),
        *jax.tree.map(lambda x: x.astype(np.float32), (inputs, back)),
    )
    (out, (*grads, d_scales)), (exact_out, (*exact_grads, exact_scales)) = got, exact
    assert_close((out, grads), short((exact_out, exact_grads)), rtol=2**-7, atol=1e-5)
    assert_close(d_scales, exact_scales, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 1, 4), (8, 1, 1)])
def test_sharded_equals_unsharded(sizes):
    """In attention, which says how they are split."""
    B, T, N, K, H = 4, 24, 4, 2, 64
    inputs, _ = random_inputs(B, T, N, K, H)
    angles, labels = angles_of(B, T, H), jnp.zeros((B, T), jnp.int32)
    back = np.random.default_rng(1).normal(size=(B, T, N, H)).astype(np.float32)

    def attend(q, k, v, scales):
        raw = heads.Raw(angles, scales, EPS)
        tiles = {"tile_q": 16, "tile_k": 16}  # which T is padded to
        return pallas.flash_attention(
            q, k, v, labels, labels, None, raw, interpret=True, **tiles
        )

    def plain(q, k, v, scales):
        q, k = (
            rotate(rms_norm({"scale": scale}, x, EPS), angles)
            for x, scale in zip((q, k), scales, strict=True)
        )
        return pallas.flash_attention(q, k, v, labels, labels, interpret=True)

    run = lambda attend: jax.jit(functools.partial(value_and_gradient, attend))
    expected = run(plain)(inputs, back)
    mesh = make_mesh(*sizes)
    rows = RULES["batch"] if sizes != (8, 1, 1) else None  # 8 do not divide 4
    whole, split = (jax.NamedSharding(mesh, x) for x in (jax.P(), jax.P(rows)))
    places = (split,) * 3 + (whole,)
    with jax.set_mesh(mesh):
        got = run(attend)(
            jax.tree.map(jax.device_put, inputs, places), jax.device_put(back, split)
        )
    assert_close(jax.device_get(got), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "qkv_bias": True}])
def test_model_is_what_it_is_without_kernels(changes, monkeypatch):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "width": 16}
    sizes |= {"vocab_size": 16, "num_layers": 1, "mlp_width": 24}
    how = {"scan_layers": True, "remat": True, "remat_policy": "attention"}
    config = ModelConfig(**sizes, **how, **changes)
    rng = np.random.default_rng(0)
    draw = lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype)
    params = jax.tree.map(draw, unbox(init_params(config, jax.random.key(0))))
    tokens = rng.integers(0, 16, (2, 12)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    path = np.repeat([0, 1, 2, 0], 3)[None].repeat(2, axis=0).astype(np.int32)
    interpreted = functools.partial(pallas.flash_attention, interpret=True)
    monkeypatch.setattr(pallas, "flash_attention", interpreted)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(implementation, params):
        backend = Xla(dataclasses.replace(config, attention=implementation))
        attend = backend.training_attention((path > 0).astype(np.int32), path)
        assert attend.takes_raw == (implementation == "pallas")

        def loss(params):
            hidden, _ = forward(backend, params, tokens, positions, attend)
            return jnp.sin(3 * hidden).sum(), hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    got, expected = (loss_and_gradient(x, params) for x in ("pallas", "xla"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        *(got, expected),
    )


@pytest.mark.parametrize("N, K, H, T", [(32, 8, 128, 3072), (14, 2, 64, 1000)])
def test_compiles_for_tpu(tpu_compiler, N, K, H, T):
    from jax.experimental import topologies

    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        shape, dtype, sharding=place
    )
    labels = struct(2, T, dtype=jnp.int32)

    def run(q, k, v, scales, positions, block, path):
        def attend(q, k, v, scales):
            raw = heads.Raw(rotary_angles(positions, H, 1e6), scales, EPS)
            return pallas.flash_attention(q, k, v, block, path, None, raw)

        return value_and_gradient(attend, (q, k, v, scales), q)

    kv, scales = struct(2, T, K, H), struct(2, H, dtype=jnp.float32)
    made = jax.jit(run).lower(struct(2, T, N, H), kv, kv, scales, *[labels] * 3)
    text = made.compile().as_text()
    assert text.count("heads_forward_kernel") and text.count("heads_backward_kernel")
