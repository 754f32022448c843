"""Targets that read a model folder: config.json, weights, index, tokenizer."""

import json

import numpy as np
import safetensors.numpy

from pr1_jax.data import tokenizer, tokenizer_files
from pr1_jax.huggingface import tensors
from pr1_jax.huggingface.config import max_positions, read_config
from tests.programs.fuzz.base import ROOT, folder, one_line


def check_model_config(content: bytes) -> None:
    """config.json is a model's shape, or one line that names the file."""
    file = folder() / "model" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    for read in (read_config, max_positions):
        try:
            found = read(file.parent)
        except ValueError as error:
            one_line(error, str(file))
            continue
        if read is read_config and found.rope_scaling and found.head_dim < 10_000:
            size = found.head_dim, found.rope_base
            frequencies, factor = found.rope_scaling.frequencies(*size)
            assert np.isfinite(frequencies).all() and 0 < factor < np.inf, found


def model_config_seeds() -> list[bytes]:
    """Those that `transformers` wrote, plain and with scaled rotary positions."""
    folder = ROOT / "tests" / "helpers" / "data" / "hf_reference"
    files = [path / "config.json" for path in sorted(folder.iterdir())]
    plain = {f.parent.name: f.read_bytes() for f in files if f.is_file()}
    cases = json.loads((folder / "rope.json").read_text())["logits"].values()
    scaled = [json.loads(plain[kind]) | changes for kind, changes in cases]
    return [*plain.values(), *(json.dumps(config).encode() for config in scaled)]


def check_weights(content: bytes) -> None:
    """model.safetensors is tensors, or one line that names the file."""
    file = folder() / "weights" / "model.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)  # it may be mapped
    file.write_bytes(content)
    try:
        tensors.has_own_head(file.parent)
        found = tensors.find_tensors(file.parent)
        for name, (where, shape) in found.items():
            assert where == file
            array = tensors.read_tensor(where, name)
            assert array.shape == shape
    except ValueError as error:
        one_line(error, str(file))


def weights_seeds() -> list[bytes]:
    """Files of a few tensors, one with a head beside the embedding."""
    arrays = {"a": np.ones((2, 3), np.float32), "b.c": np.ones(2, np.float16)}
    rows = {"model.embed_tokens.weight": np.ones((2, 3), np.float32)}
    rows |= {"lm_head.weight": np.eye(2, 3, dtype=np.float16)}
    return [
        safetensors.numpy.save(rows),
        safetensors.numpy.save(arrays, metadata={"format": "pt"}),
        safetensors.numpy.save({"i": np.ones(2, np.int8), "e": np.ones((0, 2))}),
    ]


def check_weight_index(content: bytes) -> None:
    """An index names files of its folder, or is refused in one line that names it."""
    made = folder() / "index"
    if not made.is_dir():
        made.mkdir()
        tensor = safetensors.numpy.save({"a": np.ones(2, np.float32)})
        for name in ("a.safetensors", "../outside.safetensors"):
            (made / name).write_bytes(tensor)
        (made / "out.safetensors").symlink_to("../outside.safetensors")
    (made / tensors.INDEX).write_bytes(content)
    try:
        found = tensors.find_tensors(made)
    except (ValueError, FileNotFoundError) as error:
        one_line(error, str(made))
        return
    for file, _ in found.values():
        assert file.resolve().parent == made.resolve(), file


INDEX_SEEDS = [
    json.dumps({"weight_map": {"a": name}}).encode()
    for name in ("a.safetensors", "../outside.safetensors", "out.safetensors")
]


def check_tokenizer(content: bytes) -> None:
    """tokenizer.json is a tokenizer, or one line that names it."""
    made = folder() / "tokenizer"
    if not made.is_dir():
        _words().save(made)
        # A model of so many rows: tokens that an input adds have none.
        rows = json.dumps({"vocab_size": _words().vocab_size})
        (made / "config.json").write_text(rows)
    (made / "tokenizer.json").write_bytes(content)
    try:
        found = tokenizer_files.load(made)
        found.decode(found.encode("yes <Path>"))
    except ValueError as error:
        one_line(error)


def _words() -> tokenizer.Tokenizer:
    return tokenizer_files.from_words([" yes", "\n", "a"], pattern=r" yes|[\s\S]")


def tokenizer_seeds() -> list[bytes]:
    """A tokenizer of words, and the same with a padding token more."""
    backend = _words().hf_tokenizer.backend_tokenizer
    seeds = [backend.to_str()]
    backend.add_special_tokens(["[PAD]"])
    return [seed.encode() for seed in (*seeds, backend.to_str())]
