"""Worker processes that answer requests in JSON, and are killed when they overrun.

A worker is a script of its own. It first writes one line that says whether it started
(`{"error": ""}`), and then answers each line of its input with one line.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_START_SEC = 120.0
_LOOK_SEC = 1.0  # between two looks whether a silent worker still lives


class OverrunError(TimeoutError):
    """A request took too long, and its worker was killed.

    Attributes:
      by_clock: by the clock; else it used up its processor time.
    """

    def __init__(self, by_clock: bool):
        super().__init__()
        self.by_clock = by_clock


class DiedError(Exception):
    """A worker ended without a reply; `str` says how."""


class StartError(RuntimeError):
    """A worker does not start; `str` says why."""


class Worker:
    """A process that runs a script; one thread uses it at a time."""

    def __init__(self, command: Sequence[str]):
        self.num_asked = 0
        self.hello: dict[str, Any] | None = None  # its first line, once it was read
        # By path and with -P: nothing of this program or package is imported.
        self.process = subprocess.Popen(
            [sys.executable, "-P", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run, which may catch it
        )

    def _read(self, timeout_sec: float) -> dict[str, Any]:
        """The next line."""
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline, line = time.monotonic() + timeout_sec, b""
        while not line.endswith(b"\n"):
            left_sec = deadline - time.monotonic()
            if left_sec <= 0:
                raise OverrunError(by_clock=True)
            if not poll.poll(min(left_sec, _LOOK_SEC) * 1000):
                if self.process.poll() is None:
                    continue
                raise self._end()  # though what it forked may hold the pipe
            piece = os.read(descriptor, 65536)
            if not piece:
                raise self._end()
            line += piece
        return json.loads(line)

    def _end(self) -> Exception:
        """Why it gives no further line."""
        try:
            code = self.process.wait(timeout=_LOOK_SEC)
        except subprocess.TimeoutExpired:
            return DiedError("it closed its output")
        if code == -signal.SIGPROF:
            return OverrunError(by_clock=False)
        if code == -signal.SIGALRM:  # its own limit, by the clock
            return OverrunError(by_clock=True)
        ends = {-number.value: number.name for number in signal.Signals}
        return DiedError(
            f"signal {ends[code]}" if code in ends else f"exit code {code}"
        )

    def start_up(self) -> dict[str, Any]:
        """Waits until it has started, and returns what it says of that.

        Raises:
          StartError: it does not start. DiedError: it died before.
        """
        if self.hello is None:
            try:
                self.hello = self._read(_START_SEC)
            except OverrunError as error:
                raise StartError(f"not ready within {_START_SEC:g} s") from error
        if self.hello["error"]:
            raise StartError(self.hello["error"])
        return self.hello

    def ask(self, request: Mapping[str, Any], timeout_sec: float) -> dict[str, Any]:
        """The reply to a request.

        Args:
          timeout_sec: for the reply, by the clock.

        Raises:
          OverrunError, DiedError: there is none.
          StartError: it does not start.
        """
        self.start_up()
        self.num_asked += 1
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._end() from None
        return self._read(timeout_sec)

    def kill(self) -> None:
        """Ends it, and what it has forked."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Workers of one script for all threads of this process."""

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str] = (),
        *,
        size: int,
        most_requests: int = 0,
    ):
        """Starts nothing yet.

        Args:
          size: how many workers work at once, at most.
          most_requests: a worker ends after so many; 0 = after any number.
        """
        self._command = [str(script), *arguments]
        self._size, self._most = size, most_requests
        self._hello: dict[str, Any] | None = None  # of all workers, once it was heard
        self._forget()
        _POOLS.add(self)

    def _forget(self) -> None:
        """Leaves all workers to another process."""
        self._idle: deque[Worker] = deque()
        self._slots = threading.BoundedSemaphore(self._size)

    def _take(self) -> Worker:
        try:
            return self._idle.pop()
        except IndexError:
            return Worker(self._command)

    def start(self) -> list[dict[str, Any]]:
        """Starts all workers at once; returns what each says of its start.

        Raises:
          StartError: one does not start.
        """
        while len(self._idle) < self._size:
            self._idle.append(Worker(self._command))
        try:
            said = [worker.start_up() for worker in self._idle]
        except DiedError as error:
            raise StartError(f"it died ({error})") from error
        self._hello = said[0]
        return said

    def ask(self, request: Mapping[str, Any], timeout_sec: float) -> dict[str, Any]:
        """Asks an idle worker, or a new one; again, if it died, which others may cause.

        Args, Raises: as of `Worker.ask`.
        """
        with self._slots:
            for is_last in (False, True):
                worker, done = self._take(), False
                try:
                    if worker.start_up() != (self._hello or worker.hello):
                        raise StartError("it is another one since the run started")
                    reply = worker.ask(request, timeout_sec)
                    done = not self._most or worker.num_asked < self._most
                    return reply
                except DiedError as error:
                    if is_last and worker.hello is None:
                        raise StartError(f"it died ({error})") from error
                    if is_last:
                        raise
                finally:  # a late reply must never answer the next question
                    if not done:
                        worker.kill()
                    self._idle.append(worker if done else Worker(self._command))
        raise AssertionError

    def close(self) -> None:
        """Ends the workers that are idle."""
        while self._idle:
            self._idle.pop().kill()


_POOLS: "weakref.WeakSet[Pool]" = weakref.WeakSet()


def _forget_all() -> None:
    """Gives a forked child pools of its own: it must not write to its parent's pipes."""
    for pool in list(_POOLS):
        pool._forget()


def _close_all() -> None:
    for pool in list(_POOLS):
        pool.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)
