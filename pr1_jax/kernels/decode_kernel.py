"""The kernel of `decode`: what it goes over, what it keeps, its transfers and sums.

A call normalises and rotates the step's own queries and keys, while the first tiles are
fetched. It then goes over the keys and values in use, once: over the prompts that are
read, each for all lanes of all rows that read it, and then over the slots that each row
has filled, for all lanes of the row. Maximum, sum and output of every lane stay in VMEM
from the one to the other (online softmax, https://arxiv.org/abs/1805.02867). On its way
the kernel puts the step's own keys and values into the cache, in place.

Where H is no multiple of the 128 lanes of a vector register, queries have zeros where
values lie, so that nothing is cut out of a register.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pr1_jax.kernels.pallas_kernel import NEG_INF

PIECE = 128  # slots of a transfer; a cache has a multiple of them
WINDOW = 16  # slots that are written at once: rows of a register of bfloat16
SUBLANES = 8  # rows of a register of float32

_REGISTER = 128  # lanes of a vector register
_LANES = (32, 16)  # of the step, which are normalised and rotated at once
_TILES = 4  # in VMEM: one is computed, the others are fetched
_WRITES = 4  # windows that are on their way to memory


class Walk(NamedTuple):
    """What a decode step goes over: a list of tiles, the same for all layers.

    A tile is of a sequence: number e < M is entry e of the prompts, M + b is row b.
    There are I tiles at most, of T slots each. Lanes are numbered in a flat list of L.
    """

    count: jax.Array  # [1] int32, tiles in use, the first ones
    sequence: jax.Array  # [I] int32
    tile: jax.Array  # [I] int32, which one of its sequence
    length: jax.Array  # [M + B] int32, tokens of a sequence; 0: nobody reads it
    readers: jax.Array  # [M · readers · P] int32, lanes that read an entry; L: none
    lanes: jax.Array  # [B · P] int32, lanes of a row; L: not fed
    slot: jax.Array  # [B · P] int32, where its keys and values go; −1: nowhere
    visible: jax.Array  # [B, S / T, 1, T] int32, bit p: lane p sees the slot


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call."""

    entries: int
    row_lanes: int  # of a row
    entry_lanes: int  # that can read an entry
    heads: int  # key heads of a program of the kernel
    head_dim: int
    groups: int  # query heads that share a key head
    queries: int  # sublanes that these take
    norm_eps: float | None  # queries and keys are normalised; None: they are already
    is_rotated: bool  # whether they are already
    tile: int  # slots
    window: int  # slots that a row's new tokens lie in

    @property
    def _is_wide(self) -> bool:
        """Whether heads fill registers: keys and values are cut apart at no cost."""
        return self.head_dim % _REGISTER == 0

    @property
    def keys(self) -> slice:
        """What of a token queries are multiplied with."""
        return slice(0, self.head_dim if self._is_wide else 2 * self.head_dim)

    @property
    def values(self) -> slice:
        """What of a token is summed."""
        return slice(self.head_dim if self._is_wide else 0, 2 * self.head_dim)

    @property
    def sum_width(self) -> int:
        """Numbers of such a sum."""
        return self.values.stop - self.values.start


