"""Answers: extraction, equivalence, hostile input, the workers."""

import os
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pr1_jax.answers.extract import extract
from pr1_jax.answers.verdicts import Result
from pr1_jax.answers.verify import FAILED, check, check_many
from pr1_jax.system import files
from pr1_jax.workers.pool import Worker

_ROOT = Path(__file__).parents[2]
_DATA = _ROOT.parent / "shared" / "data"

EXTRACTIONS = [
    ("Final Answer: 17", "17"),
    ("text\nFinal Answer: 16\nWait.\nFinal Answer: 17\n", "17"),
    ("Final Answer: 16, no. Final Answer: 17", "17"),
    ("final answer: 17.", "17"),
    ("**Final Answer:** 17", "17"),
    ("**Final Answer**: **17**", "17"),
    ("### Final Answer: `17`\r\nBye", "17"),
    ("<Summary>s\nFinal Answer: 17</Summary>", "17"),
    ("Final Answer: 17<|im_end|>", "17"),
    ("Final Answer: $17$", "17"),
    (r"Final Answer: \(17\)", "17"),
    (r"Final Answer: \[ 17 \]", "17"),
    (r"Final Answer: $$\boxed{17}$$", "17"),
    (r"Final Answer: The sum is \boxed{17} dollars.", "17"),
    ("Final Answer: \\boxed{\n17\n}", "17"),
    (r"Final Answer: $x=1$ and $y=2$", "$x=1$ and $y=2$"),
    (r"Final Answer: \boxed{1} and \boxed{2}", "1, 2"),
    (r"Final Answer: $-\boxed{17}$", "-17"),
    (r"Final Answer: not \boxed{17}", "not 17"),
    (r"so it is $-\boxed{17}$", r"so it is $-17$"),
    (r"so it is $\boxed{17}\%$", r"so it is $17\%$"),
    (r"so it is $3-\boxed{17}$", r"so it is $3-17$"),
    (
        r"so it is $1 + 2 = \boxed{17}$, as $2^4 > 3$",
        r"so it is $1 + 2 = 17$, as $2^4 > 3$",
    ),
    (r"so $$1 + 2 = \boxed{17}$$ follows.", "17"),
    (r"\boxed{\boxed{17}} apples", "17"),
    ("Final Answer: 17 \\boxed{17} \nsee \\boxed{18}", "17"),
    ("\\boxed{17}\nFinal Answer:  \n", "17"),
    ("Final Answer: **\n\\boxed{17}", "17"),
    ("Final Answer: 16\nFinal Answer:\n\\boxed{17}", "17"),
    (r"\boxed{16} then \boxed{17}", "17"),
    (r"\boxed {17}", "17"),
    (r"\fbox{17}", "17"),
    (r"\\boxed{17}", "17"),
    (r"\boxed{\boxed{17}}", "17"),
    (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\left\{1\right\}}", r"\left\{1\right\}"),
    (r"{} \boxed{17} \text{ and \boxed{18", r"{} 17 \text{ and \boxed{18"),
    ("\\boxed{17}" + " tail" * 1000, "17"),
    ("Final Answer:", None),
    ("Final Answer: $$", None),
    (r"\boxed{16} and \boxed{ }", None),
    (r"\boxed{17", None),
    ("the answer is 17", None),
    ("", None),
]

