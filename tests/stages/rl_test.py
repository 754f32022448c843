"""The RL stage: each of its switches, by the figures of its first steps."""

import json

import jax
import numpy as np
import pytest

from configs import rl_alternating
from pr1_jax import rewards, trajectory
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, Result
from pr1_jax.stages import experiment, rl, rollout
from pr1_jax.stages.run import Run
from pr1_jax.workdir import metrics
from pr1_jax.workers.own import OwnCodeError

PROMPTS = 4
RESPONSE_TOKENS = 110


@pytest.fixture(scope="module")
def rl_steps(tmp_path_factory):
    """Takes RL steps in this process under some switches: rl_steps(**switches).

    A random model is never right, so a response counts as correct where its number of
    tokens is even. All runs share one compiled sampler.
    """
    samplers = {}

    def take(
        switches,
        verdict=lambda text: len(text) % 2 == 0,
        variant="structured",
        latency_coef=0.0,
        packed_tokens=0,
        reward=(),
        **settings,
    ):
        config = rl_alternating.get_config("smoke")
        config.seed = 2  # at which groups with blocks have signal
        config.variant = variant
        config.stages = ("rl",)
        config.data.rl = config.data.eval = "embedded:easy"
        config.reward.update(schedule="accuracy", latency_coef=latency_coef)
        config.reward.update(dict(reward))
        config.model.num_layers, config.model.width, config.model.mlp_width = 1, 32, 32
        # Room for a block nearly anywhere: a random model opens one in 100 tokens.
        config.rollout.update(min_path_tokens=3, max_path_tokens=8)
        # At a deadline nearly all of its responses would end, equally long.
        config.rollout.max_sequential_steps = 0
        config.rollout.max_response_tokens = RESPONSE_TOKENS
        config.model.length_buckets, config.model.packed_tokens = (), packed_tokens
        config.rl.update(steps=1, group_size=4, micro_batch_size=8, mini_batches=1)
        config.rl.shared_prompt_tokens = ()
        config.rl.update(switches)
        config.rollout.update(settings)
        made = experiment.build(config.lock(), devices=jax.devices()[:1])
        made.own.load()
        key = (variant, *settings.items())
        made.samplers.update(samplers.get(key, {}))

        def check(text, *_, **__):
            return Result(CORRECT if verdict(text) else INCORRECT, "made up")

        workdir = tmp_path_factory.mktemp("steps")
        with pytest.MonkeyPatch.context() as patch, Run(made, workdir) as current:
            patch.setattr(rollout, "check", check)
            start = jax.tree.map(np.asarray, current.params)
            rl.run_stage(made, current, 0)
            end = jax.tree.map(np.asarray, current.params)
        samplers[key] = made.samplers
        moved = jax.tree.map(lambda a, b: b - a, start, end)
        rollouts = (workdir / "rollouts" / "rl_000001.jsonl").read_text()
        sampled = [json.loads(line) for line in rollouts.splitlines()]
        return metrics.read_metrics(workdir / "metrics.jsonl"), sampled, moved

    return take


def difference(a, b):
    """Greatest difference of two trees of arrays."""
    gaps = jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)
    return max(jax.tree.leaves(gaps))


@pytest.fixture(scope="module")
def plain(rl_steps):
    """The step of the other tests with all switches off."""
    return rl_steps({})


@pytest.mark.slow
def test_kl_starts_at_zero_and_holds_the_policy_back(rl_steps):
    last = []
    for kl_coef in (1e-6, 10.0):
        found, _, _ = rl_steps({"kl_coef": kl_coef, "steps": 4, "lr": 3e-3})
        assert found[0]["policy/ref_kl"] == pytest.approx(0.0, abs=1e-6)
        assert found[1]["policy/ref_kl"] > 1e-4
        last.append(found[-1]["policy/ref_kl"])
    assert last[1] < 0.5 * last[0]


