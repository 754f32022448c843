"""A tiny model, and what goes with it, for tests of kernels, model, sampler and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import tags
from pr1_jax.kernels.cpu import library
from pr1_jax.model import adapters
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.rope import Yarn
from pr1_jax.sampler.settings import Settings, Vocab

VOCAB = Vocab(special_ids=(10, 11, 12, 13, 14, 15, 1), newline_id=2)
PLAN_IDS = (16, 17)
VOCAB_SIZE = 24
TEXTS = {10 + i: tag for i, tag in enumerate(tags.TAGS)} | {
    2: "\n",
    1: "",
}  # of some tokens
SETTINGS = Settings(  # budgets that bite within a few dozen tokens
    max_prompt_tokens=9,
    max_response_tokens=60,
    max_path_tokens=9,
    max_summary_tokens=7,
    summary_reserve=3,
    answer_reserve=3,
)
QWEN3 = ModelConfig(
    vocab_size=VOCAB_SIZE,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
)
ONE_LAYER = dataclasses.replace(QWEN3, num_layers=1)
LLAMA = dataclasses.replace(
    QWEN3, qk_norm=False, num_heads=3, num_kv_heads=3, tie_embeddings=False
)
YARN = Yarn(4.0, 16, attention_factor=1.5)  # of a context that tests go beyond
WHY_NO_KERNELS = library.why_not("float32")
needs_kernels = pytest.mark.skipif(bool(WHY_NO_KERNELS), reason=WHY_NO_KERNELS)


LABELS = tuple(f" #{i}" for i in range(8))  # texts; their tokens:
LABEL_IDS = ((5,), (6, 7, 8), (6, 6), (), (9, 9, 9), (7,), (8, 2), (3, 4, 5))


def with_vocab(settings: Settings) -> Vocab:
    """The tokens of a tiny model with labels of paths, and plans, where these are on."""
    labels = LABEL_IDS[: len(settings.path_labels)]
    plans = PLAN_IDS if settings.planned else ()
    return dataclasses.replace(VOCAB, label_ids=labels, plan_ids=plans)


@functools.cache
def random_params(config, seed=0):
    """Parameters drawn by NumPy, so large that all that is visible matters."""
    init = lambda: unbox(init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, x):
        center, spread = (1.0, 0.1) if path[-1].key == "scale" else (0.0, 0.2)
        return jnp.asarray(center + spread * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


@functools.cache
def random_adapters(config, settings, seed=0):
    """Adapters that change what a model of `random_params` computes; B is not 0."""
    rng = np.random.default_rng(seed)
    abstract = unbox(adapters.abstract_adapters(config, settings))
    draw = lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(draw, abstract)


def floats(rng, *shape):
    """Normal float32 numbers."""
    return jnp.asarray(rng.normal(size=shape), jnp.float32)
