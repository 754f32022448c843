"""The RL stage: GRPO on sampled responses (docs/method.md, sections 3 to 6).

A step samples a group of responses to each of its problems, rewards them by the
schedule, and makes one update a mini-batch. In the structured variant the sampler's
log-probs are the old log-probs; in the causal variant, where forced tokens are trained
on, and where sampling takes a shortcut, the trainer recomputes them.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pr1_jax import rewards, trajectory
from pr1_jax.data import prompts, sources, streams
from pr1_jax.stages import pace, rollout
from pr1_jax.stages.experiment import Experiment
from pr1_jax.stages.responses import (
    Response,
    describe,
    everyones,
    group_advantages,
    group_rewards,
    has_signal,
    write_responses,
)
from pr1_jax.stages.run import Run
from pr1_jax.stages.updater import Updater
from pr1_jax.system import processes, stopping
from pr1_jax.training.state import TrainState
from pr1_jax.trajectory import Batch
from pr1_jax.workdir.checkpoint import Position
from pr1_jax.workers.own import OwnCodeError

ROUNDS = 3  # of sampling in a step, at most, with dynamic sampling


def open_stream(experiment: Experiment) -> streams.Stream[prompts.Problem]:
    """The stage's problems."""
    c = experiment.config
    return streams.problem_stream(
        experiment.source(c.data.rl, "train", seed=c.data.seed + 1),
        experiment.tokenizer,
        template=experiment.own.template,
        max_prompt_tokens=c.rollout.max_prompt_tokens,
        batch_size=c.rl.prompts_per_step // jax.process_count(),
        seed=c.data.seed + 1,
        shuffle=not sources.is_made_by_code(c.data.rl),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _collect(
    experiment: Experiment,
    params: Any,
    stream: streams.Stream[prompts.Problem],
    step: int,
    weights: Mapping[str, float],
) -> tuple[list[Response], dict[str, float]]:
    """Samples a step's groups; with dynamic sampling, replaces those without signal.

    Each process does so with its own share of the problems.
    """
    c = experiment.config
    wanted = c.rl.prompts_per_step // jax.process_count() * c.rl.group_size
    kept: list[Response] = []
    spare: list[Response] = []
    times: dict[str, float] = {}
    beside = _beside_schedule(experiment)
    tries = ROUNDS if c.rl.dynamic_sampling else 1
    for attempt in range(tries):
        began = time.perf_counter()
        problems = next(stream)
        data_sec = time.perf_counter() - began
        responses, took = rollout.sample_and_score(
            experiment,
            experiment.sampler(c.rl.group_size),
            params,
            problems,
            c.rl.group_size,
            jax.random.fold_in(experiment.key("rl", step), attempt),
            rewarded=True,
        )
        done = pace.sampling([r.trajectory for r in responses], c.rl.group_size)
        took |= {
            "perf/data_sec": data_sec,
            "perf/sampling_tflop": pace.everyones(done).tflop(experiment.model),
        }
        for name, value in took.items():
            adds_up = name.endswith(("_sec", "_tflop"))
            times[name] = value + (times.get(name, 0.0) if adds_up else 0.0)
        for i in range(0, len(responses), c.rl.group_size):
            group = responses[i : i + c.rl.group_size]
            found = group_rewards(group, weights, len(group), **beside)
            teaches = has_signal(found.total)
            (kept if teaches or not c.rl.dynamic_sampling else spare).extend(group)
        if processes.everywhere(len(kept) >= wanted):
            break
    times["rollout/sampling_rounds"] = attempt + 1.0
    if spare:  # spread over the mini-batches
        groups = np.arange(wanted).reshape(-1, c.rl.group_size)
        groups = np.random.default_rng([c.seed, step]).permutation(groups)
        return [(kept + spare)[i] for i in groups.ravel()], times
    return kept[:wanted], times


def run_stage(experiment: Experiment, run: Run, stage: int) -> None:
    """Runs GRPO from where `run` stands to the end of the stage."""
    c = experiment.config
    optimizer, learning_rate = experiment.optimizer("rl")
    stream = open_stream(experiment)
    state, start = run.begin(stage, optimizer, stream)
    with ThreadPoolExecutor(1) as threads:  # XLA leaves cores idle
        updater = Updater(experiment, run, state.params, threads)
        experiment.sampler(c.rl.group_size).warm_up(run.policy(state.params))
    peak = pace.device_peak(c)
    began, saved_sec = time.perf_counter(), 0.0
    writer = ThreadPoolExecutor(1)
    with run.display("rl", c.rl.steps) as progress, writer:
        for step in range(start + 1, c.rl.steps + 1):
            weights = reward_weights(c, step)
            data_state = stream.get_state()
            try:
                responses, metrics = _collect(
                    experiment, run.policy(state.params), stream, step, weights
                )
            except stopping.Stopped:
                run.leave(Position(stage, step - 1), state, data_state)
            except OwnCodeError:  # a mended function goes on from here
                run.keep(Position(stage, step - 1), state, data_state)
                raise
            updating = time.perf_counter()
            trajectories = updater.as_trained([r.trajectory for r in responses])
            kl, of_kl = updater.kl_penalty(state.params, trajectories)
            found, advantages, of_rewards = group_advantages(
                responses,
                weights,
                c.rl.group_size,
                normalize_std=c.rl.normalize_std,
                normalize_parts=c.rl.normalize_parts,
                baseline=c.rl.baseline,
                kl=kl,
                **_beside_schedule(experiment),
            )
            of_all = everyones(responses, c.rl.group_size)
            metrics |= {f"rollout/{n}": x for n, x in describe(of_all).items()}
            metrics |= of_rewards | of_kl
            path = run.workdir / "rollouts" / f"rl_{step:06d}.jsonl"
            written = writer.submit(
                write_responses,
                path,
                responses,
                found.total,
                latency=found.latency if c.reward.latency_coef else None,
                parts=found.parts,
                traces=c.report.traces,
                tokenizer=experiment.tokenizer,
            )
            keep = functools.partial(run.keep_batch, "rl")
            state, of_update = _update(updater, state, trajectories, advantages, keep)
            rate = learning_rate(np.int32((step - 1) * c.rl.mini_batches))
            metrics |= of_update | {"optim/lr": float(rate)}
            updated = time.perf_counter()
            written.result()
            now = time.perf_counter()
            metrics |= {
                "perf/update_sec": updated - updating,
                "perf/wait_sec": now - updated,
                "perf/checkpoint_sec": saved_sec,  # with logs, after the step before
            }
            tokens = sum(r.total_tokens for r in of_all)
            metrics |= pace.pace(
                metrics, tokens=tokens, seconds=now - began, peak_tflops=peak
            )
            began = now
            run.log("rl", step, metrics | run.count_records(stream), progress)
            run.save(Position(stage, step), state, stream.get_state(), metrics)
            saved_sec = time.perf_counter() - began
    if len(stream.counts) > 1:  # some were dropped
        run.say(f"rl data: {stream.summary}")


def reward_weights(config: Any, step: int) -> dict[str, float]:
    """Weights of the step's rewards (`rewards.weights`), as the config has them."""
    names = ("schedule", "window", "tiered_steps", "scaffold_steps")
    return rewards.weights(step=step, **{name: config.reward[name] for name in names})


def _beside_schedule(experiment: Experiment) -> dict[str, Any]:
    """What rewards a response beside the schedule, as `group_rewards` takes it."""
    c = experiment.config
    overlong = functools.partial(
        rewards.overlong,
        max_tokens=c.rollout.max_response_tokens,
        max_steps=c.rollout.max_sequential_steps,
        buffer=c.reward.overlong_buffer,
    )
    return {
        "latency_coef": c.reward.latency_coef,
        "part_weights": experiment.own.part_weights,
        "overlong": overlong if c.reward.overlong_buffer else None,
    }


def _update(
    updater: Updater,
    state: TrainState,
    trajectories: Sequence[trajectory.Trajectory],
    advantages: np.ndarray,
    keep_batch: Callable[[Batch], None],
) -> tuple[TrainState, dict[str, float]]:
    """One update a mini-batch; whole groups stay together.

    Args:
      keep_batch: called with a batch whose gradient was not finite.
    """
    batches, metrics = updater.mini_batches(state.params, trajectories, advantages)
    updates: list[dict[str, float]] = []
    for batch, ref in batches:
        state, figures = updater.update(state, batch, ref)
        updates.append({name: float(x) for name, x in figures.items()})
        if updates[-1]["skipped"]:
            keep_batch(batch)
    first = updates[0]
    mean = {name: float(np.mean([u[name] for u in updates])) for name in first}
    # Before the first update the policy is still the sampled one.
    metrics.setdefault("rollout/logp_gap_max", first["gap_max"])
    metrics.setdefault("rollout/logp_gap_mean", first["gap_mean"])
    metrics |= {
        "loss/grpo": mean["loss/grpo"],
        "policy/entropy": mean["entropy"],
        "policy/clip_fraction": mean["clip_fraction"],
        "policy/approx_kl": mean["approx_kl"],
        "policy/ratio_max_error": first["ratio_max_error"],
        "optim/grad_norm": mean["grad_norm"],
        "optim/skipped": float(sum(u["skipped"] for u in updates)),
        "optim/skipped_in_a_row": max(u["skipped_in_a_row"] for u in updates),
    }
    if "ref_kl" in first:
        metrics["policy/ref_kl"] = mean["ref_kl"]
    return state, metrics
