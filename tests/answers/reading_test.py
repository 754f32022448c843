"""Answers in words, in other spellings, and of every size: what is right, what is not.

A wrong answer may be found incorrect or undecided, but never correct.
"""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pr1_jax.answers import numerals, prose, words
from pr1_jax.answers.verify import check, check_many

RIGHT = {
    "numbers in words": [
        ("5000000", "5 million"),
        ("1.2 billion people", "1200000000"),
        ("120 thousand", "120,000"),
        ("15 hundreds", "1500"),
        ("three hundred and five", "305"),
        ("twenty-five", "25"),
        ("two dozen eggs", "24"),
        ("2.5 dozen", "30"),
        ("half a million", "500000"),
        ("2 quadrillion", "2000000000000000"),
        ("3 lakh", "300000"),
        ("quarter of a million", "250000"),
        ("1/2 million", "500000"),
        ("$7M", "7000000"),
        ("$12k", "12000"),
        ("12k", "12000"),
        ("2 million", "2,000 thousand"),
        ("5 tenths", "0.5"),
        ("one-sixth", "1/6"),
        ("three quarters", "0.75"),
        ("two and a half hours", "2.5"),
        ("one and three quarters", "1.75"),
        ("2 and 1/2", "2.5"),
        ("Twelve apples", "12"),
        ("zero", "0"),
    ],
    "operators in words": [
        ("negative 5", "-5"),
        ("minus 2.5", "-2.5"),
        ("negative one half", "-1/2"),
        ("6 times 2", "12"),
        ("10 divided by 4", "2.5"),
        ("5 minus 2", "3"),
        ("5 squared", "25"),
        ("x squared", "x^2"),
        ("10 to the power of 6", "1000000"),
        ("the square root of 16", "4"),
        ("five factorial", "120"),
        ("3 pi", r"3\pi"),
    ],
    "spellings": [
        ("exp(-x)", "e^{-x}"),
        ("x = 1,000", "1000"),
        ("1,000 and 2,000", "1000, 2000"),
        (r"\{1,000, 2,000\}", "1000, 2000"),
        ("5 1/4 cups", "5.25"),
        (r"12\frac12\%", "12.5%"),
        (r"0.\dot 3", "1/3"),
        (r"0.1\dot{6}", "1/6"),
        (r"0.\dot 14285\dot 7", "1/7"),
        ("0.999...", "1"),
        ("1.41414...", "140/99"),
        ("US$5", "5"),
        ("20 °C", "20"),
        ("5m/s", "5"),
        ("15 kg/m^3", "15"),
        (r"64 \text{ units}^2", "64"),
        (r"4\pi \text{ cm}^2", r"4\pi"),
        ("18 square meters", r"18 \text{ m}^2"),
        ("5 kilometers", "5 km"),
        ("10weeks", "10"),
        ("the 5th", "5"),
        ("0.(6)", "2/3"),
        ("10^-3", "0.001"),
        ("3 x 10^3", "3000"),
        ("–5", "-5"),
        ("5! = 120", "120"),
        ("x>1 and x<3", "(1,3)"),
        (r"(-\infty,1) \text{ or } (3,\infty)", r"(-\infty,1)\cup(3,\infty)"),
        (r"$-\boxed{5}$", "-5"),
        (r"$\boxed{1}$, $\boxed{2}$", "1,2"),
        (r"4\sqrt(3)", r"4\sqrt{3}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("2(3)", "6"),
        ("2^6 3^5", "15552"),
        (r"11,\! 111,\! 100", "11111100"),
        ("**42**", "42"),
        (r"|AB| = 1", "1"),
        (r"\frac{NO}{BO} = \frac{1}{2}", "0.5"),
        ("(p,q) = (3,2)", "(3,2)"),
        ("12", '["12"]'),
        ("2 and 1", '["1","2"]'),
        ("1/2", r"['\frac{1}{2}']"),
    ],
    "choices": [
        ("B. 12", "B"),
        ("(B) 12", "B"),
        ("Option B", "B"),
        (r"\textbf{(D)}\ 24", "D"),
        ("The correct answer is C.", "C"),
        ("E. None of the above", "E"),
        ("A", "A. 5"),
        (r"A. $\frac{1}{2}$", "1/2"),
        ("C = 12", "12"),
    ],
    "sentences": [
        ("He has 12 dollars", "12"),
        ("She has 12 apples left", "12"),
        ("We get 12", "12"),
        ("So 12", "12"),
        ("Ans: 12", "12"),
        ("Total = $1,250", "1250"),
        ("The minimum value is -2", "-2"),
        ("The least common multiple is 12", "12"),
        (r"The final answer is $\frac{5}{36}$. I hope it is correct.", "5/36"),
        ("The largest $n$ is 34.", "34"),
        ("12 is the answer", "12"),
        ("12 apples are left over", "12"),
        ("12 of them", "12"),
        ("5 miles per hour", "5"),
        ("He needs 5 more dollars", "5"),
        ("3 cm and 4 cm", "3, 4"),
        ("18 (eighteen)", "18"),
        ("He scored 54 points", "54"),
        ("It has a length of 632 centimeters.", "632"),
        ("He picked up 10 shells", "10"),
    ],
    "values": [
        ("9007199254740993", "2^{53} + 1"),
        (r"\sqrt{6+2\sqrt{5}}", r"1+\sqrt{5}"),
        (r"\frac{4^{50}}{2^{100}}", "1"),
        (r"e^{-100}", r"\frac{1}{e^{100}}"),
        (r"1.6\times 10^{-19}", "1.6e-19"),
        (r"\{2^{-70}, 2^{-71}\}", r"\{2^{-71}, 2^{-70}\}"),
        (r"\pi \approx 3.1415", r"\pi"),
        (r"\frac{2}{3} \approx 0.667", "2/3"),
        (r"\cos\frac{\pi}{5} - \cos\frac{2\pi}{5}", "1/2"),
        ("0.1+0.2", "0.3"),
    ],
}
WRONG = {
    "numbers in words": [
        ("5", "5 million"),
        ("$7 million", "$7 billion"),
        ("12 dozen", "12"),
        ("5 thousandths", "5"),
        ("half of 30", "0.5"),
        ("half of 30", "30"),
        ("twenty-fifth", "20"),
        ("3 sixteenths", "3"),
        ("5 quadrillion", "5"),
        ("5 lakh", "5"),
        ("In thousands: 5", "5"),
        ("a dozen and a half", "12.5"),
        ("one in five", "1"),
        ("two and a half hours", "2"),
    ],
    "operators in words": [
        ("5 minus 2", "5"),
        ("7 plus 3", "3"),
        ("5 squared", "5"),
        ("5 negative", "5"),
        ("negative 5", "5"),
        ("5 factorial", "5"),
        ("log of 100", "100"),
        ("the sum of 3 and 4", "3, 4"),
        ("triple 4", "4"),
        ("5 over 6", "5"),
        ("negative-five", "5"),
        ("5 halved", "5"),
        ("square(7)", "7"),
        ("sine 30", "30"),
        ("x squared is 25", "25"),
        ("Answer squared: 5", "5"),
    ],
    "around a box": [
        (r"-\boxed{5}", "5"),
        (r"not \boxed{5}", "5"),
        (r"\boxed{5} million", "5"),
        (r"\frac{\boxed{5}}{7}", "5"),
        (r"\boxed{7},000", "7"),
        (r"6 or \boxed{5}", "5"),
        (r"\boxed{7}/\boxed{8}", "7, 8"),
    ],
    "letters": [
        ("2R", "2r"),
        (r"\frac{R}{r}", "1"),
        (r"\Delta", r"\delta"),
        ("AB", "ab"),
        (r"\gcd(a,b)", "1"),
        ("a_{11}", "a_{12}"),
        ("x_1", "x"),
        ("f(1) = 3", "f(2) = 3"),
        (r"\pm x = 5", "5"),
        (r"x \perp y = 5", "5"),
        ("x^{-1} = 5", "5"),
    ],
    "functions": [
        (r"\lfloor n/2 \rfloor", r"\lfloor n/3 \rfloor"),
        (r"\lfloor n/2 \rfloor", r"\lceil n/2 \rceil - 1"),
        ("x+1", "|x+1|"),
        (r"\max(x,10)", "10"),
        (r"\sqrt{(x-2)^2}", "2-x"),
        (r"\arcsin(\sin x)", "x"),
        ("0.5x+10^{10}", "0.5x+10^{10}+1"),
        (r"\frac{x}{1+e^{-1000}}", "x"),
    ],
    "several values": [
        (r"500 \approx 501 \approx 502", "502"),
        (r"72 \approx 73", "73"),
        (r"\frac{1}{3} \approx 0.34", "1/3"),
        (r"\pi \approx -3.14", r"\pi"),
        (r"72 \approx 73", "72"),
        ("5≅3", "5"),
        ("x = 7 = 6", "6"),
        ("S = 2+2 = 5", "5"),
        ("(y,x) = (1,2)", "(1,2)"),
        ("y=1, x=2", "(1,2)"),
        ("0 or 1", "0<x<1"),
        (r"\pm 1", "-1<x<1"),
    ],
    "notations": [
        ("½²", "1/22"),
        (r"2^{3}²", "2^{32}"),
        (r"10\% \cdot 200", "2000"),
        (r"\frac{3}{1}\frac{1}{2}", "3.5"),
        ("3!!", "720"),
        ("⊕5", "5"),
        (r"5 \models 3", "5"),
        (r"5_\pi", "5"),
    ],
    "parts of a formula": [
        (r"3\sqrt(5)", r"3\sqrt(7)"),
        (r"5+\sqrt(7)", "5"),
        (r"n \equiv 3 \pmod{7}", r"n \equiv 3 \pmod{5}"),
        (r"n \equiv 3 \pmod{7}", "3"),
        (r"\ge 5", "5"),
        ("≥ 5", "5"),
        (r"\ne 5", "5"),
        (r"x \ne 0", "0"),
        ("5..6", "5"),
        ("5–6", "5"),
        (r"3 \to 4", "4"),
        (r"1,2,\ldots,m", r"1,3,5,\ldots,2m-1"),
        ("2, 4, 6, ...", "2, 4, 6"),
        (r"\mathcal{F}(5)", "5"),
        (r"\unknown{5}", "5"),
        ("2 3", "5"),
        ("2(3)", "5"),
        ("12abcd", "12"),
        ("5 apples^2", "5"),
        ("5^2 meters", "5"),
        (r"50\% of x", "50"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        ("1:00", "12:00"),
        ("2020-05-12", "2003"),
        ("12 = 5", "5"),
        ("x+1 = 5", "5"),
        ("x^2 = -4", "x^2 = -1"),
        ("x + y = 0", "0"),
    ],
    "units": [
        ("5 km", "5 m"),
        ("5 cents", "5 dollars"),
        ("2h/g", "2g/h"),
        ("3m", "3g"),
        (r"\sin 30^\circ", "30"),
        ("12 cm by 5 cm", "12"),
        ("5 hours and 20 minutes", "5"),
        ("30 degrees", "30 radians"),
        ("5 cm^2", "5 cm^3"),
        ("5 square meters", "5 meters"),
        ("5 am", "5 pm"),
        ("€50", r"\$50"),
        ("50 cents", r"\$50"),
        ("5 kW", "5 W"),
        ("5 apples", "5 oranges"),
    ],
    "choices": [
        ("B. 12", "C"),
        ("D. 5", "A. 5"),
        ("(B) or (C)", "B"),
        ("not B", "B"),
        ("B^2", "B"),
        ("B is incorrect", "B"),
        ("not option B", "B"),
        ("None of these is B", "B"),
        ("(B) (A)", "B"),
        ("(B) 13", "(B) 12"),
    ],
    "sentences": [
        ("at least 5", "5"),
        ("more than 5", "5"),
        (r"\text{no more than } 5", "5"),
        ("5 or more", "5"),
        ("between 5 and 6", "5"),
        ("all numbers except 5", "5"),
        ("a multiple of 5", "5"),
        ("5 more than x", "5"),
        ("the first 5 primes", "5"),
        ("5 (mod 7)", "5"),
        ("It is not 12", "12"),
        ("The answer cannot be 12", "12"),
        ("There is no solution.", "0"),
        ("She sold 12 of the 20 apples", "12"),
        ("1 and all even primes", "1"),
        ("5 below zero", "5"),
        ("nearly 5", "5"),
        ("at the very least 5", "5"),
        ("5 at the very least", "5"),
        ("It surpasses 5", "5"),
        ("Upper bound: 5", "5"),
        ("It isnt 5", "5"),
        ("excluding 5", "5"),
        ("5 is invalid", "5"),
        ("Yes is no", "no"),
        ("circle (ellipse)", "circle"),
        ("It is not true that the answer is 5", "5"),
        ("The answer is 5 or the answer is 6", "6"),
        ("The answer is 5. Actually it is 6.", "5"),
        ("The answer is 5. No, that is wrong.", "5"),
    ],
    "values": [
        (r"\frac{1}{2^{97}}", r"\frac{1}{2^{98}}"),
        (r"9.1\times 10^{-31}", r"1.6\times 10^{-19}"),
        ("9.1e-31", "1.6e-19"),
        ("1.60218e-19", "1.60217e-19"),
        ("1e-9", "0"),
        ("0.5^{30}", "0"),
        (r"(2^{-60}, 1)", r"(2^{-61}, 1)"),
        (r"\sqrt{10^{40}+1}", "10^{20}"),
        (r"\sqrt{10^{1000}+1}", "10^{500}"),
        (r"\frac{3^{2005}+1}{3 \cdot 2^{6006}}", r"\frac{1}{3 \cdot 2^{6006}}"),
        (r"e^{\pi\sqrt{163}}", "262537412640768744"),
        (r"1782^{12}+1841^{12}", "1922^{12}"),
        ("x + 10^{-30}", "x"),
        (r"(1 + 10^{-12}) \sin x", r"\sin x"),
        ("1, 1, 2", "1, 2, 2"),
        ("x=1, y=2", "2, 1"),
    ],
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_answers(kind):
    answers, references = zip(*RIGHT[kind])
    found = check_many([f"Final Answer: {x}" for x in answers], references)
    missed = [
        (*pair, result)
        for pair, result in zip(RIGHT[kind], found)
        if not _right(result)
    ]
    assert not missed


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answers(kind):
    answers, references = zip(*WRONG[kind])
    found = check_many([f"Final Answer: {x}" for x in answers], references)
    rewarded = [pair for pair, result in zip(WRONG[kind], found) if _right(result)]
    assert not rewarded


def _right(result):
    return result.verdict == "correct"


RESPONSES = [  # what stands below the marker
    ("**Final Answer:**\n17", "17"),
    ("**Final Answer:**\n\n```\n17\n```", "17"),
    ("Final Answer:\n$$5$$", "5"),
    ("Final Answer:\n$$\n5\n$$\nI am sure.", "5"),
    ("Final Answer:\n\\[x = \\frac{1}{3}\\]", "1/3"),
    ("Final Answer：5", "5"),
    ("### Final Answer\n\n17", "17"),
    ("**Final Answer**\n$17$", "17"),
    ("**Final Answer:**\n\nThe answer is **42**.", "42"),
    ("Final Answer:\nSo we have it.\n\\boxed{5}", "5"),
]


@pytest.mark.parametrize(("response", "reference"), RESPONSES)
def test_answers_below_their_marker(response, reference):
    assert check(response, reference).verdict == "correct"
    assert check(response, f"1{reference}").verdict != "correct"


# --- Laws -----------------------------------------------------------------------------

_SMALL = {value: word for word, value in words.SMALL.items()}
_TENS = {value: word for word, value in words.TENS.items()}


def in_words(n: int) -> str:
    """The English name of a whole number below 10^12."""
    for scale, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand")):
        if n >= scale:
            rest = f" {in_words(n % scale)}" if n % scale else ""
            return f"{in_words(n // scale)} {name}{rest}"
    if n >= 100:
        rest = f" and {in_words(n % 100)}" if n % 100 else ""
        return f"{_SMALL[n // 100]} hundred{rest}"
    if n >= 20:
        return _TENS[n - n % 10] + (f"-{_SMALL[n % 10]}" if n % 10 else "")
    return _SMALL[n]


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.integers(0, 2000), st.integers(0, 10**12 - 1)))
def test_every_number_is_read_as_it_is_said(n):
    tokens = numerals.with_numbers(numerals.tokens_of(in_words(n)))
    assert [token.text for token in tokens] == [str(n)]
    assert prose.read(f"She has {in_words(n)} apples").formula == str(n)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10**6), st.integers(30, 400), st.sampled_from("+-"))
