"""Tokenizers from folders of the Hugging Face formats."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from absl import logging
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pr1_jax import tags
from pr1_jax.data import unused_tokens
from pr1_jax.data.rows import first_line
from pr1_jax.data.tokenizer import EOS, PAD, Tokenizer
from pr1_jax.system import files, hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HUB_FILES = ("*token*.json", "*config.json", "*.model", "*.jinja")


def from_words(words: Sequence[str], *, pattern: str) -> Tokenizer:
    """A word-level tokenizer: ids are `<pad>`, `<eos>`, `words` in order, the six tags.

    Args:
      words: distinct token strings; white space in them counts.
      pattern: regular expression; each match in a text is one token. It must match
        every word as a whole, longer words before their beginnings, for example
        `r"Final Answer:| yes| no|[0-9]{1,2}|[\\s\\S]"`.

    Returns:
      A tokenizer that refuses text outside its words with a ValueError.
    """
    vocab = {word: i for i, word in enumerate([PAD, EOS, *words])}
    if len(vocab) != len(words) + 2 or "" in vocab:
        raise ValueError(f"words must be distinct, not empty, not {PAD} or {EOS}")
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    backend.pre_tokenizer = split
    backend.decoder = decoders.Fuse()
    for word in words:
        pieces = [piece for piece, _ in split.pre_tokenize_str(word)]
        if pieces != [word]:
            raise ValueError(f"pattern={pattern!r} splits the word {word!r}: {pieces}")
    backend.add_tokens(
        [tokenizers.AddedToken(tag, normalized=False) for tag in tags.TAGS]
    )
    fast = _transformers().PreTrainedTokenizerFast
    return Tokenizer(fast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD))


def load(name_or_path: str | os.PathLike) -> Tokenizer:
    """Loads a tokenizer from a local folder, a sentencepiece file or the hub.

    A name that looks like a path (it is absolute, begins with a dot, or its first
    folder exists) is never looked up on the hub.
    Added tokens that the folder's model has no rows for are left out
    (`unused_tokens.drop`).

    Raises:
      FileNotFoundError: a local path that lacks the tokenizer's files.
      ValueError: files or hub names that cannot be read or used; one line.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if os.path.isfile(path) and path.name == "tokenizer.json":
        path = path.parent
    if os.path.isfile(path):
        return _wrapped(_read_sentencepiece(path), name)
    if os.path.isdir(path):
        return _wrapped(_read_folder(path), name, path)
    if hub.looks_local(name):
        raise FileNotFoundError(f"no tokenizer at {name}: no such file or folder")
    folder = hub.download(name, _HUB_FILES)
    return _wrapped(_read_folder(folder), name, folder)


def _wrapped(
    fast: "PreTrainedTokenizerFast", name: str, folder: Path | None = None
) -> Tokenizer:
    """`Tokenizer(fast)`; ValueError of one line where that cannot be made."""
    try:
        if folder and (rows := _rows(folder)):
            unused_tokens.drop(fast, rows)
        made = Tokenizer(fast, eos_ids=_eos_ids(folder, fast) if folder else ())
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(
            f"cannot use the tokenizer {name}: {first_line(error)}"
        ) from error
    if len(made.eos_ids) > 1:
        named = ", ".join(map(repr, fast.convert_ids_to_tokens(made.eos_ids)))
        logging.info("any of %s ends a response", named)
    return made


def _rows(folder: Path) -> int | None:
    """The rows of a folder's model, if its config.json states them."""
    file = folder / "config.json"
    size = files.read_object(file).get("vocab_size") if file.exists() else None
    return size if type(size) is int else None


