"""What is kept of finished runs, and a study that goes on from it without them."""

import dataclasses
import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from pr1_jax.study import cells, outcomes, results, runner, tables, verdicts
from pr1_jax.system import files
from tests.study.study_test import write_run

ROOT = pathlib.Path(__file__).parents[2]
CHOSEN = cells.with_starts(["accuracy"], "embedded")  # after sft


def write(workdir, cell):
    """A finished run with a config."""
    write_run(workdir, cell.kind)
    config = {"eval": {"samples": 1}, "reward": {"scaffold_steps": 40}}
    files.write_json(workdir / "config.json", config)


@pytest.fixture
def started(monkeypatch):
    """Names of the runs that were started; each is finished at once."""
    names = []

    def start_process(command, log, out, core=None):
        (workdir,) = (x.partition("=")[2] for x in command if "workdir" in x)
        workdir = pathlib.Path(workdir)
        names.append("/".join(workdir.parts[-3:]))
        write(workdir, cells.CELLS[workdir.parent.name])
        return subprocess.Popen(["true"])

    monkeypatch.setattr(runner, "start_process", start_process)
    monkeypatch.setattr(runner, "_POLL_SEC", 0.01)
    return names


def kept_study(out, names=("sft", "accuracy")):
    """A study of which runs are kept, and their folders gone."""
    study = runner.Study(out, seeds=(0,), jobs=1)
    for name in names:
        write(study.workdir(cells.CELLS[name], 0), cells.CELLS[name])
    outcomes.keep_finished(study, {f"{name}/seed0": 60.0 for name in names})
    shutil.rmtree(out / "runs")
    return study


def change(figures, name, values):
    """Puts other values in place of what is kept of a figure."""
    figures[name] = outcomes.pack(np.array(values, float))


def test_any_float_is_kept_to_the_last_bit():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000) * 10.0 ** rng.integers(-300, 300, 1000)
    values = np.concatenate([values, [0, 1, 25, 1 / 3, 5e-324, np.nan]])
    np.testing.assert_array_equal(outcomes.unpack(outcomes.pack(values)), values)


def test_what_is_read_is_the_same_without_the_runs(tmp_path):
    study = runner.Study(tmp_path, seeds=(0, 1))
    for name, seed in (("sft", 0), ("late", 0), ("late", 1), ("scaffold", 1)):
        write(study.workdir(cells.CELLS[name], seed), cells.CELLS[name])
    files.write_json(study.dense, [{"tokens": 2048, "exact_sec": 0.1}])
    files.write_json(tmp_path / "seconds.json", {"late/seed1": 12.5, "sft/seed1": 1})
    before = results.read(study)
    summary = results.summarize(before, study)
    outcomes.keep_finished(study, runner._counted(study))
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "seconds.json").unlink()
    after = results.read(study)
    assert after.problems.keys() == {"sft", "late", "scaffold"}
    assert after.courses.keys() == {"late", "scaffold"} and after.switch == 40
    np.testing.assert_equal(after.problems, before.problems)
    np.testing.assert_equal(after.courses, before.courses)
    assert results.summarize(after, study) == summary
    assert summary["cells"]["late"]["seconds"] == [None, 12.5] and summary["dense"]


def test_the_study_of_the_repository_is_of_todays_cells_and_rules():
    study = runner.Study(ROOT / "notebooks" / "study")
    published = files.read_json(study.out / "results.json", {})
    findings = results.read(study)  # raises where a cell's settings are others today
    assert findings.problems.keys() == cells.CELLS.keys()
    assert verdicts.judge(findings) == published["claims"]
    shown = (ROOT / "notebooks" / "paper_in_miniature.ipynb").read_text()
    for claim in published["claims"]:  # as the notebook, run on it, tells them
        assert json.dumps(tables.paragraph(claim))[1:-1][:80] in shown


def test_a_kept_cell_is_not_run_unless_another_has_to_start_from_it(tmp_path, started):
    study, said = kept_study(tmp_path), []
    runner.Runner(study, said.append).run(CHOSEN)
    assert not started and sum("done before" in text for text in said) == 2
    chosen = cells.with_starts(["accuracy", "scaffold"], "embedded")
    runner.Runner(study, said.append).run(chosen)
    assert started == ["runs/sft/seed0", "runs/scaffold/seed0"]
    runner.Runner(study, said.append).run(chosen)
    assert len(started) == 2
    # A finished run that lost its checkpoint is set aside, and run for what follows.
    shutil.rmtree(study.workdir(cells.CELLS["sft"], 0) / "checkpoints")
    chosen = cells.with_starts(["forced"], "embedded")
    runner.Runner(study, said.append).run(chosen)
    assert started[2:] == ["runs/sft/seed0", "runs/forced/seed0"]
    assert not any("not what was kept" in text for text in said)


