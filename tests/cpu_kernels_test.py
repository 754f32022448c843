"""The C++ kernels of decode steps compute what XLA does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import cpu_kernels, decode, kv_cache, layout, model
from pr1_jax.sampler import Sampler

CONFIG = model.ModelConfig(
    vocab_size=24,
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=24,
)
needs_kernels = pytest.mark.skipif(
    bool(cpu_kernels.why_not("float32")), reason=cpu_kernels.why_not("float32")
)


def floats(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 32])
@pytest.mark.parametrize("sizes", [(3, 1), (16, 16), (33, 50), (256, 97)])
def test_products_are_those_of_matrices(rows, sizes):
    rng = np.random.default_rng(rows)
    x, matrix = floats(rng, rows, sizes[0]), floats(rng, *sizes)
    packed = cpu_kernels.pack(matrix)
    got = cpu_kernels.project(x, packed, sizes[1])
    expected = np.float64(x) @ np.float64(matrix)
    np.testing.assert_allclose(got, expected, atol=1e-5 * sizes[0] ** 0.5)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 32, 200])
@pytest.mark.parametrize("sizes", [(3, 1), (16, 16), (33, 50), (256, 97)])
def test_products_with_what_stands_around_them(rows, sizes):
    """Normalised before, gated, and added to something after."""
    rng = np.random.default_rng(rows)
    (x, scale), eps = (floats(rng, rows, sizes[0]), floats(rng, sizes[0])), 0.03
    gate, up = floats(rng, *sizes), floats(rng, *sizes)
    plus = floats(rng, rows, sizes[1])
    x64 = np.float64(x)
    h = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps) * np.float64(scale)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-3)

    around = {"scale": scale, "eps": eps}
    got = cpu_kernels.project(x, cpu_kernels.pack(up), sizes[1], **around, plus=plus)
    close(got, h @ np.float64(up) + plus)
    packed = cpu_kernels.pack_gated(gate, up)
    got = cpu_kernels.project(x, packed, sizes[1], **around, gated=True)
    g = h @ np.float64(gate)
    close(got, g / (1 + np.exp(-g)) * (h @ np.float64(up)))


@needs_kernels
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("H", [2, 8, 34])
def test_heads_are_split_normalised_and_rotated(H, has_norms):
    rng, (K, R), lead, eps = np.random.default_rng(H), (3, 2), (5, 7), 0.03
    qkv = floats(rng, *lead, K, R + 2, H)
    angles = model.rotary_angles(jnp.asarray(rng.integers(0, 99, lead)), H, 1e4)
    scales = (floats(rng, H), floats(rng, H)) if has_norms else (None, None)

    def expected(x, scale):
        norm = model.RMSNorm(eps, "head_dim", "float32")
        if scale is not None:
            x = norm.apply({"params": {"scale": scale}}, x)
        return model.rotate(x, angles)

    q, k, v = cpu_kernels.split_heads(qkv, angles, scales, eps)
    queries = qkv[..., :R, :].reshape(*lead, K * R, H)
    np.testing.assert_allclose(q, expected(queries, scales[0]), atol=1e-5)
    np.testing.assert_allclose(k, expected(qkv[..., R, :], scales[1]), atol=1e-5)
    np.testing.assert_array_equal(v, qkv[..., R + 1, :])


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {},  # Qwen3
        {"qk_norm": False, "qkv_bias": True},  # Qwen2
        {"qk_norm": False, "num_kv_heads": 2, "tie_embeddings": False},  # Llama
        {"param_dtype": "bfloat16", "num_layers": 2, "mlp_width": 41},
    ],
)
def test_a_packed_decoder_computes_what_others_do(changes):
    """Also where scales are not 1 and biases not 0, as they are at the start."""
    config = dataclasses.replace(CONFIG, **changes)
    rng = np.random.default_rng(0)
    params = model.unbox(model.init_params(config, jax.random.key(0)))
    params = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params
    )
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (3, 5)))
    positions = jnp.asarray(rng.integers(0, 50, (3, 5)))

    def attend(q, k, v, cache):
        groups = config.num_heads // config.num_kv_heads
        k, v = (jnp.repeat(x, groups, axis=-2) for x in (k, v))
        return jnp.sin(q * k) + v, cache + q.sum()

    def outputs(config):
        decoding = kv_cache.decoding_config(config)
        weights = kv_cache.decoding_params(config, params)
        cache = (jnp.zeros(()),) * config.num_layers
        hidden, cache = model.forward(
            decoding, weights, tokens, positions, attend, cache
        )
        return hidden, model.logits(weights, hidden), cache

    expected = outputs(config)
    got = outputs(dataclasses.replace(config, cpu_kernels=True))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        got,
        expected,
    )


@needs_kernels
def test_a_row_s_product_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    x, packed = floats(rng, 40, 65), cpu_kernels.pack(floats(rng, 65, 70))
    project = lambda x: np.asarray(cpu_kernels.project(x, packed, 70))
    for some in (slice(0, 1), slice(3, 11), slice(17, 40)):
        np.testing.assert_array_equal(project(x)[some], project(x[some]))


@needs_kernels
@pytest.mark.parametrize("live", [0, 1, 13, 20, 99])
def test_rows_that_are_not_live_change_nothing(live):
    """Whatever they hold, and however many there are."""
    rng, wanted = np.random.default_rng(live), slice(0, min(live, 20))
    x, packed = floats(rng, 20, 33), cpu_kernels.pack(floats(rng, 33, 70))
    qkv = floats(rng, 20, 2, 4, 8)
    angles = model.rotary_angles(jnp.arange(20), 8, 1e4)

    def outputs(x, qkv, live):
        product = cpu_kernels.project(x, packed, 70, live=live)
        return product, *cpu_kernels.split_heads(qkv, angles, live=live)

    broken = (x.at[live:].set(jnp.nan), qkv.at[live:].set(jnp.nan))
    some = jax.jit(outputs)(*broken, jnp.int32(live))
    for got, expected in zip(some, outputs(x, qkv, None), strict=True):
        np.testing.assert_array_equal(got[wanted], expected[wanted])


@needs_kernels
def test_of_lanes_that_are_not_live_nothing_is_drawn():
    rng = np.random.default_rng(0)
    logits, uniform = floats(rng, 9, 100), jnp.asarray(rng.random(9), jnp.float32)
    tokens, logps = cpu_kernels.draw(logits, uniform)
    np.testing.assert_allclose(
        logps, jax.nn.log_softmax(logits)[jnp.arange(9), tokens], atol=1e-6
    )
    some = cpu_kernels.draw(logits.at[4:].set(jnp.nan), uniform, jnp.int32(4))
    for got, expected in zip(some, (tokens, logps), strict=True):
        np.testing.assert_array_equal(got, np.where(np.arange(9) < 4, expected, 0))


def reference(q, k, v, own, shared, lanes, filled, slot_labels, prompt, length):
    """In float64, a lane and head at a time."""
    (keys, values), out = (np.array(x) for x in own), np.zeros(q.shape)
    row, slot, block, path = (np.asarray(x) for x in lanes)
    live = [i for i in range(len(row)) if row[i] < len(keys)]
    for i in live:
        if slot[i] >= 0:
            keys[row[i], :, :, slot[i]] = k[i]
            values[row[i], :, slot[i]] = v[i]
    per_head = q.shape[1] // k.shape[1]
    for i in live:
        b, n = row[i], int(filled[row[i]])
        m, T = prompt[b], int(length[prompt[b]])
        seen = layout.visible_labels(
            block[i], path[i], slot_labels[0][b, :n], slot_labels[1][b, :n]
        )
        for head in range(q.shape[1]):
            j = head // per_head
            all_keys = np.concatenate(
                [np.asarray(shared[0])[m, j, :, :T], keys[b, j, :, :n][:, seen]], 1
            )
            all_values = np.concatenate(
                [np.asarray(shared[1])[m, j, :T], values[b, j, :n][seen]]
            )
            scores = np.float64(q[i, head]) @ all_keys / np.sqrt(q.shape[2])
            probs = np.exp(scores - scores.max())
            out[i, head] = probs / probs.sum() @ all_values
    return out, (keys, values)


@needs_kernels
@pytest.mark.parametrize("seed", range(6))
def test_attention_of_lanes_is_that_of_the_rule(seed):
    """Rows in and outside blocks, one at its prompt's end, one idle; odd sizes too."""
    rng = np.random.default_rng(seed)
    K = int(rng.integers(1, 4))
    N, H = K * int(rng.integers(1, 4)), int(rng.choice([3, 8, 20, 32, 64]))
    B, M, S, T = 6, 3, int(rng.integers(20, 90)), int(rng.integers(1, 70))
    row = np.repeat([0, 1, 2, 4, 5], [1, 8, 3, 1, 2])  # row 3 is idle
    inside = np.isin(row, (1, 2, 5))
    path = np.concatenate([[0], 1 + np.arange(8), 1 + np.arange(3), [0], [2, 4]])
    block = np.where(inside, 2, 0)
    filled = rng.integers(10, S + 1, B)
    filled[4] = 0  # its pending token is the prompt's last
    slot = filled[row] - 1 - np.array([0, *range(8), *range(3), 0, 0, 1])
    slot[row == 4] = -1
    slot_block = rng.integers(0, 3, (B, S))
    slot_path = np.where(slot_block > 0, rng.integers(1, 9, (B, S)), 0)
    slot_block[row, slot], slot_path[row, slot] = block, path
    dead = np.full(3, B)
    pad = lambda x, value: np.concatenate([x, np.full(3, value)]).astype(np.int32)
    lanes = (np.concatenate([row, dead]).astype(np.int32), pad(slot, 0))
    lanes += (pad(block, 0), pad(path, 0))
    L = len(lanes[0])
    args = (
        *(floats(rng, L, N, H), floats(rng, L, K, H), floats(rng, L, K, H)),
        (floats(rng, B, K, H, S), floats(rng, B, K, S, H)),
        (floats(rng, M, K, H, T), floats(rng, M, K, T, H)),
    )
    rest = {
        "lanes": tuple(map(jnp.asarray, lanes)),
        "filled": jnp.asarray(filled, jnp.int32),
        "slot_labels": tuple(
            jnp.asarray(x, jnp.int32) for x in (slot_block, slot_path)
        ),
        "prompt": jnp.asarray(rng.integers(0, M, B), jnp.int32),
        "prompt_length": jnp.asarray(rng.integers(1, T + 1, M), jnp.int32),
    }
    expected, cache = reference(*args, *rest.values())
    out, own = jax.jit(lambda *args: cpu_kernels.attend(*args, **rest))(*args)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for got, wanted in zip(own, cache, strict=True):
        np.testing.assert_array_equal(got, wanted)


