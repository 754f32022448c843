"""The forward pass in C++ kernels."""

import jax
import jax.numpy as jnp

from pr1_jax.kernels.cpu import decoding, training
from pr1_jax.model.config import REMAT_POLICIES, ModelConfig
from pr1_jax.model.layers import RMSNorm, rotary_angles
from pr1_jax.model.params import compute_params, fuse_heads


def pack_matrices(config: ModelConfig, params):
    """Parameters of unstacked, fused layers as `forward` has them of a packed config."""
    D, N, H = config.width, config.num_heads, config.head_dim
    sizes_in = {"qkv": D, "o": N * H, "down": config.mlp_width}

    def layer(tree):
        packed = {
            name: tree[name]
            | {"kernel": decoding.pack(tree[name]["kernel"].reshape(size, -1))}
            for name, size in sizes_in.items()
        }
        gate, up = jnp.unstack(tree["gate_up"]["kernel"], axis=1)
        packed["gate_up"] = {"kernel": decoding.pack_gated(gate, up)}
        return tree | packed

    head = decoding.pack(params.get("head", params["embedding"]).T)
    is_layer = lambda name: name.startswith("layer_")
    layers = {name: layer(tree) for name, tree in params.items() if is_layer(name)}
    return params | layers | {"head": head}


def packed_forward(c: ModelConfig, params, tokens, positions, attend, cache, live):
    """What `Decoder` computes, in two operations a layer and attention between them."""
    scale = lambda norm: norm["scale"].astype(jnp.float32)

    x = jnp.take(params["embedding"], tokens, axis=0)
    angles = rotary_angles(positions, c.head_dim, c.rope_base)
    new_cache = []
    for i, entry in enumerate(cache or (None,) * c.num_layers):
        layer = params[f"layer_{i}"]
        norms = ("q_norm", "k_norm") if c.qk_norm else ()
        q, k, v = decoding.project_heads(
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
        x = decoding.finish_layer(x, out, mlp_scale, *matrices, c.rms_eps, live=live)
    final_norm = RMSNorm(c.rms_eps, "embed", c.param_dtype)
    return final_norm.apply({"params": params["final_norm"]}, x), tuple(new_cache)


def training_forward(c: ModelConfig, params, tokens, positions, attend):
    """What `Decoder` computes, in operations of `cpu_training`; keeps no cache.

    Their products are none to `jax.checkpoint`: with `remat`, all policies keep nothing.
    """
    D, K, H = c.width, c.num_kv_heads, c.head_dim

    def layer(x, tree):
        tree = compute_params(c, tree)
        scale = lambda name: tree[name]["scale"].astype(jnp.float32)
        qkv = fuse_heads(c, tree["q"], tree["k"], tree["v"])
        kernel = qkv["kernel"].reshape(D, -1)
        heads = training.linear(x, kernel, scale("attn_norm"), None, c.rms_eps)
        heads = heads.reshape(*tokens.shape, K, -1, H)
        if c.qkv_bias:
            heads = heads + qkv["bias"]
        names = ("q_norm", "k_norm")
        scales = tuple(scale(name) if c.qk_norm else None for name in names)
        q, k, v = training.split_heads(heads, angles, scales, c.rms_eps)
        out, _ = attend(q, k, v, None)
        kernel = tree["o"]["kernel"].reshape(-1, D)
        x = training.linear(out.reshape(len(x), -1), kernel, None, x)
        matrices = (tree[name]["kernel"] for name in ("gate", "up", "down"))
        return training.mlp(x, scale("mlp_norm"), *matrices, c.rms_eps)

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
