"""Functions of the user: what they may do, and how what they must not do is said."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from pr1_jax.rewards import MADE_UP, part_weights
from pr1_jax.workers import own, pool

LIMIT_SEC = 1.0
FIELDS = {"reward": "reward.function", "verifier": "reward.verifier"}
RECORD = dataclasses.replace(
    MADE_UP, question="What is 1 + 1?", response="Two.\nFinal Answer: 2", reference="2"
)


@pytest.fixture
def function(tmp_path):
    """Loads `score` of a file with this text: function(text)."""
    made = []

    def load(text, kind="reward", name="mine.py", **how):
        file = tmp_path / name
        file.write_text(textwrap.dedent(text))
        given = f"{file}:score"
        how = {"limit_sec": LIMIT_SEC, "size": 1} | how
        loaded = own.OwnFunction(FIELDS[kind], given, kind, **how)
        made.append(loaded)
        loaded.load()
        return loaded

    yield load
    for loaded in made:
        loaded._pool.close()


def ends(pid):
    """Whether a process, not our child, is gone within ten seconds."""
    stat, deadline = pathlib.Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while time.monotonic() < deadline:
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


# --- What a function is told and may return -------------------------------------------


def test_a_record_arrives_as_it_was_sent(function):
    told = function(
        f"""
        import os
        from pr1_jax.rewards import Record

        def score(record):
            assert type(record) is Record and hash(record)
            assert os.environ["JAX_PLATFORMS"] == "cpu"  # accelerators are not its
            assert not os.environ["CUDA_VISIBLE_DEVICES"]
            return {{name: getattr(record, name) == x for name, x in SENT.items()}}

        SENT = {dataclasses.asdict(RECORD)}
        """
    )
    assert set(told.score(RECORD).values()) == {1.0}
    other = dataclasses.replace(RECORD, truncated=True, answer=None)
    scores = told.score(other)
    assert {name for name, same in scores.items() if not same} == {
        "answer",
        "truncated",
    }


@pytest.mark.parametrize(
    "value, parts",
    [
        ("2", {"": 2.0}),
        ("True", {"": 1.0}),
        ("numpy.float32(0.5)", {"": 0.5}),
        ("numpy.array(-3)", {"": -3.0}),
        ("fractions.Fraction(1, 4)", {"": 0.25}),
        ("{'a.b-c': 1, 'd': numpy.int64(-2)}", {"a.b-c": 1.0, "d": -2.0}),
    ],
)
def test_numbers_and_named_numbers(function, value, parts):
    scores = function(
        f"import fractions, numpy\ndef score(record):\n  return {value}"
    ).score(RECORD)
    assert scores == parts and all(type(x) is float for x in scores.values())


def test_a_module_and_what_lies_beside_a_file(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rewards.py").write_text("score = lambda r: len(r.response)")
    (tmp_path / "beside.py").write_text("SCALE = 3")
    (tmp_path / "own.py").write_text("import beside\nscore = lambda r: beside.SCALE")
    monkeypatch.chdir(tmp_path)
    for given, value in (("mine.rewards:score", 22.0), ("own.py:score", 3.0)):
        loaded = own.OwnFunction(
            "reward.function", given, "reward", limit_sec=9, size=1
        )
        loaded.load()
        assert loaded.score(dataclasses.replace(RECORD, response="x" * 22)) == {
            "": value
        }
        assert loaded.file.startswith(str(tmp_path)) and len(loaded.digest) == 64
        loaded._pool.close()


def test_a_verifier_says_true_false_or_nothing(function):
    verifier = function(
        """
        def score(record):
            return {"1": True, "2": False}.get(record.answer)
        """,
        kind="verifier",
    )
    answers = {
        a: verifier.verify(dataclasses.replace(RECORD, answer=a))
        for a in ("1", "2", None)
    }
    assert answers == {"1": True, "2": False, None: None}


def test_a_verifier_that_uses_up_its_processor_time_does_not_know(function):
    verifier = function(
        """
        def score(record):
            while record.answer == "2":
                pass
            return True
        """,
        kind="verifier",
        processor_sec=0.2,
        limit_sec=30,
    )
    asked = [verifier.verify(dataclasses.replace(RECORD, answer=a)) for a in "121"]
    assert asked == [True, None, True]


# --- What goes wrong ------------------------------------------------------------------

FAILURES = {
    "return 1 / 0": "failed: {}, `return 1 / 0`: ZeroDivisionError: division by zero;",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "input()": "EOFError",
    "return 'abc'": "returned 'abc' (str), not a number or {name: number}",
    "return None": "returned None (NoneType), not a number or {name: number}",
    "return [1.0]": "returned [1.0] (list), not a number",
    "return float('nan')": "returned nan (float), not a number",
    "return {'a': 1, 'b': -1e400}": "returned -inf (float), not a number as 'b'",
    "return {'a': 1, 'b': '2'}": "returned '2' (str), not a number as 'b'",
    "return 1e10": "returned 10000000000.0 (float), not a number or",
    "return {'a': 1}": "returned a, and a, b at its first call",
    "return {'a': 1, 'c': 2}": "returned a, c, and a, b at its first call",
    "return 7": "returned a single number, and a, b at its first call",
    "return {}": "returned 0 parts, not 1 to 32",
    "return {'a=b': 1, 'c': 2}": "returned 'a=b' (str), not the name of a part",
    "time.sleep(60)": "took more than reward.function_sec=1;",
    "while True: pass": "took more than reward.function_sec=1;",
    "os._exit(0)": "ended the process that calls it (exit code 0)",
    "os.kill(os.getpid(), 11)": "ended the process that calls it (signal SIGSEGV",
    "os.closerange(3, 99)": "ended the process that calls it (exit code",
    "os.fork() and os._exit(1); time.sleep(9)": "calls it (exit code 1)",
    "bytearray(5 << 30)": "`bytearray(5 << 30)`: MemoryError",
    "score(record)": "RecursionError: maximum recursion depth exceeded",
}
HARMLESS = (
    "print('x' * 10**7); sys.stderr.write('y' * 10**7)",
    "os.system('echo {}; cat')",
    """os.write(1, b'{"value": {"a": 9, "b": 9}}\\n')""",
    "os.fork()",  # the child comes back from the call, too
    "threading.Thread(target=print).start()",
    "sys.stdout.close()",
)


def failing(*lines):
    """A function that does so where the question is one of the lines."""
    text = "import os, sys, threading, time\n\ndef score(record):\n"
    for line in lines:
        text += f"    if record.question == {line!r}:\n        {line}\n"
    return text + "    return {'a': 1, 'b': 2}\n"


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A function that does what the question says."""
    file = tmp_path_factory.mktemp("wild") / "mine.py"
    file.write_text(failing(*FAILURES, *HARMLESS))
    given, how = f"{file}:score", {"limit_sec": LIMIT_SEC, "size": 1}
    loaded = own.OwnFunction(FIELDS["reward"], given, "reward", **how)
    loaded.load()
    yield loaded
    loaded._pool.close()