@needs_kernels
def test_far_scores_neither_overflow_nor_vanish():
    """Softmax of scores hundreds apart, as a trained model may have them."""
    rng = np.random.default_rng(0)
    q = jnp.full((1, 1, 8), 30.0)
    keys = jnp.linspace(-60, 60, 40)[None, None, None].repeat(8, 2)
    values = floats(rng, 1, 1, 40, 8)
    one, none = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)
    labels = jnp.zeros((1, 40), jnp.int32)
    out, _ = cpu_kernels.attend(
        *(q, q[:, :, :], q[:, :, :], (keys, values)),
        (jnp.zeros((1, 1, 8, 0)), jnp.zeros((1, 1, 0, 8))),
        lanes=(none, -one, none, none),
        filled=40 * one,
        slot_labels=(labels, labels),
        prompt=none,
        prompt_length=none,
    )
    np.testing.assert_allclose(out[0, 0], values[0, 0, -1], atol=1e-6)


@needs_kernels
def test_auto_takes_them_and_tensor_parallel_meshes_do_not():
    assert model.with_kernels(CONFIG).cpu_kernels
    assert not model.with_kernels(CONFIG, "xla").cpu_kernels
    mesh = jax.make_mesh((1, 1, 2), ("data", "fsdp", "tensor"))
    assert not model.with_kernels(CONFIG, mesh=mesh).cpu_kernels
    with pytest.raises(ValueError, match="rollout.kernels=cpu: mesh.tensor=2"):
        model.with_kernels(CONFIG, "cpu", mesh)
    half = model.ModelConfig(**{**vars(CONFIG), "dtype": "bfloat16"})
    assert not model.with_kernels(half).cpu_kernels
    with pytest.raises(ValueError, match="rollout.kernels=cpu: model.dtype=bfloat16"):
        model.with_kernels(half, "cpu")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled or loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu_kernels._library.cache_clear()
    yield tmp_path
    cpu_kernels._library.cache_clear()


