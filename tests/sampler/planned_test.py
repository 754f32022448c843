"""Planned blocks, whatever is drawn: well formed, in time, as many paths as plans.

Every response has a policy of its own, drawn by its key: how much it likes each token,
and how many plans it wants to write.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout, tags
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import END_PATH, PARALLEL, PATH, Settings
from pr1_jax.sampler.state import LIST
from tests.helpers.laws import assert_laws, plans_of
from tests.helpers.tiny import LABELS, PLAN_IDS, TEXTS, VOCAB_SIZE, with_vocab

pytestmark = pytest.mark.usefixtures("compile_quickly")
PLANNED = tags.Grammar(planned=True)
NAMES = TEXTS | dict(zip(PLAN_IDS, tags.PLAN_TAGS)) | {18: "", 19: ""}
MORE_EOS = (18, 19)


def policies(vocab, fed):
    """A decode function of random policies, which notes how many lanes it is fed.

    Its parameters are added to the logits where the model decides how many paths fork.

    Args:
      fed: list that grows by the lanes of each step.
    """
    special = jnp.array(vocab.ban_ids)
    plan, path = PLAN_IDS[0], vocab.special_ids[PATH]

    def decode_fn(params, lanes, state, num_lanes):
        B = len(state.emitted)
        row = jnp.clip(lanes.row, 0, B - 1)
        jax.debug.callback(lambda n: fed.append(int(n)), (lanes.row < B).sum())

        def liking(key, emitted, lane, plans):
            a, b, c, d = jax.random.split(jax.random.fold_in(key, 1), 4)
            mean = 2.0 + 1.5 * jax.random.normal(a, special.shape)
            wanted = jax.random.randint(b, (), 0, 21)
            firm = 9.0 * jax.random.bernoulli(c, 0.7)
            noise = jax.random.normal(
                jax.random.fold_in(d, 8 * emitted + lane), VOCAB_SIZE
            )
            logits = (2.0 * noise).at[special].add(mean)
            more = jnp.where(plans < wanted, firm, -firm)
            return logits.at[plan].add(more).at[path].add(-more)

        lane = lanes.index % state.token.shape[1] if num_lanes > B else 0 * row
        given = state.key[row], state.emitted[row], lane, state.plans[row]
        logits = jax.vmap(liking)(*given)
        decides = (state.phase[row] == LIST)[:, None]
        return jnp.where(decides, logits + params, logits), state.cache

    return decode_fn


@functools.cache
def sampler_of(settings, eos=()):
    """A sampler and the list of the lanes that it feeds."""
    vocab, fed = with_vocab(settings), []
    vocab = dataclasses.replace(vocab, special_ids=(*vocab.special_ids, *eos))
    batching = Batching(rows=200, steps_per_chunk=32, lane_buckets=(), one_size=True)
    decode_fn = policies(vocab, fed)
    return Sampler(None, vocab, settings, batching, decode_fn=decode_fn), fed


def sample(settings, eos=(), *, decides=0.0):
    """400 responses to prompts of 1 to 9 tokens, each by its own policy; lanes fed."""
    sampler, fed = sampler_of(settings, eos)
    fed.clear()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, n) for n in rng.integers(1, 10, 400)]
    found, _ = sampler.sample(jnp.float32(decides), prompts, 1, jax.random.key(1))
    jax.effects_barrier()
    return found, sampler.vocab, sum(fed)


CASES = {
    "a deadline that bites": {
        "num_paths": 4,
        "max_response_tokens": 160,
        "max_sequential_steps": 48,
    },
    "tokens that bite, 8 lanes": {
        "num_paths": 8,
        "max_response_tokens": 75,
        "min_plan_tokens": 4,
        "max_path_tokens": 7,
        "variant": "causal",
    },
    "tags anywhere, 2 lanes": {
        "num_paths": 2,
        "max_response_tokens": 90,
        "ban_illegal": False,
        "max_plan_tokens": 9,
    },
    "tags anywhere, causal, both limits": {
        "num_paths": 5,
        "max_response_tokens": 100,
        "max_sequential_steps": 60,
        "ban_illegal": False,
        "max_plan_tokens": 5,
        "variant": "causal",
    },
    "hardly room": {
        "num_paths": 3,
        "max_response_tokens": 36,
        "max_sequential_steps": 29,
        "summary_reserve": 1,
        "answer_reserve": 0,
    },
    "room for all": {
        "num_paths": 8,
        "max_response_tokens": 300,
        "max_plan_tokens": 6,
        "max_path_tokens": 9,
        "max_summary_tokens": 4,
    },
}
SHARED = {
    "max_prompt_tokens": 9,
    "min_path_tokens": 5,
    "summary_reserve": 2,
    "answer_reserve": 2,
    "path_labels": LABELS,
    "planned": True,
}


def assert_planned(settings, eos=(), **how):
    """The laws of all responses; how many paths their blocks have."""
    found, vocab, fed = sample(settings, eos, **how)
    counts = []
    for t in found:
        assert_laws(t, settings, vocab)
        if settings.ban_illegal:
            text = "".join(NAMES.get(int(i), "x") for i in t.tokens)
            assert tags.check_format(text, PLANNED) == []
        counts += [len(plans) for plans in plans_of(t, vocab)]
    # Each token was fed once, in the step after it, but for a response's last, and the
    # prompt's last in its stead: rows with fewer paths feed fewer lanes.
    assert fed == sum(len(t.tokens) for t in found)
    return found, counts


@pytest.mark.parametrize("name", CASES)
def test_every_response_is_well_formed_and_in_time(name):
    settings = Settings(**SHARED | CASES[name])
    eos = MORE_EOS if settings.num_paths in (2, 8) else ()
    found, counts = assert_planned(settings, eos)
    assert len(counts) > len(found) / 5
    fewest = {2, 3} if name in ("hardly room", "tokens that bite, 8 lanes") else {2}
    fewest = {*range(2, settings.num_paths + 1)} if name == "room for all" else fewest
    assert {*counts} >= fewest


def test_logits_that_are_no_numbers_fork_too():
    """The draw that decides how many paths there are may give any token then."""
    settings = Settings(**SHARED | CASES["room for all"])
    for decides in (np.nan, -np.inf, np.inf):
        found, vocab, _ = sample(settings, MORE_EOS, decides=decides)
        for t in found:
            assert_laws(t, settings, vocab)
        assert sum(t.num_blocks for t in found) > len(found) / 5


def test_budgets_by_hand():
    """The example of docs/method.md, section 10; one response decides for two paths."""
    settings = Settings(
        **SHARED | {"summary_reserve": 8, "answer_reserve": 6, "min_path_tokens": 10},
        num_paths=3,
        max_response_tokens=120,
        max_sequential_steps=60,
        min_plan_tokens=4,
    )
    vocab = with_vocab(settings)
    (plan, end_plan), ids = vocab.plan_ids, vocab.special_ids
    draws = {4: ids[PARALLEL], 10: end_plan, 16: end_plan, 21: end_plan}

    def decode_fn(params, lanes, state, num_lanes):
        lane = lanes.index % 3 if num_lanes > len(state.emitted) else 0
        row = jnp.clip(lanes.row, 0, len(state.emitted) - 1)
        emitted, count = state.emitted[row], state.count[row, lane]
        wanted = jnp.full(num_lanes, 7)
        for at, token in draws.items():
            wanted = jnp.where(emitted == at, token, wanted)
        more = jnp.where(state.prompt_length[row] == 1, plan, ids[PATH])
        wanted = jnp.where(state.phase[row] == LIST, more, wanted)
        ends = ((lane == 1) & (count == 14)) | ((lane == 2) & (count == 11))
        wanted = jnp.where(ends & state.live[row, 1], ids[END_PATH], wanted)
        return 99.0 * jax.nn.one_hot(wanted, VOCAB_SIZE), state.cache

    batching = Batching(rows=2, lane_buckets=(), one_size=True)
    sampler = Sampler(None, vocab, settings, batching, decode_fn=decode_fn)
    found, _ = sampler.sample(jnp.zeros(()), [[5], [5, 6]], 1, jax.random.key(0))
    for t in found:
        assert_laws(t, settings, vocab)
    three, two = found
    assert plans_of(three, vocab) == [[(5, 10), (11, 16), (17, 21)]]
    assert plans_of(two, vocab) == [[(5, 10), (11, 16)]]
    assert np.bincount(three.path)[1:].tolist() == [21, 15, 12]
    assert np.bincount(two.path)[1:].tolist() == [26, 15]
    assert [t.sequential_steps for t in found] == [60, 60]
    assert [len(t.tokens) for t in found] == [87, 75]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"path_labels": ()}, "rollout.planned=True needs rollout.path_labels, not ()"),
        ({"min_plan_tokens": 2}, "rollout.min_plan_tokens=2 must hold both tags"),
        ({"max_plan_tokens": 2}, "rollout.max_plan_tokens=2 must be 0 or at least"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Settings(max_response_tokens=90, **SHARED | wrong)


def test_more_eos_ids_than_bits_are_refused():
    settings = Settings(max_response_tokens=90, **SHARED)
    vocab = with_vocab(settings)
    many = lambda n: (*vocab.special_ids[:6], *range(30, 30 + n))
    settings.check_vocab(dataclasses.replace(vocab, special_ids=many(22)))
    with pytest.raises(ValueError, match="rollout.planned=True: .* 23 EOS ids, .* 22 "):
        settings.check_vocab(dataclasses.replace(vocab, special_ids=many(23)))


def drawn(seed):
    """Settings at random."""
    rng = np.random.default_rng(seed)
    summary, answer = int(rng.integers(1, 6)), int(rng.integers(0, 6))
    pick = lambda *options: int(rng.choice(options))
    return Settings(
        max_prompt_tokens=9,
        max_response_tokens=int(rng.integers(20, 200)),
        max_sequential_steps=pick(0, *[answer + int(rng.integers(10, 80))] * 4),
        num_paths=int(rng.integers(2, 9)),
        max_blocks=int(rng.integers(1, 5)),
        min_path_tokens=int(rng.integers(5, 9)),
        max_path_tokens=pick(0, 9, 12),
        path_labels=LABELS,
        planned=True,
        min_plan_tokens=(least := int(rng.integers(3, 7))),
        max_plan_tokens=pick(0, least, least + 4),
        max_summary_tokens=pick(0, 1, 4),
        summary_reserve=summary,
        answer_reserve=answer,
        variant=str(rng.choice(layout.VARIANTS)),
        ban_illegal=rng.random() < 0.7,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_so_it_is_with_any_settings(seed):
    assert_planned(drawn(seed), MORE_EOS[: seed % 3])
