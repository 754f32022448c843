"""Tests of pr1_jax.kernels.pallas: the kernels, interpreted, against dense attention.

Whether they compile for TPU is tested where libtpu is installed; no TPU is needed.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout
from pr1_jax.kernels import attention, pallas
from pr1_jax.system.mesh import RULES, make_mesh

HIDDEN, PARTLY, VISIBLE = range(3)  # kinds of tiles


def canonical_labels(rng, T):
    """Block and path [T] of a random response in canonical order, then padding."""
    block, path = [0] * int(rng.integers(1, T // 4)), []
    path += block
    for number in range(1, 4):
        for index in range(1, int(rng.integers(3, 6))):
            length = int(rng.integers(2, T // 3))
            block += [number] * length
            path += [index] * length
        outside = [0] * int(rng.integers(1, T // 4))
        block, path = block + outside, path + outside
    end = T - int(rng.integers(0, T // 8))
    padded = lambda x: (x[:end] + [0] * T)[:T]
    return np.array([padded(block), padded(path)], np.int32)


def random_labels(rows, T, seed=0):
    """Block and path, both [rows, T]."""
    rng = np.random.default_rng(seed)
    return np.stack([canonical_labels(rng, T) for _ in range(rows)], axis=1)


def packed_labels(T, rows, seed=0):
    """Block, path and start, all [rows, T], of sequences one after another.

    Args:
      rows: slots of each row before which a sequence ends; padding follows the last.
    """
    rng, whole = np.random.default_rng(seed), []
    for ends in rows:
        borders = [0, *ends, T]
        labels = [
            canonical_labels(rng, max(end - first, 12))[:, : end - first]
            for first, end in itertools.pairwise(borders)
        ]
        start = np.repeat(borders[:-1], np.diff(borders))
        whole.append([*np.concatenate(labels, axis=1), start])
    return np.int32(whole).swapaxes(0, 1)


def random_inputs(B, T, N, K, H, seed=0):
    """Query, key, value and a cotangent for the output."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def dense_mask(block, path, start=None):
    """Visibility [B, T, T]."""
    labels = [x[:, :, None] for x in (block, path)] + [
        x[:, None] for x in (block, path)
    ]
    visible = layout.visible_labels(*labels) & np.tri(block.shape[1], dtype=bool)
    if start is not None:
        visible &= np.arange(block.shape[1]) >= start[:, :, None]
    return visible


