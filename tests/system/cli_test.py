"""Commands: help, configs from any folder, a Python without packages; what is shipped."""

import fnmatch
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from pr1_jax.system import cli

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ("main", "export", "chat", "report", "plan", "bench", "study")


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_docstring_and_the_commands_own_flags(command):
    done = run("-m", f"pr1_jax.{command}", "--help")
    assert done.returncode == 0 and not done.stderr
    file = ROOT / "pr1_jax" / command / "__main__.py"
    source = (file if file.exists() else file.parent.with_suffix(".py")).read_text()
    about, _, own_flags = done.stdout.partition("\n\nFlags:\n")
    assert f'"""{about}\n"""' in source or f'"""{about}"""' in source
    assert "  --" in own_flags and "verbosity" not in own_flags  # of absl


def test_a_python_without_our_packages_is_told_which_has_them():
    done = run("-S", "-m", "pr1_jax.chat", "--question=a b")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no absl, jax, ")
    if (ROOT / ".venv/bin/python").exists():
        again = ".venv/bin/python -S -m pr1_jax.chat '--question=a b'"
        assert again in done.stderr
    assert run("-S", "-c", "import pr1_jax").returncode == 0


@pytest.mark.parametrize("name", ["rl_easy", "rl_easy.py", "configs/rl_easy.py"])
def test_our_configs_are_found_from_any_folder(name, tmp_path, monkeypatch):
    ours = ROOT / "configs" / "rl_easy.py"
    monkeypatch.chdir(tmp_path)
    assert cli.config_path(name) == str(ours)
    assert cli.config_path(f"{name}:smoke") == f"{ours}:smoke"
    # A file of that name in the folder goes first.
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert cli.config_path(f"{name}:smoke") == f"{name}:smoke"


@pytest.mark.parametrize(
    "given", [["--config=mine.py:smoke"], ["--config", "mine.py:smoke"]]
)
def test_a_config_that_is_not_there_is_named_with_those_that_are(given, tmp_path):
    done = run("-m", "pr1_jax.main", *given, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --config=mine.py: no such file; those of ")
    assert "rl_accuracy, rl_alternating, rl_easy" in done.stderr


def test_an_installation_has_all_files():
    """`setup.py` finds folders by their `__init__.py`; other files are named."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
    ]
    files = [path for path in ROOT.glob("pr1_jax/**/*") if path.is_file()]
    names = [str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"]
    assert len(names) > 100
    for file in names:
        if file.endswith(".py"):
            assert (ROOT / file).with_name("__init__.py").exists(), file
        else:
            assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns), file


def test_a_mistake_is_one_line_and_keeps_its_blanks(capsys):
    with pytest.raises(cli.Mistake):
        cli.stop(ValueError("labels=('  ',\n   ' 2')"))
    assert capsys.readouterr().err == "error: labels=('  ', ' 2')\n"
