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
from tests.study import study_test
from tests.study.study_test import write_run

ROOT = pathlib.Path(__file__).parents[2]
SFT, CELL, OTHER = "sft_plain", study_test.CELL, study_test.OTHER
LATE = study_test.LATE
CHOSEN = cells.with_starts([CELL])  # after SFT


def write(workdir, cell):
    """A finished run with a config."""
    write_run(workdir, cell.kind)


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


def kept_study(out, names=(SFT, CELL)):
    """A study of which runs are kept, and their folders gone."""
    study = runner.Study(out, seeds=(0,), jobs=1)
    for name in names:
        write(study.workdir(name, 0), cells.CELLS[name])
    outcomes.keep_finished(study)
    shutil.rmtree(out / "runs")
    return study


def test_any_number_is_kept_to_the_last_bit():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000) * 10.0 ** rng.integers(-8, 4, 1000)
    values = np.concatenate([values, [0, 1, 25, 1 / 3, np.nan]]).astype("<f2")
    np.testing.assert_array_equal(outcomes.unpack(outcomes.pack(values), "<f2"), values)
    counts = rng.integers(0, 255, 1000, dtype=np.uint8)
    np.testing.assert_array_equal(outcomes.unpack(outcomes.pack(counts), "u1"), counts)


def test_what_is_read_is_the_same_without_the_runs(tmp_path):
    study = runner.Study(tmp_path, seeds=(0, 1))
    for name, seed in ((SFT, 0), (LATE, 0), (LATE, 1), ("forced", 1)):
        write(study.workdir(name, seed), cells.CELLS[name])
    files.write_json(study.dense, [{"tokens": 2048, "exact_sec": 0.1}])
    outcomes.keep(study, cells.CELLS[LATE], 1, seconds=12.5, made={})
    before = results.read(study)
    summary = results.summarize(before, study)
    outcomes.keep_finished(study)
    shutil.rmtree(tmp_path / "runs")
    after = results.read(study)
    assert after.problems.keys() == {SFT, LATE, "forced"}
    assert after.courses.keys() == {LATE, "forced"}
    assert after.steps == {SFT: 0, LATE: 2, "forced": 2}
    np.testing.assert_equal(after.problems, before.problems)
    np.testing.assert_equal(after.courses, before.courses)
    assert results.summarize(after, study) == summary
    assert summary["cells"][LATE]["seconds"] == [None, 12.5] and summary["dense"]


def test_numbers_of_paths_are_kept_of_planned_cells_alone(tmp_path):
    name, other = cells.planned_name("accuracy", 40), cells.labelled_name(40)
    study = runner.Study(tmp_path, seeds=(0,))
    for each in (name, other):
        workdir = study.workdir(each, 0)
        write(workdir, cells.CELLS[each])
        path = workdir / "rollouts" / "eval_1_rl.jsonl"
        block, none = files.read_json_lines(path)
        records = [block | {"num_paths": n} for n in ([4], [2, 3])]
        files.write_json_lines(path, [*records, none | {"num_paths": []}, none])
        lines = [
            {"stage": "rl", "step": i, "rollout/num_paths": x}
            for i, x in ((1, 3.0), (2, None))
        ]
        files.write_json_lines(workdir / "metrics.jsonl", lines)
        summary = files.read_json(workdir / "summary.json", {})
        summary["evaluations"]["eval_0_base"]["eval/num_paths"] = 2.75
        files.write_json(workdir / "summary.json", summary)
    outcomes.keep_finished(study)
    shutil.rmtree(tmp_path / "runs")
    found = results.read(study)
    of = {metric: x[0].tolist() for metric, x in found.problems[name].items()}
    assert of["num_paths"] == [3.0] and of["before_num_paths"] == [2.75]
    assert of["searches"] == [(4 + 2.5 + 1 + 1) / 4]
    np.testing.assert_array_equal(found.courses[name]["num_paths"][0], [3.0, np.nan])
    planned = {"num_paths", "before_num_paths", "searches"}
    assert not planned & {*found.problems[other], *found.courses[other]}
    assert results.begun(found) == ["planned"]
    said = verdicts.judge(found, results.begun(found))
    assert {claim["experiment"] for claim in said} == {"planned"}
    text = tables.table(results.summarize(found, study), "planned")
    assert "searches at once" in text and " 2.1 |" in text


