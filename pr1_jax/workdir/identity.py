"""Whose a folder is, and what its run goes by: kept in `run.json`, and compared.

In the workdir, `run.json` holds the run's id, where its checkpoints are, and its
`Origin`: responses, evaluations,
checkpoints and the reference of the KL term all follow from those first parameters, and
none may be mixed with what follows from others. In `checkpoint.folder`, where that is
another folder, it holds the id, the `Origin`, the workdir and the config: the
checkpoints there are this run's alone.

The user's files that a run goes by are kept in the workdir, too, in `own`: a template
must stay what it is, and a function may be mended, which the log says.
"""

import dataclasses
import itertools
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath

from pr1_jax.defaults import flat
from pr1_jax.system import files, processes
from pr1_jax.workdir import checkpoint
from pr1_jax.workdir.folder import CONFIG, RUN, RefusedError, check_config, read_record


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run takes its first parameters from.

    Attributes:
      field: of the config that names it; "" = they are drawn by the seed.
      path: the value of the field.
      number: of the checkpoint there, if it is one.
      digest: reads the weights and gives their digest; called by all processes.
      about: what they go with, as of `checkpoint.Checkpoints`.
    """

    field: str
    path: str
    number: int | None
    digest: Callable[[], str]
    about: Mapping[str, Any]

    def __str__(self) -> str:
        return _in_words(self.field, self.path, self.number, "")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What the folders of a run are to hold.

    Attributes:
      contents: of `run.json`, in each folder.
      texts: of files in `workdir`, by name.
    """

    contents: Mapping[epath.Path, Mapping[str, Any]]
    workdir: pathlib.Path
    texts: Mapping[str, str]

    def keep(self) -> None:
        """Writes it; process 0 alone does, and the others wait.

        Raises:
          RefusedError: another run has written into the same folder just now.
        """
        fault = ""
        if jax.process_index() == 0:
            for folder, content in self.contents.items():
                there = read_record(folder)
                is_ours = there.get("id", content["id"]) == content["id"]
                if is_ours and there != content:
                    _write(folder, content)
                if read_record(folder).get("id") != content["id"]:
                    fault = f"{folder} is taken by another run just now"
            for name, text in {} if fault else self.texts.items():
                _keep_text(self.workdir / name, text)
        if fault := processes.first_fault(fault):
            raise RefusedError(fault)


def check(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    origin: Origin,
    texts: Mapping[str, str] | None = None,
) -> Identity:
    """Compares a run with what its folders are said to be of; writes nothing.

    All processes call this alike, and heed what process 0 reads.

    Args:
      texts: the user's files that the run goes by, by their names in the workdir.

    Raises:
      RefusedError: `checkpoint.folder` is of another run, or the run in the workdir began
        with other weights or another template; names both, and the way out.
    """
    folder = checkpoint.absolute(config.checkpoint.folder or workdir)
    is_apart = "://" in str(folder) or not _same_folder(folder, workdir)

    def look() -> dict[str, Any]:
        mine = read_record(epath.Path(workdir))
        before = mine.get("checkpoints", str(folder))
        return {
            "workdir": mine,
            "folder": read_record(folder) if is_apart else {},
            "config": files.read_json(workdir / CONFIG, None),
            "holds": bool(checkpoint.numbers(folder)),
            "held": bool(checkpoint.numbers(checkpoint.absolute(before))),
            "texts": {
                name: (workdir / name).read_text("utf-8", errors="replace")
                for name in texts or ()
                if (workdir / name).exists()
            },
        }

    try:
        there = processes.of_first(look)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    mine = dict(there["workdir"])
    for name, was in there["texts"].items():
        _check_text(workdir / name, was, texts[name])
    if is_apart:
        _check_owner(workdir, folder, config, there)
    if there["held"] and not there["holds"]:
        raise RefusedError(
            f"the checkpoints of the run in {workdir} are in {mine['checkpoints']}, and "
            f"there is none in {folder}: give that as checkpoint.folder again, or move "
            f"its checkpoints and {RUN} first"
        )
    began_with = mine.get("origin")
    if began_with:
        _check_origin(workdir, began_with, origin)
    elif there["config"]:
        _check_older(workdir, there["config"], config, origin)
    name = mine.get("id") or processes.exchange(secrets.token_hex(8))[0]
    said = {
        "field": origin.field,
        "path": origin.path,
        "checkpoint": origin.number,
        "weights": (began_with or {}).get("weights") or _digest(origin),
        "about": dict(origin.about),
    }
    mine = {"id": name, "checkpoints": str(folder), "origin": said}
    contents = {epath.Path(workdir): mine}
    if is_apart:
        held = {"workdir": str(workdir), "config": files.plain(config.to_dict())}
        contents[folder] = {"id": name, "origin": said, **held}
    return Identity(contents, workdir, texts or {})


