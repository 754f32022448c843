"""Which backend is chosen, and that all compute the same model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.model.backend import choose
from pr1_jax.model.cpu import Cpu
from pr1_jax.model.forward import forward
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.tpu import Tpu
from pr1_jax.model.xla import Xla
from pr1_jax.system.mesh import AXES
from tests.helpers.tiny import ONE_LAYER as CONFIG
from tests.helpers.tiny import YARN, needs_kernels


def mesh_of(data, tensor):
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, 1, tensor), ("data", "fsdp", "tensor"), devices=devices)


@needs_kernels
@pytest.mark.parametrize(
    "dtype, sizes, training, reason",
    [
        ("float32", None, False, ""),
        ("float32", (1, 1), True, ""),
        ("float32", (2, 1), False, ""),
        (
            "float32",
            (2, 1),
            True,
            "updates run on one device, and the mesh has 2 devices",
        ),
        ("float32", (1, 2), False, "mesh.tensor=2 splits heads"),
        ("bfloat16", None, False, "model.dtype=bfloat16 is not float32"),
    ],
)
def test_kernels_are_chosen_where_they_run(dtype, sizes, training, reason):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    mesh = mesh_of(*sizes) if sizes else None
    chosen = functools.partial(choose, config, mesh=mesh, training=training)
    assert chosen("xla") == Xla(config)
    assert chosen() == (Xla(config) if reason else Cpu(config))
    if reason:
        with pytest.raises(ValueError, match=f"^kernels=cpu: {reason}$"):
            chosen("cpu")
    else:
        assert chosen("cpu") == Cpu(config)


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """What is asked of a device of a mesh."""

    id: int
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0


@pytest.mark.parametrize(
    "changes, tensor, reason",
    [
        ({}, 2, ""),
        ({"head_dim": 128, "dtype": "bfloat16"}, 1, ""),
        ({"head_dim": 80}, 1, "model.head_dim=80 is not a multiple of 64"),
        ({}, 4, "mesh.tensor=4 does not divide model.num_kv_heads=2"),
    ],
)
@pytest.mark.parametrize("kind, cores", [("TPU v5 lite", 1), ("TPU v5p", 2)])
def test_kernels_for_tpu_are_chosen_where_they_run(
    changes, tensor, reason, kind, cores
):
    config = dataclasses.replace(CONFIG, **{"head_dim": 64, **changes})
    devices = np.array([FakeTpu(i, kind) for i in range(tensor)])
    mesh = jax.sharding.Mesh(devices.reshape(1, 1, -1), AXES)
    assert choose(config, "xla", mesh) == Xla(config)
    assert choose(config, mesh=mesh, training=True) == Xla(config)
    if reason:
        assert choose(config, mesh=mesh) == Xla(config)
        with pytest.raises(ValueError, match=f"^kernels=tpu: {reason}$"):
            choose(config, "tpu", mesh)
    else:
        assert choose(config, mesh=mesh) == choose(config, "tpu", mesh)
        assert choose(config, mesh=mesh) == Tpu(config, mesh, cores)


def test_kernels_for_tpu_are_refused_elsewhere():
    with pytest.raises(ValueError, match="^kernels=tpu: the device is a cpu$"):
        choose(CONFIG, "tpu")


@pytest.mark.parametrize(
    "platform, dtype, before, after",
    [
        ("gpu", "float32", None, "highest"),
        ("tpu", "float32", None, "highest"),
        ("gpu", "float32", "tensorfloat32", "tensorfloat32"),  # as the user has said
        ("gpu", "bfloat16", None, None),
        ("cpu", "float32", None, None),
    ],
)
def test_products_of_float32_are_exact(platform, dtype, before, after, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    name = "jax_default_matmul_precision"
    jax.config.update(name, before)
    try:
        choose(dataclasses.replace(CONFIG, dtype=dtype), "xla")
        assert getattr(jax.config, name) == after
    finally:
        jax.config.update(name, None)


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {},  # Qwen3
        {"qk_norm": False, "qkv_bias": True, "rope_scaling": YARN},  # Qwen2
        {"qk_norm": False, "num_kv_heads": 2, "tie_embeddings": False},  # Llama
        {"param_dtype": "bfloat16", "num_layers": 2, "mlp_width": 41},
        {"scan_layers": True, "num_layers": 2},
    ],
    ids=str,
)
def test_a_prepared_decoder_computes_what_the_plain_one_does(changes):
    """Also where scales are not 1 and biases not 0, as they are at the start."""
    config = dataclasses.replace(CONFIG, **changes)
    rng = np.random.default_rng(0)
    params = unbox(init_params(config, jax.random.key(0)))
    params = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params
    )
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (3, 5)))
    positions = jnp.asarray(rng.integers(0, 50, (3, 5)))

    def attend(q, k, v, cache):
        groups = config.num_heads // config.num_kv_heads
        k, v = (jnp.repeat(x, groups, axis=-2) for x in (k, v))
        return jnp.sin(q * k) + v, cache + q.sum()

    def outputs(backend, params, cache):
        hidden, cache = forward(backend, params, tokens, positions, attend, cache)
        return hidden, backend.logits(params, hidden), jnp.stack([*cache])

    zeros = jnp.zeros(config.num_layers)
    expected = outputs(
        Xla(config), params, zeros if config.scan_layers else tuple(zeros)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    for backend in (Xla(config), Cpu(config), Tpu(config)):
        got = outputs(backend, backend.prepare(params), tuple(zeros))
        jax.tree.map(close, got, expected)
