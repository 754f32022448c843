"""Sampling on eight devices gives what one device gives."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from pr1_jax import layout
from pr1_jax.kernels import decode
from pr1_jax.model.cpu import Cpu
from pr1_jax.model.params import init_params, param_shardings
from pr1_jax.model.tpu import Tpu
from pr1_jax.model.xla import Xla
from pr1_jax.plan import hlo
from pr1_jax.policy import ORDINARY
from pr1_jax.sampler.cache import empty
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings
from pr1_jax.system.mesh import batch_shards, make_mesh
from tests.helpers.tiny import LABELS, needs_kernels, with_vocab
from tests.helpers.tiny import ONE_LAYER as CONFIG

SETTINGS = Settings(
    max_prompt_tokens=9,
    max_response_tokens=70,
    max_path_tokens=9,
    max_summary_tokens=7,
    summary_reserve=3,
    answer_reserve=3,
    max_sequential_steps=50,
    num_paths=3,
    path_labels=LABELS,
    min_path_tokens=5,
    planned=True,
    max_plan_tokens=5,
)
GROUPS, GROUP_SIZE, ROWS = 7, 4, 16
MESHES = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
]
FAST = [(2, 2, 2)]


@functools.cache
def random_params():
    """Parameters whose policy is far from uniform, and likes tags."""
    params = nn.unbox(init_params(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    return params | {"embedding": params["embedding"] / 2}


def sample(variant, mesh=None, backend=Xla, **settings):
    params, shards = random_params(), 1
    if mesh is not None:
        params = jax.device_put(params, param_shardings(CONFIG, mesh))
        shards = batch_shards(mesh)
    sampler = Sampler(
        backend(CONFIG),
        with_vocab(SETTINGS),
        dataclasses.replace(SETTINGS, variant=variant, **settings),
        Batching(ROWS, shards, GROUP_SIZE, prompts_per_prefill=16),
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 24, rng.integers(1, 10)) for _ in range(GROUPS)]
    found, _ = sampler.sample(params, prompts, GROUP_SIZE, jax.random.key(3))
    return found, sampler


@functools.cache
def on_one_device(variant):
    return sample(variant)[0]


@pytest.mark.parametrize(
    "variant, sizes",
    [
        *(("structured", sizes) for sizes in FAST),
        *(
            pytest.param(variant, sizes, marks=pytest.mark.slow)
            for variant in layout.VARIANTS
            for sizes in MESHES
            if variant == "causal" or sizes not in FAST
        ),
    ],
)
def test_eight_devices_sample_what_one_does(variant, sizes):
    found, _ = sample(variant, make_mesh(*sizes))
    expected = on_one_device(variant)
    assert sum(t.num_blocks for t in expected) > 10
    # Some draws were between two tokens, which one part of the vocabulary holds.
    assert sum((t.bans >> ORDINARY & 1).sum() for t in expected) > 3
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)
        for name in ("positions", "block", "path", "forced", "bans"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.sequential_steps == b.sequential_steps


@needs_kernels
def test_kernels_of_several_devices_sample_what_one_does_without():
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    found, _ = sample("structured", mesh, Cpu)
    for a, b in zip(found, on_one_device("structured"), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)


def test_tpu_kernels_of_several_devices_sample_what_one_does_without(monkeypatch):
    monkeypatch.setattr(decode, "tile_slots", lambda *_: 128)  # interpreted faster
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    found, _ = sample("structured", mesh, lambda c: Tpu(c, mesh, interpret=True))
    for a, b in zip(found, on_one_device("structured"), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)


def test_rows_are_split_and_weights_only_over_tensor():
    mesh = make_mesh(2, 2, 2)
    _, sampler = sample("structured", mesh, max_blocks=0, max_response_tokens=8)
    schedule = sampler.schedule
    assert (schedule.rows, schedule.shards) == (4, 4)  # of each, and how many
    state = jax.eval_shape(
        lambda: empty(sampler.backend, sampler.settings, schedule, 8, 16)
    )
    lowered = sampler.lower(
        jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            random_params(),
            param_shardings(CONFIG, mesh),
        ),
        slots=8,
        prompt_tokens=16,
        num_lanes=4,
    )
    assert set(lowered) == {"prefill", "decode"}
    decode = lowered["decode"].compile()
    program = hlo.parse(decode.as_text())
    every = [x for c in program.computations.values() for x in c.values()]
    gathered = [a for x in every if x.opcode == "all-gather" for a in x.results]
    largest = max(math.prod(a.dims) for a in gathered)
    assert largest < schedule.rows * CONFIG.vocab_size  # no logits
    params, placed, _ = decode.input_shardings[0]
    keys = placed.cache[0][0].shard_shape(state.cache[0][0].shape)
    assert keys == (4, 1, 8, 8)  # rows and heads split
    layer = params["layer_0"]
    assert layer["gate_up"]["kernel"].shard_shape((32, 2, 48)) == (32, 2, 24)
    assert layer["o"]["kernel"].shard_shape((4, 8, 32)) == (2, 8, 32)


def test_shards_that_the_mesh_does_not_make_are_refused():
    params = jax.device_put(
        random_params(), param_shardings(CONFIG, make_mesh(8, 1, 1))
    )
    sampler = Sampler(
        Xla(CONFIG), with_vocab(SETTINGS), SETTINGS, Batching(rows=8, shards=2)
    )
    with pytest.raises(ValueError, match="shards=2, but .* splits rows into 8"):
        sampler.sample(params, [[3]], 1, jax.random.key(0))


def test_weights_that_are_split_stay_split():
    """No decode step gathers a kernel over `tensor`."""
    mesh = make_mesh(1, 1, 8)
    config = dataclasses.replace(CONFIG, num_heads=16, num_kv_heads=8, mlp_width=256)
    places = param_shardings(config, mesh)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        nn.unbox(shapes),
        places,
    )
    settings = dataclasses.replace(SETTINGS, max_blocks=0)
    sampler = Sampler(Xla(config), with_vocab(settings), settings, Batching(rows=4))
    lowered = sampler.lower(params, slots=8, prompt_tokens=16, num_lanes=4)
    text = lowered["decode"].compile().as_text()
    kernels = {64 * 256, 32 * 256, 16 * 8 * 32, 8 * 4 * 8 * 32}  # elements
    gathered = re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather\(", text)
    sizes = {math.prod(map(int, shape.split(","))) for shape in gathered}
    assert not sizes & kernels, sizes