def test_what_is_kept_is_small(tmp_path):
    """As of a run of 1,024 problems and 60 steps: about 1 kB."""
    study, cell = runner.Study(tmp_path, seeds=(0,)), cells.CELLS[CELL]
    rng, workdir = np.random.default_rng(0), study.workdir(CELL, 0)
    write(workdir, cell)
    path = workdir / "rollouts" / "eval_1_rl.jsonl"
    (record, *_) = files.read_json_lines(path)
    verdicts_ = np.where(rng.random(1024) < 0.75, "correct", "incorrect").tolist()
    files.write_json_lines(path, [record | {"verdict": x} for x in verdicts_])
    names = [*outcomes.SHARES, *outcomes.OF_BLOCKS]
    lines = [
        {"stage": "rl", "step": i + 1} | {f"rollout/{n}": rng.random() for n in names}
        for i in range(60)
    ]
    files.write_json_lines(workdir / "metrics.jsonl", lines)
    outcomes.keep_finished(study)
    line = study.kept(0).read_text().partition(f'"{CELL}"')[2]
    assert len(line) < 1100  # and the courses of a run are less random
    assert sum(cell.seeds for cell in cells.CELLS.values()) < 580


def test_the_study_of_the_repository_is_of_todays_cells_and_rules():
    study = runner.Study(ROOT / "notebooks" / "study")
    published = files.read_json(study.out / "results.json", {})
    if "theory" not in published:
        pytest.skip("the results there are of another study: this one was not run yet")
    findings = results.read(study)  # raises where a cell's settings are others today
    begun = results.begun(findings)  # one whose cells are newer may not have been
    assert {*cells.EXPERIMENTS} - {*begun} <= {"planned"}
    wanted = cells.with_starts([name for e in begun for name in cells.MEMBERS[e]])
    assert findings.problems.keys() == {cell.name for cell in wanted}
    assert verdicts.judge(findings, begun) == published["claims"]
    shown = (ROOT / "notebooks" / "paper_in_miniature.ipynb").read_text()
    for name in begun:  # as the notebook, run on it, tells them
        for line in tables.claims(published, name).splitlines():
            assert json.dumps(line, ensure_ascii=False)[1:-1] in shown


def test_a_kept_cell_is_not_run_unless_another_has_to_start_from_it(tmp_path, started):
    study, said = kept_study(tmp_path), []
    runner.Runner(study, said.append).run(CHOSEN)
    assert not started and sum("done before" in text for text in said) == 2
    chosen = cells.with_starts([CELL, OTHER])
    runner.Runner(study, said.append).run(chosen)
    assert started == [f"runs/{SFT}/seed0", f"runs/{OTHER}/seed0"]
    runner.Runner(study, said.append).run(chosen)
    assert len(started) == 2
    assert not any("not what was kept" in text for text in said)


def test_a_run_that_differs_from_what_was_kept_is_named(tmp_path, started):
    study, said = kept_study(tmp_path), []
    records = files.read_json(study.kept(0), {})
    was = records[SFT]["digests"]["responses"]
    records[SFT]["digests"]["responses"] = "another"
    study.kept(0).write_text(json.dumps(records))
    runner.Runner(study, said.append).run(cells.with_starts([OTHER]))
    (told,) = (text for text in said if "not what was kept" in text)
    assert f"{SFT} seed 0" in told and told.endswith(": responses")
    assert files.read_json(study.kept(0), {})[SFT]["digests"]["responses"] == was


def test_each_run_is_kept_as_it_ends_with_what_made_it(tmp_path, started, monkeypatch):
    study, kept = runner.Study(tmp_path, seeds=(0,), jobs=1), []
    start = runner.start_process

    def note(*arguments):
        kept.append([*files.read_json(study.kept(0), {})])
        return start(*arguments)

    monkeypatch.setattr(runner, "start_process", note)
    runner.Runner(study, lambda text: None).run(CHOSEN)
    assert kept == [[], ["makers", SFT]]
    records = files.read_json(study.kept(0), {})
    assert records["makers"] == [outcomes.made()] and records[CELL]["maker"] == 0
    assert records[CELL]["seconds"] >= 0
    study.kept(1).write_text(json.dumps(records | {"makers": [{"commit": "abc"}]}))
    both = runner.Study(tmp_path, seeds=(0, 1))
    commit = outcomes.made()["commit"]
    assert results.about(study, "")["commit"] == commit
    assert results.about(both, "")["commit"] == ", ".join(sorted([commit, "abc"]))


