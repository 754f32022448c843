"""The device mesh, and the one table from logical axis names to mesh axes.

Parameters are created with logical names (`model.py`); batches are split over `data`
and `fsdp` together. One device and many run the same code.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pr1_jax import model

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
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; −1 takes what the other two leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = [data, fsdp, tensor]
    text = f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"{text}: sizes must be positive, one of them may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    if math.prod(sizes) != devices:
        raise ValueError(f"{text}: they do not multiply to {devices} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(config: model.ModelConfig, mesh: Mesh):
    """A NamedSharding for every parameter, from its logical names."""
    boxed = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))

    def place(box):
        names = zip(box.names, box.value.shape)
        spec = [_fitting(RULES[name], size, mesh) for name, size in names]
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(place, boxed, is_leaf=is_box)


def _fitting(axis: str | None, size: int, mesh: Mesh) -> str | None:
    return axis if axis and size % mesh.shape[axis] == 0 else None


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits dimension `axis` over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    axes: Sequence[str] = RULES["batch"]
    return math.prod(mesh.shape[axis] for axis in axes)
