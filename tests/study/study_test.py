"""The study: its command, runs that go on, and what is written of them."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess

import numpy as np
import pytest

from pr1_jax.study import (
    cells,
    dense,
    figures,
    outcomes,
    results,
    runner,
    tables,
)
from pr1_jax.study.verdicts import CLAIMS, FAILS, HOLDS, OPEN, judge
from pr1_jax.system import files
from tests.helpers import command
from tests.helpers.command import ROOT
from tests.study import made_up

PAY, FAIL, BETWEEN = cells.PAY, cells.FAIL, cells.BETWEEN
CELL, OTHER = (cells.named(name, PAY, "plain") for name in ("accuracy", "latency"))
LATE, SAID = f"late_{PAY}", (HOLDS, FAILS, OPEN)

# --- The command ----------------------------------------------------------------------

run = functools.partial(command.run, "pr1_jax.study")


def test_a_dry_run_prints_every_command_and_does_nothing(tmp_path):
    out = tmp_path / "study"
    given = ("--dry_run", "--only=division", "--seeds=0,4", "--jobs=1")
    done = run(f"--out={out}", *given)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert len(lines) == 2 * 11
    assert all(line.startswith("python -m pr1_jax.main --config=") for line in lines)
    expected = f"--config.checkpoint.init={out}/runs/sft_labels/seed4"
    assert sum(expected in line for line in lines) == 1
    hours = 2 * sum(cell.minutes for cell in cells.with_starts(DIVISION)) / 60
    assert f"# left: about {hours:.1f} h, 1 at a time" in done.stdout
    assert not out.exists()


DIVISION = cells.MEMBERS["division"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((), "--out is missing"),
        (("--out=x", "--only=phase,speed"), "--only=speed"),
        (("--out=x", "--cell=best"), "--cell=best"),
        (("--out=x", "--seeds=0,a"), "--seeds=0,a"),
        (("--out=x", "--jobs=-1"), "--jobs=-1"),
        (("--out=x", "--override=rl.steps"), "--override=rl.steps"),
    ],
)
def test_a_mistake_is_one_line(arguments, named):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and named in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- Runs -----------------------------------------------------------------------------


def finish(workdir, accuracy=0.5):
    evaluations = {
        name: {"eval/accuracy": accuracy, "eval/parallel_ratio": 0.25}
        for name in ("eval_0_base", "eval_1")
    }
    found = {"finished": True, "evaluations": evaluations}
    (workdir / "checkpoints" / "00000001").mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "config.json", {"eval": {"samples": 1}})
    files.write_json(workdir / "summary.json", found)


@pytest.fixture
def processes(monkeypatch):
    """Cells of which processes were started; those in `fails` end with code 3."""
    started, fails = [], set()

    def start_process(command, log, out, core=None):
        (workdir,) = (x.partition("=")[2] for x in command if "workdir" in x)
        workdir = pathlib.Path(workdir)
        name = f"{workdir.parent.name}/{workdir.name}"
        started.append(name)
        workdir.mkdir(parents=True, exist_ok=True)
        log.write_text("began\nerror: no room\n\n")
        if name not in fails:
            finish(workdir)
        return subprocess.Popen(["sh", "-c", f"exit {3 * (name in fails)}"])

    monkeypatch.setattr(runner, "start_process", start_process)
    monkeypatch.setattr(runner, "_POLL_SEC", 0.01)
    start_process.started, start_process.fails = started, fails
    return start_process


def test_finished_runs_are_left_alone_and_others_follow(tmp_path, processes):
    study = runner.Study(tmp_path, seeds=(0, 1), jobs=1)
    finish(study.workdir("sft_plain", 0))
    said, chosen = [], cells.with_starts([CELL])
    running = runner.Runner(study, said.append)
    running.run(chosen)
    others = [f"{CELL}/seed0", "sft_plain/seed1", f"{CELL}/seed1"]
    assert processes.started == others
    assert not running.failed
    assert said[0] == "[1/4] sft_plain seed 0: done before"
    assert "accuracy 50.0 %, with a block 25.0 %" in said[-1]
    assert {*runner.seconds(study)} == {(CELL, 0), ("sft_plain", 1), (CELL, 1)}
    running.run(chosen)
    assert len(processes.started) == 3
    # Those from which others start keep their checkpoints.
    name = OTHER
    running.run(cells.with_starts([name]))
    kept = [
        runner.has_checkpoint(study.workdir(n, 1)) for n in ("sft_plain", CELL, name)
    ]
    assert kept == [True, True, False] and processes.started[3:] == [
        f"{name}/seed{seed}" for seed in (0, 1)
    ]


def test_what_verdicts_hang_on_comes_first_and_the_first_seeds(tmp_path):
    study = runner.Study(tmp_path, seeds=(0, 1, 2, 3, 5))
    names = [CELL, OTHER]
    order = runner.rounds(study, cells.with_starts(names))
    decides = ["sft_plain", CELL]
    expected = [[(n, s) for n in decides] for s in (0, 1, 2)]
    expected += [[(names[1], s)] for s in (0, 1, 2)]
    expected += [[(n, s) for n in decides] for s in (3, 5)]
    assert [[(cell.name, s) for cell, s in of_round] for of_round in order] == expected


def test_a_failed_run_is_named_and_only_what_starts_from_it_is_left_out(
    tmp_path, processes
):
    study = runner.Study(tmp_path, seeds=(0, 1), jobs=1)
    processes.fails.add("sft_plain/seed0")
    said, seeds = [], []
    running = runner.Runner(study, said.append)
    chosen = cells.with_starts([CELL])
    running.run(chosen, after_round=lambda: seeds.append(len(processes.started)))
    assert running.failed == ["sft_plain/seed0", f"{CELL}/seed0"]
    assert processes.started == ["sft_plain/seed0", "sft_plain/seed1", f"{CELL}/seed1"]
    assert "failed with exit code 3: error: no room" in " ".join(said)
    assert seeds == [2, 3]


def test_runs_that_need_not_wait_are_run_at_a_time_each_on_its_core(
    tmp_path, monkeypatch
):
    """What starts from another waits for it, and each has a core that no other has."""
    study, live, most, order = runner.Study(tmp_path, (0, 1), jobs=3), {}, [], []

    def start_process(command, log, out, core):
        (workdir,) = (x.partition("=")[2] for x in command if "workdir" in x)
        name = "/".join(pathlib.Path(workdir).parts[-2:])
        order.append(name)
        summary = '{"finished": true, "evaluations": {}}'
        code = f"sleep 0.2; cd {workdir}; echo '{summary}' > summary.json"
        files.write_json(f"{workdir}/config.json", {"eval": {"samples": 1}})
        pathlib.Path(workdir, "checkpoints", "1").mkdir(parents=True)
        live[name] = process = subprocess.Popen(["sh", "-c", code]), core
        cores = [c for p, c in live.values() if p.poll() is None]
        assert len({*cores}) == len(cores) and core is not None
        most.append(len(cores))
        for cell in [name.partition("/")[0]]:
            if start := cells.CELLS[cell].start:
                assert live[name.replace(cell, start)][0].poll() == 0
        return process[0]

    monkeypatch.setattr(runner, "start_process", start_process)
    monkeypatch.setattr(runner, "cpu_cores", lambda: [4, 5, 6, 7])
    monkeypatch.setattr(outcomes, "made", dict)  # takes its time
    monkeypatch.setattr(runner, "_POLL_SEC", 0.01)
    running = runner.Runner(study, lambda text: None)
    running.run(cells.with_starts([CELL, f"sequential_{PAY}"]))
    assert not running.failed and len(order) == len({*order}) == 8
    assert order[:3] == ["sft_plain/seed0", "sft_sequential/seed0", "sft_plain/seed1"]
    assert max(most) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores of Linux alone")
def test_a_process_has_the_core_that_it_is_given(tmp_path):
    own = os.sched_getaffinity(0)
    code = "import os; print(os.sched_getaffinity(0), os.environ['JAX_PLATFORMS'])"
    core = runner.cpu_cores()[-1]
    assert runner.run_process(["-c", code], tmp_path / "log", tmp_path, core) == 0
    assert (tmp_path / "log").read_text().split() == [f"{{{core}}}", "cpu"]
    assert os.sched_getaffinity(0) == own


def test_expected_times_follow_what_was_found(tmp_path):
    study = runner.Study(tmp_path)
    sft, rl = cells.CELLS["sft_plain"], cells.CELLS[CELL]
    expected = lambda study, cell: runner.expected_minutes(
        study, cell, runner.seconds(study)
    )
    assert expected(study, rl) == rl.minutes
    assert expected(dataclasses.replace(study, size="smoke"), rl) is None
    write_run(study.workdir("sft_plain", 0), "sft")
    outcomes.keep(study, sft, 0, seconds=120 * sft.minutes, made={})
    assert expected(study, sft) == pytest.approx(2 * sft.minutes)
    assert expected(study, rl) == pytest.approx(2 * rl.minutes)


def test_a_run_is_asked_to_save_and_waited_for(tmp_path):
    """Ctrl-C here is SIGTERM there; what it says until its end is in the log."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    log = tmp_path / "log.txt"

    def interrupt(*_):
        if log.exists() and "ready" in log.read_text():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run_process(["-c", code], log, tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert log.read_text().split() == ["ready", "saved"]


# --- Reading and writing --------------------------------------------------------------


def write_run(workdir, kind, question="Which?", steps=2):
    """A finished run: two problems, the first solved, in a block."""
    finish(workdir)
    block = (
        "a <Parallel><Path>b</Path><Path>c 1</Path></Parallel>\n<Summary>d</Summary>"
    )
    rollouts = workdir / "rollouts"
    rollouts.mkdir()
    with (rollouts / f"eval_1_{kind}.jsonl").open("w") as file:
        for solved in (True, False):
            record = {
                "question": question,
                "response": block if solved else "none",
                "verdict": "correct" if solved else "incorrect",
                "num_blocks": int(solved),
                "total_tokens": 10 + 10 * solved,
                "sequential_steps": 10,
                "work_division": [0.75] if solved else [],
            }
            file.write(json.dumps(record) + "\n")
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"stage": kind, "step": step, "rollout/accuracy": 0.5 * step}
            file.write(json.dumps(line | {"perf/step_sec": step}) + "\n")
            record = {"response": block if step == 1 else "none"}
            (rollouts / f"rl_{step:06d}.jsonl").write_text(json.dumps(record) + "\n")