def test_a_prompt_is_computed_once_for_its_group(rl_steps, plain):
    (alone,), sampled, expected = plain
    packed, real = [], experiment.Experiment.pack

    def pack(*args, **kwargs):
        packed.append(kwargs["shared"])
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Experiment, "pack", pack)
        # No prompt is shorter than 20 tokens.
        (line,), again, moved = rl_steps({"shared_prompt_tokens": (20,)})
    assert sampled == again
    assert np.unique(packed) == [20]
    saved = alone["perf/update_tokens"] - line["perf/update_tokens"]
    assert saved == PROMPTS * (4 - 1) * 20
    assert line["loss/grpo"] == pytest.approx(alone["loss/grpo"], abs=1e-6)
    assert line["rollout/logp_gap_max"] < 1e-4
    assert difference(moved, expected) < 0.01 * np.abs(moved["embedding"]).max()


@pytest.mark.parametrize(
    "switches",
    [{}, {"recompute_logps": True, "importance_cap": 1.05, "train_on_forced": True}],
)
def test_several_responses_in_a_row(rl_steps, plain, switches):
    (alone,), sampled, expected = rl_steps(switches) if switches else plain
    few = switches | {"micro_batch_size": 2}  # rows
    (line,), again, moved = rl_steps(few, packed_tokens=540)
    assert sampled == again
    tokens = sum(r["total_tokens"] for r in sampled)
    assert tokens < line["perf/update_tokens"] < alone["perf/update_tokens"]
    for name, value in alone.items():
        if name.startswith(("policy/", "loss/", "rollout/logp_gap")):
            assert line[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name
    assert difference(moved, expected) < 0.01 * np.abs(moved["embedding"]).max()


def test_forced_tokens_are_trained_on_when_asked(rl_steps, plain):
    found, sampled, moved = rl_steps({"train_on_forced": True})
    (line,), (other,) = found, plain[0]
    assert sampled == plain[1]
    assert any(r["num_blocks"] for r in sampled)  # so there are forced tokens
    # The sampler recorded no log-probs for them: they are recomputed.
    assert line["policy/ratio_max_error"] < 1e-4
    assert line["rollout/logp_gap_max"] < 1e-4
    assert line["loss/grpo"] != pytest.approx(other["loss/grpo"], abs=1e-6)
    assert difference(moved, plain[2]) > 1e-6


def test_old_log_probs_are_recomputed_when_asked(rl_steps, plain, monkeypatch):
    """As if the sampler were less exact: its noise is in the gap, and not in ratios."""
    noise, real = np.random.default_rng(0), trajectory.pack

    def inexact(*args, **kwargs):
        batch = real(*args, **kwargs)
        wrong = noise.normal(0, 0.1, batch.old_logps.shape).astype(np.float32)
        return batch.replace(old_logps=batch.old_logps + wrong * batch.loss_mask)

    monkeypatch.setattr(trajectory, "pack", inexact)
    (line,), _, _ = rl_steps({})
    assert line["policy/ratio_max_error"] > 0.1 < line["rollout/logp_gap_max"]
    (line,), sampled, moved = rl_steps({"recompute_logps": True})
    assert line["policy/ratio_max_error"] < 1e-4
    assert line["rollout/logp_gap_max"] > 0.1
    assert "policy/importance_mean" not in line
    assert sampled == plain[1]
    assert difference(moved, plain[2]) < 0.01 * np.abs(moved["embedding"]).max()
    switches = {"recompute_logps": True, "importance_cap": 1.05}
    (line,), _, corrected = rl_steps(switches)
    assert line["policy/importance_min"] < 0.9
    assert 0.9 < line["policy/importance_mean"] < 1
    assert difference(moved, corrected) > 0


@pytest.mark.slow
def test_importance_of_a_sampler_that_is_another_policy(rl_steps):
    (plain,), sampled, moved = rl_steps({}, variant="causal")
    assert any(r["num_blocks"] for r in sampled)
    assert plain["rollout/logp_gap_max"] < 1e-4
    assert plain["rollout/logp_gap_later_paths_max"] > 1e-4  # by design
    assert "policy/importance_mean" not in plain
    (line,), again, corrected = rl_steps({"importance_cap": 2.0}, variant="causal")
    assert again == sampled
    assert line["policy/importance_mean"] == pytest.approx(1.0, abs=0.05)
    assert 0 < line["policy/importance_min"] < 1 - 1e-4
    assert 0 < difference(corrected, moved)


def test_a_schedule_may_mix_rewards(rl_steps, monkeypatch):
    weights = {"accuracy": 0.5, "tiered": 0.25}
    monkeypatch.setattr(rewards, "weights", lambda *_, **__: weights)
    (line,), sampled, _ = rl_steps({})
    assert any(r["num_blocks"] for r in sampled)
    logged = {n: line[f"reward/weight_{n}"] for n in rewards.REWARDS}
    assert logged == {"parallel_and_accuracy": 0.0, **weights}
    for r in sampled:
        facts = {
            "correct": r["verdict"] == CORRECT,
            "num_blocks": r["num_blocks"],
            "format_ok": r["format_ok"],
        }
        expected = sum(w * rewards.reward(n, **facts) for n, w in weights.items())
        assert r["reward"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "aggregation, normalize_std",
    [
        ("token_mean", True),
        ("token_mean", False),
        pytest.param("response_mean", True, marks=pytest.mark.slow),
        ("constant", True),
    ],
)
def test_loss_of_the_first_update_by_hand(rl_steps, aggregation, normalize_std):
    # Without blocks every token is in the loss, and all ratios are 1.
    switches = {"aggregation": aggregation, "normalize_std": normalize_std}
    third = lambda text: len(text) % 3 == 0
    (line,), sampled, _ = rl_steps(switches, third, max_blocks=0)
    values = np.array([r["reward"] for r in sampled]).reshape(PROMPTS, 4)
    centred = values - values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1, keepdims=True) + 1e-6
    assert ((spread > 0.1) & (spread < 0.9)).any()  # so that the division shows
    advantages = (centred / spread if normalize_std else centred).ravel()
    tokens = np.array([r["total_tokens"] for r in sampled])
    assert len(set(tokens)) > 2 and np.ptp(advantages) > 0
    expected = {
        "token_mean": (advantages * tokens).sum() / tokens.sum(),
        "response_mean": advantages.mean(),
        "constant": (advantages * tokens).sum() / (len(tokens) * RESPONSE_TOKENS),
    }
    assert line["loss/grpo"] == pytest.approx(-expected[aggregation], abs=1e-5)


