"""Command line: `python -m pr1_jax.main --config=configs/rl_alternating.py`."""

import re
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, `path.py` or `path.py:VARIANT`.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the default is runs/<name of the config>."
)


def main(argv: list[str]) -> None:
    """Runs the curriculum of the config; a wrong config is one line and exit code 2."""
    if len(argv) > 1:
        _stop(f"unexpected arguments: {argv[1:]}")
    from pr1_jax import curriculum, run  # after the flags: JAX is slow to import

    config = _CONFIG.value
    workdir = _WORKDIR.value or f"runs/{config.name}"
    try:
        experiment, held_out = curriculum.prepare(config)
        run.open_workdir(workdir, config)
    except (ValueError, OSError) as error:
        _stop(error)
    if curriculum.is_finished(workdir):
        print(f"already finished: {workdir} (see summary.json there)")
        return
    curriculum.run(experiment, held_out, workdir)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        positional = flags.FLAGS(argv)
        config = _CONFIG.value
        _ = config is None or config.name  # a file that is missing is noticed here
    except flags.Error as error:
        # A config file that fails comes with its whole traceback.
        text, _, trace = str(error).partition("Traceback")
        _stop(text + trace.strip().splitlines()[-1] if trace else text)
    except (AttributeError, KeyError) as error:
        _stop(_unknown_field(argv, error))
    except (TypeError, ValueError, OSError) as error:
        _stop(error)
    if config is None:
        _stop("--config is missing, for instance --config=configs/rl_alternating.py")
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


def _stop(error: object) -> NoReturn:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # orbax says much at INFO
    app.run(main, flags_parser=_parse_flags)
