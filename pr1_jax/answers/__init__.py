"""Is an answer the reference's? Three verdicts, in bounded time. Imports `tags` alone.

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
