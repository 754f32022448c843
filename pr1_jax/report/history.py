"""Analyses of every step's responses, kept so that each file is read once.

`analysis.jsonl` in the workdir has a line for each step and evaluation. It may be
deleted; it is made again.
"""

import itertools
import math
import os
import time
from collections.abc import Sequence
from typing import Any

from pr1_jax.report import analysis, reading
from pr1_jax.system import files

_RECORDS = 256  # of a file, at most …
_CHARACTERS = 300_000  # … and so much text: paths are compared pair by pair
PREFIX = "analysis/"
_VERSION = 2  # of the lines; those of an older one are made again


class History:
    """The analyses of one workdir."""

    def __init__(self, workdir: str | os.PathLike[str]):
        self._path = os.path.join(workdir, "analysis.jsonl")
        self._known: dict[str, dict[str, Any]] = {}
        try:
            lines = files.read_json_lines(self._path)
        except ValueError:
            lines = []
        for line in lines:
            if isinstance(line, dict) and "name" in line:
                self._known[line["name"]] = line

    def update(
        self, run: reading.Run, *, limit_sec: float = math.inf
    ) -> dict[str, dict[str, float]]:
        """Analyses by name of the source; new sources are analysed, newest first.

        Args:
          limit_sec: time to spend; what is left is done by a later call.
        """
        until, new = time.monotonic() + limit_sec, False
        for source in reversed(run.sources):
            stamp = [[p.stat().st_size, p.stat().st_mtime_ns] for p in source.paths]
            known = self._known.get(source.name, {})
            if known.get("files") == stamp and known.get("version") == _VERSION:
                continue
            if time.monotonic() > until:
                break
            records = _some(reading.read_records(source, _RECORDS))
            means = analysis.summarize(records, run.grammar)
            figures = {PREFIX + name: x for name, x in means.items() if _is_number(x)}
            line = {"name": source.name, "version": _VERSION, "files": stamp}
            self._known[source.name] = line | figures
            new = True
        if new:
            lines = [self._known[name] for name in sorted(self._known)]
            files.write_json_lines(self._path, lines)
        names = {source.name for source in run.sources}
        return {
            name: {key: x for key, x in line.items() if key.startswith(PREFIX)}
            for name, line in self._known.items()
            if name in names
        }


def _some(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first records that have a response, up to so much text, one at least."""
    whole = [r for r in records if isinstance(r.get("response"), str)]
    sizes = itertools.accumulate(len(r["response"]) for r in whole)
    return [
        r for i, (r, n) in enumerate(zip(whole, sizes)) if not i or n <= _CHARACTERS
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
