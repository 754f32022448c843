"""What kernels in C++ compute of a model on CPU, in float32.

While decoding, parameters are packed (`kernels.cpu.decoding.pack`), keys of 16 slots lie
together, and attention goes by lane. Updates have kernels forward and backward, on one
device. The rest is XLA's.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pr1_jax.kernels import categorical
from pr1_jax.kernels.cpu import decoding, library, training
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.layers import Attend
from pr1_jax.model.params import compute_params, fuse_heads, head_of
from pr1_jax.model.xla import Step, Xla, padded
from pr1_jax.system.mesh import replicated


def why_not(config: ModelConfig, mesh: Mesh | None, *, training: bool) -> str:
    """What keeps the kernels from being used; "" if nothing does.

    Compiles them, if they are not yet.
    """
    if training and mesh is not None and mesh.size > 1:
        return f"updates run on one device, and the mesh has {mesh.size} devices"
    if mesh is not None and mesh.shape["tensor"] > 1:
        return f"mesh.tensor={mesh.shape['tensor']} splits heads"
    if mesh is not None and (platform := mesh.devices.flat[0].platform) != "cpu":
        return f"the device is a {platform}"
    return library.why_not(config.dtype)


@dataclasses.dataclass(frozen=True)
class Cpu(Xla):
    """The backend with kernels in C++.

    Their products are none to `jax.checkpoint`: with `remat`, all policies keep nothing.
    """

    adapters_apart: ClassVar[bool] = False  # kernels give the gradient of whole weights

    # --- Parameters, packed ---------------------------------------------------------

    def prepare(self, params):
        """Parameters as `Xla.prepare` makes them, their matrices packed."""
        params = super().prepare(params)
        head = decoding.pack(head_of(params).T)
        layers = {
            name: tree | _packed(tree)
            for name, tree in params.items()
            if name.startswith("layer_")
        }
        return params | layers | {"head": head}

    def prepared_shardings(self, mesh: Mesh):
        """One sharding for all parameters of `prepare`: they are never split."""
        return replicated(mesh)

    # --- The forward pass -----------------------------------------------------------

    def project_heads(self, params, x, angles, live=None):
        """As `Xla.project_heads`; of packed parameters in one call."""
        c = self.config
        scale = params["attn_norm"]["scale"].astype(jnp.float32)
        norms = tuple(
            params[name]["scale"].astype(jnp.float32) if c.qk_norm else None
            for name in ("q_norm", "k_norm")
        )
        if "qkv" in params:
            kernel, bias = params["qkv"]["kernel"], params["qkv"].get("bias")
            heads = c.num_heads, c.num_kv_heads
            return decoding.project_heads(
                x, scale, kernel, bias, angles, norms, c.rms_eps, heads=heads, live=live
            )
        plain = compute_params(c, {n: params[n] for n in ("q", "k", "v")})
        qkv = fuse_heads(c, plain["q"], plain["k"], plain["v"])
        rows, kernel = x.reshape(-1, c.width), qkv["kernel"].reshape(c.width, -1)
        heads = training.linear(rows, kernel, scale, None, c.rms_eps)
        heads = heads.reshape(*x.shape[:-1], c.num_kv_heads, -1, c.head_dim)
        if c.qkv_bias:
            heads = heads + qkv["bias"]
        return training.split_heads(heads, angles, norms, c.rms_eps)

    def finish_layer(self, params, x, out, live=None):
        """As `Xla.finish_layer`; of packed parameters in one call."""
        c = self.config
        scale = params["mlp_norm"]["scale"].astype(jnp.float32)
        names = [n for n in ("o", "gate_up", "gate", "up", "down") if n in params]
        params = compute_params(c, {n: params[n] for n in names})
        o, *mlp = (params[n]["kernel"] for n in names)
        if "gate_up" in params:
            return decoding.finish_layer(x, out, scale, o, *mlp, c.rms_eps, live=live)
        rows = x.reshape(-1, c.width)
        o = o.reshape(-1, c.width)
        rows = training.linear(out.reshape(len(rows), -1), o, None, rows)
        return training.mlp(rows, scale, *mlp, c.rms_eps).reshape(x.shape)

    def logits(self, params, hidden, live=None):
        """As `Xla.logits`; of a packed head in one call."""
        head = head_of(params)
        if head.ndim == 2:
            return super().logits(params, hidden)
        return decoding.project(hidden, head, self.config.vocab_size, live=live)

    def token_logps(
        self, params, hidden, tokens, bans, define, *, top_k=0, top_p=1.0, **policy
    ):
        """As `Xla.token_logps`; without truncation, logits are not held in memory."""
        if top_k or top_p < 1.0:
            policy |= {"top_k": top_k, "top_p": top_p}
            return super().token_logps(params, hidden, tokens, bans, define, **policy)
        head = head_of(params).astype(hidden.dtype)
        return training.token_logps(hidden, head, tokens, bans, **policy)

    def training_attention(
        self, block, path, start=None, *, shared: int = 0, group_rows: int = 1
    ) -> Attend:
        """As `Xla.training_attention`, and by it where rows hold several sequences.

        `group_rows` follows from the shapes.
        """
        if start is not None:
            return super().training_attention(block, path, start)
        return lambda q, k, v, cache: (
            training.attention(q, k, v, block, path, shared),
            cache,
        )

    # --- Decoding -------------------------------------------------------------------

    def grow_cache(self, cache, slots: int):
        """As `Xla.grow_cache`."""
        chunks = decoding.packed_slot(slots - 1)[0] + 1
        return tuple(
            (padded(keys, 2, chunks), padded(values, 2, slots))
            for keys, values in cache
        )

    def _arranged(self, keys, values):
        return decoding.pack_keys(keys), values

    def _write(self, cache, row, slot, k, v):
        keys, values = cache
        chunk, offset = decoding.packed_slot(slot)
        keys = keys.at[row, :, chunk, :, offset].set(k, mode="drop")
        return keys, values.at[row, :, slot].set(v, mode="drop")

    def _rows(self, cache, rows):
        keys, values = (x[rows] for x in cache)
        return decoding.unpack_keys(keys)[..., : values.shape[2]], values

    def step_attention(self, step: Step) -> Attend:
        """As `Xla.step_attention`, by lane and not by row: each pays for what it sees."""
        labels = step.block, step.path
        if step.count is None:
            labels = [x[:, 0] for x in labels]
        else:
            labels = [
                x.ravel().at[step.index].get(mode="fill", fill_value=0) for x in labels
            ]
        if step.prompts is None:
            entry = jnp.zeros_like(step.filled)
            lengths, empty = entry[:1], self.empty_cache(1, 0)[0]
        else:
            lengths, readers = step.prompts.length, step.prompts.readers
            entry = jnp.minimum(step.reader // readers, len(lengths) - 1)

        def attend(q, k, v, cache):
            own, shared = cache
            return decoding.attend(
                q,
                k,
                v,
                own,
                empty if shared is None else shared,
                lanes=(step.row, step.slot, *labels),
                rows=(step.filled, step.slot_block, step.slot_path, entry),
                prompt_length=lengths,
            )

        return attend

    @staticmethod
    def draw(logits, keys, counts, live=None, axis: str | None = None):
        """As `Xla.draw`; `tensor` is 1, so that no axis splits the vocabulary."""
        is_threefry = jax.random.key_impl(keys) == "threefry2x32"
        uniform = decoding.uniform if is_threefry else categorical.uniform
        return decoding.draw(logits, uniform(keys, counts), live)


def _packed(layer):
    """The matrices of a layer with fused projections, packed."""
    pack = lambda name, num_in: decoding.pack(_matrix(layer[name]["kernel"], num_in))
    gate, up = jnp.unstack(layer["gate_up"]["kernel"], axis=1)
    return {
        "qkv": layer["qkv"] | {"kernel": pack("qkv", 1)},
        "o": {"kernel": pack("o", 2)},
        "gate_up": {"kernel": decoding.pack_gated(gate, up)},
        "down": {"kernel": pack("down", 1)},
    }


def _matrix(kernel: jax.Array, num_in: int) -> jax.Array:
    return kernel.reshape(math.prod(kernel.shape[:num_in]), -1)
