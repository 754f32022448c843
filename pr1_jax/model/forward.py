"""The forward pass, as a pure function of unboxed parameters."""

import jax.numpy as jnp

from pr1_jax.kernels.cpu import decoding
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.cpu import packed_forward, training_forward
from pr1_jax.model.decoder import Decoder


def forward(
    config: ModelConfig, params, tokens, positions, attend, cache=None, *, live=None
):
    """`Decoder.__call__` as a pure function of unboxed parameters.

    Args:
      live: scalar int32, tokens that are wanted, the first ones: packed parameters save
        the others. None = all.
    """
    if config.packed:
        return packed_forward(config, params, tokens, positions, attend, cache, live)
    if config.cpu_kernels:
        return training_forward(config, params, tokens, positions, attend), None
    variables = {"params": params}
    return Decoder(config).apply(variables, tokens, positions, attend, cache)


def head(params):
    """The matrix that makes logits, [V, D] unless it is packed."""
    return params.get("head", params["embedding"])


def logits(params, hidden, live=None):
    """Logits [..., V] float32 of final hidden states [..., D]; `live` as of `forward`."""
    matrix = head(params).astype(hidden.dtype)
    if matrix.ndim == 3:  # packed
        size = params["embedding"].shape[0]
        return decoding.project(hidden, matrix, size, live=live)
    return jnp.einsum(
        "...D,VD->...V", hidden, matrix, preferred_element_type=jnp.float32
    )
