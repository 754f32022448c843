"""Checkpoints by orbax: parameters, optimizer, step and data position.

All processes are at the same position of the same data, each with its share of every
batch, so that one position is saved, and any number of processes can go on from it.

A checkpoint is numbered stage · 1,000,000 + step, so that the newest one is the
furthest along the curriculum. Random keys are functions of the seed, the stage and the
step, and so need no place of their own.
"""

import os
import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

STAGE_SIZE = 1_000_000
_NAMES = ocp.step.standard_name_format(step_format_fixed_length=8)


class Place(NamedTuple):
    """A position in the curriculum: `step` steps of stage number `stage` are done."""

    stage: int
    step: int


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 2):
        """Opens, and makes if need be, `<workdir>/checkpoints`; keeps the newest."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, step_name_format=_NAMES
        )
        folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest(self) -> Place | None:
        """Place of the newest checkpoint."""
        number = self._manager.latest_step()
        return None if number is None else Place(*divmod(number, STAGE_SIZE))

    def save(self, place: Place, state: Any, iterator: Any) -> None:
        """Saves in the background what is needed to go on from `place`."""
        self._manager.save(
            place.stage * STAGE_SIZE + place.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(iterator.get_state()),
            ),
        )

    def restore(self, place: Place, abstract_state: Any, iterator: Any = None) -> Any:
        """The state at `place`; also moves `iterator`, if given, to its position.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings.

        Raises:
          ValueError: the checkpoint is of another model.
        """
        args = {"state": ocp.args.StandardRestore(abstract_state)}
        if iterator is not None:
            args["data"] = ocp.args.JsonRestore()
        number = place.stage * STAGE_SIZE + place.step
        found = self._manager.restore(number, args=ocp.args.Composite(**args))
        if iterator is not None:
            iterator.set_state(found.data)
        return found.state

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.close()


def restore_params(
    path: str | os.PathLike[str], abstract_params: Any, **chosen: Any
) -> Any:
    """Parameters alone, from the newest checkpoint of another run's workdir.

    Args:
      abstract_params: tree of jax.ShapeDtypeStruct with shardings; cast to its dtypes.
      chosen: `number` and `field`, as of `check_params`.

    Raises:
      FileNotFoundError, ValueError: as `check_params`.
    """
    folder = check_params(path, abstract_params, **chosen)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_params)
    restored = ocp.PyTreeCheckpointHandler().restore(
        folder,
        args=ocp.args.PyTreeRestore(
            item={"params": abstract_params},
            restore_args={"params": restore_args},
            partial_restore=True,
        ),
    )
    return restored["params"]


def check_params(
    path: str | os.PathLike[str],
    abstract_params: Any,
    *,
    number: int | None = None,
    field: str = "checkpoint.init",
) -> epath.Path:
    """Folder of the newest state in a run's workdir; reads no parameters.

    Args:
      number: of another checkpoint than the newest.
      field: name of the setting that gave the path, for messages.

    Raises:
      FileNotFoundError: there is no checkpoint, or none of this number.
      ValueError: it is of another model; names the first parameter that differs.
    """
    folder = pathlib.Path(path).absolute()
    folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    found = _NAMES.find_all(folder) if folder.is_dir() else []
    states = {step.step: step.path / "state" for step in found}
    if not states:
        raise FileNotFoundError(f"{field}={path}: no checkpoint in {folder}")
    number = max(states) if number is None else number
    if number not in states:
        raise FileNotFoundError(
            f"checkpoint={number} is not in {folder}, which has {sorted(states)}"
        )
    saved = ocp.PyTreeCheckpointHandler().metadata(states[number])
    _check_same(saved.tree["params"], abstract_params, f"{field}={path}")
    return states[number]


def _check_same(saved: Any, wanted: Any, name_of_saved: str) -> None:
    """Raises ValueError where two trees differ in names or shapes."""
    shapes = lambda tree: {
        jax.tree_util.keystr(keys): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    saved, wanted = shapes(saved), shapes(wanted)
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{name_of_saved} is of another model: parameter {name} has "
                f"shape {saved.get(name)} there and {wanted.get(name)} here"
            )
