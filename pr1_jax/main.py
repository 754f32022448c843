"""Command line: `python -m pr1_jax.main --config=configs/rl_alternating.py`."""

import sys

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
    from pr1_jax import curriculum  # after the flags: JAX is slow to import

    config = _CONFIG.value
    workdir = _WORKDIR.value or f"runs/{config.name}"
    if curriculum.is_finished(workdir):
        print(f"already finished: {workdir} (see summary.json there)")
        return
    try:
        experiment, held_out = curriculum.prepare(config)
    except (ValueError, FileNotFoundError) as error:
        _stop(error)
    curriculum.run(experiment, held_out, workdir)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        positional = app.parse_flags_with_usage(argv)
        if _CONFIG.value is None:
            _stop(
                "--config is missing, for instance --config=configs/rl_alternating.py"
            )
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _stop(error)
    return positional


def _stop(error: object) -> None:
    text = error.args[0] if isinstance(error, KeyError) else error
    print("error:", " ".join(str(text).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # orbax says much at INFO
    app.run(main, flags_parser=_parse_flags)
