"""The published string checker: normalisation, extraction, its known faults."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pr1_jax.answers.published import check, normal

NORMAL = [
    ("17", "17"),
    (" 17 ", "17"),
    ("x = y = 17", "17"),
    ("1,234,567", "1234567"),
    ("10{,}000", "10000"),
    ("(1, 2)", "(1,2)"),
    (r"10,\!000", "10000"),
    (r"\$18", "18"),
    ("18 dollars", "18"),
    (r"18\text{ cm}^2", "18"),
    ("18 cm^2", "18^2"),  # only a unit in \text{} loses its power
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"4\mathrm{th}", "4"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\dfrac12", r"\dfrac{1}{2}"),  # and is not \frac{1}{2}
    (r"\frac ab", r"\frac{a}{b}"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"the sum is $17$, not $18$", "17"),
    ("17.$ or $18", "or"),
    (r"\text{Monday}", "Monday"),
    (r"\overline{AB}", "AB"),
    (r"1\text{ and }2", "12"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{17} or {18}", "17}or{18"),  # up to the last brace
    ("a man", "m" + "an"),
    (r"\text{open", r"\text{open"),
    ("\u0663", "\u0663"),
    ("", ""),
]

# Response, reference, whether it counts.
CHECKS = [
    ("Final Answer: 17", "17", True),
    ("Final Answer: 17", "18", False),
    ("final answer :17\n", "17", True),
    ("Final Answer:\n\n17\nBye.", "17", True),
    ("Final Answer: 16\nFinal Answer: 17", "17", True),
    ("Final Answer: 16, Final Answer: 17", "17", False),
    (r"Final Answer: \boxed{17}", "17", True),
    (r"Final Answer: $\boxed{\frac12}$", r"\frac{1}{2}", True),
    ("<Summary>Final Answer: 17</Summary><|im_end|>", "17", True),
    ("Final Answer: 1,234", "1234", True),
    ("Final Answer: x = 5", "5", True),
    ("Final Answer: 18 dollars", r"\$18", True),
    # Its faults.
    (r"So \boxed{17}.", "17", False),
    ("**Final Answer:** 17", "17", False),
    ("Final Answer: 17.", "17", False),
    ("Final Answer: 0.5", r"\frac{1}{2}", False),
    ("Final Answer: 17" + " tail" * 60, "17", False),
    ("Final Answer: 17" + "\n" + "x" * 283, "17", True),
    ("Final Answer: 17" + "\n" + "x" * 284, "17", False),
    (f"Final Answer: {'1+' * 150}1", "1", False),
    ("Final Answer:", "", False),
    ("[INVALID]", "[INVALID]", False),
]


@pytest.mark.parametrize(("answer", "expected"), NORMAL)
def test_normal(answer, expected):
    assert normal(answer) == expected


@pytest.mark.parametrize(("response", "reference", "expected"), CHECKS)
def test_check(response, reference, expected):
    assert check(response, reference) is expected


@given(st.text(), st.text(r"\{}$=,.\n afrcqtextboxdu0123456789"))
def test_never_raises(response, reference):
    for answer in (response, f"Final Answer: {response}", f"Final Answer:{reference}"):
        assert check(answer, reference) in (True, False)
        assert check(answer, response) in (True, False)


@given(st.text(r"\{}$=, afrcqtextboxdu0123456789", min_size=1, max_size=100))
def test_an_answer_that_the_slice_keeps_is_its_own_reference(answer):
    assert check(f"Final Answer: {answer}", answer) or not answer.strip()


@pytest.mark.parametrize(
    "piece", ["\\text{", "\\boxed{", "$", "}", "=", "\n", "a ", "Final Answer: ", "<|"]
)
def test_takes_linear_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    check(text, text)
    assert time.perf_counter() - start < 2
