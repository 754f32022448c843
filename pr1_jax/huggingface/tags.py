"""Rows of the embedding for the six tags (docs/method.md, section 6)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.model.config import ModelConfig


def resize_embeddings(
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    key: jax.Array,
    *,
    noise: float = 0.2,
    shardings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], ModelConfig]:
    """Gives the tags that the tokenizer has newly got their rows.

    A tag's row (and output row, where untied) is the mean of the rows of the pieces
    that spelled it, plus normal noise. Where the vocabulary has unused rows at its end
    (Qwen), those are overwritten; otherwise it grows. Nothing changes where the
    tokenizer brought the tags along.

    Args:
      params: unboxed. config: of `params`. tokenizer: of this model.
      key: for the noise.
      noise: standard deviation of the noise, as a share of the pieces' own. On
        SmolLM2-135M, 0.2 brings the greatest cosine between two tag rows from 0.90 to
        0.83 and leaves the text's likelihood as it is; from 1.0 on it suffers.
      shardings: of the new parameters; None = as the old ones.

    Returns:
      New parameters and config; other arrays are shared with the old ones.

    Raises:
      ValueError: the tokenizer has more tokens than the model, tags aside.
    """
    check_vocab_size(config, tokenizer)
    params = dict(params)
    if not tokenizer.new_tags:
        return params, config
    vocab_size = max(config.vocab_size, tokenizer.vocab_size)
    tag_ids = np.array([tokenizer.tag_ids[tag] for tag in tokenizer.new_tags])
    spelled = [tokenizer.tag_pieces(tag) for tag in tokenizer.new_tags]
    owner = np.repeat(np.arange(len(spelled)), [len(ids) for ids in spelled])
    is_its = owner == np.arange(len(spelled))[:, None]
    averages = is_its / is_its.sum(axis=1, keepdims=True, dtype=np.float32)
    for i, name in enumerate(["embedding", "head"]):
        if name in params:
            rows = params[name]
            shape = (len(spelled), config.width)
            offsets = noise * jax.random.normal(jax.random.fold_in(key, i), shape)
            # One program, so that it also runs on rows sharded over hosts.
            set_rows = jax.jit(
                _with_tag_rows,
                static_argnames="vocab_size",
                out_shardings=shardings[name] if shardings else rows.sharding,
            )
            pieces = np.concatenate(spelled)
            params[name] = set_rows(
                rows, tag_ids, pieces, averages, offsets, vocab_size=vocab_size
            )
    return params, dataclasses.replace(config, vocab_size=vocab_size)


def check_vocab_size(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer has more tokens than the model, tags aside.

    Those that are not used have been left out by then (`data.unused_tokens`).
    """
    base_size = tokenizer.vocab_size - len(tokenizer.new_tags)
    if base_size > config.vocab_size:
        first = range(config.vocab_size, min(base_size, config.vocab_size + 3))
        named = ", ".join(
            map(repr, tokenizer.hf_tokenizer.convert_ids_to_tokens(first))
        )
        raise ValueError(
            f"the tokenizer has {base_size} tokens, the model's vocab_size is "
            f"{config.vocab_size}, which leaves no rows for {named}: take the model's own "
            "tokenizer, or give it rows with transformers' resize_token_embeddings"
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
    grown = jnp.pad(rows, [(0, vocab_size - len(rows)), (0, 0)])
    return grown.at[tag_ids].set(new.astype(rows.dtype))
