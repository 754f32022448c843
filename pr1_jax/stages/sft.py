"""The SFT stage: cross-entropy on cold-start traces (docs/method.md, section 4)."""

import functools
import time
from collections.abc import Sequence

import jax
import numpy as np

from pr1_jax.data import sources, streams
from pr1_jax.stages import pace
from pr1_jax.stages.experiment import Experiment
from pr1_jax.stages.run import Run
from pr1_jax.system import mesh
from pr1_jax.training.update import sft_update
from pr1_jax.trajectory import Batch, Trajectory
from pr1_jax.workdir.checkpoint import Position


def open_stream(experiment: Experiment) -> streams.Stream[Trajectory]:
    """The stage's traces."""
    c = experiment.config
    return streams.trace_stream(
        experiment.source(c.data.sft, "train", seed=c.data.seed, traces=True),
        experiment.tokenizer,
        variant=c.variant,
        template=experiment.own.template,
        max_prompt_tokens=c.rollout.max_prompt_tokens,
        max_response_tokens=c.rollout.max_response_tokens,
        grammar=experiment.settings.grammar,
        batch_size=c.sft.batch_size // jax.process_count(),
        seed=c.data.seed,
        shuffle=not sources.is_made_by_code(c.data.sft),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def pack(experiment: Experiment, traces: Sequence[Trajectory]) -> Batch:
    """A batch of traces; labels of paths, which are forced, have no loss."""
    size = experiment.config.sft.micro_batch_size
    if experiment.packs:
        rows = experiment.fill(traces, size, experiment.policy(sampling=False)).rows
        return experiment.pack_rows([[traces[i] for i in row] for row in rows], size)
    # Short and long ones apart: a micro-batch is cut to its longest.
    return experiment.pack(sorted(traces, key=len), size)


def lower_update(experiment: Experiment) -> jax.stages.Lowered:
    """One update, for the experiment's mesh."""
    c = experiment.config.sft
    optimizer, _ = experiment.optimizer("sft")
    update = functools.partial(
        sft_update,
        backend=experiment.training_backend,
        optimizer=optimizer,
        policy=experiment.policy(sampling=False),
    )
    batch = experiment.abstract_batch(c.batch_size, c.micro_batch_size)
    frozen = experiment.abstract_frozen()
    return experiment.lower_update(update, optimizer, batch, frozen)


def run_stage(experiment: Experiment, run: Run, stage: int) -> None:
    """Trains on traces from where `run` stands to the end of the stage."""
    c = experiment.config
    optimizer, learning_rate = experiment.optimizer("sft")
    processes = jax.process_count()
    stream = open_stream(experiment)
    state, start = run.begin(stage, optimizer, stream)
    update = lower_update(experiment).compile()
    peak = pace.device_peak(c)
    with run.display("sft", c.sft.steps) as progress:
        for step in range(start + 1, c.sft.steps + 1):
            began = time.perf_counter()
            traces = next(stream)
            batch = mesh.put_batch(pack(experiment, traces), experiment.mesh)
            state, figures = update(state, batch, run.frozen)
            figures = {name: float(x) for name, x in figures.items()}
            if figures["skipped"]:
                run.keep_batch("sft", batch)
            seconds = time.perf_counter() - began
            tokens = sum(len(t.tokens) for t in traces) * processes  # about
            work = pace.everyones(pace.training(traces, variant=c.variant))
            metrics = {
                "loss/sft": figures["loss/sft"],
                "optim/grad_norm": figures["grad_norm"],
                "optim/skipped": figures["skipped"],
                "optim/skipped_in_a_row": figures["skipped_in_a_row"],
                "optim/lr": float(learning_rate(np.int32(step - 1))),
                "perf/update_tflop": work.update_tflop(
                    experiment.model, whole=experiment.makes_whole_gradients
                ),
            }
            metrics |= pace.pace(
                metrics, tokens=tokens, seconds=seconds, peak_tflops=peak
            )
            run.log("sft", step, metrics | run.count_records(stream), progress)
            run.save(Position(stage, step), state, stream.get_state(), metrics)
    if len(stream.counts) > 1:  # some were dropped
        run.say(f"sft data: {stream.summary}")
