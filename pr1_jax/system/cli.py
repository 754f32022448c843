"""What the commands of this package share: a mistake is one line and exit code 2."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging


def stop(error: object) -> NoReturn:
    """Ends the command with one line on standard error."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; stops at a wrong one, and at arguments that are none."""
    if nameless := [arg for arg in argv if arg.lstrip("-").startswith("config.=")]:
        stop(f"{nameless[0][:60]}: the name of a field of the config is missing")
    try:
        positional = flags.FLAGS(argv)
    except flags.Error as error:
        # A config file that fails comes with its whole traceback.
        text, _, trace = str(error).partition("Traceback")
        stop(text + trace.strip().splitlines()[-1] if trace else text)
    except IndexError as error:  # --config.stages[9]=rl
        stop(error)
    except SyntaxError as error:
        stop(f"{error.filename} is not a config file, which is Python: {error}")
    if positional[1:]:
        stop(f"unexpected arguments: {positional[1:]}")
    return positional


def parse_config(argv: list[str], config: flags.FlagHolder) -> list[str]:
    """Parses flags, of which `config` names a config file and overrides its fields."""
    try:
        positional = parse_flags(argv)
        found = config.value
        _ = found is None or found.name  # a file that is missing is noticed here
    except (AttributeError, KeyError) as error:
        stop(_unknown_field(argv, error))
    except (TypeError, ValueError, OSError) as error:
        stop(error)
    if found is None:
        stop(f"--{config.name} is missing, e.g. --config=configs/rl_alternating.py")
    return positional


def _unknown_field(argv: list[str], error: Exception) -> str:
    """Says which override names no field; ml_collections names but its last part."""
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    name, _, hint = str(error.args[0]).partition("\n")
    name = name.strip("'")
    given = [arg.partition("config.")[2] for arg in argv]
    named = [arg for arg in given if name in re.split(r"[.=\[]", arg)] or [name]
    return f"{' '.join(named)}: not a field of the config. {hint}"


def require(given: Sequence[flags.FlagHolder]) -> None:
    """Stops unless all of these flags have values."""
    for flag in given:
        if not flag.value:
            stop(f"--{flag.name} is missing")


def run(
    main: Callable[[list[str]], None],
    parse: Callable[[list[str]], list[str]] = parse_flags,
) -> None:
    """Runs a command's `main(argv)`."""
    logging.set_verbosity(logging.WARNING)  # orbax says much at INFO
    app.run(main, flags_parser=parse)
