"""The device mesh, and the tables from logical axis names to mesh axes.

Parameters are created with logical names (`model.layers`); batches, and the sampler's
rows, are split over `data` and `fsdp` together. One device and many run the same code.

A process samples on its own devices alone: `local_mesh` is its part of the mesh, and
`localize` takes parameters there without a copy.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. A dimension that its mesh axis does not divide stays whole.
RULES = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "adapter": None,  # rank, or rows, of adapters
}

# While sampling, weights stay put: whole but for `tensor`.
SAMPLING_RULES = RULES | {"embed": None}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, or over those given.

    Args:
      data, fsdp, tensor: devices along each axis; −1 takes what the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices; says what would.
    """
    chosen = jax.devices() if devices is None else devices
    sizes = _sizes([data, fsdp, tensor], len(chosen))
    types = (AxisType.Auto,) * len(AXES)
    if sizes[-1] == 1:
        with contextlib.suppress(NotImplementedError):  # the slice has no such sides
            return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    return Mesh(np.reshape(by_process(chosen), sizes), AXES, axis_types=types)


def _sizes(given: Sequence[int], count: int) -> list[int]:
    """Sizes that multiply to `count`, with a number in place of −1."""
    text = ", ".join(f"mesh.{axis}={n}" for axis, n in zip(AXES, given, strict=True))
    if list(given).count(-1) > 1 or any(n < 1 and n != -1 for n in given):
        raise ValueError(f"{text}: sizes must be positive, one of them may be -1")
    needed = abs(math.prod(given))
    free = given.index(-1) if -1 in given else None
    if count == needed or (free is not None and count % needed == 0):
        return [count // needed if n == -1 else n for n in given]
    # What is nearest: each size as far as it divides the devices that are left.
    fitting, left = [], count
    for n in given:
        fitting.append(n if n == -1 else math.gcd(n, left))
        left //= abs(fitting[-1])
    if free is None:
        fitting[0] *= left
    changes = " ".join(
        f"--config.mesh.{axis}={new}"
        for axis, old, new in zip(AXES, given, fitting, strict=True)
        if new != old
    )
    many = "a multiple of " if free is not None else ""
    raise ValueError(
        f"{text}: needs {many}{needed} device{'s' * (needed > 1)}, and there "
        f"{'are' if count > 1 else 'is'} {count}: set {changes}"
    )


def by_process(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Devices of a process side by side, so that `tensor` stays within one process.

    `jax.make_mesh` puts `tensor` along a side of a TPU slice, whose devices belong to
    several processes.
    """
    return sorted(devices, key=lambda device: (device.process_index, device.id))


@contextlib.contextmanager
def training(mesh: Mesh) -> Iterator[None]:
    """Programs that are traced inside constrain activations by `RULES`, on this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        yield


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """A sharding that splits dimension `axis` over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    axes: Sequence[str] = RULES["batch"]
    return math.prod(mesh.shape[axis] for axis in axes)


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh that is this process's: the mesh itself, if it is alone.

    Raises:
      ValueError: `tensor` goes across processes.
    """
    mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    if all(mine):
        return mesh
    groups = np.reshape(mine, (-1, mesh.shape["tensor"]))
    if (groups.any(axis=1) != groups.all(axis=1)).any():
        raise ValueError(
            f"mesh.tensor={mesh.shape['tensor']} goes across processes, each of which "
            f"has {sum(mine)} devices; it must divide that number"
        )
    devices = mesh.devices.reshape(-1, 1, mesh.shape["tensor"])[groups.all(axis=1)]
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def localize(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds whole, on a `local_mesh`; copies nothing.

    Args:
      tree: arrays whose sharding names no axis but `tensor`.
    """

    def one(x):
        if x.sharding.mesh == mesh:
            return x
        parts = [shard.data for shard in x.addressable_shards]
        sharding = NamedSharding(mesh, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(one, tree)


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Puts micro-batches [micro-batches, B, …] on their devices.

    Args:
      tree: NumPy arrays with this process's share of B: 1 / the number of processes.
    """
    sharding = batch_sharding(mesh, axis=1)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def local_batch(x: jax.Array) -> np.ndarray:
    """This process's share of an array that is split as `put_batch` does."""
    parts = {}
    for shard in x.addressable_shards:
        parts[shard.index[1].start or 0] = shard.data
    return np.concatenate([parts[start] for start in sorted(parts)], axis=1)
