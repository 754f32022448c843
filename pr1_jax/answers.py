r"""Is the answer of a response equivalent to the reference? (spec section 5)

Three verdicts, whatever a model wrote, in bounded time: correct, incorrect, and
undecided (timed out or unparsable: rewarded as incorrect, counted apart). A
response without an answer is incorrect. Plain numbers are decided here within
microseconds, the rest by math-verify in worker processes that are killed when they
overrun; a worker starts with the first answer that needs one (a second or two, not
counted) and ends with this process.

Where public suites of equal answers contradict each other, math-verify is followed:

- Decimals agree to six places, small ones to six digits: 0.333333 is 1/3, 0.33 is
  not; 40\pi is not 125.66. Whole numbers and fractions agree exactly.
- 50% is 0.5 and also 50. Units, degree signs and currencies are ignored.
- A list is a set and has no order; a tuple has one: (1,2) is not (2,1), but either
  may answer for the list 1,2. (1,2) may be an open interval; [1,2] is never a set.
- 1 \pm 2 is the list 3,-1; several such signs in one item are not written out.
- x=5 is 5, but not y=5. An inequality is its interval, `x<1 or x>3` their union.
- A base may be left out: 25_8 is 25, not 25_7. The letter i may be the root of -1.
- Words count as a whole, without case; other sentences are undecided.

Departs from the published checker (answers_string.py), which reads the last 300
characters only, where a slice can cut a `\boxed{}`, and compares strings.
"""

import atexit
import json
import os
import re
import select
import signal
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
_WAIT = 30  # for a worker that sleeps: times the processor time that it may take


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
_FRACTION = re.compile(
    r"([+-]?)(?:([0-9]+)/([0-9]+)|\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\})"
)
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]+),([0-9]+)")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)_(?:([0-9])|\{([0-9]{1,2})\})")
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
    r"\b[A-Za-z /.-]*(?:\^?\{?[23]\}?)?$"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)(?:bf|rm)?\{([^{}]*)\}")
_NON_ASCII = re.compile(r"[^\x00-\x7f]")
_ROOT = re.compile(r"√\s*([0-9]+|[A-Za-z]|\([^()]*\))")
_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "⁄": "/",
        "÷": "/",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "±": r"\pm ",
        "√": r"\sqrt ",
        "°": r"^{\circ}",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
    }
)
_SPACING = re.compile(  # not between digits, where 1 2 is not 12
    r"\\(?:left|right)(?![a-z])|\\[,;!:]|(?<![0-9\s])\s+|\s+(?![0-9\s])"
)
_LISTS = re.compile(r"[,;]|\b(?:and|or)\b")
_DOUBLE_ESCAPED = re.compile(r"(?:[^\\]|\\\\)*\\\\[A-Za-z](?:[^\\]|\\\\)*")


def _ascii(char: str) -> str:
    """LaTeX or ASCII for a digit, letter or power outside ASCII, else `char`."""
    form, *codes = unicodedata.decomposition(char).split() or [""]
    if form in ("<super>", "<sub>"):
        plain = "".join(chr(int(code, 16)) for code in codes)
        return ("^" if form == "<super>" else "_") + f"{{{plain}}}"
    if form == "<fraction>":
        return r"\frac{{{}}}{{{}}}".format(
            *unicodedata.normalize("NFKC", char).split("⁄")
        )
    if form.startswith("<"):
        return unicodedata.normalize("NFKC", char)
    greek = re.fullmatch(
        r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(char, "")
    )
    if greek:
        name = greek[2].lower()
        return f"\\{name if greek[1] == 'SMALL' else name.capitalize()} "
    return str(unicodedata.decimal(char, char))


def _without_boxes(text: str) -> str:
    """The last boxes of `text` that make one list, should there be several."""
    boxes, listed = _boxes(text), []
    if len(boxes) < 2:
        return text
    for start, end in reversed(boxes):
        gap = text[end + 1 : listed[0][0]] if listed else ""
        if listed and end >= listed[0][0]:  # around another box
            continue
        if len(gap) > 60 or (len(gap) > 20 and not _LISTS.search(gap)):
            break
        listed.insert(0, (start, end))
    return ", ".join(dict.fromkeys(text[slice(*box)] for box in listed))


