"""Responses whose lengths are known beforehand: those of real cold-start traces.

A random model writes no blocks, so that the benchmark decides when a tag comes: the
decode function is wrapped, and of its logits those of the tags and EOS are edited.
Everything else, the draws too, is as in a real run.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.sampler.settings import (
    END_PATH,
    END_SUMMARY,
    EOS,
    PARALLEL,
    PATH,
    Vocab,
)
from pr1_jax.sampler.state import (
    IN_PLAN,
    LIST,
    PATHS,
    SUMMARY,
    DecodeFn,
    Lanes,
    State,
)

_FORCED = 3  # </Parallel>, newline, <Summary>
_SURE = 1e9  # added to the logit of a token that is to be drawn


@dataclasses.dataclass(frozen=True)
class Trace:
    """Lengths of a real response, in tokens without tags.

    Attributes:
      main: before each block. paths: of each block. summaries: of each block.
      tail: behind the last block.
    """

    prompt: int
    main: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    summaries: tuple[int, ...]
    tail: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Lengths of a response to be decoded, tags among them.

    Attributes:
      main: before each block, its `<Parallel>` included. paths: with both tags.
      summaries: what follows `<Summary>`, `</Summary>` included.
      tail: behind the last block, EOS included.
      path_plan: of each plan of a path that the response writes, with both tags; 0 =
        its blocks are not planned.
    """

    prompt: int
    main: tuple[int, ...] = ()
    paths: tuple[tuple[int, ...], ...] = ()
    summaries: tuple[int, ...] = ()
    tail: int = 1
    path_plan: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the response."""
        return self._ends()[-1] + self.tail

    @property
    def opens(self) -> list[int]:
        """Index, in order of emission, of each `<Parallel>`."""
        return [n + m - 1 for n, m in zip([0, *self._ends()], self.main)]

    @property
    def needs(self) -> int:
        """`max_response_tokens` with which the sampler plans no shorter path."""
        longest = (len(p) * (max(p) + 1 + self.path_plan) for p in self.paths)
        blocks = (n + 2 + _FORCED + some for n, some in zip(self.opens, longest))
        return max(self.tokens, *blocks, 0)

    def _ends(self) -> list[int]:
        """Tokens up to the end of each block's summary; [0] without a block."""
        ends, total = [], 0
        for main, paths, summary in zip(self.main, self.paths, self.summaries):
            plans = self.path_plan * len(paths)
            total += main + plans + sum(paths) + _FORCED + summary
            ends.append(total)
        return ends or [0]

    def sequential(self) -> "Plan":
        """As many tokens without a block."""
        return Plan(self.prompt, tail=self.tokens)


# --- Lengths ------------------------------------------------------------------------

# Deciles, from the least to the greatest, of parallel_gsm8k_sample.jsonl: 338 of 341
# cold-start traces of zhengkid/Parallel-R1 that are well formed. Tokens are counted much
# like the pieces that Qwen's tokenizer begins with: words, digits, runs of punctuation
# and newlines. `main` is before the first block and before later ones, `path` the mean
# of a block's paths, `path_share` a path by that mean.
_DECILES: dict[str, tuple[float, ...]] = {
    "prompt": (20.0, 34.0, 38.4, 44.0, 48.0, 52.0, 56.2, 63.0, 70.0, 77.3, 135.0),
    "first_main": (0.0, 43.0, 52.0, 63.0, 73.0, 81.0, 95.4, 112.0, 130.4, 156.6, 294.0),
    "later_main": (1.0, 1.0, 9.8, 17.0, 22.0, 25.0, 30.0, 35.0, 47.2, 59.4, 174.0),
    "path": (6.33, 27.2, 34.5, 41.07, 48.0, 55.0, 60.5, 68.9, 80.5, 95.3, 174.5),
    "path_share": (0.28, 0.71, 0.83, 0.89, 0.95, 1.0, 1.05, 1.11, 1.18, 1.29, 1.72),
    "summary": (8.0, 13.0, 17.0, 21.0, 25.0, 30.0, 35.0, 39.8, 45.0, 55.0, 96.0),
    "tail": (5.0, 5.0, 6.0, 6.0, 7.0, 7.0, 16.0, 22.0, 29.0, 45.3, 179.0),
}
_BLOCKS = (3, 259, 58, 12, 6)  # traces with 0, 1, 2, … blocks


def builtin_traces(count: int = 338, seed: int = 0) -> tuple[Trace, ...]:
    """Traces drawn from the built-in deciles, each length apart from the others."""
    rng = np.random.default_rng(seed)
    points = np.linspace(0, 1, 11)
    draw = lambda name: float(np.interp(rng.random(), points, _DECILES[name]))
    share = np.array(_BLOCKS) / sum(_BLOCKS)
    traces = []
    for _ in range(count):
        blocks = range(rng.choice(len(share), p=share))
        paths = []
        for _ in blocks:
            mean = draw("path")
            paths.append(tuple(round(mean * draw("path_share")) for _ in range(2)))
        trace = Trace(
            prompt=round(draw("prompt")),
            main=tuple(
                round(draw("later_main" if i else "first_main")) for i in blocks
            ),
            paths=tuple(paths),
            summaries=tuple(round(draw("summary")) for _ in blocks),
            tail=round(draw("tail")),
        )
        traces.append(trace)
    return tuple(traces)


