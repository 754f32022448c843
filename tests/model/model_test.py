"""Tests of pr1_jax.model: what a logit may depend on, and its equal forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from pr1_jax import layout, tags
from pr1_jax.kernels import attention
from pr1_jax.model.config import REMAT_POLICIES
from pr1_jax.model.forward import forward
from pr1_jax.model.layers import kept_rms_norm, rms_norm
from pr1_jax.model.params import compute_params, init_params, param_count, unbox
from pr1_jax.model.xla import Xla
from tests.helpers.tiny import LLAMA, QWEN3, random_params

QWEN2 = dataclasses.replace(QWEN3, qk_norm=False, qkv_bias=True)
SCAN = dataclasses.replace(QWEN3, scan_layers=True)
CONFIGS = {"qwen3": QWEN3, "llama": LLAMA, "qwen2": QWEN2, "scan": SCAN}

TAG_IDS = {tag: 10 + i for i, tag in enumerate(tags.TAGS)}
RESPONSE = (
    "A <Parallel> <Path> x y </Path> <Path> z </Path> <Path> w u </Path> </Parallel> "
    "\\n <Summary> s </Summary> B"
)
TOKENS = np.array([5, 6] + [TAG_IDS.get(word, 3) for word in RESPONSE.split()])
LAYOUT = layout.structured(TOKENS[2:], TAG_IDS, prompt_length=2)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, positions, block, path):
    """Logits [B, T, V] of tokens [B, T] under labels [T]."""
    block, path = (jnp.broadcast_to(x, tokens.shape) for x in (block, path))

    def attend(q, k, v, cache):
        return attention.label_attention(q, k, v, block, path), cache

    positions = jnp.broadcast_to(positions, tokens.shape)
    hidden, _ = forward(Xla(config), params, tokens, positions, attend)
    return Xla(config).logits(params, hidden)


def change_of_each(config, parsed):
    """Largest change of the logits at t when token i alone is changed, [i, t]."""
    N = len(TOKENS)
    tokens = np.tile(TOKENS, (N + 1, 1))
    tokens[np.arange(N), np.arange(N)] = 7
    logits = np.asarray(logits_of(config, random_params(config), tokens, *parsed))
    return np.abs(logits[:N] - logits[N]).max(-1)


# --- What a logit depends on --------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_paths_are_isolated_and_the_summary_sees_them_all(config):
    change = change_of_each(config, LAYOUT)
    paths = [np.flatnonzero(LAYOUT.path == p) for p in (1, 2, 3)]
    join = int(np.flatnonzero(TOKENS == TAG_IDS[tags.END_PARALLEL])[0])
    for path in paths:
        for sibling in paths:
            if path is not sibling:
                assert (change[np.ix_(path, sibling)] == 0).all()
        assert (change[path, join:] > 1e-3).all()  # </Parallel> and all that follows
    # And nothing else: a logit changes just where the layout lets it see.
    np.testing.assert_array_equal(change.T > 1e-3, layout.visible(LAYOUT))


def test_causal_layout_sees_everything_before_and_nothing_after():
    change = change_of_each(QWEN3, layout.causal(len(TOKENS)))
    np.testing.assert_array_equal(change.T > 1e-3, np.tri(len(TOKENS), dtype=bool))
    assert (np.triu(change.T, 1) == 0).all()


def test_positions_are_relative_and_matter():
    params, zeros = random_params(QWEN3), np.zeros(len(TOKENS), np.int32)
    run = lambda positions: logits_of(
        QWEN3, params, TOKENS[None], positions, zeros, zeros
    )
    positions = np.arange(len(TOKENS))
    plain = run(positions)
    np.testing.assert_allclose(run(positions + 50), plain, atol=1e-3)
    assert np.abs(run(positions * 2) - plain).max() > 1e-1


def test_order_of_paths_does_not_matter():
    """Siblings are symmetric: swapping them in canonical order permutes the logits."""
    order = np.arange(len(TOKENS))
    first, second = (np.flatnonzero(LAYOUT.path == p) for p in (1, 2))
    order[first[0] : second[-1] + 1] = [*second, *first]
    params = random_params(QWEN3)
    swapped = layout.structured(TOKENS[order][2:], TAG_IDS, 2)
    plain = logits_of(QWEN3, params, TOKENS[None], *LAYOUT)
    other = logits_of(QWEN3, params, TOKENS[order][None], *swapped)
    np.testing.assert_allclose(other, plain[:, order], atol=1e-3)


# --- Equal forms of one model -------------------------------------------------------


def restacked(params):
    """Parameters of an unrolled model, for `scan_layers`."""
    layers = [params[f"layer_{i}"] for i in range(QWEN3.num_layers)]
    rest = {k: v for k, v in params.items() if not k.startswith("layer_")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def test_scanned_layers_equal_unrolled_ones():
    params = random_params(QWEN3)
    plain = logits_of(QWEN3, params, TOKENS[None], *LAYOUT)
    scanned = logits_of(SCAN, restacked(params), TOKENS[None], *LAYOUT)
    np.testing.assert_allclose(scanned, plain, atol=1e-3, rtol=1e-5)
    assert np.abs(plain).max() > 1  # so the tolerance says something


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat_policy", REMAT_POLICIES)
def test_remat_changes_no_gradient(scan_layers, remat_policy):
    config = dataclasses.replace(QWEN3, scan_layers=scan_layers, num_layers=1)
    params = random_params(config)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(config, params):
        def loss(params):
            logits = logits_of(config, params, TOKENS[None], *LAYOUT)
            return jax.nn.log_softmax(logits)[..., 3].mean()

        return jax.grad(loss)(params)

    plain = gradient(config, params)
    remat = dataclasses.replace(config, remat=True, remat_policy=remat_policy)
    remat = gradient(remat, params)
    for a, b in zip(jax.tree.leaves(remat), jax.tree.leaves(plain), strict=True):
        assert np.abs(b).max() > 0  # every parameter is used
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", REMAT_POLICIES)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_attention_is_kept_by_all_policies_but_one(policy, implementation, capsys):
    how = {"attention": implementation, "remat": True, "remat_policy": policy}
    backend = Xla(dataclasses.replace(QWEN3, num_layers=1, **how))
    tokens, positions, *labels = (x[None] for x in (TOKENS, *LAYOUT))

    def loss(params):
        attend = backend.training_attention(*labels)
        return forward(backend, params, tokens, positions, attend)[0].sum()

    print_saved_residuals(loss, random_params(backend.config))
    # Its output, its normaliser, and the residual sum behind it.
    kept = 0 if policy == "nothing" else 3
    assert capsys.readouterr().out.count("named 'attention'") == kept


def test_a_kept_norm_is_the_norm_and_keeps_a_number_a_token(capsys):
    rng = np.random.default_rng(0)
    x, back = rng.normal(size=(2, 2, 5, 8)).astype(np.float32)
    scale = rng.normal(size=8).astype(np.float32)

    def pulled(norm):
        out, pull = jax.vjp(lambda x, scale: norm({"scale": scale}, x, 0.1), x, scale)
        return out, pull(back)

    got, expected = (pulled(norm) for norm in (kept_rms_norm, rms_norm))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got, expected)

    policy = REMAT_POLICIES["attention"]
    norm = lambda x: jnp.sin(kept_rms_norm({"scale": scale}, x, 0.1)).sum()
    print_saved_residuals(jax.checkpoint(norm, policy=policy), x)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "named" in x)
    assert line.startswith("f32[2,5] named 'attention'")


def test_untied_head_is_used_for_logits_and_only_there():
    params, hidden = random_params(LLAMA), jnp.ones((1, 32))
    expected = hidden @ params["head"].T
    np.testing.assert_allclose(Xla(LLAMA).logits(params, hidden), expected, rtol=1e-4)
    tied = random_params(QWEN3)
    assert "head" not in tied
    expected = hidden @ tied["embedding"].T
    np.testing.assert_allclose(Xla(QWEN3).logits(tied, hidden), expected, rtol=1e-4)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_logits_are_float32_in_bfloat16_too(param_dtype):
    params = random_params(QWEN3)
    low = dataclasses.replace(QWEN3, dtype="bfloat16", param_dtype=param_dtype)
    cast = jax.tree.map(lambda x: x.astype(param_dtype), params)
    got = logits_of(low, cast, TOKENS[None], *LAYOUT)
    plain = logits_of(QWEN3, params, TOKENS[None], *LAYOUT)
    assert got.dtype == plain.dtype == jnp.float32
    once = logits_of(low, compute_params(low, cast), TOKENS[None], *LAYOUT)
    np.testing.assert_array_equal(once, got)  # cast beforehand, or at each use
    assert np.corrcoef(np.ravel(got), np.ravel(plain))[0, 1] > 0.99


def test_parameters_are_made_in_their_own_dtype_and_counted():
    shapes = lambda config: jax.eval_shape(
        lambda: unbox(init_params(config, jax.random.key(0)))
    )
    half = shapes(dataclasses.replace(QWEN3, param_dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    attention_size = 32 * 8 * (4 + 2 + 2) + 4 * 8 * 32 + 2 * 8
    a_layer = attention_size + 3 * 32 * 48 + 2 * 32
    assert param_count(shapes(QWEN3)) == 24 * 32 + 2 * a_layer + 32
    assert param_count(shapes(SCAN)) == param_count(half)


# --- Configuration ------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("num_layers", 0, "must be at least 1"),
        ("vocab_size", -3, "must be at least 1"),
        ("num_heads", 5, "is not a multiple of model.num_kv_heads=2"),
        ("head_dim", 7, "must be even"),
    ],
)
def test_bad_configs_name_field_and_value(field, value, reason):
    with pytest.raises(ValueError, match=f"model.{field}={value} {reason}"):
        dataclasses.replace(QWEN3, **{field: value})
