"""What a run writes, and whom it tells."""

import jax
import pytest

from configs import rl_alternating
from pr1_jax.data import streams
from pr1_jax.stages import experiment
from pr1_jax.stages.run import Run
from pr1_jax.workdir import metrics


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
    source = [{"question": q, "answer": "1"} for q in ("1 2\n", "1 " * 30, "")]
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


@pytest.mark.parametrize("name", ["a[/b]", "a[bold]b", ":smile:"])
def test_names_of_folders_are_no_markup(made, tmp_path, capsys, name):
    with Run(made, tmp_path / name) as run:
        run.say(f"finished: {run.workdir}")
        with run.display(name, 2) as progress:
            progress.update(2, {})
    said = capsys.readouterr().out
    assert f"finished: {tmp_path / name}\n" in said
    assert f"{name}  step 2/2" in said
