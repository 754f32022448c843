"""Added tokens that a model has no rows for, taken out of its tokenizer.

Many a tokenizer has got a padding token of which its model was never told: there is one
more token than rows. Such a token can be neither read nor written; without it the
tokenizer spells its text, as it did when the model was trained.
"""

import json
from typing import TYPE_CHECKING, Any

import tokenizers
from absl import logging

from pr1_jax import tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def drop(fast: "PreTrainedTokenizerFast", rows: int) -> None:
    """Takes the added tokens from id `rows` on out of `fast`, and logs them.

    Nothing changes where one of these is used: EOS, BOS, a tag, or a token of the
    vocabulary, the chat template or the post-processor.
    """
    backend = fast.backend_tokenizer
    state = json.loads(backend.to_str())
    beyond = [t["content"] for t in state["added_tokens"] if t["id"] >= rows]
    if not beyond or any(_is_used(token, fast, state) for token in beyond):
        return
    kept = [t for t in state["added_tokens"] if t["id"] < rows]
    state["added_tokens"] = kept
    fast._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    for role, token in fast.special_tokens_map.items():
        if token in beyond:
            setattr(fast, role, None)
    named = fast.init_kwargs.get("model_specific_special_tokens", {})
    for role in [role for role, token in named.items() if str(token) in beyond]:
        del named[role]  # else `save` would bring it back
    others = fast.extra_special_tokens
    fast.extra_special_tokens = [token for token in others if token not in beyond]
    logging.warning(
        "left out of the tokenizer, since the model has only %d rows and none for them: "
        "%s; their text is spelled instead",
        rows,
        ", ".join(map(repr, beyond))[:500],
    )


def _is_used(token: str, fast: "PreTrainedTokenizerFast", state: Any) -> bool:
    """Whether encoding, prompts or responses may need an added token."""
    model, roles = state["model"], fast.special_tokens_map
    template = json.dumps(fast.chat_template or "", ensure_ascii=False)
    processor = json.dumps(state["post_processor"], ensure_ascii=False)
    quoted = json.dumps(token, ensure_ascii=False)
    return (
        token in tags.TAGS
        or token in (roles.get("eos_token"), roles.get("bos_token"))
        or token == model.get("unk_token")
        or token in fast.backend_tokenizer.get_vocab(with_added_tokens=False)
        or quoted[1:-1] in template
        or any(role in template for role, named in roles.items() if named == token)
        or quoted in processor
    )
