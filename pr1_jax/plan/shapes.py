"""Shapes of published models, so that a plan needs neither weights nor a tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_collections

from pr1_jax import tags
from pr1_jax.data import tokenizer_files
from pr1_jax.huggingface.config import read_config
from pr1_jax.model.config import ModelConfig

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


def model_shape(config: ml_collections.ConfigDict) -> tuple[ModelConfig, int]:
    """The model of a config with `model.path`, and the tokens that it can write.

    Tags get the ids behind the tokenizer's own; the embeddings grow where there is no
    room for them.

    Raises:
      ValueError: `model.path` is no folder and no model of `PUBLISHED`.
    """
    names = ("dtype", "param_dtype", "scan_layers", "remat")
    numerics = {name: config.model[name] for name in names}
    path = config.model.path
    folder = Path(path).expanduser()
    if folder.is_dir():
        shape = read_config(folder, **numerics)
        tokens = tokenizer_files.load(folder).vocab_size
    elif path in PUBLISHED:
        fields, tokens = PUBLISHED[path]
        shape = ModelConfig(**fields, **numerics)
        tokens += len(tags.TAGS)
    else:
        raise ValueError(
            f"model.path={path} is no folder, nor a model whose shape is known: "
            f"{', '.join(PUBLISHED)}"
        )
    vocab_size = max(shape.vocab_size, tokens)
    return dataclasses.replace(shape, vocab_size=vocab_size), tokens
