"""Hugging Face folders: config.json, safetensors in one or many files, tokenizer.

Qwen3, Qwen2 and Llama (spec section 9) through one mapping table, both ways. Weights
are read and written one tensor at a time, so the host holds one parameter, not a copy
of the model. New tag rows (spec section 6) are made by `resize_embeddings`.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from pr1_jax import hf_tensors, hub
from pr1_jax.model import ModelConfig
from pr1_jax.tokenizer import Tokenizer

MODEL_TYPES = ("qwen3", "qwen2", "llama")
_MAX_POSITIONS = 32768


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


def read_config(
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    scan_layers: bool = False,
    remat: bool = False,
    remat_policy: str = "nothing",
) -> ModelConfig:
    """Reads config.json of a Qwen3, Qwen2 or Llama folder.

    Raises:
      FileNotFoundError: no config.json. ValueError: an architecture or a setting
        that the model does not compute; names the field and its value.
    """
    file = Path(folder) / "config.json"
    raw = hf_tensors.read_json(file)
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{file}: model_type={kind!r:.200} is not of {MODEL_TYPES}")
    _check_types(file, raw)
    rope = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    _check_types(file, rope)
    _check_supported(file, raw, rope)
    try:
        num_heads, width = raw["num_attention_heads"], raw["hidden_size"]
        head_dim = 128 if kind == "qwen3" else width // num_heads
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            num_layers=raw["num_hidden_layers"],
            width=width,
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or head_dim,
            mlp_width=raw["intermediate_size"],
            tie_embeddings=raw.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2",
            rope_base=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
            rms_eps=raw.get("rms_norm_eps", 1e-6),
            dtype=dtype,
            param_dtype=param_dtype,
            scan_layers=scan_layers,
            remat=remat,
            remat_policy=remat_policy,
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}") from error
    except ValueError as error:  # the shape itself is none
        raise ValueError(f"{file}: {error}") from error


def max_positions(folder: str | os.PathLike) -> int:
    """The `max_position_embeddings` that config.json of a folder states."""
    file = Path(folder) / "config.json"
    raw = hf_tensors.read_json(file)
    _check_types(file, raw)
    return raw.get("max_position_embeddings", _MAX_POSITIONS)


_MAX_LAYERS = 1000  # more would only take for ever to trace
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"),
)
_IS_OF = {  # field -> what it must be, and whether a value is that
    **dict.fromkeys(
        _SIZES,
        ("a whole number from 1", lambda x: type(x) is int and 0 < x < 2**31),
    ),
    "num_hidden_layers": (
        f"a whole number from 1 to {_MAX_LAYERS}",
        lambda x: type(x) is int and 0 < x <= _MAX_LAYERS,
    ),
    **dict.fromkeys(
        ("rope_theta", "rms_norm_eps"),
        ("a positive number", lambda x: type(x) in (int, float) and 0 < x < 1e30),
    ),
    "tie_word_embeddings": ("true or false", lambda x: type(x) is bool),
    "layer_types": (
        "a list of names",
        lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
    ),
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling"), ("an object", lambda x: type(x) is dict)
    ),
}
_OPTIONAL = (
    *("num_key_value_heads", "head_dim", "layer_types"),
    *("rope_parameters", "rope_scaling"),
)


def _check_types(file: Path, raw: Mapping) -> None:
    """Raises ValueError unless each field that is there has a value of its kind."""
    for field, (kind, holds) in _IS_OF.items():
        absent = field not in raw or (field in _OPTIONAL and raw[field] is None)
        if not absent and not holds(raw[field]):
            raise ValueError(f"{file}: {field}={raw[field]!r:.200} is not {kind}")


def _check_supported(file: Path, raw: Mapping, rope: Mapping) -> None:
    """Refuses settings under which this code would compute something else."""
    supported = {
        "hidden_act": "silu",
        "rope_type": "default",
        "type": "default",  # of older rope_scaling
        "partial_rotary_factor": 1,
        "use_sliding_window": False,
        "layer_types": ["full_attention"],
        "mlp_bias": False,
        "attention_bias": False,
        "quantization_config": None,
    }
    if raw["model_type"] == "qwen2":  # has biases on q, k, v, whatever this says
        del supported["attention_bias"]
    settings = dict(raw) | dict(rope)
    settings["layer_types"] = sorted(set(raw.get("layer_types") or ["full_attention"]))
    for field, value in supported.items():
        found = settings.get(field, value)
        if found != value:
            raise ValueError(f"{file}: {field}={found!r:.200}, supported is {value!r}")


def load_params(
    folder: str | os.PathLike, config: ModelConfig, *, shardings: Any = None
) -> dict[str, Any]:
    """Loads safetensors into the unboxed tree of `model.init_params`.

    Every tensor is checked before the first is read. The host holds one parameter at
    a time (with `scan_layers`, one kind of parameter of all layers).

    Args:
      folder: has model.safetensors, or parts and their index.
      config: as `read_config` gives it; arrays get its `param_dtype`.
      shardings: tree of shardings like the parameters; None: the default device.

    Raises:
      FileNotFoundError, ValueError: one line that names the tensor and the file.
    """
    table = hf_tensors.tensor_table(config)
    found = _find_checked(folder, config)
    if shardings is not None:
        shardings = traverse_util.flatten_dict(shardings)
    params = {}
    for path, tensors in table.items():
        shape = (len(tensors), *tensors[0].shape)
        host = np.empty(shape, jnp.dtype(config.param_dtype))
        for row, tensor in zip(host, tensors, strict=True):
            file, _ = found[tensor.name]
            row[...] = tensor.from_hf(hf_tensors.read_tensor(file, tensor.name))
        host = host[0] if tensors[0].layer is None else host
        params[path] = _place(host, shardings and shardings[path])
    return traverse_util.unflatten_dict(params)


def check_weights(
    folder: str | os.PathLike, config: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Checks files, shapes and sizes; reads no tensor.

    Raises:
      FileNotFoundError, ValueError: as `load_params` and `resize_embeddings` would.
    """
    _find_checked(folder, config)
    _check_vocab_size(config, tokenizer)


