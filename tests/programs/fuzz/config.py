"""The target of configs: files, variants and overrides, as `pr1_jax.main` takes them."""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from pr1_jax.stages import checks, experiment
from pr1_jax.system import cli
from tests.programs.fuzz.base import ROOT

_CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
VALUES = (
    *("0", "1", "2", "3", "-1", "7", "1e-3", "0.5", "1.5", "1e99"),
    *("nan", "inf", "-inf"),
    *("9" * 30, "1_000", "0x10", "True", "False", "None", "", "''", "a", "causal"),
    *("()", "(1,)", "(1,2)", "('rl',)", "('rl','rl')", "([],)", "[{}]", "{}", "(nan,)"),
    *("('sft', 1)", "embedded:easy", "embedded:none", "tfds:none", "no/such/file"),
    *("/etc", "../x", "a\nb", "\x00", "é", "1" * 5000, "(" * 200, "lambda: 0", "*"),
)


@functools.cache
def fields() -> tuple[str, ...]:
    """Names of fields, and some that are none."""
    config = _load([f"--config={ROOT}/configs/common.py"])
    return (*_leaves(config, ""), "nothing", "rl.nothing", "rl", "eval.benchmarks", "")


def _leaves(config: Any, prefix: str) -> Iterator[str]:
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _overrides(content: bytes) -> tuple[list[str], list[str]]:
    """Flags, and the names of the fields that they set."""
    numbers = iter(content)
    config = _CONFIGS[next(numbers, 0) % len(_CONFIGS)]
    variant = ("", ":smoke", ":qwen3_4b", ":none")[next(numbers, 0) % 4]
    arguments, named = [f"--config={ROOT}/configs/{config}.py{variant}"], [variant[1:]]
    for number in numbers:
        name = fields()[number % len(fields())]
        chosen = next(numbers, 0)
        value = VALUES[chosen % len(VALUES)]
        if chosen >= 250:
            value = bytes(numbers).decode("utf-8", "replace")
        arguments.append(f"--config.{name}={value}")
        named.append(name)
        if len(named) > 6:
            break
    return arguments, named


def check_config(content: bytes) -> None:
    """A config with overrides is an experiment, or one line that names a field."""
    arguments, named = _overrides(content)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = _load(arguments)
    except SystemExit as error:
        assert error.code == 2, error
        _names_a_field(said.getvalue().strip(), named)
        return
    try:
        if config.model.path or config.checkpoint.init:
            checks.check(config)
        else:
            experiment.build(config)
    except (ValueError, FileNotFoundError) as error:
        _names_a_field(" ".join(str(error).split()), named)


def _load(arguments: Sequence[str]):
    """The config, by `cli.parse_config` with flags of its own."""
    before, values = cli.flags.FLAGS, flags.FlagValues()
    argv = ["main", *arguments]
    config = config_flags.DEFINE_config_file(
        "config", None, lock_config=True, flag_values=values, sys_argv=argv
    )
    cli.flags.FLAGS = values
    try:
        cli.parse_config(argv, config)
        return config.value
    finally:
        cli.flags.FLAGS = before


def _names_a_field(text: str, named: Sequence[str]) -> None:
    assert text and "\n" not in text, f"not one line: {text!r}"
    known = [*fields(), *named, "mesh", "eval.benchmarks"]
    assert any(name and name in text for name in known), f"{text!r} names no field"


def config_seeds() -> list[bytes]:
    """One override each, and one of a missing variant."""
    return [bytes([0, 1, i, i]) for i in range(0, 120, 7)] + [bytes([9, 1])]
