"""Targets that read files: data of three kinds."""

import functools
import io
import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pr1_jax.data import chats, rows, sources, streams, tokenizer
from tests.programs.fuzz.base import folder, one_line


@functools.cache
def byte_tokenizer() -> tokenizer.Tokenizer:
    """A tokenizer whose tokens are bytes and tags."""
    import transformers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast
    return tokenizer.Tokenizer(fast(tokenizer_object=backend, eos_token="<|end|>"))


def _read_all(file: pathlib.Path) -> None:
    """Reads every record of a file, as problems and as traces."""
    for traces in (False, True):
        try:
            source = sources.open_source(
                str(file),
                "train",
                seed=0,
                columns={"question": "question,prompt", "answer": "answer,a.b"},
                traces=traces,
            )
            places = range(min(len(source), 100))
            records = [x for i in places if (x := _record(source, i, file))]
        except (ValueError, FileNotFoundError) as error:
            one_line(error, str(file))
            continue
        for record in records:
            assert all(isinstance(text, str) for text in record.values()), record
            needed = "response" if traces else "answer"
            assert record["question"].strip() and record[needed].strip(), record
            chat = json.loads(record.get("messages", "[]"))
            assert not chat or chats.question(chat) == record["question"], record
            _use(record, traces)


def _record(
    source: sources.Source, index: int, file: pathlib.Path
) -> dict[str, str] | None:
    """A record; None if it is dropped for a reason that is known."""
    try:
        return source[index]
    except rows.Dropped as drop:
        one_line(drop, str(file))
        assert drop.reason in streams.USELESS, drop.reason
        return None


def _use(record: dict[str, str], traces: bool) -> None:
    """Makes a prompt, and of a trace a trajectory, of a record; drops are fine."""
    settings = {"template": "plain", "max_prompt_tokens": 10_000}
    settings |= {"batch_size": 1, "seed": 0, "epochs": 1}
    if traces:
        settings |= {"variant": "structured", "max_response_tokens": 10_000}
    make = streams.trace_stream if traces else streams.problem_stream
    stream = make([record], byte_tokenizer(), **settings)
    try:
        (made,) = next(stream)
    except ValueError:
        assert stream.counts["kept"] == 0 and sum(stream.counts.values()) == 1
    else:
        assert not traces or made.tokens[-1] == byte_tokenizer().eos_id


def check(kind: str, content: bytes) -> None:
    """A file "jsonl" or "parquet" is records, or one line that names the file."""
    file = folder() / f"data.{kind}"
    file.write_bytes(content)
    _read_all(file)


def check_array_record(content: bytes) -> None:
    """An array_record file is records, or one line that names the file.

    Most changed bytes fail a hash of the format, so half of the inputs are the records
    of a sound file.
    """
    from array_record.python import array_record_module

    file = folder() / "data.array_record"
    if content[:1] > b"\x7f":
        head, tail = content[3:], b""
        cut = int.from_bytes(content[1:3], "little")
        head, tail = head[:cut], head[cut:]
        file.write_bytes(
            head.ljust(_BLOCK_BYTES, b"\0") + tail.ljust(_BLOCK_BYTES, b"\0")
        )
    else:
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for record in content[1:].split(b"\n"):
            writer.write(record)
        writer.close()
    _read_all(file)


_BLOCK_BYTES = 1 << 16  # of array_record
_ROWS = [
    {"question": "1+1?", "answer": "#### 2", "response": "<Parallel> Final Answer: 2"},
    {"prompt": [{"role": "user", "content": "é?"}], "a": {"b": "3"}, "response": "x"},
]
_SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "#### (1,2)"}]


def jsonl_seeds() -> list[bytes]:
    """JSON lines, and each of them alone."""
    block = "<Parallel><Path>a</Path><Path>b</Path></Parallel>\n<Summary>s</Summary>"
    made = [*_ROWS, {"question": "q", "answer": 1e3, "response": block}]
    made += [{"question": None, "prompt": _SHAREGPT, "answer": float("nan")}]
    made += [{"prompt": json.dumps(_SHAREGPT), "answer": "#### Answer\n(1,2)"}]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(made)]
    return [line.encode() for line in ("\n".join(lines), *lines, '{"question": "\\ud8')]


def parquet_seeds() -> list[bytes]:
    """Small files, of three compressions."""
    import pyarrow as pa
    import pyarrow.parquet

    tables = [
        pa.Table.from_pylist([_ROWS[0]]),
        pa.Table.from_pylist([_ROWS[1]] * 2),
        pa.table({"question": [b"\xff\xfe"], "answer": [1.5]}),
    ]
    seeds = []
    for table, compression in zip(tables, ("none", "snappy", "zstd")):
        pa.parquet.write_table(table, made := io.BytesIO(), compression=compression)
        seeds.append(made.getvalue())
    return seeds


def array_record_seeds() -> list[bytes]:
    """Records for a sound file, and whole files without their padding."""
    from array_record.python import array_record_module

    file, seeds = folder() / "seed", [b"\0" + seed for seed in jsonl_seeds()]
    for options in ("group_size:1", "group_size:1,uncompressed"):
        writer = array_record_module.ArrayRecordWriter(str(file), options)
        for row in _ROWS:
            writer.write(json.dumps(row).encode())
        writer.close()
        whole = file.read_bytes()
        head, tail = (
            part.rstrip(b"\0") for part in (whole[:_BLOCK_BYTES], whole[_BLOCK_BYTES:])
        )
        seeds.append(b"\xff" + len(head).to_bytes(2, "little") + head + tail)
    return seeds
