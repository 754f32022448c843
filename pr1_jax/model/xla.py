"""What XLA computes of a model: the backend that runs everywhere.

A backend is one value that provides all that kernels for a device may do otherwise:
forms of parameters and of caches, the two halves of a layer, attention in its four uses,
logits, log-probs of tokens, draws. Its signatures are of arrays. `model.backend` chooses
one; `model.tpu` and `model.cpu` depart from this one where they have kernels of their own.

A cache has an entry a layer: keys [B, K, H, S] and values [B, K, S, H], an order in which
both products of a decode step read memory along its last axis. Other backends may have
other entries, whose last array has its slots on axis 2, too. While decoding, a row's keys
and values lie in two caches: those of its prompt are kept once for all rows that read it,
those of its response are its own. `attend` then gets pairs of the two.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from pr1_jax.kernels import attention, categorical, heads, pallas
from pr1_jax.kernels.attention import (
    Part,
    attend_part,
    group_queries,
    mask_bias,
    merge,
    slot_mask,
    ungroup_queries,
)
from pr1_jax.kernels.pallas import KEPT
from pr1_jax.model import adapters, parallel
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.layers import Attend, kept_rms_norm, project, rms_norm, rotate
from pr1_jax.model.params import (
    compute_params,
    fuse_projections,
    fused_shardings,
    head_of,
    unstack_layers,
)
from pr1_jax.system.mesh import SAMPLING_RULES

_QUERIES = 256  # whose scores a rejoin holds at once


class Prompts(NamedTuple):
    """Prompts in a cache of M entries."""

    length: jax.Array  # [M] int32
    slots: int  # tokens that an entry has space for
    readers: int  # rows that an entry can have


class Step(NamedTuple):
    """What the lanes of a decode step see, and where their keys and values go.

    There are B rows of P lanes and S slots; L of the lanes are fed, in a flat list.
    """

    row: jax.Array  # [L] int32; B = unused
    index: jax.Array  # [L] int32, row · P + lane; B · P = unused
    # [L] int32; −1: a prompt's last token, whose keys are there already
    slot: jax.Array
    # scalar int32, lanes in use, the first; None: lane i is row i
    count: jax.Array | None
    live: jax.Array  # [B, P] bool, lanes that are fed
    block: jax.Array  # [B, P] int32, labels of the queries
    path: jax.Array  # [B, P] int32
    filled: jax.Array  # [B] int32, slots in use, those of this step included
    slot_block: jax.Array  # [B, S] int32
    slot_path: jax.Array  # [B, S] int32
    prompts: Prompts | None = None  # None: the caches have no entries of prompts
    # [B] int32, entry · readers + the row's number among them; M · readers: it has none
    reader: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class LabelAttention:
    """Attention of training, an `Attend`: see `attention.label_attention`."""

    config: ModelConfig
    block: jax.Array  # [B, T] int32, labels
    path: jax.Array  # [B, T] int32
    start: jax.Array | None = None  # [B, T] int32, of rows that hold several sequences

    @property
    def takes_raw(self) -> bool:
        """Whether it normalises and rotates queries and keys itself: `raw`."""
        chosen = attention.chosen(self.config.attention) == "pallas"
        return chosen and self.config.head_dim % heads.HEAD_DIMS == 0

    def __call__(self, q, k, v, cache=None):
        c = self.config
        settings = {"query_chunk": c.query_chunk, "implementation": c.attention}
        labels = self.block, self.path, self.start
        return attention.label_attention(q, k, v, *labels, **settings), cache

    def raw(self, q, k, v, raw: heads.Raw):
        """The same of queries and keys as they are projected."""
        labels = self.block, self.path, self.start
        return pallas.flash_attention(q, k, v, *labels, raw)


@dataclasses.dataclass(frozen=True)
class Xla:
    """The backend in plain JAX; updates are in Pallas on TPU."""

    config: ModelConfig
    # Whether products with merged weights give adapters their gradients themselves.
    adapters_apart: ClassVar[bool] = True

    # --- Parameters -----------------------------------------------------------------

    def prepare(self, params):
        """Parameters as decoding reads them: in its dtype, layers apart and fused.

        A cast, or a layer's slice of a stack, is thereby made once and not at every step.
        So is a policy with adapters merged.
        """
        c = self.config
        params = compute_params(c, adapters.with_rows(params))
        params = dict(unstack_layers(c, params))
        for i in range(c.num_layers):
            layer = adapters.merged(params[f"layer_{i}"])
            params[f"layer_{i}"] = fuse_projections(c, layer)
        return params

    def prepared_shardings(self, mesh: Mesh):
        """Shardings of `prepare`'s parameters, or one for all: split over `tensor`."""
        return fused_shardings(self.config, mesh, SAMPLING_RULES)

    # --- The forward pass -----------------------------------------------------------

    def attend_heads(self, params, x, angles, attend: Attend, cache, live=None):
        """The half of a layer up to attention: its output [..., N, H], the new cache.

        Args:
          params: the layer's. x: [..., D]. angles: of `layers.rotary_angles`.
          live: scalar int32, as `forward.forward` has it, here and in all that follows.
        """
        if isinstance(attend, LabelAttention) and attend.takes_raw:
            with jax.named_scope("projections"):
                q, k, v = self._raw_heads(params, x)
            with jax.named_scope("attention"):
                return attend.raw(q, k, v, self._raw(params, angles)), cache
        with jax.named_scope("projections"):
            q, k, v = self.project_heads(params, x, angles, live)
        with jax.named_scope("attention"):
            return attend(q, k, v, cache)

    def project_heads(self, params, x, angles, live=None):
        """Queries, keys and values of a layer: normalised, projected and rotated.

        Args:
          params, x, angles, live: of `attend_heads`.

        Returns:
          q [..., N, H], k and v [..., K, H].
        """
        q, k, v = self._raw_heads(params, x)
        if "q_norm" in params:
            q = rms_norm(params["q_norm"], q, self.config.rms_eps)
            k = rms_norm(params["k_norm"], k, self.config.rms_eps)
        return rotate(q, angles), rotate(k, angles), v

    def _raw_heads(self, params, x):
        """Queries, keys and values as they are projected, of `project_heads`."""
        h = self._norm(params["attn_norm"], x)
        if "qkv" not in params:
            return self._project_in([params[name] for name in ("q", "k", "v")], h)
        qkv = self._fused_heads(params, h)
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        return q.reshape(*h.shape[:-1], -1, q.shape[-1]), k, v

    def _raw(self, params, angles) -> heads.Raw:
        """What is left to do with a layer's queries and keys as they are projected."""
        scales = None
        if "q_norm" in params:
            scales = [params[name]["scale"] for name in ("q_norm", "k_norm")]
            scales = jnp.stack(scales)
        return heads.Raw(angles, scales, self.config.rms_eps)

    def finish_layer(self, params, x, out, live=None):
        """What comes after attention, `out` [..., N, H]: its projection and the MLP."""
        x = checkpoint_name(x + self._project_out(x, params["o"], out, 2), KEPT)
        h = self._norm(params["mlp_norm"], x)
        if "gate_up" in params:
            (gate, up), how = self._fused_mlp(params, h), {}
        else:
            both, how = [params["gate"], params["up"]], {"in_parts": True}
            gate, up = self._project_in(both, h, **how)
        return x + self._project_out(x, params["down"], jax.nn.silu(gate) * up, **how)

    def _norm(self, params, x):
        """RMS norm of activations x between layers."""
        is_split = parallel.splits_lengths(self.config, x)
        norm = kept_rms_norm if is_split else rms_norm
        return norm(params, x, self.config.rms_eps)

    def _project_in(self, params, x, **how):
        """What several kernels [D, heads, …] make of activations x.

        Args:
          how: of `parallel.project_in`, if x is split by length.
        """
        if parallel.splits_lengths(self.config, x):
            return parallel.project_in(self.config, params, x, **how)
        return [project(each, x) for each in params]

    def _project_out(self, like, params, x, num_in: int = 1, **how):
        """What a kernel [heads, …, D] makes of x, to be added to activations `like`."""
        if parallel.splits_lengths(self.config, like):
            return parallel.project_out(self.config, params, x, num_in, **how)
        return project(params, x, num_in)

    def _fused_heads(self, params, h):
        """Of each key head its queries, its key and its value, [..., K, R + 2, H]."""
        return project(params["qkv"], h)

    def _fused_mlp(self, params, h):
        """Gates and ups of the MLP, [..., F] each."""
        # As a matrix, [D, 2 · F], it could not be split over F.
        both = jnp.tensordot(h, params["gate_up"]["kernel"].astype(h.dtype), 1)
        return both[..., 0, :], both[..., 1, :]

    def logits(self, params, hidden, live=None):
        """Logits [..., V] float32 of final hidden states [..., D]."""
        head = head_of(params).astype(hidden.dtype)
        return _logits(hidden, head)

    def token_logps(self, params, hidden, tokens, bans, define: Callable, **policy):
        """Log-probs and entropies [M] of tokens [M] that hidden states [M, D] predict.

        Args:
          params: those of `params.head_of` are enough.
          bans: [M] int32. define: `policy.logps_and_entropies`, which says what they are
            as a function of logits. policy: its settings.
        """
        return define(self.logits(params, hidden), tokens, bans, **policy)

    # --- Attention of training ------------------------------------------------------

    def training_attention(
        self, block, path, start=None, *, shared: int = 0, group_rows: int = 1
    ) -> Attend:
        """Attention under labels [B, T], in which siblings do not see each other.

        Args:
          start: [B, T] int32, where rows hold several sequences, as of
            `attention.label_attention`; without shared tokens.
          shared, group_rows: the first S tokens are shared by G rows in a row each. They
            stand there once, in front of what is left of each: arrays are
            [B / G, S + G (T − S), …].
        """
        (B, T), G = block.shape, group_rows
        own = LabelAttention(self.config, block, path, start)
        if not shared:
            return own

        def attend(q, k, v, cache):
            first = [x[:, :shared] for x in (q, k, v)]
            nothing = jnp.zeros((B // G, shared), jnp.int32)
            of_shared, _ = LabelAttention(self.config, nothing, nothing)(*first)
            rest = lambda x: x[:, shared:].reshape(B, T - shared, *x.shape[2:])
            whole = lambda x: jnp.concatenate(
                [repeat_rows(x[:, :shared], G), rest(x)], axis=1
            )
            of_rest, _ = own(rest(q), whole(k), whole(v))
            of_rest = of_rest.reshape(B // G, -1, *q.shape[2:])
            return jnp.concatenate([of_shared, of_rest], axis=1), cache

        return attend

    # --- Caches ---------------------------------------------------------------------

    def empty_cache(self, rows: int, slots: int):
        """Zeros, an entry a layer."""
        K, H, dtype = self.config.num_kv_heads, self.config.head_dim, self.config.dtype
        return tuple(
            self._arranged(
                jnp.zeros((rows, K, H, slots), dtype),
                jnp.zeros((rows, K, slots, H), dtype),
            )
            for _ in range(self.config.num_layers)
        )

    def grow_cache(self, cache, slots: int):
        """The same cache over more slots; over as many as it has, if these are no more."""
        return tuple(
            (padded(keys, 3, slots), padded(values, 2, slots)) for keys, values in cache
        )

    def _arranged(self, keys, values):
        """Keys [W, K, H, T] and values [W, K, T, H] as a cache has them."""
        return keys, values

    def _write(self, cache, row, slot, k, v):
        """Puts keys and values [..., K, H] into slots [...] of rows [...], if these exist."""
        keys, values = cache
        keys = keys.at[row, :, :, slot].set(k, mode="drop")
        return keys, values.at[row, :, slot].set(v, mode="drop")

    def _rows(self, cache, rows):
        """Keys [W, K, H, S] and values [W, K, S, H] of some rows."""
        keys, values = cache
        return keys[rows], values[rows]

    # --- Attention of decoding ------------------------------------------------------

    def prefill_attention(self, entries) -> Attend:
        """Causal attention of W prompts, whose keys and values go into a cache.

        Args:
          entries: [W] int32, which of the cache's; behind the last: none.
        """

        def attend(q, k, v, cache):
            zeros = jnp.zeros(q.shape[:2], jnp.int32)
            out = attention.label_attention(q, k, v, zeros, zeros, implementation="xla")
            fresh = self._arranged(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
            return out, tuple(
                old.at[entries].set(new, mode="drop") for old, new in zip(cache, fresh)
            )

        return attend

    def step_attention(self, step: Step) -> Attend:
        """Attention of a decode step, by row; q, k and v are of its flat list of lanes."""
        (B, P), S = step.live.shape, step.slot_path.shape[1]
        slots = step.slot_block, step.slot_path, step.filled
        bias = self._bias(slot_mask(step.block, step.path, *slots))
        prompt_bias = _prompt_bias(step.prompts) if step.prompts else None
        slot = jnp.where(step.slot < 0, S, step.slot)  # written past the end: dropped
        # Where each of the B · P lanes is in the flat list (dead ones: anywhere).
        in_list = jnp.clip(jnp.cumsum(step.live.ravel()) - 1, 0)
        index = jnp.clip(step.index, 0, B * P - 1)

        def attend(q, k, v, cache):
            own, shared = cache
            own = self._write(own, step.row, slot, k, v)
            q = q if step.count is None else q[in_list]
            q = q.reshape(B, P, *q.shape[1:])
            grouped = group_queries(q, k.shape[-2])
            part = attend_part(grouped, *own, bias)
            if shared is None:
                out = part.out / part.total
            else:
                of_prompts = _attend_prompts(grouped, *shared, prompt_bias, step)
                out = merge(part, of_prompts)
            out = ungroup_queries(out, q).reshape(B * P, *q.shape[2:])
            return (out if step.count is None else out[index]), own

        return attend

    def rejoin_attention(self, rows, slot, entry, prompts: Prompts) -> Attend:
        """Causal attention of tokens that are computed anew, into slots of their rows.

        Args:
          rows: [W] int32; behind the last: unused.
          slot: [W, T] int32, of each token; behind the last: unused.
          entry: [W] int32, the rows' prompts.
        """
        prompt_bias = _prompt_bias(prompts)[entry]

        def attend(q, k, v, cache):
            own, shared = cache
            own = self._write(own, rows[:, None], slot, k, v)
            B, _, S, _ = own[-1].shape
            mine = self._rows(own, jnp.clip(rows, 0, B - 1))
            of_prompts = self._rows(shared, entry)
            out = []
            for first in range(0, slot.shape[1], _QUERIES):
                some = slice(first, first + _QUERIES)
                bias = self._bias(jnp.arange(S) <= slot[:, some, None])
                grouped = group_queries(q[:, some], k.shape[-2])
                part = attend_part(grouped, *mine, bias)
                part = merge(part, attend_part(grouped, *of_prompts, prompt_bias))
                out.append(ungroup_queries(part, q[:, some]))
            return jnp.concatenate(out, axis=1), own

        return attend

    def _bias(self, mask):
        """`attention.mask_bias` of a mask [B, T, S] over tokens."""
        return mask_bias(mask, self.config.num_heads // self.config.num_kv_heads)

    # --- Draws ----------------------------------------------------------------------

    @staticmethod
    def draw(logits, keys, counts, live=None, axis: str | None = None):
        """Draws a token a row: see `categorical.draw`; `live` as of `forward.forward`."""
        return categorical.draw(logits, keys, counts, axis)


@jax.custom_vjp
def _logits(hidden, head):
    """Products [..., V] float32 of hidden [..., D] and head [V, D]."""
    return jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)


def _logits_back(inputs, gradient):
    """Rounds the gradient to the inputs' dtype once, for both of its products."""
    hidden, head = inputs
    # Without the barrier it would be made anew for each tile of the two.
    gradient = jax.lax.optimization_barrier(gradient.astype(hidden.dtype))
    to_hidden = jnp.einsum("...V,VD->...D", gradient, head)
    return to_hidden, jnp.einsum("...V,...D->VD", gradient, hidden)


_logits.defvjp(lambda *inputs: (_logits(*inputs), inputs), _logits_back)


def repeat_rows(x: jax.Array, times: int) -> jax.Array:
    """[B, …] to [B · times, …], the copies of a row side by side."""
    every = jnp.broadcast_to(x[:, None], (len(x), times, *x.shape[1:]))
    return every.reshape(-1, *x.shape[1:])


def padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x with zeros behind the last of an axis, up to a size; as it is if that is less."""
    more = max(size - x.shape[axis], 0)
    return jnp.pad(x, [(0, more * (i == axis)) for i in range(x.ndim)])


def _prompt_bias(prompts: Prompts) -> jax.Array:
    """What to add to the scores of prompts, [M, 1, 1, T]."""
    return mask_bias((jnp.arange(prompts.slots) < prompts.length[:, None])[:, None])


def _attend_prompts(q, keys, values, bias, step: Step) -> Part:
    """Attends to each row's prompt; a prompt's keys are read once for all its rows.

    Args:
      q: [B, K, Q, H]. keys: [M, K, H, T]. values: [M, K, T, H]. bias: [M, 1, 1, T].
    """
    (B, K, Q, H), M, readers = q.shape, len(keys), step.prompts.readers
    if readers == 1:  # row b reads entry b
        return attend_part(q, keys, values, bias)
    row = jnp.full(M * readers, B).at[step.reader].set(jnp.arange(B), mode="drop")
    q = q.at[row].get(mode="fill", fill_value=0).reshape(M, readers, K, Q, H)
    part = attend_part(q.swapaxes(1, 2).reshape(M, K, -1, H), keys, values, bias)

    def by_row(x):
        x = x.reshape(M, K, readers, Q, -1).swapaxes(1, 2)
        x = x.reshape(M * readers, K, Q, -1)
        return x[jnp.minimum(step.reader, M * readers - 1)]

    return Part(*map(by_row, part))
