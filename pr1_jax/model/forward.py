"""The forward pass of training, prefill, decoding and rejoin.

What a layer computes comes from a backend; what a token may see, and where keys and
values are kept, is decided by the `attend` that the caller hands in. Parts have name
scopes, by which a compiled program is read (`plan.schedule`) and profilers group it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pr1_jax.kernels import fusion
from pr1_jax.model import adapters, parallel
from pr1_jax.model.config import REMAT_POLICIES, ModelConfig
from pr1_jax.model.layers import Attend, rms_norm, rotary_angles
from pr1_jax.model.xla import Xla


def forward(
    backend: Xla,
    params,
    tokens,
    positions,
    attend: Attend,
    cache=None,
    *,
    live: jax.Array | None = None,
):
    """Final hidden states of tokens; `backend.logits` maps those on.

    Args:
      params: unboxed parameters, as they are trained or of `backend.prepare`; of a
        policy with adapters, its rows merged already (`adapters.with_rows`).
      tokens: [...] int32. positions: [...] int32, rotary positions.
      attend: as `layers.Attend` says.
      cache: any pytree that `attend` understands, one entry a layer: a tuple, or arrays
        stacked on axis 0 where layers are. None where no cache is kept, as in training;
        layers are then recomputed in the backward pass if the config says so.
      live: scalar int32, how many tokens, the first ones, are wanted; a backend may
        leave out the others. None: all.

    Returns:
      hidden [..., D] after the final norm, and the new cache.
    """
    c = backend.config
    x = jnp.take(params["embedding"], tokens, axis=0).astype(c.dtype)
    angles = fusion.made_once(
        lambda positions: rotary_angles(
            positions, c.head_dim, c.rope_base, c.rope_scaling
        ),
        positions,
    )

    def layer(x, params, cache):
        params = adapters.merged(params, apart=backend.adapters_apart)
        out, cache = backend.attend_heads(params, x, angles, attend, cache, live)
        with jax.named_scope("projections"):
            x = backend.finish_layer(params, x, out, live)
        return _placed(c, x), cache

    x = _placed(c, x)
    is_stacked = "layers" in params
    if c.remat and cache is None:
        policy = REMAT_POLICIES[c.remat_policy]
        layer = jax.checkpoint(layer, prevent_cse=not is_stacked, policy=policy)
    if is_stacked:
        one = lambda x, inputs: layer(x, *inputs)
        x, cache = jax.lax.scan(one, x, (params["layers"], cache))
    else:
        entries, cache = cache or (None,) * c.num_layers, []
        for i, entry in enumerate(entries):
            x, entry = layer(x, params[f"layer_{i}"], entry)
            cache.append(entry)
        cache = tuple(cache)
    return rms_norm(params["final_norm"], x, c.rms_eps), cache


def _placed(config: ModelConfig, x: jax.Array) -> jax.Array:
    """Activations [B, …, D] between layers, split over the mesh if there is one."""
    if parallel.splits_lengths(config, x):
        return parallel.by_length(x)
    return nn.with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))