# Answer, reference, verdict.
TABLE = [
    ("17", "17", "correct"),
    ("17", "18", "incorrect"),
    ("-17", "17", "incorrect"),
    ("\u221217", "-17", "correct"),
    ("+17", "17", "correct"),
    ("017", "17", "correct"),
    ("\uff11\uff17", "17", "correct"),  # full-width digits
    ("17.", "17", "correct"),
    ("3.50", "3.5", "correct"),
    (".5", "0.5", "correct"),
    ("0.3333333", "1/3", "correct"),
    ("0.33", "1/3", "incorrect"),
    ("3.1415926", "3.1415927", "correct"),  # math-verify rounds to six places
    ("1,234", "1234", "correct"),
    ("1 234", "1234", "correct"),
    ("10{,}000", "10000", "correct"),
    (r"10\,000", "10000", "correct"),
    ("123456789012345678901234567890", "123456789012345678901234567891", "incorrect"),
    ("1/2", "0.5", "correct"),
    (r"\frac{-1}{2}", "-0.5", "correct"),
    ("0.0000001", "0", "incorrect"),
    ("0.00001", "0", "incorrect"),
    ("0.0000002", "0.0000001", "incorrect"),
    (r"1.5 \times 10^{-8}", r"2.5 \times 10^{-8}", "incorrect"),
    (r"10^{-12} x", r"2 \cdot 10^{-12} x", "incorrect"),
    (r"6.02 \times 10^{23}", r"6.020 \cdot 10^{23}", "correct"),
    ("1/1000000", "0", "incorrect"),
    ("1\u00bd", "3/2", "correct"),
    (r"0.1\overline{6}", "1/6", "correct"),
    (r"0.\overline{3}", "0.33", "incorrect"),
    (r"2.3148148 \times 10^{-3}", r"\frac{1}{432}", "correct"),
    (r"1.5^{10^{9}}", r"17\sqrt{2}", "incorrect"),
    ("1,22", "1.22", "correct"),
    ("1,22", "1,23", "incorrect"),
    ("25_8", "25", "correct"),
    (r"25_{8}", "25_8", "correct"),
    ("25_7", "25_8", "incorrect"),
    ("x_1", "x_{1}", "correct"),
    ("x_1", "x_2", "incorrect"),
    ("1 2", "12", "undecided"),
    (r"\frac12", "0.5", "correct"),
    (r"\dfrac{2}{4}", r"\frac{1}{2}", "correct"),
    ("1 1/2", "3/2", "correct"),
    (r"1\frac{1}{2}", "1.5", "correct"),
    ("1.5e3", "1500", "correct"),
    ("50%", r"50\%", "correct"),
    ("50 percent", "50%", "correct"),
    ("50%", "50", "correct"),
    ("50%", "0.5", "correct"),
    ("$18", "18", "correct"),
    (r"\$18", "18", "correct"),
    ("-$18", "-18", "correct"),
    ("\u20ac5", "5", "correct"),
    ("18 dollars", "18", "correct"),
    ("18 USD", "$18", "correct"),
    (r"18 \text{ cm}^2", "18", "correct"),
    ("18 square meters", r"18 \text{ m}^2", "correct"),
    ("6 km/h", "6", "correct"),
    ("3/4 cup", r"\frac{3}{4}", "correct"),
    (r"90^\circ", "90", "correct"),
    (r"2\pi square units", r"2\pi", "correct"),
    ("The answer is $18.", "18", "correct"),
    ("about 3.14", "3.14", "correct"),
    ("18 (eighteen)", "18", "correct"),
    ("3 apples and 4 pears", "4", "undecided"),
    (r"1 \text{ and all even primes}", "1 and all odd primes", "undecided"),
    (r"1\text{ and 2}", "1", "incorrect"),
    (r"1\text{ and 2}", "2, 1", "correct"),
    ("x = 5", "5", "correct"),
    ("x = 5", "y = 5", "incorrect"),
    (r"2\sqrt{3}", r"\sqrt{12}", "correct"),
    ("(x+1)^2", "x^2+2x+1", "correct"),
    ("2^{10}", "1024", "correct"),
    ("2\u221a3", r"2\sqrt{3}", "correct"),
    ("\u03c0/2", r"\frac{\pi}{2}", "correct"),
    ("2*pi", r"2\pi", "correct"),
    ("x\u00b9\u2070", "x**10", "correct"),
    ("ln(2)", r"\ln 2", "correct"),
    ("-1 + sqrt(3)", r"\sqrt{3} - 1", "correct"),
    (r"k_{\mathrm{B}} T_2", "T_2 k_B", "correct"),
    (r"\\frac{1}{2}x", r"\frac{x}{2}", "correct"),
    (r"\left( x+1 \right)\,y", "(x+1)y", "correct"),
    (r"\sin 30^\circ", r"\frac{1}{2}", "correct"),
    ("(1+i)^2", "2i", "correct"),
    (r"e^{i\theta}", r"\cos\theta + i\sin\theta", "correct"),
    (r"\sqrt{x^2}", "x", "incorrect"),
    (r"|3+4i|", "5", "correct"),
    ("f(x) = 2x", "y = 2x", "correct"),
    (r"I_{\max} = 2x", "2x", "correct"),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=1, y=2", "correct"),
    (r"\{1,2\}", r"\{2, 1\}", "correct"),
    ("1 and 2", "1,2", "correct"),
    (r"\boxed{1} and \boxed{2}", "1,2", "correct"),
    ("2, 1", r"$\boxed{1}$ or $\boxed{2}$", "correct"),
    ("2", r"\boxed{1} does not fit the problem so that it is \boxed{2}", "correct"),
    ("1; 2", r"\{1,2\}", "correct"),
    ("1,2", "1,2,3", "incorrect"),
    ("17 or 18", "17", "incorrect"),
    ("(1,2)", "(1, 2)", "correct"),
    ("(2,1)", "(1,2)", "incorrect"),
    ("[1, 2)", "[1,2)", "correct"),
    ("[1, 2)", "[1,2]", "incorrect"),
    (r"(-\infty, 3]", r"\left(-\infty,3\right]", "correct"),
    (r"x \in [1,2]", "[1,2]", "correct"),
    ("(-1, 3)", "-1 < x < 3", "correct"),
    ("-1 < x < 3", "(-1, 3]", "incorrect"),
    ("x < -1 or x > 3", r"(-\infty,-1) \cup (3,\infty)", "correct"),
    (r"$x \le -1$ or $x > 3$", r"(-\infty,-1) \cup (3,\infty)", "incorrect"),
    ("2 \u2264 x", r"[2,\infty)", "correct"),
    (r"1 < x \le 2 or 3 < x", r"(1,2] \cup (3,\infty)", "correct"),
    (r"1 \le x < 2 or 3 < x", r"(1,2] \cup (3,\infty)", "incorrect"),
    (r"\frac{1 \pm \sqrt{5}}{2}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}", "correct"),
    (r"x = 3 \pm 1", "x = 4, 2", "correct"),
    (r"\{1, 3 \pm 4\}", "7, 1, -1", "correct"),
    (r"\pm 2", "2", "incorrect"),
    (
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        r"\begin{bmatrix}1\\2\end{bmatrix}",
        "correct",
    ),
    (
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        r"\begin{pmatrix}1\\3\end{pmatrix}",
        "incorrect",
    ),
    ("(A)", "A", "correct"),
    (r"\text{A}", "A", "correct"),
    ("B", "A", "incorrect"),
    ("No solution", r"\text{no solution}", "correct"),
    ("no solution", "17", "undecided"),
    (r"\frac{a}{b", "1", "undecided"),
    ("17", "", "undecided"),
]

