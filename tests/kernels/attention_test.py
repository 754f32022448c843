"""Tests of pr1_jax.kernels.attention: equal to dense attention under `layout.visible`."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout, tags
from pr1_jax.kernels import attention, pallas
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.system import mesh
from pr1_jax.training.logps import PolicySettings, policy_logps
from pr1_jax.trajectory import Batch

TAG_IDS = {tag: 10 + i for i, tag in enumerate(tags.TAGS)}
END = "</Parallel> \\n <Summary> </Summary>"
RESPONSES = (
    f"<Parallel> <Path> x y </Path> <Path> z </Path> {END}",
    f"A B <Parallel> <Path> </Path> <Path> </Path> <Path> </Path> {END}",
)
PATH_1, PATH_2 = slice(5, 9), slice(9, 12)  # of the first response
T, H = 16, 8


def labels():
    """Layouts of two rows of 16 tokens, prompt included."""
    rows = []
    for text in RESPONSES:
        tokens = [TAG_IDS.get(word, 3) for word in text.split()]
        rows.append(layout.structured(tokens, TAG_IDS, T - len(tokens)))
    return rows


def random_inputs(N, K, rows=2, seed=0):
    """Query, key, value and a cotangent for the output."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, T, N, H), (rows, T, K, H), (rows, T, K, H), (rows, T, N, H)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def stacked(rows):
    return np.stack([r.block for r in rows]), np.stack([r.path for r in rows])


def dense(q, k, v, visible):
    """The scores of all pairs at once, keys and values repeated for their queries."""
    repeats = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / H**0.5
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None])
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(attend, q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(cotangent)


@pytest.mark.parametrize(
    "N, K, query_chunk", [(4, 2, 512), (4, 2, 4), (4, 2, 5), (3, 1, 5), (2, 2, T)]
)
def test_equals_dense_attention_in_value_and_gradient(N, K, query_chunk):
    rows, inputs = labels(), random_inputs(N, K)  # a chunk of 5 does not divide T
    visible = np.stack([layout.visible(row) for row in rows])
    expected = value_and_gradient(lambda *x: dense(*x, visible), *inputs)
    attend = lambda *x: attention.label_attention(
        *x, *stacked(rows), query_chunk=query_chunk
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        value_and_gradient(attend, *inputs),
        expected,
    )


@pytest.mark.parametrize("query_chunk", [512, 5])
def test_siblings_are_isolated(query_chunk):
    q, k, v, _ = random_inputs(4, 2)
    attend = functools.partial(attention.label_attention, query_chunk=query_chunk)
    attend = jax.jit(attend)
    before = attend(q, k, v, *stacked(labels()))
    changed = k.copy(), v.copy()
    for x in changed:
        x[:, PATH_1] += 3.0
    moved = np.abs(attend(q, *changed, *stacked(labels())) - before)[0].max((1, 2))
    assert (moved[: PATH_1.start] == 0).all() and (moved[PATH_2] == 0).all()
    assert (moved[PATH_1] > 1e-2).all() and (moved[PATH_2.stop :] > 1e-2).all()


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_queries_of_the_last_tokens_alone(implementation, monkeypatch):
    interpreted = functools.partial(pallas.flash_attention, interpret=True)
    monkeypatch.setattr(pallas, "flash_attention", interpreted)
    attend = functools.partial(
        attention.label_attention, query_chunk=5, implementation=implementation
    )
    q, k, v, cotangent = random_inputs(4, 2)
    q, cotangent = q[:, 7:], cotangent[:, 7:]
    labels_ = stacked(labels())
    visible = np.stack([layout.visible(row) for row in labels()])[:, 7:]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        value_and_gradient(lambda *x: attend(*x, *labels_), q, k, v, cotangent),
        value_and_gradient(lambda *x: dense(*x, visible), q, k, v, cotangent),
    )


@pytest.mark.parametrize("query_chunk", [512, 5])
def test_sequences_one_after_another_are_as_apart(query_chunk):
    """In value and gradient, whatever their labels are."""
    borders, inputs = [0, 7, 8, T], random_inputs(4, 2)
    block, path = (x.copy() for x in stacked(labels()))
    block[:, borders[1]], path[:, borders[1]] = 9, 3
    start = np.repeat(borders[:-1], np.diff(borders)).astype(np.int32)
    start = np.stack([start, start])
    attend = functools.partial(attention.label_attention, query_chunk=query_chunk)
    whole = value_and_gradient(lambda *x: attend(*x, block, path, start), *inputs)
    for first, end in itertools.pairwise(borders):
        cut = lambda x, first=first, end=end: x[:, first:end]
        alone = lambda *x, cut=cut: attend(*x, cut(block), cut(path))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
            jax.tree.map(cut, whole),
            value_and_gradient(alone, *map(cut, inputs)),
        )


def test_zero_labels_are_plain_causal_attention():
    q, k, v, _ = random_inputs(4, 2)
    zeros = np.zeros((2, T), np.int32)
    got = jax.jit(attention.label_attention)(q, k, v, zeros, zeros)
    expected = dense(q, k, v, np.tril(np.ones((1, T, T), bool)))
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_a_sharded_batch_gives_the_same():
    inputs = random_inputs(4, 2, rows=8)[:3]
    block, path = (np.tile(x, (4, 1)) for x in stacked(labels()))
    attend = jax.jit(functools.partial(attention.label_attention, query_chunk=5))
    expected = attend(*inputs, block, path)
    place = mesh.batch_sharding(mesh.make_mesh(2, 4, 1))
    got = attend(*jax.device_put((*inputs, block, path), place))
    assert len(got.sharding.device_set) == 8
    assert not got.sharding.is_fully_replicated
    np.testing.assert_allclose(got, expected, atol=2e-6)


def uses_kernel(implementation):
    attend = functools.partial(attention.label_attention, implementation=implementation)
    inputs = random_inputs(4, 2)[:3]
    return "pallas_call" in str(jax.make_jaxpr(attend)(*inputs, *stacked(labels())))


@pytest.mark.parametrize("backend", ["tpu", "cpu", "gpu"])
def test_the_kernel_is_taken_on_tpu_or_when_asked_for(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert uses_kernel("auto") == (backend == "tpu")
    assert uses_kernel("pallas") and not uses_kernel("xla")


def test_the_update_takes_what_its_config_says():
    sizes = ("vocab_size", "width", "head_dim", "mlp_width", "num_heads")
    config = ModelConfig(**dict.fromkeys(sizes, 8), num_layers=1, num_kv_heads=2)
    ints = np.zeros((2, T), np.int32)
    fields = ("tokens", "positions", "block", "path", "bans", "loss_mask", "old_logps")
    zeros = np.zeros(2)
    batch = Batch(**dict.fromkeys(fields, ints), advantages=zeros, shared=zeros)
    init = lambda: unbox(init_params(config, jax.random.key(0)))
    params = jax.eval_shape(init)
    for implementation in ("pallas", "xla"):
        backend = Xla(dataclasses.replace(config, attention=implementation))
        logps = functools.partial(
            policy_logps, backend, batch=batch, policy=PolicySettings((0,))
        )
        jaxpr = str(jax.make_jaxpr(logps)(params))
        assert ("pallas_call" in jaxpr) == (implementation == "pallas")


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation='cudnn' is not one of"):
        uses_kernel("cudnn")
