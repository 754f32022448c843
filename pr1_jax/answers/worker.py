"""The process that parses formulas with math-verify's parser and compares them.

It is run as a script, so that the training program never imports SymPy. Each line of the
input is a JSON object with `answer`, `reference` and `limit_sec`, each of the output one
with `verdict` and `reason`; the first of them says whether it started.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

_MEMORY_BYTES = 2 << 30


def decide(answer: str, reference: str) -> tuple[str, str]:
    """The verdict on two formulas as `prose` writes them, and its reason."""
    from pr1_jax.answers import equality, formulas

    try:
        texts = {"answer": answer, "reference": reference}
        values = {}
        for name, text in texts.items():
            values[name], rounding, decimals = formulas.parse(text)
            if values[name] is None:
                return "undecided", f"the {name} cannot be parsed"
            if rounding and not equality.rounds(values[name], rounding, decimals):
                return "undecided", f"the {name} is two values that differ"
        same = equality.same(values["reference"], values["answer"])
    except equality.Unclear:
        return "undecided", "whether they are equal is beyond the verifier"
    except Exception as error:  # noqa: BLE001 (SymPy raises anything)
        return "undecided", f"the verifier failed: {type(error).__name__}"
    if same:
        return "correct", "the values are equal"
    return "incorrect", "the values differ"


def _speed_up() -> None:
    """Parses in ANTLR's fast mode first: a third of the time for the same trees.

    That mode gives the tree of the full one or a syntax error, after which the full
    one decides (ANTLR's documentation of `PredictionMode`).
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    create, parse = _Latex2Sympy.create_parser, _Latex2Sympy.parse

    def create_fast(self, text):
        parser = create(self, text)
        if self.fast:
            parser._interp.predictionMode = PredictionMode.SLL
        return parser

    def parse_fast(self, text):
        self.fast = True
        try:
            return parse(self, text)
        except Exception:  # noqa: BLE001 (it raises bare ones)
            self.fast = False
            return parse(self, text)

    _Latex2Sympy.create_parser, _Latex2Sympy.parse = create_fast, parse_fast


def main() -> None:
    """Answers requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stray prints must not mix with the replies
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY_BYTES if most < 0 else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    try:
        import math_verify  # noqa: F401 (else `decide` would call it undecided)

        _speed_up()
        verdict, reason = decide(r"\frac{1}{2}", "0.5")  # imports and warms up
        error = "" if verdict == "correct" else reason
    except ImportError as problem:
        error = str(problem)
    print(json.dumps({"error": error}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Processor time, so that verdicts do not depend on what else the machine does.
        # It kills this process, even inside C code, and also if the parent is gone.
        signal.setitimer(signal.ITIMER_PROF, request["limit_sec"])
        verdict, reason = decide(request["answer"], request["reference"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = {"verdict": verdict, "reason": reason}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
