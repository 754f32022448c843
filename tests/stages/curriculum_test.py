"""The whole curriculum, end to end: by its command, as a person would run it.

One run of `configs/rl_alternating.py:smoke` is shared by most tests. Compiled programs
are shared by all processes through JAX's cache, which changes no result.
"""

import dataclasses
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import rl_alternating
from pr1_jax import rewards, tags
from pr1_jax.answers.verdicts import CORRECT
from pr1_jax.answers.verify import check
from pr1_jax.system.files import plain
from pr1_jax.workdir import metrics
from tests.helpers import compiling, search_task
from tests.stages import config_test

ROOT = pathlib.Path(__file__).parents[2]
ALTERNATING = "configs/rl_alternating.py:smoke"
SFT_STEPS, RL_STEPS, PROMPTS, GROUP = 60, 6, 4, 8
# Easy problems of the task that so small a model learns in so few steps, so that rewards
# differ and there are gradients. The other runs are on the default task.
LEARNS = (
    *(f"--config.{name}={value}" for name, value in search_task.FIELDS.items()),
    "--config.data.rl=embedded:easy",
    "--config.data.eval=embedded:easy",
    f"--config.sft.steps={SFT_STEPS}",
    f"--config.rl.steps={RL_STEPS}",
    f"--config.rl.group_size={GROUP}",
)
SMALL = (
    "--config.model.num_layers=1",
    "--config.model.length_buckets=()",
    "--config.eval.banned=False",
    "--config.sft.steps=30",
    "--config.rl.steps=2",
)

# The examples of docs/rewards.md.
JUDGED = (
    "--config.reward.function=docs/examples/regex_judge.py:score",
    "--config.reward.weights=schedule=1,function.found=0.1,function.repeats=0.1",
    "--config.reward.verifier=docs/examples/last_number.py:verify",
)
SHORT = (
    "--config.reward.function=docs/examples/length_penalty.py:score",
    "--config.reward.weights=schedule=1,function.total=0.2,function.steps=0.1",
    "--config.data.template=docs/examples/question.jinja",
)


@dataclasses.dataclass
class Launched:
    """A process of `pr1_jax.main` and where it works."""

    process: subprocess.Popen
    workdir: pathlib.Path
    began: float

    def wait(self):
        """Waits for exit code 0; fails with what the process said."""
        self.out, self.err = self.process.communicate(timeout=600)
        self.seconds = time.monotonic() - self.began
        assert self.process.returncode == 0, f"{self.out}\n{self.err}"
        return self


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Starts `pr1_jax.main` on the devices that there are: launch(workdir, *flags)."""
    cache = tmp_path_factory.mktemp("compiled")
    environment = compiling.on_one_device() | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    started = []

    def start(workdir, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "pr1_jax.main", f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Launched(process, pathlib.Path(workdir), time.monotonic())

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def ended(launch, tmp_path_factory):
    """The runs that are never interrupted, all at once: most of it is compiling."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = {
        "alternating": (ALTERNATING, LEARNS),
        "causal": ("configs/rl_easy.py:smoke", SMALL + JUDGED),
        "sequential": ("configs/grpo_sequential.py:smoke", SMALL + SHORT),
    }
    started = {
        name: launch(folder / name, f"--config={config}", *arguments)
        for name, (config, arguments) in wanted.items()
    }
    return {name: run.wait() for name, run in started.items()}


@pytest.fixture(scope="module")
def full(ended):
    return ended["alternating"]


def lines(workdir, stage=None):
    """Lines of metrics.jsonl, of one stage if named."""
    found = metrics.read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
    return [line for line in found if stage in (None, line["stage"])]


def responses(workdir, name):
    text = (pathlib.Path(workdir) / "rollouts" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]


def files(folder):
    """Every file below a folder, with its content and time of change."""
    paths = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


# --- One run ------------------------------------------------------------------------