def _normal(answer: str) -> str:
    """`answer` in the spelling that math-verify reads as a person would."""
    text = _without_boxes(_bare(answer))
    if not text.isascii():
        text = _ROOT.sub(r"\\sqrt{\1}", text).translate(_SYMBOLS)
        text = _NON_ASCII.sub(lambda x: _ascii(x[0]), text).replace("}^{", "")
    if _DOUBLE_ESCAPED.fullmatch(text):
        text = text.replace("\\\\", "\\")
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
    """The value of a plain number or fraction of at most 12 digits, else None."""
    if len(text) > 30 or not 0 < sum(map(str.isdigit, text)) <= 12:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if not (match := _FRACTION.fullmatch(text)):
        return None
    sign, *parts = match.groups()
    over, under = (int(part) for part in parts if part is not None)
    if under == 0:
        return None
    return Fraction(-over if sign == "-" else over, under)


def _spelling(text: str) -> str:
    """`text` without what changes only the look of its formulas."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _SPACING.sub("", text)


def _same_digits(answer: str, reference: str) -> bool | None:
    """Whether numbers in a base or with a decimal comma agree, None without them.

    A base may be left out; a comma is decimal only beside a decimal point.
    """
    based = [_IN_BASE.fullmatch(text) for text in (answer, reference)]
    if all(based):
        (one, base), (other, other_base) = ((x[1], int(x[2] or x[3])) for x in based)
        try:
            return int(one, base) == int(other, other_base)
        except ValueError:  # a name such as x_1, or not digits of that base
            return (one, base) == (other, other_base)
    if any(based):
        digits = [x[1] if x else y for x, y in zip(based, (answer, reference))]
        return True if digits[0] == digits[1] else None
    for one, other in ((answer, reference), (reference, answer)):
        if (comma := _DECIMAL_COMMA.fullmatch(one)) and "." in other:
            value, wanted = _number("{}.{}".format(*comma.groups())), _number(other)
            return True if value is not None and value == wanted else None
    return None


def _quick(answer: str, reference: str) -> Result | None:
    """The verdict where no worker is needed, else None."""
    for name, text in (("answer", answer), ("reference", reference)):
        if len(text) > _MAX_CHARS:
            return Result(UNDECIDED, f"the {name} has over {_MAX_CHARS} characters")
    if not reference:
        return Result(UNDECIDED, "the reference is blank")
    if answer == reference:
        return Result(CORRECT, "the answer is the reference")
    if _spelling(answer) == _spelling(reference):
        return Result(CORRECT, "the answer is spelled as the reference")
    if answer.replace(" ", "").isalpha() and answer.casefold() == reference.casefold():
        return Result(CORRECT, "the words are the same")
    if (same := _same_digits(answer, reference)) is not None:
        verdict = CORRECT if same else INCORRECT
        return Result(verdict, "the digits or their values are compared")
    value, wanted = _number(answer), _number(reference)
    if value is None or wanted is None:
        return None
    places = Fraction(5, 10_000_000)
    if wanted:  # of a small number six digits, lest all of them be 0
        places = min(places, 4 * places * abs(wanted))
    exact = "." not in answer + reference
    if abs(value - wanted) <= (0 if exact else places):
        return Result(CORRECT, "the numbers are equal")
    return Result(INCORRECT, f"{answer} is not {reference}")


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
                if self.process.wait() == -signal.SIGPROF:
                    raise TimeoutError
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
        return Result(**self._read(_WAIT * timeout_sec))

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

    timeout_sec: processor time that math-verify may take; then the verdict is
      undecided.
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
    wanted = reference if len(_boxes(reference)) > 1 else extract(reference)
    texts = answer, wanted or reference
    return tuple(_normal(x) if len(x) <= _MAX_CHARS else x for x in texts)
