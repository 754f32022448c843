"""What the commands of this package share: a mistake is one line and exit code 2.

`--help` prints the command's own docstring and flags, and exits with 0. A config may be
a file of ours (`configs/`), which is found from any folder.
"""

import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging


def run(
    main: Callable[[list[str]], None],
    *,
    config: flags.FlagHolder | None = None,
    hint: Callable[[str], str] = lambda field: "",
    most_arguments: int | None = 0,
) -> None:
    """Runs a command's `main(argv)`.

    Args:
      config: the flag that names a config file, if the command has one; it is needed.
      hint: what to say of a field that the config does not have; "" = nothing.
      most_arguments: how many arguments that are no flags it takes; None = any number.
    """

    def parse(argv: list[str]) -> list[str]:
        if {"-h", "-help", "--help", "--helpshort"} & {*argv[1:]}:
            _print_help()
            sys.exit(0)
        if config is not None:
            return parse_config(argv, config, hint)
        return parse_flags(argv, most_arguments)

    logging.set_verbosity(logging.WARNING)  # orbax says much at INFO
    app.run(main, flags_parser=parse)


class Mistake(SystemExit):
    """Ends a command with exit code 2; `line` has been printed."""

    def __init__(self, line: str):
        super().__init__(2)
        self.line = line


def stop(error: object) -> NoReturn:
    """Ends the command with one line on standard error."""
    line = re.sub(r"\s*\n\s*", " ", str(error).strip())
    print("error:", line, file=sys.stderr, flush=True)
    raise Mistake(line)


def require(given: Sequence[flags.FlagHolder]) -> None:
    """Stops unless all of these flags have values."""
    for flag in given:
        if not flag.value:
            stop(f"--{flag.name} is missing")


def parse_flags(argv: list[str], most_arguments: int | None = 0) -> list[str]:
    """Parses flags; returns the program's name and the arguments that are no flags.

    Stops at a wrong flag, and at more arguments than `most_arguments`.
    """
    if nameless := [arg for arg in argv if arg.lstrip("-").startswith("config.=")]:
        stop(f"{nameless[0][:60]}: the name of a field of the config is missing")
    try:
        program, *arguments = flags.FLAGS(argv)
    except flags.Error as error:
        # A config file that fails comes with its whole traceback.
        text, _, trace = str(error).partition("Traceback")
        stop(text + trace.strip().splitlines()[-1] if trace else text)
    except IndexError as error:  # --config.stages[9]=rl
        stop(error)
    except SyntaxError as error:
        stop(f"{error.filename} is not a config file, which is Python: {error}")
    if most_arguments is not None and len(arguments) > most_arguments:
        stop(f"unexpected arguments: {arguments[most_arguments:]}")
    return [program, *arguments]


def parse_config(
    argv: list[str],
    config: flags.FlagHolder,
    hint: Callable[[str], str] = lambda field: "",
) -> list[str]:
    """Parses flags, of which `config` names a config file and overrides its fields."""
    argv = _with_config_paths(argv, config.name)
    try:
        rest = parse_flags(argv)
        chosen = config.value
        _ = chosen is None or chosen.name  # a file that cannot be read is noticed here
    except (AttributeError, KeyError) as error:
        stop(_unknown_field(argv, error, hint))
    except (TypeError, ValueError, OSError) as error:
        stop(error)
    if chosen is None:
        stop(f"--{config.name} is missing, e.g. --config=configs/rl_alternating.py")
    return rest


def config_folder() -> pathlib.Path:
    """The folder of our configs: in an installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_path(given: str) -> str:
    """The path of a config, `path.py` or `path.py:VARIANT`, or of ours of that name.

    Raises:
      ValueError: there is no such file.
    """
    path, colon, variant = given.partition(":")
    if os.path.isfile(path):
        return given
    folder = config_folder()
    name = path.removeprefix("configs/").removesuffix(".py")
    ours = {file.stem: file for file in sorted(folder.glob("*.py"))}
    if name not in ours:
        raise ValueError(
            f"{path}: no such file; those of {folder} are {', '.join(ours)}"
        )
    return f"{ours[name]}{colon}{variant}"


def _with_config_paths(argv: Sequence[str], flag: str) -> list[str]:
    """Arguments in which the value of --`flag` is a path; stops where there is none."""
    argv = list(argv)
    for i, (name, *value) in enumerate(arg.split("=", 1) for arg in argv):
        if name not in (f"-{flag}", f"--{flag}") or argv[i:] == [name]:
            continue
        try:
            path = config_path(value[0] if value else argv[i + 1])
        except ValueError as error:
            stop(f"--{flag}={error}")
        if value:
            argv[i] = f"{name}={path}"
        else:
            argv[i + 1] = path
    return argv


def _unknown_field(
    argv: list[str], error: Exception, hint: Callable[[str], str]
) -> str:
    """Says which override names no field; ml_collections names but its last part."""
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    name, _, similar = str(error.args[0]).partition("\n")
    name = name.strip("'")
    given = [arg.partition("config.")[2] for arg in argv]
    named = [arg for arg in given if name in re.split(r"[.=\[]", arg)] or [name]
    said = hint(re.split(r"[=\[]", named[0])[0])
    return f"{' '.join(named)}: not a field of the config. {said or similar}"


def _print_help() -> None:
    """Prints what the command says of itself, then its own flags."""
    about = (sys.modules["__main__"].__doc__ or "").strip()
    own_flags = flags.FLAGS.main_module_help().strip().partition("\n")[2]
    print(f"{about}\n\nFlags:\n{own_flags}")
