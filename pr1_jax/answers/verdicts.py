"""The three verdicts on an answer."""

from dataclasses import dataclass

CORRECT, INCORRECT, UNDECIDED = "correct", "incorrect", "undecided"


@dataclass(frozen=True)
class Result:
    """verdict: correct, incorrect or undecided; reason: a short sentence for logs."""

    verdict: str
    reason: str
