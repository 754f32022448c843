"""The report of a run: what happened, which responses, the page, the command."""

import dataclasses
import functools
import json
import pathlib
import re
import time

import ml_collections
import numpy as np
import pytest

from configs import common
from pr1_jax.data import tasks
from pr1_jax.report import (
    differences,
    events,
    history,
    page,
    reading,
    traces,
    updates,
)
from pr1_jax.stages import checks
from pr1_jax.system import files
from pr1_jax.tags import Grammar
from pr1_jax.workdir import metrics
from tests.helpers import command, made_up_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "collapsed"
    made_up_run.write(folder)
    return folder


@pytest.fixture(scope="module")
def written(workdir):
    page.write([workdir], workdir / "report.html")
    return (workdir / "report.html").read_text(encoding="utf-8")


def _data(html):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    return json.loads(found[1])


# --- What happened ------------------------------------------------------------------


def test_the_step_of_a_collapse_is_an_event_with_what_moved(written):
    (run,) = _data(written)["runs"]
    at = [e for e in run["events"] if e["step"] == 140 and e["stage"] == "rl"]
    assert {e["name"] for e in at if e["kind"] == "alarm"} >= {
        *("entropy_collapse", "length_collapse", "no_signal", "no_blocks")
    }
    (change,) = [e for e in at if e["kind"] == "change"]
    assert "Entropy 0.5" in change["text"]
    moved = {name: (z, before) for name, z, before in run["moves"][change["row"]]}
    assert {*moved} >= {"policy/entropy", "rollout/total_tokens", "reward/mean"}
    z, before = moved["policy/entropy"]
    assert z < -20 and before == pytest.approx(0.5, abs=0.02)
    assert run["rewards"][change["row"]] == "tiered"


def test_a_quiet_run_has_no_news(written):
    (run,) = _data(written)["runs"]
    news = [e for e in run["events"] if e["kind"] != "stage"]
    # A skipped update, the collapse, and how it shows in a mean over ten steps.
    assert {e["step"] for e in news} == {77, 140, 146}
    assert [e["name"] for e in news if e["step"] == 77] == ["skipped"]


def _run(rows, config=None):
    rows = [{"stage": "rl", "step": i, **row} for i, row in enumerate(rows, start=1)]
    nothing = {"summary": {}, "benchmarks": {}, "evaluations": [], "sources": []}
    path = pathlib.Path("runs/a")
    return reading.Run(path=path, name="a", config=config or {}, rows=rows, **nothing)


def test_moves_are_counted_in_spreads_from_the_median_before():
    values = [1.0, 3.0] * 10 + [12.0, 2.0]
    z, before = events.moves(_run([{"a/b": v} for v in values]))["a/b"]
    assert before[20] == 2.0  # of ten 1 and ten 3, whose spread is 1.4826
    assert z[20] == pytest.approx(10 / 1.4826)
    assert np.isnan(z[7]) and np.isfinite(z[8])  # eight steps before are enough


def test_the_least_change_of_a_still_figure_is_no_news():
    rows = [{"rollout/undecided": 0.0, "a/b": 100.0}] * 20
    rows += [{"rollout/undecided": 0.02, "a/b": 103.0}]
    found = events.moves(_run(rows))
    assert found["rollout/undecided"][0][20] == pytest.approx(2.0)
    assert found["a/b"][0][20] == pytest.approx(1.5)
    assert events.largest(found, 20) == []


def test_a_missing_figure_moves_nothing():
    rows = [{"a/b": None if i % 2 else 1.0} for i in range(30)]
    z, before = events.moves(_run(rows))["a/b"]
    assert np.isnan(z[1]) and z[28] == 0 and before[28] == 1.0
    assert events.largest(events.moves(_run(rows)), 28) == []


def _weights(step):
    tiered = float((step - 1) % 10 >= 8)
    return {"reward/weight_accuracy": 1 - tiered, "reward/weight_tiered": tiered}


