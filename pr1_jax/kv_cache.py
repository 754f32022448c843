"""The model's side of decoding: prefill, a step over the cache, the causal rejoin.

Token-wise work (embedding, projections, MLP, head) runs on a flat list of live lanes;
attention regroups them by row. Keys are held as [B, K, H, S] and values as
[B, K, S, H]: in this order both products of a decode step read memory along its last
axis.
"""

import jax
import jax.numpy as jnp

from pr1_jax import attention, decode, layout, model
from pr1_jax.decode import Lanes, Settings, State, Vocab


def empty(config: model.ModelConfig, settings: Settings, rows: int):
    """Zeros: one (keys [B, K, H, S], values [B, K, S, H]) a layer.

    They are stacked on a first axis where the model scans its layers.
    """
    B, S, K, H = rows, settings.slots, config.num_kv_heads, config.head_dim
    entry = lambda *lead: (
        jnp.zeros((*lead, B, K, H, S), config.dtype),
        jnp.zeros((*lead, B, K, S, H), config.dtype),
    )
    n = config.num_layers
    return entry(n) if config.scan_layers else tuple(entry() for _ in range(n))


def cached_attention(q, keys, values, mask):
    """Attention of few queries over a cache.

    Args:
      q: [B, T, N, H]. keys: [B, K, H, S]. values: [B, K, S, H].
      mask: bool [B, T, S].

    Returns:
      [B, T, N, H].
    """
    B, T, N, H = q.shape
    K, S = keys.shape[1], keys.shape[-1]
    R = N // K
    q = q.reshape(B, T, K, R, H).transpose(0, 2, 1, 3, 4) * (H**-0.5)
    if jax.default_backend() == "cpu" and T * R <= 16:
        # XLA's batched products are slow on CPU where one side is thin; a fused
        # multiply and reduce was 2 to 3 times faster.
        scores = (q[..., None] * keys[:, :, None, None]).sum(-2)
    else:
        flat = q.reshape(B, K, T * R, H)
        scores = jnp.einsum(
            "BKQH,BKHS->BKQS", flat, keys, preferred_element_type=jnp.float32
        ).reshape(B, K, T, R, S)
    scores = jnp.where(mask[:, None, :, None], scores, attention.NEG_INF)
    probs = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(values.dtype)
    if jax.default_backend() == "cpu" and T * R <= 16:
        out = (probs[..., None] * values[:, :, None, None]).sum(-2)
    else:
        flat = probs.reshape(B, K, T * R, S)
        out = jnp.einsum("BKQS,BKSH->BKQH", flat, values).reshape(B, K, T, R, H)
    return out.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def slot_mask(state: State, settings: Settings) -> jax.Array:
    """Which slots each lane's query may see, bool [B, P, S].

    Every emitted token is fed in the step after it, so at attention time the slots
    before `emitted` are filled, this step's own included.
    """
    index = jnp.arange(settings.slots)
    used = index - settings.max_prompt_tokens
    filled = (index < state.prompt_length[:, None]) | (
        (used >= 0) & (used < state.emitted[:, None])
    )
    path = decode.lane_paths(state)
    block = jnp.where(path > 0, state.blocks[:, None], 0)
    labels = layout.visible_labels(
        block[..., None],
        path[..., None],
        state.slot_block[:, None],
        state.slot_path[:, None],
    )
    return labels & filled[:, None]


def model_decode(config: model.ModelConfig, settings: Settings) -> decode.DecodeFn:
    """The real decode function: feeds lanes through the model and its cache."""

    def decode_lanes(params, lanes: Lanes, state: State, num_lanes: int):
        B, P = state.token.shape
        P = 1 if num_lanes == B else P  # no row is inside a block
        mask = slot_mask(state, settings)[:, :P]
        # Where each of the B · P lanes stands in the flat list (dead ones: anywhere).
        place = jnp.clip(jnp.cumsum(state.live[:, :P].ravel()) - 1, 0)
        place = jnp.arange(B) if P == 1 else place

        def attend(q, k, v, cache):
            keys, values = cache
            keys = keys.at[lanes.row, :, :, lanes.slot].set(k, mode="drop")
            values = values.at[lanes.row, :, lanes.slot].set(v, mode="drop")
            grouped = q[place].reshape(B, P, *q.shape[1:])
            out = cached_attention(grouped, keys, values, mask)
            out = out.reshape(B * P, *q.shape[1:])
            return out[jnp.clip(lanes.index, 0, B * P - 1)], (keys, values)

        hidden, cache = model.forward(
            config, params, lanes.token, lanes.position, attend, state.cache
        )
        return model.logits(params, hidden), cache

    return decode_lanes


def prefill(config: model.ModelConfig, params, tokens, *, query_chunk: int = 512):
    """Keys and values of prompts; no logits.

    Args:
      tokens: [B, T] int32, right-padded.

    Returns:
      One (keys [B, K, H, T], values [B, K, T, H]) a layer, as in `empty`.
    """
    zeros = jnp.zeros_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(q, k, v, cache):
        del cache
        out = attention.label_attention(q, k, v, zeros, zeros, query_chunk=query_chunk)
        return out, (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))

    return model.forward(config, params, tokens, positions, attend)[1]


def rejoin(
    config: model.ModelConfig,
    settings: Settings,
    vocab: Vocab,
    params,
    state: State,
    rows,
    tokens,
    first_slot,
    length,
) -> State:
    """Causal variant: recomputes closed blocks' keys and values in canonical order.

    Args:
      rows: [W] int32, waiting rows; B = unused.
      tokens: [W, T] int32, each block's path tokens in canonical order.
      first_slot: [W] int32, slot of the first of them; they lie side by side.
      length: [W] int32.

    Returns:
      The state, with `</Parallel>` pending on lane 0 of those rows.
    """
    B, P = state.token.shape
    offset = jnp.arange(tokens.shape[1])
    row = jnp.clip(rows, 0, B - 1)
    slot = jnp.where(
        offset < length[:, None], first_slot[:, None] + offset, settings.slots
    )
    prompt_length = state.prompt_length[row]
    start = first_slot - settings.max_prompt_tokens + prompt_length
    index = jnp.arange(settings.slots)
    mask = (index < prompt_length[:, None, None]) | (
        (index >= settings.max_prompt_tokens) & (index <= slot[..., None])
    )

    def attend(q, k, v, cache):
        keys, values = cache
        keys = keys.at[rows[:, None], :, :, slot].set(k, mode="drop")
        values = values.at[rows[:, None], :, slot].set(v, mode="drop")
        out = cached_attention(q, keys[row], values[row], mask)
        return out, (keys, values)

    cache = state.cache
    if cache is not None:
        positions = start[:, None] + offset
        cache = model.forward(config, params, tokens, positions, attend, cache)[1]

    lane0 = jnp.zeros((B, P), bool).at[rows, 0].set(True, mode="drop")
    joined = lane0.any(axis=1)
    return state.replace(
        cache=cache,
        token=jnp.where(lane0, vocab.special_ids[decode.END_PARALLEL], state.token),
        position=jnp.where(
            lane0, (state.prompt_length + state.emitted)[:, None], state.position
        ),
        slot=jnp.where(
            lane0,
            settings.max_prompt_tokens + state.emitted[:, None],
            state.slot,
        ),
        live=state.live | lane0,
        phase=jnp.where(joined, decode.NEWLINE, state.phase),
        emitted=state.emitted + joined,
    )
