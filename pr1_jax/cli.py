"""What the commands of this package share: a mistake is one line and exit code 2."""

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