# Whatever the verdict on these, it is not `correct` and comes in time.
HOSTILE = {
    "tower of powers": "Final Answer: 9^{9^{9^{9^{9}}}}",
    "factorials": "Final Answer: ((100!)!)!",
    "huge exponent": "Final Answer: 1e999999999",
    "matrices": "Final Answer: " + r"\begin{pmatrix}" * 100,
    "a power of a sum": "Final Answer: (a+b+c+d+e+f)^{60}",
    "a sum": r"Final Answer: \sum_{k=1}^{10^9} k!",
    "signs": "Final Answer: " + "-" * 1900 + "1",
    "brackets": "Final Answer: " + r"\left(" * 250 + "1" + r"\right)" * 250,
    "half a surrogate": "Final Answer: 1\ud800",
    "nested fractions": "Final Answer: " + r"\frac{1}{" * 150 + "1" + "}" * 150,
    "unbalanced braces": "Final Answer: " + "{" * 1900,
    "dollars": "Final Answer: " + "$" * 1999,
    "an equals sign": "Final Answer: =She has     She has US$",
    "null bytes": "Final Answer: \x00\x00",
    "control characters": "Final Answer: \x1b[31m\x7f\u202e\u2028",
    "code": "Final Answer: __import__('os').abort()",
    "many digits": "Final Answer: " + "9" * 100_000,
    "long line": "Final Answer: " + "x+" * 500_000,
    "a million backslashes": "\\" * 1_000_000 + "boxed",
    "many markers": "Final Answer: " * 80_000,
    "markers and blanks": ("final answer" + " " * 50) * 10_000,
    "open boxes": r"\boxed{" * 100_000,
    "nested boxes": r"\boxed{" * 100_000 + "1" + "}" * 100_000,
}


