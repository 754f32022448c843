"""Tests of pr1_jax.data: laws of the streams, prompts, embedded and real data."""

import copy
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from absl import logging

from pr1_jax import tags
from pr1_jax.data import streams
from pr1_jax.data.prompts import (
    INSTRUCTION,
    PLANNED_INSTRUCTION,
    Problem,
    prompt_tokens,
)
from pr1_jax.data.sources import open_source

SHARED = Path(__file__).parents[3] / "shared/data"
BLOCK = "<Parallel><Path>a</Path><Path>b</Path></Parallel>\n<Summary>s</Summary>"
PROBLEM_ARGS = {"template": "plain", "max_prompt_tokens": 20}
TRACE_ARGS = PROBLEM_ARGS | {"variant": "structured", "max_response_tokens": 40}


def shared(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"real data is not here: {SHARED / name}")
    return str(SHARED / name)


def records(lengths):
    """Problems whose questions are that long, told apart by their answers."""
    return [
        {"question": "x" * n, "answer": str(i), "response": f"{i}{BLOCK}"}
        for i, n in enumerate(lengths)
    ]


MIXED = records([5, 50, 6, 7, 50, 50, 8, 9, 10, 11, 50, 12, 13])  # 9 of 13 fit
FITTING = [i for i, r in enumerate(MIXED) if len(r["question"]) <= 20]


def problems(tok, source=MIXED, **kwargs):
    kwargs = {"batch_size": 4, "seed": 0, **PROBLEM_ARGS, **kwargs}
    return streams.problem_stream(source, tok, **kwargs)


def traces(tok, source=MIXED, **kwargs):
    kwargs = {"batch_size": 4, "seed": 0, **TRACE_ARGS, **kwargs}
    return streams.trace_stream(source, tok, **kwargs)


def take(stream, num_batches):
    """What identifies the items of the next batches."""
    known = lambda x: x.answer if isinstance(x, Problem) else x.tokens.tolist()
    return [
        [known(x) for x in batch] for batch in itertools.islice(stream, num_batches)
    ]


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


# --- streams -------------------------------------------------------------------------


def test_an_epoch_holds_every_fitting_record_once_and_epochs_differ(by_bytes):
    answers = flat(take(problems(by_bytes, batch_size=3), 9))
    epochs = [list(map(int, answers[i : i + 9])) for i in (0, 9, 18)]
    assert all(sorted(epoch) == FITTING for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    again = flat(take(problems(by_bytes, batch_size=3), 9))
    other = flat(take(problems(by_bytes, batch_size=3, seed=1), 9))
    assert answers == again != other


def test_without_shuffle_and_bounded(by_bytes):
    stream = problems(by_bytes, shuffle=False, epochs=2)
    answers = take(stream, 10)
    assert [len(batch) for batch in answers] == [4, 4, 4, 4, 2]
    assert list(map(int, flat(answers))) == FITTING * 2
    assert stream.counts == {"kept": 18, "prompt_too_long": 8}
    with pytest.raises(StopIteration):
        next(stream)


def test_items_are_problems_and_trajectories_of_the_records(by_bytes):
    (problem,) = next(problems(by_bytes, batch_size=1, shuffle=False))
    assert (problem.question, problem.answer) == ("xxxxx", "0")
    assert problem.prompt.dtype == np.int32
    assert by_bytes.decode(problem.prompt) == "xxxxx"
    (trace,) = next(traces(by_bytes, batch_size=1, shuffle=False))
    assert by_bytes.decode(trace.tokens) == f"0{BLOCK}"
    assert trace.tokens[-1] == by_bytes.eos_id
    assert (trace.num_blocks, len(trace.prompt)) == (1, 5)
    # 0 <Parallel> | <Path> a </Path> | <Path> b </Path> | </Parallel> \n <Summary> …
    assert trace.positions.tolist() == [5, 6, 7, 8, 9, 7, 8, 9, *range(10, 16)]
    causal = next(traces(by_bytes, batch_size=1, shuffle=False, variant="causal"))
    assert causal[0].positions.tolist() == [*range(5, 5 + len(trace.tokens))]


@pytest.mark.parametrize("make", [problems, traces])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resumed_equals_never_stopped(by_bytes, make, shuffle):
    whole = make(by_bytes, shuffle=shuffle)
    expected = take(whole, 12)
    for stop in (0, 1, 5):
        stopped = make(by_bytes, shuffle=shuffle)
        take(stopped, stop)
        state = json.loads(json.dumps(stopped.get_state()))
        resumed = make(by_bytes, shuffle=shuffle)
        take(resumed, 2)  # wherever it was before
        resumed.set_state(state)
        assert take(resumed, 12 - stop) == expected[stop:]
        assert resumed.get_state() == whole.get_state()
        assert resumed.counts == whole.counts


@pytest.mark.parametrize("make", [problems, traces])
@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_together_hold_the_global_batch(by_bytes, make, process_count):
    whole = take(make(by_bytes, batch_size=2 * process_count), 8)
    shards = [
        make(by_bytes, batch_size=2, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    parts = [take(shard, 8) for shard in shards]
    for k, batch in enumerate(whole):
        shares = [batch[i::process_count] for i in range(process_count)]
        assert [part[k] for part in parts] == shares
    assert all(shard.get_state() == shards[0].get_state() for shard in shards)


@pytest.mark.parametrize("epochs", [None, 1])
def test_a_source_without_a_usable_record_fails(by_bytes, epochs):
    stream = problems(by_bytes, records([30, 40, 50]), epochs=epochs)
    with pytest.raises(ValueError, match="kept 0 of . records: . prompt too long"):
        next(stream)
    with pytest.raises(ValueError, match="holds no records"):
        problems(by_bytes, [])


def test_drops_are_counted_by_reason_and_logged_once(by_bytes, monkeypatch):
    responses = [
        "7",
        f"<Parallel> {BLOCK[10:]}",  # brought into canonical form
        BLOCK.replace("</Path><", "</Path> stray <"),
        BLOCK.replace("<Path>b</Path>", ""),
        "</Path>",
        "x" * 40,  # and EOS
        "x" * 39,
    ]
    source = [{"question": "q", "response": text} for text in responses]
    source.append({"question": "x" * 21, "response": "7"})
    lines = []
    monkeypatch.setattr(logging, "warning", lambda *args: lines.append(args[1:]))
    stream = traces(by_bytes, source, shuffle=False, epochs=1)
    kept = [by_bytes.decode(trace.tokens) for trace in next(stream)]
    assert kept == ["7", BLOCK, "x" * 39]
    too_long = {"response_too_long": 1, "prompt_too_long": 1}
    assert stream.counts == {"kept": 3, "malformed": 3} | too_long
    *first, (summary,) = lines
    expected = ["malformed", *(name.replace("_", " ") for name in too_long)]
    assert [reason for reason, _ in first] == expected
    assert "stray" in dict(first)["malformed"]
    reasons = "3 malformed, 1 response too long, 1 prompt too long"
    assert summary == stream.summary == f"kept 3 of 8 records: {reasons}"


def test_counts_of_older_versions_are_read(by_bytes):
    stream = traces(by_bytes)
    state = stream.get_state() | {"counts": {"no_layout": 1, "format_fault": 2}}
    stream.set_state(state | {"items": 5})
    assert stream.counts == {"kept": 5, "malformed": 3}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"template": "none"}, "data.template='none'"),
        ({"template": "chat"}, "no chat template"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
    ],
)
def test_wrong_settings_fail_at_once(by_bytes, kwargs, message):
    for make in (problems, traces):
        with pytest.raises(ValueError, match=message):
            make(by_bytes, **kwargs)


