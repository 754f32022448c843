"""Layers of a decoder."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pr1_jax.model.config import ModelConfig

# attend(q [..., N, H], k [..., K, H], v [..., K, H], cache) -> (out [..., N, H], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def rotary_angles(positions, head_dim: int, base: float):
    """Sine and cosine [..., H/2] float32 of rotary positions [...] int32."""
    inv_freq = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x, angles):
    """Rotates x [..., heads, H] by `rotary_angles`, halves paired as in HF models."""
    sin, cos = (x[..., None, :] for x in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(out, axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in float32."""

    eps: float
    axis: str  # logical name of the normalised axis
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class Projection(nn.Module):
    """Linear map of the last `len(in_shape)` axes to `out_shape`; named axes."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str, ...]
    param_dtype: str
    use_bias: bool = False
    variance: float = 1.0  # of the output at the start, for inputs of variance 1

    @nn.compact
    def __call__(self, x):
        n_in = len(self.in_shape)
        lead = x.shape[: x.ndim - n_in]
        sizes = math.prod(self.in_shape), math.prod(self.out_shape)
        init = nn.initializers.variance_scaling(
            self.variance,
            "fan_in",
            "normal",
            tuple(range(n_in)),
            tuple(range(n_in, len(self.axes))),
        )
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.axes),
            self.in_shape + self.out_shape,
            self.param_dtype,
        ).astype(x.dtype)
        if self.axes[n_in] is None:
            # The axis that is split is not the first one of the output: were they made
            # one, no shard could keep its part of the kernel.
            y = jnp.tensordot(x, kernel, n_in)
        else:
            # As matrices: gradients of products over several axes are slower on CPU.
            y = x.reshape(-1, sizes[0]) @ kernel.reshape(sizes)
            y = y.reshape(*lead, *self.out_shape)
        if not self.use_bias:
            return y
        axes = self.axes[n_in:]
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        bias = self.param("bias", init, self.out_shape, self.param_dtype)
        return y + bias.astype(y.dtype)


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU. x: [..., D]; `cache` is handed to `attend`."""

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(self, x, angles, cache):
        c = self.config
        project = lambda name, *args, **kw: Projection(
            *args, param_dtype=c.param_dtype, name=name, **kw
        )
        norm = lambda name, axis: RMSNorm(c.rms_eps, axis, c.param_dtype, name=name)
        D, N, K, H, F = c.width, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_width

        # What a layer adds starts small against what it reads, at any depth.
        small = (2 * c.num_layers) ** -2.0
        h = norm("attn_norm", "embed")(x)
        bias = c.qkv_bias
        if c.fused:
            axes = ("embed", "kv_heads", None, "head_dim")
            qkv = project("qkv", (D,), (K, N // K + 2, H), axes, use_bias=bias)(h)
            q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
            q = q.reshape(*h.shape[:-1], N, H)
        else:
            axes = ("embed", "heads", "head_dim")
            q = project("q", (D,), (N, H), axes, use_bias=bias)(h)
            axes = ("embed", "kv_heads", "head_dim")
            k = project("k", (D,), (K, H), axes, use_bias=bias)(h)
            v = project("v", (D,), (K, H), axes, use_bias=bias)(h)
        if c.qk_norm:
            q, k = norm("q_norm", "head_dim")(q), norm("k_norm", "head_dim")(k)
        out, cache = self.attend(rotate(q, angles), rotate(k, angles), v, cache)
        x = x + project(
            "o", (N, H), (D,), ("heads", "head_dim", "embed"), variance=small
        )(out)

        h = norm("mlp_norm", "embed")(x)
        if c.fused:
            both = project("gate_up", (D,), (2, F), ("embed", None, "mlp"))(h)
            gate, up = both[..., 0, :], both[..., 1, :]
        else:
            gate = project("gate", (D,), (F,), ("embed", "mlp"))(h)
            up = project("up", (D,), (F,), ("embed", "mlp"))(h)
        down = project("down", (F,), (D,), ("mlp", "embed"), variance=small)
        x = x + down(nn.silu(gate) * up)
        return nn.with_logical_constraint(x, _activation_axes(x)), cache


def _activation_axes(x) -> tuple[str | None, ...]:
    return ("batch",) + (None,) * (x.ndim - 1)
