"""Templates of prompts, which strangers write, rendered in bounded time and memory.

A process of its own renders them (template_worker.py). It starts with the first prompt
that needs one, in a second or so, and ends with this process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT_SEC = 10.0  # of processor time, for one prompt
MEMORY_BYTES = 1 << 30  # of the process, of which its modules take 0.15 GiB
MAX_CHARS = 1_000_000  # of a prompt, beside eight times what its messages have


class _Worker:
    """A process that runs template_worker.py; one thread uses it at a time."""

    def __init__(self) -> None:
        # By path and with -P: nothing of this program or package is imported.
        path = Path(__file__).with_name("template_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(path), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Threads of a library for matrices would count as memory.
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which may catch it
        )

    def ask(self, request: bytes) -> dict[str, str]:
        """The reply; EOFError with the exit code where the process ends without one."""
        reply = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(request + b"\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
        except BaseException:  # a late reply must never answer the next prompt
            self.process.kill()
            raise
        if not reply.endswith(b"\n"):
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            raise EOFError(self.process.wait())
        return json.loads(reply)


_worker: _Worker | None = None
_lock = threading.Lock()


def render(
    template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, Any]
) -> str:
    """The text of messages by a Jinja template, with the turn of the assistant opened.

    Args:
      names: what else the template may name: BOS, EOS and so on.

    Raises:
      ValueError: what the template raised, or which limit it went beyond.
    """
    said = sum(len(str(message)) for message in messages)
    chat = {"messages": [dict(message) for message in messages]}
    return _ask({"template": template, "names": dict(names), **chat}, said)


def render_file(template: str, file: str, names: Mapping[str, Any]) -> str:
    """The text of a Jinja template that is a prompt's, with these variables and no others.

    Args:
      file: its name, for messages.

    Raises:
      ValueError: names the line and what is wrong in it, or the limit that the template
        went beyond.
    """
    said = sum(len(str(value)) for value in names.values())
    return _ask({"template": template, "names": dict(names), "file": file}, said)


def _ask(request: Mapping[str, Any], said: int) -> str:
    """The text that a template makes.

    Args:
      said: characters of what it is told.
    """
    global _worker
    limits = {"limit_sec": LIMIT_SEC, "max_chars": MAX_CHARS + 8 * said}
    line = json.dumps({**request, **limits}, default=str).encode()
    with _lock:
        for again in (True, False):  # it may have ended of what others did
            worker, _worker = _worker or _Worker(), None
            try:
                reply = worker.ask(line)
                _worker = worker
                break
            except EOFError as error:
                if error.args[0] == -signal.SIGPROF:
                    text = f"it took more than {LIMIT_SEC:g} s of processor time"
                    raise ValueError(text) from error
                if not again:
                    raise ValueError("it ended the process that renders it") from error
    if error := reply.get("error"):
        shown = (char if char.isprintable() else " " for char in error)
        raise ValueError("".join(shown))  # it may be the template's own words
    return reply["text"]


def _forget() -> None:
    """Gives a forked child a worker of its own, not its parent's."""
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
