"""A prompt and its response as tokens, in canonical order; and batches of them.

The sampler makes trajectories, they are rewarded, and the trainer packs them into
batches. Traces for SFT are the same, without sampled log-probs.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from pr1_jax import layout


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A prompt and one response. All arrays but `prompt` are over the T response tokens.

    Attributes:
      prompt: [prompt] int32 token ids.
      tokens: [T] int32, EOS included where one was written.
      positions: [T] int32 rotary positions under the variant that made it.
      block, path: [T] int32 labels (`layout.Layout`), recorded, never guessed.
      forced: [T] bool, written by the runtime and not by the model.
      bans: [T] int32, bit i set = special token i was banned in this draw, and bit
        `policy.ORDINARY` = all others were.
      logps: [T] float32 as sampled, 0 where forced.
      finished: ended with EOS, not cut off at its budget or deadline.
      sequential_steps: decode steps on the critical path.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    block: np.ndarray
    path: np.ndarray
    forced: np.ndarray
    bans: np.ndarray
    logps: np.ndarray
    finished: bool
    sequential_steps: int

    def __len__(self) -> int:
        """Tokens, prompt included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the response opened."""
        return int(self.block.max(initial=0))


def structured(sampled: Trajectory) -> Trajectory:
    """A response with the structured layout's positions, however it was sampled."""
    positions = layout.structured_positions(
        sampled.block, sampled.path, len(sampled.prompt)
    )
    return dataclasses.replace(sampled, positions=positions)


@flax.struct.dataclass
class Batch:
    """Trajectories padded to one length, prompt first. All [B, T] unless noted.

    Entry t of `bans`, `loss_mask` and `old_logps` is that of token t, which the model
    predicts at t − 1; entry 0 is never trained on.
    """

    tokens: jax.Array  # int32, pad 0
    positions: jax.Array  # int32
    block: jax.Array  # int32; all 0 in the causal variant
    path: jax.Array  # int32; all 0 in the causal variant
    bans: jax.Array  # int32
    loss_mask: jax.Array  # bool
    old_logps: jax.Array  # float32, 0 where masked
    advantages: jax.Array  # [B] float32, 0 in SFT
    # [B] int32, how many tokens of the prompt the rows of a group share; 0 = none.
    shared: jax.Array
    importance: jax.Array | None = None  # float32, weights of the policy's gain; 1


def pack(
    trajectories: Sequence[Trajectory | None],
    length: int,
    *,
    variant: str,
    train_on_forced: bool = False,
    advantages: Sequence[float] | None = None,
    shared: Sequence[int] | None = None,
) -> Batch:
    """Packs trajectories into one NumPy batch of `length` tokens a row.

    None makes an empty row, which is not trained on.

    Args:
      advantages, shared: of each row, as `Batch` has them; None = 0.

    Raises:
      ValueError: a trajectory is longer than `length`, or the variant is unknown.
    """
    layout.check_variant(variant)
    shape = (len(trajectories), length)
    ints = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "positions", "block", "path", "bans")
    }
    loss_mask, old_logps = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, t in enumerate(trajectories):
        if t is None:
            continue
        start, end = len(t.prompt), len(t.prompt) + len(t.tokens)
        if end > length:
            raise ValueError(f"a trajectory of {end} tokens is longer than {length}")
        ints["tokens"][row, :start] = t.prompt
        ints["positions"][row, :start] = np.arange(start)
        for name in ("tokens", "positions", "bans"):
            ints[name][row, start:end] = getattr(t, name)
        if variant == "structured":
            ints["block"][row, start:end] = t.block
            ints["path"][row, start:end] = t.path
        loss_mask[row, start:end] = True if train_on_forced else ~t.forced
        old_logps[row, start:end] = t.logps
    nothing = np.zeros(shape[0])
    return Batch(
        **ints,
        loss_mask=loss_mask,
        old_logps=old_logps,
        advantages=np.asarray(
            nothing if advantages is None else advantages, np.float32
        ),
        shared=np.asarray(nothing if shared is None else shared, np.int32),
    )
