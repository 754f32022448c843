r"""The string checker behind the published figures, for comparison with them only.

What verl's `math_dapo` reward computes, with the marker of Parallel-R1: of the last
300 characters, the rest of the line after the last `Final Answer:`, normalised as
for Minerva (Lewkowycz et al., 2022, appendix D.1), is the normalised reference.
Special tokens are left out first, as the published code does when it decodes.

Known faults, kept on purpose: the slice can cut the marker or a `\boxed{}`; a box
counts only on the answer line; whatever is spelled differently is wrong (0.5 is not
1/2, a full stop after the number is an error), and words such as "an " or "square"
vanish from inside longer ones. Training and evaluation decide with `answers`.

Departs from the original in speed alone: linear time, where its patterns are
quadratic in a reference without closing braces.
"""

import re

from pr1_jax.tags import TAGS

_LAST_CHARS = 300
_SPECIAL = re.compile("|".join([*TAGS, r"<\|\w{3,32}\|>"]))
_ANSWER_LINE = re.compile(r"final answer\s*:\s*([^\n]+)", re.IGNORECASE)

_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", "")),
    *(("mbox", "text"), (",\\text{and}", ","), ("\\text{and}", ",")),
    ("\\text{m}", "\\text{}"),
)
_WORDS = """
square ways integers dollars mph inches hours km units \\ldots sue points feet minutes
digits cents degrees cm gm pounds meters meals edges students childrentickets multiples
"""
# In this order: each removal sees what the earlier ones have left.
_REMOVED = (
    *_WORDS.split(),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}"),
    *("\\;", ",\\!", "{,}", '"', "\\dots"),
)
_BARE_FRACTION = re.compile(r"frac([^{])(.)")
_BARE_ROOT = re.compile(r"sqrt([^{])")


def _between_dollars(line: str) -> str:
    """What the first two dollars enclose, with them; else the line."""
    parts = line.split("$", 2)
    return f"${parts[1]}$" if len(parts) == 3 else line


def _unwrapped(line: str, opening: str) -> str:
    """`line` with each `opening…}` replaced by what is in it, up to the first brace."""
    pieces, at = [], 0
    while (start := line.find(opening, at)) >= 0:
        end = line.find("}", start + len(opening))
        if end < 0:
            break
        pieces += [line[at:start], line[start + len(opening) : end]]
        at = end + 1
    return "".join([*pieces, line[at:]])


def _unboxed(line: str) -> str:
    r"""`line` without its first `\boxed{` and its last brace, where that follows."""
    start, end = line.find("\\boxed{"), line.rfind("}")
    if start < 0 or end < start + 7:
        return line
    return line[:start] + line[start + 7 : end] + line[end + 1 :]


def _plain_line(line: str) -> str:
    line = _between_dollars(line)
    for opening in ("\\text{", "\\textbf{", "\\overline{"):
        line = _unwrapped(line, opening)
    return _unboxed(line)


def normal(answer: str) -> str:
    """Returns `answer` as Minerva's evaluation normalises it."""
    answer = answer.split("=")[-1]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for removed in _REMOVED:
        answer = answer.replace(removed, "")
    answer = "\n".join(map(_plain_line, answer.split("\n")))
    answer = _BARE_FRACTION.sub(r"frac{\1}{\2}", answer)
    answer = _BARE_ROOT.sub(r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer.strip()


def check(response: str, reference: str) -> bool:
    """Returns whether the published string checker takes `response` for correct.

    Takes linear time and never raises, whatever the two strings are.
    """
    lines = _ANSWER_LINE.findall(_SPECIAL.sub("", response)[-_LAST_CHARS:])
    return bool(lines) and normal(lines[-1]) == normal(reference)
