"""Decoder-only transformer for Qwen3, Qwen2 and Llama by configuration (spec 9).

One forward pass serves training, prefill and decoding: attention is a function that
the caller hands in, so what a token may see, and where keys and values are kept, is
decided outside. On CPU, `_packed_forward` computes the same in kernels for prefill and
decoding, and `_training_forward` for updates. Axis letters, used in docstrings, comments and einsums throughout:

  B sequences, T tokens, S key/value slots, D width, N query heads, K key/value heads,
  R = N/K, H head dim, F MLP width, V vocab, L lanes, G responses a prompt, P paths.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from pr1_jax import cpu_kernels, cpu_training, fusion

# What the backward pass of a layer with `remat` finds kept.
REMAT_POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# attend(q [..., N, H], k [..., K, H], v [..., K, H], cache) -> (out [..., N, H], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


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
    rms_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = False  # one compiled layer, parameters stacked on axis 0
    remat: bool = False  # recompute each layer in the backward pass
    remat_policy: str = "nothing"  # what of it is kept all the same
    fused: bool = False  # parameters as `fuse_projections` makes them, for decoding
    cpu_kernels: bool = False  # of `cpu_training`, or with `fused` of `cpu_kernels`

    @property
    def packed(self) -> bool:
        """Whether matrices are in the form that `cpu_kernels.project` reads."""
        return self.fused and self.cpu_kernels

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


def forward(
    config: ModelConfig, params, tokens, positions, attend, cache=None, *, live=None
):
    """`Decoder.__call__` as a pure function of unboxed parameters.

    Args:
      live: scalar int32, tokens that are wanted, the first ones: packed parameters save
        the others. None = all.
    """
    if config.packed:
        return _packed_forward(config, params, tokens, positions, attend, cache, live)
    if config.cpu_kernels:
        return _training_forward(config, params, tokens, positions, attend), None
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
        return cpu_kernels.project(hidden, matrix, size, live=live)
    return jnp.einsum(
        "...D,VD->...V", hidden, matrix, preferred_element_type=jnp.float32
    )


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
    return rest | {"qkv": _fuse_heads(config, q, k, v), "gate_up": both}


def _fuse_heads(config: ModelConfig, *qkv):
    """Trees of [..., heads, H] for q, k, v as one of [..., K, R + 2, H]."""
    K, H = config.num_kv_heads, config.head_dim

    def fuse(q, k, v):
        q = q.reshape(*q.shape[:-2], K, -1, H)
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    return jax.tree.map(fuse, *qkv)


# --- In the kernels of `cpu_kernels` and `cpu_training` ------------------------------


def with_kernels(
    config: ModelConfig,
    kernels: str = "auto",
    mesh: Mesh | None = None,
    *,
    training: bool = False,
) -> ModelConfig:
    """The config for a sampler, or for updates, on a mesh or on JAX's default device.

    Args:
      kernels: of `cpu_kernels.IMPLEMENTATIONS`; `auto` takes `cpu` where it runs.
      training: for updates, whose kernels run on one device alone.

    Raises:
      ValueError: `cpu` cannot run here, and why.
    """
    if kernels == "xla":
        return config
    if training and mesh is not None and mesh.size > 1:
        reason = f"the mesh has {mesh.size} devices"
    elif mesh is not None and mesh.shape["tensor"] > 1:
        reason = f"mesh.tensor={mesh.shape['tensor']} splits heads"
    elif mesh is not None and (platform := mesh.devices.flat[0].platform) != "cpu":
        reason = f"the device is a {platform}"
    else:
        reason = cpu_kernels.why_not(config.dtype)
    if reason and kernels == "cpu":
        field = "model.kernels" if training else "rollout.kernels"
        raise ValueError(f"{field}=cpu: {reason}")
    if reason:
        what = "compute updates" if training else "decode"
        logging.info("XLA's kernels %s: %s", what, reason)
    return dataclasses.replace(config, cpu_kernels=not reason)


def pack_matrices(config: ModelConfig, params):
    """Parameters of unstacked, fused layers as `forward` has them of a packed config."""
    D, N, H = config.width, config.num_heads, config.head_dim
    sizes_in = {"qkv": D, "o": N * H, "down": config.mlp_width}

    def layer(tree):
        packed = {
            name: tree[name]
            | {"kernel": cpu_kernels.pack(tree[name]["kernel"].reshape(size, -1))}
            for name, size in sizes_in.items()
        }
        gate, up = jnp.unstack(tree["gate_up"]["kernel"], axis=1)
        packed["gate_up"] = {"kernel": cpu_kernels.pack_gated(gate, up)}
        return tree | packed

    head = cpu_kernels.pack(params.get("head", params["embedding"]).T)
    is_layer = lambda name: name.startswith("layer_")
    layers = {name: layer(tree) for name, tree in params.items() if is_layer(name)}
    return params | layers | {"head": head}


def _packed_forward(c: ModelConfig, params, tokens, positions, attend, cache, live):
    """What `Decoder` computes, in two operations a layer and attention between them."""
    scale = lambda norm: norm["scale"].astype(jnp.float32)

    x = jnp.take(params["embedding"], tokens, axis=0)
    angles = rotary_angles(positions, c.head_dim, c.rope_base)
    new_cache = []
    for i, entry in enumerate(cache or (None,) * c.num_layers):
        layer = params[f"layer_{i}"]
        norms = ("q_norm", "k_norm") if c.qk_norm else ()
        q, k, v = cpu_kernels.project_heads(
            *(x, scale(layer["attn_norm"]), layer["qkv"]["kernel"]),
            *(layer["qkv"].get("bias"), angles),
            [scale(layer[norm]) for norm in norms] or (None, None),
            c.rms_eps,
            heads=(c.num_heads, c.num_kv_heads),
            live=live,
        )
        out, entry = attend(q, k, v, entry)
        new_cache.append(entry)
        matrices = (layer[name]["kernel"] for name in ("o", "gate_up", "down"))
        mlp_scale = scale(layer["mlp_norm"])
        x = cpu_kernels.finish_layer(x, out, mlp_scale, *matrices, c.rms_eps, live=live)
    final_norm = RMSNorm(c.rms_eps, "embed", c.param_dtype)
    return final_norm.apply({"params": params["final_norm"]}, x), tuple(new_cache)


def _training_forward(c: ModelConfig, params, tokens, positions, attend):
    """What `Decoder` computes, in operations of `cpu_training`; keeps no cache.

    Their products are none to `jax.checkpoint`: with `remat`, all policies keep nothing.
    """
    D, K, H = c.width, c.num_kv_heads, c.head_dim

    def layer(x, tree):
        tree = compute_params(c, tree)
        scale = lambda name: tree[name]["scale"].astype(jnp.float32)
        qkv = _fuse_heads(c, tree["q"], tree["k"], tree["v"])
        kernel = qkv["kernel"].reshape(D, -1)
        heads = cpu_training.linear(x, kernel, scale("attn_norm"), None, c.rms_eps)
        heads = heads.reshape(*tokens.shape, K, -1, H)
        if c.qkv_bias:
            heads = heads + qkv["bias"]
        names = ("q_norm", "k_norm")
        scales = tuple(scale(name) if c.qk_norm else None for name in names)
        q, k, v = cpu_training.split_heads(heads, angles, scales, c.rms_eps)
        out, _ = attend(q, k, v, None)
        kernel = tree["o"]["kernel"].reshape(-1, D)
        x = cpu_training.linear(out.reshape(len(x), -1), kernel, None, x)
        matrices = (tree[name]["kernel"] for name in ("gate", "up", "down"))
        return cpu_training.mlp(x, scale("mlp_norm"), *matrices, c.rms_eps)

    if c.remat:
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat_policy])
    x = jnp.take(params["embedding"], tokens.reshape(-1), axis=0).astype(c.dtype)
    angles = rotary_angles(positions, H, c.rope_base)
    if c.scan_layers:
        x, _ = jax.lax.scan(lambda x, tree: (layer(x, tree), None), x, params["layers"])
    else:
        for i in range(c.num_layers):
            x = layer(x, params[f"layer_{i}"])
    final_norm = RMSNorm(c.rms_eps, "embed", c.param_dtype)
    x = final_norm.apply({"params": params["final_norm"]}, x)
    return x.reshape(*tokens.shape, D)


def unbox(params):
    """Parameters without their logical axis names."""
    return nn.unbox(params)


def param_count(params) -> int:
    """Number of parameters in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))
