"""Is the answer of a response the reference's? Imports `tags` alone.

Three verdicts, whatever a model wrote, in bounded time: correct, incorrect, and undecided
(timed out or unparsable: rewarded as incorrect, counted apart). A response without an
answer is incorrect (docs/method.md, section 5).

>>> from pr1_jax import answers
>>> answers.check("Final Answer: 0.5", "1/2").verdict
'correct'
"""

from pr1_jax.answers.extract import extract
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED, Result
from pr1_jax.answers.verify import check, check_many

__all__ = [
    "CORRECT",
    "INCORRECT",
    "UNDECIDED",
    "Result",
    "check",
    "check_many",
    "extract",
]
