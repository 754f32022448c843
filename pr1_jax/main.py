"""Trains by the curriculum of a config; the same command goes on where it stopped.

    python -m pr1_jax.main --config=configs/rl_alternating.py --workdir=runs/quickstart
    python -m pr1_jax.main --config=rl_alternating:smoke --config.rl.steps=8

A config is a file, or one of ours by its name, behind a colon perhaps a variant of it.
Every field can be set, as --config.rl.steps=8. The exit code is 0 where the run has
finished, or was stopped by SIGTERM and has saved; 2 for a mistake; 1 for a failure.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags

from pr1_jax.system import cli
from pr1_jax.workdir import old_fields

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config: path.py, path.py:VARIANT or NAME:VARIANT.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the default is runs/<name of the config>."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "This is one of several processes of Cloud TPU or SLURM."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where several are started by hand."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this one, from 0.")

# Errors that another start would meet again; others of the system may pass.
_WRONG = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)


def main(argv: list[str]) -> None:
    """Runs the curriculum of the config; a wrong config is one line and exit code 2."""
    del argv
    from pr1_jax.report import updates
    from pr1_jax.stages import curriculum
    from pr1_jax.system import processes, stopping

    by_hand = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if _DISTRIBUTED.value or by_hand != ("", 0, -1):
        try:
            processes.initialize(*by_hand)
        except ValueError as error:
            cli.stop(error)
    config = _CONFIG.value
    workdir = _WORKDIR.value or f"runs/{config.name}"
    with contextlib.ExitStack() as held, processes.one_of_several():
        with _explained(workdir):
            prepared = _prepare(config, workdir, held)
        if prepared is None:
            print(f"already finished: {workdir} (see summary.json there)")
            return
        stopping.listen()
        with _explained(workdir):
            report = updates.Updates(workdir)
            curriculum.run(*prepared, workdir, watchers=[report])


def _prepare(
    config: Any, workdir: str, held: contextlib.ExitStack
) -> tuple[Any, Any] | None:
    """What `curriculum.prepare` gives, its workdir held; None where the run has finished.

    What is wrong at one process alone ends all of them, with the same line.
    """
    from pr1_jax.defaults import flat
    from pr1_jax.stages import curriculum
    from pr1_jax.system import digests, files, processes
    from pr1_jax.workdir import identity
    from pr1_jax.workdir.folder import not_shared, only_run, open_workdir

    path, prepared, finished, wrong = None, None, False, ""
    try:
        prepared = curriculum.prepare(config)
        path = open_workdir(workdir, config)
        finished = curriculum.is_finished(workdir)
        if not finished:
            held.enter_context(only_run(workdir, config.checkpoint.folder))
    except _WRONG as error:
        has_no_words = isinstance(error, OSError) and error.errno is not None
        wrong = f"--workdir={workdir}: {error}" if has_no_words else str(error)
    if wrong := processes.first_fault(wrong):
        cli.stop(wrong)
    # What is in the folders may differ, too.
    mine = {
        "checkpoint.init, its checkpoint": prepared[0].origin.number,
        "--workdir, whether its run has finished": finished,
        **{name: digests.of_text(x) for name, x in prepared[0].own.texts.items()},
    }
    if wrong := processes.difference(flat(files.plain(config.to_dict())) | mine):
        cli.stop(wrong)
    if not finished:
        missing = not_shared(workdir, config.checkpoint.folder)
        if wrong := processes.first_fault(missing):
            cli.stop(wrong)
        return prepared
    identity.check(path, config, prepared[0].origin)
    return None


@contextlib.contextmanager
def _explained(workdir: str) -> Iterator[None]:
    """Ends a run that was stopped, or that cannot write, with one line."""
    from pr1_jax.system import files, stopping
    from pr1_jax.workdir.folder import RefusedError
    from pr1_jax.workers.own import OwnCodeError

    again = "the same command goes on from there"
    said = FloatingPointError, RefusedError, OwnCodeError, files.DamagedFileError
    try:
        yield
    except stopping.Stopped:
        print(f"stopped: all is saved in {workdir}; {again}", flush=True)
    except KeyboardInterrupt:
        text = f"interrupted: what was saved in {workdir} is there; {again}"
        print(text, file=sys.stderr, flush=True)
        os._exit(130)  # at exit, threads would be waited for
    except said as error:
        cli.stop(error)
    except Exception as error:
        reason = files.write_error(error)
        if reason is None:
            raise
        text = f"error: cannot write to {workdir}: {reason}. What is there is intact; "
        text += f"make room or take its cause away, and {again}"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)  # at exit, libraries would try to write once more, and say so


def _tell_others(line: str) -> None:
    """Ends the other processes of a job where the flags of this one alone are wrong.

    They would wait for it for minutes, fail, and be started again.
    """
    joining = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    joining.add_argument("--distributed", action="store_true")
    joining.add_argument("--coordinator", default="")
    joining.add_argument("--num_processes", type=int, default=0)
    joining.add_argument("--process_id", type=int, default=-1)
    with contextlib.suppress(argparse.ArgumentError, ValueError, RuntimeError, OSError):
        given, _ = joining.parse_known_args()
        by_hand = given.coordinator, given.num_processes, given.process_id
        if given.distributed or by_hand != ("", 0, -1):
            from pr1_jax.system import processes

            processes.join_to_say(line, *by_hand)


if __name__ == "__main__":
    try:
        cli.run(main, config=_CONFIG, hint=old_fields.hint)
    except cli.Mistake as mistake:
        _tell_others(mistake.line)
        raise
