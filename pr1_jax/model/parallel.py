"""Products of a layer over the mesh, with activations split by length between them.

Where weights are split over `tensor`, the outputs of two products a layer have to be
added up over devices. If each device gets the whole sum, it also computes norms and
residuals of all tokens. Here it gets the sums of its own part of each sequence, and the
parts are gathered before the next product: together as many bytes as one sum for all
(sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198). Weights, which are
split over `fsdp` as well, are gathered in the dtype of activations.

What sends what is written down, and not left to XLA, which would gather weights over
`tensor`, or add up whole sums and throw three quarters of them away.
"""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec as P

from pr1_jax.model.adapters import TRAINED, attach
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.layers import project
from pr1_jax.system.mesh import RULES

_ROWS, _WEIGHTS, _HEADS = RULES["batch"], RULES["embed"], RULES["heads"]


def splits_lengths(config: ModelConfig, x: jax.Array) -> bool:
    """Whether activations like x are split by length, on the mesh that is traced under.

    So are those of sequences [B, T, …] whose rows and lengths the mesh divides, where it
    splits heads and the MLP. Not while sampling, where rows are split already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.shape[_HEADS] == 1 or x.ndim < 3:
        return False
    c, rows = config, math.prod(mesh.shape[axis] for axis in _ROWS)
    over_tensor = math.gcd(c.num_kv_heads, c.num_heads, c.mlp_width, x.shape[1])
    return (
        over_tensor % mesh.shape[_HEADS] == 0
        and c.width % mesh.shape[_WEIGHTS] == 0
        and x.shape[0] % rows == 0
    )


def by_length(x: jax.Array) -> jax.Array:
    """Activations [B, T, D] split over `tensor` by length."""
    return jax.lax.with_sharding_constraint(x, P(_ROWS, _HEADS))


def project_in(
    config: ModelConfig,
    params: Sequence[dict],
    x: jax.Array,
    *,
    in_parts: bool = False,
) -> Sequence[jax.Array]:
    """`layers.project` with several kernels [D, heads, …] of x [B, T, D], split by length.

    Returns:
      [B, T, heads, …] each, split over heads; `in_parts`: [tensor, B, T / tensor, heads,
      …], as parts come from devices, of which no sequences have to be joined.
    """

    def on_device(x, params):
        parts = jax.lax.all_gather(x, _HEADS)  # [tensor, B, T / tensor, D]
        made = [project(_gathered(each, x), parts) for each in params]
        if in_parts:
            return made
        # Heads are fewer numbers than x, which therefore is not joined.
        return [y.swapaxes(0, 1).reshape(len(x), -1, *y.shape[3:]) for y in made]

    specs = {"kernel": P(_WEIGHTS, _HEADS), "bias": P(_HEADS)}
    return _on_devices(
        config,
        on_device,
        in_specs=(
            P(_ROWS, _HEADS),
            [
                {n: specs[n] for n in each if n != TRAINED}
                | _of_pair(each, P(_WEIGHTS), P(None, _HEADS))
                for each in params
            ],
        ),
        out_specs=_split_heads(in_parts),
    )(x, list(params))


def project_out(
    config: ModelConfig,
    params: dict,
    x: jax.Array,
    num_in: int = 1,
    *,
    in_parts: bool = False,
) -> jax.Array:
    """`layers.project` of x, split over heads as of `project_in`; a kernel without bias.

    Returns:
      [B, T, D], split by length.
    """

    def on_device(x, kernel, adapter):
        if not in_parts:
            x = x.reshape(len(x), jax.lax.axis_size(_HEADS), -1, *x.shape[2:])
            x = x.swapaxes(0, 1)
        kernel = kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype)
        x = x.reshape(*x.shape[:3], -1)
        y = x @ _gathered_last(kernel)
        if pair := adapter.get(TRAINED):
            b = jax.lax.all_gather(pair.b, _WEIGHTS, axis=1, tiled=True)
            rows = x.reshape(-1, x.shape[-1])
            y = attach(y.reshape(len(rows), -1), rows, pair.replace(b=b)).reshape(
                y.shape
            )
        return jax.lax.psum_scatter(y, _HEADS)  # of [tensor, B, T / tensor, D]

    return _on_devices(
        config,
        on_device,
        in_specs=(
            _split_heads(in_parts),
            P(_HEADS, *(None,) * (num_in - 1), _WEIGHTS),
            _of_pair(params, P(_HEADS), P(None, _WEIGHTS)),
        ),
        out_specs=P(_ROWS, _HEADS),
    )(x, params["kernel"], {n: x for n, x in params.items() if n == TRAINED})


def _of_pair(params: dict, a: P, b: P) -> dict:
    """Specs of the pair that is merged into a kernel, by its name, if there is one."""
    if TRAINED not in params:
        return {}
    return {TRAINED: params[TRAINED].replace(a=a, b=b)}


def _split_heads(in_parts: bool) -> P:
    """Of arrays [B, T, heads], or of their parts."""
    return P(*(None,) * in_parts, _ROWS, None, _HEADS)


def _on_devices(config: ModelConfig, function: Callable, **specs) -> Callable:
    if not config.remat:  # else a layer does: of what is gathered, nothing is kept
        function = jax.checkpoint(function)
    return jax.shard_map(function, **specs, check_vma=False)


def _gathered(params: dict, x: jax.Array) -> dict:
    """Parameters with the whole width, the kernel's first axis, in x's dtype."""
    kernel = params["kernel"].astype(x.dtype)
    kernel = jax.lax.all_gather(kernel, _WEIGHTS, tiled=True)
    params = params | {"kernel": kernel}
    if pair := params.get(TRAINED):
        a = jax.lax.all_gather(pair.a, _WEIGHTS, tiled=True)
        params[TRAINED] = pair.replace(a=a)
    return params


@jax.custom_vjp
def _gathered_last(kernel: jax.Array) -> jax.Array:
    """A kernel [I, D / fsdp] with the whole width."""
    return jax.lax.all_gather(kernel, _WEIGHTS, axis=1, tiled=True)


def _scattered_last(_, gradient: jax.Array) -> tuple[jax.Array]:
    # TPUs scatter sums along the first axis alone.
    parts = gradient.reshape(len(gradient), jax.lax.axis_size(_WEIGHTS), -1)
    return (jax.lax.psum_scatter(parts.swapaxes(0, 1), _WEIGHTS),)


_gathered_last.defvjp(lambda kernel: (_gathered_last(kernel), None), _scattered_last)