@pytest.mark.parametrize(
    "text, said",
    [
        ("def score(record)\n  return 1", "cannot be loaded: {}:1: SyntaxError: "),
        ("def scores(r):\n  return 1", "{} has no function score; its functions: sco"),
        ("score = 3", "{} has no function, but a value, score; its functions: none"),
        ("import not_there", "{}:1, `import not_there`: ModuleNotFoundError: No mod"),
        ("import os\nos._exit(3)", "cannot be loaded: it died (exit code 3)"),
        ("import sys\nsys.exit()", "{}:2, `sys.exit()`: SystemExit. Mend it, and st"),
        ("def score():\n  return 1", "failed: TypeError: score() takes 0 positional"),
        ("async def score(r):\n  return 1", "(coroutine), not a number or {name: num"),
        ("def score(r):\n  return r.no", "{}:2, `return r.no`: AttributeError: "),
    ],
)
def test_a_broken_file_fails_when_it_is_loaded(function, tmp_path, text, said):
    with pytest.raises(own.OwnCodeError) as error:
        function(text)
    message = str(error.value)
    assert message.startswith(f"reward.function={tmp_path}/mine.py:score ")
    assert said.replace("{}", f"{tmp_path}/mine.py") in message
    assert message.isprintable()


@pytest.mark.parametrize("line", FAILURES)
def test_what_fails_names_the_record_and_the_line(wild, line):
    began = time.monotonic()
    with pytest.raises(own.OwnCodeError) as error:
        wild.score(dataclasses.replace(RECORD, question=line))
    message = str(error.value)
    source = pathlib.Path(wild.file).read_text().splitlines()
    where = f"{wild.file}:{source.index(8 * ' ' + line) + 1}"
    assert FAILURES[line].replace("{}", where, line == "return 1 / 0") in message
    assert f"question {line!r}, response 'Two.\\nFinal Answer: 2'" in message
    assert message.endswith("the same command goes on from the newest checkpoint")
    assert time.monotonic() - began < 8 and len(message) < 2500
    # It leaves nothing behind: another record is scored.
    assert wild.score(RECORD) == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("line", HARMLESS)