def make_plans(
    traces: Sequence[Trace], count: int, num_paths: int, tokens: int, seed: int = 0
) -> tuple[list[Plan], float]:
    """Plans of `count` traces drawn at random, all scaled by one factor.

    The factor is the one by which the longest of them has `tokens` tokens with two
    paths, tags included. A block with more paths than its trace has gets further ones,
    as long as its mean path times what some path of the traces is of its own block's
    mean.

    Returns:
      The plans and the factor.
    """
    rng = np.random.default_rng(seed)
    chosen = [traces[i] for i in rng.integers(0, len(traces), count)]
    shares = [n / np.mean(paths) for t in traces for paths in t.paths for n in paths]
    factor = _fitting_factor(chosen, tokens)
    plans = []
    for trace in chosen:
        paths = [
            [*block, *(np.mean(block) * rng.choice(shares, num_paths))][:num_paths]
            for block in trace.paths
        ]
        plans.append(_scaled(trace, factor, paths))
    return plans, factor


def _fitting_factor(traces: Sequence[Trace], tokens: int) -> float:
    pairs = [(trace, [paths[:2] for paths in trace.paths]) for trace in traces]
    longest = lambda factor: max(_scaled(t, factor, p).tokens for t, p in pairs)
    factor = tokens / longest(1.0)
    while longest(factor) > tokens and factor > 1e-3:  # tags do not shrink
        factor *= 0.99
    return factor


def _scaled(trace: Trace, factor: float, paths: Sequence[Sequence[float]]) -> Plan:
    scale = lambda length: round(length * factor)
    return Plan(
        prompt=max(scale(trace.prompt), 2),
        main=tuple(scale(n) + 1 for n in trace.main),
        paths=tuple(tuple(max(scale(n), 1) + 2 for n in block) for block in paths),
        summaries=tuple(scale(n) + 1 for n in trace.summaries),
        tail=scale(trace.tail) + 1,
    )


# --- Decoding by plan ---------------------------------------------------------------


def follow(logits, wanted, vocab: Vocab):
    """Logits from which `wanted` is drawn; −1 = anything but the tags and EOS.

    Args:
      logits: [L, V] float32. wanted: [L] int32.
    """
    ids = jnp.array(vocab.ban_ids)
    bias = jnp.where(ids == wanted[:, None], _SURE, -_SURE)
    return logits.at[:, ids].add(bias)


def planned(
    decode_fn: DecodeFn, plans: Sequence[Plan], key: jax.Array, vocab: Vocab
) -> DecodeFn:
    """A decode function that makes response i of a call with `key` follow plan i.

    A row's response is known by its key, `fold_in(key, i)`; where it stands in its
    plan, by the tokens that it, and each of its paths, has emitted.
    """
    N, blocks = len(plans), max(max((len(p.main) for p in plans), default=0), 1)
    most_paths = max((len(paths) for p in plans for paths in p.paths), default=1)
    opens, closes = np.full((2, N, blocks + 1), -1, np.int32)
    lengths = np.zeros((N, blocks, most_paths), np.int32)
    for i, plan in enumerate(plans):
        for b, (open_, paths) in enumerate(zip(plan.opens, plan.paths)):
            opens[i, b] = open_
            closes[i, b] = open_ + sum(paths) + _FORCED + plan.summaries[b]
            closes[i, b] += plan.path_plan * len(paths)
            lengths[i, b, : len(paths)] = paths
    last = jnp.array([plan.tokens - 1 for plan in plans], jnp.int32)
    opens, closes, lengths = map(jnp.asarray, (opens, closes, lengths))
    folded = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N))
    known = jax.random.key_data(folded)
    ids = vocab.special_ids
    size = max((plan.path_plan for plan in plans), default=0)  # that of them all

    def among_plans(state: State, plan, block):
        written = (state.emitted - opens[plan, block] - 1) % size
        more = state.plans < (lengths[plan, block] > 0).sum(axis=1)
        (begin, end), phase = vocab.plan_ids, state.phase
        in_list = jnp.where(more, begin, ids[PATH])
        ends = (phase == IN_PLAN) & (written == size - 1)
        return jnp.select([ends, phase == LIST], [end, in_list], -1)

    def decode_lanes(params, lanes: Lanes, state: State, num_lanes: int):
        logits, cache = decode_fn(params, lanes, state, num_lanes)
        B, P = state.token.shape
        data = jax.random.key_data(state.key)[:, None]
        plan = (data == known).all(axis=-1).argmax(axis=-1)  # [B]
        opened, emitted = jnp.minimum(state.blocks, blocks), state.emitted
        in_main = jnp.select(
            [emitted == opens[plan, opened], emitted == last[plan]],
            [ids[PARALLEL], ids[EOS]],
            -1,
        )
        block = jnp.clip(state.blocks - 1, 0, blocks - 1)
        closing = emitted == closes[plan, block]
        in_summary = jnp.where(closing, ids[END_SUMMARY], -1)
        ends = lengths[plan, block][:, :P] == state.count[:, :most_paths] + 1
        in_path = jnp.where(ends, ids[END_PATH], -1)

        row = jnp.clip(lanes.row, 0, B - 1)
        lane = jnp.zeros_like(row) if num_lanes == B else lanes.index % P
        wanted = jnp.select(
            [state.phase[row] == PATHS, state.phase[row] == SUMMARY],
            [in_path.at[row, lane].get(mode="clip"), in_summary[row]],
            in_main[row],
        )
        if vocab.plan_ids:
            is_among = jnp.isin(state.phase, jnp.array([IN_PLAN, LIST]))[row]
            wanted = jnp.where(is_among, among_plans(state, plan, block)[row], wanted)
        return follow(logits, wanted, vocab), cache

    return decode_lanes