@pytest.mark.parametrize(("response", "answer"), EXTRACTIONS)
def test_extract(response, answer):
    assert extract(response) == answer
    if answer is None:
        assert check(response, "17").verdict == "incorrect"
        assert "no answer" in check(response, "17").reason


@pytest.mark.parametrize(("answer", "reference", "verdict"), TABLE)
def test_equivalence(answer, reference, verdict):
    line = check(f"So\nFinal Answer: {answer}\n", reference)
    assert line.verdict == verdict, line.reason
    if "boxed" not in answer:
        assert check(rf"So $\boxed{{{answer}}}$.", reference).verdict == (
            verdict if extract(rf"\boxed{{{answer}}}") else "incorrect"
        )


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_input_is_decided_in_time(kind):
    check("Final Answer: x+x", "2x")  # a worker has started
    start = time.perf_counter()
    result = check(HOSTILE[kind], "17", timeout_sec=0.3)
    assert time.perf_counter() - start < 4  # a fresh worker may have had to start
    assert result.verdict in ("incorrect", "undecided")
    assert result.reason.isascii()


def test_a_fault_in_the_check_is_no_fault_of_the_run(monkeypatch):
    monkeypatch.setattr("pr1_jax.answers.verify.quick", lambda *_: 1 / 0)
    found = check_many(["Final Answer: 1", "none"], ["1", "1"])
    assert [x.verdict for x in found] == ["undecided", "incorrect"]
    assert found[0].reason == f"{FAILED}: ZeroDivisionError"


def test_overrun_is_undecided_and_the_next_answer_is_decided():
    result = check(HOSTILE["tower of powers"], "17", timeout_sec=0.3)
    assert result == Result("undecided", "no verdict within 0.3 s")
    assert check("Final Answer: x+x", "2x").verdict == "correct"


@settings(max_examples=30, deadline=None)
@given(st.one_of(st.text(), st.text(r"\{}$^_()[]0123456789+-*/.,=<>!%xe ")))
def test_never_raises(text):
    for response in (text, f"Final Answer: {text}", rf"\boxed{{{text}}}"):
        answer = extract(response)
        assert answer is None or answer == answer.strip() != ""
        result = check(response, "17", timeout_sec=0.5)
        assert result.verdict in ("correct", "incorrect", "undecided")
        assert FAILED not in result.reason
        assert answer is not None or result.verdict == "incorrect"


_numbers = st.one_of(
    st.integers(-20, 20).map(str),
    st.integers(0, 10**12 - 1).map("{:,}".format),
    st.decimals(-3, 3, places=7).map(str),
    st.sampled_from(["1.0000004", "1.0000006", "1.000002", "-0.0", "00", ".50", "+.5"]),
)


@settings(max_examples=50, deadline=None)
@given(_numbers, _numbers)
def test_plain_numbers_are_decided_as_math_verify_does(answer, reference):
    from math_verify import parse, verify

    same = verify(parse(f"${reference}$"), parse(f"${answer}$"))
    # But it rounds to six places only where neither is an integer, and tiny ones too.
    value, wanted = (Decimal(text.replace(",", "")) for text in (answer, reference))
    assume(wanted == 0 or abs(wanted) > Decimal("0.25"))
    close = abs(value - wanted) <= Decimal("5e-7")
    expected = "correct" if same or close else "incorrect"
    assert check(f"Final Answer: {answer}", reference).verdict == expected


def test_check_many_agrees_with_check_and_keeps_the_order():
    rows = TABLE[::3]
    responses = ["no answer"] + [f"Final Answer: {row[0]}" for row in rows]
    references = ["1"] + [row[1] for row in rows]
    results = check_many(responses, references)
    assert [result.verdict for result in results] == ["incorrect"] + [
        row[2] for row in rows
    ]
    assert results[:9] == [check(*pair) for pair in zip(responses, references)][:9]
    assert check_many([], []) == []


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU gets one worker")
def test_check_many_works_in_parallel(monkeypatch):
    both, ask = threading.Barrier(2), Worker.ask

    def ask_beside_another(worker, *pair):
        both.wait(timeout=60)  # broken, an error, where one waits for the other
        return ask(worker, *pair)

    monkeypatch.setattr(Worker, "ask", ask_beside_another)
    results = check_many(["Final Answer: x+x", "Final Answer: 3x"], ["2x"] * 2)
    assert [r.verdict for r in results] == ["correct", "incorrect"]


