"""The answer that a response gives. All patterns take linear time."""

import re
from collections import deque

from pr1_jax.tags import TAGS

MAX_CHARS = 2000  # of an answer; a longer one is undecided

_MARKER = re.compile(r"final answer[*_` ]*:", re.IGNORECASE)
_LINE = re.compile(r"[^\r\n]*")
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
    spans = boxes(response)
    markers = deque(_MARKER.finditer(response), maxlen=1)
    if markers:
        line = _LINE.match(response, markers[0].end())
        on_line = [box for box in spans if line.start() <= box[0] <= line.end()]
        rest = _AFTER_ANSWER.split(line.group(), maxsplit=1)[0]
        answer = bare(response[slice(*on_line[0])] if len(on_line) == 1 else rest)
        if answer:
            return answer
    return bare(response[slice(*spans[-1])]) or None if spans else None
