"""What is fuzzed: one function of bytes a target, with what must hold for any input.

A target returns if all is well and raises for a finding; `TARGETS` holds them by name,
with inputs to start from. `run.py` drives them with a coverage-guided fuzzer and
`fuzz_test.py` with hypothesis. None of them reaches a network.
"""

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import safetensors.numpy
import tokenizers
from absl import flags
from ml_collections import config_flags
from tokenizers import decoders, models, pre_tokenizers

from pr1_jax import (
    answers,
    answers_string,
    checks,
    data,
    experiment,
    hf,
    hf_tensors,
    layout,
    main,
    sources,
    tags,
    tokenizer,
    trajectory,
)

ROOT = pathlib.Path(__file__).parents[2]
VERDICTS = (answers.CORRECT, answers.INCORRECT, answers.UNDECIDED)


@dataclasses.dataclass(frozen=True)
class Target:
    """A function under test and inputs to begin with.

    Attributes:
      run: takes any bytes; an exception that leaves it is a finding.
      seeds: valid inputs, or nearly so.
      limit_sec: CPU time of one input, more is a finding.
      json: whether inputs are lines of JSON, to be changed as such too.
    """

    run: Callable[[bytes], None]
    seeds: Sequence[bytes] = (b"",)
    limit_sec: float = 1.0
    json: bool = False


# --- Bytes to text ------------------------------------------------------------------

_TAG_PIECES = (
    *tags.TAGS,
    *("\n", " ", "a", "<", ">", "/", "<Path", "Parallel>", "</", "\u2028", "\x1f"),
)
_ANSWER_PIECES = (
    *("Final Answer:", "final answer** :", "\n", "\\boxed{", "\\fbox {", "{", "}"),
    *("$", "$$", "\\(", "\\)", "\\", "\\\\", "**", "`", "<|im_end|>", "<|", "|>"),
    *("0", "1", "12", "999", ".", ",", "/", "%", "-", "+", "e", "E", "_", "^", "="),
    *("\\frac{", "\\dfrac", "}{", "\\text{", "\\mathrm{", "\\sqrt", "\\pi", "\\circ"),
    *(" ", "  ", "\\,", "{,}", "\\%", "\\$", "€", "½", "²", "₈", "π", "√", "−", "٣"),
    *("x", "y=", "i", " or ", " and ", "is ", "meters", " cm", "\\pm ", "<", "\\le"),
    *("(", ")", "[", "]", "\\{", "\\}", "\\begin{cases}", "&", "\\end{cases}", ";"),
    *("\\overline{", "an ", "a ", "square", "mbox", "frac", "sqrt", "\ud800", "\x00"),
    *tags.TAGS,
)
_MAX_CHARS = 3_000