def test_a_run_that_differs_from_what_was_kept_is_named(tmp_path, started):
    study, said = kept_study(tmp_path), []
    records = files.read_json(study.kept(0), {})
    change(records["sft"]["problems"], "total_tokens", [21, 10])
    study.kept(0).write_text(json.dumps(records))
    chosen = cells.with_starts(["scaffold"], "embedded")
    runner.Runner(study, said.append).run(chosen)
    (told,) = (text for text in said if "not what was kept" in text)
    assert "sft seed 0" in told and told.endswith(": total_tokens of problems")
    again = files.read_json(study.kept(0), {})["sft"]["problems"]["total_tokens"]
    assert outcomes.unpack(again).tolist() == [20, 10]


def test_each_run_is_kept_as_it_ends_with_what_made_it(tmp_path, started, monkeypatch):
    study, kept = runner.Study(tmp_path, seeds=(0,), jobs=1), []
    start = runner.start_process

    def note(*arguments):
        kept.append([*files.read_json(study.kept(0), {})])
        return start(*arguments)

    monkeypatch.setattr(runner, "start_process", note)
    runner.Runner(study, lambda text: None).run(CHOSEN)
    assert kept == [[], ["sft"]]
    record = files.read_json(study.kept(0), {})["accuracy"]
    assert record["made"] == outcomes.made() and record["seconds"] >= 0
    study.kept(1).write_text(json.dumps({"sft": record | {"made": {"commit": "abc"}}}))
    both = runner.Study(tmp_path, seeds=(0, 1))
    commit = outcomes.made()["commit"]
    assert results.about(study, "")["commit"] == commit
    assert results.about(both, "")["commit"] == ", ".join(sorted([commit, "abc"]))


@pytest.mark.parametrize(
    "field, changed",
    [
        ("size=embedded", {"size": "smoke"}),
        ("overrides=", {"overrides": ("rl.lr=1.0",)}),
        ("rl.clip_high=0.2,", {}),
    ],
)
def test_other_settings_are_refused(tmp_path, started, field, changed):
    study = kept_study(tmp_path, ("accuracy",))
    if not changed:  # as of a commit whose cell was another
        text = study.kept(0).read_text()
        study.kept(0).write_text(
            text.replace('"rl.clip_high":0.28', '"rl.clip_high":0.2')
        )
    study = dataclasses.replace(study, **changed)
    with pytest.raises(ValueError, match=f"accuracy seed 0 was made with {field}"):
        results.read(study)
    with pytest.raises(ValueError, match=f"accuracy seed 0 was made with {field}"):
        runner.Runner(study, lambda text: None).run(CHOSEN)
    assert not started


def test_again_compares_with_what_is_kept(tmp_path, started):
    study, said = kept_study(tmp_path), []

    def run(command, log, out, core):
        return runner.start_process(command, log, out, core).wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_process", run)
        assert runner.again(study, cells.CELLS["accuracy"], 0, said.append)
        assert started == ["runs/sft/seed0", "again/accuracy/seed0"]
        assert "the same to the last bit" in said[-1]
        records = files.read_json(study.kept(0), {})
        change(records["accuracy"]["courses"], "accuracy", [0.5, 1 + 1e-15])
        study.kept(0).write_text(json.dumps(records))
        assert not runner.again(study, cells.CELLS["accuracy"], 0, said.append)
        assert "accuracy of courses differ" in said[-1] and len(started) == 3
        with pytest.raises(ValueError, match="not finished"):
            runner.again(study, cells.CELLS["forced"], 0, said.append)
        started.clear()
        records["accuracy"]["made"] = outcomes.made() | {"processor": "abacus"}
        kept = json.dumps(records)
        study.kept(0).write_text(kept)
        assert runner.again(study, cells.CELLS["accuracy"], 0, said.append)
        assert "was kept of processor abacus, not " in "".join(said)
        names = [f"{where}/seed0" for where in ("runs/sft", "runs/accuracy")]
        assert started == [*names, "again/accuracy/seed0"]
        assert study.kept(0).read_text() == kept
