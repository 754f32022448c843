"""Budgets, deadlines, labels and bans hold, whatever is drawn; both variants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout, tags
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.session import Session
from pr1_jax.sampler.settings import END_PATH, PARALLEL, Settings
from tests.helpers.laws import assert_laws
from tests.helpers.tiny import LABELS, SETTINGS, TEXTS, VOCAB, VOCAB_SIZE, with_vocab

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Compares the count of steps on the device with the host's after every chunk."""
    decode = Session._decode

    def watch(session):
        decode(session)
        shards = session._host.shards
        occupied = np.concatenate([shard.occupied for shard in shards])
        steps = np.concatenate([shard.steps for shard in shards])[occupied]
        on_device = np.array(session._state.steps)
        np.testing.assert_array_equal(on_device[occupied], steps)

    monkeypatch.setattr(Session, "_decode", watch)


def noisy(params, lanes, state, num_lanes):
    """Random logits, by a key, that like some tokens."""
    key, liking = params
    salt = jax.random.fold_in(key, state.emitted.sum())
    noise = jax.random.normal(key, (num_lanes, VOCAB_SIZE))
    noise += jax.random.normal(salt, (num_lanes, VOCAB_SIZE))
    return 2.0 * noise + liking, state.cache


def sample(settings, liking, *, decode_fn=noisy, lengths=None):
    """Two responses to each of some prompts, by default of 1 to 9 tokens."""
    batching = Batching(rows=15, steps_per_chunk=16, lane_buckets=())
    vocab, key = with_vocab(settings), jax.random.key(0)
    sampler = Sampler(None, vocab, settings, batching, decode_fn=decode_fn)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 10, 60) if lengths is None else lengths
    prompts = [rng.integers(3, VOCAB_SIZE, n) for n in lengths]
    return sampler.sample((key, jnp.asarray(liking)), prompts, 2, key)[0]


def likes(*tokens, by=2.5):
    liking = np.zeros(VOCAB_SIZE, np.float32)
    liking[[*tokens]] = by
    return liking


LABELLED = {"path_labels": LABELS, "min_path_tokens": 5}
BUDGETS = [
    {},
    {"max_response_tokens": 19, "max_path_tokens": 0, "max_summary_tokens": 0},
    {"max_response_tokens": 33, "num_paths": 3, "min_path_tokens": 2},
    {
        "max_response_tokens": 90,
        "num_paths": 8,
        "max_path_tokens": 4,
        "summary_reserve": 1,
        "answer_reserve": 0,
    },
    {"max_response_tokens": 1},
    {"max_blocks": 1, "max_response_tokens": 40, "max_path_tokens": 0},
    # The deadline binds, not the tokens; then the tokens; then both.
    {"max_response_tokens": 200, "max_sequential_steps": 21, "max_path_tokens": 0},
    {"max_response_tokens": 45, "max_sequential_steps": 40, **LABELLED},
    {
        "max_response_tokens": 110,
        "max_sequential_steps": 35,
        "num_paths": 8,
        "max_path_tokens": 0,
        "max_summary_tokens": 0,
        "summary_reserve": 1,
        "answer_reserve": 0,
        **LABELLED,
    },
]
FAST = {(i, layout.VARIANTS[i % 2]) for i in range(len(BUDGETS))} | {(8, "causal")}


@pytest.mark.parametrize(
    "number, variant",
    [
        pytest.param(i, v, marks=[] if (i, v) in FAST else pytest.mark.slow)
        for i in range(len(BUDGETS))
        for v in layout.VARIANTS
    ],
)
def test_every_trace_is_whole_and_in_time(number, variant):
    settings = dataclasses.replace(SETTINGS, variant=variant, **BUDGETS[number])
    traces = sample(settings, likes(*VOCAB.special_ids))
    for t in traces:
        assert_laws(t, settings, with_vocab(settings))
        text = "".join(TEXTS.get(int(i), "x") for i in t.tokens)
        assert tags.check_format(text) == []
    if settings.may_open_blocks:
        assert sum(t.num_blocks for t in traces) > len(traces) / 8


