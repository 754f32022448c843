"""What functions of the user are told of responses, and what follows from their words."""

import copy
import dataclasses
import time
import types

import numpy as np
import pytest

from configs import rl_alternating
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED
from pr1_jax.data import traces
from pr1_jax.data.prompts import Problem
from pr1_jax.stages import own, rollout
from pr1_jax.stages.responses import group_rewards
from pr1_jax.tags import PLAIN, Grammar
from pr1_jax.workers.own import OwnCodeError

TEXT = (
    "So <Parallel>{}<Path> 1 left 4</Path><Path> 2 right</Path></Parallel>\n"
    "<Summary>both</Summary> and <Parallel>{}<Path> 1 x</Path><Path> 1 y</Path>"
    "</Parallel>\n<Summary></Summary>\nFinal Answer: 4"
)
LABELS = (" 1", " 2")


@dataclasses.dataclass
class Function:
    """Stands in for a function of the user, in this process."""

    of: object
    parts: tuple[str, ...] = ()
    size: int = 1

    def verify(self, record):
        return self.of(record)

    score = verify


def trajectory(tokenizer, text, grammar=PLAIN):
    prompt = np.array(tokenizer.encode("2+2?"), np.int32)
    how = {"variant": "structured", "grammar": grammar}
    return traces.from_text(prompt, text, tokenizer, **how)


def scored(tokenizer, text, *, grammar=PLAIN, answer="4", **functions):
    problem = Problem("2+2?", answer, np.array([1], np.int32))
    given = {"timeout_sec": 5.0, "grammar": grammar}
    given["functions"] = own.Functions(**functions)
    return rollout.score(problem, trajectory(tokenizer, text), tokenizer, **given)


def test_a_record_says_what_was_sampled(by_bytes):
    told = []
    text = TEXT.format("", "")
    response = scored(
        by_bytes,
        text,
        grammar=Grammar(LABELS),
        reward=Function(lambda record: told.append(record) or {"": 2.0, "a": 3.0}),
    )
    (record,) = told
    assert dataclasses.asdict(record) == {
        "question": "2+2?",
        "response": text,
        "reference": "4",
        "answer": "4",
        "verdict": CORRECT,
        "num_blocks": 2,
        "paths": ((" left 4", " right"), (" x", " 1 y")),  # that label is not its own
        "plans": (),
        "summaries": ("both", ""),
        "total_tokens": response.total_tokens,
        "sequential_steps": response.sequential_steps,
        "format_ok": False,
        "truncated": not response.finished,
    }
    assert response.parts == {"function": 2.0, "function.a": 3.0}
    assert "parts" not in response.record()


def test_plans_are_told_where_blocks_are_planned(by_bytes):
    planned = copy.deepcopy(by_bytes)
    planned.use_plans()
    plans = ("<Plan>p</Plan><Plan>q</Plan>", "<Plan></Plan><Plan>r s</Plan>")
    grammar = Grammar(planned=True)
    made = trajectory(planned, TEXT.format(*plans), grammar)
    paths, told, _ = own.read(made, planned, grammar)
    assert told == (("p", "q"), ("", "r s")) and len(paths) == 2


def test_tags_that_are_only_spelled_are_text(by_bytes):
    made = trajectory(by_bytes, TEXT.format("", ""))
    spelled = by_bytes.encode("<Parallel><Path>z</Path>", allow_tags=False)
    tokens = np.concatenate([made.tokens[:3], spelled, made.tokens[3:]])
    longer = dataclasses.replace(made, tokens=tokens)
    assert "<Path>z</Path>" in by_bytes.decode(tokens)
    assert own.read(longer, by_bytes, PLAIN) == own.read(made, by_bytes, PLAIN)


@pytest.mark.parametrize(
    "says, verdict", [(True, CORRECT), (False, INCORRECT), (None, UNDECIDED)]
)
def test_a_verifier_decides_and_the_reward_function_hears_it(by_bytes, says, verdict):
    heard = []
    response = scored(
        by_bytes,
        "Final Answer: 5",
        verifier=Function(lambda record: heard.append(record.verdict) or says),
        reward=Function(lambda record: heard.append(record.verdict) or {"": 0.0}),
    )
    assert heard == ["", verdict] and response.verdict == verdict
    assert response.reason == "says reward.verifier"
    paid = response.reward({"accuracy": 1.0})
    assert paid == (1.0 if says else -1.0)


def test_weights_of_the_parts_of_a_reward(by_bytes):
    texts = ["Final Answer: 4", "no Final Answer: 4", "Final Answer: 5", "5"]
    responses = [
        scored(by_bytes, text, reward=Function(lambda r: {"n": float(len(r.response))}))
        for text in texts
    ]
    weights = {"schedule": 0.5, "function.n": -0.25}
    found = group_rewards(responses, {"accuracy": 1.0}, 4, 0.0, weights)
    schedule, lengths = np.array([1, 1, -1, -1]), np.array([*map(len, texts)])
    np.testing.assert_array_equal(found.parts["schedule"], schedule)
    np.testing.assert_array_equal(found.parts["function.n"], lengths)
    np.testing.assert_array_equal(found.total, 0.5 * schedule - 0.25 * lengths)
    # What is paid for a short path goes by the schedule alone, not by its weight.
    steps = np.array([r.sequential_steps for r in responses[:2]])
    for weight in (0.5, 0.0, -1.0):
        weights["schedule"] = weight
        found = group_rewards(responses, {"accuracy": 1.0}, 4, 0.5, weights)
        expected = 0.5 * (steps.max() - steps) / steps.max()
        np.testing.assert_allclose(found.latency, [*expected, 0, 0], rtol=1e-6)
        total = weight * schedule - 0.25 * lengths + found.latency
        np.testing.assert_allclose(found.total, total, rtol=1e-6)


def test_sampling_ends_soon_after_a_function_has_failed(by_bytes):
    """In one process; what is asked later is never scored."""
    config = rl_alternating.get_config("smoke")
    failing = Function(lambda record: (_ for _ in ()).throw(OwnCodeError("enough")))
    mine = own.Own(config, ())
    mine.functions = own.Functions(reward=failing)
    experiment = types.SimpleNamespace(
        tokenizer=by_bytes,
        config=config,
        settings=types.SimpleNamespace(grammar=PLAIN),
        own=mine,
    )
    made, finished, count = trajectory(by_bytes, "Final Answer: 4"), [], 100

    class Sampler:
        """Finishes a response every few milliseconds."""

        def sample(self, params, prompts, samples, key, *, ids, on_finished):
            for i in range(count):
                on_finished(i, made)
                finished.append(i)
                time.sleep(pause_sec)
            return [], types.SimpleNamespace(
                prefill_sec=0.0, decode_sec=0.0, useful_row_steps=1.0
            )

    def ask(**how):
        given = experiment, Sampler(), None, [Problem("2+2?", "4", made.prompt)]
        return rollout.sample_and_score(*given, count, None, **how)[0]

    pause_sec = 0.05
    with pytest.raises(OwnCodeError, match="enough"):
        ask(rewarded=True)
    assert len(finished) < count
    pause_sec = 0.0
    assert len(ask()) == count  # an evaluation does not ask for rewards