def test_rewards_are_compared_with_steps_of_the_same_reward():
    rows = [_weights(i) for i in range(1, 101)]
    rewards = [{"reward/mean": 0.1 + 0.8 * row["reward/weight_tiered"]} for row in rows]
    z, _ = events.moves(_run([a | b for a, b in zip(rows, rewards)]))["reward/mean"]
    assert np.nanmax(np.abs(z)) == 0
    z, _ = events.moves(_run(rewards))["reward/mean"]  # not known to be scheduled
    assert np.nanmax(np.abs(z)) > 8


def test_windows_are_read_from_the_weights_of_rewards():
    both = {"reward/weight_accuracy": 0.5, "reward/weight_tiered": 0.5}
    run = _run([*(_weights(i) for i in range(1, 21)), both, _weights(1)])
    tiered, *others = [(w.first, w.last, w.reward) for w in run.windows]
    assert tiered == (9, 10, "tiered")
    assert others == [(19, 20, "tiered"), (21, 21, "accuracy + tiered")]


@pytest.mark.parametrize(
    "schedule, name",
    [("alternating", "accuracy"), ("parallel_and_accuracy", "parallel_and_accuracy")],
)
def test_a_run_from_before_there_were_weights_has_rewards(schedule, name):
    rows = [{"reward/tiered": 0.0}, {"reward/tiered": 1.0}, {"loss/sft": 1.0}]
    run = _run(rows, {"reward": {"schedule": schedule}})
    assert run.reward_names == [name, "tiered", ""]


def test_a_bonus_for_short_critical_paths_is_said():
    rows = [_weights(i) for i in range(1, 11)]
    said = lambda **reward: page.describe(_run(rows, {"reward": reward}), {})[
        "schedule"
    ]
    plain = said(schedule="alternating", latency_coef=0.0)
    assert plain == "alternating: accuracy in 8 steps, tiered in 2 steps"
    bonus = ", with 0.2 × the saved critical path"
    assert said(schedule="alternating", latency_coef=0.2) == plain + bonus
    assert traces.encode({"reward": 1.1, "reward_latency": 0.1})["saved"] == 0.1


def test_a_stage_begins_before_what_happens_at_its_first_step():
    run = _run([{"alarm/no_signal": 1.0, "alarm/skipped": 1.0}] * 2)
    found = [(e.row, e.kind) for e in events.find(run, events.moves(run))]
    assert found == [(0, "stage"), (0, "alarm"), (0, "skipped")]


def test_an_alarm_that_comes_and_goes_is_one_event():
    on = {0, 1, 3, 40, 61}
    rows = [{"alarm/no_signal": float(i in on)} for i in range(62)]
    found = [e for e in events.find(_run(rows), {}) if e.kind == "alarm"]
    assert [(e.row, e.last_row) for e in found] == [(0, 3), (40, 40), (61, 61)]
    assert found[0].text.endswith(" in 3 of 4 steps")
    assert "steps" not in found[1].text
    stages = [{"stage": name, "alarm/skipped": 1.0} for name in ("sft", "rl")]
    found = [e for e in events.find(_run(stages), {}) if e.kind == "skipped"]
    assert [(e.stage, e.row, e.last_row) for e in found] == [
        ("sft", 0, 0),
        ("rl", 1, 1),
    ]


def test_figures_of_paths_in_older_lines_are_those_of_the_responses():
    analyses = {"analysis/work_division": 0.25, "analysis/path_bleu": 0.5}
    run = _run([{"rollout/accuracy": 1.0}])
    evaluation = ("eval_2_rl", 1, {"eval/accuracy": 1.0})
    of = lambda *lines: page.describe(
        dataclasses.replace(
            run,
            rows=[run.rows[0] | lines[0]],
            evaluations=[(*evaluation[:2], evaluation[2] | lines[1])],
            sources=[reading.Source("rl_000001", "rl", 1, ())],
        ),
        {"rl_000001": analyses, "eval_2_rl": analyses},
    )
    found = of({}, {})
    assert found["values"]["rollout/work_division"] == [0.25]
    assert found["values"]["analysis/path_bleu"] == [0.5]
    assert "analysis/work_division" not in found["values"]
    assert found["evaluations"][0]["values"]["eval/work_division"] == 0.25
    new = of({"rollout/work_division": 1.0}, {"eval/work_division": 1.0})
    assert new["values"]["rollout/work_division"] == [1.0]
    assert new["evaluations"][0]["values"]["eval/work_division"] == 1.0


