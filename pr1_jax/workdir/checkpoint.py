"""Checkpoints by orbax: parameters, optimizer, step and data position.

All processes are at the same position of the same data, each with its share of every
batch, so that one position is saved, and any number of processes can go on from it.

A checkpoint is numbered stage · 1,000,000 + step, so that the newest one is the
furthest along the curriculum. Random keys are functions of the seed, the stage and the
step, and so need not be saved.
"""

import functools
import importlib.util
import math
import os
import pathlib
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from pr1_jax.system import digests, files, processes
from pr1_jax.workdir.folder import RefusedError

T = TypeVar("T")

STAGE_SIZE = 1_000_000
# In `about`: that adapters were trained, and the checksum of the weights beside them.
ADAPTERS, FROZEN = "adapters", "frozen weights"
_NAMES = ocp.step.standard_name_format(step_format_fixed_length=8)


class Position(NamedTuple):
    """A point of the curriculum: `step` steps of stage number `stage` are done."""

    stage: int
    step: int


class DamagedError(Exception):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_best: int = 0,
        best_metric: str = "",
        about: Mapping[str, Any] | None = None,
    ):
        """Opens, and makes if need be, `<workdir>/checkpoints`.

        Args:
          workdir: a folder, or one in a bucket: `gs://…`.
          keep: the newest ones.
          keep_best: those with the greatest `best_metric`, too; of equals the later.
          about: what the parameters go with, as JSON: names, also in groups, and values.
        """
        metric_of = lambda metrics: metrics.get(best_metric, -math.inf)
        self._policy = managers.AnyPreservationPolicy(
            [
                managers.LatestN(keep),
                managers.BestN(get_metric_fn=metric_of, n=keep_best),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            best_fn=metric_of,  # without one, metrics are not written
            step_name_format=_NAMES,
            cleanup_tmp_directories=True,
        )
        self._best_metric, self._about = best_metric, dict(about or {})
        self._folder = absolute(workdir) / "checkpoints"
        processes.of_first(lambda: _put_aside_damaged_metrics(self._folder))
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._tidy()

    def _tidy(self) -> None:
        """Deletes what an earlier process was killed before, or while, deleting.

        Half of a checkpoint may be left then; what is kept is as after a save.
        """
        numbers = sorted(self._manager.all_steps())
        infos = [types.SimpleNamespace(metrics=self._metrics(n)) for n in numbers]
        processes.agree(True)  # nothing is deleted before all have looked
        kept = self._policy.should_preserve(
            infos, context=managers.PreservationContext()
        )
        for number, keep in zip(numbers, kept):
            if not keep:
                self._manager.delete(number)

    def _metrics(self, number: int) -> Mapping[str, float]:
        """Those saved with a checkpoint, as far as they can be read."""
        try:
            return self._manager.metrics(number) or {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def latest(self) -> Position | None:
        """Position of the newest checkpoint; all processes must call this alike."""
        number = processes.of_first(self._manager.latest_step)  # who may see it first
        return None if number is None else Position(*divmod(number, STAGE_SIZE))

    def has(self, position: Position) -> bool:
        """Whether there is a checkpoint of this position."""
        return _number(position) in self._manager.all_steps()

    def save(
        self,
        position: Position,
        state: Any,
        data_state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background what is needed to go on from `position`.

        Args:
          data_state: as JSON (`data.Stream.get_state`).
          metrics: of the step; those without `best_metric` cannot be best.
        """
        name = self._best_metric
        best = {name: metrics[name]} if metrics and name in metrics else {}
        self._manager.save(
            _number(position),
            metrics=best,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(dict(data_state)),
                about=ocp.args.JsonSave(self._about),
            ),
        )

    def restore(
        self, position: Position, abstract_state: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The state at `position`, and that of the data stream.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings.

        Raises:
          RefusedError: the checkpoint is of another model, or goes with something else.
          DamagedError: it cannot be read.
        """
        folder = self._folder / _NAMES.build_name(_number(position))
        read_json = ocp.JsonCheckpointHandler().restore
        about, data, saved = _all_read(
            folder,
            lambda: (
                _read_object(folder / "about"),
                read_json(folder / "data"),
                ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree["params"],
            ),
        )
        check_about(about, self._about, str(folder))
        _check_same(saved, abstract_state.params, str(folder))
        state = _all_read(
            folder, lambda: _restore_tree(folder / "state", abstract_state)
        )
        return state, data

    def set_aside(self, position: Position) -> epath.Path:
        """Moves a damaged checkpoint out of the way; returns where it is now."""
        folder = self._folder / _NAMES.build_name(_number(position))
        aside = self._folder.parent / "checkpoints_damaged"
        target = aside / f"{folder.name}_{int(time.time())}"
        if jax.process_index() == 0:
            aside.mkdir(parents=True, exist_ok=True)
            if not aside.exists():  # in a bucket, a folder is what holds a file
                (aside / "README").write_text("Checkpoints that could not be read.")
            folder.rename(target)
        processes.agree(True)  # waits for process 0
        self._manager.reload()
        return target

    def wait(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is still being written, and ends."""
        self._manager.close()


def absolute(
    path: str | os.PathLike[str], field: str = "checkpoint.folder"
) -> epath.Path:
    """A folder, also in a bucket (`gs://…`), as orbax wants it.

    Raises:
      ValueError: what reads buckets is not installed, or the bucket is of another kind.
    """
    kind, is_url, _ = str(path).partition("://")
    if not is_url:
        return epath.Path(pathlib.Path(path).absolute())
    if kind != "gs":
        raise ValueError(f"{field}={path}: buckets are gs://…, or mounted as a folder")
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(f"{field}={path} needs a package: pip install gcsfs")
    return epath.Path(path)


def _restore_tree(folder: epath.Path, abstract: Any) -> Any:
    """A tree of arrays, each process reading its parts and waiting for nobody.

    Orbax's own `restore` ends in a barrier, at which all would wait for a process that
    cannot read its part.
    """
    args = ocp.args.StandardRestore(abstract)
    return ocp.StandardCheckpointHandler().restore(folder, args=args)


def kept_tree(path: pathlib.Path, tree: Any, abstract: Any) -> Any:
    """The tree that is kept in a folder; where there is none, `tree`, which is then kept.

    Args:
      tree: None where there must be one already.
      abstract: of the tree, with shardings.

    Raises:
      RefusedError: it cannot be read, or is not there.
    """
    if not processes.agree(path.exists()):
        if tree is None:
            raise RefusedError(f"{path} is not there: put it back, or start anew")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
            checkpointer.wait_until_finished()
    try:
        return _all_read(path, lambda: _restore_tree(path, abstract))
    except DamagedError as error:
        raise RefusedError(
            f"it cannot be read: {error}; put a copy of it back, or take another "
            "--workdir"
        ) from error


def _all_read(folder: epath.Path, read: Callable[[], T]) -> T:
    """What `read` gives, at every process; all must call this alike.

    Raises:
      DamagedError: some process cannot read; raised at all of them, with its words.
    """
    found, cause = None, None
    try:
        found = read()
    except Exception as error:  # noqa: BLE001 (raised below, at all processes)
        cause = error
    if fault := processes.first_fault(_line(cause) if cause else ""):
        raise DamagedError(f"{folder}: {fault}") from cause
    return found


def _read_object(item: epath.Path) -> dict[str, Any]:
    """What `JsonSave` wrote of a mapping."""
    file = item / "metadata"
    return files.parse_object(file, file.read_bytes())


def _put_aside_damaged_metrics(folder: epath.Path) -> None:
    """Renames metrics that cannot be read; orbax opens no folder with such.

    They only say which checkpoint is best.
    """
    for step in _steps(folder).values():
        file = step / "metrics" / "metrics"
        try:
            if file.exists():
                files.parse_object(file, file.read_bytes())
        except (ValueError, OSError) as error:
            aside = file.with_name("damaged")
            logging.warning("%s; it is now %s", _line(error), aside)
            file.rename(aside)


def _number(position: Position) -> int:
    return position.stage * STAGE_SIZE + position.step


def _line(error: Exception) -> str:
    text, _, _ = str(error).partition("See full TensorStore details")
    return " ".join(f"{type(error).__name__}: {text}".split())[:300]


def numbers(folder: epath.Path) -> list[int]:
    """Numbers of the checkpoints of a run in a folder."""
    return sorted(_steps(folder / "checkpoints"))


def _steps(folder: epath.Path) -> dict[int, epath.Path]:
    found = _NAMES.find_all(folder) if folder.is_dir() else []
    return {step.step: step.path for step in found}


def digest(state: epath.Path) -> str:
    """The digest of the parameters in a state that `check_params` found.

    It is that of the bytes as they are stored, in parts: equal for copies, and for the
    same parameters saved again on a like mesh. All processes must call this alike.

    Raises:
      OSError: they cannot be read.
    """
    base: Any = f"{state}/"
    if "://" not in base:  # not as an address, in which some characters have a meaning
        base = {"driver": "file", "path": base}
    began = time.time()
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    names = [key.decode() for key in store.list().result()]
    # What is known of the tree since then still holds; without that it is asked anew.
    read = lambda name: store.read(name, staleness_bound=began).result().value
    return digests.of_pieces(
        {
            name: functools.partial(read, name)
            for name in names
            if name.startswith("params.")
        }
    )


def restore_params(
    path: str | os.PathLike[str], abstract_params: Any, **chosen: Any
) -> Any:
    """Parameters alone, from the newest checkpoint of another run's workdir.

    Args:
      abstract_params: tree of jax.ShapeDtypeStruct with shardings; cast to its dtypes.
      chosen: `number` and `field`, as of `check_params`.

    Raises:
      FileNotFoundError, ValueError: as `check_params`, or it is damaged.
    """
    folder = check_params(path, abstract_params, **chosen)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_params)
    args = ocp.args.PyTreeRestore(
        item={"params": abstract_params},
        restore_args={"params": restore_args},
        partial_restore=True,
    )
    read = ocp.PyTreeCheckpointHandler().restore
    try:
        return _all_read(folder, lambda: read(folder, args=args))["params"]
    except DamagedError as error:
        name = f"{chosen.get('field', 'checkpoint.init')}={path}"
        raise _damaged(name, folder.parent, str(error)) from error


def check_params(
    path: str | os.PathLike[str],
    abstract_params: Any,
    *,
    number: int | None = None,
    field: str = "checkpoint.init",
    about: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Folder of the newest state in a run's workdir; reads no parameters.

    Args:
      number: of another checkpoint than the newest.
      about: what the parameters must go with, as of `Checkpoints`.
      field: name of the setting that gave the path, for messages.

    Raises:
      FileNotFoundError: there is no checkpoint, or none of this number.
      ValueError: it is damaged, goes with something else (`check_about`), or is of
        another model; names the first parameter that differs.
    """
    folder = absolute(path, field)
    folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    states = {number: step / "state" for number, step in _steps(folder).items()}
    if not states:
        raise FileNotFoundError(f"{field}={path}: no checkpoint in {folder}")
    number = max(states) if number is None else number
    if number not in states:
        raise FileNotFoundError(
            f"checkpoint={number} is not in {folder}, which has {sorted(states)}"
        )
    try:
        saved = ocp.PyTreeCheckpointHandler().metadata(states[number]).tree["params"]
        kept = states[number].parent / "about"  # none in older checkpoints
        said = _read_object(kept) if about and kept.exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        name = f"{field}={path}"
        raise _damaged(name, states[number].parent, _line(error)) from error
    if about:
        if ADAPTERS in said and ADAPTERS not in about:
            raise RefusedError(
                f"{field}={path} holds adapters alone, and no config.json says what they "
                "go with: name the workdir of their run"
            )
        check_about(said, about, f"{field}={path}")
    _check_same(saved, abstract_params, f"{field}={path}")
    return states[number]


def about_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the newest checkpoint in a run's workdir goes with; {} where it cannot be read."""
    folder = absolute(path, "checkpoint.init") / "checkpoints"
    if not (found := _steps(folder)):
        return {}
    try:
        return _read_object(found[max(found)] / "about")
    except (ValueError, OSError):
        return {}  # whoever reads the parameters says why


def _damaged(name: str, folder: epath.Path, why: str) -> RefusedError:
    """The error for a checkpoint of another run that cannot be read."""
    return RefusedError(
        f"{name}: checkpoint {int(folder.name)} is damaged; name another, or move "
        f"{folder} away ({why})"
    )


def check_about(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], name_of_saved: str
) -> None:
    """Compares what parameters go with, by name.

    What is not said, as in older checkpoints, is not compared; a line in the log says so.

    Args:
      saved, wanted: as `about` of `Checkpoints`.

    Raises:
      RefusedError: they differ; names the first that does, both values, and the way out.
    """
    unsaid = []
    for name, there, here in _pairs(saved, wanted):
        if there is _UNSAID:
            unsaid.append(name)
        elif there != here:
            raise RefusedError(
                f"{name_of_saved} was made with another {name}: {there} there, and "
                f"{here} here; {_way_out(name, there)}"
            )
    if unsaid:
        logging.warning(
            "%s does not say with which %s it was made, and is taken for ours",
            name_of_saved,
            ", ".join(unsaid),
        )


_UNSAID = object()


def _pairs(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names with both values, of groups that both have by their members."""
    for name, here in wanted.items():
        there = saved.get(name, _UNSAID)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _pairs(there, here, f"{prefix}{name}.")
        else:
            yield prefix + name, there, here


def _way_out(name: str, value: Any) -> str:
    """What to do about parameters that go with something else."""
    if name == "variant":
        return (
            f"set variant={value}, or write it as a folder (pr1_jax.export) and begin "
            "with that as model.path"
        )
    if name == FROZEN:
        return (
            "give the model.path or checkpoint.init that its adapters were trained on"
        )
    return "give the model.path and data.task that it was made with, or another one"


def _check_same(saved: Any, wanted: Any, name_of_saved: str) -> None:
    """Raises RefusedError where two trees differ in names or shapes."""
    shapes = lambda tree: {
        jax.tree_util.keystr(keys): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    saved, wanted = shapes(saved), shapes(wanted)
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            raise RefusedError(
                f"{name_of_saved} is of another model: parameter {name} has "
                f"shape {saved.get(name)} there and {wanted.get(name)} here"
            )
