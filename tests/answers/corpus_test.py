"""Two and a half thousand answers, judged by hand: `cases.jsonl` beside this file.

Each line is [reference, answer, 1 if it is right else 0]; the answer is the text behind
`Final Answer: `, or {"response": all of a response}.
"""

import json
from pathlib import Path

from pr1_jax.answers.verify import check_many


def test_answers_are_judged_as_people_do():
    lines = (Path(__file__).parent / "cases.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    responses = [
        answer["response"] if isinstance(answer, dict) else f"Final Answer: {answer}"
        for _, answer, _ in cases
    ]
    results = check_many(responses, [reference for reference, _, _ in cases])
    wrong = [
        (response, reference, result)
        for (reference, _, right), response, result in zip(cases, responses, results)
        if (result.verdict == "correct") != bool(right)
    ]
    assert len(cases) > 2400 and not wrong
