"""The answer that a response gives. All patterns take linear time."""

import re
from collections import deque

from pr1_jax.tags import TAGS

MAX_CHARS = 2000  # of an answer; a longer one is undecided

_MARKER = re.compile(r"final answer[*_` ]*[:：]", re.IGNORECASE)
_LINE = re.compile(r"[^\r\n]*")
_DISPLAY = re.compile(r"(?P<open>\$\$|\\\[)(?P<inner>[^$]*?)(?:\$\$|\\\])")
_FENCE = re.compile(r"(?:[\s*_`]|```\w*[\r\n])*")
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{")
_PRESENTS = re.compile(  # what may stand around a box without changing it
    r"[\s$.,:;*_`()\[\]\\]*(?:(?:so|thus|hence|therefore|the|final|correct|answer|value"
    r"|total|sum|result|solution|is|are|equals|of|we|get|have|it|dollars|units|cm|meters"
    r"|degrees|miles|hours|minutes|days|years|people|square|cubic|text|in|all|i|hope)"
    r"(?![A-Za-z])[\s$.,:;*_`{}()\[\]\\]*)*",
    re.IGNORECASE,
)
_LINK = re.compile(r"[\s$,;&]*(?:\\text\{\s*)?(?:and|or)?[\s$,;&}]*")
_MINUS = re.compile(r"(?:^|[\s$(=:])-\s*\\{1,2}(?:boxed|fbox)\s*\{$")
_CHANGES = re.compile(
    r"\s*(?:\\?%|!|\^|/|[+*]|,?[0-9]|\\(?:cdot|times|pm)|"
    r"\$?\s*(?:hundred|thousand|million|billion|trillion|percent|dozen)\b).*"
)
_AFTER_ANSWER = re.compile("|".join([*TAGS, r"<\|\w{3,}\|>"]))  # as <|im_end|>
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def boxes(text: str) -> list[tuple[int, int]]:
    r"""Where the content of each `\boxed{}` with balanced braces starts and ends."""
    spans, opened = [], []
    if "box" not in text:
        return spans
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "{" or (token[-1] == "{" and "box" in token):
            opened.append(match)
        elif token == "}" and opened:
            start = opened.pop()
            if start.group() != "{":
                spans.append((start.end(), match.start()))
    return sorted(spans)


def bare(answer: str) -> str:
    """`answer` without the Markdown marks, full stop and dollars around it."""
    answer = answer.strip()
    for _ in range(8 if len(answer) <= MAX_CHARS else 0):
        before = answer
        answer = _without_stop(answer.strip(' \t\r\n*_`"“”'))
        for start, end in _DELIMITERS:
            inner = answer[len(start) : -len(end)]
            whole = answer == start + inner + end and start not in inner
            answer = inner if whole else answer
        if answer == before:
            break
    return answer


def _without_stop(answer: str) -> str:
    """`answer` without the punctuation behind it; three dots say something and stay."""
    bare = answer.rstrip(".,;: \\\n")
    return answer if "..." in answer[len(bare) :] else bare


def extract(response: str) -> str | None:
    r"""Returns the answer that `response` gives, None if it gives none.

    That is the rest of the last `Final Answer:` line (of its one `\boxed{}`, if it
    has one). Where the rest of that line is blank, it is the last `\boxed{}` with
    balanced braces behind it, else the next line or displayed formula; without any of
    these, and without such a line, it is the last `\boxed{}`.
    """
    spans = boxes(response)
    markers = deque(_MARKER.finditer(response), maxlen=1)
    if markers:
        line = _LINE.match(response, markers[0].end())
        on_line = [box for box in spans if line.start() <= box[0] <= line.end()]
        if len(on_line) == 1 and on_line[0][1] > line.end():  # a box of several lines
            return bare(response[slice(*on_line[0])]) or None
        rest = _AFTER_ANSWER.split(line.group(), maxsplit=1)[0]
        if answer := bare(_opened(rest)):
            return answer
        behind = [box for box in spans if box[0] > line.end()]
        if not behind and (answer := _below(response, line.end())):
            return answer
    if not spans:
        return None
    return bare(_with_signs(response, *spans[-1])) or None


def _opened(line: str) -> str:
    r"""The content of the one box of `line`, if the rest only presents it.

    Else the line without its boxes' marks: of `-\boxed{5}` that is -5.
    """
    spans = boxes(line)
    outer = [x for x in spans if not any(y[0] < x[0] and x[1] < y[1] for y in spans)]
    if not outer:
        return line
    parts, end = [], 0
    for start, stop in outer:
        head = _BOX.search(line, end, start)
        parts += [line[end : head.start()], line[start:stop]]
        end = stop + 1
    around = "".join([*parts[::2], line[end:]])
    if len(outer) == 1 and (_PRESENTS.fullmatch(around) or parts[1] in around.split()):
        return parts[1]
    listed = all(_LINK.fullmatch(part) for part in parts[2::2])
    if listed and _PRESENTS.fullmatch(parts[0] + line[end:]):
        return ", ".join(dict.fromkeys(parts[1::2]))
    return "".join([*parts, line[end:]])


def _with_signs(response: str, start: int, end: int) -> str:
    """The content of a box, with a minus before it and what changes it behind it."""
    before = _MINUS.search(response[max(0, start - 40) : start])
    behind = _CHANGES.match(response, end + 1)
    return ("-" if before else "") + response[start:end] + (behind[0] if behind else "")


def _below(response: str, start: int) -> str:
    """The first line, or displayed formula, of `response` behind `start`; may be ""."""
    text = _AFTER_ANSWER.split(response[start : start + 4 * MAX_CHARS], maxsplit=1)[0]
    text = text[_FENCE.match(text).end() :]
    shown = _DISPLAY.match(text)
    return bare(shown["inner"] if shown else _LINE.match(text).group())
