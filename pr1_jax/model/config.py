"""Shape and numerics of a decoder."""

import dataclasses

import jax

from pr1_jax.kernels.pallas import KEPT
from pr1_jax.model.rope import Scaling

_ATTENTION = jax.checkpoint_policies.save_only_these_names(KEPT)

# What is kept of a layer with `remat` for its backward pass: each more than the last.
REMAT_POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "attention": _ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _ATTENTION, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder. `dtype` is of activations, in `jnp` names."""

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    tie_embeddings: bool = True
    qk_norm: bool = True  # Qwen3
    qkv_bias: bool = False  # Qwen2
    rope_base: float = 1e6
    rope_scaling: Scaling | None = None
    rms_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = False  # one compiled layer, parameters stacked on axis 0
    remat: bool = False  # recompute each layer in the backward pass
    remat_policy: str = "nothing"  # of `REMAT_POLICIES`
    attention: str = "auto"  # of training: `kernels.attention.IMPLEMENTATIONS`
    query_chunk: int = 512  # queries whose scores it holds at once

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"model.{field.name}={value} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even")