def test_other_objectives_by_hand(rl_steps, monkeypatch):
    """One step with the switches that plain GRPO leaves off, in packed rows."""
    noise, real = np.random.default_rng(0), trajectory.pack_rows

    def inexact(rows, *args, **kwargs):
        batch = real(rows, *args, **kwargs)
        wrong = noise.normal(0, 0.02, batch.old_logps.shape).astype(np.float32)
        return batch.replace(old_logps=batch.old_logps + wrong * batch.loss_mask)

    monkeypatch.setattr(trajectory, "pack_rows", inexact)
    switches = {"objective": "gspo", "aggregation": "response_mean", "dual_clip": 3.0}
    switches |= {"kl_coef": 0.1, "kl_estimator": "k3+", "baseline": "leave_one_out"}
    switches |= {"recompute_logps": True, "importance": "sequence_mask"}
    switches |= {"importance_cap": 1.1, "importance_floor": 0.9, "normalize_std": False}
    switches |= {"mask_truncated": True, "micro_batch_size": 2}
    (line,), sampled, moved = rl_steps(
        switches, reward={"overlong_buffer": 80}, packed_tokens=540, max_blocks=0
    )
    tokens = np.array([r["total_tokens"] for r in sampled])
    finished = np.array([r["finished"] for r in sampled])
    assert 2 < finished.sum() < len(sampled)
    right = np.array([1.0 if r["verdict"] == CORRECT else -1.0 for r in sampled])
    punished = -np.maximum(tokens - (RESPONSE_TOKENS - 80), 0) / 80
    assert line["reward/overlong"] == pytest.approx(punished.mean(), abs=1e-6)
    np.testing.assert_allclose(
        [r["reward"] for r in sampled], right + punished, atol=1e-6
    )
    values = (right + punished).reshape(PROMPTS, 4)
    advantages = (4 / 3 * (values - values.mean(axis=1, keepdims=True))).ravel()
    # All ratios of a response are 1, but the sampler's were others.
    assert 0 < line["policy/importance_dropped"] < 1
    kept = advantages[finished].mean()
    assert line["loss/grpo"] != pytest.approx(-kept, abs=1e-3)
    assert line["policy/ref_kl"] == pytest.approx(0, abs=1e-6)
    assert line["policy/ratio_max_error"] < 1e-4
    assert difference(moved, jax.tree.map(np.zeros_like, moved)) > 1e-6
    switches |= {"importance_cap": 9.0, "importance_floor": 0.0}
    switches |= {"importance": "sequence_truncate"}
    noise = np.random.default_rng(0)
    monkeypatch.setattr(trajectory, "pack_rows", real)
    (line,), _, _ = rl_steps(
        switches, reward={"overlong_buffer": 80}, packed_tokens=540, max_blocks=0
    )
    assert line["loss/grpo"] == pytest.approx(-kept, abs=1e-4)


