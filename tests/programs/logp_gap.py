"""How far a sampler's log-probs are from the trainer's, by dtype, depth and width.

    python -m tests.programs.logp_gap                    models of random parameters
    python -m tests.programs.logp_gap --folder=FOLDER    a Hugging Face folder

Makes the table of docs/measurements.md that `workdir.alarms` takes its bounds from. The
C++ kernels are off: XLA computes both, as on accelerators.
"""

import dataclasses
import itertools

import jax
import numpy as np
from absl import app, flags

from configs import rl_alternating
from pr1_jax.model.config import ModelConfig
from pr1_jax.stages import experiment, rl
from pr1_jax.system import mesh
from pr1_jax.training.logps import trained_logps

_FOLDER = flags.DEFINE_string("folder", "", "Hugging Face folder.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Of activations.")
_LAYERS = flags.DEFINE_list("layers", ["1", "4"], "Depths.")
_WIDTHS = flags.DEFINE_list("widths", ["64", "256"], "Widths.")
_VARIANT = flags.DEFINE_enum("variant", "structured", ["structured", "causal"], "")
_PROMPTS = flags.DEFINE_integer("prompts", 16, "Of which each has 8 responses.")
_SPREAD = 4.0  # standard deviation of the logits of random parameters
_MICRO_BATCH = 8


def settings(dtype: str, layers: int, width: int):
    """The config of a step by a model of this shape."""
    config = rl_alternating.get_config("smollm2" if _FOLDER.value else None)
    config.variant, config.kernels, config.stages = _VARIANT.value, "xla", ("rl",)
    config.model.dtype, config.model.scan_layers = dtype, True
    config.model.length_buckets = config.rl.shared_prompt_tokens = ()
    config.data.rl = "embedded:hard"
    if _FOLDER.value:
        config.model.path, config.data.template = _FOLDER.value, "plain"
        config.rollout.update(max_prompt_tokens=64, max_response_tokens=96)
        config.rollout.rows = 16
    else:
        heads = width // 32
        config.model.update(num_layers=layers, width=width, mlp_width=4 * width)
        config.model.update(num_heads=heads, num_kv_heads=max(heads // 2, 1))
        config.model.head_dim = 32
    config.rl.update(prompts_per_step=_PROMPTS.value, group_size=8)
    config.rl.mini_batches = 1
    config.rl.micro_batch_size = _MICRO_BATCH
    return config.lock()


def gaps(config) -> tuple[ModelConfig, np.ndarray]:
    """The model, and |sampled − trained| log-prob of every token that was drawn."""
    made = experiment.build(config, devices=jax.devices()[:1])
    if not _FOLDER.value:  # one whose next token is not its last one
        untied = dataclasses.replace(made.model, tie_embeddings=False)
        made = dataclasses.replace(made, model=untied)
    params = made.initial_params()
    if not _FOLDER.value:
        params = params | {"head": params["head"] * _SPREAD}
    problems = next(rl.open_stream(made))
    found, _ = made.sampler(config.rl.group_size).sample(
        params,
        [problem.prompt for problem in problems],
        config.rl.group_size,
        jax.random.key(0),
    )
    batch = made.pack(found, _MICRO_BATCH)
    policy = made.policy(sampling=True)
    logps = jax.jit(
        lambda params, batch: trained_logps(
            made.training_backend, params, batch, policy
        )
    )
    old = mesh.local_batch(logps(params, mesh.put_batch(batch, made.mesh)))
    return made.model, np.abs(old - batch.old_logps)[batch.loss_mask]


def main(argv) -> None:
    """Prints a line of the table for each model."""
    del argv
    print("| dtype | layers | width | tokens | mean | 99.9 % | largest |")
    print("|---|---|---|---|---|---|---|")
    sizes = [(0, 0)]
    if not _FOLDER.value:
        sizes = itertools.product(map(int, _LAYERS.value), map(int, _WIDTHS.value))
    for (layers, width), dtype in itertools.product(sizes, _DTYPES.value):
        model, found = gaps(settings(dtype, layers, width))
        figures = found.mean(), np.quantile(found, 0.999), found.max()
        texts = [dtype, model.num_layers, model.width, f"{len(found):,}"]
        texts += [f"{x:.1e}" for x in figures]
        print("|", " | ".join(map(str, texts)), "|", flush=True)


if __name__ == "__main__":
    app.run(main)
