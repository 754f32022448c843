"""What docs/rewards.md says of functions and templates of the user: it is run here."""

import dataclasses
import pathlib
import re

import pytest

from pr1_jax.data import prompts
from pr1_jax.rewards import MADE_UP, Record
from pr1_jax.workers.own import OwnFunction

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGE = (ROOT / "docs" / "rewards.md").read_text()
WRONG = dataclasses.replace(
    MADE_UP,
    response="so far so good so far so good 7, no: 26 Final Answer: 6,5",
    answer="6,5",
    verdict="incorrect",
    paths=(("a = 1", "a = 1"), ("a", "b")),
    num_blocks=2,
    total_tokens=500,
    sequential_steps=24,
)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def of_page(number, tmp_path):
    """The file that holds one of the page's functions."""
    file = tmp_path / "mine.py"
    file.write_text(blocks("python")[number])
    return file


def asked(file, name, kind="reward"):
    """What a function says of a right response, and of `WRONG`."""
    given = f"{file}:{name}", kind
    function = OwnFunction("reward.function", *given, limit_sec=30, size=1)
    function.load()
    ask = function.score if kind == "reward" else function.verify
    return [ask(record) for record in (MADE_UP, WRONG)]


def test_functions_of_the_page(tmp_path):
    score, adapted, verify = (of_page(n, tmp_path / str(n)) for n in _folders(tmp_path))
    right, wrong = asked(score, "score")
    assert right == {"length": -0.04, "twice": 0.0}
    assert wrong == {"length": -0.5, "twice": 1.0}
    assert asked(adapted, "score") == [{"": 1.0}, {"": 1.0}]
    assert asked(verify, "verify", "verifier") == [True, False]


def _folders(tmp_path):
    for n in range(len(blocks("python"))):
        (tmp_path / str(n)).mkdir()
        yield n


def test_examples():
    right, wrong = asked(EXAMPLES / "length_penalty.py", "score")
    assert right == pytest.approx({"total": -40 / 96, "steps": -32 / 96})
    assert wrong == {"total": 0.0, "steps": 0.0}
    right, wrong = asked(EXAMPLES / "regex_judge.py", "score")
    assert right == {"found": 1.0, "repeats": 0.0}
    assert wrong == {"found": 0.5, "repeats": -1.0}
    assert asked(EXAMPLES / "last_number.py", "verify", "verifier") == [True, False]
    right, _ = asked(EXAMPLES / "trl_style.py", "score")
    length = -len(MADE_UP.response) / 1000
    assert right == {"has_an_answer": 1.0, "not_too_long": length}
    assert len([*EXAMPLES.glob("*.py")]) == 4


def test_templates(by_bytes, tmp_path):
    (tmp_path / "page.jinja").write_text(*blocks("jinja"))
    labels = (" 1", " 2")
    text = lambda file: by_bytes.decode(
        prompts.prompt_tokens(
            " 1+1?\n",
            by_bytes,
            template=prompts.read_template(str(file), labels=labels),
        )
    )
    told = prompts.INSTRUCTION
    assert text(tmp_path / "page.jinja") == (
        f"{told}\nPath 1 begins with <Path> 1.\nPath 2 begins with <Path> 2.\n"
        "Question: 1+1?"
    )
    assert text(EXAMPLES / "prompt.jinja") == (
        f'{told}\n\nBegin the paths with "<Path> 1" "<Path> 2".\nQuestion: 1+1?\nAnswer:'
    )
    assert text(EXAMPLES / "question.jinja") == " 1+1?\n"


def test_tables_name_all_that_there_is(by_bytes):
    record, variables = PAGE.split("| variable | what it is |")
    record = record.split("| field | what it is |")[1].split("\n\n")[0]
    named = lambda table: re.findall(r"`([a-z_]+)`", _first_column(table))
    assert named(record) == [
        *("question", "reference", "response", "answer", "verdict", "num_blocks"),
        *("paths", "plans", "summaries", "total_tokens", "sequential_steps"),
        *("format_ok", "truncated"),
    ]
    assert {*named(record)} == {field.name for field in dataclasses.fields(Record)}
    given = prompts.variables("q", by_bytes, prompts.Template("a.jinja"))
    special = {*by_bytes.hf_tokenizer.special_tokens_map}
    listed = named(variables.split("\n\n")[0])
    assert {*listed} - {"bos_token", "eos_token"} == {*given} - special


def _first_column(table):
    return "\n".join(line.split(" | ")[0] for line in table.splitlines())
