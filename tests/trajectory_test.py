"""Tests of pr1_jax.trajectory: traces from text, and padded batches of them."""

import dataclasses
import re

import numpy as np
import pytest

from pr1_jax import layout, tags, trajectory
from pr1_jax.data import traces

EOS = 1


class WordTokenizer:
    """Stands in for the tokenizer: tags, `~` for the newline, and single letters."""

    def __init__(self):
        self.eos_id = EOS
        self.tag_ids = {tag: 10 + i for i, tag in enumerate(tags.TAGS)}
        self._ids = self.tag_ids | {"~": 2} | {x: ord(x) for x in "ABsxyz"}

    def encode(self, text, **_):
        return [self._ids[piece] for piece in re.findall(r"</?\w+>|.", text)]


TOKENIZER = WordTokenizer()
TRACE = "A<Parallel><Path>xy</Path><Path>z</Path></Parallel>~<Summary>s</Summary>B"
PROMPT = TOKENIZER.encode("AB<Parallel><Path>x")  # only talks about tags
POSITIONS = [0, 1, 2, 3, 4, 5, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]  # of method.md, 2
BLOCK = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
PATH = [0, 0, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0]


def trace(variant="structured", text=TRACE):
    return traces.from_text(PROMPT, text, TOKENIZER, variant=variant)


def sampled(t):
    """The trajectory as if a sampler had made it."""
    n = len(t.tokens)
    return dataclasses.replace(
        t,
        forced=np.isin(np.arange(n), [2, 6, 9, 10, 11]),
        bans=np.arange(n, dtype=np.int32) % 5,
        logps=-np.arange(n, dtype=np.float32),
    )


# --- from_text ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", layout.VARIANTS)
def test_from_text_labels_and_positions(variant):
    t = trace(variant)
    assert t.prompt.tolist() == PROMPT
    assert t.tokens.tolist() == [*TOKENIZER.encode(TRACE), EOS]
    expected = POSITIONS if variant == "structured" else range(16)
    assert t.positions.tolist() == [len(PROMPT) + p for p in expected]
    # Both variants know where the paths are; `pack` decides what attention is told.
    assert (t.block.tolist(), t.path.tolist()) == (BLOCK, PATH)
    assert t.num_blocks == 1 and t.finished
    assert t.sequential_steps == 9 + 4  # main stream, and the longer path
    for name in ("forced", "bans", "logps"):
        assert not getattr(t, name).any() and getattr(t, name).shape == (16,)


@pytest.mark.parametrize("variant", layout.VARIANTS)
def test_from_text_counts_blocks_and_steps(variant):
    assert trace(variant, "AB").sequential_steps == 3
    assert trace(variant, "AB").num_blocks == 0
    twice = trace(variant, TRACE + TRACE)
    assert twice.num_blocks == 2
    assert twice.sequential_steps == 2 * (8 + 4) + 1


@pytest.mark.parametrize("variant", layout.VARIANTS)
def test_from_text_refuses_malformed_traces(variant):
    with pytest.raises(ValueError, match="token 3: <Parallel> where text or </Path>"):
        trace(variant, "A<Parallel><Path><Parallel>")
    with pytest.raises(ValueError, match="the response ends where"):
        trace(variant, TRACE.removesuffix("</Summary>B"))


# --- pack ---------------------------------------------------------------------------


def packed_fields(batch):
    """The fields that `pack` fills."""
    assert batch.importance is None  # known only once the trainer has its log-probs
    assert batch.start is None  # a row is a trajectory
    without = ("importance", "start")
    return [f for f in dataclasses.fields(batch) if f.name not in without]