class Refs(NamedTuple):
    """Arrays of the kernel: after the scalars of `Walk`, and before its own scratch.

    `own_before` is `own`, and is left alone.
    """

    projected: jax.Array  # [L, k · (G + 2) · H]: of k heads G queries, key, value
    angles: jax.Array  # [2, L, H] float32, sines and cosines
    scales: jax.Array  # [2, H] float32, of the norms of queries and keys
    visible: jax.Array  # in memory, as of `Walk`
    prompts: jax.Array  # in memory
    own_before: jax.Array
    out: jax.Array  # [L, k · G · H]
    own: jax.Array  # in memory
    q: jax.Array  # [k, G, L, Q] float32
    new: jax.Array  # [k, L, 2 H] float32
    found: jax.Array  # [k, G, L + 1, A] float32, normalised
    tiles: jax.Array  # [_TILES, k, T, 2 H]
    masks: jax.Array  # [_TILES, 1, T] int32
    arrived: jax.Array  # semaphores, a tile each
    windows: jax.Array  # [_WRITES, k, window, 2 H]
    written: jax.Array  # semaphores, a window each
    num_written: jax.Array  # [1] int32
    all_top: jax.Array  # [L + 1, k, R, 128] float32, greatest score; so are the next
    all_total: jax.Array  # sum of exp(score − top)
    all_sums: jax.Array  # [L + 1, k, R, A], not normalised
    queries: jax.Array  # [k, C · R, Q] of the C lanes of a sequence, and so on
    top: jax.Array
    total: jax.Array
    sums: jax.Array


def scratch(plan: Plan, num_lanes: int, dtype) -> list:
    """Memory of the kernel, in the order of `Refs`."""
    k, R, width = plan.heads, plan.queries, 2 * plan.head_dim
    most = max(plan.entry_lanes, plan.row_lanes) * R
    widths = _REGISTER, _REGISTER, plan.sum_width
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    return [
        f32((k, plan.groups, num_lanes, plan.keys.stop)),
        f32((k, num_lanes, width)),
        f32((k, plan.groups, num_lanes + 1, plan.sum_width)),
        pltpu.VMEM((_TILES, k, plan.tile, width), dtype),
        pltpu.VMEM((_TILES, 1, plan.tile), jnp.int32),
        pltpu.SemaphoreType.DMA((_TILES,)),
        pltpu.VMEM((_WRITES, k, plan.window, width), dtype),
        pltpu.SemaphoreType.DMA((_WRITES,)),
        pltpu.SMEM((1,), jnp.int32),
        *(f32((num_lanes + 1, k, R, n)) for n in widths),
        pltpu.VMEM((k, most, plan.keys.stop), dtype),
        *(f32((k, most, n)) for n in widths),
    ]


def kernel(plan: Plan, *refs):
    """One program: all tiles, for some of the key heads."""
    num_scalars = len(Walk._fields) - 1
    walk, refs = Walk(*refs[:num_scalars], None), Refs(*refs[num_scalars:])
    run = _Run(plan, walk, refs, pl.ds(pl.program_id(0) * plan.heads, plan.heads))
    count, entries = walk.count[0], plan.entries
    for item in range(_TILES - 1):
        pl.when(item < count)(functools.partial(run.fetch, item))
    refs.all_top[...] = jnp.full_like(refs.all_top, NEG_INF)
    refs.all_total[...] = jnp.zeros_like(refs.all_total)
    refs.all_sums[...] = jnp.zeros_like(refs.all_sums)
    refs.found[...] = jnp.zeros_like(refs.found)
    refs.num_written[0] = 0
    run.prepare()

    @pl.loop(0, count)
    def _go_over(item):
        ahead = item + _TILES - 1
        pl.when(ahead < count)(lambda: run.fetch(ahead))
        run.wait(item)
        pl.when(walk.sequence[item] < entries)(lambda: run.attend_entry(item))
        pl.when(walk.sequence[item] >= entries)(lambda: run.attend_row(item))

    for index in range(_WRITES):
        is_open = index < refs.num_written[0]
        pl.when(is_open)(lambda index=index: run.write(index).wait())
    run.finish()


