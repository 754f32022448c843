"""Tests of pr1_jax.data.records: references, nulls, and streams of records."""

import decimal
import functools
import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from absl import logging

from pr1_jax import defaults
from pr1_jax.answers.verify import check
from pr1_jax.data import records, sources, streams
from pr1_jax.data.records import reference
from pr1_jax.data.sources import open_source
from pr1_jax.stages.experiment import Experiment
from tests.data.sources_test import BLOCK, write_array_record, write_jsonl

NAN = float("nan")
SETTINGS = {"template": "plain", "max_prompt_tokens": 60}
COLUMNS = {"question": "question,problem", "answer": "answer, given.truth"}


def write_parquet(file, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), file)


WRITERS = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "array_record": write_array_record,
}


def open_rows(tmp_path, rows, kind="jsonl", **kwargs):
    WRITERS[kind](tmp_path / f"a.{kind}", rows)
    return open_source(str(tmp_path / f"a.{kind}"), "train", seed=0, **kwargs)


# --- references ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("2 * 500 = 1000\n#### 1,000", "1000"),
        ("so 1000 #### 1,000 \n", "1000"),
        ("####\n-1,234,567.5", "-1234567.5"),
        ("#### $1,234", "$1234"),
        ("#### −1,234%", "−1234%"),
        ("#### 12", "12"),
        ("#### 1,23", "1,23"),
        ("#### 0,123", "0,123"),
        ("#### 1,2345", "1,2345"),
        ("#### 1,234,5", "1,234,5"),
        ("#### 1, 234", "1, 234"),
        ("#### (1,2)", "(1,2)"),
        ("#### (1,000)", "(1,000)"),
        ("so\n#### 1, 2", "1, 2"),
        ("#### [2, 5)", "[2, 5)"),
        ("#### 1,200 apples", "1,200 apples"),
        ("#### x = 1,000", "x = 1,000"),
        ("#### First\na\n#### 1,000", "1000"),
        ("1,000", "1,000"),
        ("##### 1,000", "##### 1,000"),
        ("so\r\n#### 1,000\r\n", "1000"),
        ("so\n\n#### Answer\n1,000", "1000"),
        ("#### Answer\r\n\r\n(1,2)\r\n", "(1,2)"),
        ("### **Final Answer:**\n1, 2\n", "1, 2"),
        ("#### Answer\nso\n#### The answer:\n3", "3"),
        ("#### Answer\nIt is 5.\nOr 6.", "#### Answer\nIt is 5.\nOr 6."),
        ("#### Answer 5\n6", "#### Answer 5\n6"),
        ("#### Answer\n- 5", "#### Answer\n- 5"),
        ("#### Answer\n1. 5", "#### Answer\n1. 5"),
        ("#### Answer\n-5", "-5"),
        ("#### ", ""),
    ],
)
def test_only_a_plain_number_behind_hashes_loses_its_separators(answer, wanted):
    assert reference(answer) == wanted


@pytest.mark.parametrize(
    "answer",
    [
        "#### Answer\nIt is \\boxed{(3, 4)}.",
        "#### Step 1\nx\n#### Step 2\nSo \\boxed{(3, 4)}.",
        "### Answer\n\\boxed{(3, 4)}",
    ],
)
def test_a_heading_is_no_mark_of_the_reference(answer):
    assert reference(answer) == answer
    assert check("Final Answer: (3,4)", reference(answer)).verdict == "correct"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("4", "4"),
        (b"4", "4"),
        (["4"], "4"),
        ([4], "4"),
        (np.array([b"4"], object), "4"),  # as tensorflow-datasets has it
        (np.int64(4), "4"),
        (decimal.Decimal("4.50"), "4.50"),
        (["3", "4"], "unreadable"),
        ([None], "no_answer"),
        (np.array([]), "no_answer"),
        (np.float32(NAN), "no_answer"),
        ({}, "no_answer"),
        ('[{"role": "user"}]', "unreadable"),
        ('["34"]', '["34"]'),
    ],
)
def test_what_is_text_in_a_column(value, text):
    columns = {field: [field] for field in ("question", "answer", "response")}
    read = functools.partial(records.read_record, columns=columns, traces=False)
    row = {"question": "q", "answer": value}, "here"
    try:
        found = read(row)["answer"]
    except sources.Dropped as drop:
        found = drop.reason
    assert found == text


