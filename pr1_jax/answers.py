r"""Is the answer of a response equivalent to the reference? (spec section 5)

Three verdicts, whatever a model wrote, in bounded time: correct, incorrect, and
undecided (timed out or unparsable: rewarded as incorrect, counted apart). A
response without an answer is incorrect. Plain numbers are decided here within
microseconds, the rest by math-verify in worker processes that are killed when they
overrun; a worker starts with the first answer that needs one (a second or two, not
counted) and ends with this process.

Departs from the published checker, which reads the last 300 characters only, where
a slice can cut a `\boxed{}`, and which takes a timeout for a wrong answer.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pr1_jax.tags import TAGS

CORRECT, INCORRECT, UNDECIDED = "correct", "incorrect", "undecided"

_MAX_CHARS = 2000  # of an answer that math-verify is asked about
_NUM_WORKERS = min(2, os.cpu_count() or 1)
_MAX_ANSWERS = 5000  # of one worker: its parser's caches only ever grow
_START_SEC = 120.0


@dataclass(frozen=True)
class Result:
    """verdict: correct, incorrect or undecided; reason: a short sentence for logs."""

    verdict: str
    reason: str


# -- From a response to its answer. All patterns take linear time.

_MARKER = re.compile(r"final answer[*_` ]*:", re.IGNORECASE)
_LINE = re.compile(r"[^\r\n]*")
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_AFTER_ANSWER = re.compile(
    "|".join([*TAGS, r"<\|\w{3,}\|>"])
)  # a tag, <|im_end|> and such
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def _boxes(text: str) -> list[tuple[int, int]]:
    r"""Where the content of each `\boxed{}` with balanced braces starts and ends."""
    found, opened = [], []
    if "box" not in text:
        return found
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "{" or (token[-1] == "{" and "box" in token):
            opened.append(match)
        elif token == "}" and opened:
            start = opened.pop()
            if start.group() != "{":
                found.append((start.end(), match.start()))
    return sorted(found)


def _bare(answer: str) -> str:
    """`answer` without Markdown marks, full stop and math delimiters around it."""
    answer = answer.strip()
    for _ in range(8 if len(answer) <= _MAX_CHARS else 0):
        before = answer
        answer = answer.strip(' \t\r\n*_`"“”').rstrip(".,;: \\\n").strip()
        for start, end in _DELIMITERS:
            inner = answer[len(start) : -len(end)]
            whole = answer == start + inner + end and start not in inner
            answer = inner if whole else answer
        if answer == before:
            break
    return answer


def extract(response: str) -> str | None:
    r"""Returns the answer that `response` gives, None if it gives none.

    That is the rest of the last `Final Answer:` line (of its one `\boxed{}`, if it
    has one), or, if that is blank, the last `\boxed{}` with balanced braces.
    """
    boxes = _boxes(response)
    markers = deque(_MARKER.finditer(response), maxlen=1)
    if markers:
        line = _LINE.match(response, markers[0].end())
        on_line = [box for box in boxes if line.start() <= box[0] <= line.end()]
        rest = _AFTER_ANSWER.split(line.group(), maxsplit=1)[0]
        answer = _bare(response[slice(*on_line[0])] if len(on_line) == 1 else rest)
        if answer:
            return answer
    return _bare(response[slice(*boxes[-1])]) or None if boxes else None


# -- From an answer to what can be compared: math-verify misreads some spellings.

_NUMBER = re.compile(r"([+-]?)([1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(\.[0-9]+)?")
_SEPARATOR = r"(?:,|\{,\}|\\,|\\ |~|\\!,\\!|,\\!|[ \u00a0\u2009\u202f])"
_THOUSANDS = re.compile(
    rf"[+-]?[1-9][0-9]{{0,2}}(?:{_SEPARATOR}[0-9]{{3}})+(?=$|\.[0-9]|\s*[A-Za-z%\\])"
)
_CURRENCY = re.compile(r"^([+-]?)(?:\\\$|[$€£¥₹])\s*(?=[0-9.])")
_MIXED = re.compile(r"([+-]?[0-9]+) ([0-9]+)/([0-9]+)")
_SCIENTIFIC = re.compile(r"([+-]?[0-9.]+)[eE]([+-]?[0-9]+)")
_LEADING_WORDS = re.compile(
    r"(?:[A-Za-z ,'’]*\b)?(?:is|are|be|equals|equal to|about|approximately)\b:?\s+"
)
_UNIT = re.compile(  # words after a number; short ones may be products of variables
    r"(?:(?<=[0-9})\]])|(?<=\\pi))\s+(?!(?:percent|percentage|sqrt|choose)\b)"
    r"(?:[A-Za-z]{4,}|cup|day|hrs?|mins?|secs?|[cmk]?m|k?g|mg|lbs?|oz|ft|in|[mk]ph|USD)"
    r"\b[A-Za-z /.²³-]*(?:\^?\{?[23]\}?)?$"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)(?:bf|rm)?\{([^{}]*)\}")
_NON_ASCII = re.compile(r"[^\x00-\x7f]")


def _normal(answer: str) -> str:
    """`answer` in the spelling that math-verify reads as a person would."""
    text = _bare(answer).replace("\u2212", "-")
    text = _NON_ASCII.sub(lambda x: str(unicodedata.decimal(x[0], x[0])), text)
    if inner := _TEXT.fullmatch(text):
        text = inner[1]
    text = _CURRENCY.sub(r"\1", text)
    text = text.replace(r"\$", "")
    if text.count("$") % 2:
        text = text.replace("$", "")
    if words := _LEADING_WORDS.match(text):
        text = _CURRENCY.sub(r"\1", text[words.end() :])
    if number := _THOUSANDS.match(text):
        text = re.sub(r"[^0-9+-]", "", number.group()) + text[number.end() :]
    if mixed := _MIXED.fullmatch(text):
        return r"{}\frac{{{}}}{{{}}}".format(*mixed.groups())
    if scientific := _SCIENTIFIC.fullmatch(text):
        return r"{} \times 10^{{{}}}".format(*scientific.groups())
    return _UNIT.sub("", text).strip()


def _number(text: str) -> Fraction | None:
    """The value of a plain number of at most 12 digits, else None."""
    match = _NUMBER.fullmatch(text) if len(text) <= 18 else None
    if not match or not (match[2] or match[3]) or sum(map(str.isdigit, text)) > 12:
        return None
    return Fraction(text.replace(",", ""))


def _quick(answer: str, reference: str) -> Result | None:
    """The verdict where no worker is needed, else None."""
    for name, text in (("answer", answer), ("reference", reference)):
        if len(text) > _MAX_CHARS:
            return Result(UNDECIDED, f"the {name} has over {_MAX_CHARS} characters")
    if not reference:
        return Result(UNDECIDED, "the reference is blank")
    if answer == reference:
        return Result(CORRECT, "the answer is the reference")
    if answer.replace(" ", "").isalpha() and answer.casefold() == reference.casefold():
        return Result(CORRECT, "the words are the same")
    value, wanted = _number(answer), _number(reference)
    if value is None or wanted is None:
        return None
    if value == wanted:
        return Result(CORRECT, "the numbers are equal")
    if abs(value - wanted) > Fraction(1, 100_000):  # closer: math-verify rounds
        return Result(INCORRECT, f"{answer} is not {reference}")
    return None


# -- The workers.


class _Worker:
    """A process that runs answers_worker.py. Used by one thread at a time."""

    def __init__(self) -> None:
        self.num_answers = 0
        self.ready = False
        # By path and with -P: nothing of this program or package is imported.
        path = Path(__file__).with_name("answers_worker.py")
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
                raise EOFError
            line += piece
        return json.loads(line)

    def ask(self, answer: str, reference: str, timeout_sec: float) -> Result:
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
        return Result(**self._read(timeout_sec))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class _Pool:
    """At most `_NUM_WORKERS` workers at work, for all threads of this process."""

    def __init__(self) -> None:
        self.idle: deque[_Worker] = deque()
        self.slots = threading.BoundedSemaphore(_NUM_WORKERS)

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
        return Result(UNDECIDED, "math-verify died of it")

    def close(self) -> None:
        while self.idle:
            self.idle.pop().kill()


_pool = _Pool()


def _forget() -> None:
    """A forked child must not write into its parent's pipes."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _pool.close())