def _buffer(item):
    return jax.lax.rem(item, _TILES)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A program of the kernel; `item` is the number of a tile in `Walk`."""

    plan: Plan
    walk: Walk
    refs: Refs
    heads: pl.Slice  # its key heads

    def _left(self, item):
        """Tokens of its sequence from the tile's first slot on."""
        walk = self.walk
        return walk.length[walk.sequence[item]] - walk.tile[item] * self.plan.tile

    def _tile(self, item):
        return self.refs.tiles.at[_buffer(item)]

    def _nearest(self, lane):
        """The lane; another one, if it is not fed."""
        return jnp.minimum(lane, self.refs.projected.shape[0] - 1)

    # --- The step's own heads -------------------------------------------------------

    def prepare(self):
        """Normalises and rotates queries and keys, and lays out what tiles need."""
        lanes = self.refs.projected.shape[0]
        some = next((n for n in _LANES if lanes % n == 0), lanes)

        @pl.loop(0, lanes // some)
        def _prepare(number):
            self._prepare(pl.ds(pl.multiple_of(number * some, some), some))

    def _prepare(self, lanes):
        refs, plan = self.refs, self.plan
        H, G = plan.head_dim, plan.groups
        for h in range(plan.heads):
            for i in range(G + 2):
                first = (h * (G + 2) + i) * H
                x = refs.projected[lanes, first : first + H].astype(jnp.float32)
                if i == G + 1:
                    refs.new[h, lanes, H:] = x
                    continue
                x = self._normalised(x, int(i == G), lanes)
                if i == G:
                    refs.new[h, lanes, :H] = x
                    continue
                refs.q[h, i, lanes, :H] = x
                if plan.keys.stop > H:
                    refs.q[h, i, lanes, H:] = jnp.zeros_like(x)

    def _normalised(self, x, which: int, lanes):
        """Queries (0) or keys (1) [lanes, H], normalised and rotated."""
        refs, plan, half = self.refs, self.plan, self.plan.head_dim // 2
        if plan.norm_eps is not None:
            mean = jnp.mean(x * x, axis=1, keepdims=True)
            x = x * jax.lax.rsqrt(mean + plan.norm_eps) * refs.scales[which : which + 1]
        if not plan.is_rotated:
            swapped = jnp.concatenate([x[:, half:], x[:, :half]], axis=1)
            x = x * refs.angles[1, lanes] + swapped * refs.angles[0, lanes]
        return x

    def finish(self):
        """Puts out what was found, head by head."""
        refs, plan, H = self.refs, self.plan, self.plan.head_dim
        for h in range(plan.heads):
            for i in range(plan.groups):
                out = refs.found[h, i, : refs.out.shape[0], plan.sum_width - H :]
                first = (h * plan.groups + i) * H
                refs.out[:, first : first + H] = out.astype(refs.out.dtype)

    # --- Transfers ------------------------------------------------------------------

    def fetch(self, item):
        """Starts the transfers of a tile."""
        sequence, tile = self.walk.sequence[item], self.walk.tile[item]

        @pl.when(sequence < self.plan.entries)
        def _of_entry():
            for is_there, copy in self._pieces(item):
                pl.when(is_there)(copy(self.refs.prompts, sequence).start)

        @pl.when(sequence >= self.plan.entries)
        def _of_row():
            row = sequence - self.plan.entries
            for is_there, copy in self._pieces(item):
                pl.when(is_there)(copy(self.refs.own, row).start)
            self._mask(item, row, tile).start()

    def wait(self, item):
        """Waits for what `fetch` has started."""
        for is_there, copy in self._pieces(item):
            pl.when(is_there)(copy(self.refs.own, 0).wait)  # both have as many bytes
        is_row = self.walk.sequence[item] >= self.plan.entries
        pl.when(is_row)(self._mask(item, 0, 0).wait)

    def _pieces(self, item):
        """Whether a piece of a tile is in use, and its transfer from a cache's row."""
        refs, buffer, left = self.refs, _buffer(item), self._left(item)
        first = self.walk.tile[item] * self.plan.tile

        def copy(start, cache, row):
            slots = pl.ds(pl.multiple_of(first + start, PIECE), PIECE)
            into = refs.tiles.at[buffer, :, pl.ds(start, PIECE)]
            source = cache.at[row, self.heads, slots]
            return pltpu.make_async_copy(source, into, refs.arrived.at[buffer])

        for start in range(0, self.plan.tile, PIECE):
            yield start < left, functools.partial(copy, start)

    def _mask(self, item, row, tile):
        refs, buffer = self.refs, _buffer(item)
        source, into = refs.visible.at[row, tile], refs.masks.at[buffer]
        return pltpu.make_async_copy(source, into, refs.arrived.at[buffer])

    def write(self, index, row=0, first=0):
        """The transfer of a window to a row's slots from `first` on."""
        refs = self.refs
        into = refs.own.at[row, self.heads, pl.ds(first, self.plan.window)]
        source, written = refs.windows.at[index], refs.written.at[index]
        return pltpu.make_async_copy(source, into, written)

    # --- Tiles ----------------------------------------------------------------------

    def attend_entry(self, item):
        """A tile of a prompt, for all lanes that read it."""
        entry, C = self.walk.sequence[item], self.plan.entry_lanes
        lanes = [self.walk.readers[entry * C + i] for i in range(C)]
        self._clear_behind(item)
        slots = jax.lax.broadcasted_iota(jnp.int32, (1, self.plan.tile), 1)
        self._attend(item, lanes, slots < self._left(item), self._keep)

    def attend_row(self, item):
        """A tile of a row's slots, for its lanes, whose tokens may belong there."""
        walk, plan, P = self.walk, self.plan, self.plan.row_lanes
        row, first = walk.sequence[item] - plan.entries, walk.tile[item] * plan.tile
        lanes = [walk.lanes[row * P + i] for i in range(P)]
        slots = [walk.slot[row * P + i] - first for i in range(P)]
        is_here = [(slot >= 0) & (slot < plan.tile) for slot in slots]
        takes = functools.reduce(jnp.logical_or, is_here)
        pl.when(takes)(lambda: self._insert(item, row, lanes, slots))
        self._clear_behind(item)
        shape = (P * plan.queries, plan.tile)
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        lane = jax.lax.div(lane, plan.queries)
        visible = (self.refs.masks[_buffer(item)] & (1 << lane)) != 0
        self._attend(item, lanes, visible, self._put_out)

    def _insert(self, item, row, lanes, slots):
        """Puts a row's new tokens into the tile, and the slots around them into memory.

        Args:
          slots: of the lanes, counted from the tile's first; others are not in it.
        """
        refs, plan, tile = self.refs, self.plan, self._tile(item)
        nearest = [jnp.where(slot >= 0, slot, plan.tile) for slot in slots]
        first = functools.reduce(jnp.minimum, nearest)
        first = jax.lax.div(first, WINDOW) * WINDOW
        # Within the pieces that have been fetched, and so within the cache.
        end = jax.lax.div(self._left(item) + PIECE - 1, PIECE) * PIECE
        first = jnp.minimum(first, jnp.minimum(end, plan.tile) - plan.window)
        first = pl.multiple_of(first, WINDOW)
        number = refs.num_written[0]
        index = jax.lax.rem(number, _WRITES)
        pl.when(number >= _WRITES)(self.write(index).wait)
        for h in range(plan.heads):
            window = tile[h, pl.ds(first, plan.window)].astype(jnp.float32)
            at = first + jax.lax.broadcasted_iota(jnp.int32, window.shape, 0)
            for lane, slot in zip(lanes, slots):
                token = refs.new[h, pl.ds(self._nearest(lane), 1)]
                window = jnp.where(at == slot, token, window)
            window = window.astype(tile.dtype)
            tile[h, pl.ds(first, plan.window)] = window
            refs.windows[index, h] = window
        place = pl.multiple_of(self.walk.tile[item] * plan.tile + first, WINDOW)
        self.write(index, row, place).start()
        refs.num_written[0] = number + 1

    def _clear_behind(self, item):
        """Zeros values behind a sequence's end: they may be anything, even no number."""
        tile, left, plan = self._tile(item), self._left(item), self.plan

        @pl.loop(jax.lax.div(left, WINDOW), plan.tile // WINDOW)
        def _clear(number):
            first = pl.multiple_of(number * WINDOW, WINDOW)
            for h in range(plan.heads):
                values = tile[h, pl.ds(first, WINDOW), plan.values]
                at = first + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
                values = jnp.where(at < left, values, jnp.zeros_like(values))
                tile[h, pl.ds(first, WINDOW), plan.values] = values

    def _attend(self, item, lanes, visible, end):
        """Adds a tile to what lanes have seen.

        Args:
          visible: bool [lanes · R or 1, T].
          end: is called with the lanes after the last tile of their sequence.
        """
        some = slice(0, len(lanes) * self.plan.queries)
        pl.when(self.walk.tile[item] == 0)(lambda: self._begin(lanes, some))
        for h in range(self.plan.heads):
            self._add(item, h, some, visible)
        pl.when(self._left(item) <= self.plan.tile)(lambda: end(lanes))

    def _begin(self, lanes, some):
        """Fetches queries of lanes, and what they have seen so far."""
        refs = self.refs
        for h in range(self.plan.heads):
            q = [self._queries(h, lane) for lane in lanes]
            refs.queries[h, some] = jnp.concatenate(q).astype(refs.queries.dtype)
        self._keep(lanes, back=True)

    def _queries(self, h, lane):
        """Queries of a lane [R, Q], one below the other."""
        shape = self.plan.queries, self.plan.keys.stop
        row, q = jax.lax.broadcasted_iota(jnp.int32, shape, 0), jnp.zeros(shape)
        for i in range(self.plan.groups):
            one = self.refs.q[h, i, pl.ds(self._nearest(lane), 1)]
            q = jnp.where(row == i, one, q)
        return q

    def _keep(self, lanes, *, back: bool = False):
        """Puts what lanes have seen aside, for the next sequence; or gets it back."""
        refs, R = self.refs, self.plan.queries
        pairs = zip(
            (refs.all_top, refs.all_total, refs.all_sums),
            (refs.top, refs.total, refs.sums),
        )
        for every, mine in pairs:
            for h in range(self.plan.heads):
                for i, lane in enumerate(lanes):
                    some = slice(i * R, (i + 1) * R)
                    if back:
                        mine[h, some] = every[lane, h]
                    else:
                        every[lane, h] = mine[h, some]

    def _put_out(self, lanes):
        """Normalises what lanes have seen, who have come to the end."""
        refs, R = self.refs, self.plan.queries
        for h in range(self.plan.heads):
            for i, lane in enumerate(lanes):
                some = slice(i * R, (i + 1) * R)
                out = refs.sums[h, some] / refs.total[h, some, :1]
                for j in range(self.plan.groups):
                    refs.found[h, j, pl.ds(lane, 1)] = out[j : j + 1]

    def _add(self, item, h, some, visible):
        """Adds a tile to the sums of some queries of head h."""
        refs, plan, tile = self.refs, self.plan, self._tile(item)
        scores = jax.lax.dot_general(
            refs.queries[h, some],
            tile[h, :, plan.keys],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(visible, scores * plan.head_dim**-0.5, NEG_INF)
        top = refs.top[h, some, :1]
        new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
        # All 1 for a lane that has seen no key yet; `kept` is 0 at its first.
        probs = jnp.exp(scores - new_top)
        kept = jnp.exp(top - new_top)
        total = refs.total[h, some, :1] * kept + probs.sum(axis=1, keepdims=True)
        values = tile[h, :, plan.values]
        sums = jnp.dot(
            probs.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        refs.top[h, some] = jnp.broadcast_to(new_top, refs.top[h, some].shape)
        refs.total[h, some] = jnp.broadcast_to(total, refs.top[h, some].shape)
        refs.sums[h, some] = refs.sums[h, some] * kept + sums
