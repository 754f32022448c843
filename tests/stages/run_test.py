"""What a run writes, and whom it tells."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rl_alternating
from pr1_jax.data import streams
from pr1_jax.stages import curriculum, experiment, sft
from pr1_jax.stages.run import Run
from pr1_jax.training.state import from_params
from pr1_jax.workdir import metrics
from pr1_jax.workdir.checkpoint import Position
from pr1_jax.workdir.folder import RefusedError


class Watcher:
    """Notes what it is told, and what was in the workdir by then."""

    def __init__(self, workdir):
        self.workdir, self.told = workdir, []

    def _note(self, what):
        lines = metrics.read_metrics(self.workdir / "metrics.jsonl")
        self.told.append((what, len(lines)))

    def after_step(self):
        self._note("step")

    def after_evaluation(self):
        assert (self.workdir / "summary.json").exists()
        self._note("evaluation")

    def close(self):
        self._note("close")


@pytest.fixture(scope="module")
def made():
    config = rl_alternating.get_config("smoke")
    config.model.update(num_layers=1, num_heads=1, width=16, mlp_width=16)
    return experiment.build(config.lock(), devices=jax.devices()[:1])


def test_watchers_are_told_after_the_files_are_written(made, tmp_path):
    """And they are closed though the run fails."""
    watcher = Watcher(tmp_path)
    with (
        pytest.raises(OSError, match="the disk"),
        Run(made, tmp_path, [watcher]) as run,
    ):
        run.record_evaluation("eval_0_base", {"eval/accuracy": 0.5})
        run.log("sft", 1, {"loss/sft": 1.0})
        raise OSError("the disk is full")
    told = [("step", 1), ("evaluation", 1), ("step", 2), ("close", 2)]
    assert watcher.told == told


def test_metrics_count_the_records_that_were_kept_and_dropped(made):
    source = [{"question": q, "answer": "1"} for q in (" 1 2\n", " 1" * 30, "")]
    stream = streams.problem_stream(
        source,
        made.tokenizer,
        template="plain",
        max_prompt_tokens=28,
        batch_size=1,
        seed=0,
        shuffle=False,
        epochs=1,
    )
    assert len(list(stream)) == 1
    assert Run.count_records(stream) == {
        "data/kept": 1.0,
        "data/dropped_prompt_too_long": 1.0,
        "data/dropped_prompt_empty": 1.0,
    }


def test_a_reference_that_is_gone_is_not_made_of_later_parameters(made, tmp_path):
    with Run(made, tmp_path) as run:
        run.position = Position(run.experiment.config.stages.index("rl"), 1)
        with pytest.raises(RefusedError, match="checkpoints_reference is not there"):
            run.reference(run.params)
        run.position = None
        run.reference(run.params)
        run.position = Position(run.experiment.config.stages.index("rl"), 1)
        later = jax.tree.map(lambda x: 2 * x, run.params)
        kept = run.reference(later)
        jax.tree.map(np.testing.assert_array_equal, kept, run.params)


@pytest.mark.parametrize("name", ["a[/b]", "a[bold]b", ":smile:"])
def test_names_of_folders_are_no_markup(made, tmp_path, capsys, name):
    with Run(made, tmp_path / name) as run:
        run.say(f"finished: {run.workdir}")
        with run.display(name, 2) as progress:
            progress.update(2, {})
    said = capsys.readouterr().out
    assert f"finished: {tmp_path / name}\n" in said
    assert f"{name}  step 2/2" in said


def skipping(made, params, *, total, in_a_row):
    """The state at the end of SFT, of whose updates some were skipped."""
    optimizer, _ = made.optimizer("sft")
    state = from_params(params, optimizer, made.mesh)
    counts = {"total_notfinite": total, "notfinite_count": in_a_row}
    counts = {name: jnp.int32(count) for name, count in counts.items()}
    opt_state = state.opt_state._replace(**counts)
    return state.replace(step=jnp.int32(made.config.sft.steps), opt_state=opt_state)


@pytest.mark.parametrize(
    "total, in_a_row, said",
    [
        (12, 12, "sft: all 12 updates were skipped, because no gradient was finite"),
        (11, 10, "sft step 12: 10 updates in a row .*alarms.max_skipped=10"),
        (11, 9, ""),
    ],
)
def test_a_stage_that_ends_in_skipped_updates_fails(
    made, tmp_path, total, in_a_row, said
):
    """Also where the same command is started again: it does not go on from there."""
    stream = sft.open_stream(made)
    optimizer, _ = made.optimizer("sft")
    fails = lambda: (
        pytest.raises(FloatingPointError, match=said)
        if said
        else contextlib.nullcontext()
    )
    with Run(made, tmp_path) as run:
        state = skipping(made, run.params, total=total, in_a_row=in_a_row)
        run.log("sft", 12, {"optim/skipped_in_a_row": float(in_a_row)})
        with fails():
            run.save(Position(0, made.config.sft.steps), state, stream.get_state(), {})
    with Run(made, tmp_path) as run, fails():
        run.begin(0, optimizer, stream)
        assert run.params is not None


def test_the_last_line_counts_skipped_updates(made, tmp_path, capsys):
    with Run(made, tmp_path) as run:
        for step, skipped in enumerate((0.0, 1.0, 2.0), start=1):
            run.log("rl", step, {"optim/skipped": skipped})
        curriculum._report(run)
        assert capsys.readouterr().out.startswith(
            f"finished: {tmp_path}; 3 updates of rl were skipped, because their"
        )
        run.skipped = dict
        curriculum._report(run)
        assert capsys.readouterr().out == f"finished: {tmp_path}\n"
