"""Parameters: random ones, their shardings, and the forms that they take for decoding."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pr1_jax.model.config import ModelConfig
from pr1_jax.model.decoder import Decoder
from pr1_jax.system.mesh import RULES

Rules = Mapping[str, str | Sequence[str] | None]


def init_params(config: ModelConfig, key: jax.Array):
    """Random parameters, boxed with their logical axis names (`nn.unbox` strips them)."""
    return Decoder(config).init(key)["params"]


@functools.lru_cache(maxsize=32)
def abstract_params(config: ModelConfig):
    """Shapes and dtypes of parameters, boxed as those of `init_params`.

    They are kept, since they are asked for often, and tracing a model takes long.
    """
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def unbox(params):
    """Parameters without their logical axis names."""
    return nn.unbox(params)


def param_count(params) -> int:
    """Number of parameters in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))


def compute_params(config: ModelConfig, params):
    """Parameters in the dtype that the forward pass computes with.

    It casts matrices and biases wherever it uses them, so casting them once before a
    loop of many passes changes no value. Norm scales, and adapters, are used in their own
    dtype.
    """
    own = ("scale", "a", "b")
    name = lambda last: last.key if hasattr(last, "key") else last.name
    cast = lambda path, x: x if name(path[-1]) in own else x.astype(config.dtype)
    return jax.tree_util.tree_map_with_path(cast, params)


# --- Fused, for decoding ------------------------------------------------------------

_FUSED = ("q", "k", "v", "gate", "up")


def unstack_layers(config: ModelConfig, params):
    """Parameters whose layers are apart, `layer_0` and so on, if they are stacked."""
    if not config.scan_layers:
        return params
    params = dict(params)
    stacked = params.pop("layers")
    for i in range(config.num_layers):
        params[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
    return params


def fuse_projections(config: ModelConfig, layer):
    """A layer's parameters with one product each for q, k, v and for gate, up.

    Heads are grouped by key/value head, so that no head, and no part of the MLP,
    changes its shard.

    Returns:
      The layer with `qkv`, [D, K, R + 2, H], and `gate_up`, [D, 2, F].
    """
    q, k, v, gate, up = (layer[name] for name in _FUSED)
    rest = {name: value for name, value in layer.items() if name not in _FUSED}
    both = jax.tree.map(lambda *x: jnp.stack(x, axis=-2), gate, up)
    return rest | {"qkv": fuse_heads(config, q, k, v), "gate_up": both}


def fuse_heads(config: ModelConfig, *qkv):
    """Trees of [..., heads, H] for q, k, v as one of [..., K, R + 2, H]."""
    K, H = config.num_kv_heads, config.head_dim

    def fuse(q, k, v):
        q = q.reshape(*q.shape[:-2], K, -1, H)
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    return jax.tree.map(fuse, *qkv)


def head_of(params) -> jax.Array:
    """The matrix [V, D] that maps hidden states to logits; packed, if parameters are."""
    return params["head"] if "head" in params else params["embedding"]


# --- Shardings ----------------------------------------------------------------------


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Rules = RULES):
    """A NamedSharding for every parameter, from its logical names."""
    return boxed_shardings(abstract_params(config), mesh, rules)


def boxed_shardings(boxed, mesh: Mesh, rules: Rules = RULES):
    """A NamedSharding for every array of a tree that is boxed with logical names."""

    def sharding(box):
        names = zip(box.names, box.value.shape)
        spec = [_fitting(rules[name], size, mesh) for name, size in names]
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(sharding, boxed, is_leaf=is_box)


def _fitting(axis: str | None, size: int, mesh: Mesh) -> str | None:
    return axis if axis and size % mesh.shape[axis] == 0 else None


def fused_shardings(config: ModelConfig, mesh: Mesh, rules: Rules):
    """A NamedSharding for every parameter of `unstack_layers` and `fuse_projections`."""
    plain = dataclasses.replace(config, scan_layers=False)
    shardings = param_shardings(plain, mesh, rules)

    def fused(sharding):  # what is joined lies on a new axis before the last, and whole
        *first, last = sharding.spec
        return NamedSharding(mesh, PartitionSpec(*first, None, last))

    for name, layer in shardings.items():
        if name.startswith("layer_"):
            rest = {n: x for n, x in layer.items() if n not in _FUSED}
            both = {"qkv": layer["k"], "gate_up": layer["gate"]}
            shardings[name] = rest | jax.tree.map(fused, both)
    return shardings
