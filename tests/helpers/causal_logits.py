"""Logits of plain causal attention, to compare with those of `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.kernels import attention
from pr1_jax.model.forward import forward
from pr1_jax.model.xla import Xla


def compute(config, params, tokens) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T]."""
    return np.asarray(_compute(config, params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _compute(config, params, tokens):
    zeros = jnp.zeros(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = lambda q, k, v, cache: (
        attention.label_attention(q, k, v, zeros, zeros),
        cache,
    )
    hidden, _ = forward(Xla(config), params, tokens, positions, attend)
    return Xla(config).logits(params, hidden)
