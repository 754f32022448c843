"""Operations of decoding on CPU, in C++: thin products, draws, attention of a step.

A decode step multiplies few rows by every weight, and reads every key and value once.
XLA's products of few rows reach half of what they could on CPU, and its attention has
one shape for all rows: each pays for the slots of the longest response, and for as many
lanes as there can be. The kernels here read packed weights (`cpu_kernels.cc`), and of
each row what it has and no more (`cpu_attend.cc`). A layer is two calls and attention
between them: threads wait for each other within a call, for less than it takes to begin
another.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.kernels.cpu import library

# --- Products of few rows, and what stands between them ----------------------------


def pack(matrix: jax.Array) -> jax.Array:
    """A matrix [I, O] in panels of columns [ceil(O / C), I, C], as `project` reads it."""
    columns = library.library().Columns()
    matrix = jnp.pad(matrix, [(0, 0), (0, -matrix.shape[1] % columns)])
    return matrix.reshape(matrix.shape[0], -1, columns).swapaxes(0, 1)


def pack_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Two matrices [I, O] in panels that are half of the one and half of the other."""
    half = library.library().Columns() // 2
    padding = [(0, 0), (0, -gate.shape[1] % half)]
    panels = [jnp.pad(x, padding).reshape(len(x), -1, half) for x in (gate, up)]
    return jnp.concatenate(panels, axis=-1).swapaxes(0, 1)


def project(
    x: jax.Array, packed: jax.Array, size_out: int, live: jax.Array | None = None
) -> jax.Array:
    """x [..., I] float32 times a packed matrix [I, size_out].

    A row's result does not depend on which others are there; so below.

    Args:
      live: scalar int32, rows that are wanted, the first ones; others mean nothing.
        None: all.
    """
    rows = x.reshape(-1, x.shape[-1])
    (out,) = library.call("project", [(len(rows), size_out)], rows, packed, _live(live))
    return out.reshape(*x.shape[:-1], size_out)


def project_heads(x, scale, packed, bias, angles, scales, eps, *, heads, live=None):
    """Queries, keys and values of a layer: normalised, projected and rotated.

    Args:
      x: [..., D] float32, divided by its rms and multiplied by `scale` [D].
      packed: a matrix [D, K · (R + 2) · H]; by key head: its R queries, key and value.
      bias: [K, R + 2, H] float32, added to the product, or None.
      angles: sines and cosines [..., H/2] of rotary positions.
      scales: [H] of the norms of queries and of keys, or None without norms.
      eps: added to mean squares.
      heads: how many, N = K · R of queries and K of keys and values.
      live: as of `project`.

    Returns:
      q [..., N, H], k and v [..., K, H].
    """
    (*lead, D), half, (N, K) = x.shape, angles[0].shape[-1], heads
    rows, bias = x.reshape(-1, D), library.or_empty(bias).ravel()
    scales = map(library.or_empty, scales)
    angles = (angle.reshape(-1, half) for angle in angles)
    qkv = library.call(
        "project_heads",
        [(len(rows), n, 2 * half) for n in (N, K, K)],
        rows,
        packed,
        scale,
        bias,
        *scales,
        *angles,
        _live(live),
        eps=np.float32(eps),
    )
    return tuple(heads.reshape(*lead, *heads.shape[1:]) for heads in qkv)


def finish_layer(x, heads, scale, o, gate_up, down, eps, *, live=None):
    """What comes after attention: z = x + heads · o, and the MLP on top of it.

    That is z + (silu(h · gate) · (h · up)) · down, with h = z / rms(z) · scale.

    Args:
      x: [..., D] float32. heads: [..., N, H], of attention. scale: [D].
      o, down: of `pack`. gate_up: of `pack_gated`.
      eps: added to the mean square.
      live: as of `project`.

    Returns:
      Like x.
    """
    rows = x.reshape(-1, x.shape[-1])
    args = rows, heads.reshape(len(rows), -1), scale, o, gate_up, down, _live(live)
    (out,) = library.call("finish_layer", [rows.shape], *args, eps=np.float32(eps))
    return out.reshape(x.shape)


def _live(live: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.int32) if live is None else live.astype(jnp.int32)[None]


def uniform(keys: jax.Array, counts: jax.Array) -> jax.Array:
    """Numbers from 0 to 1 as `categorical.uniform` gives them, [L, 2] float32.

    That function is a loop of small programs on CPU.

    Args:
      keys: [L] PRNG keys of Threefry, JAX's default. counts: [L] int32.
    """
    keys = jax.random.key_data(keys)
    (out,) = library.call("uniform", [(*counts.shape, 2)], keys, counts)
    return out


def draw(logits: jax.Array, numbers: jax.Array, live: jax.Array | None = None):
    """Draws from the softmax of each row, where its running sum passes `numbers`.

    Args:
      logits: [L, V] float32. numbers: [L, 2] float32, as of `uniform`.
      live: as of `project`.

    Returns:
      tokens [L] int32 and their log-probs [L] float32; 0 of rows that are not live.
    """
    struct = functools.partial(jax.ShapeDtypeStruct, logits.shape[:1])
    call = jax.ffi.ffi_call("pr1_jax_draw", [struct(jnp.int32), struct(jnp.float32)])
    return tuple(call(logits, numbers, _live(live)))


# --- Attention of a decode step -----------------------------------------------------

_SLOTS = 16  # whose keys stand together, so that memory is read in order


def pack_keys(keys: jax.Array) -> jax.Array:
    """Keys [..., H, S] as `attend` reads them, [..., ceil(S / 16), H, 16]."""
    keys = jnp.pad(keys, [(0, 0)] * (keys.ndim - 1) + [(0, -keys.shape[-1] % _SLOTS)])
    return keys.reshape(*keys.shape[:-1], -1, _SLOTS).swapaxes(-3, -2)


def unpack_keys(packed: jax.Array) -> jax.Array:
    """Keys [..., H, S] of packed ones, S being a multiple of 16."""
    keys = packed.swapaxes(-3, -2)
    return keys.reshape(*keys.shape[:-2], -1)


def packed_slot(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The indices of a slot's keys among packed ones, on axes −3 and −1."""
    return slot // _SLOTS, slot % _SLOTS


def attend(q, k, v, own, shared, *, lanes, rows, prompt_length):
    """Writes keys and values of live lanes into their slots, and attends.

    A lane sees its prompt, and of the filled slots of its row those that
    `layout.visible_labels` shows to its labels.

    Args:
      q: [L, N, H] float32. k, v: [L, K, H], of the lanes' tokens.
      own: keys, of `pack_keys`, [B, K, ceil(S / 16), H, 16] and values [B, K, S, H] of
        the rows.
      shared: likewise, of M prompts of up to T tokens.
      lanes: row, slot, block and path, [L] int32 each. Row B: the lane is not live, and
        gets zeros. Lanes of a row stand side by side. Slot −1 writes nothing.
      rows: how many slots are filled [B] int32, the slots' block and path [B, S] int32,
        and which prompt each row has [B] int32.
      prompt_length: [M] int32, 1 or more but where all of a row's slots may be hidden.

    Returns:
      out [L, N, H], and the rows' keys and values.
    """
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(
        "pr1_jax_attend",
        [struct(x) for x in (q, *own)],
        input_output_aliases={3: 1, 4: 2},
    )
    integers = (*lanes, *rows, prompt_length)
    out, *own = call(q, k, v, *own, *shared, *(x.astype(jnp.int32) for x in integers))
    return out, tuple(own)
