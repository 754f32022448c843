"""The table of benchmarks: its figures, from samples that are kept and resumed."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import evaluate
from pr1_jax import tags
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED
from pr1_jax.stages import benchmark, curriculum, experiment, samples
from pr1_jax.system import files
from pr1_jax.workdir import metrics

SAMPLES, PROBLEMS, ROWS = 2, 10, 4
CHUNK = 4 * ROWS  # responses
DEADLINE, LABELS = 40, (" 1", " 2")  # each is one token


@pytest.fixture(scope="module")
def made():
    """A small experiment on one device, whose samplers all tests share."""
    config = evaluate.get_config("smoke")
    config.model.num_layers, config.model.width, config.model.mlp_width = 1, 32, 32
    config.rollout.rows, config.rollout.prompts_per_prefill = ROWS, 2
    config.rollout.max_response_tokens = 60
    config.rollout.update(min_path_tokens=3, max_path_tokens=8)
    config.rollout.update(max_sequential_steps=DEADLINE, path_labels=LABELS)
    config.eval.problems = PROBLEMS
    config.eval.samples = SAMPLES
    config.data.eval = "easy=embedded:easy,hard=embedded:hard"
    return experiment.build(config.lock(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params(made):
    return made.initial_params()


def sample(made, params, path, **settings):
    problems = benchmark.check_data(made)["hard"]
    settings = {"mode": "structured", "samples": SAMPLES, **settings}
    return list(samples.sample(made, params, path, problems, **settings))


def without_time(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_samples_are_kept_a_chunk_at_a_time(made, params, tmp_path):
    path = tmp_path / "deep" / "hard.jsonl"
    steps = sample(made, params, path)
    assert [done for done, _ in steps] == [0, 8, 10]
    assert [len(records) for _, records in steps] == [0, CHUNK, PROBLEMS * SAMPLES]
    records = steps[-1][1]
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    places = [(r["problem"], r["sample"]) for r in records]
    assert places == [(i, j) for i in range(PROBLEMS) for j in range(SAMPLES)]
    assert len({r["response"] for r in records}) > PROBLEMS


def test_what_was_sampled_is_not_sampled_again(made, params, tmp_path):
    whole = tmp_path / "whole.jsonl"
    records = sample(made, params, whole)[-1][1]
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in (CHUNK, CHUNK + 1):  # whole chunks only; a half line is cut off
        broken = tmp_path / f"{kept}.jsonl"
        broken.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        steps = sample(made, params, broken)
        assert [done for done, _ in steps] == [8, 10]
        assert steps[0][1] == records[:CHUNK]
        assert without_time(steps[-1][1]) == without_time(records)
        again = [json.loads(line) for line in broken.read_text().splitlines()]
        assert again == steps[-1][1]


@pytest.mark.slow
def test_modes_draw_alike_until_they_differ(made, params, tmp_path):
    found = {
        mode: sample(made, params, tmp_path / f"{mode}.jsonl", mode=mode)[-1][1]
        for mode in ("structured", "causal", "ordinary")
    }
    assert not any(r["num_blocks"] for r in found["ordinary"])
    for mode in ("structured", "causal"):
        assert any(r["num_blocks"] for r in found[mode])
    plain = [i for i, r in enumerate(found["structured"]) if not r["num_blocks"]]
    assert plain
    for i in plain:
        assert found["causal"][i]["response"] == found["structured"][i]["response"]


def test_figures_by_hand():
    right = {
        "question": "?",
        "response": "…",
        "answer": "1",
        "verdict": CORRECT,
        "reason": "made up",
        "format_ok": True,
        "string_correct": True,
        "num_blocks": 0,
        "total_tokens": 10,
        "sequential_steps": 10,
        "finished": True,
        "seconds": 0.5,
    }
    wrong = right | {"verdict": INCORRECT, "string_correct": False}
    late = wrong | {"verdict": UNDECIDED, "num_blocks": 2}
    late |= {"total_tokens": 30, "finished": False}
    # Of the three problems: both samples right, one, none.
    found = benchmark.summarize([right, right, wrong, right, late, wrong], 2)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["pass_at_k"] == pytest.approx(2 / 3)
    assert (found["problems"], found["samples"]) == (3, 2)
    assert found["parallel_ratio"] == found["undecided"] == pytest.approx(1 / 6)
    assert found["finished"] == pytest.approx(5 / 6)
    assert found["total_tokens"] == pytest.approx(80 / 6)
    assert found["accuracy_low"] == 0.0 and found["accuracy_high"] == 1.0


def test_the_table_is_written_and_resumed(made, tmp_path):
    curriculum.run(made, None, tmp_path)
    results = files.read_json(tmp_path / "benchmarks.json", None)
    assert list(results) == ["structured", "causal", "ordinary"]
    for found in results.values():
        assert list(found) == ["easy", "hard", "average"]
        mean = np.mean([found[name]["total_tokens"] for name in ("easy", "hard")])
        assert found["average"]["total_tokens"] == pytest.approx(mean)
    for mode in results:  # each heeds the deadline, and writes labels
        read = lambda name: (tmp_path / "samples" / name).read_text().splitlines()
        found = [
            json.loads(line)
            for name in ("easy", "hard")
            for line in read(f"{name}_{mode}.jsonl")
        ]
        steps = [r["sequential_steps"] for r in found]
        assert max(steps) == DEADLINE and max(r["total_tokens"] for r in found) <= 60
        blocks = "".join(r["response"] for r in found).split(tags.PARALLEL)[1:]
        assert bool(blocks) == (mode != "ordinary")
        for block in blocks:
            _, *paths = block.partition(tags.END_PARALLEL)[0].split(tags.PATH)
            assert [*map(str.startswith, paths, LABELS)] == [True, True]
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.startswith(
        "| mode | parallel | easy | hard | Avg. |\n| --- | --- | --- | --- | --- |\n"
    )
    assert text.count("| hard @2 |") == 3
    summary = files.read_json(tmp_path / "summary.json", None)
    names = [f"benchmark_{n}_{m}" for m in results for n in ("easy", "hard")]
    assert list(summary["evaluations"]) == names
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["stage"] for line in lines] == names
    # As if it had been stopped before the last benchmark.
    (tmp_path / "samples" / "hard_ordinary.jsonl").unlink()
    del summary["evaluations"][names[-1]], summary["finished"]
    files.write_json(tmp_path / "summary.json", summary)
    curriculum.run(made, None, tmp_path)
    again = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["stage"] for line in again] == names
    figures = lambda line: {k: v for k, v in line.items() if k.startswith("eval/")}
    assert [*map(figures, again[:-1])] == [*map(figures, lines[:-1])]
    resumed = files.read_json(tmp_path / "benchmarks.json", None)
    both = [found["ordinary"]["hard"] for found in (resumed, results)]
    assert without_time(both[:1]) == without_time(both[1:])


def test_a_benchmark_that_cannot_be_read_is_named(made):
    config = made.config.copy_and_resolve_references()
    config.data.eval = "easy=embedded:easy,hard=/nowhere/aime.jsonl@4"
    broken = dataclasses.replace(made, config=config)
    with pytest.raises(
        FileNotFoundError, match="data.eval, hard=/nowhere/aime.jsonl: "
    ):
        benchmark.check_data(broken)
