"""What the processes of one job tell each other on the host.

A list of things to do is dealt out like cards: of N processes, number i mod N gets item
i. So the whole list, and all that follows from it, is the same for any N.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the store that orbax and JAX itself agree by
from jax.experimental import multihost_utils

T = TypeVar("T")

# What collectives, and the service that counts heartbeats, say of a lost process.
_LOST = re.compile(
    "gloo|nccl|connection (reset|closed)|heartbeat|unavailable|another task|barrier"
    "|has said nothing",
    re.IGNORECASE,
)
_HEARTBEAT_SEC = 30  # a process that is silent for so long is dead, and all stop
_PATIENCE_SEC = 1800.0  # for one that lives, and downloads or reads what is large
_rounds = itertools.count()


def initialize(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1
) -> None:
    """Joins this process to its job; before any use of devices.

    Args:
      coordinator: HOST:PORT of process 0; "" = JAX finds all three out, as it can on
        Cloud TPU, GKE and SLURM.
      num_processes: of the job. process_id: of this process, from 0.

    Raises:
      ValueError: only some of the three are given.
    """
    given = {
        "--coordinator": coordinator or None,
        "--num_processes": num_processes or None,
        "--process_id": process_id if process_id >= 0 else None,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)} missing: these three go together")
    jax.distributed.initialize(
        *given.values(), heartbeat_timeout_seconds=_HEARTBEAT_SEC
    )


def join_to_say(fault: str, *job: Any) -> None:
    """Joins a job only to say why this process cannot take part in it.

    The others hear it where they first exchange faults (`first_fault`). A process that
    has joined already has said what there was to say.

    Args:
      job: as of `initialize`; raises as that does, and RuntimeError if nobody comes.
    """
    if not jax.distributed.is_initialized():
        initialize(*job)
        first_fault(fault)


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that fall to this process."""
    return items[jax.process_index() :: jax.process_count()]


def numbers(count: int) -> np.ndarray:
    """Indices, in the whole list, of the first `count` items of this process."""
    return np.arange(count) * jax.process_count() + jax.process_index()


def gather(mine: Sequence[T], size: int = 1) -> list[T]:
    """The whole list at every process, from what each makes of its `share`.

    Args:
      mine: this process's part, which JSON can hold.
      size: how many elements in a row belong to one item of the list.
    """
    if jax.process_count() == 1:
        return list(mine)
    everyones = [json.loads(text) for text in _gather_bytes(json.dumps(mine).encode())]
    longest = max(map(len, everyones))
    starts = range(0, longest, size)
    return [x for i in starts for part in everyones for x in part[i : i + size]]


def own_path(path: pathlib.Path) -> pathlib.Path:
    """Returns the path, with this process's number in it where there are several processes."""
    if jax.process_count() == 1:
        return path
    number = f"-{jax.process_index():05}-of-{jax.process_count():05}"
    return path.with_name(path.stem + number + path.suffix)


@contextlib.contextmanager
def one_of_several() -> Iterator[None]:
    """Ends this process at once if the body fails, so that the others notice.

    If another process is gone, it says so in one line. Where heartbeats stop first, JAX
    itself ends the process and says why.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        chain: list[BaseException] = [error]
        while chain[-1].__context__ is not None:
            chain.append(chain[-1].__context__)
        lost = [text for e in chain if _LOST.search(text := str(e))]
        if lost:
            print(
                f"error: another process of the job has stopped, so process "
                f"{jax.process_index()} of {jax.process_count()} stops too; the same "
                f"command goes on from the newest checkpoint ({lost[-1]:.200})",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for the others for ever


def exchange(mine: str, patience_sec: float = _PATIENCE_SEC) -> list[str]:
    """What every process says, at every process; all must call this alike.

    No device takes part and nothing compiles, so that a process may say why it cannot
    go on while the others wait here, and not in a step that never ends.

    Raises:
      TimeoutError: a process has said nothing for so long; names it.
    """
    if jax.process_count() == 1:
        return [mine]
    client, key = distributed.global_state.client, f"pr1_jax/{next(_rounds)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(mine))
    until = time.monotonic() + patience_sec
    said = []
    for i in range(jax.process_count()):
        left_ms = max(1, int(1000 * (until - time.monotonic())))
        try:
            said.append(
                json.loads(client.blocking_key_value_get(f"{key}/{i}", left_ms))
            )
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(
                f"process {i} of {jax.process_count()} has said nothing for "
                f"{patience_sec:.0f} s"
            ) from error
    return said


def first_fault(mine: str) -> str:
    """The first process's fault, with its number, at every process; "" = none has one.

    Args:
      mine: what is wrong at this process; "" = nothing.
    """
    said = exchange(mine)
    named = (
        f"process {i} of {len(said)}: {text}" for i, text in enumerate(said) if text
    )
    return mine if len(said) == 1 else next(named, "")


def of_first(look: Callable[[], T]) -> T:
    """What `look` gives at process 0, which JSON can hold, at every process.

    Raises:
      ValueError, OSError: `look` raises it; has its words at every process.
    """
    found, wrong, failed = None, "", ""
    if jax.process_index() == 0:
        try:
            found = look()
        except ValueError as error:
            wrong = str(error)
        except OSError as error:
            failed = str(error)
    found, wrong, failed = json.loads(exchange(json.dumps([found, wrong, failed]))[0])
    if wrong:
        raise ValueError(wrong)
    if failed:
        raise OSError(failed)
    return found


def difference(mine: Mapping[str, Any]) -> str:
    """The first field that differs between processes, in words; "" if none does.

    Args:
      mine: the fields of this process, which JSON can hold.
    """
    first, *others = map(json.loads, exchange(json.dumps(dict(mine))))
    for i, other in enumerate(others, start=1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                return (
                    f"process {i} of {1 + len(others)}: {name}={other.get(name)!r}, "
                    f"but {first.get(name)!r} at process 0: give all of them the same"
                )
    return ""


def agree(value: bool) -> bool:
    """The value that process 0 has, at every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def everywhere(value: bool) -> bool:
    """Whether the value is true at all processes."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.int32(value)).all())


def anywhere(value: bool) -> bool:
    """Whether the value is true at some process."""
    return not everywhere(not value)


def _gather_bytes(mine: bytes) -> list[bytes]:
    """The bytes of every process, at every process."""
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    length = 1 << int(sizes.max()).bit_length()  # few lengths, since each is compiled
    padded = np.zeros(length, np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
