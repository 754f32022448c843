"""Tests of pr1_jax.kernels.decode, interpreted, by way of the backend that calls it.

Whether it compiles for TPU, and without copies of a cache, is tested where libtpu is
installed; no TPU is needed.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pr1_jax.kernels import decode
from pr1_jax.model.backend import choose
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, param_shardings, unbox
from pr1_jax.model.tpu import Tpu
from pr1_jax.model.xla import Prompts, Step, Xla
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings
from pr1_jax.system.mesh import batch_shards, make_mesh
from tests.helpers.tiny import VOCAB

S, T = 600, 300  # slots of a row, tokens of a prompt
# On borders of tiles (256), of transfers (128), of windows that are written (16).
FILLED = (0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 272, 383, 512, 599, 600)


class Case(NamedTuple):
    """A decode step of one layer with heads of all kinds."""

    config: ModelConfig
    step: Step
    qkv: tuple
    own: tuple  # keys [B, K, H, S] and values [B, K, S, H]
    prompts: tuple | None


def labels(rng, P, S, filled):
    """Labels of a row's slots, and of its P lanes: in its last block, or outside of it."""
    block = np.sort(rng.integers(0, 4, S)) * (rng.random(S) < 0.8)
    path = np.where(block > 0, rng.integers(1, P + 1, S), 0)
    inside = P > 1 and rng.random() < 0.7
    own_block = block[:filled].max(initial=1) if inside else 0
    return block, path, np.full(P, own_block), np.arange(1, P + 1) * inside


def a_case(P, R, H, *, K=1, dtype="float32", readers=2, flat=True, seed=0):
    """A case; readers: rows that a prompt can have, 0 = there are no prompts."""
    rng = np.random.default_rng(seed)
    B = len(FILLED)
    config = ModelConfig(
        vocab_size=8,
        num_layers=1,
        width=8,
        num_heads=K * R,
        num_kv_heads=K,
        head_dim=H,
        mlp_width=8,
        dtype=dtype,
    )
    live = rng.random((B, P)) < 0.6
    live[:, 0] |= P == 1
    live[[3, 8]] = False  # rows that are done, or wait
    filled = np.array(FILLED)
    live &= live.cumsum(axis=1) <= np.maximum(filled, 1)[:, None]
    if readers == 0:
        live[0] = False
    last = live.cumsum(axis=1) - 1 - live.sum(axis=1, keepdims=True)
    slot = np.where(filled[:, None] > 0, filled[:, None] + last, -1)
    fields = zip(*(labels(rng, P, S, n) for n in filled))
    slot_block, slot_path, block, path = (np.array(x, np.int32) for x in fields)
    for b, p in zip(*np.nonzero(live & (slot >= 0))):  # what a lane writes, it may see
        slot_block[b, slot[b, p]], slot_path[b, slot[b, p]] = block[b, p], path[b, p]
    L = B * P if flat else B
    index = np.full(L, B * P)
    chosen = np.flatnonzero(live) if flat else np.flatnonzero(live[:, 0])
    index[chosen if not flat else slice(len(chosen))] = chosen
    row = np.where(index < B * P, index // P, B)
    by_lane = np.append(slot.ravel(), 5)  # of unused lanes: anything
    M = B if readers <= 1 else -(-B // readers) + 2
    reader = np.arange(B) if readers <= 1 else rng.permutation(M * readers)[:B]
    reader = np.where(live.any(axis=1), reader, M * readers)
    length = np.resize([T, 1, 128, 129, 256, 40, 257], M)
    floats = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    step = Step(
        row=row,
        index=index if flat else np.arange(B),
        slot=by_lane[index],
        count=np.int32(live.sum()) if flat else None,
        live=live,
        block=block,
        path=path,
        filled=filled,
        slot_block=slot_block,
        slot_path=slot_path,
        prompts=Prompts(length, T, readers) if readers else None,
        reader=reader if readers else None,
    )
    step = step._replace(
        **{
            n: jnp.asarray(x)
            for n, x in step._asdict().items()
            if isinstance(x, np.ndarray)
        }
    )
    qkv = floats(L, K * R, H), floats(L, K, H), floats(L, K, H)
    own = floats(B, K, H, S), floats(B, K, S, H)
    prompts = (floats(M, K, H, T), floats(M, K, T, H)) if readers else None
    return Case(config, step, qkv, own, prompts)


def attend(backend, case, own, prompts):
    """Outputs and the new cache of a backend."""
    run = lambda *args: backend.step_attention(case.step)(*args)
    return jax.jit(run)(*case.qkv, (own, prompts))


def padded_with(value, x):
    """A cache [B, K, S, 2 H] that is this behind its slots."""
    more = -x.shape[2] % decode.PIECE
    return jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)], constant_values=value)


def interpreted(case, interpret):
    """What `attend` gives with the kernel, its caches' unused slots not a number."""
    backend = Tpu(case.config, interpret=interpret)
    beside = lambda x: jnp.concatenate([x[0].swapaxes(2, 3), x[1]], axis=3)
    used = lambda x, ends: jnp.where(
        (jnp.arange(x.shape[2]) < ends[:, None])[:, None, :, None], x, jnp.nan
    )
    own = padded_with(jnp.nan, used(beside(case.own), case.step.filled))
    prompts = case.prompts
    if prompts is not None:
        prompts = used(beside(prompts), case.step.prompts.length)
        prompts = (padded_with(jnp.nan, prompts),)
    out, (new,) = attend(backend, case, (own,), prompts)
    return out, new


