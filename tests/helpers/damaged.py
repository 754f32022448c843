"""One of two processes that save a checkpoint in parts, damage one part, and read it.

    python -m tests.helpers.damaged HOST:PORT PROCESS_ID FOLDER

Prints what this process saw, as a line of JSON.
"""

import contextlib
import json
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pr1_jax.system import processes
from pr1_jax.training.state import TrainState
from pr1_jax.workdir.checkpoint import Checkpoints, DamagedError, Position, kept_tree
from pr1_jax.workdir.folder import RefusedError


def flip(folder: pathlib.Path, number: int) -> None:
    """Flips the larger files of a process's part, each from its middle on."""
    for path in (folder / f"ocdbt.process_{number}").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if len(data) > 1000:
            half = len(data) // 2
            path.write_bytes(data[:half] + bytes(255 - x for x in data[half:]))


def main() -> None:
    """Two checkpoints and a reference, of which the part of process 1 is damaged."""
    coordinator, number, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    processes.initialize(coordinator, 2, number)
    workdir, saw = pathlib.Path(workdir), {}
    mesh = jax.make_mesh((2,), ("fsdp",))
    halves = NamedSharding(mesh, PartitionSpec("fsdp"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    put = lambda x, sharding: jax.make_array_from_callback(
        x.shape, sharding, lambda i: x[i]
    )
    made = lambda scale: TrainState(
        put(np.int32(scale), everywhere), {"x": put(scale * whole, halves)}, {}
    )
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), made(1)
    )
    newest, before = Position(0, 2), Position(0, 1)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for position in (before, newest):
            checkpoints.save(position, made(position.step), {})
        checkpoints.wait()
        if number == 1:
            flip(workdir / "checkpoints" / "00000002" / "state", 1)
        processes.exchange("damaged")
        try:
            checkpoints.restore(newest, abstract)
        except DamagedError as error:
            saw["error"] = str(error)
        checkpoints.set_aside(newest)
        saw["latest"] = checkpoints.latest()
        state, _ = checkpoints.restore(checkpoints.latest(), abstract)
        mine = state.params["x"].addressable_shards[0]
        saw["restored"] = bool((mine.data == whole[mine.index]).all())
    reference = workdir / "checkpoints_reference"
    kept_tree(reference, made(1).params, abstract.params)
    if number == 1:
        flip(reference, 1)
    processes.exchange("damaged")
    try:
        kept_tree(reference, made(1).params, abstract.params)
    except RefusedError as error:
        saw["reference"] = str(error)
    print(json.dumps(saw))


if __name__ == "__main__":
    main()
