r"""One spelling for answers: characters outside ASCII, LaTeX marks, notations of numbers.

`plain` changes how an answer is written, never what it says: `½` becomes
`\frac{1}{2}`, `1{,}000` becomes `1000`, `0.\dot 3` the fraction, `√(x+1)` the root with
braces, `\text{ cm}` the bare word. Words are read by `prose`.
"""

import re
import unicodedata

from pr1_jax.answers.extract import bare, boxes

_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "‐": "-",
        "‑": "-",
        "⁄": "/",
        "÷": "/",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "∗": "*",
        "±": r"\pm ",
        "∓": r"\mp ",
        "√": r"\sqrt ",
        "∛": r"\sqrt[3] ",
        "°": r"^{\circ}",
        "≤": r"\le ",
        "≥": r"\ge ",
        "⩽": r"\le ",
        "⩾": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "≡": r"\equiv ",
        "→": r"\to ",
        "⇒": r"\Rightarrow ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∉": r"\notin ",
        "∅": r"\emptyset ",
        "…": r"\ldots ",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "\u200b": "",
        "\ufeff": "",
    }
)
_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+|[₀-₉₊₋]+")
_LEADING_DASH = re.compile("(?:(?<=^)|(?<==)|(?<== ))[–—](?=[0-9.])")
_NON_ASCII = re.compile(r"[^\x00-\x7f]")
_MARKS = (  # in this order
    (re.compile(r"(?<!\S)(?:\*\*|`)(?=\S)|(?<=\S)(?:\*\*|`)(?!\S)"), ""),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?"), ""),
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),
    (re.compile(r"\\(?:display|text|script)style(?![A-Za-z])|\\limits"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\leq?(?:slant)?(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\geq?(?:slant)?(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|(?<![0-9)A-Za-z]) ?!=|(?<= )!="), r"\\ne "),
    (re.compile(r"(?<=[0-9)])!="), "! ="),
    (re.compile(r"\^\s*-\s*([0-9]+|[A-Za-z])"), r"^{-\1}"),
    (re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)"), r" \\times "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:dots[cbmio]?|ldots|cdots)(?![A-Za-z])|\.\.\.+"), r"\\ldots "),
    (re.compile(r"_\{?\s*\\(max|min)\s*\}?(?![A-Za-z])"), r"_{\1}"),
    (
        re.compile(r"_\{?\s*\\(?:text|mathrm|rm)\s*\{\s*([A-Za-z0-9]+)\s*\}\s*\}?"),
        r"_{\1}",
    ),
    (
        re.compile(
            r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mbox"
            r"|emph)\s*\{([^{}]*)\}"
        ),
        r" \1 ",
    ),
    (
        re.compile(
            r"\\operatorname\*?\s*\{\s*((?:arc)?(?:sin|cos|tan)h?|lcm|gcd|max|min|log|ln)"
            r"\s*\}"
        ),
        r"\\\1 ",
    ),
    (re.compile(r"\b(?:USD|EUR|GBP|INR|CAD|AUD|Rs\.?)\s?(?=[0-9])"), ""),
    (re.compile(r"\\degree(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\mathbb\s+([A-Z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\underline\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\b(?:US|CA|AU|NZ|HK)(?=\\?\$)"), ""),
)
_MULTIPLES_OF_MONEY = re.compile(
    r"(\\?\$|[€£¥₹]|\b(?:USD|EUR|GBP)\s)\s*([0-9][0-9,]*(?:\.[0-9]+)?)\s?"
    r"(k|K|M|m|mn|bn|B|b|T)(?![A-Za-z])"
)
_MULTIPLES = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
_CURRENCY = re.compile(r"\\?\$|[€£¥₹¢]")
_SPACES = re.compile(r"(?<!\\)\\[,:; ]|\\q?quad|[~\u00a0\u2009\u202f]")
_SEPARATOR = r"(?:\{,\}|\\,|\\!,\\! ?|,\\! ?|\\ |[~\u00a0\u2009\u202f])"
_GROUPED = re.compile(
    rf"(?<![0-9.,])[1-9][0-9]{{0,2}}(?:{_SEPARATOR}[0-9]{{3}})+(?!\d)"
)
_SPACED = re.compile(
    r"([+-]?[1-9][0-9]{0,2}(?: [0-9]{3})+)(?=$|\.[0-9]|\s*[A-Za-z%\\])"
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
_CLEAR_LIST = re.compile(r"[0-9}],\s+\S|;|\b(?:and|or)\b")
_MIXED = re.compile(
    r"(?<![0-9./^_{])([0-9]+) (?:and )?([0-9]+)/([0-9]+)(?![0-9.])|"
    r"(?<![0-9./^_{])([0-9]+)[ ]?\\frac([0-9])([0-9])(?![0-9])"
)
_ORDINAL = re.compile(r"(?<=1)st\b|(?<=2)nd\b|(?<=3)rd\b|(?<=[0-9])th\b")
_SCIENTIFIC = re.compile(
    r"(?<![A-Za-z0-9.\\_^{])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([+-]?[0-9]+)(?![0-9.A-Za-z])"
)
_REPEATING = re.compile(
    r"([0-9]{0,15})\.([0-9]{0,15})\\(?:overline|bar)\s*\{([0-9]{1,15})\}(?![0-9])"
)
_BRACKETED = re.compile(r"([0-9]{0,15})\.([0-9]{0,15})\(([0-9]{1,15})\)(?![0-9.])")
_DOTTED = re.compile(
    r"([0-9]{0,15})\.([0-9]{0,15})((?:\\dot\s*(?:\{[0-9]\}|[0-9])[0-9]{0,12}){1,2})(?![0-9])"
)
_GOES_ON = re.compile(r"(?<![0-9.])([0-9]{0,15})\.([0-9]{1,30})\s*\\ldots")
_TWICE = re.compile(r"([0-9]*?)([0-9]{1,10}?)(?:\2)+")
_WORD_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(pi|ln|log|exp|infinity|sqrt|arcsin|arccos|arctan|sin|cos|tan"
    r"|csc|cot|sinh|cosh|tanh|gcd|lcm|sec(?=\s*[\^(\\]|\s+[a-z](?![a-z])))(?![A-Za-z])"
)
_ROOT_OF_ONE = re.compile(r"\\sqrt\s*([0-9]+|[A-Za-z](?![A-Za-z]))")
_FACTORIAL_POWER = re.compile(r"([0-9]+)!\s*\^")
_TAKES = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1}
_TAKING = re.compile(r"\\(?:frac|binom|sqrt)(?![A-Za-z])(?:\[[^\[\]]*\])?")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_CALL = re.compile(r"\\sqrt\s*\(|\^\s*\(")
_BASE_E = re.compile(r"\\exp\s*\(")
_DOUBLE_ESCAPED = re.compile(r"(?:[^\\]|\\\\)*\\\\[A-Za-z](?:[^\\]|\\\\)*")
_LISTS = re.compile(r"[,;]|\b(?:and|or)\b")


