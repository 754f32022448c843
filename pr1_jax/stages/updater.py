"""The compiled pieces of an RL step."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pr1_jax import losses, trajectory
from pr1_jax.stages import checks, pace
from pr1_jax.stages.experiment import Experiment
from pr1_jax.stages.run import Run
from pr1_jax.system import mesh, processes
from pr1_jax.training import micro_batches
from pr1_jax.training.logps import trained_logps
from pr1_jax.training.state import TrainState
from pr1_jax.training.update import GrpoSettings, grpo_update
from pr1_jax.trajectory import Batch, Trajectory


def _abstract_batch(experiment: Experiment) -> Batch:
    """A mini-batch, as jax.ShapeDtypeStruct."""
    c = experiment.config
    rows = c.rl.prompts_per_step * c.rl.group_size // c.rl.mini_batches
    batch = experiment.abstract_batch(rows, c.rl.micro_batch_size)
    if checks.recomputes(c) and c.rl.importance_cap > 0:
        batch = batch.replace(importance=batch.old_logps)
    return batch


def lower_update(experiment: Experiment) -> jax.stages.Lowered:
    """One update on a mini-batch, for the experiment's mesh."""
    c = experiment.config
    optimizer, _ = experiment.optimizer("rl")
    update = functools.partial(
        grpo_update,
        backend=experiment.training_backend,
        optimizer=optimizer,
        policy=experiment.policy(sampling=True),
        grpo=GrpoSettings(
            objective=c.rl.objective,
            clip_low=c.rl.clip_low,
            clip_high=c.rl.clip_high,
            dual_clip=c.rl.dual_clip,
            kl_coef=0.0 if checks.kl_in_reward(c) else c.rl.kl_coef,
            kl_estimator=c.rl.kl_estimator,
            aggregation=c.rl.aggregation,
            constant=c.rollout.max_response_tokens,
        ),
    )
    batch = _abstract_batch(experiment)
    in_loss = c.rl.kl_coef and not checks.kl_in_reward(c)
    ref_logps = batch.old_logps if in_loss else None
    frozen = experiment.abstract_frozen()
    return experiment.lower_update(update, optimizer, batch, ref_logps, frozen)


