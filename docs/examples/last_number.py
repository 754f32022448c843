"""A verifier: the last number of the response must be the reference's last one.

    --config.reward.verifier=docs/examples/last_number.py:verify

So GSM8K is often scored. Our own check reads the line `Final Answer: …`, and understands
more than numbers.
"""

import re

from pr1_jax.rewards import Record

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def verify(record: Record) -> bool | None:
    """None, undecided, where the reference has no number."""
    given, wanted = map(NUMBER.findall, (record.response, record.reference))
    if not wanted:
        return None
    value = lambda text: float(text.replace(",", ""))
    return bool(given) and value(given[-1]) == value(wanted[-1])
