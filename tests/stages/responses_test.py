"""From trajectories to rewards, figures and files, on responses made by hand."""

import dataclasses
import json
import math
import os
import types

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import rl_alternating
from pr1_jax import diversity, evaluate, losses, rewards
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED
from pr1_jax.data import tasks, traces
from pr1_jax.data.prompts import Problem
from pr1_jax.stages import checks, evaluation, own, rollout
from pr1_jax.stages.responses import (
    Response,
    describe,
    group_advantages,
    group_rewards,
    has_signal,
    write_responses,
)
from pr1_jax.system import files
from pr1_jax.tags import Grammar

TOKENIZER = tasks.make().tokenizer()
PROMPT = np.array(
    TOKENIZER.encode("Which number has a partner 4 larger? A 51 30 C 34\n"), np.int32
)
PATHS = "<Parallel><Path> A 51>55 no</Path><Path> C 30>34 yes 30</Path></Parallel>\n"
BLOCK = f"{PATHS}<Summary> 30</Summary>"
PER_TOKEN = ("tokens", "positions", "block", "path", "forced", "bans", "logps")
RIGHT, WRONG = "\nFinal Answer: 1", "\nFinal Answer: 2"


def made(*responses):
    """Trajectories of responses in canonical text."""
    return [
        traces.from_text(PROMPT, text, TOKENIZER, variant="structured")
        for text in responses
    ]


