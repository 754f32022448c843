"""Worker processes that ask math-verify, and are killed when they overrun their time.

A worker starts with the first answer that needs one (a second or two, not counted), and
ends with this process.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from pr1_jax.answers.verdicts import UNDECIDED, Result

NUM_WORKERS = min(2, os.cpu_count() or 1)
_MAX_ANSWERS = 5000  # of one worker: its parser's caches only ever grow
_START_SEC = 120.0
_WAIT = 30  # for a worker that sleeps: times the processor time that it may take


class _Worker:
    """A process that runs worker.py; one thread uses it at a time."""

    def __init__(self) -> None:
        self.num_answers = 0
        self.ready = False
        # By path and with -P: nothing of this program or package is imported.
        path = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run, which may catch it
        )

    def _read(self, timeout_sec: float) -> dict:
        """The next line; TimeoutError or EOFError where none comes."""
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline, line = time.monotonic() + timeout_sec, b""
        while not line.endswith(b"\n"):
            left_sec = deadline - time.monotonic()
            if left_sec <= 0 or not poll.poll(left_sec * 1000):
                raise TimeoutError
            piece = os.read(descriptor, 65536)
            if not piece:
                if self.process.wait() == -signal.SIGPROF:
                    raise TimeoutError
                raise EOFError
            line += piece
        return json.loads(line)

    def ask(self, answer: str, reference: str, timeout_sec: float) -> Result:
        """The verdict; TimeoutError or EOFError where the process gives none."""
        if not self.ready:
            try:
                error = self._read(_START_SEC)["error"]
            except TimeoutError:
                error = f"not ready within {_START_SEC:g} s"
            if error:
                raise RuntimeError(f"the math-verify worker does not start: {error}")
            self.ready = True
        request = {"answer": answer, "reference": reference, "limit_sec": timeout_sec}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.num_answers += 1
        return Result(**self._read(_WAIT * timeout_sec))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class _Pool:
    """Workers for all threads of this process, of which `NUM_WORKERS` work at once."""

    def __init__(self) -> None:
        self.idle: deque[_Worker] = deque()
        self.slots = threading.BoundedSemaphore(NUM_WORKERS)

    def take(self) -> _Worker:
        try:
            return self.idle.pop()
        except IndexError:
            return _Worker()

    def ask(self, answer: str, reference: str, timeout_sec: float) -> Result:
        with self.slots:
            for _ in range(2):  # again if it has died, which others may have caused
                worker, done = self.take(), False
                try:
                    result = worker.ask(answer, reference, timeout_sec)
                    done = worker.num_answers < _MAX_ANSWERS
                    return result
                except TimeoutError:
                    return Result(UNDECIDED, f"no verdict within {timeout_sec:g} s")
                except (EOFError, BrokenPipeError):
                    continue
                finally:  # a late reply must never answer the next question
                    if not done:
                        worker.kill()
                    self.idle.append(worker if done else _Worker())
        if not worker.ready:
            raise RuntimeError("the math-verify worker does not start: it died")
        return Result(UNDECIDED, "math-verify died of this answer")

    def close(self) -> None:
        while self.idle:
            self.idle.pop().kill()


_pool = _Pool()


def _forget() -> None:
    """Gives a forked child a pool of its own: it must not write to its parent's pipes."""
    global _pool
    _pool = _Pool()


def ask(answer: str, reference: str, timeout_sec: float) -> Result:
    """Asks an idle worker, or starts one; `timeout_sec` is of its processor time."""
    return _pool.ask(answer, reference, timeout_sec)


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _pool.close())