# --- nulls ---------------------------------------------------------------------------

WHOLE = {"question": "q", "answer": "1"}
BROKEN = {  # what stands in a record, and why it is dropped
    "null_question": ({"question": None}, "no_question", "'question' is null"),
    "blank_question": ({"question": " \n"}, "no_question", "'question' is blank"),
    "null_answer": ({"answer": None}, "no_answer", "'answer' is null"),
    "blank_answer": ({"answer": " "}, "no_answer", "'answer' is blank"),
    "empty_box": ({"answer": r"$\boxed{ }$"}, "no_answer", r"'answer' is"),
    "empty_list": ({"answer": '[""]'}, "no_answer", r"'answer' is"),
    "invisible_answer": ({"answer": "\ufeff\u200b"}, "no_answer", "'answer' is blank"),
    "invisible_behind": ({"answer": "a\n#### \u200b"}, "no_answer", "follows ####"),
    "empty_question": ({"question": {}}, "no_question", "'question' is empty"),
    "bare_hashes": ({"answer": "#### "}, "no_answer", "nothing follows ####"),
    "wrong_type": ({"answer": {"x": "1"}}, "unreadable", "'answer' is dict"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_record_is_dropped_counted_and_named(
    tmp_path, by_bytes, monkeypatch, kind, name
):
    broken, reason, words = BROKEN[name]
    if kind == "parquet" and name in ("wrong_type", "empty_question"):
        pytest.skip("a column of a table has one type")
    rows = [WHOLE | {"question": f"{i}"} for i in range(5)]
    rows[2] |= broken
    place = f"a.{kind}:3: " if kind == "jsonl" else f"a.{kind} row 3 (counted from 1): "
    source = open_rows(tmp_path, rows, kind)
    stream = streams.problem_stream(
        source, by_bytes, **SETTINGS, batch_size=4, seed=0, epochs=1
    )
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *x: lines.append(text % x))
    kept = sorted(problem.question for problem in next(stream))
    assert kept == ["0", "1", "3", "4"] == [row["question"] for row in source]
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.counts == {"kept": 4, reason: 1}
    assert stream.summary == f"kept 4 of 5 records: 1 {reason.replace('_', ' ')}"
    assert place in lines[0] and words in lines[0] and lines[1] == stream.summary
    held_out = streams.held_out(source, by_bytes, **SETTINGS, limit=3)
    assert [problem.question for problem in held_out] == ["0", "1", "3"]
    assert place in lines[2] and "kept 3 of 4 records: 1 " in lines[2]
    with pytest.raises(ValueError) as error:  # of rows that are read later, later
        [*open_rows(tmp_path, rows, kind, strict=True)]
    assert place in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "q", "ans', "a.jsonl:2: not JSON"),
        ("[1]", "a.jsonl:2: not a JSON object"),
        ('{"question": "q"}', "a.jsonl:2 has no column 'answer'"),
        (r'{"question": "\ud83d", "answer": "1"}', "a.jsonl:2: the question holds"),
    ],
)
def test_a_broken_line_is_dropped_and_counted(tmp_path, by_bytes, line, words):
    whole = json.dumps(WHOLE)
    (tmp_path / "a.jsonl").write_text(f"{whole}\n{line}\n{whole}\n")
    source = open_source(str(tmp_path / "a.jsonl"), "train", seed=0)
    assert len(source) == 3 and [*source] == [WHOLE, WHOLE]
    with pytest.raises(ValueError, match=words):
        source[1]
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path / "a.jsonl"), "train", seed=0, strict=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_of_several_columns_the_first_that_holds_something_counts(tmp_path, kind):
    rows = [
        {"question": "a", "problem": None, "answer": "1", "given": None},
        {"question": None, "problem": "b", "answer": None, "given": {"truth": "2"}},
        {"question": "", "problem": "c", "answer": " ", "given": {"truth": "3"}},
        {"question": "d", "problem": "no", "answer": "4", "given": {"truth": "no"}},
    ]
    source = open_rows(tmp_path, rows, kind, columns=COLUMNS, strict=True)
    found = [tuple(source[i].values()) for i in range(len(source))]
    assert found == [("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")]


