"""Digests of more bytes than one process should read: all of a job share the work."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pr1_jax.system import processes

PIECE = 64 * 2**20  # bytes that a thread holds at once
_THREADS = 8


def of_pieces(pieces: Mapping[str, Callable[[], bytes]]) -> str:
    """The digest of named pieces, whatever their order and the number of processes.

    It is the sum, modulo 2^256, of the SHA-256 of every name with its bytes. Each process
    reads its share of the pieces; all must call this alike.

    Raises:
      OSError: a process cannot read a piece; raised at all, with its words.
    """

    def number(name: str) -> int:
        digest = hashlib.sha256(name.encode() + b"\0")
        digest.update(pieces[name]())
        return int.from_bytes(digest.digest())

    total, fault = 0, ""
    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            total = sum(threads.map(number, processes.share(sorted(pieces))))
    except (OSError, ValueError, RuntimeError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault := processes.first_fault(fault):
        raise OSError(fault)
    total = sum(int(text) for text in processes.exchange(str(total)))
    return f"sha256 {total % 2**256:064x}"


def of_text(text: str) -> str:
    """The digest of a text, for comparison."""
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def of_files(paths: Sequence[str | os.PathLike[str]]) -> str:
    """The digest of what files hold, in this order, whatever their names.

    Raises:
      OSError: one cannot be read.
    """

    def reader(path: str | os.PathLike[str], start: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(PIECE)

        return read

    return of_pieces(
        {
            f"{i} {start}": reader(path, start)
            for i, path in enumerate(paths)
            for start in range(0, os.path.getsize(path), PIECE)
        }
    )