def _find_checked(folder: str | os.PathLike, config: ModelConfig):
    """`hf_tensors.find_tensors`, all of them as the model needs them."""
    table = hf_tensors.tensor_table(config)
    found = hf_tensors.find_tensors(Path(folder))
    hf_tensors.check_tensors(table, found, folder, config.tie_embeddings)
    return found


def _place(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts an array on devices, and waits, so that host copies do not pile up."""
    if sharding is None:
        array = jax.device_put(host)
    else:
        array = jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])
    return array.block_until_ready()


def check_free(folder: str | os.PathLike) -> None:
    """Raises FileExistsError unless a folder can be written here."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder")


def save_params(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 4 * 2**30,
    max_positions: int = _MAX_POSITIONS,
) -> None:
    """Writes a folder that `transformers` loads; one part at a time on the host.

    It is written beside `folder` and renamed at the end: `folder` is whole or absent.

    Args:
      folder: must not exist, or be empty.
      params: unboxed; written in their own dtype. config: of `params`.
      tokenizer: written along where given.
      max_shard_bytes: size of a safetensors part (a single tensor may exceed it).
      max_positions: the `max_position_embeddings` that config.json states.
    """
    folder = Path(folder)
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        flat = traverse_util.flatten_dict(params)
        settings = _config_json(config, flat, tokenizer, max_positions)
        _write_json(temporary / "config.json", settings)
        _write_tensors(temporary, flat, config, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config_json(config: ModelConfig, flat, tokenizer, max_positions) -> dict[str, Any]:
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
        "rope_theta": config.rope_base,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(flat[("embedding",)].dtype),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
        "pad_token_id": tokenizer.pad_id if tokenizer else None,
    }


def _write_tensors(folder: Path, flat, config: ModelConfig, max_shard_bytes) -> None:
    num_bytes = lambda t: math.prod(t.shape) * flat[t.path].dtype.itemsize
    tensors = [t for group in hf_tensors.tensor_table(config).values() for t in group]
    parts, size = [], math.inf
    for tensor in tensors:
        size += num_bytes(tensor)
        if size > max_shard_bytes:
            parts.append([])
            size = num_bytes(tensor)
        parts[-1].append(tensor)
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = "model.safetensors"
        if len(parts) > 1:
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        arrays = {}
        for tensor in part:
            leaf = flat[tensor.path]
            array = leaf if tensor.layer is None else leaf[tensor.layer]
            arrays[tensor.name] = tensor.to_hf(np.asarray(array))
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
        # It is made readable for its owner alone.
        shutil.copymode(folder / "config.json", folder / file)
        weight_map |= dict.fromkeys(arrays, file)
    if len(parts) > 1:
        metadata = {"total_size": sum(map(num_bytes, tensors))}
        _write_json(
            folder / hf_tensors.INDEX, {"metadata": metadata, "weight_map": weight_map}
        )