def as_text(content: bytes, pieces: Sequence[str]) -> str:
    """A text made of raw UTF-8, or of pieces, maybe of one part many times over."""
    if not content:
        return ""
    mode, rest = content[0], content[1:]
    if mode & 1:
        text = rest.decode("utf-8", "surrogateescape" if mode & 4 else "replace")
    else:
        text = "".join(pieces[byte % len(pieces)] for byte in rest)
    if mode >= 224 and text:
        third = len(text) // 3
        start, middle, end = text[:third], text[third : -third or None], text[-third:]
        times = min(4 << mode % 16, _MAX_CHARS // len(middle))
        text = start + middle * times + (end if third else "")
    return text


def _letters(text: str) -> str:
    """The tags of a text, one letter each."""
    letters = dict(zip(tags.TAGS, "PpTtSs"))
    return "".join(letters[tag] for tag in re.findall("|".join(tags.TAGS), text))


def _one_line(error: BaseException, *named: str) -> None:
    text = str(error)
    assert text.strip() and "\n" not in text, f"not one line: {text!r}"
    assert not named or any(name in text for name in named), (
        f"{text!r} names none of {named}"
    )


# --- JSON that is still JSON --------------------------------------------------------

_JSON_VALUES = (
    *(None, True, 0, -1, 1, 10**12, 1.5, "", "a", "\n", "<Path>", "\ud83d", "../x"),
    *([], {}, [[]], ["a", "b"], [["a", "b"]], {"a": 1}, {"String": ""}, {"Regex": "("}),
    *({"role": "user", "content": "a"}, {"type": "BPE", "vocab": {}, "merges": []}),
    *({"type": "Sequence", "pretokenizers": []}, {"type": "Unigram", "vocab": []}),
)


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Deletes, replaces or moves a value or a few in one of the lines of JSON."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    try:
        whole = [json.loads(lines[number])]
    except (ValueError, RecursionError):
        return content
    for _ in range(rng.randint(1, 3)):
        places = list(_places(whole))
        parent, key = rng.choice(places)
        if parent is not whole and rng.random() < 0.25:
            del parent[key]
            continue
        other, at = rng.choice(places)
        value = other[at] if rng.random() < 0.3 else rng.choice(_JSON_VALUES)
        parent[key] = json.loads(json.dumps(value))
    lines[number] = json.dumps(whole[0]).encode()
    return b"\n".join(lines)


def _places(parent):
    """Containers and keys of all values in a value."""
    keys = parent if isinstance(parent, dict) else range(len(parent))
    for key in keys:
        yield parent, key
        if isinstance(parent[key], dict | list):
            yield from _places(parent[key])


# --- Layout, format, canonical form -------------------------------------------------

_TAG_IDS = {tag: 10 + i for i, tag in enumerate(tags.TAGS)}
_SYMBOLS = dict(zip("PpTtSs", _TAG_IDS.values())) | {"n": 2, ".": 3}
_BLOCK = re.compile("P(?:T[.n]*t){2,}p[.n]S[.n]*s")
_WHOLE = re.compile(f"(?:[.n]|{_BLOCK.pattern})*")


def _positions(symbols: str, start: int) -> list[tuple[int, int, int]]:
    """Position, block and path of each symbol, read off section 2 of the spec."""
    found, at, number = [], start, 0
    index = 0
    while index < len(symbols):
        block = _BLOCK.match(symbols, index)
        if not block:
            found.append((at, 0, 0))
            at, index = at + 1, index + 1
            continue
        number += 1
        found.append((at, 0, 0))
        paths = re.findall("T[.n]*t", block.group())
        for path, text in enumerate(paths, 1):
            found += [(at + 1 + i, number, path) for i in range(len(text))]
        at += 1 + max(map(len, paths))
        rest = len(block.group()) - 1 - sum(map(len, paths))
        found += [(at + i, 0, 0) for i in range(rest)]
        at, index = at + rest, block.end()
    return found


def _sees(symbols: str, labels: Sequence[tuple[int, int, int]], q: int, k: int) -> bool:
    """Section 2: whether query q sees key k."""
    _, block, path = labels[k]
    if k > q or not block or labels[q][1:] == (block, path):
        return k <= q
    ends = [i for i, symbol in enumerate(symbols) if symbol == "p"]
    return ends[block - 1] <= q


def check_layout(content: bytes) -> None:
    """The parser accepts the grammar, nothing else, and labels it as the spec says."""
    prompt_length = content[0] % 5 if content else 0
    symbols = "".join("PpTtSsn."[byte % 8] for byte in content[1:])
    tokens = [_SYMBOLS[symbol] for symbol in symbols]
    try:
        parsed = layout.structured(tokens, _TAG_IDS, prompt_length)
    except ValueError as error:
        _one_line(error, "malformed response")
        assert not _WHOLE.fullmatch(symbols), f"{symbols} is refused: {error}"
        return
    assert _WHOLE.fullmatch(symbols), f"{symbols} is accepted"
    expected = [(i, 0, 0) for i in range(prompt_length)]
    expected += _positions(symbols, prompt_length)
    assert np.stack(parsed, axis=1).reshape(-1, 3).tolist() == [*map(list, expected)]
    if len(symbols) <= 40:
        labels = expected[prompt_length:]
        dense = layout.visible(parsed)[prompt_length:, prompt_length:]
        for q, k in np.ndindex(dense.shape):
            assert dense[q, k] == _sees(symbols, labels, q, k), (symbols, q, k)


def check_format(content: bytes) -> None:
    """The format check never raises, and finds no fault in the grammar alone."""
    text = as_text(content, _TAG_PIECES)
    faults = tags.check_format(text)
    well_formed = re.fullmatch("(?:P(?:Tt){2,}pSs)*", _letters(text))
    assert (not faults) == bool(well_formed), (text, faults)
    for fault in faults:
        named = re.match(r"(</?\w+>) at (\d+): expected ", fault)
        assert named and text.startswith(named[1], int(named[2])), fault


def check_canonical(content: bytes) -> None:
    """Canonical text is canonical, well formed, and only white space was removed."""
    text = as_text(content, _TAG_PIECES)
    try:
        found = tags.canonical(text)
    except ValueError as error:
        _one_line(error, "text has")
        stray = "stray text" in str(error)
        assert bool(tags.check_format(text)) != stray, (text, error)
        return
    assert tags.check_format(found) == [] == tags.check_format(text)
    assert tags.canonical(found) == found
    assert tags.count_blocks(found) == tags.count_blocks(text)
    assert found.replace("\n", "") in text or _letters(found) == _letters(text)
    assert "".join(found.split()) == "".join(text.split())


# --- Answers ------------------------------------------------------------------------


class NoWorkers:
    """Stands in for the worker processes: all that needs one is undecided."""

    def ask(self, answer: str, reference: str, timeout_sec: float) -> answers.Result:
        """Checks that both can be sent to a worker."""
        json.dumps([answer, reference, timeout_sec])
        return answers.Result(answers.UNDECIDED, "not asked")

    def close(self) -> None:
        """Nothing to close."""


def _response_and_reference(content: bytes) -> tuple[str, str]:
    cut = 1 + content[0] * len(content) // 256 if content else 0
    return (
        as_text(content[1:cut], _ANSWER_PIECES),
        as_text(content[cut:], _ANSWER_PIECES),
    )


def check_answer_parser(content: bytes) -> None:
    """What is decided in this process: extraction, spelling, numbers; both checkers."""
    response, reference = _response_and_reference(content)
    pool, answers._pool = answers._pool, NoWorkers()
    try:
        result = answers.check(response, reference)
        itself = answers.check(f"Final Answer: {reference}", reference)
    finally:
        answers._pool = pool
    assert result.verdict in VERDICTS and result.reason
    assert itself.verdict in VERDICTS
    found = answers.extract(response)
    assert found is None or found.strip(), (response, found)
    assert found is not None or result.verdict == answers.INCORRECT
    assert isinstance(answers_string.check(response, reference), bool)


def check_answer(content: bytes) -> None:
    """The whole check, worker process included, within its time limit."""
    response, reference = _response_and_reference(content)
    result = answers.check(response, reference, timeout_sec=1.0)
    assert result.verdict in VERDICTS and result.reason


# --- Files --------------------------------------------------------------------------


@functools.cache
def _folder() -> pathlib.Path:
    """A folder of this process, in memory where there is one."""
    shared = pathlib.Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="fuzz", dir=shared if shared.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return pathlib.Path(made)


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
            records = [source[i] for i in range(min(len(source), 100))]
        except (ValueError, FileNotFoundError) as error:
            _one_line(error, str(file))
            continue
        for record in records:
            assert all(isinstance(text, str) for text in record.values()), record
            _use(record, traces)


def _use(record: dict[str, str], traces: bool) -> None:
    """Makes a prompt, and of a trace a trajectory, of a record; drops are fine."""
    limits = {"template": "plain", "max_prompt_tokens": 10_000}
    if not traces:
        made = data._make_problem(record, byte_tokenizer(), **limits)
        assert isinstance(made, data.Problem | data._Dropped)
        return
    made = data._make_trace(
        record,
        byte_tokenizer(),
        variant="structured",
        max_response_tokens=10_000,
        **limits,
    )
    if isinstance(made, trajectory.Trajectory):
        assert made.tokens[-1] == byte_tokenizer().eos_id


def check_jsonl(content: bytes) -> None:
    """JSON lines are records, or one line that names the file."""
    file = _folder() / "data.jsonl"
    file.write_bytes(content)
    _read_all(file)


def check_parquet(content: bytes) -> None:
    """A parquet file is records, or one line that names the file."""
    file = _folder() / "data.parquet"
    file.write_bytes(content)
    _read_all(file)


def check_array_record(content: bytes) -> None:
    """An array_record file is records, or one line that names the file.

    Most changed bytes fail a hash of the format, so half of the inputs are the records
    of a sound file.
    """
    from array_record.python import array_record_module

    file = _folder() / "data.array_record"
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


def _jsonl_seeds() -> list[bytes]:
    block = "<Parallel><Path>a</Path><Path>b</Path></Parallel>\n<Summary>s</Summary>"
    rows = [*_ROWS, {"question": "q", "answer": 1e3, "response": block}]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    return [line.encode() for line in ("\n".join(lines), *lines, '{"question": "\\ud8')]


def _parquet_seeds() -> list[bytes]:
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


def _array_record_seeds() -> list[bytes]:
    from array_record.python import array_record_module

    file, seeds = _folder() / "seed", [b"\0" + seed for seed in _jsonl_seeds()]
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


# --- Model folders ------------------------------------------------------------------


def check_model_config(content: bytes) -> None:
    """config.json is a model's shape, or one line that names the file."""
    file = _folder() / "model" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    for read in (hf.read_config, hf.max_positions):
        try:
            read(file.parent)
        except ValueError as error:
            _one_line(error, str(file))


def _model_config_seeds() -> list[bytes]:
    folders = (ROOT / "tests" / "data" / "hf_reference").iterdir()
    files = (folder / "config.json" for folder in sorted(folders))
    return [file.read_bytes() for file in files if file.is_file()]


def check_weights(content: bytes) -> None:
    """model.safetensors is tensors, or one line that names the file."""
    file = _folder() / "weights" / "model.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)  # it may be mapped
    file.write_bytes(content)
    try:
        found = hf_tensors.find_tensors(file.parent)
        for name, (where, shape) in found.items():
            assert where == file
            array = hf_tensors.read_tensor(where, name)
            assert array.shape == shape
    except ValueError as error:
        _one_line(error, str(file))


def _weights_seeds() -> list[bytes]:
    arrays = {"a": np.ones((2, 3), np.float32), "b.c": np.ones(2, np.float16)}
    return [
        safetensors.numpy.save(arrays, metadata={"format": "pt"}),
        safetensors.numpy.save({"i": np.ones(2, np.int8), "e": np.ones((0, 2))}),
    ]


def check_weight_index(content: bytes) -> None:
    """An index names files of its folder, or is refused in one line that names it."""
    folder = _folder() / "index"
    if not folder.is_dir():
        folder.mkdir()
        tensor = safetensors.numpy.save({"a": np.ones(2, np.float32)})
        for name in ("a.safetensors", "../outside.safetensors"):
            (folder / name).write_bytes(tensor)
        (folder / "out.safetensors").symlink_to("../outside.safetensors")
    (folder / hf_tensors.INDEX).write_bytes(content)
    try:
        found = hf_tensors.find_tensors(folder)
    except (ValueError, FileNotFoundError) as error:
        _one_line(error, str(folder))
        return
    for file, _ in found.values():
        assert file.resolve().parent == folder.resolve(), file


_INDEX_SEEDS = [
    json.dumps({"weight_map": {"a": name}}).encode()
    for name in ("a.safetensors", "../outside.safetensors", "out.safetensors")
]


def check_tokenizer(content: bytes) -> None:
    """tokenizer.json is a tokenizer, or one line that names it."""
    folder = _folder() / "tokenizer"
    if not folder.is_dir():
        _words().save(folder)
    (folder / "tokenizer.json").write_bytes(content)
    try:
        found = tokenizer.load(folder)
        found.decode(found.encode("yes <Path>"))
    except ValueError as error:
        _one_line(error)


def _words() -> tokenizer.Tokenizer:
    return tokenizer.from_words([" yes", "\n", "a"], pattern=r" yes|[\s\S]")


def _tokenizer_seeds() -> list[bytes]:
    return [_words().hf_tokenizer.backend_tokenizer.to_str().encode()]


# --- Configs ------------------------------------------------------------------------

_CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
_VALUES = (
    *(
        "0",
        "1",
        "2",
        "3",
        "-1",
        "7",
        "1e-3",
        "0.5",
        "1.5",
        "nan",
        "inf",
        "-inf",
        "1e99",
    ),
    *("9" * 30, "1_000", "0x10", "True", "False", "None", "", "''", "a", "causal"),
    *("()", "(1,)", "(1,2)", "('rl',)", "('rl','rl')", "([],)", "[{}]", "{}", "(nan,)"),
    *("('sft', 1)", "embedded:easy", "embedded:none", "tfds:none", "no/such/file"),
    *("/etc", "../x", "a\nb", "\x00", "é", "1" * 5000, "(" * 200, "lambda: 0", "*"),
)


@functools.cache
def _fields() -> tuple[str, ...]:
    config = _parsed([f"--config={ROOT}/configs/common.py"])
    names = [name for name, _ in _leaves(config, "")]
    return (*names, "nothing", "rl.nothing", "rl", "eval.benchmarks.x.samples", "")


def _leaves(config, prefix: str):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parsed(arguments: Sequence[str]):
    """The config that `pr1_jax.main` would get from these flags."""
    values = flags.FlagValues()
    argv = ["main", *arguments]
    flag = config_flags.DEFINE_config_file(
        "config", None, lock_config=True, flag_values=values, sys_argv=argv
    )
    values(argv)
    return flag.value


def _overrides(content: bytes) -> tuple[list[str], list[str]]:
    """Flags, and the names of the fields that they set."""
    numbers = iter(content)
    config = _CONFIGS[next(numbers, 0) % len(_CONFIGS)]
    variant = ("", ":smoke", ":qwen3_4b", ":none")[next(numbers, 0) % 4]
    arguments, named = [f"--config={ROOT}/configs/{config}.py{variant}"], [variant[1:]]
    for number in numbers:
        name = _fields()[number % len(_fields())]
        chosen = next(numbers, 0)
        value = _VALUES[chosen % len(_VALUES)]
        if chosen >= 250:
            value = bytes(numbers).decode("utf-8", "replace")
        arguments.append(f"--config.{name}={value}")
        named.append(name)
        if len(named) > 6:
            break
    return arguments, named


def check_config(content: bytes) -> None:
    """A config with overrides is an experiment, or one line that names a field."""
    arguments, named = _overrides(content)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = _load(arguments)
    except SystemExit as error:
        assert error.code == 2, error
        _names_a_field(said.getvalue().strip(), named)
        return
    try:
        if config.model.path or config.checkpoint.init:
            checks.check(config)
        else:
            experiment.build(config)
    except (ValueError, FileNotFoundError) as error:
        _names_a_field(" ".join(str(error).split()), named)


def _load(arguments: Sequence[str]):
    """`main._parse_flags`, with flags of its own."""
    flags_before, config_before = main.cli.flags.FLAGS, main._CONFIG
    values = flags.FlagValues()
    argv = ["main", *arguments]
    main._CONFIG = config_flags.DEFINE_config_file(
        "config", None, lock_config=True, flag_values=values, sys_argv=argv
    )
    main.cli.flags.FLAGS = values
    try:
        main._parse_flags(argv)
        return main._CONFIG.value
    finally:
        main.cli.flags.FLAGS, main._CONFIG = flags_before, config_before


def _names_a_field(text: str, named: Sequence[str]) -> None:
    assert text and "\n" not in text, f"not one line: {text!r}"
    fields = [*_fields(), *named, "mesh", "eval.benchmarks"]
    assert any(name and name in text for name in fields), f"{text!r} names no field"


def _config_seeds() -> list[bytes]:
    return [bytes([0, 1, i, i]) for i in range(0, 120, 7)] + [bytes([9, 1])]


TARGETS = {
    "layout": lambda: Target(
        check_layout, [b"\x01\x07\x00\x02\x07\x03\x02\x03\x01\x06\x04\x05"]
    ),
    "format": lambda: Target(
        check_format, [b"\x00\x00\x02\x08\x03\x02\x03\x01\x04\x05"]
    ),
    "canonical": lambda: Target(
        check_canonical, [b"\x00\x00\x07\x02\x08\x03\x06\x02\x03\x01\x04\x05"]
    ),
    "answer_parser": lambda: Target(check_answer_parser, _answer_seeds()),
    "answer_check": lambda: Target(check_answer, _answer_seeds()),
    "jsonl": lambda: Target(check_jsonl, _jsonl_seeds(), json=True),
    "parquet": lambda: Target(check_parquet, _parquet_seeds()),
    "array_record": lambda: Target(check_array_record, _array_record_seeds()),
    "config": lambda: Target(check_config, _config_seeds()),
    "model_config": lambda: Target(
        check_model_config, _model_config_seeds(), json=True
    ),
    "weights": lambda: Target(check_weights, _weights_seeds()),
    "weight_index": lambda: Target(check_weight_index, _INDEX_SEEDS, json=True),
    "tokenizer": lambda: Target(check_tokenizer, _tokenizer_seeds(), json=True),
}

SHARES = {"answer_check": 0.02}  # of the inputs asked for, where one takes long


def _answer_seeds() -> list[bytes]:
    pairs = [
        ("Final Answer: 1,000", "1000"),
        (r"so \boxed{\frac{1}{2}} cm", "0.5"),
        ("Final Answer: $x \\le 3$", "(-\\infty, 3]"),
        ("**Final Answer:** 3 meters<|im_end|>", "3"),
    ]
    seeds = []
    for response, reference in pairs:
        parts = b"\x01" + response.encode(), b"\x01" + reference.encode()
        size = sum(map(len, parts)) + 1
        seeds.append(bytes([-(-256 * len(parts[0]) // size)]) + b"".join(parts))
    return seeds


if __name__ == "__main__":
    for argument in sys.argv[2:]:  # files of inputs, to see what one does
        TARGETS[sys.argv[1]]().run(pathlib.Path(argument).read_bytes())