def test_without_a_compiler_xla_decodes(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    config = model.with_kernels(CONFIG)
    assert not config.cpu_kernels
    vocab = decode.Vocab(special_ids=(10, 11, 12, 13, 14, 15, 1), newline_id=2)
    settings = decode.Settings(max_prompt_tokens=4, max_response_tokens=6)
    params = model.unbox(model.init_params(config, jax.random.key(0)))
    sampler = Sampler(config, vocab, settings, rows=2)
    (response,) = sampler.sample(params, [[3, 4]], 1, jax.random.key(0))
    assert 1 <= len(response.tokens) <= 6
    with pytest.raises(ValueError, match="rollout.kernels=cpu: no C.* was found"):
        model.with_kernels(CONFIG, "cpu")


def test_a_compiler_that_fails_is_named_and_leaves_nothing(fresh, monkeypatch):
    broken = fresh / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'fatal: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    why = cpu_kernels.why_not("float32")
    assert "broken-g++ cannot compile" in why and why.endswith("fatal: out of luck")
    assert list((fresh / "cache" / "pr1_jax").iterdir()) == []


def test_of_what_a_compiler_says_the_first_error_is_shown(fresh, monkeypatch):
    said = "In function f:\\nx.cc:1: error: first\\nx.cc:2: error: second\\n  ~~~^~~"
    broken = fresh / "broken-g++"
    broken.write_text(f"#!/bin/sh\nprintf '{said}\\n' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert cpu_kernels.why_not("float32").endswith(": x.cc:1: error: first")


def test_a_compiler_that_is_there_compiles_them():
    """Else all tests of the kernels would be skipped, and none fail."""
    try:
        compiler = cpu_kernels._compiler()
    except OSError as error:
        pytest.skip(str(error))
    assert cpu_kernels.why_not("float32") == "", compiler


@needs_kernels
def test_compiled_once(fresh, monkeypatch):
    path = cpu_kernels.build()
    made = path.stat().st_mtime_ns
    assert cpu_kernels.build() == path and path.stat().st_mtime_ns == made
    assert [x.name for x in path.parent.iterdir()] == [path.name]