def test_runs_are_read_as_they_were_written(tmp_path):
    study = runner.Study(tmp_path, seeds=(0, 1))
    write_run(study.workdir("sft_plain", 0), "sft")
    write_run(study.workdir(LATE, 1), "rl")
    found = results.read(study)
    assert {*found.problems} == {"sft_plain", LATE}
    of = found.problems["sft_plain"]
    assert of["accuracy"][0].tolist() == of["parallel_ratio"][0].tolist() == [1, 0]
    assert of["work_division"][0].tolist() == [0.75]
    assert np.isnan(of["identical_paths"][0]).all()
    late = found.problems[LATE]
    assert late["total_tokens"][1].tolist() == [15]
    assert late["before_parallel_ratio"][1].tolist() == [0.25]
    course = found.courses[LATE]
    assert course["accuracy"][1].tolist() == [0.5, 1.0]
    # By character, where a record has no trace; to the precision that is kept.
    np.testing.assert_allclose(course[outcomes.POSITION][1], [2 / 74, np.nan], 1e-3)
    assert "sft_plain" not in found.courses
    four = f"accuracy4_{cells.FOUR_PATHS}_plain"  # on lists of four rows
    write_run(study.workdir(four, 0), "rl", question="Of four rows?")
    assert four in results.read(study).problems
    write_run(study.workdir(CELL, 0), "rl", question="Another?")
    with pytest.raises(ValueError, match="other problems"):
        results.read(study)


