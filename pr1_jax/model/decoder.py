"""Decoder-only transformer for Qwen3, Qwen2 and Llama by configuration (spec 9).

One forward pass serves training, prefill and decoding: attention is a function that
the caller hands in, so what a token may see, and where keys and values are kept, is
decided outside. On CPU, `_packed_forward` computes the same in kernels for prefill and
decoding, and `_training_forward` for updates. Axis letters, used in docstrings, comments and einsums throughout:

  B sequences, T tokens, S key/value slots, D width, N query heads, K key/value heads,
  R = N/K, H head dim, F MLP width, V vocab, L lanes, G responses a prompt, P paths.
"""

import flax.linen as nn
import jax.numpy as jnp

from pr1_jax.kernels import fusion
from pr1_jax.model.config import REMAT_POLICIES, ModelConfig
from pr1_jax.model.layers import Attend, Layer, RMSNorm, rotary_angles


class Decoder(nn.Module):
    """Tokens to final hidden states; `logits` maps those on.

    `cache` is any pytree that `attend` understands, one entry a layer: a tuple, or,
    with `scan_layers`, arrays stacked on axis 0. None where no cache is kept.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, positions, attend: Attend, cache=None):
        """Runs all layers.

        Args:
          tokens: [...] int32. positions: [...] int32, rotary positions.
          attend: see `Attend`. cache: one entry a layer, or None.

        Returns:
          hidden [..., D] after the final norm, and the new cache.
        """
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), ("vocab", "embed")
        )
        shape = (c.vocab_size, c.width)
        embedding = self.param("embedding", init, shape, c.param_dtype)
        if not c.tie_embeddings:  # used by `logits`
            self.param("head", init, shape, c.param_dtype)
        x = jnp.take(embedding, tokens, axis=0).astype(c.dtype)
        angles = fusion.made_once(
            lambda positions: rotary_angles(positions, c.head_dim, c.rope_base),
            positions,
        )
        layer = Layer
        if c.remat:
            policy = REMAT_POLICIES[c.remat_policy]
            layer = nn.remat(Layer, prevent_cse=not c.scan_layers, policy=policy)
        if c.scan_layers:
            layer = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                out_axes=0,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, cache = layer(c, attend, name="layers")(x, angles, cache)
        else:
            entries = cache or (None,) * c.num_layers
            cache = []
            for i, entry in enumerate(entries):
                x, entry = layer(c, attend, name=f"layer_{i}")(x, angles, entry)
                cache.append(entry)
            cache = tuple(cache)
        return RMSNorm(c.rms_eps, "embed", c.param_dtype, name="final_norm")(x), cache
