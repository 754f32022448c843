"""Tests of pr1_jax.system.mesh: eight devices compute what one does."""

import collections
import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from pr1_jax import layout, tags
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, param_shardings, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.plan import hlo
from pr1_jax.system.mesh import (
    AXES,
    batch_sharding,
    batch_shards,
    by_process,
    make_mesh,
    put_batch,
    replicated,
)
from pr1_jax.system.mesh import training as mesh_training
from pr1_jax.training.logps import PolicySettings, policy_logps
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import TrainState, abstract_state, from_params, shardings_of
from pr1_jax.training.update import GrpoSettings, grpo_update, sft_update
from pr1_jax.trajectory import Batch

CONFIG = ModelConfig(
    vocab_size=24,
    num_layers=1,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
)
SPECIAL_IDS = (10, 11, 12, 13, 14, 15, 1)
TAG_IDS = dict(zip(tags.TAGS, SPECIAL_IDS))
RESPONSE = "<Parallel> <Path> x y </Path> <Path> z </Path> </Parallel> ~ <Summary> s </Summary>"
POLICY = PolicySettings(special_ids=SPECIAL_IDS)
# A large eps: Adam's first step would else be the sign of the rounding errors.
OPTIMIZER = make_optimizer(
    OptimizerSettings(lr=1e-2, steps=10, eps=1e-3, weight_decay=0.1)
)
UPDATES = {
    "sft": sft_update,
    "grpo": functools.partial(grpo_update, grpo=GrpoSettings(kl_coef=0.1)),
}
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]
MORE_MESHES = [(4, 2, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)]


@functools.cache
def random_params():
    init = lambda: unbox(init_params(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda x: (0.2 * rng.normal(size=x.shape) + (x.ndim == 1)).astype(x.dtype)
    return jax.tree.map(draw, jax.eval_shape(init))


def random_batch(micro_batches=2, rows=8, T=16):
    """Random tokens under one structured layout; arrays [micro-batches, rows, T]."""
    rng = np.random.default_rng(0)
    shape = (micro_batches, rows, T)
    words = [TAG_IDS.get(word, 3) for word in RESPONSE.split()]
    labels = layout.structured(words, TAG_IDS, T - len(words))
    labels = {k: np.broadcast_to(v, shape) for k, v in labels._asdict().items()}
    return Batch(
        tokens=rng.integers(0, 24, shape).astype(np.int32),
        bans=np.zeros(shape, np.int32),
        loss_mask=rng.random(shape) < 0.5,
        old_logps=rng.normal(-3, 0.2, shape).astype(np.float32),
        advantages=rng.normal(size=shape[:2]).astype(np.float32),
        shared=np.zeros(shape[:2], np.int32),
        **labels,
    )


def sharded_state(mesh):
    places = param_shardings(CONFIG, mesh)
    params = jax.device_put(random_params(), places)
    return from_params(params, OPTIMIZER, mesh)


def run(kind, state, batch, mesh=None, policy=POLICY):
    """A jitted update, its result placed as `state` is."""
    update = functools.partial(
        UPDATES[kind], backend=Xla(CONFIG), optimizer=OPTIMIZER, policy=policy
    )
    places = shardings_of(state), None
    args = (batch.old_logps,) if kind == "grpo" else ()
    training = mesh_training(mesh) if mesh else contextlib.nullcontext()
    with training:
        return jax.jit(update, out_shardings=places)(state, batch, *args)


@functools.cache
def on_one_device(kind):
    params = jax.tree.map(jnp.asarray, random_params())
    state = TrainState(jnp.int32(0), params, OPTIMIZER.init(params))
    return jax.device_get(run(kind, state, random_batch()))


# --- The mesh -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": -1}, (1, 1, 8)),
    ],
)
def test_mesh_takes_all_devices(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert mesh.size == jax.device_count() == 8
    assert batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ((3, 1, 1), "needs 3 devices, and there are 8: set --config.mesh.data=8"),
        ((-1, 3, 1), "a multiple of 3 devices, and .* 8: set --config.mesh.fsdp=1"),
        (
            (-1, 16, 2),
            "multiple of 32 .*--config.mesh.fsdp=8 --config.mesh.tensor=1",
        ),
        ((2, 2, 1), "needs 4 devices, and there are 8: set --config.mesh.data=4"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 1, 1), "must be positive"),
        ((-1, 1, -2), "must be positive"),
    ],
)
def test_bad_meshes_name_fields_and_values(sizes, reason):
    named = "mesh.data={}, mesh.fsdp={}, mesh.tensor={}".format(*sizes)
    with pytest.raises(ValueError, match=f"{re.escape(named)}.*{reason}"):
        make_mesh(*sizes)