# Transfers happen when they are waited for, and nothing has a value before it is written.
LATE = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
CASES = [
    pytest.param((1, 1, 64), {"flat": False, "K": 2, "readers": 0}, True, id="1-path"),
    pytest.param((2, 4, 128), {"dtype": "bfloat16"}, LATE, id="2-paths-bfloat16"),
    pytest.param((8, 8, 64), {"readers": 1}, True, id="8-paths-a-prompt-each"),
    *(
        pytest.param(shape, settings, True, marks=pytest.mark.slow)
        for shape, settings in [
            ((1, 4, 128), {"flat": False, "dtype": "bfloat16", "readers": 5}),
            ((2, 1, 64), {"K": 3, "readers": 8}),
            ((3, 2, 128), {"readers": 0}),
            ((4, 3, 64), {"readers": 3, "K": 2}),
            ((5, 8, 128), {"dtype": "bfloat16", "readers": 1}),
            ((6, 5, 64), {"readers": 2, "dtype": "bfloat16"}),
            ((7, 6, 256), {"readers": 4}),
            ((8, 7, 64), {"readers": 2}),
        ]
    ),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(decode, "tile_slots", lambda *_: 256)


@pytest.mark.parametrize("shape, settings, interpret", CASES)
def test_the_kernel_attends_as_plain_jax(shape, settings, interpret):
    """Ragged rows, rows that are done, borders of all kinds; what is unused is NaN."""
    case = a_case(*shape, **settings)
    expected, own = attend(Xla(case.config), case, case.own, case.prompts)
    out, new = interpreted(case, interpret)
    is_used = np.asarray(case.step.row) < len(FILLED)
    as_floats = lambda x: np.asarray(x, np.float32)
    atol = 0.02 if case.config.dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(
        as_floats(out)[is_used], as_floats(expected)[is_used], atol=atol
    )
    assert not as_floats(out)[~is_used].any()
    H = case.config.head_dim
    for b, filled in enumerate(FILLED):
        keys, values = (
            as_floats(new)[b, :, :filled, x] for x in (slice(H), slice(H, None))
        )
        np.testing.assert_array_equal(
            keys, as_floats(own[0])[b, ..., :filled].swapaxes(1, 2)
        )
        np.testing.assert_array_equal(values, as_floats(own[1])[b, :, :filled])


def test_the_order_of_the_tiles_is_prompts_that_are_read_then_rows():
    lanes = jnp.array([[0, 4], [4, 4], [2, 1]])  # of 4; row 1 is not fed
    walk = decode.walk(
        lanes,
        jnp.array([[299, 0], [0, 0], [6, 5]]),
        jnp.ones((3, 2, 384), bool),
        jnp.array([300, 200, 7]),
        length=jnp.array([129, 90, 50]),
        reader=jnp.array([5, 3, 4]),
        readers=2,
        prompt_slots=256,
        tile=128,
        num_lanes=4,
    )
    assert walk.count == 5  # entries 0 and 1 have no reader
    assert walk.sequence[:5].tolist() == [2, 3, 3, 3, 5]
    assert walk.tile[:5].tolist() == [0, 0, 1, 2, 0]
    assert walk.length.tolist() == [0, 0, 50, 300, 0, 7]
    assert walk.readers.tolist() == [4, 4, 4, 4, 4, 4, 4, 4, 2, 1, 0, 4]
    assert walk.slot.tolist() == [299, -1, -1, -1, 6, 5]
    assert walk.visible.shape == (3, 3, 1, 128) and (walk.visible == 3).all()


@pytest.mark.parametrize(
    "topology, sizes, paths, K, H, dtype",
    [
        ("v5e:2x2", (1, 2, 2), 2, 8, 128, "bfloat16"),
        ("v5e:2x2", (1, 1, 1), 2, 2, 64, "float32"),
        ("v5p:2x2x1", (2, 1, 1), 8, 2, 128, "bfloat16"),
    ],
)
def test_no_decode_step_copies_a_cache_on_tpu(
    tpu_compiler, topology, sizes, paths, K, H, dtype
):
    """The sampler's programs as they are compiled for TPU: prefill and decoding."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = make_mesh(*sizes, devices=devices[: math.prod(sizes)])
    config = ModelConfig(
        vocab_size=512,
        num_layers=1,
        width=128,
        num_heads=2 * K,
        num_kv_heads=K,
        head_dim=H,
        mlp_width=256,
        dtype=dtype,
    )
    shards = batch_shards(mesh)
    rows, slots, tokens = 8 * shards, 1000, 500
    settings = Settings(tokens, slots, num_paths=paths)
    sampler = Sampler(
        choose(config, "auto", mesh), VOCAB, settings, Batching(rows, shards, 4)
    )
    assert isinstance(sampler.backend, Tpu)
    shapes = jax.eval_shape(lambda: unbox(init_params(config, jax.random.key(0))))
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        param_shardings(config, mesh),
    )
    lowered = sampler.lower(
        params, slots=slots, prompt_tokens=tokens, num_lanes=8 * paths
    )
    K //= mesh.shape["tensor"]
    for name, program in lowered.items():
        text = program.compile().as_text()
        caches = {f"[8,{K},1024,{2 * H}]", f"[7,{K},512,{2 * H}]"}
        # A prefill may put a small cache into VMEM and back; no step of a loop may.
        kinds = "copy" if name == "prefill" else "copy|copy-start|slice-start"
        copied = re.findall(rf"= (.*) (?:{kinds})\(", text)
        copied = {shape for found in copied for shape in re.findall(r"\[.*?\]", found)}
        assert not caches & copied, name
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert any(cache in text for cache in caches)
