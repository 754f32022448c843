"""Traces from a teacher: which attempts are kept, and that SFT reads them."""

import copy
import json
import types

import jax
import pytest

from configs.coldstart import get_config
from pr1_jax import tags
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED, Result
from pr1_jax.data import sources, streams
from pr1_jax.data.prompts import INSTRUCTION, PLANNED_INSTRUCTION
from pr1_jax.stages import coldstart, experiment, own, rollout
from pr1_jax.stages.run import Run

BLOCK = (
    "<Parallel>\n<Path> 1 A 51>55 no</Path>\n<Path> 2 C 30>34 yes 30</Path>\n</Parallel>"
    "\n<Summary> 30</Summary>\nFinal Answer: 30"
)


def attempt(question="q", response=BLOCK, verdict=CORRECT, finished=True):
    return {
        "question": question,
        "response": response,
        "answer": "30",
        "verdict": verdict,
        "finished": finished,
    }


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, "kept"),
        ({"finished": False}, "unfinished"),
        ({"verdict": INCORRECT}, "incorrect"),
        ({"verdict": UNDECIDED}, "undecided"),
        ({"response": "Final Answer: 30"}, "no_block"),
        ({"response": BLOCK.replace("</Path>", "", 1)}, "format_fault"),
        (
            {"response": BLOCK.replace("\n<Path> 2", "stray<Path> 2")},
            "no_canonical_form",
        ),
    ],
)
def test_why_an_attempt_is_kept_or_not(fields, reason):
    made = attempt(**fields)
    traces, reasons = coldstart.select([made], needs_block=True)
    assert reasons == {reason: 1}
    expected = {"question": "q", "response": tags.canonical(BLOCK), "answer": "30"}
    assert traces == ([expected] if reason == "kept" else [])
    if reason == "no_block":  # where that will do
        traces, reasons = coldstart.select([made], needs_block=False)
        assert reasons == {"kept": 1}
        assert traces[0]["response"] == fields["response"]


def test_never_two_copies_of_a_question():
    first, second = BLOCK, BLOCK.replace("A 51>55 no", "A 12>16 no")
    attempts = [
        attempt("a", verdict=INCORRECT),
        attempt("a", first),
        attempt("a", second),
        attempt("b", second),
        attempt("a", first),
    ]
    traces, reasons = coldstart.select(attempts, needs_block=True)
    assert [(t["question"], t["response"]) for t in traces] == [
        ("a", tags.canonical(first)),
        ("b", tags.canonical(second)),
    ]
    assert reasons == {"incorrect": 1, "kept": 2, "spare": 2}


def test_where_blocks_are_planned_a_trace_has_plans():
    plans = "<Parallel>\n<Plan>Row A.</Plan>\n<Plan>Row C.</Plan>\n"
    planned = BLOCK.replace("<Parallel>\n", plans)
    grammar = tags.Grammar((" 1", " 2"), planned=True)
    attempts = [
        attempt("a"),
        attempt("b", planned.replace("<Plan>Row C.</Plan>", "")),
        attempt("b", planned),
        attempt("c", planned.replace("\n<Plan>", "both: <Plan>", 1)),
    ]
    how = {"needs_block": True, "grammar": grammar}
    traces, reasons = coldstart.select(attempts, **how)
    assert reasons == {"format_fault": 2, "kept": 1, "no_canonical_form": 1}
    expected = tags.canonical(BLOCK).replace("<Parallel>", plans.replace("\n", ""))
    assert [(t["question"], t["response"]) for t in traces] == [("b", expected)]


@pytest.mark.parametrize("mode", ["ordinary", "structured"])
def test_the_teacher_is_asked_for_plans_where_blocks_are_planned(by_bytes, mode):
    planned = copy.deepcopy(by_bytes)
    planned.use_plans()
    config = get_config("smoke")
    config.data.template, config.coldstart.mode = "instruction", mode
    config.rollout.max_prompt_tokens = 2000
    for tokenizer, told in ((by_bytes, INSTRUCTION), (planned, PLANNED_INSTRUCTION)):
        asked = types.SimpleNamespace(
            config=config,
            own=own.Own(config, ()),
            tokenizer=tokenizer,
            source=lambda *_, **__: [{"question": "1+1?", "answer": "2"}],
        )
        ((problem,),) = coldstart.open_stream(asked)
        assert tokenizer.decode(problem.prompt).startswith(told)
        knows = {*problem.prompt.tolist()} & {*tokenizer.tag_ids.values()}
        assert len(knows) == (0 if mode == "ordinary" else len(tokenizer.tag_ids))


@pytest.fixture(scope="module")
def made():
    """A small experiment whose verifier finds every second response correct."""
    config = get_config("smoke")
    config.stages = ("coldstart",)
    config.model.num_layers, config.model.width, config.model.mlp_width = 1, 32, 32
    config.rollout.rows, config.rollout.prompts_per_prefill = 4, 2
    # Longer than the deadline: a random model seldom ends a response.
    config.rollout.max_response_tokens, config.rollout.max_sequential_steps = 250, 0
    config.rollout.update(min_path_tokens=3, max_path_tokens=8)
    config.coldstart.update(problems=12, samples=2, needs_block=False)
    return experiment.build(config.lock(), devices=jax.devices()[:1])


def run_stage(made, workdir, monkeypatch):
    verdict = lambda text: (CORRECT, INCORRECT)[sum(map(ord, text)) % 2]
    check = lambda text, *_, **__: Result(verdict(text), "made up")
    monkeypatch.setattr(rollout, "check", check)
    with Run(made, workdir) as current:
        coldstart.run_stage(made, current, 0)
    text = (workdir / "traces.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_attempts_are_kept_and_not_made_again(made, tmp_path, monkeypatch):
    traces = run_stage(made, tmp_path, monkeypatch)
    attempts = (tmp_path / "samples" / "coldstart.jsonl").read_text().splitlines()
    assert len(attempts) == 24
    questions = [json.loads(line)["question"] for line in attempts]
    assert len(set(questions)) == 12
    assert 0 < len(traces) == len({t["question"] for t in traces})
    assert run_stage(made, tmp_path, monkeypatch) == traces
    again = (tmp_path / "samples" / "coldstart.jsonl").read_text().splitlines()
    assert again == attempts


def test_what_it_writes_are_traces_for_sft(made, tmp_path):
    questions = [
        f"Which number has a partner 4 larger? A {i} 34\n" for i in range(8, 13)
    ]
    traces, _ = coldstart.select(map(attempt, questions), needs_block=True)
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    stream = streams.trace_stream(
        sources.open_source(str(file), "train", seed=0, traces=True),
        made.tokenizer,
        variant="structured",
        template="plain",
        max_prompt_tokens=28,
        max_response_tokens=96,
        batch_size=5,
        seed=0,
    )
    assert all(trace.num_blocks == 1 for trace in next(stream))
    assert stream.counts == {"kept": 5}


def test_a_teacher_that_does_not_know_the_tags_reads_them_spelled(monkeypatch):
    config = get_config("smoke")
    seen = []
    watch = lambda *_, allow_tags, **__: seen.append(allow_tags)
    monkeypatch.setattr(streams, "problem_stream", watch)
    for mode in ("structured", "ordinary"):
        config.coldstart.mode = mode
        coldstart.open_stream(experiment.build(config))
    assert seen == [True, False]
