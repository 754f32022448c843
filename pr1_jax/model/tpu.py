"""What Pallas kernels compute of a model on TPU: attention of decode steps.

The kernel takes queries, keys and values as the product gives them, and normalises and
rotates them itself: each operation of its own would take a microsecond and more.

A cache has one array a layer, keys and values side by side, [B, K, S, 2 H], as
`kernels.decode` reads and writes it; S is rounded up to whole pieces of it. The rest is
XLA's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pr1_jax.kernels import attention, decode
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.layers import project, rms_norm
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
    interpret: bool | pltpu.InterpretParams = False  # run kernels without a TPU, slowly

    # --- Parameters -----------------------------------------------------------------

    def prepare(self, params):
        """As `Xla.prepare`, what is fused as matrices, which lie in memory as products
        read them: qkv [D, K · (R + 2) · H]; gate_up [D, 2 · F], a device's gates before
        its ups.
        """
        params = super().prepare(params)
        for i in range(self.config.num_layers):
            layer = params[f"layer_{i}"]
            kernel = layer["gate_up"]["kernel"]  # [D, 2, F]
            D, parts = len(kernel), self._mlp_shards
            kernel = kernel.reshape(D, 2, parts, -1).swapaxes(1, 2).reshape(D, -1)
            qkv = {"kernel": layer["qkv"]["kernel"].reshape(D, -1)}
            if "bias" in layer["qkv"]:
                qkv["bias"] = layer["qkv"]["bias"].ravel()
            params[f"layer_{i}"] = layer | {"qkv": qkv, "gate_up": {"kernel": kernel}}
        return params

    def prepared_shardings(self, mesh: Mesh):
        """As `Xla.prepared_shardings`."""
        shardings = super().prepared_shardings(mesh)
        spec = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
        for name, layer in shardings.items():
            if name.startswith("layer_"):
                *first, _, mlp = layer["gate_up"]["kernel"].spec
                qkv = {n: x.spec for n, x in layer["qkv"].items()}
                flat = {
                    n: spec(*x[: 2 if n == "kernel" else 1]) for n, x in qkv.items()
                }
                both = {"kernel": spec(*first, mlp)}
                shardings[name] = layer | {"qkv": flat, "gate_up": both}
        return shardings

    @property
    def _mlp_shards(self) -> int:
        """Parts that the MLP is split into."""
        shards = _shards(self.mesh)
        return 1 if self.config.mlp_width % shards else shards

    # --- The forward pass -----------------------------------------------------------

    def attend_heads(self, params, x, angles, attend, cache, live=None):
        """As `Xla.attend_heads`; in a decode step the kernel normalises and rotates."""
        if not isinstance(attend, _StepAttention):
            return super().attend_heads(params, x, angles, attend, cache, live)
        c = self.config
        with jax.named_scope("projections"):
            h = rms_norm(params["attn_norm"], x, c.rms_eps)
            projected = project(params["qkv"], h)
        scales = None
        if c.qk_norm:
            scales = [params[name]["scale"] for name in ("q_norm", "k_norm")]
            scales = jnp.stack(scales).astype(jnp.float32)
        with jax.named_scope("attention"):
            return attend.projected(projected, cache, angles=angles, scales=scales)

    def _fused_heads(self, params, h):
        qkv = project(params["qkv"], h)
        return qkv.reshape(
            *h.shape[:-1], self.config.num_kv_heads, -1, self.config.head_dim
        )

    def _fused_mlp(self, params, h):
        both = project(params["gate_up"], h)
        apart = lambda both: tuple(jnp.split(both, 2, axis=-1))
        if self._mlp_shards == 1:
            return apart(both)
        split = PartitionSpec(*(None,) * (h.ndim - 1), RULES["mlp"])
        return self._on_shards(apart, split, (split, split))(both)

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

    def step_attention(self, step: Step) -> "_StepAttention":
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

        return _StepAttention(self, walk)

    def attend(self, by_head, whole):
        """`decode.attend`, in which every device attends with its own heads.

        Args:
          by_head: arrays whose second axis is split. whole: trees that all have.
        """

        def attend(by_head, whole):
            walk, angles, scales = whole
            return decode.attend(
                *by_head,
                walk,
                angles=angles,
                scales=scales,
                eps=self.config.rms_eps,
                cores=self.cores,
                interpret=self.interpret,
            )

        split = PartitionSpec(None, RULES["kv_heads"])
        run = self._on_shards(attend, (split, PartitionSpec()), (split, split))
        return run(by_head, whole)

    def _on_shards(self, function, in_specs, out_specs):
        """A function that every device runs on its part of what is split."""
        if self.mesh is None:
            return function
        around = jax.sharding.get_abstract_mesh()  # in which rows may be split already
        mesh, done = (self.mesh, ()) if around.empty else (around, around.manual_axes)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(mesh.axis_names) - set(done),
            check_vma=False,
        )


@dataclasses.dataclass(frozen=True)
class _StepAttention:
    """Attention of a decode step."""

    backend: Tpu
    walk: decode.Walk

    def __call__(self, q, k, v, cache):
        """As `layers.Attend`."""
        L, K, H = k.shape
        both = q.reshape(L, K, -1, H), k[:, :, None], v[:, :, None]
        return self.projected(jnp.concatenate(both, axis=2).reshape(L, -1), cache)

    def projected(self, heads, cache, *, angles=None, scales=None):
        """The same of heads as they are projected: see `decode.attend`."""
        (own,), shared = cache
        if shared is None:
            shared = self.backend.empty_cache(1, 1)[0]
        by_head = (heads, own, *shared)
        out, own = self.backend.attend(by_head, (self.walk, angles, scales))
        return out.reshape(len(heads), -1, self.backend.config.head_dim), (own,)


def _rounded(slots: int) -> int:
    """Slots that a cache has for so many."""
    return -(-slots // decode.PIECE) * decode.PIECE