def test_the_workdir_holds_all_that_is_promised(full):
    names = {path.name for path in full.workdir.iterdir()}
    assert names >= {
        *("config.json", "metrics.jsonl", "tensorboard", "rollouts", "checkpoints"),
        *("summary.json", "curves.png", "report.html", "analysis.jsonl"),
    }
    assert (full.workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    for stage in ("eval_0_base", "sft", "eval_1_sft", "rl", "eval_2_rl"):
        (events,) = (full.workdir / "tensorboard" / stage).iterdir()
        assert events.stat().st_size > 500, stage
    assert len(list((full.workdir / "checkpoints").iterdir())) == 2
    assert not list(full.workdir.rglob("*.tmp"))


def test_config_json_is_the_resolved_config(full):
    config = json.loads((full.workdir / "config.json").read_text())
    expected = search_task.put(rl_alternating.get_config("smoke")).to_dict()
    expected["data"] |= {"rl": "embedded:easy", "eval": "embedded:easy"}
    expected["sft"]["steps"] = SFT_STEPS
    expected["rl"] |= {"steps": RL_STEPS, "group_size": GROUP}
    assert config == plain(expected)


def test_steps_are_complete_in_order_and_not_doubled(full):
    expected = [("eval_0_base", 0)]
    expected += [("sft", step + 1) for step in range(SFT_STEPS)]
    expected += [("eval_1_sft", 0)]
    expected += [("rl", step + 1) for step in range(RL_STEPS)]
    expected += [("eval_2_rl", 0)]
    assert [(line["stage"], line["step"]) for line in lines(full.workdir)] == expected


def test_figures_are_there_and_finite(full):
    promised = {
        "eval": ("eval/accuracy", "eval/parallel_ratio", "eval/sequential_steps"),
        "sft": ("loss/sft", "perf/step_sec"),
        "rl": (
            *("reward/mean", "rollout/parallel_ratio", "rollout/logp_gap_max"),
            *("rollout/total_tokens", "rollout/sequential_steps", "perf/step_sec"),
        ),
    }
    for line in lines(full.workdir):
        names = promised[line["stage"].split("_")[0]]
        assert {*names, "perf/compilations"} <= set(line)
        for name, value in line.items():
            if name != "stage":
                assert value is not None and math.isfinite(value), (name, line)


@pytest.mark.parametrize("name", ["alternating", "causal"])
def test_the_sampler_and_the_trainer_agree_at_every_step(ended, name):
    for line in lines(ended[name].workdir, "rl"):
        assert 0 < line["rollout/logp_gap_max"] < 1e-4
        assert line["rollout/logp_gap_mean"] <= line["rollout/logp_gap_max"]
        assert line["policy/ratio_max_error"] < 1e-4


def test_the_time_of_a_step_is_accounted_for(full):
    parts = ("data", "prefill", "decode", "verify", "update", "wait", "checkpoint")
    for line in lines(full.workdir, "rl"):
        times = [line[f"perf/{part}_sec"] for part in parts]
        assert min(times) >= 0 and line["perf/decode_sec"] > 0
        found = sum(times) / line["perf/step_sec"]
        assert line["perf/accounted"] == pytest.approx(found)
        # The steps of this run are very short; those of a real one are not.
        assert 0.8 < line["perf/accounted"] <= 1.001
        assert 0 < line["perf/useful_row_steps"] <= 1
        assert line["perf/sampling_tflop"] > 0 and line["perf/update_tflop"] > 0
        # The run has one device.
        assert line["perf/tokens_per_sec_per_device"] == line["perf/tokens_per_sec"]
        assert "perf/mfu" not in line  # no data sheet says the peak of a CPU


def test_nothing_compiles_after_the_first_step(full):
    tokens = {line["rollout/total_tokens"] for line in lines(full.workdir, "rl")}
    assert len(tokens) == RL_STEPS  # lengths do vary
    for stage in ("sft", "rl"):
        counts = {line["perf/compilations"] for line in lines(full.workdir, stage)[1:]}
        assert len(counts) == 1 and min(counts) > 0, stage


def test_sft_learns_and_rl_has_gradients(full):
    losses = [line["loss/sft"] for line in lines(full.workdir, "sft")]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    found = lines(full.workdir, "rl")
    assert sum(line["optim/grad_norm"] > 0 for line in found) >= 2
    assert not any(line["optim/skipped"] for line in found)


def test_rollouts_agree_with_rewards_and_figures(full):
    schedule = {"window": 2, "tiered_steps": 1}
    used, num_blocks = set(), 0
    for line in lines(full.workdir, "rl"):
        found = responses(full.workdir, f"rl_{line['step']:06d}")
        assert len(found) == PROMPTS * GROUP
        name = rewards.scheduled("alternating", line["step"], **schedule)
        used.add(name)
        assert line["reward/tiered"] == (name == "tiered")
        for r in found:
            assert r["num_blocks"] == r["response"].count(tags.PARALLEL)
            assert r["format_ok"] == (tags.check_format(r["response"]) == [])
            verdict = check(r["response"], r["answer"]).verdict
            assert r["verdict"] == verdict
            assert r["reward"] == rewards.reward(
                name,
                correct=verdict == CORRECT,
                num_blocks=r["num_blocks"],
                format_ok=r["format_ok"],
            )
            num_blocks += r["num_blocks"]
        groups = [r["question"] for r in found]
        assert groups == [q for q in groups[::GROUP] for _ in range(GROUP)]
        mean = lambda values: pytest.approx(np.mean(list(values)), abs=1e-5)
        assert line["reward/mean"] == mean(r["reward"] for r in found)
        ratio = mean(r["num_blocks"] > 0 for r in found)
        assert line["rollout/parallel_ratio"] == ratio
        assert line["rollout/total_tokens"] == mean(r["total_tokens"] for r in found)
        steps = mean(r["sequential_steps"] for r in found)
        assert line["rollout/sequential_steps"] == steps
    assert used == {"accuracy", "tiered"}
    assert num_blocks > 0


def test_every_sampled_response_passes_the_format_check(ended):
    checked = 0
    for name, run in ended.items():
        for path in sorted((run.workdir / "rollouts").iterdir()):
            for response in responses(run.workdir, path.stem):
                assert tags.check_format(response["response"]) == []
                has_tags = any(tag in response["response"] for tag in tags.TAGS)
                assert not (has_tags and name == "sequential")
                checked += has_tags
    assert checked > 20


def test_summary_holds_the_evaluations(full):
    summary = json.loads((full.workdir / "summary.json").read_text())
    assert summary["finished"] is True
    assert list(summary["evaluations"]) == ["eval_0_base", "eval_1_sft", "eval_2_rl"]
    for name, found in summary["evaluations"].items():
        (line,) = lines(full.workdir, name)
        assert found == {k: line[k] for k in found}
        assert {"eval/accuracy", "eval/parallel_ratio"} <= set(found)
        asked = responses(full.workdir, name)
        correct = np.mean([r["verdict"] == "correct" for r in asked])
        assert found["eval/accuracy"] == pytest.approx(correct)
        assert 0 <= found["eval/accuracy_low"] <= found["eval/accuracy"]
        assert found["eval/accuracy"] <= found["eval/accuracy_high"] <= 1


def test_a_person_can_follow_it(full):
    for word in ("eval_0_base", f"{SFT_STEPS}/{SFT_STEPS}", f"{RL_STEPS}/{RL_STEPS}"):
        assert word in full.out
    assert str(full.workdir) in full.out
    assert "Traceback" not in full.err


def test_a_finished_run_says_so_and_changes_nothing(full, launch):
    before = files(full.workdir)
    again = launch(full.workdir, f"--config={ALTERNATING}", *LEARNS).wait()
    assert "finished" in again.out
    assert files(full.workdir) == before
    assert again.seconds < max(10, full.seconds / 3)


# --- Going on -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_of_a_checkpoint_repeats_its_last_evaluation(
    full, launch, tmp_path
):
    launch(
        tmp_path,
        "--config=configs/evaluate.py:smoke",
        "--config.data.eval=easy=embedded:easy@1",
        "--config.eval.modes=('structured', 'ordinary')",
        "--config.rollout.rows=2",  # in chunks, and with other rows
        "--config.rollout.prompts_per_prefill=2",
        f"--config.checkpoint.init={full.workdir}",
    ).wait()
    (expected,) = lines(full.workdir, "eval_2_rl")
    (found,) = lines(tmp_path, "benchmark_easy_structured")
    for name in ("accuracy", "parallel_ratio", "total_tokens", "sequential_steps"):
        assert found[f"eval/{name}"] == pytest.approx(expected[f"eval/{name}"])
    (found,) = lines(tmp_path, "benchmark_easy_ordinary")
    assert found["eval/accuracy"] == pytest.approx(expected["eval/accuracy_banned"])
    samples = (tmp_path / "samples" / "easy_structured.jsonl").read_text()
    samples = [json.loads(line) for line in samples.splitlines()]
    same = responses(full.workdir, "eval_2_rl")
    assert all(response.pop("trace") for response in same)
    assert [{name: r[name] for name in same[0]} for r in samples] == same


