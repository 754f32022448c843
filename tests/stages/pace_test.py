"""What a step costs: counted work, tokens a second and MFU."""

import types

import jax
import numpy as np
import pytest

from pr1_jax import layout
from pr1_jax.model import costs
from pr1_jax.model.config import ModelConfig
from pr1_jax.stages import pace
from pr1_jax.system import accelerators
from pr1_jax.trajectory import Trajectory

MODEL = ModelConfig(
    vocab_size=11, num_layers=3, width=8, num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_width=16,
)  # fmt: skip


def trajectory(prompt, labels):
    """A response whose tokens have these (block, path) labels."""
    block, path = np.array(labels, np.int32).reshape(-1, 2).T
    zeros = np.zeros(len(block), np.int32)
    return Trajectory(
        prompt=np.zeros(prompt, np.int32), tokens=zeros, positions=zeros,
        block=block, path=path, forced=zeros > 0, bans=zeros, logps=zeros,
        finished=True, sequential_steps=1,
    )  # fmt: skip


def random_trajectory(rng):
    labels = [(0, 0)] * rng.integers(0, 4)
    for block in range(1, 1 + rng.integers(0, 4)):
        for path in range(1, 1 + rng.integers(2, 5)):
            labels += [(block, path)] * rng.integers(1, 6)
        labels += [(0, 0)] * rng.integers(0, 4)
    return trajectory(int(rng.integers(1, 6)), labels)


def seen(t):
    """The pairs of the dense mask, of the response with its prompt."""
    zeros = np.zeros(len(t.prompt), np.int32)
    block, path = np.concatenate([zeros, t.block]), np.concatenate([zeros, t.path])
    return layout.visible(layout.Layout(np.arange(len(t)), block, path))


def test_pairs_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    for _ in range(50):
        t = random_trajectory(rng)
        assert pace.visible_pairs(t, variant="structured") == seen(t).sum()
        assert pace.visible_pairs(t, variant="causal") == len(t) * (len(t) + 1) // 2


def test_sampling_computes_the_prompt_of_a_group_once():
    rng = np.random.default_rng(1)
    group = [random_trajectory(rng) for _ in range(3)]
    group = [trajectory(4, np.stack([t.block, t.path], 1)) for t in group]
    work = pace.sampling(group * 2, 3)
    answers = sum(len(t.tokens) for t in group)
    pairs = sum(seen(t)[4:].sum() for t in group)
    assert work == pace.Work(2 * (4 + answers), 2 * (4 * 5 // 2 + pairs), 2 * answers)


def test_training_computes_shared_tokens_once():
    t = trajectory(6, [(0, 0)] * 5)
    alone = pace.training([t] * 4, variant="structured")
    assert alone == pace.Work(4 * 11, 4 * 66, 4 * 5)
    shared = pace.training(
        [t] * 4, variant="structured", shared=[6, 6, 4, 4], group_rows=2
    )
    # Two rows have six tokens in common, two others four.
    assert shared == pace.Work(44 - 6 - 4, 4 * 66 - 21 - 10, 20)
    counted = costs.update_flops(MODEL, rows=4, tokens=11, trained=5)
    assert 3 * alone.tflop(MODEL) * 1e12 == pytest.approx(counted)


def test_pace_by_hand():
    devices = jax.device_count()
    metrics = {
        "perf/sampling_tflop": 2.0,
        "perf/update_tflop": 6.0,
        "perf/update_sec": 1.5,
        "perf/decode_sec": 2.0,
    }
    found = pace.pace(metrics, tokens=800, seconds=4.0, peak_tflops=10.0)
    assert found == pytest.approx(
        {
            "perf/step_sec": 4.0,
            "perf/tokens_per_sec": 200.0,
            "perf/tokens_per_sec_per_device": 200.0 / devices,
            "perf/accounted": 3.5 / 4.0,
            "perf/mfu": 8.0 / 4.0 / 10.0 / devices,
            "perf/update_mfu": 6.0 / 1.5 / 10.0 / devices,
        }
    )
    found = pace.pace(metrics, tokens=800, seconds=4.0, peak_tflops=0.0)
    assert not {"perf/mfu", "perf/update_mfu"} & {*found}


def test_a_peak_is_the_data_sheets_or_given():
    config = lambda peak: types.SimpleNamespace(
        metrics=types.SimpleNamespace(peak_tflops=peak)
    )
    assert pace.device_peak(config(0.0)) == 0.0  # a CPU has none
    assert pace.device_peak(config(0.2)) == 0.2
    assert accelerators.of_kind("TPU v5 lite").flops_per_sec == 197e12
    assert accelerators.of_kind("NVIDIA H100 80GB HBM3").name == "h100"
    assert accelerators.of_kind("NVIDIA H100 PCIe") is None  # slower than the module
    kinds = [x.kind for x in (*accelerators.TPUS.values(), *accelerators.GPUS.values())]
    assert len({*kinds}) == len(kinds) and all(kinds)