def drawn(seed):
    """Settings at random, and likings: tags anywhere, limits that bind or do not."""
    rng = np.random.default_rng(seed)
    labels = LABELS if rng.random() < 0.6 else ()
    least = int(rng.integers(5 if labels else 2, 9))
    summary, answer = int(rng.integers(1, 6)), int(rng.integers(0, 6))
    pick = lambda *options: int(rng.choice(options))
    return Settings(
        max_prompt_tokens=9,
        max_response_tokens=int(rng.integers(10, 130)),
        max_sequential_steps=pick(0, *[answer + int(rng.integers(1, 60))] * 4),
        num_paths=int(rng.integers(2, 9)),
        max_blocks=int(rng.integers(1, 5)),
        min_path_tokens=least,
        max_path_tokens=pick(0, least, least + 4),
        max_summary_tokens=pick(0, 1, 4),
        summary_reserve=summary,
        answer_reserve=answer,
        path_labels=labels,
        variant=str(rng.choice(layout.VARIANTS)),
        ban_illegal=rng.random() < 0.8,
    ), likes(*VOCAB.special_ids, by=rng.normal(1.5, 1.5, len(VOCAB.special_ids)))


@pytest.mark.parametrize(
    "seed",
    [pytest.param(i, marks=[pytest.mark.slow] if i >= 3 else []) for i in range(40)],
)
def test_so_it_is_with_any_settings(seed):
    settings, liking = drawn(seed)
    for t in sample(settings, liking):
        assert_laws(t, settings, with_vocab(settings))


def test_the_deadline_by_hand():
    """The example of docs/method.md, section 3; prompts as long as the opening's step."""
    settings = Settings(
        max_prompt_tokens=30,
        max_response_tokens=110,
        max_sequential_steps=48,
        min_path_tokens=10,
        summary_reserve=8,
        answer_reserve=6,
    )
    opening, end = VOCAB.special_ids[PARALLEL], VOCAB.special_ids[END_PATH]

    def decode_fn(params, lanes, state, num_lanes):
        lane = lanes.index % 2 if num_lanes > len(state.emitted) else 0
        row = jnp.clip(lanes.row, 0, len(state.emitted) - 1)
        opens = state.emitted[row] + 1 == state.prompt_length[row]
        ends = (lane == 1) & (state.count[row, 1] == 19)
        logits = jnp.zeros((num_lanes, VOCAB_SIZE)).at[:, 7].set(50.0)
        logits = logits.at[:, opening].set(jnp.where(opens, 99.0, -99.0))
        return logits.at[:, end].set(jnp.where(ends, 99.0, -99.0)), state.cache

    responses = sample(settings, 0.0, decode_fn=decode_fn, lengths=(5, 21, 22))
    for t in responses:
        assert_laws(t, settings, VOCAB)
    early, last, late = responses[::2]
    assert np.bincount(early.path).tolist() == [22, 26, 20]
    assert (len(early.tokens), early.sequential_steps, early.finished) == (68, 48, 0)
    steps = layout.structured_positions(early.block, early.path, 1)
    assert steps[early.path == 1][-1] == 31
    assert steps[np.isin(early.tokens, VOCAB.special_ids[4:6])].tolist() == [34, 42]
    assert np.bincount(last.path).tolist() == [38, 10, 10]
    assert late.num_blocks == 0 and len(late.tokens) == 48


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"max_sequential_steps": 2**31},
            r"max_sequential_steps=2147483648 must be be",
        ),
        (
            {"path_labels": (" ", " 2")},
            r"path_labels=\(' ', ' 2'\) must hold texts, none",
        ),
    ],
)
def test_numbers_that_do_not_fit_and_blank_labels_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SETTINGS, **wrong)
