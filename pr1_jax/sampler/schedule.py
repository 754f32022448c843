"""The shapes of decoding: which there are, and which comes next.

Shapes come from short lists, so that few are ever compiled.
"""

import dataclasses
from collections.abc import Sequence

from pr1_jax.sampler.settings import Settings

REFILL_SHARE = 0.0625  # finished rows are refilled once they are this share of all
FEWEST_ROWS, FEWEST_SLOTS, FEWEST_PROMPT_TOKENS = 8, 128, 64  # smallest shapes


@dataclasses.dataclass(frozen=True)
class Batching:
    """How many responses are decoded at the same time, and in what portions.

    Attributes:
      rows: responses decoded at the same time, by all shards together; rounded up to a
        multiple of them.
      shards: parts that this process's devices split rows into.
      group_size: rows that can share one copy of their prompt.
      prompts_per_prefill: prompts a prefill takes, at most; 0 = `rows`.
      lane_buckets: compiled sizes of the list of live lanes, in units of `rows`. 1 (main
        streams only) and `num_paths` are always there, more never.
      steps_per_chunk: decode steps between two looks of the host.
      one_size: all rows and slots are there from the start, and nothing is compiled
        later for fewer or more.
      limited: each response has `Limits` of its own, and every row may have a prompt of
        its own, too; as for requests of many people.
    """

    rows: int
    shards: int = 1
    group_size: int = 1
    prompts_per_prefill: int = 0
    lane_buckets: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    steps_per_chunk: int = 32
    one_size: bool = False
    limited: bool = False


class Schedule:
    """The shapes that follow from settings.

    Attributes:
      shards: as of `Batching`. All that follows is of one of them, but for
        `steps_per_chunk`.
      rows: the most that are decoded at the same time.
      entries: prompts that are kept. readers: rows that each of them can have.
      limited: as of `Batching`.
      row_sizes, slot_sizes, prompt_sizes: rows, slots of a response and tokens of a
        prompt that are compiled for, ascending.
    """

    def __init__(self, settings: Settings, batching: Batching):
        self._settings, self._batching = settings, batching
        self.shards = batching.shards
        self.steps_per_chunk = batching.steps_per_chunk
        self.rows = rows = -(-batching.rows // self.shards)
        self.readers = min(batching.group_size, rows)
        groups = -(-rows // self.readers)
        # A group that is not quite done keeps its prompt's entry: with fewer entries,
        # rows would wait for the longest response of some group.
        self.entries = rows
        if self.readers > 1 and not batching.limited:
            self.entries = min(rows, 5 * groups // 2 + 2)
        self.limited = batching.limited
        per_prefill = batching.prompts_per_prefill or rows * self.shards
        self.prompts_per_prefill = min(-(-per_prefill // self.shards), self.entries)
        longest = settings.max_response_tokens
        self.row_sizes = [n for n in (rows // 4, rows // 2) if n >= FEWEST_ROWS]
        self.row_sizes.append(rows)
        self.slot_sizes = _doubling(max(FEWEST_SLOTS, -(-longest // 8)), longest)
        if batching.one_size:
            self.row_sizes, self.slot_sizes = self.row_sizes[-1:], self.slot_sizes[-1:]
        self.prompt_sizes = _doubling(FEWEST_PROMPT_TOKENS, settings.max_prompt_tokens)

    def lane_sizes(self, rows: int) -> list[int]:
        """Lengths of the list of live lanes that are compiled for, ascending."""
        paths = self._settings.num_paths
        shares = {1.0, float(paths), *map(float, self._batching.lane_buckets)}
        shares = sorted(share for share in shares if 1 <= share <= paths)
        if not self._settings.max_blocks:
            shares = [1.0]
        if rows < self.rows and paths <= 2:
            shares = shares[-1:]  # soon over: not worth more than one compilation
        return sorted({round(share * rows) for share in shares})

    def lanes(self, rows: int, needed: int, is_inside_block: bool) -> int:
        """The fewest compiled lanes that can feed all live ones of so many rows."""
        fits = lambda n: n >= needed and not (is_inside_block and n == rows)
        return next(n for n in self.lane_sizes(rows) if fits(n))

    def enough_idle(self, rows: int, waiting: int) -> int:
        """Idle rows of all shards at which decoding stops.

        It stops to refill them, or to go on with fewer rows where no response waits.

        Args:
          rows: of a shard, now. waiting: responses.
        """
        if waiting:
            enough = round(REFILL_SHARE * self._batching.rows)
            return min(max(1, enough), waiting)
        fewer = max((n for n in self.row_sizes if n < rows), default=0)
        return (rows - fewer) * self.shards


def fit(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that will do."""
    return next(size for size in sizes if size >= needed)


def _doubling(smallest: int, largest: int) -> list[int]:
    """`smallest`, twice it, … up to half of `largest`, and `largest`."""
    sizes = []
    while smallest <= largest / 2:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, largest]
