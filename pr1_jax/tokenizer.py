"""Text to token ids and back, with the six control tags as tokens (spec sections 1, 6).

`Tokenizer` wraps a Hugging Face fast tokenizer at the host edge. It differs from the
wrapped one in three ways: the tags are single tokens and stay visible in decoded text,
decoding is exact (nothing is cleaned up), and no BOS or EOS is ever put in unasked.
`transformers` takes a second to import, so it is imported where it is used.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pr1_jax import hub, tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"  # of `from_words`
_HUB_FILES = ("*token*.json", "*.model", "*.jinja")


class Tokenizer:
    """A Hugging Face fast tokenizer in which each tag is one token.

    Attributes:
      tag_ids: tag text -> id, in `tags.TAGS` order.
      eos_id, pad_id: `pad_id` is `eos_id` where the tokenizer has no padding token.
      newline_id: the "\\n" between `</Parallel>` and `<Summary>`.
      vocab_size: one more than the greatest id.
      new_tags: the tags that got a new id here; none where all were there before.
      added_tags: whether there are any such.
    """

    def __init__(self, hf_tokenizer: "PreTrainedTokenizerFast"):
        """Wraps `hf_tokenizer`, which gets the tags that it lacks."""
        if not getattr(hf_tokenizer, "is_fast", False):
            raise ValueError(f"{type(hf_tokenizer).__name__} is not a fast tokenizer")
        if hf_tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token: name one as eos_token in its "
                "tokenizer_config.json"
            )
        self.hf_tokenizer = hf_tokenizer
        self._plain: tokenizers.Tokenizer | None = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.new_tags = self._add_tags()
        self.added_tags = bool(self.new_tags)
        self.tag_ids = {tag: self._backend.token_to_id(tag) for tag in tags.TAGS}
        self.eos_id: int = hf_tokenizer.eos_token_id
        pad_id = hf_tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.vocab_size = 1 + max(self._backend.get_vocab().values())
        added = hf_tokenizer.added_tokens_decoder
        dropped = {i for i, token in added.items() if token.special}
        dropped |= {self.eos_id, self.pad_id}
        self._dropped = dropped - set(self.tag_ids.values())
        # Metaspace takes a first space for the one that it would have put there.
        spaces = self._backend.pre_tokenizer
        self._takes_first_space = (
            isinstance(spaces, pre_tokenizers.Metaspace)
            and spaces.prepend_scheme != "never"
        )
        self.newline_id = self._find_newline()

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that do the same, and hardly for others."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(f"{self.eos_id} {self.pad_id}".encode())
        return f"of {self.vocab_size} tokens, sha256 {digest.hexdigest()[:12]}"

    @property
    def _backend(self) -> tokenizers.Tokenizer:
        return self.hf_tokenizer.backend_tokenizer

    def _add_tags(self) -> tuple[str, ...]:
        """Makes every tag one token; returns those that needed a new id."""
        lacks = lambda tag: self._backend.token_to_id(tag) is None
        new = tuple(filter(lacks, tags.TAGS))
        for tag in tags.TAGS:
            ids = self._backend.encode(tag, add_special_tokens=False).ids
            if len(ids) != 1:
                # Not `special`: other tools hide special tokens when they decode.
                token = tokenizers.AddedToken(tag, special=False, normalized=False)
                self.hf_tokenizer.add_tokens([token])
        return new

    def _find_newline(self) -> int:
        text = f"{tags.END_PARALLEL}\n{tags.SUMMARY}"
        ids = self.encode(text)
        if len(ids) != 3:
            raise ValueError(
                f"the tokenizer spells {text!r} with {len(ids)} tokens, not 3: "
                "the newline between the tags must be one token"
            )
        return ids[1]

    def encode(self, text: str, *, allow_tags: bool = True) -> list[int]:
        """Token ids of `text`; no BOS or EOS is added.

        Args:
          text: any string; special tokens that it spells out become their ids.
          allow_tags: False for text that only talks about the tags (a prompt): they
            are then spelled with ordinary pieces.

        Raises:
          ValueError: a word-level tokenizer does not know some of the text.
        """
        backend = self._backend if allow_tags else self._plain_backend()
        if self._takes_first_space and text.startswith(" "):
            text = " " + text
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # `tokenizers` raises nothing narrower
            unknown = self._unknown_pieces(backend, text)
            if not unknown:
                reason = f"the tokenizer cannot encode {text[:60]!r}: {_line(error)}"
                raise ValueError(reason) from error
            raise ValueError(f"not in the vocabulary: {unknown} in {text!r}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Exact text of `ids`: tags visible, EOS, padding and other specials dropped.

        `decode(encode(text)) == text`, but for text that the tokenizer's own
        normaliser changes (Qwen: Unicode NFC).
        """
        kept = [i for i in map(int, ids) if i not in self._dropped]
        return self._backend.decode(kept, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; EOS is spelled out, other specials are "".

        Joined they are `decode(ids)`, with the EOS token's text where one stands. A
        character spelled by several tokens belongs to the last of them: "a é" in
        tokens that are bytes is `["a", " ", "", "é"]`.
        """
        kept = [(n, i) for n, i in enumerate(map(int, ids)) if i not in self._dropped]
        out = [self.eos_text if int(i) == self.eos_id else "" for i in ids]
        found = self._split([i for _, i in kept], self.decode(ids))
        for (n, _), piece in zip(kept, found, strict=True):
            out[n] = piece
        return out

    @property
    def eos_text(self) -> str:
        """How the EOS token is spelled."""
        return str(self.hf_tokenizer.eos_token)

    def _split(self, ids: Sequence[int], text: str) -> list[str]:
        """`text`, which is that of `ids`, in one piece for each of them.

        Where the tokens' own texts do not make it up, it is halved until they do, near
        the middle where the halves' texts are the whole's. What cannot be halved is one
        character, or bytes that are none, and goes to its last token.
        """
        alone = {i: self._inside([i]) for i in set(ids)}
        # Some decoders drop a space before the first token.
        behind = self._inside(ids)
        lost = behind.removesuffix(text) if behind.endswith(text) else ""
        out: list[str] = []
        waiting = [(list(ids), lost + text)] if ids else []  # the next one last
        while waiting:
            part, whole = waiting.pop()
            pieces = [alone[i] for i in part]
            if "".join(pieces) == whole:
                out += pieces
            elif halves := self._halves(part, whole):
                waiting += reversed(halves)
            else:
                out += [""] * (len(part) - 1) + [whole]
        for n, piece in enumerate(out):
            if not lost:
                break
            out[n], lost = piece[len(lost) :], lost[len(piece) :]
        return out

    def _halves(self, ids: list[int], text: str) -> list[tuple[list[int], str]]:
        """Two parts of `ids` with their texts, none where a split changes the text."""
        middle = len(ids) // 2
        for shift in (0, -1, 1, -2, 2, -3, 3):  # a character has four bytes at most
            at = middle + shift
            if not 0 < at < len(ids):
                continue
            left = self._inside(ids[:at])
            right = text.removeprefix(left)
            if text == left + right and self._inside(ids[at:]) == right:
                return [(ids[:at], left), (ids[at:], right)]
        return []

    def _inside(self, ids: Sequence[int]) -> str:
        """The text of `ids` behind another token."""
        before = self.tag_ids[tags.END_SUMMARY]
        text = self._backend_text([before, *ids])
        return text.removeprefix(tags.END_SUMMARY)

    def _backend_text(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def tag_pieces(self, tag: str) -> list[int]:
        """Ids of the pieces that spell `tag` where it is not a token."""
        return self.encode(tag, allow_tags=False)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """Prompt text of `messages` (role, content) up to the assistant's turn."""
        if not self.hf_tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: set data.template to plain or "
                "instruction, or put a chat_template.jinja beside tokenizer.json"
            )
        try:
            return self.hf_tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises anything
            roles = [message["role"][:40] for message in messages[:8]]
            raise ValueError(
                f"the tokenizer's chat template does not take messages of {roles}: "
                f"{_line(error)}"
            ) from error

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and its settings; `load` and `transformers` read it."""
        self.hf_tokenizer.save_pretrained(os.fspath(folder))
        file = Path(folder) / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        if settings.get("tokenizer_class") == "TokenizersBackend":
            # Its name before transformers 5, which knows both.
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A copy that does not know the tags, made when first needed."""
        if self._plain is None:
            state = json.loads(self._backend.to_str())
            for token in state["added_tokens"]:
                if token["content"] in self.tag_ids:  # renamed: other ids must stay
                    token["content"] = f"\0{token['content']}\0"
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(state))
        return self._plain

    def _unknown_pieces(self, backend: tokenizers.Tokenizer, text: str) -> list[str]:
        if not isinstance(backend.model, models.WordLevel):
            return []
        if backend.pre_tokenizer is None:
            return [text]
        if backend is self._backend:
            text = re.sub("|".join(map(re.escape, tags.TAGS)), "", text)
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        known = backend.get_vocab()
        return list(dict.fromkeys(piece for piece, _ in pieces if piece not in known))


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
        return _wrapped(_read_folder(path), name)
    if hub.looks_local(name):
        raise FileNotFoundError(f"no tokenizer at {name}: no such file or folder")
    return _wrapped(_read_folder(hub.download(name, _HUB_FILES)), name)