def test_user_mistakes():
    with pytest.raises(ValueError, match="responses has 2 items, references 1"):
        check_many(["a", "b"], ["1"])
    with pytest.raises(ValueError, match="timeout_sec is 0"):
        check("Final Answer: 1", "1", timeout_sec=0)


def test_threads_may_share_the_workers():
    verdicts = {}

    def work(n: int) -> None:
        answer = rf"Final Answer: \frac{{{n}x}}{{{2 * n + n % 2}}}"
        verdicts[n] = check(answer, "0.5x").verdict

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {n: ("correct", "incorrect")[n % 2] for n in range(2, 14)}


def _run(code: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, **settings)


def _children(pid: int) -> list[int]:
    lists = list(Path(f"/proc/{pid}/task").glob("*/children"))
    if not lists:
        pytest.skip("this system does not list the children of a process")
    return [int(child) for path in lists for child in path.read_text().split()]


def _ends(pid: int, timeout_sec: float) -> bool:
    """Whether process `pid` (not our child) is gone within the time."""
    deadline = time.monotonic() + timeout_sec
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_worker_killed_from_outside_is_replaced():
    code = """
from pr1_jax.answers import check
for answer in ("x+x", "3x-x"):
    print(check(f"Final Answer: {answer}", "2x").verdict, flush=True)
    input()
"""
    with _run(code, stdin=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"correct\n"
        (worker,) = _children(parent.pid)
        os.kill(worker, signal.SIGKILL)
        assert parent.communicate(b"\n\n")[0] == b"correct\n"


_BUSY = f"check({HOSTILE['tower of powers']!r}, '17', timeout_sec=1)"


@pytest.mark.parametrize(
    ("then", "kill"), [("input()", True), ("input()", False), (_BUSY, True)]
)
def test_workers_end_with_their_parent_and_busy_ones_soon(then, kill):
    code = f"""
from pr1_jax.answers import check
check("Final Answer: x+x", "2x")
print("started", flush=True)
{then}
"""
    with _run(code, stdin=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"started\n"
        time.sleep(0.2)
        (worker,) = _children(parent.pid)
        parent.kill() if kill else parent.communicate(b"\n")
        assert _ends(worker, timeout_sec=6)


def test_a_forked_child_has_its_own_workers():
    code = """
import os
from pr1_jax.answers import check
check("Final Answer: x+x", "2x")
child = os.fork()
verdicts = [check("Final Answer: x+x", f"{k % 2}*2x").verdict for k in range(40)]
assert verdicts == ["incorrect", "correct"] * 20, verdicts
if child:
    print(os.waitpid(child, 0)[1])
"""
    assert _run(code).communicate()[0] == b"0\n"


def test_a_worker_that_cannot_start_is_no_verdict(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('gone')")
    code = """
from pr1_jax.answers import check
try:
    check("Final Answer: x+x", "2x")
except RuntimeError as error:
    print(error)
"""
    run = _run(code, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert b"worker does not start: gone" in run.communicate()[0]


def test_import_is_light():
    code = """
import sys
import pr1_jax.tags, pr1_jax.rewards, pr1_jax.answers
print([name for name in ("jax", "sympy", "numpy", "math_verify") if name in sys.modules])
"""
    assert _run(code).communicate()[0] == b"[]\n"


def _rows(name: str) -> list[dict]:
    path = _DATA / name
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    return files.read_json_lines(path)


@pytest.mark.parametrize(
    "name", ["dapo_math_17k.jsonl", "eval_aime24_aime25_amc23_math300.jsonl"]
)
def test_every_real_reference_is_its_own_answer(name):
    references = [row["answer"] for row in _rows(name)]
    for template in ("Final Answer: {}", r"So $\boxed{{{}}}$."):
        results = check_many([template.format(r) for r in references], references)
        assert {result.verdict for result in results} == {"correct"}
        off = check_many([template.format(f"1{r}") for r in references], references)
        assert "correct" not in {result.verdict for result in off}


def test_real_traces_are_correct():
    rows = _rows("parallel_gsm8k_sample.jsonl")
    results = check_many(
        [row["response"] for row in rows], [row["answer"] for row in rows]
    )
    assert [result.verdict for result in results] == ["correct"] * 341