# --- prompts -------------------------------------------------------------------------


def test_instruction_prompt(by_bytes):
    ids = prompt_tokens(" 1+1? \n", by_bytes, template="instruction")
    text = by_bytes.decode(ids)
    assert text == f"{INSTRUCTION}\n\nProblem: 1+1?\n\nSolution:\n"
    assert all(ids.tolist().count(i) == 1 for i in by_bytes.tag_ids.values())
    assert all(tag in INSTRUCTION for tag in tags.TAGS)


def test_where_blocks_are_planned_the_instruction_asks_for_plans(by_bytes):
    planned = copy.deepcopy(by_bytes)
    planned.use_plans()
    ids = prompt_tokens("1+1?", planned, template="instruction")
    text = planned.decode(ids)
    assert text == f"{PLANNED_INSTRUCTION}\n\nProblem: 1+1?\n\nSolution:\n"
    assert all(ids.tolist().count(i) == 1 for i in planned.tag_ids.values())
    assert tags.PLAN in PLANNED_INSTRUCTION and tags.PLAN not in INSTRUCTION


def test_chat_prompt_has_the_instruction_as_system_message(by_bytes, monkeypatch):
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", template)
    ids = prompt_tokens("1+1?", by_bytes, template="chat")
    assert by_bytes.decode(ids) == f"system:{INSTRUCTION};user:1+1?;"


def test_own_prompts_are_those_of_the_data(by_bytes, monkeypatch):
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    template = "{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}>"
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", template)
    said = {"system": "Think.", "user": "1 + 1?"}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    row = {"question": "1+1?", "answer": "2"}
    rows = [row | {"messages": json.dumps(messages)}, row]
    settings = {"template": "own", "max_prompt_tokens": 40, "shuffle": False}
    stream = problems(by_bytes, rows, **settings)
    prompts = [by_bytes.decode(problem.prompt) for problem in next(stream)[:2]]
    assert prompts == ["[system]Think.[user]1 + 1?>", "[user]1+1?>"]


def test_held_out_takes_the_first_in_order_and_leaves_none_out(by_bytes):
    def take(limit, source):
        found = streams.held_out(source, by_bytes, limit=limit, **PROBLEM_ARGS)
        return [int(problem.answer) for problem in found]

    fitting = [record for record in MIXED if int(record["answer"]) in FITTING]
    assert take(4, fitting) == FITTING[:4]
    assert take(100, fitting) == FITTING
    with pytest.raises(ValueError, match="rollout.max_prompt_tokens=20: .* problem 1 "):
        take(4, MIXED)
    with pytest.raises(ValueError, match="eval.problems=4"):
        take(4, [])


# --- real data -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("gsm8k_train", 7473), ("dapo_math_17k", 17917)]
)
def test_real_problems_have_integer_answers(name, size):
    source = open_source(shared(f"{name}.jsonl"), "train", seed=0)
    assert len(source) == size
    assert all(r["answer"].removeprefix("-").isdigit() for r in source)


def test_real_traces(by_bytes):
    name = shared("parallel_gsm8k_sample.jsonl")
    source = open_source(name, "train", seed=0, traces=True)
    args = {"max_prompt_tokens": 2_000, "max_response_tokens": 10_000}
    stream = traces(by_bytes, source, **args, epochs=1, batch_size=500)
    kept = next(stream)
    assert len(source) == 341
    assert len(kept) == 338
    assert stream.counts == {"kept": 338, "malformed": 3}
    assert Counter(trace.num_blocks for trace in kept)[0] == 3