# --- Placement ----------------------------------------------------------------------


def specs(config, *sizes):
    places = param_shardings(config, make_mesh(*sizes))
    return jax.tree.map(lambda place: place.spec, places)


def test_parameters_are_split_by_their_logical_axes():
    config = dataclasses.replace(CONFIG, tie_embeddings=False, qkv_bias=True)
    found = specs(config, 2, 2, 2)
    assert found["embedding"] == found["head"] == P("tensor", "fsdp")
    layer = found["layer_0"]
    assert layer["q"]["kernel"] == layer["k"]["kernel"] == P("fsdp", "tensor", None)
    assert layer["q"]["bias"] == P("tensor", None)
    assert layer["o"]["kernel"] == P("tensor", None, "fsdp")
    assert layer["gate"]["kernel"] == layer["up"]["kernel"] == P("fsdp", "tensor")
    assert layer["down"]["kernel"] == P("tensor", "fsdp")
    assert layer["attn_norm"]["scale"] == P("fsdp")
    assert layer["q_norm"]["scale"] == P(None)


def test_stacked_layers_are_split_alike():
    flat = specs(CONFIG, 2, 2, 2)["layer_0"]
    scanned = dataclasses.replace(CONFIG, scan_layers=True, num_layers=3)
    stacked = specs(scanned, 2, 2, 2)["layers"]
    assert stacked == jax.tree.map(
        lambda spec: P(None, *spec), flat, is_leaf=lambda x: isinstance(x, P)
    )


def test_a_dimension_that_does_not_divide_stays_whole():
    odd = dataclasses.replace(CONFIG, vocab_size=25, mlp_width=50)
    found = specs(odd, 1, 2, 4)
    assert found["embedding"] == P(None, "fsdp")
    layer = found["layer_0"]
    assert layer["q"]["kernel"] == P("fsdp", "tensor", None)  # 4 heads
    assert layer["k"]["kernel"] == P("fsdp", None, None)  # 2 key/value heads
    assert layer["gate"]["kernel"] == P("fsdp", None)


