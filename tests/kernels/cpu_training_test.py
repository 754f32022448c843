"""The C++ operations of updates: those of XLA, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.kernels import attention
from pr1_jax.kernels.cpu import decoding, training
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.cpu import Cpu
from pr1_jax.model.layers import rotary_angles, rotate
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.policy import ORDINARY, logps_and_entropies
from pr1_jax.training.logps import PolicySettings, policy_logps
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import TrainState
from pr1_jax.training.update import GrpoSettings
from pr1_jax.training.update import grpo_update as update_grpo_update
from pr1_jax.trajectory import Batch
from tests.helpers.tiny import WHY_NO_KERNELS, YARN, floats

pytestmark = pytest.mark.skipif(bool(WHY_NO_KERNELS), reason=WHY_NO_KERNELS)
CONFIG = ModelConfig(
    vocab_size=24,
    num_layers=2,
    width=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=41,
)
SPECIAL_IDS = (10, 11, 12, 13, 14, 15, 1)
EPS = 0.03


def close(got, expected, small=0.1):
    """Relative to the largest number of each array, if that is not `small` itself."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = max(float(jnp.abs(y).max()), small)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=1e-5)


def with_gradients(function, *args):
    """What a function gives, and its arguments' gradients for random ones of that."""

    def both(*args):
        out, back = jax.vjp(function, *args)
        rng = np.random.default_rng(1)
        return out, back(jax.tree.map(lambda x: floats(rng, *x.shape), out))

    return jax.jit(both)(*args)


