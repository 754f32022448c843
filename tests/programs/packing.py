"""Counts the tokens that an update of Qwen3-4B computes, packed and a response a row.

python -m tests.programs.packing

Lengths are drawn from several distributions; rows are arranged as a run arranges them.
"""

import dataclasses

import numpy as np

from configs import rl_alternating
from pr1_jax.training import micro_batches
from pr1_jax.training.logps import PolicySettings
from pr1_jax.trajectory import Trajectory

_PROMPTS = (50, 250)  # tokens, uniform


def _trajectory(prompt: int, response: int) -> Trajectory:
    names = [field.name for field in dataclasses.fields(Trajectory)]
    fields = dict.fromkeys(names, np.zeros(response, np.int8))
    return Trajectory(**fields | {"prompt": np.zeros(prompt, np.int8)})


def main() -> None:
    """Prints a line a distribution."""
    c, rng = rl_alternating.get_config("qwen3_4b,v5e:4x4"), np.random.default_rng(0)
    most, size = c.rollout.max_response_tokens, c.rl.micro_batch_size
    groups = c.rl.prompts_per_step // c.rl.mini_batches
    count, packed = groups * c.rl.group_size, c.model.packed_tokens
    buckets = tuple(c.model.length_buckets)
    alone = PolicySettings((), lengths=buckets)
    in_rows = PolicySettings((), lengths=tuple(n for n in buckets if 2 * n > packed))
    responses = {
        "uniform up to the limit": rng.uniform(1, most, count),
        "log-normal, median 1,000": 1000 * rng.lognormal(0, 0.5, count),
        "log-normal, median 400": 400 * rng.lognormal(0, 0.5, count),
        "half at the limit": np.where(
            rng.random(count) < 0.5, most, 1000 * rng.lognormal(0, 0.5, count)
        ),
        "all at the limit": np.full(count, most),
        "all of 2,600": np.full(count, 2600),
    }
    for name, tokens in responses.items():
        prompts = np.repeat(rng.integers(*_PROMPTS, groups), c.rl.group_size)
        lengths = np.clip(tokens.astype(int), 1, most)
        ts = [_trajectory(*pair) for pair in zip(prompts, lengths, strict=True)]
        used = sum(map(len, ts))
        longest = c.rollout.max_prompt_tokens + most
        order = micro_batches.arrange(
            ts,
            alone,
            group_size=c.rl.group_size,
            micro_batch=size,
            max_tokens=longest,
        )
        rows = micro_batches.fill(ts, in_rows, micro_batch=size, max_tokens=packed)
        a, b = order.computed_tokens, rows.computed_tokens
        print(
            f"{name}: {used:,} tokens; a response a row {a:,} ({used / a:.0%} used), "
            f"packed {b:,} ({used / b:.0%}), ratio {b / a:.2f}; {count // size} "
            f"micro-batches, {-(-len(rows.rows) // size)} packed"
        )


if __name__ == "__main__":
    main()
