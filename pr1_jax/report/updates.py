"""Keeps `report.html` and `curves.png` up to date beside a run that trains."""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

from absl import logging

from pr1_jax.report import curves, history, page, reading, traces
from pr1_jax.system import files

_ANALYSES_SEC = 2.0  # in one update; what is left waits for the next
_SHARE = 0.02  # of the time, at most, goes into updates between evaluations


class Updates:
    """Writes the report of a workdir in a thread of its own; failures are warnings.

    A run calls `after_step`, `after_evaluation` and `close`. Between evaluations an
    update comes at most every `every_sec` seconds, and so rarely that all of them take
    2 % of the time; `curves.png` is drawn after evaluations alone.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, every_sec: float = 60.0):
        self._workdir, self._every_sec = workdir, every_sec
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._next = time.monotonic() + every_sec
        self._history: history.History | None = None
        self._shelf = traces.Shelf()
        self._warned = False

    def after_step(self) -> None:
        """Brings the page up to date, if it is time and nobody does so already."""
        if time.monotonic() >= self._next:
            self._start()

    def after_evaluation(self) -> None:
        """Brings page and picture up to date, unless that is being done."""
        self._start(picture=True)

    def close(self) -> None:
        """Waits for an update under way, and makes a last one."""
        if self._thread is None:
            return
        if self._running is not None:
            wait([self._running])
        self.after_evaluation()
        self._thread.shutdown()
        self._notice()
        self._thread = None

    def _start(self, *, picture: bool = False) -> None:
        if self._thread is None or (self._running and not self._running.done()):
            return
        self._notice()
        self._running = self._thread.submit(self._write, picture)

    def _notice(self) -> None:
        """Warns, once, if the last update failed: a report is never worth a run."""
        error = self._running.exception() if self._running else None
        if error is None or self._warned:
            return
        self._warned = True
        logging.warning(
            "report.html is not up to date: %s: %s; the run goes on, and "
            "python -m pr1_jax.report %s writes it later",
            type(error).__name__,
            files.write_error(error) or error,
            self._workdir,
        )

    def _write(self, picture: bool) -> None:
        began = time.monotonic()
        try:
            self._make(picture)
        finally:
            ended = time.monotonic()
            self._next = ended + max(self._every_sec, (ended - began) / _SHARE)

    def _make(self, picture: bool) -> None:
        try:
            run = reading.read(self._workdir)
        except FileNotFoundError:  # nothing was logged yet
            return
        self._history = self._history or history.History(self._workdir)
        analyses = self._history.update(run, limit_sec=_ANALYSES_SEC)
        described = page.describe(run, analyses, shelf=self._shelf)
        out = os.path.join(self._workdir, "report.html")
        files.replace_file(out, page.assemble([described], []))
        if picture:
            curves.plot_curves(run)
