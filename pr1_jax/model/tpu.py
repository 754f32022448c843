"""What Pallas kernels compute of a model on TPU: attention of decode steps.

A cache has one array a layer, keys and values side by side, [B, K, S, 2 H], as
`kernels.decode` reads and writes it; S is rounded up to whole pieces of it. The rest is
XLA's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pr1_jax.kernels import attention, decode
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.layers import Attend
from pr1_jax.model.xla import Step, Xla, padded
from pr1_jax.system.mesh import RULES, local_mesh

_TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # kinds of which two cores are one device
_HEAD_DIM = 64  # of which a token fills vector registers


def why_not(config: ModelConfig, mesh: Mesh | None) -> str:
    """What keeps the kernels from being used; "" if nothing does."""
    device = _device(mesh)
    if device.platform != "tpu":
        return f"the device is a {device.platform}"
    if config.head_dim % _HEAD_DIM:
        return f"model.head_dim={config.head_dim} is not a multiple of {_HEAD_DIM}"
    heads, shards = config.num_kv_heads, _shards(mesh)
    if heads % shards:
        return f"mesh.tensor={shards} does not divide model.num_kv_heads={heads}"
    return ""


def make(config: ModelConfig, mesh: Mesh | None) -> "Tpu":
    """The backend for this process's part of a mesh, or for JAX's default device."""
    cores = 2 if _device(mesh).device_kind in _TWO_CORES else 1
    return Tpu(config, mesh and local_mesh(mesh), cores)


def _device(mesh: Mesh | None) -> jax.Device:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def _shards(mesh: Mesh | None) -> int:
    """Parts that heads are split into."""
    return 1 if mesh is None else mesh.shape[RULES["kv_heads"]]


@dataclasses.dataclass(frozen=True)
class Tpu(Xla):
    """The backend whose decode steps attend in Pallas."""

    mesh: Mesh | None = None  # heads are split over its axis `tensor`
    cores: int = 1  # of a device
    interpret: bool = False  # run kernels without a TPU, slowly

    # --- Caches ---------------------------------------------------------------------

    def grow_cache(self, cache, slots: int):
        """As `Xla.grow_cache`."""
        return tuple((padded(both, 2, _rounded(slots)),) for (both,) in cache)

    def _arranged(self, keys, values):
        both = jnp.concatenate([keys.swapaxes(2, 3), values], axis=3)
        return (padded(both, 2, _rounded(both.shape[2])),)

    def _write(self, cache, row, slot, k, v):
        (both,) = cache
        new = jnp.concatenate([k, v], axis=-1)
        return (both.at[row, :, slot].set(new, mode="drop"),)

    def _rows(self, cache, rows):
        both = cache[0][rows]
        H = self.config.head_dim
        return both[..., :H].swapaxes(2, 3), both[..., H:]

    # --- Attention of decoding ------------------------------------------------------

    def step_attention(self, step: Step) -> Attend:
        """As `Xla.step_attention`, over what is in use alone."""
        c, (B, P), L = self.config, step.live.shape, len(step.row)
        heads = c.num_kv_heads // _shards(self.mesh)
        if step.count is None:
            lanes = jnp.arange(B)[:, None]
        else:
            lanes = jnp.cumsum(step.live.ravel()).reshape(B, P) - 1
        lanes = jnp.where(step.live, lanes, L)
        if step.prompts is None:  # an empty one, which nobody reads
            length, prompt_slots, readers = jnp.zeros(1, jnp.int32), 0, 1
            reader = jnp.ones(B, jnp.int32)
        else:
            length, prompt_slots, readers = step.prompts
            reader = step.reader
        walk = decode.walk(
            lanes,
            step.slot[jnp.minimum(lanes, L - 1)],
            attention.slot_mask(
                step.block, step.path, step.slot_block, step.slot_path, step.filled
            ),
            step.filled,
            length=length,
            reader=reader,
            readers=readers,
            prompt_slots=prompt_slots,
            tile=decode.tile_slots(heads, c.head_dim, c.dtype),
            num_lanes=L,
        )

        def attend(q, k, v, cache):
            (own,), shared = cache
            if shared is None:
                shared = self.empty_cache(1, 1)[0]
            out, own = self._on_shards(q, k, v, own, *shared, walk)
            return out, (own,)

        return attend

    def _on_shards(self, *args):
        """`decode.attend`, in which every device attends with its own heads."""

        def attend(*args):
            return decode.attend(*args, cores=self.cores, interpret=self.interpret)

        if self.mesh is None:
            return attend(*args)
        around = jax.sharding.get_abstract_mesh()  # in which rows may be split already
        mesh, done = (self.mesh, ()) if around.empty else (around, around.manual_axes)
        by_head = PartitionSpec(None, RULES["kv_heads"])
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(by_head,) * 5 + (PartitionSpec(),),
            out_specs=(by_head, by_head),
            axis_names=set(mesh.axis_names) - set(done),
            check_vma=False,
        )(*args)


def _rounded(slots: int) -> int:
    """Slots that a cache has for so many."""
    return -(-slots // decode.PIECE) * decode.PIECE