def dense(q, k, v, visible):
    """The scores of all pairs at once, keys and values repeated for their queries."""
    repeats = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None])
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(attend, q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(cotangent)


def flash_attention(labels, tile_q=16, tile_k=16, held=0):
    """The kernels, interpreted, as a function of q, k and v."""
    sizes = {"tile_q": tile_q, "tile_k": tile_k, "held": held}
    return lambda *qkv: pallas.flash_attention(*qkv, *labels, interpret=True, **sizes)


def assert_close(got, expected, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, expected
    )


@pytest.mark.parametrize(
    "K, R, H, T, tile_q, tile_k, held",
    [
        (2, 1, 32, 64, 8, 8, 0),
        (2, 2, 64, 75, 8, 16, 32),  # three parts of the keys, padding in the last
        (1, 4, 32, 75, 16, 8, 40),  # fewer than two tiles of queries a part
    ],
)
def test_equals_dense_attention_in_value_and_gradient(K, R, H, T, tile_q, tile_k, held):
    labels, inputs = random_labels(3, T), random_inputs(3, T, K * R, K, H)
    attend = flash_attention(labels, tile_q, tile_k, held)
    visible = dense_mask(*labels)
    expected = value_and_gradient(lambda *x: dense(*x, visible), *inputs)
    assert_close(value_and_gradient(attend, *inputs), expected)


# Sequences that end at edges of tiles, inside them, and several in a tile; a row with one
# alone, one without any, and one that is full.
ROWS = [[16, 32, 64], [5, 37, 40, 70], [1, 2, 9, 10, 43, 50], [40], [], [39, 75]]


@pytest.mark.parametrize(
    "tile_q, tile_k, held", [(16, 16, 0), (8, 16, 32), (16, 8, 40)]
)
def test_sequences_one_after_another_equal_dense_attention(tile_q, tile_k, held):
    labels, inputs = packed_labels(75, ROWS), random_inputs(6, 75, 4, 2, 32)
    visible = dense_mask(*labels)
    assert labels[0].any() and not visible[0, 16:, :16].any()
    expected = value_and_gradient(lambda *x: dense(*x, visible), *inputs)
    attend = flash_attention(labels, tile_q, tile_k, held)
    assert_close(value_and_gradient(attend, *inputs), expected)


def test_tiles_of_other_sequences_are_not_computed():
    """What is not a number in them does not come through, in either pass."""
    labels = packed_labels(64, [[32, 48, 64]])
    kinds = pallas.tile_kinds(*labels[:2], 16, 16, labels[2])
    assert (kinds[0, 2:, :2] == HIDDEN).all() and kinds[0, 3, 2] == HIDDEN
    q, k, v, cotangent = random_inputs(1, 64, 2, 1, 32)
    run = functools.partial(value_and_gradient, flash_attention(labels))
    out, (d_q, d_k, d_v) = run(q, k, v, cotangent)
    bad = [x.copy() for x in (q, k, v, cotangent)]
    for x in bad:
        x[:, 32:48] = np.nan
    got, gradients = run(*bad)
    for a, b in zip((got, *gradients), (out, d_q, d_k, d_v), strict=True):
        assert np.isnan(a[:, 32:48]).all()
        np.testing.assert_array_equal(a[:, :32], b[:, :32])
        np.testing.assert_array_equal(a[:, 48:], b[:, 48:])


def test_bfloat16_is_near_float32():
    labels, inputs = random_labels(2, 48), random_inputs(2, 48, 4, 2, 32)
    short = [jnp.bfloat16(x) for x in inputs]
    visible = dense_mask(*labels)
    got = value_and_gradient(flash_attention(labels), *short)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    rounded = [x.astype(np.float32) for x in short]
    expected = value_and_gradient(lambda *x: dense(*x, visible), *rounded)
    got = jax.tree.map(lambda x: x.astype(np.float32), got)
    assert_close(got, expected, atol=0.06)


def test_heads_that_do_not_divide_are_named():
    inputs = random_inputs(1, 16, 3, 2, 32)[:3]
    with pytest.raises(ValueError, match="3 query heads .* 2 key heads"):
        flash_attention(random_labels(1, 16))(*inputs)


@pytest.mark.parametrize(
    "T, tile", [(1, 128), (600, 128), (700, 256), (1100, 256), (1536, 256)]
)
def test_default_tile_wastes_little(T, tile):
    assert pallas.default_tile(T) == tile


def tiles_of(mask, tile_q, tile_k):
    """Tiles of a mask [B, T, T], [B, tiles, tiles, tile_q · tile_k], padding visible."""
    T = mask.shape[1]
    B, (Q, S) = len(mask), (-(-T // tile_q) * tile_q, -(-T // tile_k) * tile_k)
    whole = np.broadcast_to(np.tri(max(Q, S), dtype=bool), (B, max(Q, S), max(Q, S)))
    whole = whole[:, :Q, :S].copy()
    whole[:, :T, :T] = mask
    tiles = whole.reshape(B, Q // tile_q, tile_q, S // tile_k, tile_k).swapaxes(2, 3)
    return tiles.reshape(*tiles.shape[:3], -1)


@pytest.mark.parametrize("tile_q, tile_k", [(8, 8), (4, 8), (8, 4)])
def test_kinds_of_tiles_in_packed_rows(tile_q, tile_k):
    block, path, start = packed_labels(88, [[16, 32, 64], [5, 37, 40, 70], [30, 88]])
    tiles = tiles_of(dense_mask(block, path, start), tile_q, tile_k)
    kinds = np.asarray(pallas.tile_kinds(block, path, tile_q, tile_k, start))
    assert not tiles[kinds == HIDDEN].any() and tiles[kinds == VISIBLE].all()
    assert (kinds == HIDDEN).sum() > 0.95 * (~tiles.any(axis=-1)).sum()
    assert (kinds == VISIBLE).sum() > 0.9 * tiles.all(axis=-1).sum() > 0


@pytest.mark.parametrize("tile_q, tile_k", [(8, 8), (4, 8), (8, 4)])
def test_kinds_of_tiles_in_canonical_order(tile_q, tile_k):
    labels = random_labels(20, 88)
    tiles = tiles_of(dense_mask(*labels), tile_q, tile_k)
    kinds = np.asarray(pallas.tile_kinds(*labels, tile_q, tile_k))
    np.testing.assert_array_equal(kinds != HIDDEN, tiles.any(axis=-1))
    visible = tiles.all(axis=-1)  # nearly all of these are known
    assert visible[kinds == VISIBLE].all()
    assert (kinds == VISIBLE).sum() > 0.98 * visible.sum()
    future = tiles_of(np.tri(88, dtype=bool)[None], tile_q, tile_k).any(axis=-1)
    assert (future & (kinds == HIDDEN)).sum() > 20  # the labels hide some as well
    assert min((kinds == kind).sum() for kind in (HIDDEN, PARTLY, VISIBLE)) > 100


def test_kinds_of_tiles_err_on_the_safe_side():
    labels = np.random.default_rng(0).integers(0, 2, (2, 200, 24))
    tiles = tiles_of(dense_mask(*labels), 2, 2)
    kinds = np.asarray(pallas.tile_kinds(*labels, 2, 2))
    assert not tiles[kinds == HIDDEN].any() and tiles[kinds == VISIBLE].all()
    assert (kinds == HIDDEN).any() and (np.tril(kinds[0], -1) == VISIBLE).any()


def test_hidden_tiles_are_not_computed():
    """What is not a number in them does not come through, in either pass."""
    path = np.repeat([0, 1, 2, 0], 16)[None].astype(np.int32)
    labels = (path > 0).astype(np.int32), path
    kinds = pallas.tile_kinds(*labels, 16, 16)
    np.testing.assert_array_equal(
        kinds[0], [[1, 0, 0, 0], [2, 1, 0, 0], [2, 0, 1, 0], [2, 2, 2, 1]]
    )
    q, k, v, cotangent = random_inputs(1, 64, 2, 1, 32)
    run = functools.partial(value_and_gradient, flash_attention(labels))
    out, (d_q, d_k, d_v) = run(q, k, v, cotangent)
    second, last = slice(32, 48), slice(48, 64)
    expected = dense(q, k, v, dense_mask(*labels))
    np.testing.assert_allclose(out, expected, atol=2e-5)

    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, 16:32] = bad_v[:, 16:32] = np.nan  # the first path's
    got, (got_q, _, _) = run(q, bad_k, bad_v, cotangent)
    assert np.isnan(got[:, last]).all()
    np.testing.assert_array_equal(got[:, second], out[:, second])
    np.testing.assert_array_equal(got_q[:, second], d_q[:, second])

    bad_q, bad = q.copy(), cotangent.copy()
    bad_q[:, second] = bad[:, second] = np.nan
    _, (_, got_k, got_v) = run(bad_q, k, v, bad)
    assert np.isnan(got_k[:, :16]).all()
    for a, b in ((got_k, d_k), (got_v, d_v)):
        np.testing.assert_array_equal(a[:, 16:32], b[:, 16:32])


@functools.cache
def on_one_device():
    """Labels and inputs of 8 rows, and what the kernels make of them."""
    labels = packed_labels(40, [[16, 30], [5], [40], [1, 20, 38]] * 2)
    inputs = random_inputs(8, 40, 4, 2, 32)
    return labels, inputs, value_and_gradient(flash_attention(labels), *inputs)


@pytest.mark.parametrize(
    "B, mesh, parts",
    [
        (8, (4, 2, 1), (8, 1)),
        (8, (2, 2, 2), (4, 2)),
        (8, (2, 1, 4), (2, 1)),  # more shards than key heads
        (6, (2, 2, 2), (1, 2)),  # rows that do not divide
    ],
)
def test_sharded_equals_unsharded(B, mesh, parts):
    labels, inputs, expected = jax.tree.map(lambda x: x[:B], on_one_device())
    attend = flash_attention(labels)
    mesh = make_mesh(*mesh)
    rows = RULES["batch"] if parts[0] > 1 else None
    heads = "tensor" if parts[1] > 1 else None
    place = jax.NamedSharding(mesh, jax.P(rows, None, heads))
    with jax.set_mesh(mesh):
        got = value_and_gradient(attend, *jax.device_put(inputs, place))
    out = got[0]
    shard = out.sharding.shard_shape(out.shape)
    assert (B // shard[0], out.shape[2] // shard[2]) == parts
    assert_close(jax.device_get(got), expected, atol=2e-6)


def compiled(topology, attend, *, B, T, N, K, H, mesh=(1, 1, 1), packed=False):
    """Attention and its gradients compiled for a TPU, on whatever machine this is."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    size = int(np.prod(mesh))
    mesh = make_mesh(*mesh, devices=devices[:size])
    place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
    rows = RULES["batch"]
    struct = lambda heads: jax.ShapeDtypeStruct(
        (B, T, heads, H), jnp.bfloat16, sharding=place(rows, None, "tensor")
    )
    labels = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=place(rows))

    def run(q, k, v, cotangent, *labels):
        out, pull = jax.vjp(lambda *x: attend(*x, *labels), q, k, v)
        return out, pull(cotangent)

    shapes = [struct(N), struct(K), struct(K), struct(N), *[labels] * (2 + packed)]
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*shapes).compile()


@pytest.mark.parametrize(
    "topology, T, H, mesh, packed",
    [
        ("v5e:2x4", 2048, 128, (2, 2, 2), True),
        ("v5e:2x2", 1000, 64, (1, 1, 1), False),
        ("v5p:2x2x1", 2048, 128, (1, 1, 1), False),
    ],
)
def test_compiles_for_tpu_without_scores_in_memory(
    tpu_compiler, topology, T, H, mesh, packed
):
    attend = functools.partial(attention.label_attention, implementation="pallas")
    B, N, K = 4, 8, 2
    sizes = {"B": B, "T": T, "N": N, "K": K, "H": H}
    made = compiled(topology, attend, **sizes, mesh=mesh, packed=packed)
    assert 'custom_call_target="tpu_custom_call"' in made.as_text()
    copies = B * T * N * H * 2 / np.prod(mesh)  # bytes of the queries
    assert made.memory_analysis().temp_size_in_bytes < 8 * copies
