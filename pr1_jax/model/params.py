"""Parameters: random ones, and the forms that they take for decoding."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pr1_jax.model.config import ModelConfig
from pr1_jax.model.decoder import Decoder
from pr1_jax.system.mesh import RULES


def init_params(config: ModelConfig, key: jax.Array):
    """Random parameters, boxed with their logical axis names (`nn.unbox` strips them).

    Shapes do not depend on the input, so a single token is traced.
    """
    token = jnp.zeros((1, 1), jnp.int32)
    attend = lambda q, k, v, cache: (q, cache)
    return Decoder(config).init(key, token, token, attend)["params"]


def compute_params(config: ModelConfig, params):
    """Parameters in the dtype that the forward pass computes with.

    It casts matrices and biases wherever it uses them, so casting them once before a
    loop of many passes changes no value. Norm scales are used in their own dtype.
    """
    cast = lambda path, x: x if path[-1].key == "scale" else x.astype(config.dtype)
    return jax.tree_util.tree_map_with_path(cast, params)


def fuse_projections(config: ModelConfig, layer):
    """A layer's parameters with `fused`: one product each for q, k, v and gate, up.

    Heads are grouped by key/value head, so that no head, and no part of the MLP,
    changes its shard.
    """
    names = ("q", "k", "v", "gate", "up")
    q, k, v, gate, up = (layer[name] for name in names)
    rest = {name: value for name, value in layer.items() if name not in names}
    both = jax.tree.map(lambda *x: jnp.stack(x, axis=-2), gate, up)
    return rest | {"qkv": fuse_heads(config, q, k, v), "gate_up": both}


def fuse_heads(config: ModelConfig, *qkv):
    """Trees of [..., heads, H] for q, k, v as one of [..., K, R + 2, H]."""
    K, H = config.num_kv_heads, config.head_dim

    def fuse(q, k, v):
        q = q.reshape(*q.shape[:-2], K, -1, H)
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    return jax.tree.map(fuse, *qkv)


def unbox(params):
    """Parameters without their logical axis names."""
    return nn.unbox(params)


def param_count(params) -> int:
    """Number of parameters in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))


def param_shardings(
    config: ModelConfig,
    mesh: Mesh,
    rules: Mapping[str, str | Sequence[str] | None] = RULES,
):
    """A NamedSharding for every parameter, from its logical names."""
    boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def place(box):
        names = zip(box.names, box.value.shape)
        spec = [_fitting(rules.get(name), size, mesh) for name, size in names]
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(place, boxed, is_leaf=is_box)


def _fitting(axis: str | None, size: int, mesh: Mesh) -> str | None:
    return axis if axis and size % mesh.shape[axis] == 0 else None
