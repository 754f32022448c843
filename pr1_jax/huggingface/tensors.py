"""Tensors of a Hugging Face folder: which fills which parameter, and their files."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
from absl import logging
from flax import traverse_util

from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import abstract_params, unbox
from pr1_jax.system import files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_ROWS = 8192  # of an embedding, compared at once

# Our parameter -> its Hugging Face name, and how many of our leading axes are inputs:
# kernels are [in..., out...] here and [out, in] there. 0: nothing to transpose.
_NAMES = {
    "embedding": ("model.embed_tokens.weight", 0),
    "head": ("lm_head.weight", 0),
    "final_norm/scale": ("model.norm.weight", 0),
    # In each layer, behind model.layers.NUMBER:
    "attn_norm/scale": ("input_layernorm.weight", 0),
    "q/kernel": ("self_attn.q_proj.weight", 1),
    "k/kernel": ("self_attn.k_proj.weight", 1),
    "v/kernel": ("self_attn.v_proj.weight", 1),
    "o/kernel": ("self_attn.o_proj.weight", 2),
    "q/bias": ("self_attn.q_proj.bias", 0),
    "k/bias": ("self_attn.k_proj.bias", 0),
    "v/bias": ("self_attn.v_proj.bias", 0),
    "q_norm/scale": ("self_attn.q_norm.weight", 0),
    "k_norm/scale": ("self_attn.k_norm.weight", 0),
    "mlp_norm/scale": ("post_attention_layernorm.weight", 0),
    "gate/kernel": ("mlp.gate_proj.weight", 1),
    "up/kernel": ("mlp.up_proj.weight", 1),
    "down/kernel": ("mlp.down_proj.weight", 1),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor and the part of our tree that it fills.

    Attributes:
      name, hf_shape: of the tensor.
      path: of our parameter.
      layer: its index on axis 0 of the parameter, None if that is not stacked.
      shape: of our part, without the layer axis.
      inputs: how many leading axes of it are inputs, see `_NAMES`.
    """

    name: str
    hf_shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    inputs: int

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """[hf_shape] -> [shape]."""
        return (array.T if self.inputs else array).reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """[shape] -> [hf_shape]."""
        if self.inputs:
            array = array.reshape(self.hf_shape[::-1]).T
        return np.ascontiguousarray(array).reshape(self.hf_shape)


def tensor_table(config: ModelConfig) -> dict[tuple[str, ...], list[Tensor]]:
    """Our parameter -> the tensors that fill it: one, or one a layer if stacked."""
    params = unbox(abstract_params(config))
    table = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        shape, layers, prefix, key = leaf.shape, [None], "", path
        if path[0] == "layers":  # stacked
            shape, layers = leaf.shape[1:], [*range(config.num_layers)]
            prefix, key = "model.layers.{}.", path[1:]
        elif path[0].startswith("layer_"):
            number = path[0].removeprefix("layer_")
            prefix, key = f"model.layers.{number}.", path[1:]
        name, inputs = _NAMES["/".join(key)]
        hf_shape = shape
        if inputs:
            hf_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        elif name.endswith(".bias"):
            hf_shape = (math.prod(shape),)
        table[path] = [
            Tensor((prefix + name).format(i), hf_shape, path, i, shape, inputs)
            for i in layers
        ]
    return table


def find_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name -> (its file, its shape), over all parts.

    Raises:
      FileNotFoundError: there are no safetensors (other formats are never read), or a
        part that the index names is missing.
      ValueError: names the file that is damaged, or the part outside the folder.
    """
    tensors = {}
    for file in _parts(folder):
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(name)
                    tensors[name] = file, tuple(part.get_shape())
                    if part.get_dtype() not in _DTYPES:
                        raise ValueError(
                            f"tensor {name} is {part.get_dtype()}, expected one of "
                            f"{_DTYPES}: {file}"
                        )
        except (safetensors.SafetensorError, OSError) as error:
            text = f"{file} is truncated or damaged, copy it anew: {error}"
            raise ValueError(text) from error
    return tensors


def _parts(folder: Path) -> list[Path]:
    """The weights' files: model.safetensors if it is there, and else those of an index.

    In that order, as in `transformers`: saving a model again, as one file, leaves an
    older index where it is.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return _inside(folder, [SINGLE])
    if not index.is_file():
        raise FileNotFoundError(f"no weights at {single}: {_pickles(folder)}")
    names = files.read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: weight_map names no files of the folder")
    for name in names.values():
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the part {str(name)[:200]!r}, expected the name of a "
                ".safetensors file in the same folder"
            )
    parts = _inside(folder, sorted({*names.values()}))
    missing = [file.name for file in parts if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(parts)} parts, and {len(missing)} of them are not in "
            f"the folder, the first {missing[0][:200]!r}: copy them there, or the whole "
            f"model as {SINGLE}"
        )
    return parts


