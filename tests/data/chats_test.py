"""Tests of pr1_jax.data.chats: chats as questions, and as traces."""

import json

import numpy as np
import pytest

from pr1_jax import defaults
from pr1_jax.data import chats, prompts, sources, streams
from tests.data.records_test import SETTINGS, WHOLE, WRITERS, open_rows
from tests.data.sources_test import BLOCK


def chat(*turns):
    """`"u:1+1?"` is a turn of the user that says 1+1?."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    pairs = [turn.split(":", 1) for turn in turns]
    return [{"role": names[role], "content": text} for role, text in pairs]


SOLVED = chat("s:Think.", "u:1+1?", f"a:{BLOCK}")
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"])}
    | {"value": m["content"]}
    for m in SOLVED
]
PARTS = [
    m | {"content": [{"type": "text", "text": x} for x in m["content"]]} for m in SOLVED
]
TEMPLATE = "{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}>"


def prompts_of(source, tokenizer, template):
    settings = {"max_prompt_tokens": 2000, "shuffle": False, "epochs": 1}
    stream = streams.problem_stream(
        source, tokenizer, template=template, **settings, batch_size=9, seed=0
    )
    return [tokenizer.decode(problem.prompt) for problem in next(stream)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SOLVED},
        {"messages": SOLVED[:2]},
        {"conversations": SHAREGPT},
        {"conversations": SOLVED},
        {"messages": PARTS},
        {"prompt": SOLVED},
        {"messages": [*SOLVED, *chat("a:twice")]},
        {"messages": [*SOLVED, *chat("s:Bye.")]},
        {"messages": json.dumps(SOLVED, indent=1)},
        {"problem": None, "messages": SOLVED},
    ],
    ids=lambda row: f"{[*row]}-{len(row[[*row][-1]])}",
)
def test_a_chat_is_a_question_without_its_solution(
    tmp_path, by_bytes, monkeypatch, row
):
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", TEMPLATE)
    columns = defaults.get_config().data.columns
    source = open_rows(tmp_path, [row | {"answer": "2"}], columns=columns)
    assert prompts_of(source, by_bytes, "own") == ["[system]Think.[user]1+1?>"]
    assert prompts_of(source, by_bytes, "plain") == ["1+1?"]
    (asked,) = prompts_of(source, by_bytes, "chat")
    assert asked.endswith("[user]1+1?>") and "Think." not in asked
    held_out = streams.held_out(source, by_bytes, **SETTINGS, limit=1)
    assert (held_out[0].question, held_out[0].answer) == ("1+1?", "2")


@pytest.mark.parametrize(
    "names",
    [
        {"user": "User", "assistant": "Assistant", "system": "System"},
        {"user": "HUMAN", "assistant": "chatgpt"},
        {"user": "prompter", "assistant": "bard"},
        {"assistant": "AI"},
    ],
    ids=lambda names: names["assistant"],
)
def test_a_solution_is_known_under_other_names_of_the_assistant(names):
    told = [m | {"role": names.get(m["role"], m["role"])} for m in SOLVED]
    assert chats.read(told) == SOLVED
    assert chats.without_solution(chats.read(told)) == SOLVED[:2]


@pytest.mark.parametrize("traces", [False, True])
@pytest.mark.parametrize("written", [list, json.dumps])
def test_of_a_chat_that_cannot_be_read_the_message_is_named(tmp_path, traces, written):
    called = [*SOLVED[:2], {"role": "assistant", "content": None}, *SOLVED[2:]]
    rows = [{"messages": x, "answer": "2"} for x in (SOLVED, written(called))]
    source = open_rows(tmp_path, rows, traces=traces)
    with pytest.raises(sources.Dropped, match=r"a.jsonl:2: .* message 3 has no") as e:
        source[1]
    assert e.value.reason == "unreadable"


def test_earlier_turns_stay_where_the_data_make_the_prompt(
    tmp_path, by_bytes, monkeypatch
):
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", TEMPLATE)
    talk = chat("u:1+1?", "a:2", "u:And 2+2?", "a:4")
    source = open_rows(tmp_path, [{"messages": talk, "answer": "4"}])
    assert prompts_of(source, by_bytes, "own") == [
        "[user]1+1?[assistant]2[user]And 2+2?>"
    ]
    assert prompts_of(source, by_bytes, "plain") == ["And 2+2?"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("a:It is 2."), "no_question"),
        (chat("s:Think.", "a:It is 2."), "no_question"),
        (chat("u: ", "a:It is 2."), "no_question"),
        ([{"role": "user"}], "unreadable"),
        ([{"role": "user", "content": None}], "unreadable"),
        ([{"role": "user", "content": [{"type": "image"}]}], "unreadable"),
        (["1+1?", "2"], "unreadable"),
        ([], "no_question"),
    ],
)
def test_chats_that_ask_nothing_are_dropped(tmp_path, messages, reason):
    rows = [{"messages": messages, "answer": "2"}, WHOLE]
    source = open_rows(tmp_path, rows)
    with pytest.raises(sources.Dropped) as drop:
        source[0]
    assert drop.value.reason == reason and "a.jsonl:1" in str(drop.value)


def test_a_chat_that_the_template_refuses_is_dropped(tmp_path, by_bytes, monkeypatch):
    refuse = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    )
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", refuse + TEMPLATE)
    rows = [{"messages": x, "answer": "2"} for x in (SOLVED, SOLVED[1:])]
    stream = streams.problem_stream(
        open_rows(tmp_path, rows),
        by_bytes,
        template="own",
        max_prompt_tokens=60,
        batch_size=2,
        seed=0,
        epochs=1,
    )
    assert [by_bytes.decode(p.prompt) for p in next(stream)] == ["[user]1+1?>"]
    assert stream.counts == {"kept": 1, "refused_by_template": 1}
    with pytest.raises(ValueError, match="problem 0: .*does not take messages"):
        streams.held_out(
            open_rows(tmp_path, rows),
            by_bytes,
            template="own",
            max_prompt_tokens=60,
            limit=2,
        )
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", "{{ messages.x.y }}")
    with pytest.raises(ValueError, match="does not take messages"):
        prompts_of(open_rows(tmp_path, rows), by_bytes, "own")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": SOLVED},
        {"conversations": SHAREGPT},
        {"prompt": SOLVED[:2], "response": BLOCK},
        {"messages": SOLVED, "response": BLOCK},
        {"prompt": SOLVED[:2], "response": SOLVED[2:]},
        {"prompt": "1+1?", "messages": SOLVED},
        {"messages": [*SOLVED, *chat("u:Thanks")]},
        {"messages": SOLVED, "response": None},
    ],
    ids=lambda row: f"{[*row]}-{len(row[[*row][-1]] or '')}",
)
def test_the_last_turn_of_the_assistant_is_the_trace(
    tmp_path, by_bytes, monkeypatch, kind, row
):
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", TEMPLATE)
    columns = defaults.get_config().data.columns
    source = open_rows(tmp_path, [row], kind, columns=columns, traces=True)
    for template, asked in (("own", "[system]Think.[user]1+1?>"), ("plain", "1+1?")):
        (trace,) = next(
            streams.trace_stream(
                source,
                by_bytes,
                variant="structured",
                max_response_tokens=60,
                **SETTINGS | {"template": template},
                batch_size=1,
                seed=0,
            )
        )
        assert by_bytes.decode(trace.prompt) == asked
        assert by_bytes.decode(trace.tokens) == BLOCK


def test_of_several_turns_the_last_is_the_trace(tmp_path):
    talk = chat("u:1+1?", "a:2", "u:And 2+2?", f"a:{BLOCK}")
    (record,) = open_rows(tmp_path, [{"messages": talk}], traces=True)
    assert json.loads(record.pop("messages")) == talk[:3]
    assert record == {"question": "And 2+2?", "answer": "", "response": BLOCK}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SOLVED[:2]},
        {"messages": [*SOLVED[:2], *chat("a: ")]},
        {"messages": SOLVED[:2], "response": SOLVED[:2]},
    ],
    ids=["none", "blank", "response"],
)
def test_a_chat_without_a_solution_is_no_trace(tmp_path, row):
    source = open_rows(tmp_path, [{"messages": SOLVED}, row], traces=True)
    with pytest.raises(sources.Dropped, match="a.jsonl:2: the chat in .* has no") as e:
        source[1]
    assert e.value.reason == "no_response"


def test_a_chat_may_come_as_an_array_or_with_the_columns_of_both_kinds():
    both = [{"role": None, "content": None} | message for message in SHAREGPT]
    assert chats.read(both) == SOLVED
    assert chats.read(np.array(SOLVED, object)) == SOLVED
    assert chats.read({"role": "user", "content": "q"}) == []
    assert chats.read("user") == chats.read(None) == []


def test_a_prompt_ends_before_the_solution_whoever_asks(by_bytes, monkeypatch):
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", TEMPLATE)
    ask = lambda messages: by_bytes.decode(
        prompts.prompt_tokens("q", by_bytes, template="own", messages=messages)
    )
    assert ask(SOLVED) == ask(SOLVED[:2]) == "[system]Think.[user]1+1?>"
    assert ask(chat("u:a", "a:b", "t:c")) == "[user]a[assistant]b[tool]c>"
    assert ask(SOLVED[2:]) == ask(None) == "[user]q>"