# -- The public functions.


def check(response: str, reference: str, *, timeout_sec: float = 3.0) -> Result:
    """Returns whether the answer of `response` is equivalent to `reference`.

    timeout_sec: what math-verify may take, after which the verdict is undecided.
    Never raises for what a model wrote; RuntimeError if math-verify cannot start.
    """
    return check_many([response], [reference], timeout_sec=timeout_sec)[0]


def check_many(
    responses: Sequence[str], references: Sequence[str], *, timeout_sec: float = 3.0
) -> list[Result]:
    """Returns `check` of each pair, in order; the workers share what is not quick."""
    if len(responses) != len(references):
        raise ValueError(
            f"responses has {len(responses)} items, references {len(references)}"
        )
    if timeout_sec <= 0:
        raise ValueError(f"timeout_sec is {timeout_sec}, expected more than 0")
    pairs = [_pair(*both) for both in zip(responses, references)]
    decided = {pair: _quick(*pair) for pair in pairs if pair}  # equal ones once
    decided[None] = Result(INCORRECT, "the response gives no answer")
    slow = [pair for pair, result in decided.items() if result is None]
    if slow:
        with ThreadPoolExecutor(_NUM_WORKERS) as threads:
            results = threads.map(lambda pair: _pool.ask(*pair, timeout_sec), slow)
            decided.update(zip(slow, results))
    return [decided[pair] for pair in pairs]


def _pair(response: str, reference: str) -> tuple[str, str] | None:
    """Answer and reference as they are compared, None without an answer."""
    answer = extract(response)
    if answer is None:
        return None
    texts = answer, extract(reference) or reference
    return tuple(_normal(x) if len(x) <= _MAX_CHARS else x for x in texts)
