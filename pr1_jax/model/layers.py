"""What the parts of a layer compute, as functions of arrays and parameter trees."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pr1_jax.kernels.pallas import KEPT
from pr1_jax.model.adapters import TRAINED, attach
from pr1_jax.model.rope import Scaling

# attend(q [..., N, H], k [..., K, H], v [..., K, H], cache) -> (out [..., N, H], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def rotary_angles(
    positions, head_dim: int, base: float, scaling: Scaling | None = None
):
    """Sine and cosine [..., H/2] float32 of rotary positions [...] int32.

    Both are multiplied with the scaling's factor of queries and keys, if it has one.
    """
    factor = 1.0
    if scaling is None:
        inv_freq = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    else:
        inv_freq, factor = scaling.frequencies(head_dim, base)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return (sin, cos) if factor == 1.0 else (sin * factor, cos * factor)


def rotate(x, angles):
    """Rotates x [..., heads, H] by `rotary_angles`, halves paired as in HF models."""
    sin, cos = (x[..., None, :] for x in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(out, axis=-1).astype(x.dtype)


def rms_norm(params, x, eps: float):
    """x / rms(x) · scale over the last axis, computed in float32, in x's dtype."""
    with jax.named_scope("norms"):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return (y * params["scale"]).astype(x.dtype)


def kept_rms_norm(params, x, eps: float):
    """`rms_norm`, of which policies of remat keep a number a token: 1 / rms(x).

    A layer that is recomputed then needs no sums over x again.
    """
    with jax.named_scope("norms"):
        return _normed(params["scale"], x, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normed(scale, x, eps):
    return _norm(scale, x, eps)[0]


def _norm(scale, x, eps):
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=-1) + eps)
    inverse = checkpoint_name(inverse, KEPT)
    return (y * inverse[..., None] * scale).astype(x.dtype), (scale, x, inverse)


def _norm_back(eps, residuals, gradient):
    del eps
    scale, x, inverse = residuals
    y = x.astype(jnp.float32) * inverse[..., None]
    gradient = gradient.astype(jnp.float32)
    to_scale = (gradient * y).sum(axis=tuple(range(x.ndim - 1))).astype(scale.dtype)
    gradient *= scale
    shared = jnp.mean(gradient * y, axis=-1, keepdims=True)
    to_x = (gradient - y * shared) * inverse[..., None]
    return to_scale, to_x.astype(x.dtype)


_normed.defvjp(_norm, _norm_back)


def project(params, x, num_in: int = 1):
    """Linear map of the last `num_in` axes of x to the other axes of the kernel.

    Args:
      params: `kernel`, and `bias` if there is one; cast to x's dtype. Perhaps a pair
        that is merged into the kernel (`adapters.merged`).
    """
    kernel = params["kernel"].astype(x.dtype)
    out_shape = kernel.shape[num_in:]
    sizes = math.prod(kernel.shape[:num_in]), math.prod(out_shape)
    # As matrices: gradients of products over several axes are slower on CPU.
    rows = x.reshape(-1, sizes[0])
    y = rows @ kernel.reshape(sizes)
    if TRAINED in params:
        y = attach(y, rows, params[TRAINED])
    y = y.reshape(*x.shape[: x.ndim - num_in], *out_shape)
    return y + params["bias"].astype(y.dtype) if "bias" in params else y
