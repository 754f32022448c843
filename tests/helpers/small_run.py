"""The workdir of a run of the smoke config, whose parameters were never trained."""

import contextlib
import pathlib
from collections.abc import Mapping

import jax
import ml_collections

from configs import rl_alternating
from pr1_jax.stages import experiment, sft
from pr1_jax.system import files
from pr1_jax.training.state import from_params
from pr1_jax.workdir.checkpoint import Checkpoints, Position


def write(
    workdir: pathlib.Path, scales: Mapping[Position, float]
) -> tuple[ml_collections.ConfigDict, experiment.Experiment]:
    """Writes config.json, and checkpoints of the initial parameters times a scale."""
    config = rl_alternating.get_config("smoke")
    files.write_json(workdir / "config.json", config.to_dict())
    made = experiment.build(config)
    optimizer, _ = made.optimizer("sft")
    stream = sft.open_stream(made).get_state()
    with contextlib.closing(Checkpoints(workdir, about=made.about)) as checkpoints:
        for position, scale in scales.items():
            scaled = jax.tree.map(
                lambda x, scale=scale: scale * x, made.initial_params()
            )
            checkpoints.save(
                position, from_params(scaled, optimizer, made.mesh), stream
            )
    return config, made
