"""Traces for SFT: texts with tags as trajectories."""

from collections.abc import Sequence

import numpy as np

from pr1_jax import layout, tags
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.trajectory import Trajectory


def from_text(
    prompt: Sequence[int],
    response: str,
    tokenizer: Tokenizer,
    *,
    variant: str,
    grammar: tags.Grammar = tags.PLAIN,
) -> Trajectory:
    """A trajectory of an SFT trace in canonical text; EOS is appended.

    Labels of paths are the tokens that the sampler forces, whatever follows them, and
    `forced`. No other token is: a trace has nobody else who wrote them.

    Raises:
      ValueError: the trace is malformed (with the reason), in either variant; or the
        variant is unknown.
    """
    layout.check_variant(variant)
    ids: list[int] = []
    forced: list[bool] = []
    label_ids = tokenizer.label_ids(grammar.labels) if grammar.labels else ()
    for text, path in tags.split_labels(response, grammar):
        is_label = path is not None
        some = label_ids[path] if is_label else tokenizer.encode(text, continues=True)
        ids += some
        forced += [is_label] * len(some)
    tokens = np.array([*ids, tokenizer.eos_id], np.int32)
    tag_ids = {tag: tokenizer.tag_ids[tag] for tag in grammar.tags}
    parsed = layout.structured(tokens, tag_ids, len(prompt))
    positions, block, path = (x[len(prompt) :] for x in parsed)
    longest = sum(
        np.bincount(path[block == b])[1:].max() for b in range(1, block.max() + 1)
    )
    if variant == "causal":
        positions = np.arange(len(prompt), len(prompt) + len(tokens), dtype=np.int32)
    nothing = np.zeros(len(tokens), np.int32)
    return Trajectory(
        prompt=np.array(prompt, np.int32),
        tokens=tokens,
        positions=positions,
        block=block,
        path=path,
        forced=np.array([*forced, False]),
        bans=nothing,
        logps=nothing.astype(np.float32),
        finished=True,
        sequential_steps=int((path == 0).sum() + longest),
    )