def normalised(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


# Rows: less than a tile, more than a task's, more than a gradient sums in registers;
# sizes: below, at and behind a panel's.
@pytest.mark.parametrize("rows", [1, 13, 230, 2100])
@pytest.mark.parametrize("sizes", [(3, 1), (32, 64), (41, 70)])
def test_products(rows, sizes):
    rng = np.random.default_rng(rows)
    x, kernel = floats(rng, rows, sizes[0]), floats(rng, *sizes)
    scale, plus = floats(rng, sizes[0]), floats(rng, rows, sizes[1])
    close(
        with_gradients(
            lambda *args: training.linear(*args, EPS), x, kernel, scale, plus
        ),
        with_gradients(
            lambda x, kernel, scale, plus: normalised(x, scale) @ kernel + plus,
            *(x, kernel, scale, plus),
        ),
    )
    close(
        with_gradients(training.linear, x, kernel),
        with_gradients(jnp.matmul, x, kernel),
    )


@pytest.mark.parametrize("rows", [1, 13, 230])
@pytest.mark.parametrize("sizes", [(3, 1), (32, 64), (41, 70)])
def test_mlp(rows, sizes):
    rng = np.random.default_rng(rows)
    args = (floats(rng, rows, sizes[0]), floats(rng, sizes[0]))
    args += (floats(rng, *sizes), floats(rng, *sizes), floats(rng, *sizes[::-1]))

    def expected(x, scale, gate, up, down):
        h = normalised(x, scale)
        return x + (jax.nn.silu(h @ gate) * (h @ up)) @ down

    close(
        with_gradients(lambda *args: training.mlp(*args, EPS), *args),
        with_gradients(expected, *args),
    )


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("H", [2, 34])
def test_split_heads(H, has_norms):
    rng, (K, R), lead = np.random.default_rng(H), (3, 2), (5, 30)
    qkv = floats(rng, *lead, K, R + 2, H)
    angles = rotary_angles(jnp.asarray(rng.integers(0, 99, lead)), H, 1e4)
    scales = (floats(rng, H), floats(rng, H)) if has_norms else (None, None)

    def expected(qkv, scales):
        q, k = qkv[..., :R, :].reshape(*lead, K * R, H), qkv[..., R, :]
        if has_norms:
            q, k = normalised(q, scales[0]), normalised(k, scales[1])
        return rotate(q, angles), rotate(k, angles), qkv[..., R + 1, :]

    close(
        with_gradients(
            lambda qkv, scales: training.split_heads(qkv, angles, scales, EPS),
            *(qkv, scales),
        ),
        with_gradients(expected, qkv, scales),
    )


def random_labels(rng, B, T):
    """Blocks one after another, with paths in no order; and the main stream."""
    block = np.sort(rng.integers(0, 4, (B, T)), axis=1) * rng.integers(0, 2, (B, T))
    path = np.where(block > 0, rng.integers(1, 4, (B, T)), 0)
    return jnp.asarray(block, jnp.int32), jnp.asarray(path, jnp.int32)


@pytest.mark.parametrize("heads", [(1, 1, 4), (2, 3, 40), (4, 2, 32), (1, 60, 8)])
@pytest.mark.parametrize("T", [2, 96, 203])
def test_attention(T, heads):
    rng, B, (K, R, H) = np.random.default_rng(T), 2, heads
    block, path = random_labels(rng, B, T)
    args = floats(rng, B, T, K * R, H), floats(rng, B, T, K, H), floats(rng, B, T, K, H)
    expected = functools.partial(attention.label_attention, implementation="xla")
    close(
        with_gradients(lambda *x: training.attention(*x, block, path), *args),
        with_gradients(lambda *x: expected(*x, block, path), *args),
    )


@pytest.mark.parametrize("heads", [(1, 1, 4), (4, 2, 32), (1, 60, 8)])
@pytest.mark.parametrize("G, S", [(1, 30), (3, 1), (2, 70), (4, 96)])
def test_attention_of_sequences_that_begin_alike(G, S, heads):
    """Each is as if it stood alone; gradients of what they share add up."""
    rng, rows, T, (K, R, H) = np.random.default_rng(S), 2, 103, heads
    block, path = (
        x.at[:, :S].set(0).astype(jnp.int32) for x in random_labels(rng, rows * G, T)
    )
    args = [floats(rng, rows, S + G * (T - S), n, H) for n in (K * R, K, K)]

    def expected(q, k, v):
        def apart(x):  # [rows · G, T, …]
            first = jnp.repeat(x[:, :S], G, axis=0)
            rest = x[:, S:].reshape(rows * G, T - S, *x.shape[2:])
            return jnp.concatenate([first, rest], axis=1)

        out = attention.label_attention(
            *map(apart, (q, k, v)), block, path, implementation="xla"
        )
        rest = out[:, S:].reshape(rows, -1, *q.shape[2:])
        return jnp.concatenate([out[::G, :S], rest], axis=1)

    close(
        with_gradients(lambda *x: training.attention(*x, block, path, S), *args),
        with_gradients(expected, *args),
    )


def test_siblings_and_the_future_are_not_seen():
    """To the last bit, and their gradients are 0."""
    rng, T = np.random.default_rng(0), 80
    q, k, v = (floats(rng, 1, T, 2, 8) for _ in range(3))
    at = jnp.arange(T)[None]
    block = jnp.where((at >= 10) & (at < 70), 1, 0)
    path = jnp.where(block == 1, jnp.where(at < 40, 1, 2), 0)
    hidden = (at[0] >= 10) & (at[0] < 40)  # from path 2
    hidden |= at[0] > 60  # the future of token 60

    def token_60(k, v):
        return training.attention(q, k, v, block, path)[0, 60]

    other = jnp.where(hidden[None, :, None, None], 100 * floats(rng, 1, T, 2, 8), 0)
    np.testing.assert_array_equal(token_60(k + other, v - other), token_60(k, v))
    gradients = jax.grad(lambda *x: (token_60(*x) ** 2).sum(), (0, 1))(k, v)
    for gradient in gradients:
        moved = np.abs(gradient[0]).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(moved, ~hidden)


def test_far_scores_neither_overflow_nor_vanish():
    rng = np.random.default_rng(0)
    q, k, v = (60 * floats(rng, 1, 50, 1, 8) for _ in range(3))
    zeros = jnp.zeros((1, 50), jnp.int32)
    expected = functools.partial(attention.label_attention, implementation="xla")
    close(
        with_gradients(lambda *x: training.attention(*x, zeros, zeros), q, k, v),
        with_gradients(lambda *x: expected(*x, zeros, zeros), q, k, v),
        small=1000.0,  # nothing but rounding is left of q's and k's gradients
    )
    gate = jnp.array([[-300.0, -90.0, 0.0, 90.0, 300.0]])
    one, ones = jnp.ones((1, 1)), jnp.ones((1, 5))
    mlp = lambda gate: training.mlp(one, one[0], gate, ones, ones.T, 0.0)
    silu = lambda gate: 1 + (jax.nn.silu(gate) @ ones.T)
    close(with_gradients(mlp, gate), with_gradients(silu, gate))


def test_a_row_does_not_depend_on_the_others():
    """To the last bit: what the sampler recorded is what the trainer finds."""
    rng = np.random.default_rng(0)
    x, kernel, scale = floats(rng, 120, 33), floats(rng, 33, 70), floats(rng, 33)
    linear = lambda x: training.linear(x, kernel, scale, None, EPS)
    for some in (slice(0, 1), slice(3, 11), slice(50, 120)):
        np.testing.assert_array_equal(linear(x)[some], linear(x[some]))


def test_decoding_computes_the_same():
    """To the last bit, all but attention, where MLPs are whole vectors wide."""
    rng, (M, D, F), (N, K, H) = np.random.default_rng(0), (9, 33, 80), (4, 2, 8)
    x, scale, kernel = (
        floats(rng, M, D),
        floats(rng, D),
        floats(rng, D, (N + 2 * K) * H),
    )
    o, gate, up = floats(rng, N * H, D), floats(rng, D, F), floats(rng, D, F)
    down, out, scales = (
        floats(rng, F, D),
        floats(rng, M, N * H),
        tuple(floats(rng, 2, H)),
    )
    angles = rotary_angles(jnp.arange(M), H, 1e4)
    pack = decoding.pack

    heads = training.linear(x, kernel, scale, None, EPS).reshape(M, K, -1, H)
    trained = training.split_heads(heads, angles, scales, EPS)
    args = x, scale, pack(kernel), None, angles, scales, EPS
    decoded = decoding.project_heads(*args, heads=(N, K))
    for got, expected in zip(decoded, trained, strict=True):
        np.testing.assert_array_equal(got, expected)

    trained = training.linear(out, o, None, x)
    trained = training.mlp(trained, scale, gate, up, down, EPS)
    matrices = pack(o), decoding.pack_gated(gate, up), pack(down)
    decoded = decoding.finish_layer(x, out, scale, *matrices, EPS)
    np.testing.assert_array_equal(decoded, trained)


# Tokens: less than a task's, more than one; sizes: below, at and behind a panel's.
@pytest.mark.parametrize("sizes", [(3, 19, 5), (60, 64, 32), (130, 157, 41)])
@pytest.mark.parametrize("num_tokens, temperature", [(None, 1.0), (17, 0.6)])
def test_log_probs_are_those_of_the_policy(sizes, num_tokens, temperature):
    (M, V, D), rng = sizes, np.random.default_rng(0)
    hidden, head = floats(rng, M, D), floats(rng, V, D) / D**0.5
    special_ids = (1, 16, V, 0)  # of which one is no token
    bans = jnp.asarray(rng.integers(0, 16, M), jnp.int32).at[0].set(0)
    tokens = jnp.asarray(rng.integers(2, 16, M), jnp.int32)  # none that is banned
    bans = bans.at[2::5].set(1 << ORDINARY | 2)  # all but tokens 0 and 1 are
    tokens = tokens.at[2::5].set(1)
    policy = special_ids, num_tokens, temperature

    def expected(hidden, head):
        names = ("special_ids", "num_tokens", "temperature")
        options = dict(zip(names, policy))
        logits = hidden @ head.T
        return logps_and_entropies(logits, tokens, bans, **options)

    found = lambda *x: training.token_logps(*x, tokens, bans, *policy)
    got, wanted = (with_gradients(f, hidden, head) for f in (found, expected))
    assert np.ptp(wanted[0][0]) > 1
    close(got, wanted)


def test_banned_tokens_and_far_logits():
    """A banned token's log-prob is that of no token; others take all of the mass."""
    hidden = jnp.array([[1.0], [1.0], [-1.0], [jnp.nan]])
    head = 200.0 * jnp.arange(20.0)[:, None]
    tokens, bans = jnp.array([19, 19, 0, 3]), jnp.array([1, 0, 0, 0])
    logps, entropies = training.token_logps(hidden, head, tokens, bans, (19,))
    assert logps[0] < -1e29 and np.allclose(logps[1:3], 0)
    assert np.allclose(entropies[:3], 0)
    assert np.isnan(logps[3]) and np.isnan(entropies[3])  # not hidden: updates look


def random_params(config):
    """No scale is 1 and no bias 0, as they are at the start."""
    rng = np.random.default_rng(0)
    params = unbox(init_params(config, jax.random.key(0)))
    draw = lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(draw, params)


def random_batch(micro_batches=2, B=3, T=30):
    rng = np.random.default_rng(0)
    shape = (micro_batches, B, T)
    block, path = random_labels(rng, micro_batches * B, T)
    trained = np.broadcast_to(np.arange(T) >= 5, shape)
    return Batch(
        tokens=jnp.asarray(rng.integers(0, 10, shape), jnp.int32),
        positions=jnp.asarray(rng.integers(0, 50, shape), jnp.int32),
        block=block.reshape(shape),
        path=path.reshape(shape),
        bans=jnp.zeros(shape, jnp.int32),
        loss_mask=jnp.asarray(trained),
        old_logps=jnp.where(trained, floats(rng, *shape) * 0.1 - 3, 0),
        advantages=floats(rng, micro_batches, B),
        shared=jnp.zeros((micro_batches, B), jnp.int32),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},  # Qwen3
        {"qk_norm": False, "qkv_bias": True, "rope_scaling": YARN},  # Qwen2
        {"qk_norm": False, "num_kv_heads": 6, "tie_embeddings": False},  # Llama
        {"param_dtype": "bfloat16"},
        {"scan_layers": True},
        {"remat": True},
        {"scan_layers": True, "remat": True, "remat_policy": "dots"},
    ],
    ids=str,
)
def test_log_probs_and_gradients_are_those_of_xla(changes):
    assert_as_xla(changes)


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.6, "num_tokens": 22, "logits_chunk": 7},
    ],
    ids=str,
)
def test_policies_are_those_of_xla(limits):
    assert_as_xla({"num_layers": 1}, **limits)


