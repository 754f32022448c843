"""Adapters: merged weights by hand, where they are merged, and what they leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.model import adapters
from pr1_jax.model.backend import choose
from pr1_jax.model.params import unbox
from tests.helpers import causal_logits
from tests.helpers.tiny import (
    LLAMA,
    QWEN3,
    needs_kernels,
    random_adapters,
    random_params,
)

SCANNED = dataclasses.replace(QWEN3, scan_layers=True)
IDS = (10, 15)
SETTINGS = adapters.Settings(3, 6.0, adapters.projections((adapters.ALL,)), IDS)
TOKENS = np.array([[3, 10, 11, 15, 4, 20]])


def policy(config, settings=SETTINGS, trained=None):
    frozen = adapters.Frozen(random_params(config), settings)
    return frozen.with_adapters(trained or random_adapters(config, settings))


@pytest.mark.parametrize("config", [QWEN3, SCANNED], ids=["apart", "stacked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_by_hand(config, dtype):
    """W + alpha / r · A B, rounded once; norms, biases and other rows as they were."""
    config = dataclasses.replace(config, param_dtype=dtype)
    base, trained = random_params(config), random_adapters(config, SETTINGS)
    found = adapters.merge_all(policy(config))
    assert jax.tree.structure(found) == jax.tree.structure(base)
    for name in ("layers",) if config.scan_layers else ("layer_0", "layer_1"):
        for part, tree in base[name].items():
            if part not in trained[name]:
                jax.tree.map(np.testing.assert_array_equal, found[name][part], tree)
                continue
            a, b = (np.asarray(trained[name][part][x], np.float64) for x in "ab")
            subscripts = {"q": "dr,rnh->dnh", "o": "nhr,rd->nhd"}
            subscripts |= dict.fromkeys("kv", subscripts["q"])
            plain = subscripts.get(part, "ir,ro->io")
            if config.scan_layers:
                plain = "l" + plain.replace(",", ",l").replace("->", "->l")
            wanted = np.asarray(tree["kernel"], np.float64)
            wanted = wanted + 2.0 * np.einsum(plain, a, b)
            kernel = found[name][part]["kernel"]
            assert kernel.dtype == dtype
            rounding = 2.0**-24 if dtype == "float32" else 2.0**-8
            tolerance = {"rtol": rounding * 1.01, "atol": 1e-6}
            np.testing.assert_allclose(
                np.asarray(kernel, np.float64), wanted, **tolerance
            )
    rows = np.array(base["embedding"], np.float32)
    rows[list(IDS)] += np.asarray(trained["rows"]["embedding"])
    np.testing.assert_array_equal(found["embedding"], jnp.asarray(rows, dtype))


@pytest.mark.parametrize("config", [SCANNED, LLAMA], ids=["stacked", "apart"])
def test_a_policy_computes_what_its_merged_weights_do(config):
    """While training each layer merges for itself."""
    merged = adapters.merge_all(policy(config))
    rows = adapters.with_rows(policy(config))
    found = causal_logits.compute(config, rows, TOKENS)
    expected = causal_logits.compute(config, merged, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = causal_logits.compute(config, random_params(config), TOKENS)
    assert np.abs(found - plain).max() > 0.1


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("xla", "float32"),
        ("xla", "bfloat16"),
        pytest.param("cpu", "float32", marks=needs_kernels),
    ],
)
def test_decoding_reads_merged_weights(kernels, dtype):
    """Adapters are not rounded before they are merged."""
    config = dataclasses.replace(SCANNED, dtype=dtype, param_dtype=dtype)
    prepare = jax.jit(choose(config, kernels).prepare)
    found = prepare(policy(config))
    expected = prepare(adapters.merge_all(policy(config)))
    if dtype == "float32":
        close = functools.partial(np.testing.assert_allclose, atol=1e-6)
        jax.tree.map(close, found, expected)
    else:  # a sum that lies between two numbers may become either
        pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        assert max(np.mean(x != y) for x, y in pairs) < 0.005


def test_fresh_adapters_change_nothing_to_the_last_bit():
    fresh = unbox(adapters.init_adapters(SCANNED, SETTINGS, jax.random.key(0)))
    found = adapters.merge_all(policy(SCANNED, trained=fresh))
    jax.tree.map(np.testing.assert_array_equal, found, random_params(SCANNED))
    a = fresh["layers"]["down"]["a"]  # of 48 inputs
    assert 0.9 * 48**-0.5 < np.abs(a).max() <= 48**-0.5


def test_only_what_is_named_has_adapters():
    chosen = adapters.projections(("v_proj", "down_proj", adapters.TAGS))
    settings = adapters.Settings(2, 2.0, chosen)
    abstract = unbox(adapters.abstract_adapters(LLAMA, settings))
    assert {*abstract} == {"layer_0", "layer_1"}
    assert {*abstract["layer_0"]} == {"v", "down"}
    assert abstract["layer_0"]["v"]["b"].shape == (2, 3, 8)
    untied = adapters.abstract_adapters(LLAMA, SETTINGS)
    assert {*untied["rows"]} == {"embedding", "head"}


def test_plain_parameters_pass_as_they_are():
    params = random_params(SCANNED)
    assert adapters.with_rows(params) is params
    assert adapters.merged(params["layers"]) is params["layers"]


def test_checksums_tell_weights_apart_and_not_their_shardings():
    params = random_params(SCANNED)
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    found = adapters.checksum(params)
    spread = params | {"embedding": jax.device_put(params["embedding"], spec)}
    assert adapters.checksum(spread) == found
    rows = params["embedding"]
    others = {
        "one number": rows.at[3, 4].add(1e-6),
        "its place": rows.at[0].set(rows[1]).at[1].set(rows[0]),
    }
    for what, other in others.items():
        assert adapters.checksum(params | {"embedding": other}) != found, what
