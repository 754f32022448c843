"""The config.json of a Hugging Face folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.huggingface import rope, tensors
from pr1_jax.model.config import ModelConfig
from pr1_jax.system import files, hub

MODEL_TYPES = ("qwen3", "qwen2", "llama")
MAX_POSITIONS = 32768


def resolve(name_or_path: str | os.PathLike) -> Path:
    """The folder of a local path, or of a hub name after downloading what is needed.

    Raises:
      FileNotFoundError: a path that does not exist (`hub.looks_local`).
      ValueError: the hub does not give it; names it and says why, in one line.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if os.path.exists(path):
        return path
    if hub.looks_local(name):
        raise FileNotFoundError(f"no model at {name}: no such folder")
    return hub.download(name)


def read_config(folder: str | os.PathLike, **numerics: Any) -> ModelConfig:
    """Reads config.json of a Qwen3, Qwen2 or Llama folder.

    Args:
      numerics: fields of `ModelConfig` that no such file says.

    Raises:
      FileNotFoundError: no config.json. ValueError: an architecture or a setting
        that the model does not compute; names the field and its value.
    """
    file = Path(folder) / "config.json"
    raw = files.read_object(file)
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{file}: model_type={kind!r:.200} is not of {MODEL_TYPES}")
    _check_types(file, raw)
    _check_supported(file, raw)
    rope_base, rope_scaling = rope.read(file, raw)
    try:
        num_heads, width = raw["num_attention_heads"], raw["hidden_size"]
        tied = raw.get("tie_word_embeddings", False)
        head_dim = 128 if kind == "qwen3" else width // num_heads
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            num_layers=raw["num_hidden_layers"],
            width=width,
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or head_dim,
            mlp_width=raw["intermediate_size"],
            tie_embeddings=tied and not tensors.has_own_head(file.parent),
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2",
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            rms_eps=raw.get("rms_norm_eps", 1e-6),
            **numerics,
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}") from error
    except ValueError as error:  # the shape itself is none
        raise ValueError(f"{file}: {error}") from error


def max_positions(folder: str | os.PathLike) -> int:
    """The `max_position_embeddings` that config.json of a folder states."""
    file = Path(folder) / "config.json"
    raw = files.read_object(file)
    _check_types(file, raw)
    return raw.get("max_position_embeddings", MAX_POSITIONS)


_MAX_LAYERS = 1000  # more would only take for ever to trace


def _whole(x: Any) -> bool:
    return type(x) is int and 0 < x < 2**31


def _names(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
_SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim")
# Field -> what its value is to be, and whether it is that.
_FIELDS = dict.fromkeys(_SIZES, ("a whole number from 1", _whole)) | {
    "num_hidden_layers": (
        f"a whole number from 1 to {_MAX_LAYERS}",
        lambda x: _whole(x) and x <= _MAX_LAYERS,
    ),
    **dict.fromkeys(
        ("rope_theta", "rms_norm_eps"),
        ("a positive number", lambda x: type(x) in (int, float) and 0 < x < 1e30),
    ),
    "tie_word_embeddings": ("true or false", lambda x: type(x) is bool),
    "layer_types": ("a list of names", _names),
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling"), ("an object", lambda x: type(x) is dict)
    ),
}
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "layer_types"}
_MAY_BE_NULL |= {"rope_parameters", "rope_scaling"}
# Settings under which this code would compute something else are refused.
_SUPPORTED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
    "layer_types": ["full_attention"],
    "mlp_bias": False,
    "attention_bias": False,
    "quantization_config": None,
}


def _check_types(file: Path, raw: Mapping) -> None:
    """Raises ValueError unless each field that is there has a value of its kind."""
    for name, (kind, holds) in _FIELDS.items():
        absent = name not in raw or (name in _MAY_BE_NULL and raw[name] is None)
        if not absent and not holds(raw[name]):
            raise ValueError(f"{file}: {name}={raw[name]!r:.200} is not {kind}")


def _check_supported(file: Path, raw: Mapping) -> None:
    """Raises ValueError for a setting that the model does not compute."""
    settings = dict(raw)
    settings["layer_types"] = sorted(set(raw.get("layer_types") or ["full_attention"]))
    for name, value in _SUPPORTED.items():
        given = settings.get(name, value)
        # Qwen2 has biases on q, k, v, whatever `attention_bias` says.
        ignored = name == "attention_bias" and raw["model_type"] == "qwen2"
        if given != value and not ignored:
            raise ValueError(f"{file}: {name}={given!r:.200}, supported is {value!r}")


def config_json(
    config: ModelConfig, dtype: str, tokenizer: Tokenizer | None, max_positions: int
) -> dict[str, Any]:
    """The config.json of a model whose weights are written in `dtype`.

    Raises:
      ValueError: no architecture of Hugging Face is like the model.
    """
    if config.qk_norm and config.qkv_bias:
        raise ValueError("qk_norm=True with qkv_bias=True: no such Hugging Face model")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "rms_norm_eps": config.rms_eps,
        **rope.written(config),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        **token_ids(tokenizer),
    }


def token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of BOS, EOS (a list where several end a response) and padding."""
    eos_ids = [*tokenizer.eos_ids] if tokenizer else [None]
    return {
        "bos_token_id": tokenizer.hf_tokenizer.bos_token_id if tokenizer else None,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
        "pad_token_id": tokenizer.pad_id if tokenizer else None,
    }