def test_a_column_inside_one_that_is_null_is_null(tmp_path):
    rows = [WHOLE, {"question": "q", "given": None}]
    source = open_rows(tmp_path, rows, columns=COLUMNS)
    with pytest.raises(sources.Dropped, match=r"a.jsonl:2: 'given.truth' is null"):
        source[1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nan_is_null_and_nan_as_a_word_is_not(tmp_path, kind):
    rows = [{"question": "q", "answer": x} for x in (1.5, NAN)]
    assert [r["answer"] for r in open_rows(tmp_path, rows, kind)] == ["1.5"]
    rows = [{"question": "q", "answer": "nan"}]
    assert [r["answer"] for r in open_rows(tmp_path, rows, kind)] == ["nan"]
    rows = [{"question": "q", "answer": NAN, "given": {"truth": "2"}}]
    source = open_rows(tmp_path, rows, kind, columns=COLUMNS)
    assert [r["answer"] for r in source] == ["2"]


def test_traces_without_a_response_are_dropped(tmp_path, by_bytes):
    rows = [{"question": "q", "response": x} for x in ("", None, 7, BLOCK, [])]
    rows += [{"question": "q"}, {"question": "q", "response": BLOCK, "answer": None}]
    stream = streams.trace_stream(
        open_rows(tmp_path, rows, traces=True),
        by_bytes,
        variant="structured",
        max_response_tokens=60,
        **SETTINGS,
        batch_size=9,
        seed=0,
        epochs=1,
    )
    texts = Counter(by_bytes.decode(trace.tokens) for trace in next(stream))
    assert texts == {"7": 1, BLOCK: 2}
    assert stream.counts == {"kept": 3, "no_response": 4}


@pytest.mark.parametrize("kind", WRITERS)
def test_data_of_which_hardly_a_record_is_of_use_are_refused(tmp_path, kind):
    rows = [{"question": "q", "answer": None} for _ in range(20)]
    with pytest.raises(ValueError, match=r"0 of 20 records .*'answer' is null"):
        open_rows(tmp_path, rows, kind)
    rows[19] = WHOLE
    if kind != "array_record":  # of which the first records alone are read at once
        with pytest.raises(ValueError, match=r"1 of 20 records .*'answer' is null"):
            open_rows(tmp_path, rows, kind)
    rows[18] = WHOLE
    assert [*open_rows(tmp_path, rows, kind)] == [WHOLE] * 2


def test_streams_of_data_with_broken_records_resume_and_shard_exactly(
    tmp_path, by_bytes
):
    rows = [
        WHOLE | ({"answer": None} if i % 3 == 0 else {"question": f"{i}"})
        for i in range(20)
    ]
    source = open_rows(tmp_path, rows)

    def open_stream(**kwargs):
        settings = SETTINGS | {"batch_size": 4, "seed": 0} | kwargs
        return streams.problem_stream(source, by_bytes, **settings)

    take = lambda stream, n: [
        [problem.question for problem in batch] for batch in itertools.islice(stream, n)
    ]
    whole = open_stream()
    expected = take(whole, 9)
    assert whole.counts["no_answer"] > 7
    for stop in (1, 4):
        stopped, resumed = open_stream(), open_stream()
        take(stopped, stop)
        resumed.set_state(json.loads(json.dumps(stopped.get_state())))
        assert resumed.counts == stopped.counts
        assert take(resumed, 9 - stop) == expected[stop:]
        assert resumed.counts == whole.counts
    shards = [
        open_stream(batch_size=2, process_index=i, process_count=2) for i in (0, 1)
    ]
    parts = [take(shard, 9) for shard in shards]
    assert [[batch[i::2] for batch in expected] for i in (0, 1)] == parts


def test_the_config_chooses_what_becomes_of_broken_records(tmp_path):
    config = defaults.get_config()
    nothing = dict.fromkeys(("tokenizer", "model", "vocab", "mesh", "settings"))
    made = Experiment(config=config, **nothing)
    write_jsonl(tmp_path / "a.jsonl", [WHOLE, {"messages": None, "answer": "1"}])
    name = str(tmp_path / "a.jsonl")
    assert len(made.source(name, "train", seed=0)) == 2
    config.data.strict = True
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*data.strict"):
        made.source(name, "train", seed=0)
