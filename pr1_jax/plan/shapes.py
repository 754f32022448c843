"""Shapes of published models, so that a plan needs neither weights nor a tokenizer."""

from typing import Any

from pr1_jax.model.config import ModelConfig
from pr1_jax.tags import PLAIN, Grammar

# config.json of the hub, and how many tokens the tokenizer has.
_QWEN3 = {
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "tie_embeddings": True,
    "qk_norm": True,
    "rope_base": 1e6,
    "rms_eps": 1e-6,
}
_QWEN3_TOKENS = 151669


def _qwen3(layers: int, width: int, heads: int, mlp: int, **rest: Any):
    shape = {"num_layers": layers, "width": width, "num_heads": heads}
    return _QWEN3 | shape | {"mlp_width": mlp} | rest, _QWEN3_TOKENS


_SIZES = {
    "0.6B": _qwen3(28, 1024, 16, 3072),
    "1.7B": _qwen3(28, 2048, 16, 6144),
    "4B": _qwen3(36, 2560, 32, 9728),
    "8B": _qwen3(36, 4096, 32, 12288, tie_embeddings=False),
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "num_layers": 30,
    "width": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "mlp_width": 1536,
    "tie_embeddings": True,
    "qk_norm": False,
    "rope_base": 1e5,
    "rms_eps": 1e-5,
}
PUBLISHED = {
    "Parallel-R1/Qwen3-4B-Base-add-special-token": _SIZES["4B"],
    **{
        f"Qwen/Qwen3-{size}{kind}": shape
        for size, shape in _SIZES.items()
        for kind in ("", "-Base")
    },
    "HuggingFaceTB/SmolLM2-135M": (_SMOLLM2, 49152),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (_SMOLLM2, 49152),
}


def published(
    name: str, grammar: Grammar = PLAIN, **numerics: Any
) -> tuple[ModelConfig, int]:
    """The shape of a published model, and the tokens that it can write.

    Tags get the ids behind the tokenizer's own; the embeddings grow where they have no
    rows left for them.

    Args:
      grammar: of responses, whose tags are counted.
      numerics: fields of `ModelConfig` that no model's folder says.

    Raises:
      ValueError: `name`, which is `model.path`, is no folder and not in `PUBLISHED`.
    """
    if name not in PUBLISHED:
        raise ValueError(
            f"model.path={name} is no folder, nor a model whose shape is known: "
            f"{', '.join(PUBLISHED)}"
        )
    fields, tokens = PUBLISHED[name]
    tokens += len(grammar.tags)
    fields = fields | {"vocab_size": max(fields["vocab_size"], tokens)}
    return ModelConfig(**fields, **numerics), tokens