def _check_text(kept: pathlib.Path, was: str, now: str) -> None:
    """Compares a file of the user with the copy that a run has kept of it."""
    if was == now:
        return
    lines = itertools.zip_longest(was.splitlines(), now.splitlines(), fillvalue="")
    first = next((i for i, (a, b) in enumerate(lines, start=1) if a != b), "the last")
    if kept.suffix == ".py":
        logging.warning(
            "the file of reward.%s is another one than when the run began (from line %s "
            "on; a copy of that is %s): the run goes on with the new one",
            *(kept.stem, first, kept),
        )
        return
    raise RefusedError(
        f"the file of data.{kept.stem} is another one than when the run began, from line "
        f"{first} on: put it back (a copy is {kept}), or take another --workdir"
    )


def _keep_text(file: pathlib.Path, text: str) -> None:
    """Writes a file of the user; one of another text is kept beside it."""
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        if file.read_text("utf-8", errors="replace") == text:
            return
        numbers = itertools.count(1)
        names = (file.with_stem(f"{file.stem}.{n}") for n in numbers)
        file.rename(next(name for name in names if not name.exists()))
    files.replace_file(file, text.encode())


def _digest(origin: Origin) -> str:
    """The digest of a run's first weights; RefusedError where they cannot be read."""
    try:
        return origin.digest()
    except OSError as error:
        raise RefusedError(f"{origin} cannot be read: {error}") from error


def _check_owner(
    workdir: pathlib.Path,
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    there: Mapping[str, Any],
) -> None:
    """Raises RefusedError unless a folder for checkpoints is free, or this run's."""
    name, owner = f"checkpoint.folder={folder}", there["folder"]
    if not owner:
        is_ours = there["workdir"].get("checkpoints") == str(folder)
        is_older = there["config"] and not there["workdir"]  # nothing was written then
        if there["holds"] and not is_ours and not is_older:
            raise RefusedError(
                f"{name} holds checkpoints, of another run than the one in {workdir}: "
                "take another checkpoint.folder"
            )
        return
    if owner.get("id") != there["workdir"].get("id"):
        raise RefusedError(
            f"{name} is of the run in {owner.get('workdir', folder)}, and not of the one "
            f"in {workdir}: take another checkpoint.folder. (If that workdir is lost, "
            f"copy {folder / RUN} into {workdir}, to go on from these checkpoints.)"
        )
    if "config" in owner:
        try:
            check_config(owner["config"], config, str(folder))
        except ValueError as error:
            raise RefusedError(f"{name}: {error}") from error


def _check_origin(
    workdir: pathlib.Path, began_with: Mapping[str, Any], origin: Origin
) -> None:
    """Raises RefusedError unless a run began with these very weights."""
    checkpoint.check_about(began_with["about"], origin.about, f"the run in {workdir}")
    same_field = began_with["field"] == origin.field
    digest = _digest(origin) if same_field else ""
    if not same_field or began_with["weights"] != digest:
        first = (
            began_with[name] for name in ("field", "path", "checkpoint", "weights")
        )
        now = _in_words(origin.field, origin.path, origin.number, digest)
        raise RefusedError(
            f"{now}: but the run in {workdir} began with {_in_words(*first)}. Give those "
            "weights again, or take another --workdir"
        )
    if (began_with["path"], began_with["checkpoint"]) != (origin.path, origin.number):
        logging.warning(
            "%s holds the weights that the run began with, which were %s then",
            origin,
            began_with["path"],
        )


def _check_older(
    workdir: pathlib.Path,
    saved: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    origin: Origin,
) -> None:
    """Raises RefusedError where a run that tells no more than its config began elsewhere."""
    was, now = flat(saved).get("checkpoint.init", ""), config.checkpoint.init
    if was != now and checkpoint.absolute(was) != checkpoint.absolute(now):
        raise RefusedError(
            f"checkpoint.init={now}: but the run in {workdir} began with {was or 'none'}, "
            "as its config.json says. Give that again, or take another --workdir"
        )
    logging.warning(
        "%s does not say which weights its run began with: taken is %s", workdir, origin
    )


def _in_words(field: str, path: str, number: int | None, weights: str) -> str:
    """What parameters were taken from, for messages."""
    if not field:
        return "parameters drawn by the seed"
    details = [] if number is None else [f"checkpoint {number}"]
    details += [weights[: len("sha256 ") + 12]] if weights else []
    return f"{field}={path}" + (f" ({', '.join(details)})" if details else "")


def _same_folder(folder: epath.Path, workdir: pathlib.Path) -> bool:
    return os.path.realpath(folder) == os.path.realpath(workdir)


def _write(folder: epath.Path, content: Mapping[str, Any]) -> None:
    if "://" not in str(folder):
        files.write_json(pathlib.Path(folder) / RUN, content)
    else:  # an object in a bucket is whole or not there
        (folder / RUN).write_text(files.json_text(content))
