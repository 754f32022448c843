"""A function of the user: loaded, tried and called in processes of its own.

`reward.function` and `reward.verifier` name such functions (docs/rewards.md). What goes
wrong in one names the function, its line and the record, and ends the run.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from pr1_jax.rewards import MADE_UP, Record
from pr1_jax.workers import pool

_FORM = re.compile(r"[^:]+\.py:[^\W\d]\w*|[^\W\d][\w.]*:[^\W\d]\w*")
_SHOWN = 120  # characters of a question and of a response, in a message


class OwnCodeError(ValueError):
    """A function of the user failed; `str` is one line that says where and of what."""


def check_form(field: str, given: str) -> None:
    """Raises ValueError unless a name has the form of a function's."""
    if not _FORM.fullmatch(given):
        raise ValueError(
            f"{field}={given} names no function: write FILE.py:NAME or "
            "PACKAGE.MODULE:NAME"
        )


class OwnFunction:
    """A function of the user; threads may share it.

    Attributes:
      field, given: of the config, and its value.
      file, digest: of its source, once it was loaded.
      parts: names of what a reward function returns; "" is that of a single number.
      size: how many processes call it.
    """

    def __init__(
        self,
        field: str,
        given: str,
        kind: str,
        *,
        limit_sec: float,
        processor_sec: float = 0.0,
        size: int = 2,
    ):
        """Starts nothing yet.

        Args:
          field: of the config. given: FILE.py:NAME or PACKAGE.MODULE:NAME.
          kind: "reward" or "verifier".
          limit_sec: of a call, by the clock; a longer one is an error.
          processor_sec: of a call; a verifier that uses up more is undecided. 0 = any.
          size: how many processes call it.
        """
        check_form(field, given)
        self.field, self.given, self.size = field, given, size
        self.file = self.digest = ""
        self.parts: tuple[str, ...] = ()
        self._limit_sec = limit_sec
        settings = {"function": given, "kind": kind, "limit_sec": limit_sec}
        settings["processor_sec"] = processor_sec
        script = Path(__file__).with_name("own_worker.py")
        self._pool = pool.Pool(script, [json.dumps(settings)], size=size)

    def load(self) -> None:
        """Loads the function in all its processes, and calls it once with `MADE_UP`.

        Raises:
          OwnCodeError: it cannot be loaded, or it fails.
        """
        try:
            hello = self._pool.start()[0]
        except pool.StartError as error:
            raise self._error(f"cannot be loaded: {error}") from error
        self.file, self.digest = hello["file"], hello["digest"]
        try:
            value = self._ask(MADE_UP)
        except pool.OverrunError as error:
            text = "took more than reward.timeout_sec of processor time"
            raise self._error(text, MADE_UP) from error
        self.parts = tuple(value) if isinstance(value, dict) else ()

    def verify(self, record: Record) -> bool | None:
        """Whether an answer is right by a verifier; None where it does not know.

        Raises:
          OwnCodeError: it failed.
        """
        try:
            return self._ask(record)
        except pool.OverrunError:
            return None

    def score(self, record: Record) -> dict[str, float]:
        """The parts of a response's reward by a reward function, those of `parts`.

        Raises:
          OwnCodeError: it failed, or returned other parts.
        """
        value = self._ask(record)
        if {*value} != {*self.parts}:
            names = lambda x: ", ".join(sorted(x)) or "a single number"
            text = f"returned {names(value)}, and {names(self.parts)} at its first call"
            raise self._error(text, record)
        return {name: value[name] for name in self.parts}

    def _ask(self, record: Record) -> Any:
        try:
            reply = self._pool.ask(dataclasses.asdict(record), self._limit_sec)
        except pool.OverrunError as error:
            if not error.by_clock:
                raise
            limit = f"took more than reward.function_sec={self._limit_sec:g}"
            raise self._error(limit, record) from error
        except pool.DiedError as error:
            text = f"ended the process that calls it ({error})"
            raise self._error(text, record) from error
        except pool.StartError as error:
            raise self._error(f"cannot be loaded: {error}") from error
        if "error" in reply:
            raise self._error(reply["error"], record)
        return reply["value"]

    def _error(self, what: str, record: Record | None = None) -> OwnCodeError:
        text = f"{self.field}={self.given} {what}"
        way_out = "Mend it, and start again"
        if record is MADE_UP:
            text += "; it was called with a made-up record"
        elif record is not None:
            way_out = "Mend it; the same command goes on from the newest checkpoint"
            shown = [repr(x[:_SHOWN]) for x in (record.question, record.response)]
            text += f"; question {shown[0]}, response {shown[1]}"
        text = "".join(char if char.isprintable() else " " for char in text)
        return OwnCodeError(f"{text[:2000]}. {way_out}")
