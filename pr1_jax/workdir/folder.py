"""The folder of a run: its config, and one run at a time."""

import contextlib
import fcntl
import os
import pathlib
import platform
import re
import shlex
import time
from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath

from pr1_jax.defaults import flat, get_config
from pr1_jax.system import files, processes
from pr1_jax.workdir import old_fields

CONFIG, RUN = "config.json", "run.json"
# Copies of the user's files that a run goes by, in the folder `own`.
TEMPLATE, INSTRUCTION = "own/template.jinja", "own/instruction.txt"
FUNCTION, VERIFIER = "own/function.py", "own/verifier.py"
_LOCK = "run.lock"
# What this process wrote into the locks that it holds. Reading one would give it up: a
# POSIX lock ends as soon as its process closes the file, by whatever handle.
_HELD: dict[str, str] = {}


class RefusedError(ValueError):
    """A folder holds what this run may not use; another start would meet it again."""


@contextlib.contextmanager
def only_run(
    workdir: str | os.PathLike[str], checkpoint_folder: str = ""
) -> Iterator[None]:
    """Holds a run's folders, so that no second run opens them at the same time.

    The system gives them up when the process ends, however it ends. A bucket cannot be
    held: there `identity` alone tells whose it is.

    Args:
      checkpoint_folder: as `checkpoint.folder`; "" = the workdir.

    Raises:
      ValueError: another process holds one; names the setting and that process.
    """
    if jax.process_index():
        yield
        return
    with contextlib.ExitStack() as held:
        for name, path in _to_hold(workdir, checkpoint_folder).items():
            held.enter_context(_held(name, path))
        yield


def not_shared(
    workdir: str | os.PathLike[str],
    checkpoint_folder: str = "",
    patience_sec: float = 30.0,
) -> str:
    """Says which folder of a run this process does not share with process 0; "" = none.

    All processes call this alike while process 0 is in `only_run`. Checkpoints, which
    all write together, would wait for ever in two folders.

    Args:
      patience_sec: a network's folder may show late what others write.
    """
    paths = _to_hold(workdir, checkpoint_folder)
    holders = processes.of_first(
        lambda: {name: _holder(path) for name, path in paths.items()}
    )
    until = time.monotonic() + patience_sec
    for name, holder in holders.items():
        path = pathlib.Path(workdir if name == "--workdir" else checkpoint_folder)
        while _holder(path) != holder:
            if time.monotonic() > until:
                return (
                    f"{name}={path} is not the folder that process 0 has under this "
                    "name: name one that all processes see"
                )
            time.sleep(0.5)
    return ""


def _to_hold(
    workdir: str | os.PathLike[str], checkpoint_folder: str
) -> dict[str, pathlib.Path]:
    """The folders of a run by the setting that names them, without buckets."""
    paths = {"--workdir": pathlib.Path(workdir)}
    apart = checkpoint_folder and "://" not in checkpoint_folder
    if apart and os.path.realpath(checkpoint_folder) != os.path.realpath(workdir):
        paths["checkpoint.folder"] = pathlib.Path(checkpoint_folder)
    return paths


def _holder(folder: pathlib.Path) -> str:
    """Who holds a folder, or has held it last; "" = nobody."""
    path = folder.absolute() / _LOCK
    if (held := _HELD.get(os.path.realpath(path))) is not None:
        return held
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


@contextlib.contextmanager
def _held(name: str, folder: pathlib.Path) -> Iterator[None]:
    path = folder.absolute() / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{name}={folder} is in use by {_holder(folder)}; wait for "
                f"it, stop it, or take another {name}"
            ) from error
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {platform.node()} since {since}"
        file.write(f"{holder}\n")
        file.flush()
        os.fsync(file.fileno())  # other hosts look for it
        _HELD[os.path.realpath(path)] = holder
        try:
            yield
        finally:
            del _HELD[os.path.realpath(path)]


# Groups of fields that may change when a run goes on.
_FREE = ("alarms", "checkpoint", "mesh", "metrics", "report")
# What may lie in the folder of a run that has not begun: our own files, and logs.
_OWN = (_LOCK, "run.json", "run.json.tmp", "config.json.tmp", "lost+found")
_LOGS = re.compile(r"(log.*|.*\.(log|out|err))", re.IGNORECASE)


