"""Responses with limits of their own, which join and leave one batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.state import DONE, Limits
from tests.helpers.laws import assert_laws
from tests.helpers.tiny import LABELS, SETTINGS, VOCAB_SIZE, with_vocab
from tests.sampler import sampler_test

KEY = jax.random.key(3)
LIMITED = Batching(rows=6, group_size=2, steps_per_chunk=5, one_size=True, limited=True)
LABELLED = dataclasses.replace(
    SETTINGS, num_paths=4, path_labels=LABELS, min_path_tokens=5
)
OWN = [
    {},
    {"max_response_tokens": 17, "max_blocks": 0},
    {"num_paths": 3, "max_sequential_steps": 40, "temperature": 0.5, "top_p": 0.7},
    {"num_paths": 2, "max_blocks": 1, "temperature": 0.0},
]


def scripted(table, lanes, state, num_lanes):
    """Logits by a lane's token, position and slot alone."""
    turn = (7 * lanes.position + 3 * lanes.slot) % VOCAB_SIZE
    return table[lanes.token] + table[turn], state.cache


@pytest.fixture(scope="module")
def table():
    """What `scripted` reads: it likes to open blocks, and to go on."""
    rng = np.random.default_rng(0)
    liking = np.zeros(VOCAB_SIZE)
    liking[10], liking[1] = 2.0, -1.0
    return jnp.asarray(rng.normal(size=(VOCAB_SIZE, VOCAB_SIZE)) + liking, jnp.float32)


def finish(session, sooner=lambda finished: None):
    """Everything that a session has yet to write, by number."""
    results = {}
    while session.is_busy:
        finished = session.advance()
        sooner(finished)
        results |= finished
    return results


def assert_equal(one, other, atol=0.0):
    for name in ("tokens", "positions", "block", "path", "bans", "forced"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    np.testing.assert_allclose(one.logps, other.logps, atol=atol)
    assert one.sequential_steps == other.sequential_steps
    assert one.finished == other.finished


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize(
    "change", [{"variant": "causal"}, {"planned": True, "max_plan_tokens": 5}]
)
def test_a_response_has_the_limits_that_it_was_given(change, table):
    """It is what a sampler makes of it whose settings are these for all responses."""
    settings = dataclasses.replace(LABELLED, **change)
    vocab = with_vocab(settings)
    mixed = Sampler(None, vocab, settings, LIMITED, decode_fn=scripted)
    session = mixed.open(table, KEY, 9)
    prompts = sampler_test.random_prompts(3)
    numbers, blocks = {}, 0
    for i, prompt in enumerate(prompts):
        for j, own in enumerate(OWN):
            limits = Limits.of(dataclasses.replace(settings, **own))
            ids = [10 * i + j, 10 * i + j + 1000]
            numbers[i, j] = session.add(prompt, ids, limits if own else None)
    results = finish(session)
    for j, own in enumerate(OWN):
        of_all = dataclasses.replace(settings, **own)
        alone = Sampler(None, vocab, of_all, Batching(rows=6), decode_fn=scripted)
        ids = [10 * i + j + more for i in range(len(prompts)) for more in (0, 1000)]
        expected, _ = alone.sample(table, prompts, 2, KEY, ids=ids)
        found = [results[n] for i in range(len(prompts)) for n in numbers[i, j]]
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other, atol=1e-6)
            assert_laws(one, of_all, vocab)
            blocks += one.num_blocks
    assert blocks > 10


@pytest.mark.parametrize("variant", ["structured", "causal"])
def test_who_joins_and_who_leaves_changes_no_other(variant):
    settings = dataclasses.replace(SETTINGS, variant=variant)
    config, params = sampler_test.QWEN3, sampler_test.random_params(sampler_test.QWEN3)
    make = lambda batching: Sampler(
        sampler_test.choose(config, "xla"), with_vocab(settings), settings, batching
    )
    prompts = sampler_test.random_prompts(8)
    expected, _ = make(Batching(rows=8)).sample(params, prompts, 2, KEY)
    session = make(LIMITED).open(params, KEY, 9)
    add = lambda i: session.add(prompts[i], [2 * i, 2 * i + 1])
    numbers = {i: add(i) for i in range(5)}
    turn, left = 0, {}

    def sooner(finished):
        nonlocal turn
        turn += 1
        if turn in (2, 3, 4):  # others join, once rows are decoding
            numbers[3 + turn] = add(3 + turn)
        if turn == 2:  # one that is written leaves, and one that waits
            some = next(iter(session.unfinished()))
            left.update(dict.fromkeys([some, numbers[4][1]]))
            session.drop({*left})

    results = finish(session, sooner)
    everyone = {n: 2 * i + j for i, both in numbers.items() for j, n in enumerate(both)}
    assert {*numbers} == {*range(8)} and len(left) == 2
    assert {*results} == {*everyone} - {*left}
    for number, trajectory in results.items():
        assert_equal(trajectory, expected[everyone[number]], atol=1e-4)
    assert not session.unfinished() and session.advance() == {}
    # Whoever leaves leaves the device, too.
    some = session.add(prompts[0], range(4))
    session.advance()
    assert {*session.unfinished()} == {*some}
    session.drop({*some})
    phases, live = np.array(session._state.phase), np.array(session._state.live)
    assert (phases == DONE).all() and not live.any()
