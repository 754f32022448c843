"""The targets of tests/programs/fuzz under hypothesis, and inputs that once were findings.

`bash tests/programs/fuzz.sh` runs them for longer and guided by coverage.
"""

import io
import json
import random
import time

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pr1_jax import tags
from pr1_jax.answers import pool, published
from pr1_jax.answers.verify import check
from tests.programs.fuzz import base, config, files, folders, targets, texts

# About so many fit into a second.
EXAMPLES = {
    **dict.fromkeys(targets.TARGETS, 200),
    "answer_check": 20,
    "array_record": 100,
    "config": 150,
}


@st.composite
def changed(draw, seeds):
    """One of the seeds with some pieces cut, overwritten or put in."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.integers(0, 8))
        content[start:end] = draw(st.binary(max_size=8))
    return bytes(content)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_any_input(name):
    target = targets.TARGETS[name]()
    for seed in target.seeds:
        target.run(seed)

    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(changed(target.seeds), st.binary(max_size=60)))
    def holds(content):
        target.run(content)

    holds()


TEXT = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    [*tags.TAGS, "user", "\ud83d", "#### 1,000", "\n"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "b", "c"]), inner)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(["question", "prompt", "answer", "a", "response", "x"])


@pytest.mark.parametrize("name", ["jsonl", "model_config", "weight_index", "tokenizer"])
def test_any_change_of_json(name):
    target, rng = targets.TARGETS[name](), random.Random(0)
    assert target.json
    for _ in range(250):
        target.run(base.change_json(rng.choice(target.seeds), rng))


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.lists(st.dictionaries(NAMES, VALUES), min_size=1, max_size=3))
def test_any_records(rows):
    files.check("jsonl", "\n".join(map(json.dumps, rows)).encode())
    try:
        table = pa.Table.from_pylist(rows)
        pa.parquet.write_table(table, file := io.BytesIO())
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return  # of values that parquet cannot hold
    files.check("parquet", file.getvalue())


@pytest.mark.parametrize(
    "unit",
    [
        *("\\boxed{", "{", "final answer: ", "<|aaa", "$", "1,", "^(", "\\sqrt(", "1 "),
        *(
            "five ",
            "half ",
            "and ",
            "is ",
            "answer is ",
            "a: ",
            "1.1",
            "1/",
            "(A) ",
            "a ",
        ),
        *("\\text{a}", "x, ", "1 and ", "12 km/h ", ". B", "\n", "\\dot 1", '"1",'),
        *("\\boxed{1}", "\\boxed{1} and ", "-\\boxed{1}/"),
    ],
)
def test_long_answers_take_linear_time(unit, monkeypatch):
    monkeypatch.setattr(pool, "_pool", texts.NoWorkers())
    long, answer = unit * (200_000 // len(unit)), unit * (1990 // len(unit))
    begin = time.process_time()
    pairs = (
        (long, "1"),
        (f"Final Answer: {long}", "1"),
        (f"Final Answer: {answer}", answer),
    )
    for response, reference in pairs:
        check(response, reference)
        published.check(response, reference)
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("unit", [*tags.TAGS, "<", "<Path> </Path>", "<Parallel"])
def test_canonical_takes_linear_time(unit):
    begin = time.process_time()
    try:
        tags.canonical(unit * (200_000 // len(unit)))
    except ValueError as error:
        assert len(str(error)) < 500
    assert time.process_time() - begin < 2


# --- Findings -----------------------------------------------------------------------


def config_input(field, value):
    """The input of `config` that overrides one field."""
    field, value = config.fields().index(field), config.VALUES.index(value)
    return bytes([0, 1, field, value])


def without_splitting(content):
    return json.dumps(json.loads(content) | {"pre_tokenizer": None}).encode()


FINDINGS = [
    # An item without a hash: TypeError.
    ("config", lambda: config_input("stages", "([],)")),
    ("config", lambda: config_input("eval.modes", "[{}]")),
    # A name too long for a file: OSError.
    ("config", lambda: config_input("checkpoint.init", "1" * 5000)),
    ("config", lambda: config_input("model.path", "\x00")),
    # No name at all: a message that named no field.
    ("config", lambda: config_input("", "1")),
    # A whole group taken away: KeyError.
    ("config", lambda: config_input("rl", "{}")),
    # Half a character: the tokenizer raised TypeError.
    ("jsonl", lambda: rb'{"question": "\ud83d", "answer": "1", "response": "x"}'),
    ("jsonl", lambda: b'{"question": "", "answer": "1", "response": "x"}'),
    # Bytes that are no text: the message named no file.
    ("parquet", lambda: files.parquet_seeds()[2]),
    # A damaged header: OSError instead of pyarrow's own.
    ("parquet", lambda: files.parquet_seeds()[0][:-20] + bytes(20)),
    ("parquet", lambda: files.parquet_seeds()[0].replace(b"\x15", b"\x00")),
    # A damaged record behind a sound first one: RuntimeError.
    ("array_record", lambda: files.array_record_seeds()[-1].replace(b"1+1", b"1-1")),
    # Weights named by a path, and an index of another kind: AttributeError.
    ("weight_index", lambda: folders.INDEX_SEEDS[1]),
    ("weight_index", lambda: folders.INDEX_SEEDS[2]),
    ("weight_index", lambda: b'{"weight_map": "a.safetensors"}'),
    # Fields of the wrong kind: TypeError, ZeroDivisionError.
    ("model_config", lambda: b'{"model_type": "llama", "num_attention_heads": 0}'),
    ("model_config", lambda: b'{"model_type": "llama", "rope_scaling": [1]}'),
    ("model_config", lambda: b'{"model_type": "llama", "layer_types": [[]]}'),
    # Words without a rule to split at: AttributeError.
    ("tokenizer", lambda: without_splitting(folders.tokenizer_seeds()[0])),
    # A vocabulary without its pieces: bare Exception.
    ("tokenizer", lambda: folders.tokenizer_seeds()[0].replace(b"</Path>", b"x")),
]


@pytest.mark.parametrize(("name", "content"), FINDINGS)
def test_findings_stay_fixed(name, content):
    targets.TARGETS[name]().run(content())
