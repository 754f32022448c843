"""Targets that read a model folder: config.json, weights, index, tokenizer."""

import functools
import json

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, normalizers

from pr1_jax import tags
from pr1_jax.data import templates, tokenizer, tokenizer_files
from pr1_jax.huggingface import tensors
from pr1_jax.huggingface.config import max_positions, read_config
from tests.helpers import llama_tokenizer
from tests.programs.fuzz.base import ROOT, folder, one_line
from tests.programs.fuzz.texts import as_text


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


def check_eos_ids(content: bytes) -> None:
    """generation_config.json names tokens, or is one line that names it."""
    made = folder() / "generation"
    if not made.is_dir():
        _words().save(made)
    (made / "generation_config.json").write_bytes(content)
    try:
        found = tokenizer_files.load(made)
    except ValueError as error:
        one_line(error, "generation_config.json", "the EOS id", "EOS ids")
        return
    assert found.eos_id in found.eos_ids
    assert not {*found.eos_ids} & {*found.tag_ids.values()}
    assert max(found.eos_ids) < found.vocab_size


EOS_SEEDS = [
    json.dumps({"eos_token_id": ids}).encode()
    for ids in (1, [1], [3, 1], [2, 5000], None, [])
]


@functools.cache
def _llama() -> tokenizer.Tokenizer:
    made = folder() / "llama"
    made.mkdir()
    return tokenizer_files.load(llama_tokenizer.write(made))


_SPACED = ("a", "b", "ab", " ", "  ", "\n", "\u2581", "é", "🙂", "</", *tags.TAGS)


def check_spaces(content: bytes) -> None:
    """A text comes back as it was, alone and as what goes on from another."""
    t, text = _llama(), as_text(content, _SPACED)[:300]
    text = text.encode("utf-8", "replace").decode()
    for special in t.hf_tokenizer.all_special_tokens:
        text = text.replace(special, "")
    for continues in (False, True):
        ids = t.encode(text, continues=continues)
        assert t.decode(ids, continues=continues) == text.replace("\u2581", " ")
        joined = "".join(t.pieces(ids, continues=continues))
        assert joined == t.decode(ids, continues=continues)
        assert sum(i in t.tag_ids.values() for i in ids) == sum(
            map(text.count, t.tag_ids)
        )
    assert t.encode("ab\n") + t.encode(text, continues=True) == t.encode("ab\n" + text)


_JINJA = (
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m.content }}",
        "{{ messages",
        "}}",
    ),
    *("{% if ", "%}", "{% endif %}", "[0]", ".role", " | ", "length", "trim", "tojson"),
    *(" * 9", "**9", "'a'", "range(9)", "{{", "{%", "namespace(x=1)", "bos_token", "+"),
    *("{% set x = ", "x", "raise_exception('no')", "{% macro x() %}", "{% endmacro %}"),
    *("\n", " ", "loop.index", "ljust(99999999)", "99999999", "\ud800", "{#", "#}"),
)


def check_chat_template(content: bytes) -> None:
    """A template writes a text of bounded length, or is one line."""
    said = [{"role": "user", "content": "1+1?"}]
    templates.LIMIT_SEC = 1.0
    try:
        text = templates.render(as_text(content, _JINJA), said, {"bos_token": "<s>"})
    except ValueError as error:
        assert str(error).strip()
        return
    assert len(text) <= 2 * templates.MAX_CHARS


TEMPLATE_SEEDS = [
    b"\x01{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    b"\x01{{ bos_token }}{% if messages[0].role == 'system' %}a{% endif %}",
    bytes([0, 0, 2, 1]),
]


def _words() -> tokenizer.Tokenizer:
    return tokenizer_files.from_words([" yes", "\n", "a"], pattern=r" yes|[\s\S]")


def tokenizer_seeds() -> list[bytes]:
    """One of words, the same with a padding token more, and one of Llama-2's kind."""
    backend = _words().hf_tokenizer.backend_tokenizer
    seeds = [backend.to_str()]
    backend.add_special_tokens(["[PAD]"])
    space = llama_tokenizer.SPACE
    pieces = ["<eos>", space, "a", "y", "e", "s", "\n", "ye", f"{space}a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    llama = tokenizers.Tokenizer(models.BPE(vocab, [("y", "e"), (space, "a")]))
    steps = [llama_tokenizer.PREPEND, llama_tokenizer.REPLACE]
    llama.normalizer = normalizers.Sequence(steps)
    return [x.encode() for x in (*seeds, backend.to_str(), llama.to_str())]
