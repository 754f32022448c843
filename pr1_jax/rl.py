"""The RL stage: GRPO on sampled responses (spec sections 3 to 6).

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

from pr1_jax import (
    data,
    losses,
    micro_batches,
    processes,
    rewards,
    rollout,
    sharding,
    sources,
    stopping,
    train_state,
    trajectory,
)
from pr1_jax.checkpoint import Place
from pr1_jax.experiment import Experiment
from pr1_jax.run import Run
from pr1_jax.trajectory import Batch, Trajectory, pack


def open_stream(experiment: Experiment) -> data.Stream[data.Problem]:
    """The stage's problems."""
    c = experiment.config
    source = sources.open_source(
        c.data.rl, "train", seed=c.data.seed + 1, columns=c.data.columns
    )
    return data.problem_stream(
        source,
        experiment.tokenizer,
        template=c.data.template,
        max_prompt_tokens=c.rollout.max_prompt_tokens,
        batch_size=c.rl.prompts_per_step // jax.process_count(),
        seed=c.data.seed + 1,
        shuffle=not c.data.rl.startswith("embedded:"),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _recomputes(c: Any) -> bool:
    """Whether the sampler's log-probs will not do as old log-probs."""
    return c.variant == "causal" or c.rl.train_on_forced or bool(c.rollout.shortcut)


def _abstract_batch(experiment: Experiment) -> Batch:
    """A mini-batch, as jax.ShapeDtypeStruct."""
    c = experiment.config
    rows = c.rl.prompts_per_step * c.rl.group_size // c.rl.mini_batches
    batch = experiment.abstract_batch(rows, c.rl.micro_batch_size)
    if _recomputes(c) and c.rl.importance_cap > 0:
        batch = batch.replace(importance=batch.old_logps)
    return batch


def lower_update(experiment: Experiment) -> jax.stages.Lowered:
    """One update on a mini-batch, for the experiment's mesh."""
    c = experiment.config
    optimizer, _ = experiment.optimizer("rl")
    update = functools.partial(
        train_state.grpo_update,
        config=experiment.training_model,
        optimizer=optimizer,
        policy=experiment.policy(sampling=True),
        grpo=train_state.GrpoSettings(
            clip_low=c.rl.clip_low,
            clip_high=c.rl.clip_high,
            kl_coef=c.rl.kl_coef,
            aggregation=c.rl.aggregation,
            constant=c.rollout.max_response_tokens,
        ),
    )
    batch = _abstract_batch(experiment)
    ref_logps = batch.old_logps if c.rl.kl_coef else None
    return experiment.lower_update(update, optimizer, batch, ref_logps)


class _Updater:
    """The compiled pieces of a step; the largest is compiled by a thread of `threads`."""

    def __init__(
        self,
        experiment: Experiment,
        run: Run,
        params: Any,
        threads: ThreadPoolExecutor,
    ):
        c = experiment.config
        self._experiment, self.recomputes = experiment, _recomputes(c)
        self.shortcut = c.rollout.shortcut
        self._micro_batch = c.rl.micro_batch_size // jax.process_count()
        self._reference = run.reference(params) if c.rl.kl_coef else None
        self._update = threads.submit(lower_update(experiment).compile)
        if self.recomputes or self._reference is not None:
            policy = experiment.policy(sampling=True)
            logps = functools.partial(
                train_state.trained_logps, experiment.training_model, policy=policy
            )
            place = sharding.batch_sharding(experiment.mesh, axis=1)
            bare = _abstract_batch(experiment).replace(importance=None)
            with sharding.training(experiment.mesh):
                self._logps = (
                    jax.jit(logps, out_shardings=place).lower(params, bare).compile()
                )

    @property
    def update(self) -> jax.stages.Compiled:
        """update(state, batch, ref_logps) -> (state, metrics), once it is compiled."""
        return self._update.result()

    def _pack(self, trajectories, advantages, shared) -> Batch:
        c = self._experiment.config
        batch = pack(
            trajectories,
            self._experiment.settings.max_tokens,
            variant=c.variant,
            train_on_forced=c.rl.train_on_forced,
            advantages=advantages,
            shared=shared,
        )
        split = lambda x: x.reshape(-1, self._micro_batch, *x.shape[1:])
        return jax.tree.map(split, batch)

    def _put(self, batch: Batch) -> Batch:
        return sharding.put_batch(batch, self._experiment.mesh)

    def mini_batches(
        self,
        params: Any,
        trajectories: Sequence[Trajectory],
        advantages: np.ndarray,
    ) -> tuple[list[tuple[Batch, Any]], dict[str, float]]:
        """Packed mini-batches with their reference log-probs, or None.

        Groups are taken as they come: problems are in random order already. Old
        log-probs are those of `params`, recomputed where the sampler's will not do; then
        the gap between the two is measured over all responses.
        """
        experiment, out, mismatches = self._experiment, [], []
        tokens = 0
        rows = np.arange(len(trajectories))
        for chosen in np.split(rows, experiment.config.rl.mini_batches):
            order = micro_batches.arrange(
                [trajectories[i] for i in chosen],
                experiment.policy(sampling=True),
                group_size=experiment.config.rl.group_size,
                micro_batch=self._micro_batch,
                max_tokens=experiment.settings.max_tokens,
            )
            tokens += order.computed_tokens
            chosen = chosen[order.rows]
            picked = [trajectories[i] for i in chosen]
            batch, ref = self._pack(picked, advantages[chosen], order.shared), None
            if self.recomputes:
                batch, mismatch = self._recompute(params, batch, picked)
                mismatches.append(mismatch)
            batch = self._put(batch)
            if self._reference is not None:
                bare = batch.replace(importance=None)
                ref = self._logps(self._reference, bare)
            out.append((batch, ref))
        metrics = {"perf/update_tokens": float(tokens)}
        if self.recomputes:
            metrics |= _mismatch_metrics(mismatches)
        return out, metrics

    def _recompute(
        self, params: Any, batch: Batch, picked: Sequence[Trajectory]
    ) -> tuple[Batch, dict[str, np.ndarray]]:
        """The trainer's old log-probs, and how far from them the sampler's are."""
        old = sharding.local_batch(self._logps(params, self._put(batch)))
        mask, shape = batch.loss_mask, batch.old_logps.shape
        # Tokens in second and later paths, and forced ones.
        later = np.zeros((len(picked), shape[-1]), bool)
        forced = np.zeros_like(later)
        for row, t in enumerate(picked):
            end = len(t.prompt) + len(t.tokens)
            later[row, len(t.prompt) : end] = t.path > 1
            forced[row, len(t.prompt) : end] = t.forced
        drawn = mask & ~forced.reshape(shape)
        later = later.reshape(shape)
        gap = np.abs(old - batch.old_logps)
        mismatch = {"first": gap[drawn & ~later], "later": gap[drawn & later]}
        if cap := self._experiment.config.rl.importance_cap:
            found = losses.truncated_importance(old, batch.old_logps, cap=cap)
            batch = batch.replace(importance=np.where(drawn, found, 1.0))
            mismatch["importance"] = batch.importance[drawn]
        return batch.replace(old_logps=np.where(mask, old, 0.0)), mismatch


def _mismatch_metrics(found: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Sampler against trainer, outside and inside second and later paths.

    Of all processes.
    """
    joined = {name: np.concatenate([m[name] for m in found]) for name in found[0]}
    sums = {
        name: [len(x), float(x.sum()), float(x.max(initial=0)), float(x.min(initial=9))]
        for name, x in joined.items()
    }
    metrics = {}
    everyones = processes.gather([sums])
    for name in joined:
        count, total, top, least = zip(*(sums[name] for sums in everyones))
        mean = sum(total) / max(sum(count), 1)
        if name == "importance":
            metrics["policy/importance_mean"] = mean
            metrics["policy/importance_min"] = min(least)
            continue
        prefix = {"first": "logp_gap", "later": "logp_gap_later_paths"}[name]
        metrics[f"rollout/{prefix}_max"] = max(top)
        metrics[f"rollout/{prefix}_mean"] = mean
    return metrics


def _collect(
    experiment: Experiment, params: Any, stream, step: int, reward_name: str
) -> tuple[list[rollout.Scored], dict[str, float]]:
    """Samples a step's groups; with dynamic sampling, replaces those without signal.

    Each process does so with its own share of the problems.
    """
    c = experiment.config
    wanted = c.rl.prompts_per_step // jax.process_count() * c.rl.group_size
    kept: list[rollout.Scored] = []
    spare: list[rollout.Scored] = []
    times: dict[str, float] = {}
    tries = c.rl.dynamic_sampling_rounds if c.rl.dynamic_sampling else 1
    for attempt in range(tries):
        began = time.perf_counter()
        problems = next(stream)
        data_sec = time.perf_counter() - began
        scored, took = rollout.sample_and_score(
            experiment.sampler(c.rl.group_size),
            params,
            problems,
            c.rl.group_size,
            jax.random.fold_in(experiment.key("rl", step), attempt),
            experiment.tokenizer,
            timeout_sec=c.reward.timeout_sec,
        )
        for name, value in (took | {"perf/data_sec": data_sec}).items():
            times[name] = value + (times.get(name, 0.0) if "_sec" in name else 0.0)
        for i in range(0, len(scored), c.rl.group_size):
            group = scored[i : i + c.rl.group_size]
            has_signal = len({s.reward(reward_name) for s in group}) > 1
            (kept if has_signal or not c.rl.dynamic_sampling else spare).extend(group)
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
        updater = _Updater(experiment, run, state.params, threads)
        experiment.sampler(c.rl.group_size).warm_up(state.params)
    began, saved_sec = time.perf_counter(), 0.0
    writer = ThreadPoolExecutor(1)
    with run.display("rl", c.rl.steps) as progress, writer:
        for step in range(start + 1, c.rl.steps + 1):
            reward_name = _reward_name(c, step)
            position = stream.get_state()
            try:
                scored, metrics = _collect(
                    experiment, state.params, stream, step, reward_name
                )
            except stopping.Stopped:
                run.leave(Place(stage, step - 1), state, position)
            updating = time.perf_counter()
            values, advantages, found = rollout.group_advantages(
                scored,
                reward_name,
                c.rl.group_size,
                normalize_std=c.rl.normalize_std,
            )
            facts = rollout.everyones_facts(scored, c.rl.group_size)
            metrics |= rollout.describe(facts) | found
            path = run.workdir / "rollouts" / f"rl_{step:06d}.jsonl"
            traces = {"traces": c.report.traces, "tokenizer": experiment.tokenizer}
            written = writer.submit(
                rollout.write_responses, path, scored, values, **traces
            )
            keep = functools.partial(run.keep_batch, "rl")
            state, found = _update(updater, state, scored, advantages, keep)
            rate = learning_rate(np.int32((step - 1) * c.rl.mini_batches))
            metrics |= found | {"optim/lr": float(rate)}
            updated = time.perf_counter()
            written.result()
            now = time.perf_counter()
            metrics |= {
                "perf/update_sec": updated - updating,
                "perf/wait_sec": now - updated,
                "perf/checkpoint_sec": saved_sec,  # with logs, after the step before
            }
            tokens = sum(f.total_tokens for f in facts)
            metrics |= _pace(metrics, tokens, now - began)
            began = now
            run.log("rl", step, metrics, progress)
            run.save(Place(stage, step), state, stream.get_state(), metrics)
            saved_sec = time.perf_counter() - began


_PARTS = ("data", "prefill", "decode", "verify", "update", "wait", "checkpoint")


def _pace(metrics: Mapping[str, float], tokens: int, seconds: float):
    """How fast a step was, and the share of its time that its parts account for."""
    parts = sum(metrics[f"perf/{part}_sec"] for part in _PARTS)
    return {
        "perf/step_sec": seconds,
        "perf/accounted": parts / seconds,
        "perf/tokens_per_sec": tokens / seconds,
    }


def _reward_name(config: Any, step: int) -> str:
    return rewards.scheduled(
        config.reward.schedule,
        step,
        window=config.reward.window,
        tiered_steps=config.reward.tiered_steps,
        scaffold_steps=config.reward.scaffold_steps,
    )


def _update(
    updater: _Updater,
    state,
    scored: Sequence[rollout.Scored],
    advantages: np.ndarray,
    keep_batch: Callable[[Batch], None],
):
    """One update a mini-batch; whole groups stay together.

    Args:
      keep_batch: called with a batch whose gradient was not finite.
    """
    trajectories = [s.trajectory for s in scored]
    if updater.shortcut:  # sampled at plain causal positions, trained at its own
        trajectories = [trajectory.structured(t) for t in trajectories]
    batches, metrics = updater.mini_batches(state.params, trajectories, advantages)
    found: list[dict[str, float]] = []
    for batch, ref in batches:
        state, new = updater.update(state, batch, ref)
        found.append({name: float(x) for name, x in new.items()})
        if found[-1]["skipped"]:
            keep_batch(batch)
    mean: Callable[[str], float] = lambda name: float(np.mean([m[name] for m in found]))
    # Before the first update the policy is still the sampled one.
    metrics.setdefault("rollout/logp_gap_max", found[0]["gap_max"])
    metrics.setdefault("rollout/logp_gap_mean", found[0]["gap_mean"])
    metrics |= {
        "loss/grpo": mean("loss/grpo"),
        "policy/entropy": mean("entropy"),
        "policy/clip_fraction": mean("clip_fraction"),
        "policy/approx_kl": mean("approx_kl"),
        "policy/ratio_max_error": found[0]["ratio_max_error"],
        "optim/grad_norm": mean("grad_norm"),
        "optim/skipped": float(sum(m["skipped"] for m in found)),
    }
    if "ref_kl" in found[0]:
        metrics["policy/ref_kl"] = mean("ref_kl")
    return state, metrics
