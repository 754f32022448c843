"""Plans that a teacher writes for traces without: what it is asked, and what is kept."""

import contextlib
import copy
import json
import random
import re
import types

import pytest

from configs.coldstart import get_config
from pr1_jax import tags
from pr1_jax.data import sources, streams
from pr1_jax.data.rows import Dropped
from pr1_jax.stages import checks, coldstart, own, plans, samples

PATHS = "<Path>Try 1.</Path>\n<Path>Try 2.</Path>\n"
BLOCK = f"<Parallel>\n{PATHS}</Parallel>\n<Summary>2 is.</Summary>"
TRACE = f"So. {BLOCK}\nAgain: {BLOCK}\nFinal Answer: 2"
PLANNED = tags.Grammar((" 1", " 2", " 3", " 4"), planned=True)
WRITTEN = "".join(f"<Plan> p{i} </Plan>\n" for i in range(4))


def random_trace(draw):
    text = ""
    for _ in range(draw.randint(1, 3)):
        number = draw.randint(2, 4)
        paths = "".join(f"<Path>a{draw.random()}</Path>" for _ in range(number))
        text += f"x <Parallel>{paths}</Parallel>\n<Summary>s</Summary>"
    return text + " y"


@pytest.mark.parametrize("seed", range(20))
def test_plans_stand_in_their_blocks_and_nothing_else_changes(seed):
    trace = random_trace(random.Random(seed))
    number = trace.count("<Path>")
    made = plans.insert(trace, [f"p{i}" for i in range(number)])
    assert tags.canonical(made, PLANNED.unlabelled) == made
    assert re.findall("<Plan>(.*?)</Plan>", made) == [f"p{i}" for i in range(number)]
    assert re.sub("<Plan>.*?</Plan>", "", made) == trace


def attempt(request, response=WRITTEN, finished=True):
    return {"question": request, "response": response, "finished": finished}


RECORDS = [
    {"question": " q ", "response": TRACE, "answer": "2"},
    {"question": "no block", "response": "Final Answer: 2", "answer": "2"},
    {"question": "stray", "response": TRACE.replace("\n<Path>", "or <Path>", 1)},
    {"question": "has", "response": TRACE.replace("<Path>", "<Plan>p</Plan><Path>", 1)},
    {
        "question": "r",
        "response": BLOCK,
        "answer": "",
        "messages": '[{"role": "user", "content": "r"}]',
    },
]


class Source(list):
    """Records, the last of which cannot be read."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        if record is None:
            raise Dropped("unreadable", "a.jsonl:9")
        return record


def test_what_the_teacher_is_asked():
    asked, dropped = plans.requests(Source([*RECORDS, RECORDS[0], None]))
    reasons = {"no_block": 1, "malformed": 1, "has_plans": 1, "unreadable": 1}
    assert dropped == reasons
    first, second = asked
    assert "Write 4 plans" in first and "Write 2 plans" in second
    assert f"Problem: q\n\nSolution: {tags.canonical(TRACE)}\n\nPlans:" in first
    assert asked[first]["response"] == tags.canonical(TRACE)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, "kept"),
        ({"response": f"Here they are:\n{WRITTEN}That is all."}, "kept"),
        ({"finished": False}, "unfinished"),
        ({"response": WRITTEN.replace("<Plan>", "", 1)}, "number_of_plans"),
        ({"response": WRITTEN * 2}, "number_of_plans"),
        ({"response": WRITTEN.replace("p2", "")}, "empty_plan"),
        ({"response": WRITTEN.replace("p2", "<Path>")}, "no_canonical_form"),
    ],
)
def test_why_plans_are_kept_or_not(fields, reason):
    asked, _ = plans.requests(RECORDS)
    made = attempt(next(iter(asked)), **fields)
    traces, reasons = plans.select([made], asked, PLANNED)
    assert reasons == {reason: 1}
    expected = plans.insert(tags.canonical(TRACE), ["p0", "p1", "p2", "p3"])
    response = tags.canonical(expected, PLANNED)
    trace = {"question": " q ", "response": response, "answer": "2"}
    assert traces == ([trace] if reason == "kept" else [])


def test_the_first_good_plans_of_a_trace_are_kept():
    asked, _ = plans.requests(RECORDS)
    first, second = asked
    others = WRITTEN.replace("p", "other ")
    made = [
        attempt(first, "?"),
        attempt(first),
        attempt(second),
        attempt(first, others),
    ]
    traces, reasons = plans.select(made, asked, PLANNED)
    assert reasons == {"kept": 1, "spare": 1, "number_of_plans": 2}
    assert len(traces) == 1 and "<Plan>p0</Plan>" in traces[0]["response"]


def test_traces_are_written_for_sft(by_bytes, tmp_path, monkeypatch):
    """The whole stage, with a teacher that is made up."""
    planned = copy.deepcopy(by_bytes)
    planned.use_plans()
    config = get_config("smoke")
    config.coldstart.mode, config.data.template = "plans", "instruction"
    config.rollout.max_prompt_tokens = 2000
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    experiment = types.SimpleNamespace(
        config=config,
        own=own.Own(config, ()),
        tokenizer=planned,
        settings=types.SimpleNamespace(grammar=PLANNED),
        source=lambda name, split, **how: sources.open_source(str(file), split, **how),
    )

    def teacher(experiment, params, path, problems, *, mode, **_):
        assert mode == "ordinary"
        for problem in problems:
            assert planned.decode(problem.prompt) == problem.question
            assert not {*problem.prompt.tolist()} & {*planned.tag_ids.values()}
        first, second = (problem.question for problem in problems)
        short = "".join(WRITTEN.splitlines(keepends=True)[:2])
        yield 0, []
        made = [attempt(first, "?"), attempt(first), attempt(first)]
        yield 2, [*made, attempt(second, short)]

    monkeypatch.setattr(samples, "sample", teacher)
    said = []
    run = types.SimpleNamespace(
        workdir=tmp_path,
        params=None,
        display=lambda *_: contextlib.nullcontext(
            types.SimpleNamespace(update=lambda *_: None)
        ),
        log=lambda *_: None,
        say=said.append,
    )
    coldstart.run_stage(experiment, run, 0)
    assert said[:3] == [
        "traces without use: 1 no block",
        "traces without use: 1 malformed",
        "traces without use: 1 has plans",
    ]
    assert said[3].startswith("2 traces of 2 problems")
    stream = streams.trace_stream(
        sources.open_source(str(tmp_path / "traces.jsonl"), "t", seed=0, traces=True),
        planned,
        variant="structured",
        template="plain",
        max_prompt_tokens=100,
        max_response_tokens=2000,
        grammar=PLANNED,
        batch_size=2,
        seed=0,
        epochs=1,
    )
    ((one, two),) = stream
    assert {x.tokens.tolist().count(planned.tag_ids["<Plan>"]) for x in (one, two)} == {
        2,
        4,
    }


def test_traces_without_blocks_cannot_get_plans():
    config = get_config("smoke")
    experiment = types.SimpleNamespace(
        config=config, source=lambda *_, **__: RECORDS[1:4]
    )
    run = types.SimpleNamespace(say=lambda text: None)
    with pytest.raises(
        ValueError, match="data.coldstart=embedded:easy has no trace in"
    ):
        coldstart._open_traces(experiment, run)


def test_plans_need_blocks_that_are_planned():
    config = get_config("smoke")
    config.coldstart.mode = "plans"
    with pytest.raises(ValueError, match="coldstart.mode=plans needs rollout.planned"):
        checks.check(config)
