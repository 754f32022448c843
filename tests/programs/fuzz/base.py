"""What the targets share: their description, one-line messages, changed JSON."""

import atexit
import dataclasses
import functools
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]


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


def one_line(error: BaseException, *named: str) -> None:
    """Asserts that a message is one line, and names one of these if there are any."""
    text = str(error)
    assert text.strip() and "\n" not in text, f"not one line: {text!r}"
    assert not named or any(name in text for name in named), (
        f"{text!r} names none of {named}"
    )


@functools.cache
def folder() -> pathlib.Path:
    """A folder of this process, in memory where there is one."""
    shared = pathlib.Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="fuzz", dir=shared if shared.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return pathlib.Path(made)


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


def _places(parent: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of all values in a value."""
    keys = parent if isinstance(parent, dict) else range(len(parent))
    for key in keys:
        yield parent, key
        if isinstance(parent[key], dict | list):
            yield from _places(parent[key])
