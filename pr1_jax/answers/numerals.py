r"""Tokens of an answer, with numbers and operators in words as digits and signs.

`five million` becomes 5000000, `two and a half` a fraction, `5 squared` the power.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from pr1_jax.answers import words

_TOKEN = re.compile(
    r"\\begin\s*\{array\}\s*\{[clr| ]*\}"
    r"|\\(?:begin|end|overline|mathbb|mathcal|hat|vec|bar|boxed)\*?\s*\{[^{}]*\}"
    r"|\\[A-Za-z]+|\\.|[_^]\s*\{[A-Za-z0-9+\- ]*\}"
    r"|(?P<word>[tT]-[a-z]{3,}|[A-Za-z]+(?:'[A-Za-z]+)*)|(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|\S",
    re.DOTALL,
)
_UNIT_SIGN = re.compile(rf"\^[123]|/(?:{words.SYMBOL.pattern})")


@dataclass
class Token:
    """A word, a number, a command, or one other character.

    kind: "word", "number" or "other".
    spaced: whether there is space before it.
    """

    text: str
    kind: str
    spaced: bool

    @property
    def low(self) -> str:
        """The text, of a word in lower case."""
        return self.text.lower() if self.kind == "word" else self.text


def tokens_of(text: str) -> list[Token]:
    """The tokens of an answer; letters inside braces are no words."""
    found, end, depth = [], 0, 0
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        depth += (match[0] == "{") - (match[0] == "}")
        if depth and kind == "word":  # letters of a formula
            kind = "other"
        spaced = match.start() > end
        found.append(Token(match[0], kind, spaced))
        end = match.end()
    return _units(found)


def _units(tokens: list[Token]) -> list[Token]:
    """`tokens` with the signs of a unit, as of `kg/m^3`, in one token with its word."""
    done, depth, k = [], 0, 0
    while k < len(tokens):
        token = tokens[k]
        divides = token.text == "/" and not depth and done and is_value(done[-1])
        if divides and k + 1 < len(tokens) and _is_unit(tokens[k + 1]):  # $15/hr
            done.append(Token(f"/{tokens[k + 1].text}", "word", True))
            k += 2
            continue
        depth += (token.text in "([{") - (token.text in ")]}")
        done.append(token)
        k += 1
        if depth or not _is_unit(token) or len(done) < 2 or not is_value(done[-2]):
            continue
        text = token.text
        while k < len(tokens):
            sign = tokens[k].text
            follows = tokens[k + 1] if k + 1 < len(tokens) else None
            if re.fullmatch(r"\^\s*\{[123]\}", sign):
                text, k = text + sign, k + 1
            elif follows and (
                _UNIT_SIGN.fullmatch(sign + follows.text)
                or (sign == "/" and words.is_unit(follows.low))
            ):
                text, k = text + sign + follows.text, k + 2
            else:
                break
        done[-1] = Token(text, "word", token.spaced)
    return done


def _is_unit(token: Token) -> bool:
    """Whether a token names a unit by more than one letter."""
    return token.kind == "word" and words.is_unit(token.low)


def text_of(tokens: list[Token]) -> str:
    """The text that `tokens` stand for."""
    return "".join(" " * x.spaced + x.text for x in tokens).strip()


# --- Numbers in words -----------------------------------------------------------------


def with_numbers(tokens: list[Token]) -> list[Token]:
    """`tokens` with each number that is spelled out, wholly or partly, in digits."""
    done, k = [], 0
    while k < len(tokens):
        found = _number_at(tokens, k)
        if found is None:
            done.append(tokens[k])
            k += 1
            continue
        value, decimal, end = found
        form = str(value.numerator)
        if value.denominator > 1:
            form = (
                f"{float(value):.12g}"
                if decimal
                else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
            )
        done.append(Token(form, "number", tokens[k].spaced))
        k = end
    return done


def _number_at(tokens: list[Token], k: int) -> tuple[Fraction, bool, int] | None:
    """The number that begins at token `k`, whether it has decimals, and its end."""
    count = _Count()
    start = k
    if tokens[k].low in ("a", "an") and k + 1 < len(tokens):
        follows = tokens[k + 1].low
        if follows not in words.SCALES and follows not in ("half", "quarter"):
            return None
        k += 1
    elif tokens[k].kind == "number" and "\\" not in tokens[k].text:
        if k and tokens[k - 1].text in ("/", ".", ","):
            return None
        count.current, count.spelled = Fraction(tokens[k].text), False
        k += 1
        over = [x.text for x in tokens[k : k + 2]]
        if over[:1] == ["/"] and over[1:] and tokens[k + 1].kind == "number":
            under = Fraction(over[1])
            if not under or _low(tokens, k + 2) not in words.SCALES:
                return None
            count.current /= under
            k += 2
    digits = k > start and tokens[start].kind == "number"
    while k < len(tokens):
        step = count.step(tokens, k)
        if not step:
            break
        k += step
    if not count.words or count.value is None:
        return None
    return count.value, digits and "." in tokens[start].text, k


def _low(tokens: list[Token], k: int) -> str:
    return tokens[k].low if 0 <= k < len(tokens) else ""


class _Count:
    """A number in words, as far as it was read."""

    def __init__(self) -> None:
        self.total, self.current, self.words, self.ended = Fraction(0), None, 0, False
        self.scaled, self.multiplied, self.spelled = False, False, True
        self.inner = False  # the half of two and a half

    @property
    def value(self) -> Fraction | None:
        if self.current is None and not self.scaled:
            return None
        return self.total + (self.current or 0)

    def step(self, tokens: list[Token], k: int) -> int:
        """How many tokens from `k` on belong to the number: it takes them in."""
        word, skipped = tokens[k].low, 0
        if self.ended:  # two and a half million
            if word not in words.SCALES or self.multiplied:
                return 0
            self.current, self.total = self.value * words.SCALES[word], Fraction(0)
            self.multiplied = True
            return 1
        if word == "," and self.scaled and self.current is None and self.spelled:
            word, skipped = _low(tokens, k + 1), 1  # one thousand, two hundred
            if word not in words.SMALL and word not in words.TENS:
                return 0
        if word == "-" and self.words and not tokens[k].spaced:
            skipped, word = 1, _low(tokens, k + 1)
        elif word == "and" and self.value is not None:
            skipped, word = 1, _low(tokens, k + 1)
            follows = _low(tokens, k + 1), _low(tokens, k + 2)
            if self.current is None and self.scaled and words.PARTS.keys() & {*follows}:
                return 0  # a dozen and a half may be 12.5 or 18
            if part := self._and_part(tokens, k + 1):
                return 1 + part
            if not (self.words and (self.current is None or self.current >= 100)):
                return 0
            if word not in words.SMALL and word not in words.TENS:
                return 0
        more = tokens[k].kind == "number" and self.scaled and self.current is None
        if more and _low(tokens, k + 1) in words.SCALES:  # 3 million 200 thousand
            self.current = Fraction(tokens[k].text)
            return 1
        taken = self._take_word(word, tokens, k + skipped)
        self.words += bool(taken)
        return skipped + taken if taken else 0

    def _take_word(self, word: str, tokens: list[Token], k: int) -> int:
        if word in words.SMALL or word in words.TENS:
            value = words.SMALL.get(word, words.TENS.get(word))
            below = 10 if value < 10 else 100
            free = self.current is None or (
                self.words
                and self.current % below == 0
                and (self.current >= 20 and value > 0)
            )
            if not free:
                return 0
            self.current = (self.current or Fraction(0)) + value
            return 1
        if word in words.SCALES:
            bare = self.current is None and not self.words
            if self.current is None and self.scaled or bare and word.endswith("s"):
                return 0  # hundreds of people are no number
            scale = words.SCALES[word]
            value = (1 if self.current is None else self.current) * scale
            self.scaled = True
            if scale == 100:
                self.current = value
            else:
                self.total, self.current = self.total + value, None
            return 1
        return self._take_part(word, tokens, k)

    def _take_part(self, word: str, tokens: list[Token], k: int) -> int:
        """A half, three quarters, one-sixth; half a million."""
        if word not in words.PARTS:
            return 0
        alone = self.current is None and not self.scaled
        if alone and word not in ("half", "quarter"):
            return 0
        follows = [_low(tokens, k + n) for n in (1, 2, 3)]
        gap = 0
        while gap < 2 and follows[gap] in ("of", "a"):
            gap += 1
        scaled = not self.inner and words.SCALES.get(follows[gap])
        if alone and word == "quarter" and not scaled and _low(tokens, k - 1) != "a":
            return 0
        if not alone and not word.endswith("s") and self.value != 1:
            return 0  # twenty-fifth is no part
        value = (Fraction(1) if alone else self.value) / words.PARTS[word]
        self.total, self.current, self.ended = Fraction(0), value, True
        if scaled:
            self.current = value * scaled
            return 2 + gap
        return 1

    def _and_part(self, tokens: list[Token], k: int) -> int:
        """Takes `a half` or `three quarters` behind `two and`."""
        inner = _Count()
        inner.inner = True
        taken = 0
        if _low(tokens, k) in ("a", "one"):
            taken, inner.current = 1, Fraction(1)
        while k + taken < len(tokens) and not inner.ended:
            step = inner.step(tokens, k + taken)
            if not step:
                break
            taken += step
        if not inner.ended or not 0 < inner.value < 1:
            return 0
        self.total, self.current = self.value + inner.value, Fraction(0)
        self.ended, self.scaled = True, True
        self.words += 1
        return taken


# --- Operators in words ---------------------------------------------------------------

_OPERATORS = (  # words, what they are, between two terms or behind one
    (("multiplied", "by"), "\\cdot ", True),
    (("divided", "by"), "/", True),
    (("times",), "\\cdot ", True),
    (("plus",), "+", True),
    (("minus",), "-", True),
    (("over",), "/", True),
    (("raised", "to", "the", "power", "of"), "^", True),
    (("to", "the", "power", "of"), "^", True),
    (("to", "the", "power"), "^", True),
    (("squared",), "^{2}", False),
    (("cubed",), "^{3}", False),
    (("factorial",), "!", False),
    (("percent",), "\\%", False),
    (("per", "cent"), "\\%", False),
    (("percentage",), "\\%", False),
    (("pct",), "\\%", False),
)
_ROOTS = {"square": "\\sqrt", "cube": "\\sqrt[3]"}


def with_operators(tokens: list[Token]) -> list[Token]:
    """`tokens` with operators in words as signs, where their terms stand beside them."""
    done, k = [], 0
    while k < len(tokens):
        low = [_low(tokens, k + n) for n in range(5)]
        sign = low[0] == "negative" and not (done and is_value(done[-1]))
        if (sign or low[0] == "minus") and _is_term(tokens, k + 1):
            done.append(Token("-", "other", tokens[k].spaced))
            k += 1 + (tokens[k + 1].text == "-")  # negative-five
            continue
        start = k + (low[0] == "the")
        if _low(tokens, start) in _ROOTS and _low(tokens, start + 1) == "root":
            at = start + 2 + (_low(tokens, start + 2) == "of")
            if at < len(tokens) and tokens[at].kind == "number":
                form = f"{_ROOTS[_low(tokens, start)]}{{{tokens[at].text}}}"
                done.append(Token(form, "number", True))
                k = at + 1
                continue
        for name, sign, between in _OPERATORS:
            if tuple(low[: len(name)]) != name or not (done and is_value(done[-1])):
                continue
            end = k + len(name)
            if between and not _is_term(tokens, end):
                continue
            done.append(Token(sign, "other", False))
            if sign == "^":
                done.append(Token(f"{{{tokens[end].text}}}", "other", False))
                end += 1
            k = end
            break
        else:
            if low[0] == "equals":
                done.append(Token("=", "other", True))
            else:
                done.append(tokens[k])
            k += 1
    return done


def is_value(token: Token) -> bool:
    """Whether a term may end with `token`."""
    return (
        token.kind == "number"
        or len(token.text) == 1
        and (token.text.isalpha() or token.text in ")}]!")
        or token.text.startswith(("\\pi", "^{"))
        and token.kind == "other"
    )


def _is_term(tokens: list[Token], k: int) -> bool:
    """Whether a term begins at token `k`."""
    if k >= len(tokens):
        return False
    token = tokens[k]
    single = token.kind == "word" and len(token.text) == 1 and token.low != "a"
    return (
        token.kind == "number"
        or single
        or token.text.startswith(("\\frac", "\\sqrt", "\\pi", "("))
        or (token.text == "-" and k + 1 < len(tokens) and _is_term(tokens, k + 1))
    )