def assert_as_xla(changes, **limits):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config)
    batch = jax.tree.map(lambda x: x[0], random_batch())
    policy = PolicySettings(
        special_ids=SPECIAL_IDS, max_trained=25, group_rows=3, **limits
    )
    batch = jax.tree.map(
        lambda x: x.at[:, :5].set(x[:1, :5]) if x.ndim > 1 else x, batch
    )

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def found(backend, params, shared):
        def loss(params):
            logps, entropies = policy_logps(backend, params, batch, policy, shared)
            return (
                logps * jnp.sin(jnp.arange(logps.size).reshape(logps.shape))
            ).sum(), (
                logps,
                entropies,
            )

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return out, jax.tree.map(lambda x: x.astype(jnp.float32), gradients)

    # The kernels compute the group's prompt once, XLA with each row.
    (out, gradients), (expected, wanted) = (
        found(backend(config), params, shared)
        for backend, shared in ((Cpu, 5), (Xla, 0))
    )
    close(out, expected)
    if config.param_dtype == "bfloat16":  # of which XLA rounds sums of parts
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-2 * jnp.abs(y).max())
    else:
        close(gradients, wanted)


@functools.cache
def update(backend):
    optimizer = make_optimizer(
        # A large eps: Adam's first step would else be the sign of rounding errors.
        OptimizerSettings(lr=1e-2, steps=10, eps=1e-3)
    )
    params = random_params(CONFIG)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    grpo_update = functools.partial(
        update_grpo_update,
        backend=backend(CONFIG),
        optimizer=optimizer,
        policy=PolicySettings(special_ids=SPECIAL_IDS, lengths=(20, 26)),
        grpo=GrpoSettings(),
    )
    return jax.jit(grpo_update), state


def test_an_update_is_xla_s_and_always_the_same():
    batch = random_batch()
    # One micro-batch is cut: of the lengths one is run.
    cut = batch.loss_mask.at[1, :, 18:].set(False)
    batch = batch.replace(loss_mask=cut)
    apply, state = update(Cpu)
    once, metrics = apply(state, batch)
    again, _ = apply(state, batch)
    jax.tree.map(np.testing.assert_array_equal, once, again)
    expected, others = update(Xla)[0](state, batch)
    close(once.params, expected.params)
    close(metrics, others)
