"""A response with a block, and how it grows step by step, without a sampler."""

import dataclasses

import numpy as np

from pr1_jax import tags
from pr1_jax.data import traces

LEFT = "On the left side I try every number in turn, naïvely, and it takes a while."
RIGHT = "Right to left: found."
THIRD = (
    "Third\nof three, with\nlines of its own\nand the longest of them all by far, 数学."
)
SUMMARY = "Right has found it; left agrees, where it looked."
REST = "\nSo it is done.\n\nFinal Answer: 6"


def text_of(*paths, before="Let me see: ", plans=()):
    """The text of a response with these paths, and maybe a plan of each."""
    inside = "".join(tags.PLAN + plan + tags.END_PLAN for plan in plans)
    inside += "".join(tags.PATH + path + tags.END_PATH for path in paths)
    return (
        f"{before}{tags.PARALLEL}{inside}{tags.END_PARALLEL}\n"
        f"{tags.SUMMARY}{SUMMARY}{tags.END_SUMMARY}{REST}"
    )


def steps(tokenizer, question, response, grammar=tags.PLAIN):
    """The trajectory after each decode step, the last one whole.

    In the structured variant a token's position says at which step it is written.
    """
    prompt, given = tokenizer.encode(question), {"grammar": grammar}
    whole = traces.from_text(prompt, response, tokenizer, variant="structured", **given)
    found = []
    for step in range(1, whole.positions.max() - len(prompt) + 2):
        kept = whole.positions < len(prompt) + step
        names = ("tokens", "positions", "block", "path", "forced", "bans", "logps")
        found.append(
            dataclasses.replace(
                whole,
                finished=bool(kept.all()),
                sequential_steps=step,
                **{name: np.asarray(getattr(whole, name))[kept] for name in names},
            )
        )
    return found
