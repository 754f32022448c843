"""Worker processes that ask math-verify, and are killed when they overrun their time.

A worker starts with the first answer that needs one (a second or two, not counted), and
ends with this process.
"""

import os
from pathlib import Path

from pr1_jax.answers.verdicts import UNDECIDED, Result
from pr1_jax.workers import pool

NUM_WORKERS = min(2, os.cpu_count() or 1)
_MAX_ANSWERS = 5000  # of one worker: its parser's caches only ever grow
_WAIT = 30  # for a worker that sleeps: times the processor time that it may take


class _Pool(pool.Pool):
    """The workers, asked for verdicts."""

    def ask(self, answer: str, reference: str, timeout_sec: float) -> Result:
        request = {"answer": answer, "reference": reference, "limit_sec": timeout_sec}
        try:
            return Result(**super().ask(request, _WAIT * timeout_sec))
        except pool.OverrunError:
            return Result(UNDECIDED, f"no verdict within {timeout_sec:g} s")
        except pool.DiedError:
            return Result(UNDECIDED, "math-verify died of this answer")
        except pool.StartError as error:
            text = f"the math-verify worker does not start: {error}"
            raise RuntimeError(text) from error


_pool = _Pool(
    Path(__file__).with_name("worker.py"), size=NUM_WORKERS, most_requests=_MAX_ANSWERS
)


def ask(answer: str, reference: str, timeout_sec: float) -> Result:
    """Asks an idle worker, or starts one; `timeout_sec` is of its processor time."""
    return _pool.ask(answer, reference, timeout_sec)
