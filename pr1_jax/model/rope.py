"""Rotary frequencies of models whose context was stretched after their first training.

A model that was trained on texts of one length reads longer ones once its low
frequencies, whose waves are longer than those texts, are made lower still. Each class
here is one rule for that; its fields have the names of config.json, `rope_type` among
them, so that a record of them tells one rule from another. All arithmetic is
float32 in the order of `transformers` (`modeling_rope_utils`), since a frequency's
rounding error grows with the position.
"""

import dataclasses
import math

import numpy as np

Frequencies = tuple[np.ndarray, float]


@dataclasses.dataclass(frozen=True)
class Linear:
    """Divides all frequencies by a factor (arXiv:2306.15595)."""

    factor: float
    rope_type: str = dataclasses.field(default="linear", init=False)

    def frequencies(self, head_dim: int, base: float) -> Frequencies:
        """Frequencies [H/2] float32, in radians a position, and the factor of queries
        and keys, which multiplies sines and cosines."""
        return _plain(head_dim, base) / np.float32(self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Divides low frequencies by a factor, and high ones not (Llama 3.1 and newer).

    A wave is long where the first context holds fewer than `low_freq_factor` of it, and
    short where it holds more than `high_freq_factor`; between them the divisor changes
    steadily.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # tokens of the first context
    rope_type: str = dataclasses.field(default="llama3", init=False)

    def frequencies(self, head_dim: int, base: float) -> Frequencies:
        """As `Linear.frequencies`."""
        plain = _plain(head_dim, base)
        waves = self.original_max_position_embeddings / (2 * math.pi / plain)
        span = self.high_freq_factor - self.low_freq_factor
        share = (waves - self.low_freq_factor) / np.float32(span)
        between = (1 - share) * plain / self.factor + share * plain
        low, high = waves < self.low_freq_factor, waves > self.high_freq_factor
        return np.where(low, plain / self.factor, np.where(high, plain, between)), 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Divides low frequencies by a factor and sharpens attention (arXiv:2309.00071).

    A frequency is high where its wave turns more than `beta_fast` times in the first
    context, and low where it turns fewer than `beta_slow` times; between them the
    divisor changes steadily with the frequency's index.
    """

    factor: float
    original_max_position_embeddings: int  # tokens of the first context
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: the paper's, by `factor`
    truncate: bool = True  # the two limits are whole indices
    rope_type: str = dataclasses.field(default="yarn", init=False)

    def frequencies(self, head_dim: int, base: float) -> Frequencies:
        """As `Linear.frequencies`."""
        powers = _powers(head_dim, base)
        low, high = self._limits(head_dim, base)
        width = high - low or 0.001  # as there, against a division by 0
        index = np.arange(head_dim // 2, dtype=np.float32)
        kept = 1 - np.clip((index - np.float32(low)) / np.float32(width), 0, 1)
        stretched = 1 / (np.float32(self.factor) * powers)
        mixed = stretched * (1 - kept) + 1 / powers * kept
        sharpened = self.attention_factor or paper_attention_factor(self.factor)
        return mixed, sharpened

    def _limits(self, head_dim: int, base: float) -> tuple[float, float]:
        """Indices of the frequencies that turn `beta_fast` and `beta_slow` times."""
        length = self.original_max_position_embeddings
        index_of = lambda turns: (
            head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
        )
        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, head_dim - 1)


Scaling = Linear | Llama3 | Yarn


def paper_attention_factor(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys with, by its divisor of frequencies."""
    return 0.1 * scale * math.log(factor) + 1.0


def _powers(head_dim: int, base: float) -> np.ndarray:
    """Inverse frequencies [H/2] float32 of the plain rule."""
    shares = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    # Libraries round powers of float32 each in their own way; PyTorch's are as these.
    return (base ** shares.astype(np.float64)).astype(np.float32)


def _plain(head_dim: int, base: float) -> np.ndarray:
    return 1 / _powers(head_dim, base)