def test_analyses_of_an_older_version_are_made_again(tmp_path):
    made_up_run.write(tmp_path, steps=2, responses=[1])
    run = reading.read(tmp_path)
    history.History(tmp_path).update(run)
    path = tmp_path / "analysis.jsonl"
    old = [
        {
            n: x
            for n, x in line.items()
            if n not in ("version", "analysis/work_division")
        }
        for line in files.read_json_lines(path)
    ]
    files.write_json_lines(path, old)
    found = history.History(tmp_path).update(run)
    assert found["rl_000001"]["analysis/work_division"] == 1.0


def test_a_response_states_its_task_and_what_its_paths_did():
    search, partner = tasks.make("search"), tasks.make("partner")
    for task in (search, partner):
        question = task.records("hard", "eval", seed=0)[0]["question"]
        asked = traces.encode({"question": question})["asked"]
        assert asked.endswith(".") and re.search(r"\d+", question)[0] in asked
    assert "asked" not in traces.encode({"question": "What is 2 + 2?"})
    text = "<Parallel><Path> 1 left 1+6 no</Path><Path> 2 left 1+6 no</Path></Parallel>"
    found = traces.encode({"response": text}, Grammar((" 1", " 2")))
    assert (found["identical"], found["division"]) == ([True], [0.0])
    assert traces.encode({"response": text})["identical"] == [False]
    assert not {"identical", "division"} & traces.encode({"response": "4"}).keys()


def test_what_no_step_stands_out_by_is_a_fact():
    row = {"rollout/degenerate_groups": 0.84, "data/kept": 30, "data/dropped_other": 0}
    (dropped, dull) = events.facts(_run([row | {"data/dropped_too_long": 30}] * 3))
    assert dropped == "rl: kept 30 of 60 records read: 30 too long."
    assert dull.startswith("rl: 84% of the groups had no signal (84% in the last steps")
    assert events.facts(_run([row | {"rollout/degenerate_groups": 0.2}])) == []


# --- Which responses ----------------------------------------------------------------


def test_the_page_has_responses_of_every_step_and_more_of_those_of_interest(written):
    (run,) = _data(written)["runs"]
    names = [group["name"] for group in run["responses"]]
    assert names == ["eval_0_base", *(f"rl_{step:06d}" for step in range(1, 161))]
    counts = {group["step"]: len(group["records"]) for group in run["responses"]}
    assert {counts[step] for step in (1, 76, 77, 139, 140, 160)} == {3}
    assert counts[33] == 2 and "of every step" in run["left_out"]


def test_a_small_budget_takes_fewer_of_each_then_texts_then_fewer_steps(workdir):
    run = reading.read(workdir)
    embed = lambda budget: traces.embed(run, [140], budget=budget)[0]
    dumped = lambda r: len(json.dumps(r, separators=(",", ":")))
    size = lambda groups: sum(dumped(r) for g in groups for r in g["records"])
    of_step = lambda groups, n: next(g["records"] for g in groups if g["step"] == n)
    whole = embed(traces.BUDGET)
    for share in (0.9, 0.6, 0.5, 0.1):
        some = embed(int(share * size(whole)))
        assert size(some) <= share * size(whole)
        assert "trace" in of_step(some, 140)[0]
        if share > 0.3:
            assert [g["name"] for g in some] == [g["name"] for g in whole]
            assert not any("trace" in record for record in of_step(some, 33))
    steps = [g["step"] for g in some if g["step"]]
    assert 8 < len(steps) < 100 and {1, 160} <= {*steps}
    assert embed(1500)[0]["name"] == "eval_0_base"  # the most wanted


