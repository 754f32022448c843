"""The C++ kernels of decode steps compute what XLA does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout
from pr1_jax.kernels.cpu.decoding import attend as decoding_attend
from pr1_jax.kernels.cpu.decoding import (
    draw,
    finish_layer,
    pack_gated,
    pack_keys,
    project,
    project_heads,
    unpack_keys,
)
from pr1_jax.kernels.cpu.decoding import pack as decoding_pack
from pr1_jax.model.layers import rotary_angles, rotate
from tests.helpers.tiny import floats, needs_kernels


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 32])
@pytest.mark.parametrize("sizes", [(3, 1), (16, 16), (33, 50), (256, 97)])
def test_products_are_those_of_matrices(rows, sizes):
    rng = np.random.default_rng(rows)
    x, matrix = floats(rng, rows, sizes[0]), floats(rng, *sizes)
    packed = decoding_pack(matrix)
    got = project(x, packed, sizes[1])
    expected = np.float64(x) @ np.float64(matrix)
    np.testing.assert_allclose(got, expected, atol=1e-5 * sizes[0] ** 0.5)


def normalised(x, scale, eps):
    x = np.float64(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.float64(scale)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 32, 200])
@pytest.mark.parametrize(
    "sizes", [(3, 1, 2), (16, 16, 16), (33, 50, 40), (256, 97, 64)]
)
def test_what_comes_after_attention(rows, sizes):
    (D, F, heads), rng, eps = sizes, np.random.default_rng(rows), 0.03
    x, scale = floats(rng, rows, D), floats(rng, D)
    out, o = floats(rng, rows, heads), floats(rng, heads, D) / heads**0.5
    gate, up = (floats(rng, D, F) / D**0.5 for _ in range(2))
    down = floats(rng, F, D) / F**0.5
    z = x + np.float64(out) @ np.float64(o)
    h = normalised(z, scale, eps)
    g = h @ np.float64(gate)
    expected = z + g / (1 + np.exp(-g)) * (h @ np.float64(up)) @ np.float64(down)
    got = finish_layer(
        *(x, out, scale, decoding_pack(o)),
        *(pack_gated(gate, up), decoding_pack(down), eps),
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("has_norms, has_bias", [(True, False), (False, True)])
@pytest.mark.parametrize("heads", [(6, 3, 2), (3, 3, 8), (8, 2, 34), (4, 1, 64)])
def test_heads_are_normalised_projected_and_rotated(heads, has_norms, has_bias):
    """Heads smaller and larger than panels; more rows than are computed at once."""
    (N, K, H), lead, D, eps = heads, (5, 23), 19, 0.03
    R, rng = N // K, np.random.default_rng(H)
    x, scale = floats(rng, *lead, D), floats(rng, D)
    matrix = floats(rng, D, K * (R + 2) * H)
    bias = floats(rng, K, R + 2, H) if has_bias else None
    angles = rotary_angles(jnp.asarray(rng.integers(0, 99, lead)), H, 1e4)
    scales = (floats(rng, H), floats(rng, H)) if has_norms else (None, None)
    qkv = normalised(x, scale, eps) @ np.float64(matrix)
    qkv = qkv.reshape(*lead, K, R + 2, H) + (bias if has_bias else 0)

    def expected(x, scale):
        x = x if scale is None else normalised(x, scale, eps)
        return rotate(jnp.asarray(x, jnp.float32), angles)

    q, k, v = project_heads(
        *(x, scale, decoding_pack(matrix), bias, angles, scales, eps), heads=(N, K)
    )
    queries = qkv[..., :R, :].reshape(*lead, N, H)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=5e-5)
    close(q, expected(queries, scales[0]))
    close(k, expected(qkv[..., R, :], scales[1]))
    close(v, qkv[..., R + 1, :])


def row_wise(rng, D=33, F=70, H=8):
    """What a layer computes of each row alone, as a function of what is live."""
    scale, heads = floats(rng, D), (4, 2)
    packed = lambda *sizes: decoding_pack(floats(rng, *sizes))
    gated = pack_gated(floats(rng, D, F), floats(rng, D, F))
    head, qkv, o, down = packed(D, 70), packed(D, 8 * H), packed(4 * H, D), packed(F, D)

    def outputs(x, out, live=None):
        angles = rotary_angles(jnp.zeros(len(x), jnp.int32), H, 1e4)
        settings = {"heads": heads, "live": live}
        norms = (None, angles, (None, None), 1e-6)
        return (
            project(x, head, 70, live),
            *project_heads(x, scale, qkv, *norms, **settings),
            finish_layer(x, out, scale, o, gated, down, 1e-6, live=live),
        )

    return outputs


@needs_kernels
def test_what_is_computed_of_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    outputs, x, out = row_wise(rng), floats(rng, 140, 33), floats(rng, 140, 32)
    for some in (slice(0, 1), slice(3, 11), slice(17, 140)):
        for got, all_ in zip(outputs(x[some], out[some]), outputs(x, out), strict=True):
            np.testing.assert_array_equal(got, all_[some])


@needs_kernels
def test_threads_wait_for_what_they_read():
    """A layer's products follow one another in one call, on several threads."""
    rng = np.random.default_rng(0)
    outputs, x, out = (
        row_wise(rng, 256, 600, 32),
        floats(rng, 64, 256),
        floats(rng, 64, 128),
    )
    first = outputs(x, out)
    for _ in range(50):
        for got, expected in zip(outputs(x, out), first, strict=True):
            np.testing.assert_array_equal(got, expected)


