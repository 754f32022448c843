"""Several processes on one machine do what one does, and go on where others stopped."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import pytest

from pr1_jax.system import processes
from pr1_jax.workdir import metrics
from tests.helpers import compiling, pair

ROOT = pathlib.Path(__file__).parents[2]
SWITCHES = (
    "--config=configs/rl_alternating.py:smoke",
    "--config.model.num_layers=1",
    "--config.model.length_buckets=()",
    "--config.model.packed_tokens=160",
    "--config.stages=('rl',)",
    "--config.rl.steps=3",
    "--config.rl.mini_batches=2",
    "--config.checkpoint.every_steps=1",
    "--config.eval.banned=False",
    "--config.rollout.max_blocks=2",
    "--config.reward.function=docs/examples/trl_style.py:score",
    "--config.reward.verifier=docs/examples/last_number.py:verify",
)


def start(workdir, count, *switches):
    """Starts a job of so many processes, in a process group of its own."""
    command = ["bash", "launch/local_multiprocess.sh", str(count)]
    return subprocess.Popen(
        [*command, *SWITCHES, *switches, f"--workdir={workdir}"],
        cwd=ROOT,
        env=compiling.on_one_device(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*args):
    job = start(*args)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said


def figures(workdir):
    """All metrics but those of speed, by stage, step and name."""
    return {
        (line["stage"], line["step"], name): value
        for line in metrics.read_metrics(workdir / "metrics.jsonl")
        for name, value in line.items()
        if not name.startswith("perf/") and name not in ("stage", "step")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    run(workdir, 1)
    return workdir


def assert_same_figures(workdir, expected):
    found, expected = figures(workdir), figures(expected)
    assert found.keys() == expected.keys()
    assert {step for stage, step, _ in found if stage == "rl"} == {1, 2, 3}
    for name, value in expected.items():
        if not isinstance(value, str):
            assert found[name] == pytest.approx(value, rel=1e-3, abs=2e-4), name


def test_two_processes_give_the_figures_of_one(alone, tmp_path):
    run(tmp_path, 2)
    assert_same_figures(tmp_path, alone)
    files = {path.name for path in (tmp_path / "rollouts").iterdir()}
    assert "rl_000002-00001-of-00002.jsonl" in files
    whole = metrics.read_metrics(alone / "rollouts" / "rl_000002.jsonl")
    parts = [
        metrics.read_metrics(
            tmp_path / "rollouts" / f"rl_000002-0000{i}-of-00002.jsonl"
        )
        for i in range(2)
    ]
    texts = lambda records: sorted(r["question"] + r["response"] for r in records)
    assert len(parts[0]) == len(parts[1])
    assert texts(parts[0] + parts[1]) == texts(whole)


@pytest.mark.slow
def test_when_one_dies_all_stop_and_another_number_goes_on(alone, tmp_path):
    job = start(tmp_path, 2)
    file = tmp_path / "metrics.jsonl"
    began = time.monotonic()
    while "rl" not in {line["stage"] for line in metrics.read_metrics(file)}:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() - began < 300
        time.sleep(0.2)
    # The one whose number is 1.
    found = subprocess.run(
        ["pgrep", "-f", f"workdir={tmp_path} .*--process_id=1"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)
    began = time.monotonic()
    said, _ = job.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert job.returncode != 0
    assert "process 1 of 2 ended with exit code 137" in said
    # Ours, or JAX's own where heartbeats stop first.
    assert re.search("another process of the job has stopped|another task died", said)
    run(tmp_path, 1)
    assert_same_figures(tmp_path, alone)


@pytest.mark.slow
def test_a_function_that_fails_at_one_process_ends_all(alone, tmp_path):
    """Before the update, with its line; once it is mended, the job goes on."""
    others = metrics.read_metrics(alone / "rollouts" / "rl_000002.jsonl")
    of_step = {record["question"] for record in others}
    file = tmp_path / "mine.py"
    good = (ROOT / "docs" / "examples" / "trl_style.py").read_text()
    stop = f"    if record.question == {min(of_step)!r}: raise RuntimeError('enough')\n"
    first = "-> dict[str, float]:\n"
    file.write_text(good.replace(first, first + stop))
    mine, workdir = f"--config.reward.function={file}:score", tmp_path / "run"
    job = start(workdir, 2, mine)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 2, said
    assert re.search(
        r"error: process \d of 2: reward.function=.*RuntimeError: enough", said
    )
    assert [line["step"] for line in metrics.read_metrics(workdir / "metrics.jsonl")][
        -1
    ] == 1
    assert not [*(workdir / "rollouts").glob("rl_000002*")]
    file.write_text(good)
    run(workdir, 2, mine)
    assert_same_figures(workdir, alone)


@pytest.mark.parametrize("wrong", ["rollout.num_paths=99", "rl.stepz=3"])
def test_a_config_that_is_wrong_at_one_process_ends_all(tmp_path, wrong):
    """With one line, and the exit code at which no launcher starts them again."""
    job = [sys.executable, "-m", "pr1_jax.main", *SWITCHES, f"--workdir={tmp_path}/run"]
    ended = pair.run(
        lambda i, address: [
            *(*job, f"--coordinator={address}", "--num_processes=2"),
            *(f"--process_id={i}", *([f"--config.{wrong}"] if i else [])),
        ],
        timeout_sec=100,
    )
    said = [errors for _, _, errors in ended]
    assert [code for code, _, _ in ended] == [2, 2], said
    for text in said:
        (line,) = [line for line in text.splitlines() if line.startswith("error:")]
        assert wrong in line and "Traceback" not in text
    assert f"error: process 1 of 2: {wrong}" in said[0]


def test_fields_that_differ_between_processes_are_named(monkeypatch):
    told = lambda *fields: monkeypatch.setattr(
        processes, "exchange", lambda mine: [mine, *map(json.dumps, fields)]
    )
    told({"rl.steps": 3}, {"rl.steps": 4})
    named = "process 2 of 3: rl.steps=4, but 3 at process 0: "
    assert processes.difference({"rl.steps": 3}).startswith(named)
    told({"rl.steps": 3, "seed": 1})
    assert "seed=1, but None at process 0" in processes.difference({"rl.steps": 3})
    told({"rl.steps": 3})
    assert processes.difference({"rl.steps": 3}) == ""


def test_a_process_that_says_nothing_is_waited_for_in_vain_and_named(monkeypatch):
    def get(key, milliseconds):
        assert milliseconds <= 2000
        if key.endswith("/1"):
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: 2 s are over")
        return '"yes"'

    client = types.SimpleNamespace(
        key_value_set=lambda key, text: None, blocking_key_value_get=get
    )
    monkeypatch.setattr(processes.distributed.global_state, "client", client)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(TimeoutError, match="process 1 of 2 has said nothing for 2 s"):
        processes.exchange("yes", patience_sec=2)


def test_half_of_the_flags_are_refused():
    job = subprocess.run(
        [
            *(sys.executable, "-m", "pr1_jax.main", *SWITCHES),
            "--coordinator=localhost:1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 2
    assert "--num_processes, --process_id missing" in job.stderr
