"""Sinks: what the packages are told, by stand-ins that write it down."""

import importlib.machinery
import importlib.util
import json
import math
import sys
import types

import pytest
from absl import logging

from configs import rl_alternating
from pr1_jax.stages import checks
from pr1_jax.workdir import metrics, sinks

STAGES = ["eval_0_base", "sft", "eval_1_sft", "rl", "eval_2_rl"]
CONFIG = {"name": "x", "rl": {"steps": 3}, "stages": ("sft", "rl")}


class Package(types.ModuleType):
    """A stand-in for wandb or trackio."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a file")
        self.started, self.logged, self.finished = [], [], 0
        self.fails_at = ""
        self.Settings = lambda **settings: settings

    def init(self, **arguments):
        self._maybe_fail("init")
        self.started.append(arguments)
        return self

    def log(self, values, step):
        self._maybe_fail("log")
        self.logged.append((step, values))

    def finish(self):
        self._maybe_fail("finish")
        self.finished += 1

    def _maybe_fail(self, where):
        if self.fails_at == where:
            raise ConnectionError("no network\nand more")


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in where a package would be, with nothing set for it."""
    for name in ("API_KEY", "MODE", "PROJECT", "NAME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)

    def install(name):
        monkeypatch.setitem(sys.modules, name, Package(name))
        return sys.modules[name]

    return install


@pytest.fixture(params=sinks.NAMES)
def package(request, install):
    return install(request.param)


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *a: found.append(text % a))
    return found


def writer(package, workdir):
    opened = sinks.open_all((package.__name__,), workdir, CONFIG)
    return metrics.MetricWriter(workdir, sinks=opened)


def test_figures_are_handed_over_with_line_and_stage(package, tmp_path):
    with writer(package, tmp_path) as out:
        out.write("sft", 1, {"loss/sft": 0.5, "a/nan": math.nan})
        out.write("rl", 1, {"a/x": 2})
    assert package.logged == [
        (0, {"loss/sft": 0.5, "stage/sft": 1}),
        (1, {"a/x": 2.0, "stage/rl": 1}),
    ]
    assert package.finished == 1
    (started,) = package.started
    assert started["config"] == {**CONFIG, "stages": ["sft", "rl"]}
    assert started["project"] == "pr1_jax"
    assert tmp_path.name in started["name"]
    assert started["resume"] == "allow"


def test_a_run_that_goes_on_is_one_run_and_no_line_comes_twice(package, tmp_path):
    with writer(package, tmp_path) as out:
        for step in (1, 2, 3):
            out.write("sft", step, {"a/x": step})
    for last in (3, 4):  # killed, and back to the checkpoint at step 1, twice
        with writer(package, tmp_path) as out:
            out.resume(STAGES, "sft", 1)
            for step in range(2, last + 1):
                out.write("sft", step, {"a/x": step})
    assert [step for step, _ in package.logged] == [0, 1, 2, 3]
    assert [values["a/x"] for _, values in package.logged] == [1, 2, 3, 4]
    first, *others = package.started
    assert [first] * 2 == others
    with writer(package, tmp_path / "another") as out:
        out.write("sft", 1, {"a/x": 1})
    assert package.logged[-1][0] == 0
    key = "id" if package.__name__ == "wandb" else "name"
    assert package.started[-1][key] != first[key]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_said_once_and_stops_nothing(package, where, tmp_path, warnings):
    package.fails_at = where
    with writer(package, tmp_path) as out:
        for step in (1, 2, 3):
            out.write("sft", step, {"a/x": step})
    (warning,) = warnings
    assert f"{package.__name__} failed" in warning
    assert "ConnectionError: no network)" in warning
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_one_that_fails_leaves_the_other_alone(tmp_path, install, warnings):
    broken, works = install("wandb"), install("trackio")
    broken.fails_at = "log"
    opened = sinks.open_all(("wandb", "trackio"), tmp_path, CONFIG)
    with metrics.MetricWriter(tmp_path, sinks=opened) as out:
        for step in (1, 2):
            out.write("sft", step, {"a/x": step})
    assert len(warnings) == 1
    assert len(works.logged) == 2
    state = json.loads((tmp_path / "sinks.json").read_text())
    assert (state["wandb"]["line"], state["trackio"]["line"]) == (0, 1)


def test_other_processes_open_nothing(package, tmp_path):
    opened = sinks.open_all((package.__name__,), tmp_path, CONFIG, enabled=False)
    assert opened == package.started == list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_MODE": "online"}, "offline"),  # nobody is asked for a key
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
    ],
)
def test_wandb_is_online_with_a_key_only(
    environment, mode, tmp_path, install, monkeypatch
):
    package = install("wandb")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = []
    monkeypatch.setattr(logging, "info", lambda text, *a: said.append(text % a))
    sinks.open_all(("wandb",), tmp_path, CONFIG)
    assert package.started[0]["mode"] == mode
    assert package.started[0]["dir"] == str(tmp_path)
    told = [str(tmp_path / "wandb") in text for text in said]
    assert told == [True] * (mode == "offline")


def check(monkeypatch, value, spec=lambda name: Package(name).__spec__):
    """Checks a config with these sinks, where packages are as `spec` says."""
    monkeypatch.setattr(importlib.util, "find_spec", spec)
    config = rl_alternating.get_config("smoke")
    config.update_from_flattened_dict({"metrics.sinks": value})
    checks.check(config)


@pytest.mark.parametrize("value", [("tensorboard",), ("wandb", 3)])
def test_unknown_sinks_are_refused(value, monkeypatch):
    for known in (sinks.NAMES, ()):
        check(monkeypatch, known)
    with pytest.raises(ValueError, match=r"metrics\.sinks="):
        check(monkeypatch, value)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", sinks.NAMES)
def test_a_package_that_is_not_there_is_named(name, folder, monkeypatch):
    spec = importlib.machinery.ModuleSpec(name, None) if folder else None
    expected = rf"metrics\.sinks=\('{name}',\): {name} is not installed: pip install"
    with pytest.raises(ValueError, match=expected):
        check(monkeypatch, (name,), lambda name: spec)