def _eos_ids(folder: Path, fast: "PreTrainedTokenizerFast") -> list[int]:
    """What a folder says ends a response, as `transformers` reads it.

    `eos_token_id` of generation_config.json counts, or else that of config.json. Ids
    that are no tokens are left out, with a warning.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        given = files.read_object(file).get("eos_token_id") if file.exists() else None
        ids = given if isinstance(given, list) else [given]
        if ids in ([None], []):
            continue
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError(
                f"{file}: eos_token_id={given!r:.200} is not an id or a list of ids"
            )
        known = {i: fast.backend_tokenizer.id_to_token(i) for i in ids}
        if absent := [i for i, token in known.items() if token is None]:
            logging.warning(
                "%s: the tokenizer has no token %s, so that eos_token_id=%s ends no "
                "response by it",
                *(file, absent, given),
            )
        return [i for i, token in known.items() if token is not None]
    return []


def _read_folder(folder: Path) -> "PreTrainedTokenizerFast":
    if (folder / "tokenizer.json").is_file():
        # Not AutoTokenizer: it rebuilds some tokenizers by the model's type, and may
        # run code of the folder.
        fast = _transformers().PreTrainedTokenizerFast
        # The file is given: the folder's settings could name one in another folder.
        file = str(folder / "tokenizer.json")
        try:
            loaded = fast.from_pretrained(
                folder, local_files_only=True, tokenizer_file=file
            )
            _put_space_once(loaded.backend_tokenizer)
            return loaded
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(
                f"cannot read {folder}/tokenizer.json: {first_line(error)}"
            ) from error
    spm = sorted(folder.glob("*.model"))
    if len(spm) == 1:
        settings = folder / "tokenizer_config.json"
        given = files.read_object(settings) if settings.exists() else {}
        return _read_sentencepiece(spm[0], add_bos=given.get("add_bos_token") is True)
    raise FileNotFoundError(f"{folder} has no tokenizer.json and no tokenizer.model")


def _put_space_once(backend: tokenizers.Tokenizer) -> None:
    """Puts the space before a text before that alone, not behind each special token.

    Files of Llama-2's kind put it before every piece of text between special tokens,
    tags among them, by a Prepend normaliser or an older Metaspace. What changes is as
    in `transformers` by `legacy=False`; a text without special tokens stays the same.

    Raises:
      ValueError: the normaliser cannot be changed so; says what to do.
    """
    normalizer, spaces = backend.normalizer, backend.pre_tokenizer
    if isinstance(spaces, pre_tokenizers.Metaspace):
        if spaces.prepend_scheme == "always":
            spaces.prepend_scheme = "first"
            backend.pre_tokenizer = spaces
        return
    several = isinstance(normalizer, normalizers.Sequence)
    steps = [*normalizer] if several else [normalizer]
    puts = [step.prepend for step in steps if isinstance(step, normalizers.Prepend)]
    if not puts:
        return
    space, rest = puts[0], steps[:-2]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    states = [json.loads(step.__getstate__()) for step in steps[-2:]]
    known = replaced in states and {"type": "Prepend", "prepend": space} in states
    if not known or len(puts) > 1 or len(space) > 1 or spaces is not None:
        raise ValueError(
            f"its normaliser puts {space!r} before each text between special tokens, in "
            "a way that is not understood here; write it anew with transformers: "
            "LlamaTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    backend.normalizer = normalizers.Sequence(rest) if rest else None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(space, "first", split=False)


def _read_sentencepiece(
    file: Path, *, add_bos: bool = False
) -> "PreTrainedTokenizerFast":
    """Rebuilds a sentencepiece model, BPE or Unigram, as a fast tokenizer.

    Written out because the conversions of `transformers` 5 depend on the class asked
    for, and lose the model's dummy prefix or its model type.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{file} is not a sentencepiece model") from error
    trainer = proto.trainer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM) or not proto.pieces:
        raise ValueError(f"{file} is not a sentencepiece model of type BPE or UNIGRAM")
    backend = tokenizers.Tokenizer(_sentencepiece_model(proto))
    _set_sentencepiece_spacing(backend, proto.normalizer_spec)
    for piece in proto.pieces:
        if piece.type == piece.CONTROL:
            backend.add_special_tokens([piece.piece])
        elif piece.type == piece.USER_DEFINED:
            backend.add_tokens([tokenizers.AddedToken(piece.piece, normalized=False)])
    roles = {
        f"{role}_token": proto.pieces[index].piece
        for role in ("unk", "bos", "eos", "pad")
        if (index := getattr(trainer, f"{role}_id")) >= 0
    }
    fast = _transformers().PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, add_bos_token=add_bos, **roles)


def _sentencepiece_model(proto) -> models.Model:
    """The model of a sentencepiece file; ids are the positions of its pieces."""
    trainer = proto.trainer_spec
    if trainer.model_type == trainer.BPE:
        return models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=proto.pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    return models.Unigram(
        [(piece.piece, piece.score) for piece in proto.pieces],
        unk_id=trainer.unk_id,
        byte_fallback=trainer.byte_fallback,
    )


def _set_sentencepiece_spacing(backend: tokenizers.Tokenizer, spec) -> None:
    """Sets normaliser, pre-tokenizer and decoder by a sentencepiece NormalizerSpec."""
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
        steps.append(normalizers.Strip())
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = "first" if spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)


def _merges(proto) -> list[tuple[str, str]]:
    """BPE merges implied by the pieces: best score first, then by the parts' ids."""
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for piece in sorted(proto.pieces, key=lambda piece: -piece.score):
        if piece.type != piece.NORMAL:
            continue
        text = piece.piece
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        known = [(a, b) for a, b in splits if a in ids and b in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _transformers():
    """The `transformers` module, imported late and without its advice on PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