@needs_kernels
@pytest.mark.parametrize("live", [0, 1, 13, 20, 99])
def test_rows_that_are_not_live_change_nothing(live):
    """Whatever they hold, and however many there are."""
    rng, wanted = np.random.default_rng(live), slice(0, min(live, 20))
    outputs, x, out = row_wise(rng), floats(rng, 20, 33), floats(rng, 20, 32)
    broken = x.at[live:].set(jnp.nan), out.at[live:].set(jnp.nan)
    some = jax.jit(outputs)(*broken, jnp.int32(live))
    for got, expected in zip(some, outputs(x, out), strict=True):
        np.testing.assert_array_equal(got[wanted], expected[wanted])


@needs_kernels
def test_of_lanes_that_are_not_live_nothing_is_drawn():
    rng = np.random.default_rng(0)
    logits, numbers = floats(rng, 9, 100), jnp.asarray(rng.random((9, 2)), jnp.float32)
    numbers *= jnp.array([1, 2**-23])
    tokens, logps = draw(logits, numbers)
    np.testing.assert_allclose(
        logps, jax.nn.log_softmax(logits)[jnp.arange(9), tokens], atol=1e-6
    )
    some = draw(logits.at[4:].set(jnp.nan), numbers, jnp.int32(4))
    for got, expected in zip(some, (tokens, logps), strict=True):
        np.testing.assert_array_equal(got, np.where(np.arange(9) < 4, expected, 0))


def reference(q, k, v, own, shared, lanes, rows, length):
    """In float64, a lane and head at a time."""
    (keys, values), out = (np.array(x) for x in own), np.zeros(q.shape)
    row, slot, block, path = (np.asarray(x) for x in lanes)
    filled, slot_block, slot_path, prompt = rows
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
            block[i], path[i], slot_block[b, :n], slot_path[b, :n]
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
        "rows": tuple(
            jnp.asarray(x, jnp.int32)
            for x in (filled, slot_block, slot_path, rng.integers(0, M, B))
        ),
        "prompt_length": jnp.asarray(rng.integers(1, T + 1, M), jnp.int32),
    }
    expected, cache = reference(*args, *rest.values())
    pack = lambda keys, values: (pack_keys(keys), values)

    @jax.jit
    def attend(q, k, v, own, shared):
        out, own = decoding_attend(q, k, v, pack(*own), pack(*shared), **rest)
        return out, unpack_keys(own[0])[..., :S], own[1]

    out, *own = attend(*args)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for got, wanted in zip(own, cache, strict=True):
        np.testing.assert_array_equal(got, wanted)


@needs_kernels
def test_keys_that_are_not_packed_are_refused():
    one, none, q = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones((1, 1, 8))
    plain, labels = (jnp.ones((1, 1, 8, 16)), jnp.ones((1, 1, 16, 8))), none[None]
    packed = pack_keys(plain[0]), plain[1]
    for own, shared in ((plain, packed), (packed, plain)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="keys are not packed"):
            decoding_attend(
                *(q, q, q, own, shared),
                lanes=(none, none, none, none),
                rows=(one, labels.repeat(16, 1), labels.repeat(16, 1), none),
                prompt_length=one,
            )[0].block_until_ready()


@needs_kernels
def test_far_scores_neither_overflow_nor_vanish():
    """Softmax of scores hundreds apart, as a trained model may have them."""
    rng = np.random.default_rng(0)
    q = jnp.full((1, 1, 8), 30.0)
    keys = jnp.linspace(-60, 60, 40)[None, None, None].repeat(8, 2)
    values = floats(rng, 1, 1, 40, 8)
    one, none = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)
    labels = jnp.zeros((1, 40), jnp.int32)
    out, _ = decoding_attend(
        *(q, q[:, :, :], q[:, :, :], (pack_keys(keys), values)),
        (jnp.zeros((1, 1, 0, 8, 16)), jnp.zeros((1, 1, 0, 8))),
        lanes=(none, -one, none, none),
        rows=(40 * one, labels, labels, none),
        prompt_length=none,
    )
    np.testing.assert_allclose(out[0, 0], values[0, 0, -1], atol=1e-6)
