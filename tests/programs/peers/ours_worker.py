"""Times pr1_jax on all CPU devices there are: sampling, an update, a GRPO step.

In an environment of requirements.txt; called as `worker.py` says. The sampler and the
update are those of the RL stage, without blocks; the first unit includes all that
compiles: as there, a thread begins with the update.
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pr1_jax import losses, trajectory
from pr1_jax.huggingface import weights
from pr1_jax.huggingface.config import read_config
from pr1_jax.model.backend import choose
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import param_shardings
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.system.mesh import batch_sharding, make_mesh
from pr1_jax.training import micro_batches
from pr1_jax.training.logps import PolicySettings, trained_logps
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import TrainState, from_params, shardings_of
from pr1_jax.training.update import GrpoSettings, grpo_update
from tests.programs.peers import worker
from tests.programs.peers.worker import GROUP_SIZE, Run

TAGS = 6

# update(state, batch) -> (state, metrics)
Update = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def load(args: argparse.Namespace) -> tuple[ModelConfig, Any, Mesh]:
    mesh, config = make_mesh(), read_config(args.weights)
    shardings = param_shardings(config, mesh)
    return config, weights.load_params(args.weights, config, shardings=shardings), mesh


def vocabulary(size: int) -> Vocab:
    """The last ids are the tags, and banned. The end is an id past the vocabulary.

    It is never drawn, so no response ends early.
    """
    return Vocab(special_ids=(*range(size - TAGS, size), size), newline_id=0)


def make_sampler(
    config: ModelConfig, mesh: Mesh, args: argparse.Namespace, **kwargs
) -> Sampler:
    """Temperature 1 without limits; log-probs are always recorded."""
    settings = Settings(
        max_prompt_tokens=args.prompt_tokens,
        max_response_tokens=args.new_tokens,
        max_blocks=0,
    )
    vocab = vocabulary(config.vocab_size)
    shards = jax.device_count()
    batching = Batching(rows=args.prompts, shards=shards, **kwargs)
    return Sampler(choose(config, mesh=mesh), vocab, settings, batching)


def sampling(
    config: ModelConfig, params: Any, mesh: Mesh, args: argparse.Namespace
) -> Run:
    prompts = worker.prompts(args.prompts, args)
    sampler, figures = make_sampler(config, mesh, args), []

    def draw(unit: int) -> list[np.ndarray]:
        responses, found = sampler.sample(params, prompts, 1, jax.random.key(unit))
        figures.append(found)
        return [response.tokens for response in responses]

    run = worker.sample(draw, config.vocab_size, args)
    run.checks.update(of_sampler(figures[-1]))
    return dataclasses.replace(run, params=params)


def of_sampler(figures: Any) -> dict[str, Any]:
    useful = {"useful_row_steps": figures.useful_row_steps}
    return dataclasses.asdict(figures) | useful


def make_policy(config: ModelConfig, args: argparse.Namespace) -> PolicySettings:
    return PolicySettings(
        vocabulary(config.vocab_size).special_ids,
        max_trained=args.new_tokens,
        group_rows=math.gcd(GROUP_SIZE, args.micro_batch // jax.device_count()),
        shared_lengths=(args.prompt_tokens,) if args.work == "step" else (),
    )


def begin(
    config: ModelConfig, params: Any, mesh: Mesh, args: argparse.Namespace
) -> tuple[TrainState, Update]:
    """A fresh state, and the jitted update that takes it over, as in the RL stage."""
    settings = OptimizerSettings(  # as the peers'
        lr=1e-6, steps=args.units, b2=0.999, weight_decay=0.0, clip_norm=1.0
    )
    optimizer = make_optimizer(settings)
    state = from_params(params, optimizer, mesh)
    one_update = functools.partial(
        grpo_update,
        backend=choose(config, mesh=mesh, training=True),
        optimizer=optimizer,
        policy=make_policy(config, args),
        grpo=GrpoSettings(),
    )
    places = (shardings_of(state), None)
    return state, jax.jit(one_update, out_shardings=places, donate_argnums=0)


def given(prompt: np.ndarray, response: np.ndarray) -> trajectory.Trajectory:
    """A response that nobody sampled: its log-probs are 0 and nothing was banned."""
    nothing = np.zeros(len(response), np.int32)
    return trajectory.Trajectory(
        prompt=prompt,
        tokens=response,
        positions=np.arange(len(prompt), len(prompt) + len(response)),
        block=nothing,
        path=nothing,
        forced=nothing.astype(bool),
        bans=nothing,
        logps=nothing.astype(np.float32),
        finished=False,
        sequential_steps=len(response),
    )


def packed(
    responses: Sequence[trajectory.Trajectory | None],
    advantages: np.ndarray,
    mesh: Mesh,
    args: argparse.Namespace,
    shared: np.ndarray | None = None,
) -> trajectory.Batch:
    """A batch with leading axes [micro-batches, B], on its devices."""
    batch = trajectory.pack(
        responses,
        args.prompt_tokens + args.new_tokens,
        variant="structured",
        advantages=advantages,
        shared=shared,
    )
    split = lambda x: x.reshape(-1, args.micro_batch, *x.shape[1:])
    place = batch_sharding(mesh, axis=1)
    return jax.device_put(jax.tree.map(split, batch), place)


def update(
    config: ModelConfig, params: Any, mesh: Mesh, args: argparse.Namespace
) -> Run:
    """`train_state.grpo_update` on a given batch."""
    ids, advantages = worker.batch(args)
    responses = [given(*np.split(row, [args.prompt_tokens])) for row in ids]
    batch = packed(responses, advantages, mesh, args)
    state, apply = begin(config, params, mesh, args)
    start = time.perf_counter()
    logps = functools.partial(
        trained_logps,
        choose(config, mesh=mesh, training=True),
        policy=make_policy(config, args),
    )
    old_logps = jnp.where(batch.loss_mask, jax.jit(logps)(params, batch), 0.0)
    batch = jax.block_until_ready(batch.replace(old_logps=old_logps))
    setup_sec = time.perf_counter() - start
    ends, found = [], []
    for _ in range(args.units):
        state, metrics = jax.block_until_ready(apply(state, batch))
        ends.append(time.perf_counter())
        found.append(metrics)
    mean = old_logps.sum() / batch.loss_mask.sum()
    checks = {"old_logps_mean": float(mean), **of_updates(found, state, args)}
    return Run(ends, checks, setup_sec, state.params)


def of_updates(
    found: Sequence[dict[str, jax.Array]],
    state: TrainState,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """gap_max: between old and trained log-probs in the first update."""
    return {
        "loss": [float(metrics["loss/grpo"]) for metrics in found],
        "grad_norm": [float(metrics["grad_norm"]) for metrics in found],
        "gap_max": float(found[0]["gap_max"]),
        "skipped": float(sum(metrics["skipped"] for metrics in found)),
        "updates": int(state.step),
        "micro_batch": args.micro_batch,
    }


def step(config: ModelConfig, params: Any, mesh: Mesh, args: argparse.Namespace) -> Run:
    """Responses, rewards, advantages and one update, with the sampler's log-probs."""
    groups = args.prompts // GROUP_SIZE
    prompts = np.split(worker.prompts(args.units * groups, args), args.units)
    sampler = make_sampler(config, mesh, args, group_size=GROUP_SIZE)
    state, jitted = begin(config, params, mesh, args)
    nothing = packed([None] * args.prompts, np.zeros(args.prompts), mesh, args)
    threads = ThreadPoolExecutor(1)
    update = threads.submit(jitted.lower(state, nothing).compile)
    ends, found, lengths, rewards = [], [], [], []
    for number, asked in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(0), number)
        responses, figures = sampler.sample(state.params, asked, GROUP_SIZE, key)
        rewards.append([worker.share_of_odd(response.tokens) for response in responses])
        advantages = losses.advantages(np.reshape(rewards[-1], (groups, -1)))
        order = micro_batches.arrange(
            responses,
            make_policy(config, args),
            group_size=GROUP_SIZE,
            micro_batch=args.micro_batch,
            max_tokens=args.prompt_tokens + args.new_tokens,
        )
        ordered = [responses[row] for row in order.rows]
        advantages = np.ravel(advantages)[order.rows]
        batch = packed(ordered, advantages, mesh, args, order.shared)
        state, metrics = jax.block_until_ready(update.result()(state, batch))
        ends.append(time.perf_counter())
        found.append(metrics)
        lengths.append([len(response.tokens) for response in responses])
    checks = {
        **of_updates(found, state, args),
        "response_tokens": np.sum(lengths, axis=1).tolist(),
        "min_length": np.min(lengths, axis=1).tolist(),
        "reward_min": np.min(rewards, axis=1).tolist(),
        "reward_max": np.max(rewards, axis=1).tolist(),
        **of_sampler(figures),
    }
    return Run(ends, checks, params=state.params)


def finish(
    run: Run, config: ModelConfig, params: Any, mesh: Mesh, args: argparse.Namespace
) -> dict[str, Any]:
    before = jax.tree.leaves(load(args)[1])
    after = jax.tree.leaves(run.params)
    return {"max_parameter_change": worker.largest_change(before, after)}


if __name__ == "__main__":
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    flags, works = worker.parser(__doc__), (sampling, update, step)
    worker.main("ours", packages, flags, load, works, finish)