# --- Other configs ------------------------------------------------------------------


def test_causal_variant_logs_both_gaps(ended):
    found = lines(ended["causal"].workdir, "rl")
    assert len(found) == 2
    # Second paths were sampled without seeing the first: a gap by design.
    assert max(line["rollout/logp_gap_later_paths_max"] for line in found) > 1e-3
    assert len({line["perf/compilations"] for line in found}) == 1


def test_sequential_baseline_has_no_blocks(ended):
    for line in lines(ended["sequential"].workdir):
        for group in ("rollout", "eval"):
            if f"{group}/parallel_ratio" in line:
                assert line[f"{group}/parallel_ratio"] == 0.0
                speed_up = line[f"{group}/self_parallelism"]
                assert speed_up == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name, weights",
    [
        ("causal", {"found": 0.1, "repeats": 0.1}),
        ("sequential", {"total": 0.2, "steps": 0.1}),
    ],
)
def test_functions_of_the_user_reward_and_verify(ended, name, weights):
    workdir = ended[name].workdir
    for line in lines(workdir, "rl"):
        records = responses(workdir, f"rl_{line['step']:06d}")
        parts = [record["reward_parts"] for record in records]
        assert {*parts[0]} == {"schedule", *(f"function.{n}" for n in weights)}
        for record, part in zip(records, parts):
            own = sum(x * part[f"function.{n}"] for n, x in weights.items())
            assert record["reward"] == pytest.approx(part["schedule"] + own, abs=2e-6)
        mean = lambda n, parts=parts: np.mean([part[n] for part in parts])
        for n in parts[0]:
            assert line[f"reward/{n}"] == pytest.approx(mean(n), abs=1e-5)
    copy = (workdir / "own" / "function.py").read_text()
    given = json.loads((workdir / "config.json").read_text())["reward"]["function"]
    assert copy == (ROOT / given.partition(":")[0]).read_text()


