"""The process that runs math-verify for `pr1_jax.answers`; never imported by it.

One JSON object a line: in `{"answer", "reference", "limit_sec"}`, out
`{"verdict", "reason"}`. The first line out says whether it could start. It is run
as a script, so that it imports neither the package nor the training program.
"""

import json
import os
import re
import resource
import signal
import sys

_MEMORY_BYTES = 2 << 30
_PROSE = re.compile(r"\b(?!arc|sqrt|sinh|cosh|tanh|infinity|percent)[A-Za-z]{4}")
_NUMBER = re.compile(r"[0-9][0-9.,/]*")


def _parse(text: str) -> list:
    """What math-verify reads in `text`: SymPy objects first, then its string."""
    from math_verify import parse

    if "$" in text:
        forms = [text]
    else:  # dollars for LaTeX, but prose would be a product of letters between them
        latex, prose = "\\" in text, _PROSE.search(text)
        forms = [f"${text}$"] if latex or not prose else []
        if not latex and len(_NUMBER.findall(text)) == 1:
            forms.append(text)
    found = []
    for form in forms:
        found = parse(form, parsing_timeout=None, raise_on_error=True) or found
        if any(not isinstance(part, str) for part in found):
            break
    return found


def _decide(answer: str, reference: str) -> tuple[str, str]:
    from math_verify import verify

    try:
        gold, target = _parse(reference), _parse(answer)
        same = verify(gold, target, timeout_seconds=None, raise_on_error=True)
    except Exception as error:  # noqa: BLE001 (SymPy raises anything)
        return "undecided", f"math-verify failed: {type(error).__name__}"
    if same:
        return "correct", "math-verify finds it equivalent"
    for name, found in (("answer", target), ("reference", gold)):
        if all(isinstance(part, str) for part in found):
            return "undecided", f"the {name} cannot be parsed"
    return "incorrect", "math-verify finds it different"


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stray prints must not mix with the replies
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY_BYTES if most < 0 else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        verdict, reason = _decide(r"\frac{1}{2}", "0.5")  # imports and warms up
        error = "" if verdict == "correct" else reason
    except ImportError as problem:
        error = str(problem)
    print(json.dumps({"error": error}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Kills this process, even inside C code, should the parent be gone.
        signal.setitimer(signal.ITIMER_REAL, request["limit_sec"] + 1)
        verdict, reason = _decide(request["answer"], request["reference"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply = {"verdict": verdict, "reason": reason}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