def plain(answer: str) -> str:
    r"""`answer` in ASCII, without LaTeX that only shapes it, numbers in one notation."""
    text = _without_boxes(bare(answer))
    if not text.isascii():
        text = _RAISED.sub(lambda x: _script(x[0]), _LEADING_DASH.sub("-", text))
        text = _NON_ASCII.sub(lambda x: _ascii(x[0]), text.translate(_SYMBOLS))
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    elif _DOUBLE_ESCAPED.fullmatch(text):
        text = text.replace("\\\\", "\\")
    for pattern, form in _MARKS:
        text = pattern.sub(form, text)
    text = _with_arguments(text)
    text = _MULTIPLES_OF_MONEY.sub(
        lambda x: f"{x[2]} {_MULTIPLES[x[3][0].lower()]} ", text
    )
    return _numbers(_CURRENCY.sub(" ", text)).strip()


def _numbers(text: str) -> str:
    """`text` with each notation of a number that has several as one of them."""
    text = _GROUPED.sub(lambda x: re.sub(r"[^0-9]", "", x[0]), text)
    text = _SPACES.sub(" ", text).replace("\\!", "")
    text = re.sub(r"\s+", " ", text).strip()
    if spaced := _SPACED.match(text):
        text = spaced[1].replace(" ", "") + text[spaced.end() :]
    clear = _CLEAR_LIST.search(text)
    text = _THOUSANDS.sub(lambda x: _without_commas(x, bool(clear)), text)
    text = _REPEATING.sub(lambda x: _fraction(*x.groups()), text)
    text = _BRACKETED.sub(lambda x: _fraction(*x.groups()), text)
    text = _DOTTED.sub(_dotted, text)
    text = _GOES_ON.sub(_going_on, text)
    text = _ORDINAL.sub("", text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = _MIXED.sub(_mixed, text)
    text = _WORD_FUNCTION.sub(r"\\\1 ", text).replace("\\infinity", "\\infty")
    text = _with_braces(_ROOT_OF_ONE.sub(r"\\sqrt{\1}", text))
    text = _FACTORIAL_POWER.sub(r"(\1!)^", text)
    return text.replace("**", "^")


def _script(chars: str) -> str:
    """Raised or lowered characters as one power or index."""
    form = unicodedata.decomposition(chars[0]).split()[0]
    plain = unicodedata.normalize("NFKC", chars).replace("−", "-")
    return ("^" if form == "<super>" else "_") + f"{{{plain}}}"


def _without_commas(match: re.Match, clear: bool) -> str:
    """A number without its separators; (12,345) is a pair, unless commas say else."""
    start, end = match.span()
    around = match.string[max(0, start - 1) : start] + match.string[end : end + 1]
    bracketed = any(char in "([{)]}\\" for char in around)
    return match[0] if bracketed and not clear else match[0].replace(",", "")


def _ascii(char: str) -> str:
    """LaTeX or ASCII for a digit, letter or power outside ASCII, else `char`."""
    form, *_ = unicodedata.decomposition(char).split() or [""]
    if form == "<fraction>":
        return r"\frac{{{}}}{{{}}}".format(
            *unicodedata.normalize("NFKC", char).split("⁄")
        )
    if form.startswith("<"):
        simple = unicodedata.normalize("NFKC", char)
        return simple if len(simple) == 1 else char
    greek = re.fullmatch(
        r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(char, "")
    )
    if greek:
        name = greek[2].lower()
        return f"\\{name if greek[1] == 'SMALL' else name.capitalize()} "
    return str(unicodedata.decimal(char, char))


def _without_boxes(text: str) -> str:
    """The last boxes of `text` that make one list, if there are several boxes.

    Only references come with boxes here: `extract` has opened those of answers.
    """
    spans, listed = boxes(text), []
    if len(spans) < 2:
        return text
    for start, end in reversed(spans):
        gap = text[end + 1 : listed[0][0]] if listed else ""
        if listed and end >= listed[0][0]:  # around another box
            continue
        if len(gap) > 60 or (len(gap) > 20 and not _LISTS.search(gap)):
            break
        listed.insert(0, (start, end))
    return ", ".join(dict.fromkeys(text[slice(*box)] for box in listed))


def _fraction(whole: str, fixed: str, repeated: str) -> str:
    """The fraction of `whole.fixed` with `repeated` for ever behind it."""
    over = int(whole + fixed + repeated) - int(whole + fixed or "0")
    under = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    return rf"\frac{{{over}}}{{{under}}}"


def _dotted(match: re.Match) -> str:
    r"""The fraction of `0.1\dot 6` or of `0.\dot 14\dot 2`, digits from dot to dot."""
    whole, fixed, dotted = match.groups()
    parts = re.findall(r"\\dot\s*\{?([0-9])\}?([0-9]*)", dotted)
    if parts[-1][1]:  # digits behind the last dot: no notation that is known
        return match[0]
    return _fraction(whole, fixed, "".join(map("".join, parts)))


def _going_on(match: re.Match) -> str:
    r"""The fraction of `0.333\ldots`; other digits with dots behind stay a decimal."""
    whole, digits = match.groups()
    repeats = _TWICE.fullmatch(digits)
    if repeats and len(digits) - len(repeats[1]) >= 3:
        return _fraction(whole, repeats[1], repeats[2])
    return f"{whole}.{digits}" if len(digits) >= 6 else match[0]


def _mixed(match: re.Match) -> str:
    """`5 1/4` and `5 and 1/4` as a mixed number, where the fraction is below 1."""
    whole, over, under = (x for x in match.groups() if x is not None)
    return rf"{whole}\frac{{{over}}}{{{under}}}" if int(over) < int(under) else match[0]


def _with_braces(text: str) -> str:
    r"""`\sqrt(x)` and `2^(x)` with braces, `\exp(x)` as a power of e."""
    text = _BASE_E.sub("e^(", text)
    start = 0
    while call := _CALL.search(text, start):
        depth, end = 1, call.end()
        while end < len(text) and depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        if depth:
            break
        inner = text[call.end() : end - 1]
        head = call[0].rstrip("( ") + "{"
        text = text[: call.start()] + head + inner + "}" + text[end:]
        start = call.start() + len(head)
    return text


def _with_arguments(text: str) -> str:
    r"""`\frac\pi6`, `\frac{a}b` and `\binom nk` with their arguments in braces."""
    done, end = [], 0
    for match in _TAKING.finditer(text):
        if match.start() < end:
            continue
        form, stop = _argument(text, match.start(), 0)
        done += [text[end : match.start()], form]
        end = stop
    return "".join([*done, text[end:]])


def _argument(text: str, start: int, depth: int) -> tuple[str, int]:
    """The command, group or character at `start`, with its arguments, and its end."""
    command = _TAKING.match(text, start) or _COMMAND.match(text, start)
    if not command:
        return text[start], start + 1
    form, end = command[0], command.end()
    for _ in range(_TAKES.get(form.partition("[")[0], 0)):
        while end < len(text) and text[end] == " ":
            end += 1
        if end >= len(text) or text[end] in "{(" or depth > 20:
            stop = _group_end(text, end)
            form, end = form + text[end:stop], stop
            continue
        inner, end = _argument(text, end, depth + 1)
        form += f"{{{inner}}}"
    return form, end


def _group_end(text: str, start: int) -> int:
    """Where the group in braces that begins at `start` ends; `start` without one."""
    if text[start : start + 1] != "{":
        return start
    depth = 0
    for k in range(start, len(text)):
        depth += (text[k] == "{") - (text[k] == "}")
        if depth == 0:
            return k + 1
    return len(text)
