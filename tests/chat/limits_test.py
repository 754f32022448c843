"""A deadline and labels of paths in the chat: kept, changed, and said."""

import json
import shutil

import pytest
import rich.console

from pr1_jax import export
from pr1_jax.chat import command, view
from pr1_jax.chat.opening import load
from pr1_jax.chat.session import Chat, Opened
from pr1_jax.data.prompts import Template
from pr1_jax.huggingface import usage
from pr1_jax.sampler.settings import Settings
from pr1_jax.system import files
from tests.helpers import growing

LABELS = (" 1", " 2")


def with_limits(workdir, folder, steps, labels):
    """The run with another deadline and labels, and its export."""
    run = shutil.copytree(workdir, folder / "run")
    written = files.read_object(run / "config.json")
    written["rollout"] |= {"max_sequential_steps": steps, "path_labels": labels}
    files.write_json(run / "config.json", written)
    export.export(run, folder / "exported")
    return run, folder / "exported"


@pytest.fixture(scope="module")
def limited(workdir, tmp_path_factory):
    """The run with a deadline and labels, and its export."""
    return with_limits(workdir, tmp_path_factory.mktemp("limited"), 40, LABELS)


@pytest.fixture(scope="module")
def unlimited(workdir, tmp_path_factory):
    """The export of the run without either."""
    return with_limits(workdir, tmp_path_factory.mktemp("unlimited"), 0, ())[1]


def test_a_deadline_and_labels_are_kept(limited, unlimited, tmp_path):
    said = "structured, 2 paths with the labels 1, 2, up to 96 tokens and 40 sequential"
    for folder in limited:
        asked = load(folder)
        assert asked.settings.max_sequential_steps == 40
        assert asked.settings.path_labels == asked.labels == LABELS
        assert f"{said} steps: as {folder}" in asked.about
        # Instead of them, and none.
        asked = load(folder, labels=False, num_paths=4, max_sequential_steps=0)
        assert asked.settings.path_labels == () and asked.labels == LABELS
        assert "4 paths without their labels, up to 96 tokens: " in asked.about
        asked = load(folder, max_sequential_steps=18)
        assert "18 sequential steps (too few for a block)" in asked.about
        for settings, words in (
            ({"max_sequential_steps": 2}, r"--max_steps=2 leaves no room .* least ans"),
            ({"max_sequential_steps": -1}, r"--max_steps=-1 must not be negative"),
            (
                {"num_paths": 3},
                r"--num_paths=3: the model has labels for 2 paths; .*--no",
            ),
        ):
            with pytest.raises(ValueError, match=words) as caught:
                load(folder, **settings)
            assert "\n" not in str(caught.value)
    # A folder of an older version says nothing of either.
    file = shutil.copytree(unlimited, tmp_path / "old") / usage.FILE
    old = json.loads(file.read_text())
    del old["sampling"]["max_sequential_steps"], old["sampling"]["path_labels"]
    file.write_text(json.dumps(old))
    assert load(file.parent).settings == load(unlimited).settings
    assert load(file.parent).settings.max_sequential_steps == 0


def test_a_deadline_and_labels_change_in_between(limited, unlimited):
    asked = load(limited[1])
    said = {
        "/labels": "paths have no labels",
        "/paths 4": "paths is 4",
        "/labels ": "--num_paths=4: the model has labels for 2 paths",
        "/paths 2": "paths is 2",
        "/labels  ": "paths have their labels",
        "/paths 3": "--num_paths=3: the model has labels for 2 paths",
        "/steps 18": "steps is 18 (too few for a block)",
        "/steps 2": "--max_steps=2 leaves no room for an answer",
        "/steps": "needs one number",
        "/steps 30": "steps is 30",
    }
    for line, words in said.items():
        assert words in command.command(asked, line), line
    assert asked.settings == load(limited[0], max_sequential_steps=30).settings
    none = command.command(load(unlimited), "/labels")
    assert none == "the model was trained without labels of paths"


def test_a_response_says_what_cut_it_off(by_bytes):
    parts = growing.steps(by_bytes, "2+2?", growing.text_of(" 1 a", " 2 b"))
    *_, cut, whole = parts
    steps, tokens = cut.sequential_steps, len(cut.tokens)
    assert tokens > steps
    for deadline, limit, cut_off, words in (
        (steps, tokens, "deadline", f"its deadline of {steps} steps (/steps, --max_st"),
        (
            steps,
            600,
            "deadline",
            f"its deadline of {steps} steps (/steps, --max_steps)",
        ),
        (0, tokens, "tokens", "cut off at its limit (--max_tokens)"),
        (steps + 1, tokens, "tokens", "cut off at its limit (--max_tokens)"),
    ):
        settings = Settings(300, limit, deadline, path_labels=LABELS)
        asked = Chat(
            Opened(None, by_bytes, settings, Template("plain"), "made up", dict)
        )
        record = asked.record("2+2?", cut, 1.0)
        assert record["cut_off"] == cut_off and not record["finished"]
        assert record["format_ok"] and record["work_division"] == [1.0]
        line = view.figures(record, rich.console.Console())
        assert line.startswith(f"{tokens} tokens in {steps} steps · 1 block, 100% of")
        assert words in line
        record = asked.record("2+2?", whole, 1.0)
        assert record["cut_off"] is None
        assert "cut off" not in view.figures(record, rich.console.Console())
