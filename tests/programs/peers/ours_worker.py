"""Times pr1_jax on all CPU devices there are: sampling, an update, a GRPO step.

`python ours_worker.py --weights FOLDER --work sampling|update|step --repeats N
--out FILE.json`, in an environment of requirements.txt and with the repository on
PYTHONPATH. The sampler and the update are those of the RL stage, without blocks;
the first unit includes all that compiles: as there, a thread begins with the update.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
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

PROMPT_IDS = 4000  # prompts are drawn below this id
TAGS = 6

# update(state, batch) -> (state, metrics)
Update = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclass(frozen=True)
class Run:
    """ends: clock at the end of each unit of work; setup_sec: not to be counted."""

    ends: list[float]
    checks: dict
    params: Any  # as they are at the end
    setup_sec: float = 0.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", choices=("sampling", "update", "step"), required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32, help="sequences of a unit")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=4)
    # The default of the configs: small ones stay in a CPU's cache.
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences")
    args = parser.parse_args()
    for name in ("group_size", "micro_batch"):
        if args.prompts % getattr(args, name):
            parser.error(f"--{name} does not divide --prompts={args.prompts}")
    return args


def since_process_start() -> float:
    """Seconds since the kernel started this process: imports are in it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start


def load(folder: Path, mesh: Mesh) -> tuple[ModelConfig, Any]:
    config = read_config(folder)
    places = param_shardings(config, mesh)
    return config, weights.load_params(folder, config, shardings=places)


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
    shape = (args.prompts, args.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, PROMPT_IDS, size=shape)
    sampler = make_sampler(config, mesh, args)
    ends, outputs = [], []
    for repeat in range(2 + args.repeats):
        responses, figures = sampler.sample(params, prompts, 1, jax.random.key(repeat))
        ends.append(time.perf_counter())
        outputs = [*outputs[-1:], np.stack([r.tokens for r in responses])]
    checks = {
        "tokens_shape": outputs[-1].shape,
        "tokens_below_vocab": bool((outputs[-1] < config.vocab_size).all()),
        "same_as_repeat_before": float(np.mean(outputs[0] == outputs[1])),
        **dataclasses.asdict(figures),
        "useful_row_steps": figures.useful_row_steps,
    }
    return Run(ends, checks, params)


def make_policy(config: ModelConfig, args: argparse.Namespace) -> PolicySettings:
    return PolicySettings(
        vocabulary(config.vocab_size).special_ids,
        max_trained=args.new_tokens,
        group_rows=math.gcd(args.group_size, args.micro_batch // jax.device_count()),
        shared_lengths=(args.prompt_tokens,) if args.work == "step" else (),
    )


def begin(
    config: ModelConfig, params: Any, mesh: Mesh, args: argparse.Namespace
) -> tuple[TrainState, Update]:
    """A fresh state, and the jitted update that takes it over, as in the RL stage."""
    settings = OptimizerSettings(  # as the peers'
        lr=1e-6, steps=2 + args.repeats, b2=0.999, weight_decay=0.0, clip_norm=1.0
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
    rng = np.random.default_rng(0)
    shape = (args.prompts, args.prompt_tokens + args.new_tokens)
    ids = rng.integers(0, PROMPT_IDS, size=shape)
    responses = [given(*np.split(row, [args.prompt_tokens])) for row in ids]
    batch = packed(responses, rng.normal(size=args.prompts), mesh, args)
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
    for _ in range(2 + args.repeats):
        state, metrics = jax.block_until_ready(apply(state, batch))
        ends.append(time.perf_counter())
        found.append(metrics)
    mean = old_logps.sum() / batch.loss_mask.sum()
    checks = {"old_logps_mean": float(mean), **of_updates(found, state, args)}
    return Run(ends, checks, state.params, setup_sec)


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


def share_of_odd(response: trajectory.Trajectory) -> float:
    return float(np.mean(response.tokens % 2))


def step(config: ModelConfig, params: Any, mesh: Mesh, args: argparse.Namespace) -> Run:
    """Responses, rewards, advantages and one update, with the sampler's log-probs."""
    steps, groups = 2 + args.repeats, args.prompts // args.group_size
    shape = (steps, groups, args.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, PROMPT_IDS, size=shape)
    sampler = make_sampler(config, mesh, args, group_size=args.group_size)
    state, jitted = begin(config, params, mesh, args)
    nothing = packed([None] * args.prompts, np.zeros(args.prompts), mesh, args)
    threads = ThreadPoolExecutor(1)
    update = threads.submit(jitted.lower(state, nothing).compile)
    ends, found, lengths, rewards = [], [], [], []
    for number, asked in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(0), number)
        responses, figures = sampler.sample(state.params, asked, args.group_size, key)
        rewards.append([share_of_odd(response) for response in responses])
        advantages = losses.advantages(np.reshape(rewards[-1], (groups, -1)))
        order = micro_batches.arrange(
            responses,
            make_policy(config, args),
            group_size=args.group_size,
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
        **dataclasses.asdict(figures),
        "useful_row_steps": figures.useful_row_steps,
    }
    return Run(ends, checks, state.params)


def largest_difference(one: Any, other: Any) -> float:
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one, other)
    return max(jax.tree.leaves(differences))


def main() -> None:
    args = arguments()
    mesh = make_mesh()
    config, params = load(args.weights, mesh)
    load_sec, loaded = since_process_start(), time.perf_counter()
    works = {"sampling": sampling, "update": update, "step": step}
    run = works[args.work](config, params, mesh, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    change = largest_difference(run.params, load(args.weights, mesh)[1])
    trained = args.prompt_tokens if args.work == "update" else 0
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    result = {
        "peer": "ours",
        "version": {name: metadata.version(name) for name in packages},
        "work": args.work,
        "tokens": args.prompts * (args.new_tokens + trained),
        "load_sec": load_sec,
        "first_sec": run.ends[0] - loaded - run.setup_sec,
        "second_sec": run.ends[1] - run.ends[0],
        "seconds": np.diff(run.ends[1:]).tolist(),
        "peak_rss_bytes": peak,
        "checks": run.checks | {"max_parameter_change": change},
    }
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