def test_no_difference_is_too_small(n, exponent, sign):
    pairs = [
        (
            rf"\frac{{{n}}}{{10^{{{exponent}}}}}",
            rf"\frac{{{n}}}{{10^{{{exponent + 1}}}}}",
        ),
        (f"10^{{{exponent}}} {sign} {n}", f"10^{{{exponent}}}"),
        (rf"\sqrt{{10^{{{2 * exponent}}} {sign} {n}}}", f"10^{{{exponent}}}"),
        (rf"\pi {sign} {n} \cdot 10^{{-{exponent}}}", r"\pi"),
    ]
    responses = [f"Final Answer: {answer}" for answer, _ in pairs]
    assert not any(map(_right, check_many(responses, [x for _, x in pairs])))


RELATIONS = (
    *("<", ">", r"\le", r"\ge", r"\leqslant", r"\ne", r"\neq", r"\in", r"\mid"),
    *(r"\nmid", r"\equiv", r"\sim", r"\cong", r"\propto", r"\to", r"\mapsto"),
    *(r"\subset", "≤", "≥", "≠", "→", "±", r"\pm", "not", "at least", "at most"),
    *("up to", "over", "under", "above", "below", "more than", "less than", "almost"),
    *("no more than", "fewer than", "anything but", "except", "twice", "half of"),
)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_number_behind_a_relation_is_not_the_number(relation):
    forms = [f"{relation} 5", f"x {relation} 5", f"The value is {relation} 5"]
    results = check_many([f"Final Answer: {form}" for form in forms], ["5"] * 3)
    assert not any(map(_right, results))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-(10**6), 10**6),
    st.sampled_from(["5", "x", r"\frac{1}{2}", "(1,2)", r"\{3\}"]),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
)
def test_nothing_is_the_answer_for_a_part_of_it(n, formula, noise):
    """Whatever stands behind it, an unknown command makes a formula unknown."""
    answer = rf"{n} \unheard{{{formula}}} {re.sub(r'[Ff]inal|boxed', '', noise)}"
    assert check(f"Final Answer: {answer}", str(n)).verdict != "correct"


def test_the_values_of_words_are_right():
    assert math.prod(words.SCALES[x] for x in ("thousand", "million")) == 10**9
    assert len(words.SMALL) == 20 and words.TENS["ninety"] == 90
    assert not words.HARMLESS - words.CHANGES