def test_a_verifier_of_the_user_decides_in_training_and_evaluation(ended):
    workdir = ended["causal"].workdir
    for name in ("eval_0_base", "rl_000001", "eval_2_rl"):
        records = responses(workdir, name)
        assert {record["reason"] for record in records} == {"says reward.verifier"}
        for record in records:
            given = [*map(float, re.findall(r"\d+", record["response"])), None][-2:]
            right = given[0] == float(record["answer"])
            assert (record["verdict"] == CORRECT) == right


@pytest.mark.slow
def test_a_run_goes_on_once_its_function_is_mended(launch, tmp_path):
    """It ends with the run that never stopped, and with one line before that."""
    file = tmp_path / "mine.py"
    good = "def score(record):\n    return -record.total_tokens / 100\n"
    config = f"--config={ALTERNATING}", *LEARNS, *SMALL
    config += (f"--config.reward.function={file}:score", "--config.rl.steps=3")
    file.write_text(good)
    launch(tmp_path / "whole", *config).wait()
    asked = responses(tmp_path / "whole", "rl_000002")[20]["question"]
    file.write_text(good + f"    assert record.question != {asked!r}\n")
    lines_of = file.read_text().splitlines()
    lines_of[1], lines_of[2] = lines_of[2], lines_of[1]
    file.write_text("\n".join(lines_of))
    broken = launch(tmp_path / "broken", *config)
    _, said = broken.process.communicate(timeout=600)
    assert broken.process.returncode == 2
    error = [line for line in said.splitlines() if line.startswith("error")]
    assert len(error) == 1 and f"{file}:2, `assert record.question" in error[0]
    assert "AssertionError" in error[0] and repr(asked[:60])[1:-1] in error[0]
    assert [line["step"] for line in lines(tmp_path / "broken", "rl")] == [1]
    rollouts = {path.name for path in (tmp_path / "broken" / "rollouts").iterdir()}
    assert "rl_000002.jsonl" not in rollouts
    file.write_text(good)
    again = launch(tmp_path / "broken", *config).wait()
    assert "resuming rl after step 1" in again.out
    assert "reward.function is another one than when the run began" in again.err
    for name in ("rl_000002", "rl_000003", "eval_2_rl"):
        assert responses(tmp_path / "broken", name) == responses(
            tmp_path / "whole", name
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", config_test.NAMES)
def test_smoke_goes_through_all_stages(name, launch, tmp_path):
    run = launch(tmp_path, f"--config=configs/{name}.py:smoke").wait()
    assert run.seconds < 90
    config = json.loads((tmp_path / "config.json").read_text())
    stages = {line["stage"] for line in lines(tmp_path)}
    assert stages >= {"eval_0_base", *config["stages"]}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"]
    assert len(summary["evaluations"]) == 1 + len(config["stages"])


def test_sigterm_saves_and_a_second_run_is_refused(launch, tmp_path):
    """One run, told to stop in its RL stage; meanwhile another one wants its workdir."""
    switches = (f"--config={ALTERNATING}", *LEARNS, *SMALL, "--config.rl.steps=400")
    switches += ("--config.checkpoint.every_steps=1000",)
    first = launch(tmp_path, *switches)
    file = tmp_path / "metrics.jsonl"
    while not any(line["stage"] == "rl" for line in metrics.read_metrics(file)):
        assert first.process.poll() is None
        time.sleep(0.1)
    second = launch(tmp_path, *switches)
    _, said = second.process.communicate(timeout=120)
    assert second.process.returncode == 2
    assert f"is in use by process {first.process.pid} on " in said
    first.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert "stopped: all is saved in" in first.wait().out
    assert time.monotonic() - began < 30
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    last = metrics.read_metrics(file)[-1]
    assert saved == 1_000_000 + last["step"] and last["step"] < 400
