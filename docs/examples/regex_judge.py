"""A judge by regular expressions: does each path say what it found, and nothing twice?

--config.reward.function=docs/examples/regex_judge.py:score
--config.reward.weights=schedule=1,function.found=0.1,function.repeats=0.1
"""

import re

from pr1_jax.rewards import Record

FOUND = re.compile(r"\b(yes|no|found|so|thus|therefore)\b|=", re.IGNORECASE)
REPEATED = re.compile(
    r"(\S+(?: \S+){2,})(?: \1)+"
)  # three words or more, again at once


def score(record: Record) -> dict[str, float]:
    """The share of paths that come to a finding, and -1 where the response repeats itself."""
    paths = [path for block in record.paths for path in block]
    found = sum(bool(FOUND.search(path)) for path in paths)
    return {
        "found": found / len(paths) if paths else 0.0,
        "repeats": -1.0 if REPEATED.search(record.response) else 0.0,
    }