def test_pack_puts_the_prompt_first_and_pads():
    t = sampled(trace())
    batch = trajectory.pack([t], 24, variant="structured", advantages=[0.5])
    start, end = len(PROMPT), len(PROMPT) + 16
    assert batch.tokens[0, :end].tolist() == [*PROMPT, *t.tokens]
    assert batch.positions[0, :end].tolist() == [*range(start), *t.positions]
    assert batch.block[0, start:end].tolist() == BLOCK
    assert batch.path[0, start:end].tolist() == PATH
    assert batch.bans[0, start:end].tolist() == t.bans.tolist()
    assert batch.old_logps[0, start:end].tolist() == t.logps.tolist()
    assert batch.loss_mask[0, start:end].tolist() == (~t.forced).tolist()
    for name in ("block", "path", "bans", "loss_mask", "old_logps"):
        row = getattr(batch, name)[0]
        assert not row[:start].any() and not row[end:].any(), name
    assert not batch.tokens[0, end:].any()
    assert batch.advantages.tolist() == [0.5]
    dtypes = {f.name: getattr(batch, f.name).dtype.name for f in packed_fields(batch)}
    floats = {"old_logps": "float32", "advantages": "float32", "loss_mask": "bool"}
    assert dtypes == dict.fromkeys(dtypes, "int32") | floats


def test_pack_of_the_causal_variant_has_no_paths():
    t = trace("causal")
    batch = trajectory.pack([t], 22, variant="causal")
    assert not batch.block.any() and not batch.path.any()
    n = len(PROMPT) + 16
    assert batch.positions[0, :n].tolist() == list(range(n))


def test_pack_trains_on_forced_tokens_only_when_told():
    t = sampled(trace())
    on = trajectory.pack([t], 21, variant="structured", train_on_forced=True)
    off = trajectory.pack([t], 21, variant="structured")
    assert on.loss_mask[0].tolist() == [False] * 5 + [True] * 16
    assert (on.loss_mask & ~off.loss_mask)[0, 5:].tolist() == t.forced.tolist()


def test_pack_of_none_is_an_empty_row_between_others():
    t = sampled(trace())
    pack = lambda rows: trajectory.pack(rows, 24, variant="structured")
    batch, alone = pack([t, None, t]), pack([t])
    for field in packed_fields(batch):
        rows = getattr(batch, field.name)
        assert not np.any(rows[1]), field.name
        for i in (0, 2):
            np.testing.assert_array_equal(rows[i], getattr(alone, field.name)[0])


def test_pack_refuses_what_is_too_long():
    trajectory.pack([trace()], 21, variant="structured")
    with pytest.raises(ValueError, match="21 tokens is longer than 20"):
        trajectory.pack([None, trace()], 20, variant="structured")


# --- pack_rows ----------------------------------------------------------------------


def test_rows_hold_trajectories_as_they_are_alone():
    ts = [sampled(trace()), sampled(trace(text="AB")), sampled(trace(text=TRACE * 2))]
    rows, length = [[ts[0], ts[1]], [], [ts[2], ts[1]]], sum(map(len, (ts[2], ts[1])))
    batch = trajectory.pack_rows(
        rows, length, num_rows=4, variant="structured", advantages=[[1, 2], [], [3, 4]]
    )
    alone = trajectory.pack(ts, length, variant="structured")
    names = ("tokens", "positions", "block", "path", "bans", "loss_mask", "old_logps")
    used = np.zeros((4, length), bool)
    for row, numbers, advantages in ((0, (0, 1), (1, 2)), (2, (2, 1), (3, 4))):
        end = 0
        for number, advantage in zip(numbers, advantages, strict=True):
            first, end = end, end + len(ts[number])
            used[row, first:end] = True
            for name in names:
                expected = getattr(alone, name)[number, : end - first]
                got = getattr(batch, name)[row, first:end]
                np.testing.assert_array_equal(got, expected, err_msg=name)
            assert {*batch.start[row, first:end]} == {first}
            assert {*batch.advantages[row, first:end]} == {advantage}
    assert used[2].all()  # to the last slot
    for name in (*names, "advantages"):
        assert not getattr(batch, name)[~used].any(), name
    own = np.tile(np.arange(length), (4, 1))
    np.testing.assert_array_equal(batch.start[~used], own[~used])
    assert (batch.start.dtype, batch.advantages.dtype) == (np.int32, np.float32)


def test_rows_refuse_what_is_too_long():
    t = trace()
    pack_rows = lambda length: trajectory.pack_rows(
        [[t, t]], length, num_rows=1, variant="structured"
    )
    pack_rows(42)
    with pytest.raises(ValueError, match="a row of 42 tokens is longer than 41"):
        pack_rows(41)
