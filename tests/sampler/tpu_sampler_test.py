"""With the kernels for TPU, interpreted, what is sampled is what the trainer computes."""

import dataclasses

import jax
import numpy as np

from pr1_jax.kernels import decode
from pr1_jax.model.tpu import Tpu
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from tests.helpers.tiny import ONE_LAYER, SETTINGS, with_vocab
from tests.sampler.sampler_test import (
    PLANNED,
    random_params,
    random_prompts,
    teacher_forced,
)


def test_sampled_logps_equal_teacher_forced(monkeypatch):
    """In the causal variant, whose rejoin reads and writes the cache; blocks are planned."""
    monkeypatch.setattr(decode, "tile_slots", lambda *_: 128)  # interpreted faster
    settings = dataclasses.replace(
        SETTINGS, variant="causal", max_response_tokens=44, **PLANNED
    )
    batching = Batching(rows=4, group_size=2, lane_buckets=())
    backend = Tpu(ONE_LAYER, interpret=True)
    sampler = Sampler(backend, with_vocab(settings), settings, batching)
    params = random_params(ONE_LAYER)
    found, _ = sampler.sample(params, random_prompts(4), 2, jax.random.key(0))
    assert sum(t.num_blocks for t in found) >= 3
    batch, logps = teacher_forced(ONE_LAYER, params, found, settings)
    compared = batch.loss_mask.copy()
    for row, t in enumerate(found):  # later paths differ by design
        start = len(t.prompt)
        compared[row, start : start + len(t.tokens)] &= t.path <= 1
    assert compared.sum() > 80
    assert np.abs(batch.old_logps - logps)[compared].max() < 1e-4
