"""The answer that a response gives. All patterns take linear time."""

import re
from collections import deque

from pr1_jax.answers import prose, words
from pr1_jax.tags import TAGS

_ANY = "7777"  # stands for the content of a box in a sentence
MAX_CHARS = 2000  # of an answer; a longer one is undecided

_MARKER = re.compile(  # or a heading of Markdown
    r"final answer[*_` ]*[:：]|^[ \t]*[#*_]+[ \t]*(?:the )?final answer[*_ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_LINE = re.compile(r"[^\r\n]*")
_DISPLAY = re.compile(r"(?P<open>\$\$|\\\[)(?P<inner>[^$]*?)(?:\$\$|\\\])")
_MORE_OF_IT = re.compile(r"\s*(?:or\b|and\b|\(?[A-J][).]|[$(]*[a-z]\s*=)")
_FENCE = re.compile(r"(?:[\s*_`]|```\w*[\r\n])*")
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{")
_LINK = re.compile(r"[^.!?]*(?:[,;&]|\b(?:and|or)\b|\\text\{ *(?:and|or))[^.!?]*|\s*")
_OPENING = " $&~(["
_TAIL = re.compile(r"[A-Za-z', ]*$")
_MORE = re.compile(r"[0-9]|\\(?!text|mathrm|q?quad|end|[\\ ,;)\]])")
_CLOSING = re.compile(r"(?:[\s$}]|\\[)\]])*")
_WORDS = re.compile(r"(?:\\(?:text|mathrm)\s*\{)?\s*[A-Za-z]{2}")
_UNTIL = re.compile(r"[.!?](?:\s|$)|[$\\]|,\s")
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

    That is the rest of the last `Final Answer:` line (of its last `\boxed{}`, if that
    stands alone there). Where the rest of that line is blank, it is the last `\boxed{}`
    with balanced braces below, else the next line or displayed formula. Without such a
    line, the line of the last `\boxed{}` is read by the same rule for boxes.
    """
    spans = boxes(response)
    markers = deque(_MARKER.finditer(response), maxlen=1)
    if markers:
        line = _LINE.match(response, markers[0].end())
        on_line = [box for box in spans if line.start() <= box[0] <= line.end()]
        if len(on_line) == 1 and on_line[0][1] > line.end():
            return _boxed(response, on_line[0])
        rest = _AFTER_ANSWER.split(line.group(), maxsplit=1)[0]
        if answer := bare(_opened(rest)):
            return answer
        if any(box[0] > line.end() for box in spans):
            return _boxed(response, spans[-1])
        if answer := _below(response, line.end()):
            return answer
    return _boxed(response, spans[-1]) if spans else None


def _opened(line: str, depth: int = 4) -> str:
    r"""The content of the last box of `line`, or of several that make one list.

    The line without its boxes' marks where a formula or words go on around them: of
    `-\boxed{5}` that is -5.
    """
    found = []  # the outer ones: where each begins, its content, and where it ends
    for start, end in boxes(line):
        if not found or start > found[-1][2]:
            head = _BOX.search(line, found[-1][2] if found else 0)
            found.append((head.start(), line[start:end], end + 1))
    if not found:
        return line
    first = len(found) - 1
    while first and _links(line[found[first - 1][2] : found[first][0]]):
        first -= 1
    contents = [content for _, content, _ in found[first:]]
    if _stands_alone(line[: found[first][0]], contents[0], line[found[-1][2] :]):
        if not all(map(str.strip, contents)):
            return ""
        listed = ", ".join(dict.fromkeys(contents))
        return _opened(listed, depth - 1) if depth else listed
    ends = [0, *(end for _, _, end in found)]
    parts = [line[k:head] + text for k, (head, text, _) in zip(ends, found)]
    return "".join([*parts, line[ends[-1] :]])


def _links(gap: str) -> bool:
    """Whether what stands between two boxes makes them a list."""
    return len(gap) <= 60 and bool(_LINK.fullmatch(gap))


def _stands_alone(before: str, content: str, behind: str) -> bool:
    """Whether no formula goes on around a box, and no word changes or denies it."""
    before = re.split(r"[.!?]\$?\s", before[-400:])[-1].rstrip(_OPENING)
    before = before.removesuffix("\\").rstrip(_OPENING)
    repeated = before.endswith(content) and before.removesuffix(content)[-1:] in " "
    return (repeated or _presents(before)) and _goes_on_in_words(behind[:1000])


def _presents(before: str) -> bool:
    """Whether a box may follow: an equals sign, a colon, or words that state it."""
    if re.search(r"\bor\b", before[-60:]):
        return False
    if not before or before[-1] == ":" or re.search(r"[^<>!:=]=$|\\in$", before):
        return True
    tail = _TAIL.search(before)[0]
    if tail.strip(", ") == "":  # a comma behind words, or a sign
        return bool(re.fullmatch("[A-Za-z ,']*", before))
    return prose.read(f"{tail} {_ANY}").formula == _ANY


def _goes_on_in_words(behind: str) -> bool:
    """Whether words about the content of a box follow, a full stop, or nothing."""
    behind = behind[_CLOSING.match(behind).end() :]
    said = re.findall("[A-Za-z']+", behind.lower())
    if _MORE.search(behind) or words.NEGATIONS.intersection(said):
        return False
    if not behind or behind[0] in ".,;)" or behind.startswith(("\\\\", "\\end", "&")):
        return not re.match(r"[,;]?\s*(?:and|or)\b", behind)
    if not _WORDS.match(behind):
        return False
    behind = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}?", r"\1 ", behind)
    return prose.follows(re.findall("[A-Za-z']+", _UNTIL.split(behind)[0].lower()))


def _boxed(response: str, box: tuple[int, int]) -> str | None:
    """What the line of a box says, or the content of a box of several lines."""
    start, end = box
    first = max(response.rfind("\n", 0, start), response.rfind("\r", 0, start)) + 1
    line = _LINE.match(response, first)
    if line.end() < end:
        return bare(response[start:end]) or None
    text = _AFTER_ANSWER.split(line.group()[: 8 * MAX_CHARS + start - first])
    return bare(_opened(next(x for x in text if "box" in x))) or None


def _below(response: str, start: int) -> str:
    """The first line, or displayed formula, of `response` behind `start`; may be ""."""
    text = _AFTER_ANSWER.split(response[start : start + 4 * MAX_CHARS], maxsplit=1)[0]
    text = text[_FENCE.match(text).end() :]
    if shown := _DISPLAY.match(text):
        return bare(shown["inner"])
    lines = [_LINE.match(text).group()]
    for more in text.splitlines()[1:]:
        if not _MORE_OF_IT.match(more):
            break
        lines.append(more)
    return bare(", ".join(lines))
