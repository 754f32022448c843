"""A run that is told to stop, by SIGTERM, saves and ends with exit code 0.

Machines that can be taken away say so seconds before. The first signal asks; further
ones are ignored, so that saving is not cut off. Ctrl-C ends a run as ever.
"""

import signal
import threading

import jax

from pr1_jax.system import processes

_asked = threading.Event()


class Stopped(Exception):
    """Ends a run that was told to stop."""


def listen() -> None:
    """Makes SIGTERM ask the run to stop, in place of killing it."""
    signal.signal(signal.SIGTERM, lambda *_: _asked.set())


def is_asked() -> bool:
    """Whether some process of the job was told to stop; all must call this alike."""
    return processes.anywhere(_asked.is_set())


def give_up() -> None:
    """Raises Stopped where a process that is alone was told to stop.

    One of several cannot leave the others in the middle of a step.
    """
    if _asked.is_set() and jax.process_count() == 1:
        raise Stopped