class Updater:
    """The compiled pieces of a step; the largest is compiled by a thread of `threads`."""

    def __init__(
        self,
        experiment: Experiment,
        run: Run,
        trained: Any,
        threads: ThreadPoolExecutor,
    ):
        c = experiment.config
        self._run = run
        self._experiment, self.recomputes = experiment, checks.recomputes(c)
        self._shortcut = c.rollout.shortcut
        self._reference = run.reference(trained) if c.rl.kl_coef else None
        self._kl_in_reward = checks.kl_in_reward(c)
        self._compiled = threads.submit(lower_update(experiment).compile)
        if self.recomputes or self._reference is not None:
            params = run.policy(trained)
            policy = experiment.policy(sampling=True)
            logps = functools.partial(
                trained_logps, experiment.training_backend, policy=policy
            )
            sharding = mesh.batch_sharding(experiment.mesh, axis=1)
            bare = _abstract_batch(experiment).replace(importance=None)
            with mesh.training(experiment.mesh):
                self._logps = (
                    jax.jit(logps, out_shardings=sharding).lower(params, bare).compile()
                )

    def update(self, state: TrainState, batch: Batch, ref_logps: Any) -> tuple:
        """The state and metrics after an update, as `training.update` has them."""
        return self._compiled.result()(state, batch, ref_logps, self._run.frozen)

    def as_trained(self, sampled: Sequence[Trajectory]) -> Sequence[Trajectory]:
        """Responses at their own positions, also where they were sampled at causal ones."""
        return [*map(trajectory.structured, sampled)] if self._shortcut else sampled

    def kl_penalty(
        self, trained: Any, trajectories: Sequence[Trajectory]
    ) -> tuple[np.ndarray | None, dict[str, float]]:
        """What is taken off rewards for KL(policy ‖ reference), and metrics.

        It is `rl.kl_coef` times the k1 estimate, the sum of old log-prob − reference
        log-prob over the tokens that the sampler drew, [responses] float32. None where
        the divergence is a term of the loss, or nothing.
        """
        c = self._experiment.config.rl
        if not self._kl_in_reward:
            return None, {}
        number = {id(t): i for i, t in enumerate(trajectories)}
        kl, drawn_tokens = np.zeros(len(number), np.float32), 0
        for picked in np.split(np.arange(len(number)), c.mini_batches):
            arrange = self._in_rows if self._experiment.packs else self._one_a_row
            some = [trajectories[i] for i in picked]
            batch, rows, *_ = arrange(some, np.zeros(len(some), np.float32))
            reference = self._logps_of(self._reference, batch)
            old = self._logps_of(trained, batch) if self.recomputes else batch.old_logps
            drawn = batch.loss_mask & ~_of_tokens(batch, rows, lambda t: t.forced)
            estimate = losses.kl_estimate(old, reference, "k1")
            estimate = np.where(drawn, estimate, 0.0)
            drawn_tokens += int(drawn.sum())
            for index, row in enumerate(rows):
                of_row = estimate[divmod(index, estimate.shape[1])]
                for first, t in trajectory.places(row):
                    kl[number[id(t)]] = of_row[first : first + len(t)].sum()
        sums = np.sum(processes.gather([[float(kl.sum()), drawn_tokens]]), axis=0)
        metrics = {"policy/ref_kl": float(sums[0] / max(sums[1], 1))}
        return np.float32(c.kl_coef) * kl, metrics

    def _logps_of(self, trained: Any, batch: Batch) -> np.ndarray:
        """The trainer's log-probs of a batch, of this process's rows."""
        put = mesh.put_batch(batch, self._experiment.mesh)
        return mesh.local_batch(self._logps(self._run.policy(trained), put))

    def mini_batches(
        self,
        trained: Any,
        trajectories: Sequence[Trajectory],
        advantages: np.ndarray,
    ) -> tuple[list[tuple[Batch, Any]], dict[str, float]]:
        """Packed mini-batches with their reference log-probs, or None.

        Groups are taken as they come: problems are in random order already. Old
        log-probs are those of `trained`, recomputed where the sampler's will not do; then
        the gap between the two is measured over all responses.
        """
        experiment, out, mismatches = self._experiment, [], []
        c, tokens, work = experiment.config.rl, 0, pace.Work()
        rows = np.arange(len(trajectories))
        for chosen in np.split(rows, c.mini_batches):
            arrange = self._in_rows if experiment.packs else self._one_a_row
            picked = [trajectories[i] for i in chosen]
            batch, placed, count, part = arrange(picked, advantages[chosen])
            tokens, work = tokens + count, work + part
            if c.mask_truncated:  # they count in their group's baseline alone
                finished = _of_tokens(batch, placed, lambda t: t.finished)
                batch = batch.replace(loss_mask=batch.loss_mask & finished)
            if self.recomputes:
                batch, mismatch = self._recompute(trained, batch, placed)
                mismatches.append(mismatch)
            batch = mesh.put_batch(batch, experiment.mesh)
            ref = None
            if self._reference is not None and not self._kl_in_reward:
                bare = batch.replace(importance=None)
                ref = self._logps(self._run.policy(self._reference), bare)
            out.append((batch, ref))
        passes = 3 + self.recomputes + (self._reference is not None)
        passes += self.recomputes and self._kl_in_reward
        metrics = {
            "perf/update_tokens": float(tokens),
            "perf/update_tflop": work.update_tflop(
                experiment.model, passes=passes, whole=experiment.makes_whole_gradients
            ),
        }
        if self.recomputes:
            metrics |= _mismatch_metrics(mismatches)
        return out, metrics

    def _one_a_row(
        self, picked: Sequence[Trajectory], advantages: np.ndarray
    ) -> tuple[Batch, Sequence[Sequence[Trajectory]], int, pace.Work]:
        """A batch, the trajectories of each row, and what is computed of all processes'.

        That is a number of tokens, with all padding, and the work without any.
        """
        c = self._experiment.config.rl
        policy = self._experiment.policy(sampling=True)
        order = micro_batches.arrange(
            picked,
            policy,
            group_size=c.group_size,
            micro_batch=c.micro_batch_size // jax.process_count(),
            max_tokens=self._experiment.row_tokens,
        )
        ordered = [picked[i] for i in order.rows]
        batch = self._experiment.pack(
            ordered,
            c.micro_batch_size,
            train_on_forced=c.train_on_forced,
            advantages=advantages[order.rows],
            shared=order.shared,
        )
        work = self._work(ordered, shared=order.shared, group_rows=policy.group_rows)
        return batch, [[t] for t in ordered], order.computed_tokens, work

    def _in_rows(
        self, picked: Sequence[Trajectory], advantages: np.ndarray
    ) -> tuple[Batch, Sequence[Sequence[Trajectory]], int, pace.Work]:
        """As `_one_a_row`, several a row."""
        c, policy = self._experiment.config.rl, self._experiment.policy(sampling=True)
        filled = self._experiment.fill(picked, c.micro_batch_size, policy)
        rows = [[picked[i] for i in row] for row in filled.rows]
        batch = self._experiment.pack_rows(
            rows,
            c.micro_batch_size,
            train_on_forced=c.train_on_forced,
            advantages=[advantages[row] for row in filled.rows],
        )
        return batch, rows, filled.computed_tokens, self._work(picked)

    def _work(self, trajectories: Sequence[Trajectory], **kwargs: Any) -> pace.Work:
        """`pace.training` of all processes."""
        variant = self._experiment.config.variant
        return pace.everyones(pace.training(trajectories, variant=variant, **kwargs))

    def _recompute(
        self, trained: Any, batch: Batch, rows: Sequence[Sequence[Trajectory]]
    ) -> tuple[Batch, dict[str, np.ndarray]]:
        """The trainer's old log-probs, and how far from them the sampler's are.

        Args:
          rows: the trajectories of each row of the batch; of those behind them, none.
        """
        old = self._logps_of(trained, batch)
        mask, c = batch.loss_mask, self._experiment.config.rl
        later = _of_tokens(batch, rows, lambda t: t.path > 1)
        drawn = mask & ~_of_tokens(batch, rows, lambda t: t.forced)
        gap = np.abs(old - batch.old_logps)
        mismatch = {"first": gap[drawn & ~later], "later": gap[drawn & later]}
        if c.importance_cap:
            weights = losses.importance_weights(
                old,
                batch.old_logps,
                drawn,
                batch.start,
                mode=c.importance,
                cap=c.importance_cap,
                floor=c.importance_floor,
            )
            batch = batch.replace(importance=np.asarray(weights))
            mismatch["importance"] = batch.importance[drawn]
            if c.importance.endswith("mask"):
                mismatch["dropped"] = mismatch["importance"] == 0
        return batch.replace(old_logps=np.where(mask, old, 0.0)), mismatch


def _of_tokens(
    batch: Batch,
    rows: Sequence[Sequence[Trajectory]],
    of: Callable[[Trajectory], np.ndarray | bool],
) -> np.ndarray:
    """What is true of responses or their tokens, [micro-batches, B, T] bool.

    Args:
      rows: the trajectories of each row of the batch; of those behind them, none.
      of: bool, or bool [T] over a response's tokens. It is False elsewhere.
    """
    spread = np.zeros(batch.loss_mask.shape, bool)
    for index, row in enumerate(rows):
        for first, t in trajectory.places(row):
            response = slice(first + len(t.prompt), first + len(t))
            spread[(*divmod(index, spread.shape[1]), response)] = of(t)
    return spread


def _mismatch_metrics(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Sampler against trainer, outside and inside second and later paths.

    Args:
      parts: of mini-batches, as `Updater._recompute` gives them; of this process, while
        the metrics are of all processes.
    """
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
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
        if name == "dropped":
            metrics["policy/importance_dropped"] = mean
            continue
        prefix = {"first": "logp_gap", "later": "logp_gap_later_paths"}[name]
        metrics[f"rollout/{prefix}_max"] = max(top)
        metrics[f"rollout/{prefix}_mean"] = mean
    return metrics
