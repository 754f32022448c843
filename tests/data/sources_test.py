"""Tests of pr1_jax.sources: files, columns, tensorflow-datasets and the hub."""

import itertools
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from pr1_jax.data import sources, streams
from pr1_jax.data.sources import open_source

BLOCK = "<Parallel><Path>a</Path><Path>b</Path></Parallel>\n<Summary>s</Summary>"

ROWS = [
    {"problem": "one\u2028two", "answer": "So 2*500=1000.\n#### 1,000", "level": 3},
    {"problem": "three", "answer": 7, "level": 1},
]
READ = [
    {"question": "one\u2028two", "answer": "1000"},
    {"question": "three", "answer": "7"},
]


def write_jsonl(file, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def write_parquet(file, rows):
    rows = [{**row, "answer": str(row["answer"])} for row in rows]
    pa.parquet.write_table(pa.Table.from_pylist(rows), file)


def write_array_record(file, rows):
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


WRITERS = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "array_record": write_array_record,
}


def open_file(path, **kwargs):
    kwargs = {"columns": {"question": "problem"}, **kwargs}
    return open_source(str(path), "train", seed=0, **kwargs)


@pytest.mark.parametrize("kind", WRITERS)
def test_local_files_globs_and_folders(tmp_path, kind):
    for i in range(2):
        WRITERS[kind](tmp_path / f"part.{kind}-{i:05}-of-00002", ROWS)
    (tmp_path / "README.md").write_text("not data")
    one = open_file(tmp_path / f"part.{kind}-00000-of-00002")
    assert [one[i] for i in range(len(one))] == READ
    for name in (tmp_path, tmp_path / "part*"):
        source = open_file(name)
        assert [source[i] for i in range(len(source))] == READ * 2
    message = r"part.* no column 'question'.*\['answer', 'level', 'problem'\]"
    with pytest.raises(ValueError, match=message):
        open_file(tmp_path / f"part.{kind}-00000-of-00002", columns=None)


def test_traces_may_lack_answers(tmp_path, by_bytes):
    write_jsonl(tmp_path / "t.jsonl", [{"question": "q", "text": BLOCK}])
    source = open_file(tmp_path / "t.jsonl", columns={"response": "text"}, traces=True)
    assert source[0] == {"question": "q", "answer": "", "response": BLOCK}
    stream = streams.trace_stream(
        source,
        by_bytes,
        template="plain",
        variant="structured",
        max_prompt_tokens=20,
        max_response_tokens=40,
        batch_size=1,
        seed=0,
    )
    (trace,) = next(stream)
    assert by_bytes.decode(trace.tokens) == BLOCK


VERL = [  # as the published reinforcement learning data come
    {"prompt": [{"role": "user", "content": q}], "reward_model": {"ground_truth": a}}
    for q, a in [("1 + 1?", "2"), ("2 + 2?", ["4"])]
]


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
def test_columns_inside_others_and_chat_messages(tmp_path, kind):
    WRITERS[kind](tmp_path / f"v.{kind}", VERL)
    columns = {"question": "problem,prompt", "answer": "x,reward_model.ground_truth"}
    source = open_file(tmp_path / f"v.{kind}", columns=columns)
    found = [source[i] for i in range(len(source))]
    read = [(r["question"], r["answer"]) for r in found]
    assert read == [("1 + 1?", "2"), ("2 + 2?", "4")]
    assert json.loads(found[0]["messages"]) == VERL[0]["prompt"]
    columns["answer"] = "x,reward_model.y"
    with pytest.raises(ValueError, match="no column 'x' or 'reward_model.y' for 'ans"):
        open_file(tmp_path / f"v.{kind}", columns=columns)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_filter_chooses_records(tmp_path, kind):
    rows = [{"problem": str(i), "answer": i, "set": "ab"[i % 2]} for i in range(5)]
    WRITERS[kind](tmp_path / f"f.{kind}", rows)
    chosen = open_file(f"{tmp_path}/f.{kind}#set=b")
    assert [r["answer"] for r in chosen] == ["1", "3"]
    for wrong in ("set=c", "level=b"):
        with pytest.raises(ValueError, match=f"#{wrong} holds no records"):
            open_file(f"{tmp_path}/f.{kind}#{wrong}")


