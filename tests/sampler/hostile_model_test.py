"""A model may write anything: traces stay whole, updates stay finite, in both variants.

One decode function stands in for all these models: their likings are its parameters,
so that a variant's sampler is compiled once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout, losses, tags, trajectory
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.training.logps import PolicySettings
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import TrainState
from pr1_jax.training.update import GrpoSettings, grpo_update
from tests.helpers.laws import assert_laws

VOCAB_SIZE = 20
TAG_IDS = dict(zip(tags.TAGS, range(10, 16)))
EOS_ID, NEWLINE_ID, TEXT_ID = 0, 2, 5  # an EOS of 0, as some tokenizers have it
VOCAB = Vocab((*TAG_IDS.values(), EOS_ID), NEWLINE_ID)
SETTINGS = {
    "max_prompt_tokens": 5,
    "max_response_tokens": 48,
    "max_path_tokens": 6,
    "max_summary_tokens": 5,
    "summary_reserve": 3,
    "answer_reserve": 3,
}
NUM_PROMPTS, SAMPLES, LENGTH = 8, 4, 56
NEVER = -1e9
pytestmark = pytest.mark.usefixtures("compile_quickly")


def likings(**scores):
    """Logits by id: `others`, then ids by name (a tag's letters, EOS, TEXT, TAGS)."""
    names = {
        **{tag: [i] for tag, i in TAG_IDS.items()},
        "TAGS": [*TAG_IDS.values()],
        "EOS": [EOS_ID],
        "TEXT": [TEXT_ID],
    }
    logits = np.full(VOCAB_SIZE, scores.pop("others", 0.0), np.float32)
    for name, score in scores.items():
        logits[names[name]] = score
    return logits


SANE = {
    "tags at random": likings(TAGS=6.0),
    "only tags": likings(others=NEVER, TAGS=0.0),
    "only EOS": likings(EOS=1e4),
    "never EOS": likings(EOS=NEVER),
    "never EOS, only text": likings(others=NEVER, TEXT=1e4),
    "impossible EOS": likings(EOS=-np.inf),
    "tags alone": likings(others=-np.inf, TAGS=0.0),
    "EOS and tags alone": likings(others=-np.inf, TAGS=0.0, EOS=0.0),
    **{f"only {tag}": likings(**{tag: 1e4}) for tag in tags.TAGS},
}
# No distribution at all: the parameters are ruined.
INSANE = {
    "nan": likings(others=np.nan),
    "one nan": likings(**{tags.PATH: np.nan, "TEXT": np.nan}),
    "infinite text": likings(TEXT=np.inf),
    "nothing possible": likings(others=-np.inf),
}


def decode_fn(params, lanes, state, num_lanes):
    """Logits [num_lanes, V]: the model's likings and some noise of its own."""
    salt = jax.random.fold_in(jax.random.key(0), state.emitted.sum())
    noise = jax.random.normal(salt, (num_lanes, VOCAB_SIZE))
    return params + noise, state.cache


@functools.cache
def sampler_of(variant, ban_illegal=True):
    settings = Settings(**SETTINGS, variant=variant, ban_illegal=ban_illegal)
    batching = Batching(rows=8, lane_buckets=())
    return Sampler(None, VOCAB, settings, batching, decode_fn=decode_fn)


def responses(logits, variant, **kwargs):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB_SIZE, 1 + i % 5) for i in range(NUM_PROMPTS)]
    sampler = sampler_of(variant, **kwargs)
    key = jax.random.key(1)
    return sampler.sample(jnp.asarray(logits), prompts, SAMPLES, key)[0]


# --- Updates ------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=16,
)


@functools.cache
def update():
    """A GRPO update, and the state that it starts from."""
    optimizer = make_optimizer(OptimizerSettings(lr=1e-2, steps=10))
    init = jax.jit(lambda key: unbox(init_params(CONFIG, key)))
    params = init(jax.random.key(0))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    step = functools.partial(
        grpo_update,
        backend=Xla(CONFIG),
        optimizer=optimizer,
        policy=PolicySettings(special_ids=VOCAB.special_ids),
        grpo=GrpoSettings(),
    )
    return jax.jit(step), state


def trained(found, variant):
    """State before and after a step on these responses, and its metrics."""
    correct = np.array([len(t.tokens) % 2 == 0 for t in found], np.float32)
    advantages = losses.advantages(correct.reshape(-1, SAMPLES)).ravel()
    batch = trajectory.pack(found, LENGTH, variant=variant, advantages=advantages)
    batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    step, state = update()
    return state, *step(state, batch)


def all_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# --- The tests ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", layout.VARIANTS)
@pytest.mark.parametrize("name", SANE)
def test_any_distribution_gives_whole_traces_and_trains_on(name, variant):
    found = responses(SANE[name], variant)
    for t in found:
        assert_laws(t, sampler_of(variant).settings, VOCAB)
        assert np.isfinite(t.logps).all() and (t.logps <= 0).all()
        allowed = {*TAG_IDS.values(), NEWLINE_ID} - {TAG_IDS[tags.PARALLEL]}
        assert {*t.tokens[t.forced].tolist()} <= allowed
    _, state, metrics = trained(found, variant)
    assert all_finite(state.params) and all_finite(metrics)
    assert metrics["skipped"] == 0


def test_the_models_do_what_their_names_say():
    texts = {name: responses(logits, "structured") for name, logits in SANE.items()}
    assert all(len(t.tokens) == 1 and t.finished for t in texts["only EOS"])
    for name in ("never EOS", "impossible EOS", "never EOS, only text"):
        assert not any(t.finished or EOS_ID in t.tokens for t in texts[name])
    for name in ("tags at random", "only tags", f"only {tags.PARALLEL}"):
        assert np.mean([t.num_blocks for t in texts[name]]) >= 1
    lengths = [len(t.tokens) for t in texts[f"only {tags.END_PATH}"] if t.num_blocks]
    assert lengths  # main streams cannot write it, and so open blocks now and then


@pytest.mark.parametrize("variant", layout.VARIANTS)
@pytest.mark.parametrize("name", INSANE)
def test_no_distribution_gives_whole_traces_and_a_skipped_update(name, variant):
    found = responses(INSANE[name], variant)
    for t in found:
        assert_laws(t, sampler_of(variant).settings, VOCAB)
    finite = all(np.isfinite(t.logps).all() for t in found)
    before, after, metrics = trained(found, variant)
    assert all_finite(after.params)
    assert metrics["skipped"] == (not finite)
    if not finite:
        jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tags at random", "only tags", "only EOS"])
def test_tags_out_of_place_are_ordinary_tokens_where_they_are_not_banned(name):
    found = responses(SANE[name], "structured", ban_illegal=False)
    for t in found:
        settings = sampler_of("structured", ban_illegal=False).settings
        assert_laws(t, settings, VOCAB)
        assert np.isfinite(t.logps).all()
    _, state, metrics = trained(found, "structured")
    assert all_finite(state.params) and all_finite(metrics)
