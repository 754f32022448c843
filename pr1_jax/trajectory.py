"""A prompt and its response as tokens, in canonical order; and batches of them.

The sampler makes trajectories, they are rewarded, and the trainer packs them into
batches. Traces for SFT are the same, without sampled log-probs.
"""

import dataclasses
from collections.abc import Iterator, Sequence

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

    @property
    def num_paths(self) -> tuple[int, ...]:
        """Number of paths of each block, in order."""
        most = np.zeros(self.num_blocks + 1, int)
        np.maximum.at(most, self.block, self.path)
        return tuple(most[1:].tolist())


def structured(sampled: Trajectory) -> Trajectory:
    """A response with the structured layout's positions, however it was sampled."""
    positions = layout.structured_positions(
        sampled.block, sampled.path, len(sampled.prompt)
    )
    return dataclasses.replace(sampled, positions=positions)


@flax.struct.dataclass
class Batch:
    """Trajectories padded to one length, prompt first. All [B, T] unless noted.

    A row is a trajectory (`pack`), or holds several one after another (`pack_rows`).
    Entry t of `bans`, `loss_mask` and `old_logps` is that of token t, which the model
    predicts at t − 1; a trajectory's entry 0 is never trained on.
    """

    tokens: jax.Array  # int32, pad 0
    positions: jax.Array  # int32
    block: jax.Array  # int32; all 0 in the causal variant
    path: jax.Array  # int32; all 0 in the causal variant
    bans: jax.Array  # int32
    loss_mask: jax.Array  # bool
    old_logps: jax.Array  # float32, 0 where masked
    # [B] float32, or [B, T] where rows hold several trajectories; 0 in SFT
    advantages: jax.Array
    # [B] int32, how many tokens of the prompt the rows of a group share; 0 = none.
    shared: jax.Array
    importance: jax.Array | None = None  # float32, weights of the policy's gain; 1
    # int32, slot of the first token of a token's trajectory, and of padding its own;
    # None: each row is a trajectory.
    start: jax.Array | None = None


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
    rows = [[] if t is None else [t] for t in trajectories]
    nothing = np.zeros(len(rows))
    return Batch(
        **_filled(rows, length, variant, train_on_forced),
        advantages=np.asarray(
            nothing if advantages is None else advantages, np.float32
        ),
        shared=np.asarray(nothing if shared is None else shared, np.int32),
    )


def pack_rows(
    rows: Sequence[Sequence[Trajectory]],
    length: int,
    *,
    num_rows: int,
    variant: str,
    train_on_forced: bool = False,
    advantages: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """Packs trajectories into one NumPy batch whose rows hold several each.

    Args:
      rows: the trajectories of each row; prompts have a token at least.
      length: tokens of a row. num_rows: of the batch; those behind `rows` are empty.
      advantages: of each trajectory; None = 0.

    Raises:
      ValueError: a row has more than `length` tokens, or the variant is unknown.
    """
    rows = [*rows, *[()] * (num_rows - len(rows))]
    start = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
    spread = np.zeros(start.shape, np.float32)
    for index, row in enumerate(rows):
        for number, (first, t) in enumerate(places(row)):
            assert len(t.prompt), "a first token would be predicted by another's last"
            own = index, slice(first, first + len(t))
            start[own] = first
            spread[own] = 0.0 if advantages is None else advantages[index][number]
    return Batch(
        **_filled(rows, length, variant, train_on_forced),
        advantages=spread,
        shared=np.zeros(num_rows, np.int32),
        start=start,
    )


def places(row: Sequence[Trajectory]) -> Iterator[tuple[int, Trajectory]]:
    """The trajectories of a row, each with the slot of its first token."""
    first = 0
    for t in row:
        yield first, t
        first += len(t)


def _filled(
    rows: Sequence[Sequence[Trajectory]],
    length: int,
    variant: str,
    train_on_forced: bool,
) -> dict[str, np.ndarray]:
    """The fields of a `Batch` that are of single tokens, as `pack` has them."""
    layout.check_variant(variant)
    shape = (len(rows), length)
    fields = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "positions", "block", "path", "bans")
    }
    loss_mask, old_logps = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        for first, t in places(row):
            start, end = first + len(t.prompt), first + len(t)
            if end > length:
                what = "a trajectory" if len(row) == 1 else "a row"
                raise ValueError(f"{what} of {end} tokens is longer than {length}")
            prompt, response = (index, slice(first, start)), (index, slice(start, end))
            fields["tokens"][prompt] = t.prompt
            fields["positions"][prompt] = np.arange(len(t.prompt))
            for name in ("tokens", "positions", "bans"):
                fields[name][response] = getattr(t, name)
            if variant == "structured":
                fields["block"][response] = t.block
                fields["path"][response] = t.path
            loss_mask[response] = True if train_on_forced else ~t.forced
            old_logps[response] = t.logps
    return fields | {"loss_mask": loss_mask, "old_logps": old_logps}
