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
        rest = _AFTER_ANSWER.split(line.group(), maxsplit=1)[0]
        answer = bare(response[slice(*on_line[0])] if len(on_line) == 1 else rest)
        if answer:
            return answer
        behind = [box for box in spans if box[0] > line.end()]
        if not behind and (answer := _below(response, line.end())):
            return answer
    return bare(response[slice(*spans[-1])]) or None if spans else None


def _below(response: str, start: int) -> str:
    """The first line, or displayed formula, of `response` behind `start`; may be ""."""
    text = _AFTER_ANSWER.split(response[start : start + 4 * MAX_CHARS], maxsplit=1)[0]
    text = text[_FENCE.match(text).end() :]
    shown = _DISPLAY.match(text)
    return bare(shown["inner"] if shown else _LINE.match(text).group())