@pytest.mark.parametrize(
    "packed_tokens", [540, pytest.param(0, marks=pytest.mark.slow)]
)
def test_kl_in_the_reward_by_hand(rl_steps, monkeypatch, packed_tokens):
    """From a reference that knows nothing: the log of how many tokens it draws from."""
    nothing = lambda run, trained: jax.tree.map(np.zeros_like, trained)
    monkeypatch.setattr(Run, "reference", nothing)
    switches = {"kl_coef": 0.02, "kl_estimator": "k1", "normalize_std": False}
    switches |= {"mini_batches": 2, "lr": 1e-9, "micro_batch_size": 2}
    (line,), sampled, _ = rl_steps(switches, packed_tokens=packed_tokens, max_blocks=0)
    tokens = np.array([r["total_tokens"] for r in sampled])
    logps = np.array([sum(r["trace"]["logps"]) for r in sampled])
    drawn_from = np.exp(line["policy/ref_kl"] - logps.sum() / tokens.sum())
    assert drawn_from == pytest.approx(round(drawn_from), abs=0.1) and drawn_from > 20
    values = np.array([r["reward"] for r in sampled])
    assert {*values} == {-1.0, 1.0}
    values = values - 0.02 * (logps + tokens * np.log(drawn_from))
    values = values.reshape(PROMPTS, 4)
    advantages = (values - values.mean(axis=1, keepdims=True)).ravel()
    halves = zip(np.split(advantages, 2), np.split(tokens, 2))
    expected = np.mean([(a * n).sum() / n.sum() for a, n in halves])
    assert line["loss/grpo"] == pytest.approx(-expected, abs=1e-4)


def test_two_mini_batches_make_two_updates(rl_steps, plain):
    (line,), sampled, moved = rl_steps({"mini_batches": 2})
    assert sampled == plain[1]
    assert line["policy/ratio_max_error"] < 1e-4  # of the first one
    assert difference(moved, plain[2]) > 1e-6


def test_dynamic_sampling_replaces_groups_without_signal(rl_steps, monkeypatch):
    # About one response in twelve is right: most groups of four have no signal.
    rarely = lambda text: sum(map(ord, text)) % 12 == 0
    (line,), _, _ = rl_steps({}, rarely)
    assert line["rollout/degenerate_groups"] > 0
    assert line["rollout/sampling_rounds"] == 1
    monkeypatch.setattr(rl, "ROUNDS", 30)
    (line,), sampled, _ = rl_steps({"dynamic_sampling": True}, rarely)
    assert line["rollout/degenerate_groups"] == 0
    assert 1 < line["rollout/sampling_rounds"] <= 30
    assert len(sampled) == PROMPTS * 4
    for i in range(0, len(sampled), 4):
        group = sampled[i : i + 4]
        assert len({r["question"] for r in group}) == 1
        assert {r["reward"] for r in group} == {-1.0, 1.0}