@pytest.mark.parametrize(
    "field, changed, whose",
    [
        ("size=embedded", {"size": "smoke"}, "all runs were"),
        ("overrides=", {"overrides": ("rl.lr=1.0",)}, "all runs were"),
        ("rl.clip_high=0.2,", {}, "all runs were"),  # as of a commit with other cells
        ("optimizer.decay=1.0, which is absent", {}, "all runs were"),
        ("rl.steps=2.0,", {}, f"{CELL} was"),
        ("start=absent, which is sft_plain", {}, f"{CELL} was"),
    ],
)
def test_other_settings_are_refused(tmp_path, started, field, changed, whose):
    study = kept_study(tmp_path, (CELL,))
    if not changed:
        settings = files.read_json(study.kept_settings, {})
        name, _, value = field.partition(",")[0].partition("=")
        of = settings["common" if "all" in whose else CELL]
        of.pop(name, None)
        if value != "absent":
            of[name] = float(value)
        files.write_json(study.kept_settings, settings)
    study = dataclasses.replace(study, **changed)
    for read in (results.read, lambda s: runner.Runner(s, str).run(CHOSEN)):
        with pytest.raises(ValueError, match=f"{whose} made with {field}"):
            read(study)
    if "all" in whose:  # nothing is kept beside it, either
        with pytest.raises(ValueError, match=f"{whose} made with {field}"):
            outcomes.kept(study, cells.CELLS[OTHER], 0)
    assert not started


def test_again_compares_with_what_is_kept(tmp_path, started):
    study, said = kept_study(tmp_path), []

    def run(command, log, out, core):
        return runner.start_process(command, log, out, core).wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_process", run)
        assert runner.again(study, cells.CELLS[CELL], 0, said.append)
        assert started == [f"runs/{SFT}/seed0", f"again/{CELL}/seed0"]
        assert "the same to the last bit" in said[-1]
        records = files.read_json(study.kept(0), {})
        records[CELL]["digests"]["steps"] = "another"
        study.kept(0).write_text(json.dumps(records))
        assert not runner.again(study, cells.CELLS[CELL], 0, said.append)
        assert "steps differ" in said[-1] and len(started) == 3
        with pytest.raises(ValueError, match="not finished"):
            runner.again(study, cells.CELLS["forced"], 0, said.append)
        started.clear()
        records["makers"] = [outcomes.made() | {"processor": "abacus"}]
        kept = json.dumps(records)
        study.kept(0).write_text(kept)
        assert runner.again(study, cells.CELLS[CELL], 0, said.append)
        assert "was kept of processor abacus, not " in "".join(said)
        names = [f"runs/{name}/seed0" for name in (SFT, CELL)]
        assert started == [*names, f"again/{CELL}/seed0"]
        assert study.kept(0).read_text() == kept


@pytest.mark.parametrize("what", ["responses", "steps", "questions"])
def test_a_digest_sees_a_change_of_a_bit(tmp_path, what):
    study, cell = runner.Study(tmp_path, seeds=(0,)), cells.CELLS[CELL]
    workdir = study.workdir(CELL, 0)
    write(workdir, cell)
    before = outcomes.of_run(workdir, cell)
    assert outcomes.differences(before, outcomes.of_run(workdir, cell)) == []
    path = workdir / "rollouts" / "eval_1_rl.jsonl"
    old, new = '"response": "none"', '"response": "none "'
    if what == "questions":
        old, new = '"Which?"', '"Where?"'
    if what == "steps":
        path, old, new = workdir / "metrics.jsonl", ": 0.5,", ": 0.5000000000000001,"
        timed = path.read_text().replace('"perf/step_sec": 1', '"perf/step_sec": 9')
        path.write_text(timed)  # how long a step took does not count
        assert outcomes.differences(before, outcomes.of_run(workdir, cell)) == []
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert outcomes.differences(before, outcomes.of_run(workdir, cell)) == [what]