def test_what_else_it_does_changes_no_reward(wild, line):
    for question in (line, "another", line):
        asked = dataclasses.replace(RECORD, question=question)
        assert wild.score(asked) == {"a": 1.0, "b": 2.0}


def test_what_it_forks_ends_with_it(function, tmp_path):
    loaded = function(
        f"""
        import os, time

        def score(record):
            if record.question != {RECORD.question!r}:
                return 1
            child = os.fork()
            if child:
                open("{tmp_path}/pid", "w").write(str(child))
            time.sleep(99)
        """
    )
    with pytest.raises(own.OwnCodeError, match="took more than"):
        loaded.score(RECORD)
    assert ends(int((tmp_path / "pid").read_text()))


def test_threads_share_the_processes_and_get_their_own_replies(function):
    loaded = function("score = lambda r: r.total_tokens", size=2)
    found = {}

    def ask(n):
        record = dataclasses.replace(RECORD, total_tokens=n)
        found[n] = loaded.score(record)[""]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: float(n) for n in range(40)}


def test_a_process_that_was_killed_is_replaced_by_the_same_function_alone(function):
    loaded = function("score = lambda r: 1")

    def kill():
        os.kill(loaded._pool._idle[0].process.pid, signal.SIGKILL)

    kill()
    assert loaded.score(RECORD) == {"": 1.0}
    with open(loaded.file, "w") as file:
        file.write("score = lambda r: 2")
    assert loaded.score(RECORD) == {"": 1.0}  # read once
    kill()
    with pytest.raises(own.OwnCodeError, match="is another one since the run started"):
        loaded.score(RECORD)


def test_it_ends_with_the_training_process(tmp_path):
    (tmp_path / "mine.py").write_text("score = lambda r: 1")
    code = f"""
from pr1_jax.workers import own
from tests.workers.own_test import RECORD
loaded = own.OwnFunction("f", "{tmp_path}/mine.py:score", "reward", limit_sec=60, size=1)
loaded.load()
print(loaded._pool._idle[0].process.pid, flush=True)
input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    assert ends(child)


@pytest.mark.parametrize("given", ["mine.py", "mine:", ":score", "a b:c", "x.py:1a"])
def test_names_that_are_none(given):
    with pytest.raises(ValueError, match="names no function: write FILE.py:NAME or"):
        own.OwnFunction("reward.function", given, "reward", limit_sec=1)


def test_a_file_that_never_ends_to_load(function, monkeypatch):
    monkeypatch.setattr(pool, "_START_SEC", 0.5)
    with pytest.raises(own.OwnCodeError, match="loaded: not ready within 0.5 s"):
        function("while True: pass")


# --- Weights --------------------------------------------------------------------------


def test_weights_of_parts():
    parts = ("schedule", "function.a", "function.b")
    assert part_weights(" ", parts) == dict.fromkeys(parts, 1.0)
    given = "function.b=-0.5, schedule=0,function.a=1e-3"
    assert part_weights(given, parts) == {
        "function.b": -0.5,
        "schedule": 0.0,
        "function.a": 0.001,
    }
    for wrong, said in (
        ("schedule=1,function=1", "'function' is no part; the parts are schedule, fu"),
        ("schedule=1,function.a=1", "has no weight for function.b; the parts are"),
        ("schedule=1,schedule=2", "names schedule twice"),
        ("schedule=one", "schedule=one is not a number"),
        ("schedule=nan", "schedule=nan is not a number"),
        ("schedule", "schedule= is not a number"),
        ("schedule=1e9", "schedule=1e9 is not a number below"),
    ):
        with pytest.raises(ValueError, match=f"^reward.weights={wrong}.*{said}"):
            part_weights(wrong, parts)
