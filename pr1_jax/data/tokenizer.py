"""Text to token ids and back, with the control tags as tokens (docs/method.md, section 2).

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
from tokenizers import models, pre_tokenizers

from pr1_jax import tags
from pr1_jax.data import templates
from pr1_jax.data.rows import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"  # of `from_words`
BOS = ("auto", "yes", "no")  # whether prompts begin with it
_MAX_EOS = 25  # as many as have a bit in the sampler's bans, beside the tags


class Tokenizer:
    """A Hugging Face fast tokenizer in which each tag is one token.

    Attributes:
      tag_ids: tag text -> id, in the order of `Grammar.tags`: six, or eight behind
        `use_plans`.
      eos_id: the tokenizer's own EOS, which ends what is trained on.
      eos_ids: all ids of which any ends a response, `eos_id` among them.
      pad_id: `eos_id` where the tokenizer has no padding token.
      newline_id: the "\\n" between `</Parallel>` and `<Summary>`.
      vocab_size: one more than the greatest id.
      new_tags: the tags that got a new id here; none where all were there before.
    """

    def __init__(
        self, hf_tokenizer: "PreTrainedTokenizerFast", *, eos_ids: Sequence[int] = ()
    ):
        """Wraps `hf_tokenizer`, which gets the tags that it lacks.

        Args:
          eos_ids: what the model's folder says ends a response, beside the tokenizer's
            own EOS.
        """
        if not getattr(hf_tokenizer, "is_fast", False):
            raise ValueError(f"{type(hf_tokenizer).__name__} is not a fast tokenizer")
        own = hf_tokenizer.eos_token_id
        if own is None and not eos_ids:
            raise ValueError(
                "the tokenizer has no EOS token: name one as eos_token in its "
                "tokenizer_config.json"
            )
        self.hf_tokenizer = hf_tokenizer
        self._plain: tokenizers.Tokenizer | None = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.new_tags: tuple[str, ...] = ()
        self.tag_ids: dict[str, int] = {}
        self._add_tags(tags.TAGS)
        self.eos_id: int = eos_ids[0] if own is None else own
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, self.eos_id]))
        self._check_eos()
        pad_id = hf_tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.vocab_size = 1 + max(self._backend.get_vocab().values())
        added = hf_tokenizer.added_tokens_decoder
        dropped = {i for i, token in added.items() if token.special}
        dropped |= {self.eos_id, self.pad_id}
        self._dropped = dropped - set(self.tag_ids.values())
        # What is put before a text, and not before one that goes on from another.
        spaces = self._backend.pre_tokenizer
        puts_space = isinstance(spaces, pre_tokenizers.Metaspace)
        puts_space = puts_space and spaces.prepend_scheme != "never"
        self._space = spaces.replacement if puts_space else ""
        self.newline_id = self._find_newline()
        self._bos: list[int] = []
        self._bos_in_chats = False
        self.use_bos("auto")

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that do the same, and hardly for others."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(f"{self.eos_id} {self.pad_id}".encode())
        return f"of {self.vocab_size} tokens, sha256 {digest.hexdigest()[:12]}"

    @property
    def vocabulary(self) -> str:
        """Equal for tokenizers with the same tokens at the same ids."""
        tokens = sorted((i, token) for token, i in self._backend.get_vocab().items())
        digest = hashlib.sha256(json.dumps(tokens).encode())
        return f"{len(tokens)} tokens, sha256 {digest.hexdigest()[:12]}"

    @property
    def _backend(self) -> tokenizers.Tokenizer:
        return self.hf_tokenizer.backend_tokenizer

    def use_plans(self) -> None:
        """Makes the tags of plans tokens, too: blocks are planned."""
        self._add_tags(tags.PLAN_TAGS)
        self._check_eos()
        self._dropped -= {*self.tag_ids.values()}
        self._plain = None
        self.vocab_size = 1 + max(self._backend.get_vocab().values())

    def _add_tags(self, some: Sequence[str]) -> None:
        """Makes each of some tags one token; they may need new ids."""
        new = tuple(tag for tag in some if self._backend.token_to_id(tag) is None)
        self.new_tags += new
        is_one = lambda text: (
            len(self._backend.encode(text, add_special_tokens=False).ids) == 1
        )
        for tag in some:
            if tag in new or not is_one(tag):
                # Not `special`: other tools hide special tokens when they decode.
                token = tokenizers.AddedToken(tag, special=False, normalized=False)
                self.hf_tokenizer.add_tokens([token])
        self.tag_ids |= {tag: self._backend.token_to_id(tag) for tag in some}

    def _check_eos(self) -> None:
        names = {i: tag for tag, i in self.tag_ids.items()}
        for i in self.eos_ids:
            if i in names:
                raise ValueError(f"the EOS id {i} is that of the tag {names[i]}")
        if len(self.eos_ids) > _MAX_EOS:
            raise ValueError(f"{len(self.eos_ids)} EOS ids, at most are {_MAX_EOS}")

    def use_bos(self, choice: str) -> None:
        """Sets whether prompts begin with BOS: one of `BOS`, see `with_bos`.

        Raises:
          ValueError: `yes` of a tokenizer without BOS.
        """
        if choice not in BOS:
            raise ValueError(f"data.bos={choice!r} is not one of {BOS}")
        text = self._backend.encode("\n")  # with what the tokenizer adds by itself
        begins = text.ids[: [*text.special_tokens_mask, 0].index(0)]
        own = self.hf_tokenizer.bos_token_id
        if choice == "yes" and not begins:
            if own is None:
                raise ValueError(
                    "data.bos=yes, but the tokenizer has no BOS token: name one as "
                    "bos_token in its tokenizer_config.json, or set data.bos=auto"
                )
            begins = [own]
        self._bos = [] if choice == "no" else begins
        self._bos_in_chats = choice == "yes"

    def with_bos(self, ids: list[int], *, is_chat: bool) -> list[int]:
        """A prompt's ids, with BOS before them where prompts have one.

        It is there once: a text that spells it, as some chat templates do, gets no
        second. By `auto`, which is set at first, that is where the tokenizer puts it
        by itself; what a chat template wrote has BOS only if the template wrote it. By
        `yes` every prompt has it; by `no` none gets it.
        """
        bos = self._bos if self._bos_in_chats or not is_chat else []
        at = ids.index(bos[0]) if bos and is_chat and bos[0] in ids else 0
        if self._backend.decode(ids[:at], skip_special_tokens=False).strip():
            at = 0  # it is in the text; only blanks may a template write before it
        return ids if ids[at : at + len(bos)] == bos else bos + ids

    def _find_newline(self) -> int:
        text = f"{tags.END_PARALLEL}\n{tags.SUMMARY}"
        ids = self.encode(text)
        if len(ids) != 3:
            raise ValueError(
                f"the tokenizer spells {text!r} with {len(ids)} tokens, not 3: "
                "the newline between the tags must be one token"
            )
        return ids[1]

    def encode(
        self, text: str, *, allow_tags: bool = True, continues: bool = False
    ) -> list[int]:
        """Token ids of `text`; no BOS or EOS is added.

        Args:
          text: any string; special tokens that it spells out become their ids.
          allow_tags: False for text that only talks about the tags (a prompt): they
            are then spelled with ordinary pieces.
          continues: whether it goes on from another text, as a response does from its
            prompt. Tokenizers like Llama's put a space before a text that does not.

        Raises:
          ValueError: a word-level tokenizer does not know some of the text.
        """
        backend = self._backend if allow_tags else self._plain_backend()
        before = ""
        if self._space and continues:
            before = tags.END_SUMMARY if allow_tags else _renamed(tags.END_SUMMARY)
        elif self._space and text.startswith((" ", self._space)):
            text = " " + text  # Metaspace takes a first space for its own
        try:
            ids = backend.encode(before + text, add_special_tokens=False).ids
            return ids[1:] if before else ids
        except Exception as error:  # `tokenizers` raises nothing narrower
            unknown = self._unknown_pieces(backend, text)
            if not unknown:
                raise ValueError(
                    f"the tokenizer cannot encode {text[:60]!r}: {first_line(error)}"
                ) from error
            raise ValueError(f"not in the vocabulary: {unknown} in {text!r}") from error

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """Exact text of `ids`: tags visible, EOS, padding and other specials dropped.

        `decode(encode(text)) == text`, but for text that the tokenizer's own
        normaliser changes (Qwen: Unicode NFC); `continues` is to be the same in both.
        """
        kept = [i for i in map(int, ids) if i not in self._dropped]
        if self._space and continues:
            return self._inside(kept)
        return self._backend.decode(kept, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int], *, continues: bool = False) -> list[str]:
        """What each token adds to the text; EOS is spelled out, other specials are "".

        Joined they are what `decode` gives, with the EOS tokens' texts where they stand. A
        character spelled by several tokens belongs to the last of them: "a é" in
        tokens that are bytes is `["a", " ", "", "é"]`.
        """
        kept = [(n, i) for n, i in enumerate(map(int, ids)) if i not in self._dropped]
        name = lambda i: self._backend.id_to_token(i) if i in self.eos_ids else ""
        out = [name(int(i)) for i in ids]
        text = self.decode(ids, continues=continues)
        texts = self._split([i for _, i in kept], text)
        for (n, _), text in zip(kept, texts, strict=True):
            out[n] = text
        return out

    def _split(self, ids: Sequence[int], text: str) -> list[str]:
        """`text`, which is that of `ids`, in one piece for each of them.

        Where the tokens' own texts do not add up to it, it is halved until they do, near
        the middle and where the halves' texts add up. A part that cannot be halved is
        one character, or bytes that make no character; it goes to its last token.
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
        """Two parts of `ids` with their texts; none if every split changes the text."""
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
        text = self._backend.decode([before, *ids], skip_special_tokens=False)
        return text.removeprefix(tags.END_SUMMARY)

    def label_ids(self, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Ids of the labels of paths, as they stand behind `<Path>`.

        Raises:
          ValueError: a label is not spelled exactly by ordinary tokens; names it.
        """
        return tuple(map(self._label, labels))

    def _label(self, label: str) -> tuple[int, ...]:
        path = self.tag_ids[tags.PATH]
        special = {*self.tag_ids.values(), *self.eos_ids} | self._dropped
        try:
            first, *ids = self.encode(tags.PATH + label, continues=True)
            text = self.decode([first, *ids], continues=True)
        except ValueError as error:
            what = f"is no text of the tokenizer ({error})"
        else:
            if first != path or special & {*ids}:
                what = "has a special token, such as a tag or EOS"
            elif not ids or text != tags.PATH + label:
                read = text.removeprefix(tags.PATH)
                what = f"is read as {read!r} once it is tokens"
            else:
                return tuple(ids)
        raise ValueError(
            f"rollout.path_labels: {label!r} {what}; take labels that the tokenizer "
            "spells exactly with ordinary tokens, or () for none"
        )

    def tag_pieces(self, tag: str) -> list[int]:
        """Ids of the pieces that spell `tag` where it is not a token."""
        return self.encode(tag, allow_tags=False, continues=True)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """Prompt text of `messages` (role, content) up to the assistant's turn."""
        if not self.hf_tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: set data.template to plain or "
                "instruction, or put a chat_template.jinja beside tokenizer.json"
            )
        try:
            template = self.hf_tokenizer.get_chat_template()
            names = self.hf_tokenizer.special_tokens_map
            return templates.render(template, messages, names)
        except ValueError as error:
            roles = [message["role"][:40] for message in messages[:8]]
            raise ValueError(
                f"the tokenizer's chat template does not take messages of {roles}: "
                f"{first_line(error)}; mend its chat_template.jinja or the chat_template "
                "in tokenizer_config.json, or set data.template to plain or instruction"
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
                    token["content"] = _renamed(token["content"])
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(state))
        return self._plain

    def _unknown_pieces(self, backend: tokenizers.Tokenizer, text: str) -> list[str]:
        if not isinstance(backend.model, models.WordLevel):
            return []
        if backend.pre_tokenizer is None:
            return [text]
        if backend is self._backend:
            text = re.sub("|".join(map(re.escape, self.tag_ids)), "", text)
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        known = backend.get_vocab()
        return list(dict.fromkeys(piece for piece, _ in pieces if piece not in known))


def _renamed(tag: str) -> str:
    """What a tag is called where texts only talk about the tags."""
    return f"\0{tag}\0"