@pytest.mark.parametrize("sizes", MESHES)
def test_batches_are_split_over_data_and_fsdp(sizes):
    mesh = make_mesh(*sizes)
    place = batch_sharding(mesh, axis=1)
    x = jax.device_put(np.arange(48).reshape(2, 8, 3), place)
    parts = batch_shards(mesh)
    assert {s.data.shape for s in x.addressable_shards} == {(2, 8 // parts, 3)}
    assert len({str(s.index) for s in x.addressable_shards}) == parts
    assert batch_sharding(mesh).shard_shape((8, 3)) == (8 // parts, 3)
    assert replicated(mesh).is_fully_replicated


# --- Updates ------------------------------------------------------------------------


def assert_moments_lie_where_parameters_do(state):
    for name in ("mu", "nu"):
        moments = optax.tree.get(state.opt_state, name)
        jax.tree.map(
            lambda moment, param: np.testing.assert_equal(
                moment.sharding.spec, param.sharding.spec
            ),
            moments,
            state.params,
        )


@pytest.mark.parametrize("sizes", MESHES)
def test_state_is_sharded_moments_like_their_parameters(sizes):
    mesh = make_mesh(*sizes)
    state = sharded_state(mesh)
    assert_moments_lie_where_parameters_do(state)
    kernel = state.params["layer_0"]["gate"]["kernel"]
    local = (32 // mesh.shape["fsdp"], 48 // mesh.shape["tensor"])
    moment = optax.tree.get(state.opt_state, "nu")["layer_0"]["gate"]["kernel"]
    for x in (kernel, moment):
        assert {s.data.shape for s in x.addressable_shards} == {local}
    assert state.step.sharding.is_fully_replicated
    abstract = abstract_state(state.params, OPTIMIZER, mesh)
    jax.tree.map(
        lambda x, a: np.testing.assert_equal(
            (x.shape, x.dtype, x.sharding.spec), (a.shape, a.dtype, a.sharding.spec)
        ),
        state,
        abstract,
    )


@pytest.mark.parametrize(
    "kind, sizes",
    [
        *(("grpo", sizes) for sizes in MESHES[1:]),
        pytest.param("grpo", MESHES[0], marks=pytest.mark.slow),
        pytest.param("sft", (2, 2, 2), marks=pytest.mark.slow),
        *(pytest.param("grpo", sizes, marks=pytest.mark.slow) for sizes in MORE_MESHES),
    ],
)
def test_eight_devices_compute_what_one_does(kind, sizes):
    mesh = make_mesh(*sizes)
    state = sharded_state(mesh)
    batch = put_batch(random_batch(), mesh)
    chunks = dataclasses.replace(POLICY, logits_chunk=24)  # 3 tokens of each row
    new, metrics = run(kind, state, batch, mesh, chunks)
    expected, expected_metrics = on_one_device(kind)
    assert expected_metrics["grad_norm"] > 1e-2
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(
            metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        jax.device_get(new),
        expected,
    )
    assert_moments_lie_where_parameters_do(new)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_head_is_gathered_and_its_gradient_added_up_once_for_all_chunks():
    mesh = make_mesh(1, 4, 2)
    params, batch = sharded_state(mesh).params, put_batch(random_batch(1), mesh)
    batch = jax.tree.map(lambda x: x[0], batch)
    policy = dataclasses.replace(POLICY, logits_chunk=24)

    def total(params):
        return policy_logps(Xla(CONFIG), params, batch, policy)[0].sum()

    with mesh_training(mesh):
        compiled = jax.jit(jax.grad(total)).lower(params).compile()
    program = hlo.parse(compiled.as_text())
    rows = CONFIG.vocab_size // mesh.shape["tensor"]  # of the head, on a device
    exchanged = {name: 0 for name in program.computations}
    for name, computation in program.computations.items():
        for x in computation.values():
            if x.opcode.startswith(("all-", "reduce-scatter", "collective")):
                exchanged[name] += sum(
                    a.dims == (rows, CONFIG.width) for a in x.results
                )
    # Gathered; and added up, beside the gradient of the same matrix as embeddings.
    assert exchanged.pop(program.entry) == 3
    assert not any(exchanged.values())  # in loops


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_a_prompt_computed_once_for_its_group_on_eight_devices(sizes):
    mesh, prompt = make_mesh(*sizes), 5
    batch = random_batch()
    batch.tokens[:, 1::2, :prompt] = batch.tokens[:, ::2, :prompt]
    batch.loss_mask[..., :prompt] = False
    batch.shared[:] = prompt
    params = jax.tree.map(jnp.asarray, random_params())
    alone = TrainState(jnp.int32(0), params, OPTIMIZER.init(params))
    expected, expected_metrics = run("grpo", alone, batch)
    policy = dataclasses.replace(POLICY, group_rows=2, shared_lengths=(prompt,))
    state, batch = sharded_state(mesh), put_batch(batch, mesh)
    new, metrics = run("grpo", state, batch, mesh, policy)
    assert expected_metrics["grad_norm"] > 1e-2
    np.testing.assert_allclose(
        metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        jax.device_get(new),
        jax.device_get(expected),
    )


def test_rows_that_hold_several_on_eight_devices():
    mesh, batch = make_mesh(2, 2, 2), random_batch(3)
    batch.loss_mask[2] = batch.loss_mask[:, :, 9] = False  # 9: a first token
    slots = np.broadcast_to(np.arange(batch.tokens.shape[-1]), batch.tokens.shape)
    start = np.int32(np.where(slots < 9, 0, 9))
    advantages = batch.advantages[..., None] * np.where(slots < 9, 1, -2)
    batch = batch.replace(start=start, advantages=np.float32(advantages))
    params = jax.tree.map(jnp.asarray, random_params())
    alone = TrainState(jnp.int32(0), params, OPTIMIZER.init(params))
    expected, expected_metrics = run("grpo", alone, batch)
    new, metrics = run("grpo", sharded_state(mesh), put_batch(batch, mesh), mesh)
    assert expected_metrics["grad_norm"] > 1e-2
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        jax.device_get(new),
        jax.device_get(expected),
    )


def test_the_devices_of_a_process_stay_together():
    """Four processes on a slice of 4x4 chips, each with 2x2, counted along its sides."""
    device = collections.namedtuple("Device", ["process_index", "id"])
    slice_ = [device(2 * (i // 8) + (i % 4) // 2, i) for i in range(16)]
    groups = np.reshape([d.process_index for d in by_process(slice_)], (4, 4))
    assert groups.tolist() == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]


def test_a_slice_whose_sides_do_not_divide_so_has_a_mesh_all_the_same(monkeypatch):
    """JAX splits no side of a slice of TPUs over two axes."""

    def refuse(*args, **kwargs):
        raise NotImplementedError("logical_axis_index 1 of size 2")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    found = make_mesh(data=4, fsdp=2)
    assert dict(found.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert {*found.devices.flat} == {*jax.devices()}