def resize_embeddings(
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    key: jax.Array,
    *,
    noise: float = 0.2,
    multiple_of: int = 1,
    shardings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], ModelConfig]:
    """Gives the tags that the tokenizer has newly got their rows.

    A tag's row (and output row, where untied) is the mean of the rows of the pieces
    that spelled it, plus normal noise. Where the vocabulary has unused rows at its end
    (Qwen), those are overwritten; otherwise it grows. Nothing changes where the
    tokenizer brought the tags along.

    Args:
      params: unboxed. config: of `params`.
      tokenizer: of this model.
      key: for the noise.
      noise: standard deviation of the noise, as a share of the pieces' own. On
        SmolLM2-135M, 0.2 brings the greatest cosine between two tag rows from 0.90 to
        0.83 and leaves the text's likelihood as it is; from 1.0 on it suffers.
      multiple_of: a vocabulary that grows is rounded up to this (sharded vocabularies
        must divide evenly); spare rows are the mean of all rows.
      shardings: of the new parameters; None = as the old ones.

    Returns:
      New parameters and config; other arrays are shared with the old ones.

    Raises:
      ValueError: the tokenizer has more tokens than the model, tags aside.
    """
    _check_vocab_size(config, tokenizer)
    if not tokenizer.new_tags:
        return dict(params), config
    vocab_size = config.vocab_size
    if vocab_size < tokenizer.vocab_size:
        vocab_size = -(-tokenizer.vocab_size // multiple_of) * multiple_of
    tag_ids = np.array([tokenizer.tag_ids[tag] for tag in tokenizer.new_tags])
    spelled = [tokenizer.tag_pieces(tag) for tag in tokenizer.new_tags]
    averages = np.zeros((len(spelled), sum(map(len, spelled))), np.float32)
    start = 0
    for row, ids in zip(averages, spelled, strict=True):
        row[start : start + len(ids)] = 1 / len(ids)
        start += len(ids)
    params = dict(params)
    for i, name in enumerate(["embedding", "head"]):
        if name in params:
            rows = params[name]
            shape = (len(spelled), config.width)
            offsets = noise * jax.random.normal(jax.random.fold_in(key, i), shape)
            # One program, so that it also runs on rows sharded over hosts.
            params[name] = jax.jit(
                _with_tag_rows,
                static_argnames="vocab_size",
                out_shardings=shardings[name] if shardings else rows.sharding,
            )(
                rows,
                tag_ids,
                np.concatenate(spelled),
                averages,
                offsets,
                vocab_size=vocab_size,
            )
    return params, dataclasses.replace(config, vocab_size=vocab_size)


def _check_vocab_size(config: ModelConfig, tokenizer: Tokenizer) -> None:
    base_size = tokenizer.vocab_size - len(tokenizer.new_tags)
    if base_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {base_size} tokens, the model's vocab_size is "
            f"{config.vocab_size}: they do not belong together"
        )


def _with_tag_rows(rows, tag_ids, piece_ids, averages, offsets, *, vocab_size: int):
    """Grows rows [V, D] to [vocab_size, D] and sets those of the tags.

    tag_ids: [tags]; piece_ids: [pieces], of all tags; averages: [tags, pieces], the
    weight of each piece in each tag's mean; offsets: [tags, D] from that mean, in units
    of the pieces' standard deviation.
    """
    pieces = rows[piece_ids].astype(jnp.float32)
    new = jnp.matmul(averages, pieces, precision="highest")
    new += offsets * jnp.std(pieces)
    spare = jnp.mean(rows, axis=0, dtype=jnp.float32).astype(rows.dtype)
    spare = jnp.broadcast_to(spare, (vocab_size - rows.shape[0], rows.shape[1]))
    return jnp.concatenate([rows, spare]).at[tag_ids].set(new.astype(rows.dtype))


def _write_json(file: Path, value: Mapping) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