def _wrapped(fast: "PreTrainedTokenizerFast", name: str) -> Tokenizer:
    """`Tokenizer(fast)`; whatever stands against that is a ValueError of one line."""
    try:
        return Tokenizer(fast)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"cannot use the tokenizer {name}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


def _read_folder(folder: Path) -> "PreTrainedTokenizerFast":
    if (folder / "tokenizer.json").is_file():
        # Not AutoTokenizer: it rebuilds some tokenizers by the model's type, and may
        # run code of the folder.
        fast = _transformers().PreTrainedTokenizerFast
        # The file is given, lest the folder's settings name another, maybe elsewhere.
        file = str(folder / "tokenizer.json")
        try:
            return fast.from_pretrained(
                folder, local_files_only=True, tokenizer_file=file
            )
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(
                f"cannot read {folder}/tokenizer.json: {_line(error)}"
            ) from error
    spm = sorted(folder.glob("*.model"))
    if len(spm) == 1:
        return _read_sentencepiece(spm[0])
    raise FileNotFoundError(f"{folder} has no tokenizer.json and no tokenizer.model")


def _read_sentencepiece(file: Path) -> "PreTrainedTokenizerFast":
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
    return fast(tokenizer_object=backend, **roles)


def _sentencepiece_model(proto) -> models.Model:
    """The model of a sentencepiece file; ids are the pieces' places in it."""
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