def test_two_responses_of_a_step_are_of_two_kinds_and_questions(tmp_path):
    made_up_run.write(tmp_path, steps=3, responses=())
    right, other = ({**made_up_run.response(), "question": q} for q in "ab")
    wrong = {**made_up_run.sequential(), "question": "a"}
    for step, last in ((1, other), (2, wrong)):
        records = [right, right, last]
        made_up_run.write_responses(tmp_path, f"rl_{step:06d}", records)
    run = reading.read(tmp_path)
    sources = {s.step: s for s in run.sources if s.step}
    taken = traces.Shelf().take(dict.fromkeys(sources.values(), 2))
    first, second = ([r for r, _ in taken[sources[step]]] for step in (1, 2))
    assert [r["question"] for r in first] == ["a", "b"]
    assert [r["verdict"] for r in second] == ["correct", "incorrect"]


def test_named_steps_are_embedded_in_full(workdir):
    run = reading.read(workdir)
    asked = traces.steps_named(run, [33])
    ((group,), _) = traces.embed(run, [], asked=asked, budget=0)
    assert group["step"] == 33 and len(group["records"]) == 3
    with pytest.raises(ValueError, match=r"--steps=999: .* steps 1 to 160"):
        traces.steps_named(run, [999])


def test_a_trace_survives_its_encoding():
    trace = made_up_run.response(paths=3, tokens=9, blocks=2)["trace"]
    encoded = traces.encode({"trace": trace})["trace"]
    assert encoded["pieces"] == trace["pieces"]
    assert len(encoded["spans"]) < len(trace["pieces"]) / 2
    tokens = []
    for count, position, *labels in encoded["spans"]:
        tokens += [(position + i, *labels) for i in range(count)]
    names = ("positions", "block", "path", "forced")
    assert tokens == [*zip(*(trace[name] for name in names), strict=True)]
    assert encoded["surprise"] == [round(-100 * x) for x in trace["logps"]]


@pytest.mark.parametrize("trace", [7, {}, {"logps": None, "positions": [0, 1]}])
def test_a_torn_trace_is_shown_as_text(trace):
    if trace and trace != 7:
        trace |= {"pieces": ["a"], "forced": [0], "block": [0], "path": [0]}
    found = traces.encode({"trace": trace, "response": "r", "reward": "high"})
    assert "trace" not in found and found["response"] == "r" and found["reward"] is None


def test_parts_of_several_processes_are_one_source(tmp_path):
    made_up_run.write(tmp_path, steps=3, responses=())
    for process in range(2):
        name = f"rl_000002-0000{process}-of-00002"
        made_up_run.write_responses(tmp_path, name, [made_up_run.sequential()])
    run = reading.read(tmp_path)
    (source,) = [s for s in run.sources if s.step == 2]
    assert source.name == "rl_000002" and len(reading.read_records(source)) == 2


# --- The page -----------------------------------------------------------------------


def test_hostile_text_cannot_leave_its_place(written):
    assert made_up_run.HOSTILE[:20] not in written
    assert written.count("</script>") == 2 and "<img" not in written
    assert "\u2028" not in written
    (run,) = _data(written)["runs"]
    responses = [r.get("response") for g in run["responses"] for r in g["records"]]
    assert made_up_run.HOSTILE + "\ud800" in responses  # as the model wrote it


def test_the_page_is_small_and_closed(written):
    code = written.replace(re.search(r'id="data">(.*?)</script>', written)[1], "")
    assert len(code.encode()) < 80_000
    assert "default-src 'none'" in code and not re.search(r"https?://(?!www\.w3)", code)


def test_a_config_is_told_as_differences_from_the_nearest_default():
    config = common.get_config("smoke", variant="causal").to_dict()
    config["rl"]["lr"] = 1.0
    config["gone"] = {"now": 1}
    name, rows = differences.from_base(files.plain(config))
    assert name == "configs/common.py:smoke"
    assert rows == [("gone.now", "1", differences.ABSENT), ("rl.lr", "1.0", "0.0003")]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    files.write_json(tmp_path / "config.json", ml_collections.ConfigDict().to_dict())
    (tmp_path / "metrics.jsonl").touch()
    page.write([tmp_path], tmp_path / "report.html")
    (run,) = _data((tmp_path / "report.html").read_text())["runs"]
    assert run["steps"] == [] and run["left_out"] == "This run has kept no responses."