PRETTY = json.dumps([{"problem": "q", "answer": 1}] * 20, indent=1).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\xff\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", b"1", "a.jsonl:1: not a JSON object"),
        (
            "a.jsonl",
            b'[{"problem": "q"}]',
            "a.jsonl is a JSON array, expected one JSON",
        ),
        (
            "a.jsonl",
            PRETTY,
            "a.jsonl is a JSON array, expected one JSON object a line: ",
        ),
        ("a.jsonl", PRETTY[2:-2], "a.jsonl has a JSON object over several lines, exp"),
        ("a.jsonl", b'{"problem": null, "answer": 1}', "1: 'problem' is null"),
        ("a.jsonl", b'{"problem": {"a": 1}, "answer": 1}', "'problem' is dict"),
        ("a.jsonl", b"\n", "holds no records"),
        ("a.parquet", b"PAR1", "cannot read .*a.parquet"),
        ("a.csv", b"problem,answer\n", "a.csv is a .csv file, expected one JSON obj"),
        ("a.json", b"", "a.json is a .json file, expected one JSON object a line: "),
        ("a.json", PRETTY, "a.json is a JSON array, expected one JSON object a line: "),
        (
            "a.json",
            b'{"problem": "q"}\n{"pro',
            "a.json has one JSON object a line: name",
        ),
        ("a.txt", b"q\n", "a.txt has no .jsonl, .parquet or .array_record file"),
    ],
)
def test_bad_files_give_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_file(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_the_way_out_of_another_format_makes_what_is_read(tmp_path, name):
    is_csv = name.endswith("csv")
    content = b'problem,answer\nq,1\n"r, s",2\n' if is_csv else PRETTY
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_file(tmp_path)
    command = str(error.value).partition("line: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=tmp_path)
    made = open_file(tmp_path / "NEW.jsonl")
    assert [r["answer"] for r in made] == (["1", "2"] if is_csv else ["1"] * 20)


def test_a_broken_first_line_is_dropped_alone(tmp_path):
    lines = [json.dumps(row) for row in ROWS * 5]
    for first in ("[", '{"problem": "q",', "[1]", '["a"'):
        (tmp_path / "a.jsonl").write_text("\n".join([first, *lines]))
        assert len([*open_file(tmp_path / "a.jsonl")]) == len(lines), first


def test_wrong_names_give_one_line(tmp_path):
    with pytest.raises(ValueError, match="hf:a/b/c.csv is a .csv file, expected one"):
        open_source("hf:a/b/c.csv", "train", seed=0)
    with pytest.raises(FileNotFoundError, match="no data at"):
        open_file(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"data.columns has \['prompt'\]"):
        open_file(tmp_path, columns={"prompt": "problem"})
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_array_record(tmp_path / "a.array_record", ROWS)
    with pytest.raises(ValueError, match="name one kind"):
        open_file(tmp_path)


with tfds.core.registered.skip_registration():

    class Gsm8k(tfds.core.GeneratorBasedBuilder):
        """A small stand-in for the dataset of that name."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = {name: tfds.features.Text() for name in ("question", "answer")}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(text)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"question": f"q{i}", "answer": f"so\n#### 1,00{i}"}


def test_prepared_tfds_is_read_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not prepared .*builder.'gsm8k'"):
        open_source("tfds:gsm8k", "train", seed=0)
    assert not any(tmp_path.rglob("*.array_record*"))
    Gsm8k(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = open_source("tfds:gsm8k", "train", seed=0)
    rows = sorted(source[i]["answer"] for i in range(len(source)))
    assert rows == [f"100{i}" for i in range(5)]
    for split in ("test", "eval"):  # held-out problems are those of `test`
        with pytest.raises(ValueError, match="cannot open tfds:gsm8k: .*'test'"):
            open_source("tfds:gsm8k", split, seed=0)
    assert len(open_source("tfds:gsm8k@train", "eval", seed=0)) == 5


def test_hub_data_is_that_of_the_split_and_folder(tmp_path, monkeypatch):
    def snapshot_download(repo, *, repo_type, allow_patterns):
        if repo != "owner/name":
            raise OSError("401 Client Error\nsecond line")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for folder, split in itertools.product(("main", "other"), ("train", "test")):
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [{"question": folder, "answer": split}]
        write_parquet(tmp_path / folder / f"{split}-00000-of-00001.parquet", rows)
    read = lambda name, split: open_source(f"hf:{name}", split, seed=0)
    assert read("owner/name/main", "test") == [{"question": "main", "answer": "test"}]
    assert read("owner/name/main", "eval") == read("owner/name/main", "test")
    assert read("owner/name/main@train", "eval") == read("owner/name/main", "train")
    file = "owner/name/other/train-00000-of-00001.parquet"
    assert read(file, "any") == [{"question": "other", "answer": "train"}]
    with pytest.raises(ValueError, match=r"name one: \['main', 'other'\]"):
        read("owner/name", "train")
    with pytest.raises(ValueError, match="split 'dev'"):
        read("owner/name", "dev")
    with pytest.raises(ValueError, match="hf:owner/gated: 401 Client Error$"):
        read("owner/gated", "train")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("embedded:hard", {"hard": ("embedded:hard", 2)}),
        ("/data/mine.jsonl@4", {"mine": ("/data/mine.jsonl", 4)}),
        ("a=tfds:gsm8k@16, b=f.jsonl", {"a": ("tfds:gsm8k", 16), "b": ("f.jsonl", 2)}),
        ("hf:o/n@train@8", {"n": ("hf:o/n@train", 8)}),
        ("x=f#level=3,4@1", {"x": ("f#level=3,4", 1)}),  # not a comma between two
        ("data/*.jsonl#set=b", {"_": ("data/*.jsonl#set=b", 2)}),
    ],
)
def test_benchmarks_are_named_with_their_samples(given, found):
    assert sources.benchmarks(given, samples=2) == found