def open_workdir(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> pathlib.Path:
    """Makes a run's folder, or checks that the one there is of the same config.

    A folder without a run may hold hidden files and logs, and nothing else.

    Raises:
      ValueError: it is of another config, and names a field that differs; or it holds
        something else than a run.
      OSError: it is not a folder, or cannot be made.
    """
    if "://" in str(workdir):
        raise ValueError(
            f"--workdir={workdir} is no folder; name one, and the bucket as "
            f"--config.checkpoint.folder={workdir}: checkpoints go there"
        )
    path = pathlib.Path(workdir).absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file; name a folder")
    path.mkdir(parents=True, exist_ok=True)
    saved = _saved_config(path)
    if saved is not None and "stages" not in saved:
        raise ValueError(
            f"--workdir={workdir} is not the folder of a run: its config.json is of "
            "something else; name a new folder, or an empty one"
        )
    if saved is None:
        _check_is_new(path)
        return path
    # Weights may be moved: `identity.check` says whether they are the same.
    may_move = {"model.path"} if "origin" in read_record(path) else set()
    check_config(saved, config, str(path), may_differ=may_move)
    return path


def check_config(
    saved: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    where: str,
    may_differ: Container[str] = (),
) -> None:
    """Compares the config of a run, of any version, with that by which it is to go on.

    Raises:
      ValueError: names a field that differs, both values, and how to go on.
    """
    mine, theirs = flat(files.plain(config.to_dict())), flat(saved)
    if problem := old_fields.refused(theirs):
        raise ValueError(
            f"the run in {where} is of an older version: {problem}; take another "
            "--workdir"
        )
    later = old_fields.later(theirs)
    theirs = old_fields.today(theirs)
    different = [
        name
        for name in sorted({*mine, *theirs})
        if name.split(".")[0] not in _FREE
        and name not in may_differ
        and mine.get(name) != theirs.get(name)
    ]
    for name in different:
        if name in later:
            logging.warning(
                "the run in %s is of an older version, which did as %s=%r does; it "
                "goes on with %r",
                *(where, name, later[name], mine[name]),
            )
    if different := [name for name in different if name not in later]:
        name = different[0]
        raise ValueError(
            f"{name}={mine.get(name)!r}, but the run in {where} has "
            f"{theirs.get(name)!r}; take another --workdir"
            + _as_it_was({name: theirs.get(name) for name in different}, mine)
        )


def _as_it_was(fields: Mapping[str, Any], known: Container[str]) -> str:
    """How a run goes on by its own values of some fields, perhaps defaults of its time."""
    if {"name", "stages", "variant"} & {*fields} or not all(x in known for x in fields):
        return ""  # it is of another experiment
    plain = lambda x: str(tuple(x) if isinstance(x, list) else x)
    flags = (f"--config.{name}={shlex.quote(plain(x))}" for name, x in fields.items())
    return f", or go on as it was begun, with {' '.join(flags)}"


_ORIGIN = {"field", "path", "checkpoint", "weights", "about"}  # of `identity.Origin`


def read_record(folder: epath.Path | pathlib.Path) -> dict[str, Any]:
    """The content of `run.json`; {} where there is none.

    Raises:
      ValueError: it is no whole record; names the file, and the way out.
    """
    file = folder / RUN
    if not file.exists():
        return {}
    way_out = "put a copy of it back, or delete it"
    try:
        record = files.parse_object(file, file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error
    origin = record.get("origin", dict.fromkeys(_ORIGIN) | {"about": {}})
    is_whole = isinstance(origin, dict) and {*origin} >= _ORIGIN
    is_whole = is_whole and isinstance(origin["about"], dict)
    if not is_whole or not isinstance(record.get("checkpoints", ""), str):
        raise ValueError(f"{file} is not the record of a run; {way_out}")
    return record


def _saved_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The `config.json` of a run; None if there is none. ValueError if it is none."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        return files.read_object(path)
    except ValueError as error:
        raise ValueError(
            f"{error}. It was not written whole: put a copy of it back, or take "
            "another folder"
        ) from error


def _check_is_new(workdir: pathlib.Path) -> None:
    """Raises ValueError if a folder without a run holds something that is not ours."""
    foreign = sorted(
        name
        for name in os.listdir(workdir)
        if not name.startswith(".") and name not in _OWN and not _LOGS.fullmatch(name)
    )
    if foreign:
        names = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise ValueError(
            f"--workdir={workdir} is not the folder of a run: it has no config.json, "
            f"but {names}; name a new folder, or an empty one"
        )


def read_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """The config of a run, with the defaults of fields that are newer than the run.

    A template and an instruction that are files are the copies in the run's folder.

    Raises:
      FileNotFoundError: there is none in this folder.
      ValueError: what is there is no config.
    """
    path = pathlib.Path(workdir)
    saved = _saved_config(path)
    if saved is None:
        raise FileNotFoundError(
            f"{workdir} has no config.json: not the workdir of a run"
        )
    fields = flat(saved)
    if problem := old_fields.refused(fields, "model"):
        raise ValueError(f"{path} is of an older version: {problem}")
    config = get_config().unlock()
    with config.ignore_type():  # what is wrong in it is said where it is used
        for name, value in old_fields.today(fields).items():
            *groups, leaf = name.split(".")
            group = config
            for part in groups:
                if not isinstance(group.get(part), ml_collections.ConfigDict):
                    group[part] = ml_collections.ConfigDict()
                group = group[part]
            group[leaf] = value
        for leaf, copy in (("template", TEMPLATE), ("instruction", INSTRUCTION)):
            if (path / copy).exists():
                config.data[leaf] = str(path / copy)
    return config
