"""Weights of Hugging Face folders, read and written.

Qwen3, Qwen2 and Llama (docs/method.md, section 9) through one mapping table, both ways.
Weights are read and written one tensor at a time, so the host holds one parameter, not
a copy of the model.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.huggingface import tags
from pr1_jax.huggingface.config import MAX_POSITIONS, config_json, token_ids
from pr1_jax.huggingface.tensors import (
    INDEX,
    check_tensors,
    find_tensors,
    read_tensor,
    tensor_table,
)
from pr1_jax.huggingface.usage import Usage
from pr1_jax.model.config import ModelConfig
from pr1_jax.system import digests, files


def load_params(
    folder: str | os.PathLike, config: ModelConfig, *, shardings: Any = None
) -> dict[str, Any]:
    """Loads safetensors into the unboxed tree of `model.params.init_params`.

    Every tensor is checked before the first is read. The host holds one parameter at
    a time (with `scan_layers`, one kind of parameter of all layers).

    Args:
      folder: has model.safetensors, or parts and their index.
      config: as `read_config` gives it; arrays get its `param_dtype`.
      shardings: tree of shardings like the parameters; None: the default device.

    Raises:
      FileNotFoundError, ValueError: one line that names the tensor and the file.
    """
    table = tensor_table(config)
    found = _find_checked(folder, config)
    if shardings is not None:
        shardings = traverse_util.flatten_dict(shardings)
    params = {}
    for path, tensors in table.items():
        shape = (len(tensors), *tensors[0].shape)
        host = np.empty(shape, jnp.dtype(config.param_dtype))
        for row, tensor in zip(host, tensors, strict=True):
            file, _ = found[tensor.name]
            row[...] = tensor.from_hf(read_tensor(file, tensor.name))
        host = host[0] if tensors[0].layer is None else host
        params[path] = _put(host, shardings and shardings[path])
    return traverse_util.unflatten_dict(params)


def check_weights(
    folder: str | os.PathLike, config: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Checks files, shapes and sizes; reads no tensor.

    Raises:
      FileNotFoundError, ValueError: as `load_params` and `resize_embeddings` would.
    """
    _find_checked(folder, config)
    tags.check_vocab_size(config, tokenizer)


def digest(folder: str | os.PathLike) -> str:
    """The digest of the safetensors of a folder; all processes must call this alike.

    Raises:
      FileNotFoundError, ValueError: as `load_params`.
    """
    found = find_tensors(Path(folder)).values()
    return digests.of_files(sorted({file for file, *_ in found}))


def _find_checked(folder: str | os.PathLike, config: ModelConfig):
    """`find_tensors` of a folder, all of them as the model needs them."""
    found = find_tensors(Path(folder))
    check_tensors(tensor_table(config), found, folder, config.tie_embeddings)
    return found


def _put(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
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


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, which is `folder` at the end: that is whole or absent.

    Raises:
      FileExistsError: as `check_free`.
    """
    folder = Path(folder)
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_params(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    usage: Usage | None = None,
    max_shard_bytes: int = 4 * 2**30,
    max_positions: int = MAX_POSITIONS,
) -> None:
    """Writes a folder that `transformers` loads; one part at a time on the host.

    Args:
      folder: must not exist, or be empty.
      params: unboxed; written in their own dtype. config: of `params`.
      tokenizer, usage: written along where given.
      max_shard_bytes: size of a safetensors part (a single tensor may exceed it).
      max_positions: the `max_position_embeddings` that config.json states.
    """
    with whole_folder(folder) as temporary:
        flat = traverse_util.flatten_dict(params)
        dtype = str(flat[("embedding",)].dtype)
        settings = config_json(config, dtype, tokenizer, max_positions)
        files.write_json(temporary / "config.json", settings)
        _write_tensors(temporary, flat, config, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(temporary)
            ids = token_ids(tokenizer)
            files.write_json(temporary / "generation_config.json", ids)
        if usage is not None:
            usage.write(temporary)


def _write_tensors(folder: Path, flat, config: ModelConfig, max_shard_bytes) -> None:
    """Writes parameters by path, `flat`, as one or more files and their index."""
    num_bytes = lambda t: math.prod(t.shape) * flat[t.path].dtype.itemsize
    tensors = [t for group in tensor_table(config).values() for t in group]
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
        files.write_json(
            folder / INDEX, {"metadata": metadata, "weight_map": weight_map}
        )