def test_a_course_is_thinned_to_means_of_its_steps():
    course = [*range(61)]
    found = outcomes.thinned(course)
    assert len(found) == 21 <= outcomes.POINTS
    assert found[:2].tolist() == [1.0, 4.0] and found[-1] == 60
    assert outcomes.thinned([1.0, np.nan, np.nan]).tolist()[0] == 1.0
    assert len(outcomes.thinned([0.5] * 30)) == 30


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A study of made-up numbers, and what was written of it."""
    out = tmp_path_factory.mktemp("study")
    study, found = runner.Study(out), made_up.findings()
    about = results.about(study, "python -m pr1_jax.study --out=study")
    summary = results.summarize(found, study)
    read = {"about": about, "claims": judge(found), **summary}
    files.write_json_by_key(out / "results.json", read)
    return out, json.loads((out / "results.json").read_text())


def test_results_are_small_and_say_what_made_them(published):
    out, read = published
    assert (out / "results.json").stat().st_size < 200_000
    about = read["about"]
    assert {"command", "commit", "cores", "python", "jax", "seeds", "size"} <= {*about}
    assert str(ROOT) not in json.dumps(read) and str(out) not in json.dumps(read)
    accuracy = read["cells"][CELL]["metrics"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert accuracy["value"] == pytest.approx(0.75, abs=0.01)
    cell = read["cells"][f"accuracy_{PAY}_labels"]
    assert len(accuracy["by_seed"]) == len(cell["divided_at"]) == cells.MANY
    assert len(cell["courses"]["work_division"][0]) == made_up.POINTS // 2
    # Every seed of every cell is listed with its figures.
    for name, of_cell in read["cells"].items():
        assert of_cell["seeds"] == [*range(cells.CELLS[name].seeds)]
        counts = {len(x["by_seed"]) for x in of_cell["metrics"].values()}
        assert counts == {cells.CELLS[name].seeds}


def test_every_experiment_has_a_picture_and_a_text(published):
    out, read = published
    figures.save(read, list(figures.FIGURES), out)
    assert {*figures.FIGURES} == {*cells.EXPERIMENTS} == {*tables.TITLES}
    for name in cells.EXPERIMENTS:
        data = (out / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 100_000
    text = tables.readme(read, cells.EXPERIMENTS)
    for claim in CLAIMS:
        assert claim.text in text and claim.paper in text
    assert sum(text.count(f" **{said}** |") for said in SAID) == len(CLAIMS)
    row = rf"\| accuracy, {PAY} steps \| 6 \| 7[45]\.\d \(7[45]\.\d to 75\.\d\) \| (99\.\d|100.0)"
    assert re.search(row, text)


def test_pictures_of_one_seed_and_of_missing_cells_are_drawn():
    found = made_up.findings(seeds=1)
    summary = results.summarize(found, runner.Study(pathlib.Path("nowhere"), (0,)))
    for gone in (
        f"sequential_{PAY}",
        f"late_{FAIL}",
        f"accuracy_{BETWEEN[0]}_labels",
        "forced",
    ):
        summary["cells"].pop(gone)
    course = summary["cells"][f"accuracy_{BETWEEN[1]}_labels"]["courses"][
        "parallel_ratio"
    ][0]
    course[0] = None
    for draw in figures.FIGURES.values():
        draw({**summary, "dense": []}).draw_without_rendering()


def test_numbers_in_words():
    found = {"value": 0.8871, "low": 0.857, "high": 0.914, "number_of_seeds": 3}
    assert tables.with_interval(found, 100) == "88.7 (85.7 to 91.4)"
    assert tables.with_interval(found | {"number_of_seeds": 0}, 100) == "88.7"
    part = {"text": "x", "unit": "points", "measured": found}
    assert tables.measured(part) == "x: +88.7 (85.7 to 91.4) points"
    assert tables.measured(part | {"measured": None}) == "x: not measured"


def test_a_dense_mask_computes_the_same():
    block, path = dense.labels_of(64)
    assert block.max() == 2 and path.max() == 2
    found = dense.compare(64, repeats=1)
    assert 0 < found["max_difference"] < 1e-4
    assert found["dense_bytes"] > 0 and found["exact_sec"] > 0
    assert dense.lengths(512) == [128, 256, 512]


# --- For real -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_cells_for_real_again_and_again(tmp_path):
    out = tmp_path / "study"
    small = ("--size=smoke", "--seeds=0", "--override=eval.problems=8")
    small += ("--override=model.num_layers=1", "--override=rl.steps=2")
    asked = (f"--out={out}", *small, "--cell=causal_sampling")
    done = run(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "causal_sampling seed 0" in done.stdout
    read = json.loads((out / "results.json").read_text())
    assert {*read["cells"]} == {"sft_plain", "causal_sampling"}
    gaps = read["cells"]["causal_sampling"]["courses"]["gap_mean"][0]
    assert gaps and max(gaps) > 1e-4  # far above rounding
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    done = run(*asked)
    assert done.stdout.count("done before") == 2
    after = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    assert after == before
    done = run(f"--out={out}", *small, "--again=causal_sampling")
    assert done.returncode == 0 and "the same to the last bit" in done.stdout
