"""The process that calls a function of the user for `own.py`.

It is run as a script with a JSON object as its argument: `function` (`file.py:name` or
`package.module:name`), `kind` ("reward" or "verifier"), `limit_sec` and `processor_sec`
(0 = none). Its first line has `error`, and where there is none `file` and `digest` of
the source; each further line answers a record.
"""

import hashlib
import importlib
import inspect
import json
import numbers
import os
import re
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MEMORY_BYTES = 4 << 30  # of data; what is mapped and not written does not count
MOST_PARTS = 32
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")
_BEHIND_SEC = 10.0  # the parent's limit, after which this process ends by itself


class Refused(Exception):
    """There is no such function, or it returned what it must not; `str` says what."""


def load(given: str) -> tuple[Callable[..., Any], str]:
    """The function that `given` names, and the file that it is in."""
    where, _, name = given.rpartition(":")
    if where.endswith(".py"):
        file = os.path.abspath(os.path.expanduser(where))
        sys.path.append(os.path.dirname(file))  # for what it imports from beside it
        module = types.ModuleType(f"own_{Path(file).stem}")
        module.__file__ = file
        sys.modules[module.__name__] = module
        code = compile(Path(file).read_bytes(), file, "exec")
        exec(code, module.__dict__)  # noqa: S102
    else:
        sys.path.append(os.getcwd())
        module = importlib.import_module(where)
        file = getattr(module, "__file__", None) or where
    function = getattr(module, name, None)
    if not callable(function):
        made = (n for n, x in vars(module).items() if inspect.isfunction(x))
        known = ", ".join(n for n in made if not n.startswith("_")) or "none"
        what = (
            "has no function" if function is None else "has no function, but a value,"
        )
        raise Refused(f"{file} {what} {name}; its functions: {known}")
    return function, file


def words(error: BaseException, file: str) -> str:
    """An error with the line of the user's file that it comes from, if it does."""
    if isinstance(error, Refused):
        return str(error)
    said = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if os.path.abspath(frame.filename) == file:
            return f"{file}:{frame.lineno}, `{frame.line}`: {said}"
    return said


def _scalar(value: Any) -> Any:
    """A number or truth value of NumPy, JAX or PyTorch as Python's."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _refused(value: Any, expected: str) -> Refused:
    return Refused(f"returned {value!r:.60} ({type(value).__name__}), not {expected}")


def number(value: Any, what: str = "a number") -> float:
    """A part of a reward; Refused where it is no number to train on.

    Args:
      what: is expected, for the message.
    """
    from pr1_jax.rewards import LARGEST

    value = _scalar(value)
    if not isinstance(value, numbers.Real):
        raise _refused(value, what)
    if not abs(value) <= LARGEST:  # nor is NaN
        raise _refused(value, f"{what} up to {LARGEST:g}")
    return float(value)


def reward(value: Any) -> dict[str, float]:
    """What a reward function returned as parts by name; "" names a single number."""
    if not isinstance(value, Mapping):
        return {"": number(value, "a number or {name: number}")}
    if not 1 <= len(value) <= MOST_PARTS:
        raise Refused(f"returned {len(value)} parts, not 1 to {MOST_PARTS}")
    for name in value:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            expected = "the name of a part: letters, digits, _, . and -"
            raise _refused(name, expected)
    return {name: number(x, f"a number as {name!r}") for name, x in value.items()}


def verdict(value: Any) -> bool | None:
    """What a verifier returned."""
    value = _scalar(value)
    if value is not None and not isinstance(value, bool):
        raise _refused(value, "True, False or None")
    return value


def main() -> None:
    """Answers records until standard input ends."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what it prints and reads must not mix with these
        os.dup2(nothing, descriptor)
    me = os.getpid()

    def say(reply: Mapping[str, Any]) -> None:
        if os.getpid() != me:  # the function has forked, and this is the child
            os._exit(0)
        print(json.dumps(reply), file=replies, flush=True)

    settings = json.loads(sys.argv[1])
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = MEMORY_BYTES if most < 0 else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Accelerators are the training process's.
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    where = settings["function"].rpartition(":")[0]
    file = os.path.abspath(os.path.expanduser(where))
    try:
        from pr1_jax.rewards import Record

        function, file = load(settings["function"])
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except BaseException as error:  # noqa: BLE001 (a file raises anything)
        say({"error": words(error, file)})
        return
    say({"error": "", "file": file, "digest": digest})
    plain = reward if settings["kind"] == "reward" else verdict
    for line in requests:
        record = Record.read(json.loads(line))
        # Processor time, so that it does not depend on what else the machine does.
        signal.setitimer(signal.ITIMER_PROF, settings["processor_sec"])
        # Ends this process also where the parent is gone.
        signal.setitimer(signal.ITIMER_REAL, settings["limit_sec"] + _BEHIND_SEC)
        try:
            reply = {"value": plain(function(record))}
        except BaseException as error:  # noqa: BLE001
            failed = "" if isinstance(error, Refused) else "failed: "
            reply = {"error": failed + words(error, file)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(reply)


if __name__ == "__main__":
    main()