def scored(*responses, answers=("1",), trajectories=None):
    """Responses to made-up problems, verified."""
    problems = [Problem(f"problem {i}", a, PROMPT) for i, a in enumerate(answers)]
    trajectories = trajectories or made(*responses)
    samples = len(trajectories) // len(problems)
    return [
        rollout.score(problems[i // samples], trajectory, TOKENIZER, timeout_sec=5.0)
        for i, trajectory in enumerate(trajectories)
    ]


class Sampler:
    """Stands in for the sampler: gives responses in the order in which they end."""

    def __init__(self, trajectories):
        self.trajectories = trajectories

    def sample(self, params, prompts, samples, key, *, ids, on_finished):
        assert len(prompts) * samples == len(self.trajectories)
        assert ids.tolist() == [*range(8, 8 + len(self.trajectories))]
        for i in reversed(range(len(self.trajectories))):
            on_finished(i, self.trajectories[i])
        return self.trajectories, types.SimpleNamespace(
            prefill_sec=0.0, decode_sec=0.0, useful_row_steps=1.0
        )


def test_responses_are_problem_major_whatever_ends_first():
    config = rl_alternating.get_config("smoke")
    settings = checks.decode_settings(config)
    experiment = types.SimpleNamespace(
        tokenizer=TOKENIZER, config=config, settings=settings, own=own.Own(config, ())
    )
    problems = [Problem(f"problem {a}", a, PROMPT) for a in ("1", "2")]
    sampler = Sampler(made(RIGHT, WRONG, WRONG, RIGHT))
    found, took = rollout.sample_and_score(
        experiment, sampler, None, problems, 2, None, first=8
    )
    assert [r.correct for r in found] == [True, False, True, False]
    assert [r.question for r in found] == ["problem 1"] * 2 + ["problem 2"] * 2
    assert [r.verdict for r in found] == ["correct", "incorrect"] * 2
    assert took["perf/verify_sec"] >= 0


@pytest.mark.parametrize(
    "response, accuracy, both, tiered",
    [
        (RIGHT, 1.0, -1.0, 1.0),
        (BLOCK + RIGHT, 1.0, 1.0, 1.2),
        (WRONG, -1.0, -1.0, -1.0),
        (BLOCK + WRONG, -1.0, -1.0, -1.0),
        (" A 51>55 no", -1.0, -1.0, -1.0),  # no answer is no right one
    ],
)
def test_rewards_of_responses(response, accuracy, both, tiered):
    (found,) = scored(response)
    assert found.response == response and found.format_ok  # tags are shown, EOS is not
    assert found.total_tokens == len(TOKENIZER.encode(response)) + 1  # with EOS
    assert found.verdict == ("correct" if accuracy > 0 else "incorrect")
    names = ("accuracy", "parallel_and_accuracy", "tiered")
    assert [found.reward({n: 1.0}) for n in names] == [accuracy, both, tiered]
    mixed = {"accuracy": 0.75, "tiered": 0.25}
    assert found.reward(mixed) == 0.75 * accuracy + 0.25 * tiered


def test_blocks_are_counted_as_recorded_and_faults_as_written():
    """A `</Path>` that the model wrote out of place is a fault, and no block."""
    (plain,) = made(RIGHT)
    more = {name: np.insert(getattr(plain, name), 0, 0) for name in PER_TOKEN}
    more["tokens"][0] = TOKENIZER.tag_ids["</Path>"]
    (found,) = scored(trajectories=[dataclasses.replace(plain, **more)])
    assert not found.format_ok and found.num_blocks == 0
    assert found.reward({"tiered": 1.0}) == 1.0  # correct, and no block


def test_describe_by_hand():
    cut = dataclasses.replace(made(WRONG)[0], finished=False)
    responses = [*made(BLOCK + RIGHT, BLOCK + BLOCK + RIGHT), cut]
    found = describe(scored(trajectories=responses))
    tokens = [len(TOKENIZER.encode(r)) + 1 for r in (BLOCK, BLOCK * 2, "")]
    tokens = np.mean(tokens) + len(TOKENIZER.encode(RIGHT))
    path = len(TOKENIZER.encode("<Path> A 51>55 no</Path>"))
    assert path == len(TOKENIZER.encode("<Path> C 30>34 yes 30</Path>"))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["parallel_ratio"] == pytest.approx(2 / 3)
    assert found["num_blocks"] == pytest.approx(1.0)
    assert found["finished"] == pytest.approx(2 / 3)
    assert found["format_ok"] == 1.0
    assert found["undecided"] == 0.0
    assert found["total_tokens"] == pytest.approx(tokens)
    # Three blocks in three responses: one path of each costs nothing.
    assert found["sequential_steps"] == pytest.approx(tokens - path)
    speed_up = tokens / (tokens - path)
    assert found["self_parallelism"] == pytest.approx(speed_up)


SAME = BLOCK.replace(" C 30>34 yes 30", " A 51>55 no")


def test_figures_of_paths_are_means_over_blocks():
    found = describe(scored(SAME + RIGHT, BLOCK + SAME + RIGHT, RIGHT, BLOCK + WRONG))
    assert found["identical_paths"] == found["path_likeness"] == 2 / 4
    assert found["work_division"] == 2 / 4
    assert not {*diversity.FIGURES} & describe(scored(RIGHT, WRONG)).keys()
    half = "<Parallel><Path> A 51>55 no 12>16 no</Path><Path> A 51>55 no</Path></Parallel>\n"
    (one,) = scored(half + "<Summary></Summary>")
    assert (one.identical_paths, one.path_likeness) == ((False,), (0.8,))
    assert one.work_division == (0.5,)


def planned(*counts):
    """A response of planned blocks with so many paths each, of which the last two are alike."""
    text = ""
    for k in counts:
        plans = "".join(f"<Plan> {row}</Plan>" for row in "ABCD"[:k])
        said = [" A 51>55 no", *(f" {row} 30>34 no" for row in "BCD"[: k - 2])]
        said = [
            f"<Path> {i} {x.strip()}</Path>" for i, x in enumerate([*said, said[-1]], 1)
        ]
        text += f"<Parallel>{plans}{''.join(said)}</Parallel>\n<Summary> 30</Summary>"
    return text + RIGHT


def test_paths_of_planned_blocks_are_counted_and_plans_are_none():
    tokenizer, grammar = (
        tasks.make().tokenizer(),
        Grammar((" 1", " 2", " 3", " 4"), True),
    )
    tokenizer.use_plans()
    found = []
    for text in (planned(2, 4), planned(3), RIGHT):
        whole = traces.from_text(
            PROMPT, text, tokenizer, variant="structured", grammar=grammar
        )
        given = {"timeout_sec": 5.0, "grammar": grammar}
        found.append(
            rollout.score(Problem("q", "1", PROMPT), whole, tokenizer, **given)
        )
    assert [r.num_paths for r in found] == [(2, 4), (3,), ()]
    assert all(r.format_ok and r.correct for r in found)
    assert describe(found)["num_paths"] == pytest.approx((2 + 4 + 3) / 3)
    assert "num_paths" not in describe(found[2:])
    # Plans differ, and paths that are alike are so all the same.
    assert [r.identical_paths for r in found] == [(True, True), (True,), ()]
    assert [Response.read(r.record()).num_paths for r in found] == [(2, 4), (3,), ()]
    # Elsewhere the number is the config's, and says nothing.
    (plain,) = scored(BLOCK + RIGHT)
    assert plain.num_paths == () and plain.trajectory.num_paths == (2,)


def test_labels_of_paths_are_no_work():
    trajectories = made(SAME.replace("<Path>", "<Path> 1"))
    experiment = types.SimpleNamespace(
        tokenizer=TOKENIZER,
        config=rl_alternating.get_config("smoke"),
        own=own.Own(rl_alternating.get_config("smoke"), ()),
    )
    for labels, identical in (((" 1", " 1"), True), ((" 1",), False), ((), True)):
        experiment.settings = types.SimpleNamespace(grammar=Grammar(labels))
        (found,), _ = rollout.sample_and_score(
            experiment,
            Sampler(trajectories),
            None,
            [Problem("q", "1", PROMPT)],
            1,
            None,
            first=8,
        )
        assert found.identical_paths == (identical,)


def test_records_of_older_versions_are_read():
    (found,) = scored(SAME + RIGHT)
    old = {n: x for n, x in found.record().items() if n not in diversity.FIGURES}
    read_back = Response.read(old)
    assert read_back.correct and read_back.work_division == ()
    mixed = describe([read_back, found])
    assert mixed["identical_paths"] == 1.0 and mixed["parallel_ratio"] == 1.0
    assert "identical_paths" not in describe([read_back])


def test_figures_of_an_evaluation_by_hand():
    responses = (BLOCK + RIGHT, RIGHT, WRONG, WRONG, WRONG, BLOCK * 2 + RIGHT)
    found = scored(*responses, answers=("1", "1", "1"))
    figures = evaluation.summarize(found, samples=2)
    assert figures["accuracy"] == figures["accuracy_string"] == pytest.approx(3 / 6)
    assert figures["pass_at_k"] == pytest.approx(2 / 3)
    bounds = figures["accuracy_low"], figures["accuracy_high"]
    assert bounds == evaluate.interval([1.0, 0.0, 0.5])  # over problems
    assert describe(found).items() <= figures.items()


def test_advantages_by_hand():
    responses = (RIGHT, WRONG, WRONG, WRONG, BLOCK + RIGHT, RIGHT, RIGHT, WRONG)
    paid, advantages, found = group_advantages(
        scored(*responses, answers=("1", "1")), {"tiered": 1.0}, 4, normalize_std=False
    )
    np.testing.assert_allclose(paid.total, [1, -1, -1, -1, 1.2, 1, 1, -1])
    expected = [1.5, -0.5, -0.5, -0.5, 0.65, 0.45, 0.45, -1.55]
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)
    assert found["reward/mean"] == pytest.approx(0.025)
    assert found["reward/tiered"] == found["reward/weight_tiered"] == 1.0
    assert found["reward/weight_accuracy"] == 0.0
    assert found["rollout/degenerate_groups"] == 0.0


def test_advantages_are_scaled_by_the_spread_of_their_own_group():
    found = scored(RIGHT, WRONG, WRONG, WRONG, RIGHT, RIGHT, WRONG, WRONG)
    _, advantages, _ = group_advantages(found, {"accuracy": 1.0}, 4, normalize_std=True)
    groups = advantages.reshape(2, 4)
    np.testing.assert_allclose(groups.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_array_equal(np.sign(groups[0]), [1, -1, -1, -1])
    assert groups[0, 0] > groups[1, 0] > 0  # the rarer success counts for more


def test_groups_without_signal_are_counted():
    found = scored(RIGHT, RIGHT, WRONG, WRONG, RIGHT, WRONG)
    _, advantages, figures = group_advantages(
        found, {"accuracy": 1.0}, 2, normalize_std=True
    )
    assert figures["rollout/degenerate_groups"] == pytest.approx(2 / 3)
    np.testing.assert_array_equal(advantages[:4], 0.0)
    assert advantages[4] > 0 > advantages[5]
    # Equal but for the block is a signal of the tiered reward only.
    for name, share in (("accuracy", 1.0), ("tiered", 0.0)):
        found = scored(BLOCK + RIGHT, RIGHT)
        _, _, figures = group_advantages(found, {name: 1.0}, 2, normalize_std=True)
        assert figures["rollout/degenerate_groups"] == share


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_costs_its_group_alone(value, monkeypatch, tmp_path):
    """Of its group, nothing is learned; it is named, counted and written as null."""
    said, real = [], rewards.weighted
    responses = (RIGHT, WRONG, RIGHT, WRONG, BLOCK + RIGHT, WRONG)
    found = scored(*responses, answers=("1", "1", "1"))
    weights = {"tiered": 1.0}
    ask = lambda: group_advantages(found, weights, 2, normalize_std=True)
    _, before, figures = ask()
    odd = lambda weights, num_blocks, **facts: (
        value if num_blocks else real(weights, num_blocks=num_blocks, **facts)
    )
    monkeypatch.setattr(rewards, "weighted", odd)
    warn = lambda text, *args: said.append(text % args)
    monkeypatch.setattr(logging, "warning", warn)
    paid, advantages, after = ask()
    np.testing.assert_array_equal(advantages[:4], before[:4])
    np.testing.assert_array_equal(advantages[4:], 0.0)
    assert (figures["reward/not_finite"], after["reward/not_finite"]) == (0, 1)
    assert (after["reward/mean"], after["reward/std"]) == (0.0, 1.0)
    assert after["rollout/degenerate_groups"] == pytest.approx(1 / 3)
    (line,) = said
    assert line.startswith(f"the reward {value} of response 1 to 'problem 2' is no")
    write_responses(tmp_path / "r.jsonl", found, paid.total)
    written = [record["reward"] for record in read(tmp_path / "r.jsonl")]
    assert written == [1.0, -1.0, 1.0, -1.0, None, -1.0]


def of_steps(*steps_and_verdicts, num_blocks=0):
    """A group of responses that took so many steps, with these verdicts."""
    (one,) = scored(RIGHT)
    facts = {"num_blocks": num_blocks, "trajectory": None}
    return [
        dataclasses.replace(one, sequential_steps=steps, verdict=verdict, **facts)
        for steps, verdict in steps_and_verdicts
    ]


GROUP = of_steps(
    (40, CORRECT), (30, CORRECT), (10, CORRECT), (5, INCORRECT), (80, UNDECIDED)
)


def test_short_critical_paths_by_hand():
    """The worked example of docs/method.md, section 5."""
    ask = lambda group, **settings: group_advantages(
        group, {"accuracy": 1.0}, len(group), normalize_std=True, **settings
    )
    paid, advantages, figures = ask(GROUP[:4], latency_coef=0.5)
    np.testing.assert_allclose(paid.latency, [0, 0.125, 0.375, 0])
    np.testing.assert_allclose(paid.total, [1, 1.125, 1.375, -1])
    np.testing.assert_allclose(advantages, [0.433, 0.577, 0.866, -1.876], atol=1e-3)
    assert figures["reward/latency"] == pytest.approx(0.125)
    assert figures["reward/mean"] == pytest.approx(0.625)
    paid, _, _ = ask(GROUP, latency_coef=1.0)  # of an undecided one nothing is known
    np.testing.assert_allclose(paid.latency, [0, 0.25, 0.75, 0, 0])
    # All are right: that alone teaches nothing, and steps weigh what they are paid.
    paid, advantages, figures = ask(GROUP[:3], latency_coef=0.2)
    np.testing.assert_allclose(advantages, [-1 / 15, -1 / 60, 1 / 12], atol=1e-6)
    assert figures["rollout/degenerate_groups"] == 0.0 == 1 - has_signal(paid.total)
    # One alone, and equal numbers of steps, save nothing.
    for group in (GROUP[1:2] + GROUP[3:], of_steps((7, CORRECT), (7, CORRECT))):
        np.testing.assert_array_equal(ask(group, latency_coef=1.0)[0].latency, 0.0)


def test_without_its_coefficient_nothing_is_paid_or_logged():
    for weights in ({"accuracy": 1.0}, {"tiered": 0.3, "accuracy": 0.6}):
        plain = np.array([r.reward(weights) for r in GROUP], np.float32)
        paid, advantages, figures = group_advantages(
            GROUP, weights, len(GROUP), normalize_std=True
        )
        np.testing.assert_array_equal(paid.total, plain)
        np.testing.assert_array_equal(advantages, losses.advantages([plain])[0])
        assert "reward/latency" not in figures


response_of_a_group = st.tuples(
    st.integers(1, 3000),
    st.sampled_from((CORRECT, INCORRECT, UNDECIDED)),
    st.integers(0, 2),
    st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(
    group=st.lists(response_of_a_group, min_size=2, max_size=8),
    schedule=st.sampled_from(rewards.SCHEDULES),
    step=st.integers(1, 300),
    coef=st.sampled_from((0.0, 0.01, 0.2, 1.0)) | st.floats(0, 1),
    tokens=st.integers(0, 10**6),
    data=st.data(),
)
def test_a_short_path_is_paid_only_where_the_answer_is(
    group, schedule, step, coef, tokens, data
):
    """Laws of the bonus, for every schedule and any group."""
    weights = rewards.weights(schedule, step)
    responses = [
        dataclasses.replace(r, num_blocks=n, format_ok=ok)
        for r, (_, _, n, ok) in zip(of_steps(*(x[:2] for x in group)), group)
    ]
    ask = lambda responses: group_rewards(responses, weights, len(group), coef)
    total, plain, latency, *_ = ask(responses)
    paid = plain > 0
    assert not any(paid[i] and not r.correct for i, r in enumerate(responses))
    assert (latency[~paid] == 0).all() and (total[~paid] == plain[~paid]).all()
    assert (0 <= latency).all() and (latency <= coef).all()
    wrong = [x for x, r in zip(total, responses) if not r.correct]
    right = [x for x, p in zip(total, paid) if p]
    assert max(wrong, default=-1) < min(right, default=1) and max(wrong, default=-1) < 0
    if schedule == "accuracy":
        assert [*paid] == [r.correct for r in responses]
    for i, a in enumerate(responses):  # fewer steps are never paid less
        for j, b in enumerate(responses):
            if paid[i] and paid[j] and a.sequential_steps < b.sequential_steps:
                assert latency[i] >= latency[j]
    order = data.draw(st.permutations(range(len(group))))
    np.testing.assert_array_equal(ask([responses[i] for i in order])[0], total[order])
    # Tokens beside the critical path pay nothing, in whichever response they are.
    longer = [dataclasses.replace(responses[0], total_tokens=tokens), *responses[1:]]
    np.testing.assert_array_equal(ask(longer)[0], total)


def read(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_written_responses_read_back(tmp_path):
    found = scored(BLOCK + RIGHT, WRONG)
    path = tmp_path / "rollouts" / "rl_000001.jsonl"
    write_responses(path, found, [1.2, -1.0])
    first, second = read(path)
    assert first["response"] == BLOCK + RIGHT
    assert (first["reward"], second["reward"]) == (1.2, -1.0)
    assert (first["verdict"], second["verdict"]) == ("correct", "incorrect")
    assert (first["num_blocks"], second["num_blocks"]) == (1, 0)
    assert first["sequential_steps"] < first["total_tokens"]
    assert Response.read(first) == dataclasses.replace(found[0], trajectory=None)
    assert second["sequential_steps"] == second["total_tokens"]
    write_responses(path, found, [1.25, -1.0], latency=[0.25, 0.0])
    assert [r["reward_latency"] for r in read(path)] == [0.25, 0.0]
    write_responses(path, found[1:])
    (only,) = read(path)
    assert "reward" not in only and "reward_latency" not in {*only, *first}


def test_a_trace_says_what_each_token_was(tmp_path):
    (first,) = made(BLOCK + RIGHT)
    logps = np.linspace(-2, -0.0001, len(first.tokens)).astype(np.float32)
    forced = np.arange(len(first.tokens)) == 1
    first = dataclasses.replace(first, logps=logps, forced=forced)
    (plain,) = made(WRONG)
    shorter = {name: getattr(plain, name)[:-1] for name in PER_TOKEN}
    cut = dataclasses.replace(plain, finished=False, **shorter)
    found = scored(trajectories=[first, cut, first])
    path = tmp_path / "r.jsonl"
    write_responses(path, found, traces=2, tokenizer=TOKENIZER)
    records = read(path)
    assert ["trace" in record for record in records] == [True, True, False]
    trace, short = records[0]["trace"], records[1]["trace"]
    assert trace.pop("prompt_tokens") == len(PROMPT)
    assert {len(values) for values in trace.values()} == {len(first.tokens)}
    assert "".join(trace["pieces"]) == BLOCK + RIGHT + "<eos>"
    assert trace["pieces"][:4] == ["<Parallel>", "<Path>", " A", " 51"]
    assert "".join(short["pieces"]) == WRONG == records[1]["response"]
    np.testing.assert_allclose(trace["logps"], logps, atol=5.01e-4)
    assert str(trace["logps"][-1]) == "0.0"
    assert trace["forced"] == [0, 1] + [0] * (len(logps) - 2)
    for name in ("positions", "block", "path"):
        assert trace[name] == getattr(first, name).tolist()
    write_responses(path, found)
    assert "trace" not in read(path)[0]


@pytest.mark.parametrize(
    "odd", ["naïve – 数学 🧮", "a\u2028b\x85c\x00d", "\ud83d half"]
)
def test_odd_text_is_one_line_each(tmp_path, odd):
    (found,) = scored(RIGHT)
    found = dataclasses.replace(found, response=odd)
    write_responses(tmp_path / "r.jsonl", [found, found])
    data = (tmp_path / "r.jsonl").read_bytes()
    assert data.count(b"\n") == 2
    for line in data.splitlines():
        text = line.decode("utf-8", "surrogatepass")
        assert json.loads(text)["response"] == odd


def test_a_crash_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    found = scored(RIGHT, WRONG)
    write_responses(path, found)
    before = path.read_bytes()

    def crash(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        write_responses(path, found[:1])
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_responses(path, found[:1])
    assert len(read(path)) == 1
    assert os.listdir(tmp_path) == ["r.jsonl"]
