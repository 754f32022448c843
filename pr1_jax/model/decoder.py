"""The parameters of a decoder-only transformer: Qwen3, Qwen2 and Llama by configuration.

The modules here declare names, shapes, logical axes and initialisers, and nothing else:
`forward` computes, in terms of a backend. The models are those of docs/method.md,
section 9. Axis letters, used in docstrings, comments and einsums throughout:

  B sequences, T tokens, S key/value slots, D width, N query heads, K key/value heads,
  R = N/K, H head dim, F MLP width, V vocab, L lanes, G responses a prompt, P paths.
"""

import flax.linen as nn

from pr1_jax.model.config import ModelConfig


class Decoder(nn.Module):
    """All parameters of a model."""

    config: ModelConfig

    @nn.compact
    def __call__(self):
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), ("vocab", "embed")
        )
        shape = (c.vocab_size, c.width)
        self.param("embedding", init, shape, c.param_dtype)
        if not c.tie_embeddings:
            self.param("head", init, shape, c.param_dtype)
        if c.scan_layers:  # stacked on axis 0
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            stack(c, name="layers")(None)
        else:
            for i in range(c.num_layers):
                Layer(c, name=f"layer_{i}")(None)
        Norm("embed", c.width, c.param_dtype, name="final_norm")()


class Layer(nn.Module):
    """Parameters of pre-norm attention and SwiGLU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry):
        c = self.config
        D, N, K, H, F = c.width, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_width
        # What a layer adds starts small against what it reads, at any depth.
        small = (2 * c.num_layers) ** -2.0
        heads, kv_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")

        def project(name, in_axes, out_axes, *shape, **options):
            Projection(in_axes, out_axes, shape, c.param_dtype, name=name, **options)()

        Norm("embed", D, c.param_dtype, name="attn_norm")()
        project("q", ("embed",), heads, D, N, H, has_bias=c.qkv_bias)
        project("k", ("embed",), kv_heads, D, K, H, has_bias=c.qkv_bias)
        project("v", ("embed",), kv_heads, D, K, H, has_bias=c.qkv_bias)
        if c.qk_norm:
            Norm("head_dim", H, c.param_dtype, name="q_norm")()
            Norm("head_dim", H, c.param_dtype, name="k_norm")()
        project("o", heads, ("embed",), N, H, D, variance=small)
        Norm("embed", D, c.param_dtype, name="mlp_norm")()
        project("gate", ("embed",), ("mlp",), D, F)
        project("up", ("embed",), ("mlp",), D, F)
        project("down", ("mlp",), ("embed",), F, D, variance=small)
        return carry, None


class Norm(nn.Module):
    """The scale of an RMS norm over an axis with a logical name."""

    axis: str
    size: int
    param_dtype: str

    @nn.compact
    def __call__(self):
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        self.param("scale", init, (self.size,), self.param_dtype)


class Projection(nn.Module):
    """A linear map between axes with logical names, `shape` being those of both."""

    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    shape: tuple[int, ...]
    param_dtype: str
    has_bias: bool = False
    variance: float = 1.0  # of the output at the start, for inputs of variance 1

    @nn.compact
    def __call__(self):
        axes, num_in = self.in_axes + self.out_axes, len(self.in_axes)
        init = nn.initializers.variance_scaling(
            self.variance,
            "fan_in",
            "normal",
            tuple(range(num_in)),
            tuple(range(num_in, len(axes))),
        )
        init = nn.with_logical_partitioning(init, axes)
        self.param("kernel", init, self.shape, self.param_dtype)
        if self.has_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.out_axes)
            self.param("bias", init, self.shape[num_in:], self.param_dtype)
