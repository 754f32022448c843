"""The log of a run: whole lines, no step twice, and what sinks get of it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from pr1_jax.system import files
from pr1_jax.workdir import metrics

STAGES = ["eval_0_base", "sft", "eval_1_sft", "rl", "eval_2_rl"]


def _write_run(workdir):
    """Writes a whole run: three steps a training stage, one line an evaluation."""
    with metrics.MetricWriter(workdir) as writer:
        for stage in STAGES:
            for step in range(1) if stage.startswith("eval") else range(1, 4):
                writer.write(stage, step, {"a/x": step + 0.1, "b/y": 0.3})


def _steps(workdir):
    records = metrics.read_metrics(workdir / "metrics.jsonl")
    return [(record["stage"], record["step"]) for record in records]


def test_what_is_written_is_read_back(tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write("sft", 1, {"loss/sft": 0.1, "perf/step_sec": 2})
        writer.write("sft", 2, {"loss/sft": jnp.float32(0.5), "a/b": np.float64(1e-9)})
        records = metrics.read_metrics(writer.path)  # before close: lines are out
    assert records == [
        {"stage": "sft", "step": 1, "loss/sft": 0.1, "perf/step_sec": 2.0},
        {"stage": "sft", "step": 2, "loss/sft": 0.5, "a/b": 1e-9},
    ]
    assert list((tmp_path / "tensorboard" / "sft").glob("events.*"))


def test_non_finite_figures_are_null_and_named_in_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *a: warnings.append(text % a))
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write("rl", 3, {"a/nan": math.nan, "a/inf": -math.inf, "a/ok": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"stage": "rl", "step": 3, "a/nan": None, "a/inf": None, "a/ok": 1.0}
    assert json.loads(line) == expected
    assert len(warnings) == 2
    assert "a/nan" in warnings[0]
    assert "a/inf" in warnings[1]


def test_a_disabled_writer_leaves_no_trace(tmp_path):
    with metrics.MetricWriter(tmp_path / "run", enabled=False) as writer:
        writer.resume(STAGES, "sft", 1)
        writer.write("sft", 1, {"loss/sft": 0.1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "step", "kept"),
    [
        ("eval_0_base", -1, 0),  # no checkpoint yet: everything is done again
        ("eval_0_base", 0, 1),
        ("sft", 2, 3),
        ("sft", 3, 4),
        ("eval_1_sft", 0, 5),
        ("rl", 0, 5),
        ("rl", 1, 6),
        ("eval_2_rl", 0, 9),
    ],
)
def test_resume_drops_what_came_after_the_checkpoint(tmp_path, stage, step, kept):
    _write_run(tmp_path)
    before = metrics.read_metrics(tmp_path / "metrics.jsonl")
    with metrics.MetricWriter(tmp_path) as writer:
        writer.resume(STAGES, stage, step)
        writer.write("eval_2_rl", 7, {"a/x": 1.0})
    after = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert after[:-1] == before[:kept]
    assert after[-1]["step"] == 7
    events = {path.name for path in (tmp_path / "tensorboard").iterdir()}
    assert events == {*STAGES[: STAGES.index(stage) + 1], "eval_2_rl"}


def test_resume_keeps_unknown_stages_and_refuses_to_begin_in_one(tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
        for stage in ("other", "rl"):
            writer.write(stage, 9, {"a/x": 1.0})
        writer.resume(STAGES, "sft", 0)
        with pytest.raises(ValueError, match="'warmup' is not one of"):
            writer.resume(STAGES, "warmup", 0)
    assert _steps(tmp_path) == [("other", 9)]


@pytest.mark.parametrize("lost", [1, 5, 30])
@pytest.mark.parametrize("resume", [True, False])
def test_a_half_written_last_line_is_dropped(tmp_path, lost, resume):
    _write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    expected = _steps(tmp_path)
    assert len(expected) == 8
    with metrics.MetricWriter(tmp_path) as writer:
        if resume:
            writer.resume(STAGES, "eval_2_rl", -1)
        writer.write("eval_2_rl", 0, {"a/x": 1.0})
    assert _steps(tmp_path) == [*expected, ("eval_2_rl", 0)]


def test_a_broken_line_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.read_metrics(path) == []  # there is none yet
    path.write_text('{"stage": "rl", "step": 1}\n{"sta\n{"stage": "rl", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        metrics.read_metrics(path)


def test_write_json_takes_arrays_and_non_finite_numbers(tmp_path):
    path = tmp_path / "new" / "summary.json"
    value = [1, np.float32(0.5), jnp.arange(2), math.inf, tmp_path]
    files.write_json(path, {"old": 1})
    files.write_json(path, {"a": tuple(value)})
    expected = {"a": [1, 0.5, [0, 1], None, str(tmp_path)]}
    assert json.loads(path.read_text()) == expected
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_compilations_are_counted_once_per_shape():
    counter = metrics.CompilationCounter()
    double = jax.jit(lambda x: 2 * x)
    inputs = [np.zeros(n, np.float32) for n in (3, 3, 4)]
    double(inputs[0])
    assert counter.count == 0  # not started

    counter.start()
    counts = []
    for x in inputs:
        double(x)
        counts.append(counter.count)
    assert counts == [0, 0, 1]

    counter.stop()
    double(np.zeros(5, np.float32))
    assert counter.count == 1