def test_steps_teach_where_all_are_right(rl_steps):
    """A bonus for fewer steps is a signal for dynamic sampling, too, and recorded."""
    always = lambda text: True
    (line,), sampled, _ = rl_steps({}, always, latency_coef=0.5)
    steps = np.reshape([r["sequential_steps"] for r in sampled], (PROMPTS, 4))
    equal = np.ptp(steps, axis=1) == 0  # of these groups nothing can be learned
    assert line["rollout/degenerate_groups"] == equal.mean() < 1
    (line,), sampled, _ = rl_steps({"dynamic_sampling": True}, always, latency_coef=0.5)
    assert (line["rollout/sampling_rounds"] > 1) == equal.any()
    assert line["rollout/degenerate_groups"] == 0
    assert line["policy/ratio_max_error"] < 1e-3 and line["optim/grad_norm"] > 0
    saved = []
    for group in (sampled[i : i + 4] for i in range(0, len(sampled), 4)):
        steps = [r["sequential_steps"] for r in group]
        saved += rewards.saving(steps, [True] * 4)
    assert [r["reward_latency"] for r in sampled] == pytest.approx(
        [0.5 * x for x in saved], abs=1e-6
    )
    assert [r["reward"] - r["reward_latency"] for r in sampled] == pytest.approx(
        [1.0] * len(sampled), abs=2e-6
    )
    assert line["reward/latency"] == pytest.approx(0.5 * np.mean(saved), abs=1e-6)
    assert line["reward/latency"] == pytest.approx(line["reward/mean"] - 1, abs=1e-6)


@pytest.mark.slow
def test_dynamic_sampling_gives_up_after_its_rounds(rl_steps):
    (line,), sampled, _ = rl_steps({"dynamic_sampling": True}, lambda text: False)
    assert line["rollout/sampling_rounds"] == 3
    assert line["rollout/degenerate_groups"] == 1
    assert len(sampled) == PROMPTS * 4
    assert line["optim/grad_norm"] == 0


OWN_REWARD = """
def score(record):
    assert len(record.paths) == record.num_blocks == len(record.summaries)
    if STOP in record.question:
        raise RuntimeError("enough")
    return {"length": -record.total_tokens / 100, "right": RIGHT[record.verdict]}

RIGHT = {"correct": 1, "incorrect": -1}
STOP = "STOP HERE"
"""


def test_a_function_may_reward_as_the_schedule_does(rl_steps, plain, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN_REWARD)
    weights = "schedule=0,function.right=1,function.length=0"
    reward = {"function": f"{file}:score", "weights": weights}
    (line,), sampled, moved = rl_steps({}, reward=reward)
    (other,), same, expected = plain
    assert difference(moved, expected) == 0.0
    parts = [record.pop("reward_parts") for record in sampled]
    assert sampled == same
    lengths = [-record["total_tokens"] / 100 for record in same]
    assert parts == [
        {"schedule": r["reward"], "function.length": x, "function.right": r["reward"]}
        for r, x in zip(same, lengths)
    ]
    assert line["reward/mean"] == other["reward/mean"]
    assert line["reward/function.right"] == pytest.approx(other["reward/mean"])
    assert line["reward/function.length"] == pytest.approx(np.mean(lengths))
    assert line["reward/function.length_std"] == pytest.approx(np.std(lengths))


def test_a_function_that_fails_stops_a_run_before_the_update(
    rl_steps, plain, tmp_path, monkeypatch
):
    question = plain[1][6]["question"]
    file = tmp_path / "mine.py"
    file.write_text(OWN_REWARD.replace("STOP HERE", question.strip()))
    updated, kept = [], []
    monkeypatch.setattr(rl, "_update", lambda *args: updated.append(args))
    monkeypatch.setattr(Run, "keep", lambda run, position, *_: kept.append(position))
    said = r"mine.py:5, `raise RuntimeError\("
    with pytest.raises(OwnCodeError, match=said) as error:
        rl_steps({}, reward={"function": f"{file}:score"})
    assert repr(question)[1:-1] in str(error.value)
    assert not updated and [position.step for position in kept] == [0]