def test_of_two_lines_of_a_step_the_later_counts(tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
        for stage, step, value in (("sft", 1, 1), ("rl", 1, 2), ("sft", 1, 3)):
            writer.write(stage, step, {"a/b": value})
        writer.write("eval_1_sft", 0, {"eval/accuracy": 1})
    run = reading.read(tmp_path)
    assert [(r["stage"], r["a/b"]) for r in run.rows] == [("sft", 3), ("rl", 2)]
    assert run.evaluations[0][:2] == ("eval_1_sft", 1)


# --- While a run trains -------------------------------------------------------------


def test_each_file_is_analysed_once(workdir, monkeypatch):
    run = reading.read(workdir)
    history.History(workdir).update(run)
    monkeypatch.setattr(history.analysis, "summarize", lambda *_: 1 / 0)
    found = history.History(workdir).update(run)
    position = found["rl_000001"]["analysis/relative_position"]
    assert position == pytest.approx(0.09, abs=0.1)
    with pytest.raises(ZeroDivisionError):
        made_up_run.write_responses(workdir, "rl_000161", [made_up_run.response()])
        history.History(workdir).update(reading.read(workdir))
    (workdir / "rollouts" / "rl_000161.jsonl").unlink()


def test_analyses_without_time_left_wait_for_the_next_update(tmp_path):
    made_up_run.write(tmp_path, steps=12, responses=range(1, 13))
    run = reading.read(tmp_path)
    assert history.History(tmp_path).update(run, limit_sec=-1) == {}
    assert len(history.History(tmp_path).update(run)) == 13


def test_updates_write_the_page_now_and_then_and_at_the_end(tmp_path):
    made_up_run.write(tmp_path, steps=12, responses=range(1, 4))
    kept = updates.Updates(tmp_path, every_sec=3600.0)
    for _ in range(3):
        kept.after_step()
    time.sleep(0.05)
    assert not (tmp_path / "report.html").exists()
    kept = updates.Updates(tmp_path, every_sec=0.0)
    kept.after_step()
    kept.close()
    (run,) = _data((tmp_path / "report.html").read_text())["runs"]
    assert run["steps"][-1] == 12
    assert (tmp_path / "curves.png").exists()


def test_settings_are_checked():
    config = common.get_config("smoke")
    config.report.traces = -1
    with pytest.raises(ValueError, match="report.traces=-1.* must not be negative"):
        checks.check(config)


def test_a_report_that_fails_is_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("no JSON\n")
    kept = updates.Updates(tmp_path, every_sec=0.0)
    with caplog.at_level("WARNING"):
        kept.after_evaluation()
        kept.close()
    (line,) = [m for m in caplog.messages if "report.html" in m]
    assert "not JSON" in line and "the run goes on" in line


# --- The command --------------------------------------------------------------------


_command = functools.partial(command.run, "pr1_jax.report")


def test_the_command_lays_runs_over_each_other(workdir, tmp_path):
    out = tmp_path / "compare.html"
    made_up_run.write(tmp_path / "other", steps=20, responses=[3])
    found = _command(workdir, tmp_path / "other", f"--out={out}", "--steps=3")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{out}: ")
    data = _data(out.read_text())
    assert [run["name"] for run in data["runs"]] == ["collapsed", "other"]
    assert data["fields"] == [["rl.steps", "160", "20"]]


def test_a_mistake_is_one_line_and_exit_code_2():
    for arguments in (["nowhere"], ["configs", "--colour=red"]):
        found = _command(*arguments)
        assert found.returncode == 2 and found.stdout == ""
        assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("workdirs", "out", "steps", "message"),
    [
        ((), None, (), "name the workdir of a run"),
        (("{run}", "{run}"), None, (), "--out is missing"),
        (("nowhere",), None, (), "nowhere is not a folder"),
        (("configs",), None, (), "configs has no metrics.jsonl"),
        (("{run}",), None, ("1", "x"), "--steps=1,x: 'x' is not the number"),
        (("{run}",), "tests", (), "--out=tests is a folder"),
    ],
)
def test_mistakes_are_named(workdir, monkeypatch, workdirs, out, steps, message):
    monkeypatch.chdir(command.ROOT)
    named = [name.format(run=workdir) for name in workdirs]
    with pytest.raises((ValueError, OSError), match=message):
        page.write(named, out, steps)
