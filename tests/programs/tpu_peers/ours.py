"""Lowers this package's decode steps and GRPO update on Qwen3-4B; see `worker.py`.

Settings are those that `configs/rl_alternating.py:qwen3_4b` has for the topology, but for
as many responses as the peer decodes.
"""

import dataclasses
import functools

from pr1_jax.plan import costs, hardware, programs, timing
from tests.programs.tpu_peers import worker
from tests.programs.tpu_peers.worker import Program


def program(part: str, topology: hardware.Topology, layers: int) -> Program:
    """The program of the config that has this in its name."""
    config = worker.settings(topology)
    rows = worker.ROWS * topology.num_devices // worker.TENSOR
    config.rollout.rows = rows
    made = programs.build(config, hardware.open_devices(topology))
    shape = dataclasses.replace(made.model, num_layers=layers)
    made = dataclasses.replace(made, model=shape)
    mean = worker.PROMPT, worker.RESPONSE
    if part == "update":
        mean = (
            worker.TOKENS - worker.TRAINED,
            worker.TRAINED,
        )  # of which none is padding
    lengths = costs.mean_lengths(made, *mean)
    work = next(x for x in timing.works(made, lengths) if part in x.name)
    config = made.config
    if part == "update":
        size = config.rl.micro_batch_size
        tokens = size * lengths.update_tokens
        setting = (
            f"{size} × {lengths.update_tokens:,}, remat of {config.model.remat_policy}"
        )
    else:
        paths = made.settings.num_paths if part == "blocks" else 1
        tokens = rows * paths
        shards = made.mesh.size // made.mesh.shape["tensor"]
        setting = f"{rows // shards} rows a shard, {config.rollout.max_response_tokens:,} slots"
        setting += f" and {config.rollout.max_prompt_tokens:,} of prompts once a group"
    return Program(work, tokens, made.mesh.shape, setting, own_bytes=work.needed_bytes)


if __name__ == "__main__":
    works = {
        "decode": functools.partial(program, "main streams"),
        "decode_blocks": functools.partial(program, "blocks"),
        "update": functools.partial(program, "update"),
    }
    worker.main("ours", ("pr1_jax", "jax", "libtpu", "flax", "optax"), works)
