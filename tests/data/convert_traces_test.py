"""The command that converts traces of other systems: what it reads, writes and says."""

import json

import pytest

from pr1_jax.data import convert_traces, sources
from pr1_jax.system import cli

OUTLINES = "<Outlines><Outline>1: p</Outline><Outline>2: q</Outline></Outlines>"
BLOCK = f"A<Parallel>{OUTLINES}<Thread>1: a</Thread><Thread>2: b</Thread></Parallel>"
TRACE = f"<think>{BLOCK} So.</think>\\boxed{{0}}"
PLANS = "A<Parallel><Plan>p</Plan><Plan>q</Plan>"
PLANNED = f"{PLANS}<Path> a</Path><Path> b</Path></Parallel>\n<Summary>So.</Summary>\n\n\\boxed{{0}}"


def command(monkeypatch, *argv, **flags):
    defaults = {
        "shape": "threadweaver",
        "planned": True,
        "flatten": False,
        "needs_block": True,
        "question": "",
        "response": "",
        "answer": "",
    }
    for name, value in (defaults | flags).items():
        flag = type("Flag", (), {"value": value, "name": name})
        monkeypatch.setattr(convert_traces, f"_{name.upper()}", flag, raising=False)
    convert_traces.main(["convert_traces", *map(str, argv)])


def test_the_command_writes_records_for_sft(tmp_path, monkeypatch, capsys):
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    said = {"role": "assistant", "content": TRACE}
    rows = [
        {"messages": [*asked, said], "answer": "0"},
        {"question": "two", "response": BLOCK + "So."},
        {"question": "three", "response": "no block"},
        {"question": "four", "response": BLOCK},
        {"question": "five", "response": BLOCK},
        {"question": "six"},
    ]
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(monkeypatch, file, out=str(out))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"2 traces of 6 records: {out}"
    assert printed[1].split() == ["kept", "2", "33.3", "%"]
    assert printed[2].split() == ["no_summary", "2", "33.3", "%"]
    assert printed[3].strip().startswith("record 4: <Parallel> at 1: it has no")
    assert {line.split()[0] for line in printed[4::2]} == {"no_block", "no_response"}
    first, second = sources.open_source(str(out), "train", seed=0, traces=True)
    assert first["question"] == "q" and json.loads(first["messages"]) == asked
    assert first["response"] == PLANNED and first["answer"] == "0"
    assert second["question"] == "two" and second["response"].startswith("A<Parallel>")


def test_a_response_may_stand_in_several_columns(tmp_path, monkeypatch):
    thinking = f"<think>{BLOCK.replace('b<', f'b {BLOCK} c<')} So.</think>"
    row = {"question": "q", "thinking": thinking, "attempt": "\\boxed{8}"}
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps(row))
    columns = {"response": "thinking+attempt", "flatten": True}
    command(monkeypatch, file, out=str(out), **columns)
    made = json.loads(out.read_text())
    inside = "b A\n1: p\n2: q\n1: a\n2: b c"
    paths = f"<Path> a</Path><Path> {inside}</Path></Parallel>\n<Summary>So.</Summary>"
    expected = f"{PLANS}{paths}\n\n\\boxed{{8}}"
    assert made == {"question": "q", "response": expected}


def test_mistakes_of_the_command_are_one_line(tmp_path, monkeypatch):
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"question": "q", "response": BLOCK}))
    out_flag = {"out": str(out)}
    for argv, flags, said in [
        ([], out_flag, "the data to convert are missing"),
        ([file], {"out": "out.txt"}, "--out=out.txt: expected the name of a .jsonl"),
        ([file], {"out": str(file)}, "a.jsonl exists: name another file"),
        ([file], {"out": ""}, "--out is missing"),
        ([tmp_path / "b.jsonl"], out_flag, "no such file or folder"),
        ([file], {**out_flag, "response": "text"}, "has no column 'text'"),
        ([file], out_flag, "no trace can be converted: no summary, record 1: <Paral"),
    ]:
        with pytest.raises(cli.Mistake) as mistake:
            command(monkeypatch, *argv, **flags)
        assert said in mistake.value.line and not out.exists()