def _inside(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names; a link that leads out of the folder is refused."""
    inside = [folder / name for name in names]
    root = folder.resolve()
    # The hub's cache: snapshots/REVISION/name is a link to blobs/HASH.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for file in inside:
        if file.resolve().parent not in (root, blobs):
            raise ValueError(
                f"{file} is a link to {file.resolve()}, outside its folder: copy the "
                "file into the folder"
            )
    return inside


def _pickles(folder: Path) -> str:
    """What to do about weights in a format that can run code, if there are such."""
    kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
    found = sorted(file.name for kind in kinds for file in folder.glob(kind))
    if not found:
        return f"expected {SINGLE}, or parts and {INDEX}"
    return (
        f"{found[0]} is not read, for only safetensors are safe to load; convert it "
        "where you trust it, with transformers: AutoModelForCausalLM"
        ".from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    )


def read_tensor(file: Path, name: str) -> np.ndarray:
    """One tensor. The file is closed again: mapped pages count as memory in use."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)


def has_own_head(folder: Path) -> bool:
    """Whether a folder's output rows are other numbers than its input rows.

    `transformers` heeds them then, whatever `tie_word_embeddings` says. False where the
    weights cannot be read: whoever reads them says why.
    """
    try:
        found = find_tensors(folder)
    except (OSError, ValueError):
        return False
    rows, head = (found.get(_NAMES[name][0]) for name in ("embedding", "head"))
    if rows is None or head is None:
        return False
    if rows[1] != head[1]:
        return True
    if len(head[1]) != 2:
        return False
    both = rows[0], head[0]
    return _differ(*both, *(file.stat().st_mtime_ns for file in both))


@functools.lru_cache(maxsize=8)
def _differ(file: Path, other: Path, *times: int) -> bool:
    """Whether `other` has another head than `file` has an embedding; logs it, once.

    Args:
      times: when the files were written; only so that none is taken for a newer one.
    """
    names = _NAMES["embedding"][0], _NAMES["head"][0]
    with (
        safetensors.safe_open(file, framework="numpy") as first,
        safetensors.safe_open(other, framework="numpy") as second,
    ):
        rows, head = first.get_slice(names[0]), second.get_slice(names[1])
        count = rows.get_shape()[0]
        parts = (slice(i, min(i + _ROWS, count)) for i in range(0, count, _ROWS))
        if all(np.array_equal(rows[part], head[part]) for part in parts):
            return False
    logging.warning(
        "%s: tie_word_embeddings=true, but %s of %s is another than %s: the model gets "
        "that head, apart from its embedding, as in transformers (to have it tied, leave "
        "that tensor out of the file)",
        file.parent / "config.json",
        names[1],
        other.name,
        names[0],
    )
    return True


def check_tensors(
    table: Mapping[tuple[str, ...], list[Tensor]],
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
    folder: Path,
    tie_embeddings: bool,
) -> None:
    """Checks that every tensor is there, of its shape, and none would be left out.

    Args:
      table: of `tensor_table`. found: of `find_tensors`.

    Raises:
      ValueError: names the tensor and what is wrong.
    """
    expected = {t.name: t for tensors in table.values() for t in tensors}
    for name, tensor in expected.items():
        if name not in found:
            text = f"tensor {name} is missing from {folder}"
            if name == _NAMES["head"][0]:
                text += ": if it is to be the embedding, say tie_word_embeddings=true"
            raise ValueError(text)
        file, shape = found[name]
        if shape != tensor.hf_shape:
            raise ValueError(
                f"tensor {name} has shape {shape}, expected {tensor.hf_shape}: {file}"
            )
    for name, (file, _) in found.items():
        ignored = tie_embeddings and name == "lm_head.weight"
        if name not in expected and not ignored and not name.endswith(".inv_freq"):
            raise ValueError(f"tensor {name} is none of this model: {file}")
