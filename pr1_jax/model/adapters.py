"""LoRA: small matrices that are trained beside weights that stay as they are.

A projection computes with W = W₀ + alpha / r · A B (Hu et al. 2021, arXiv 2106.09685). W₀
is frozen, in the dtype of activations; A [in, r] and B [r, out] are float32, and B is 0 at
first. Rows of the embedding that belong to tags are trained whole, as float32 differences
from the frozen ones.

Sampling and training compute with the same merged weights, which `merged` and `with_rows`
make, rounded to the dtype of activations: while training inside each layer, so that no
second copy of the model is held; before sampling once a step. That x · A · B beside x · W₀
would round otherwise, and so would be another policy than the one that sampled.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import abstract_params

# Names of projections in `peft` -> ours.
PROJECTIONS = {f"{n}_proj": n for n in ("q", "k", "v", "o", "gate", "up", "down")}
ALL, TAGS = "all-linear", "tags"
TARGETS = (ALL, *PROJECTIONS, TAGS)  # of `model.lora_targets`
_PAIR, _ROWS = "adapter", "rows"  # names in a tree of parameters
TRAINED = "trained"  # that of a pair beside a kernel that it is merged into already


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
      rank: columns of A. alpha: A · B counts alpha / rank times.
      projections: our names of those that have a pair, `q` and so on.
      row_ids: rows of the embedding, and of the head where it is apart, that are trained.
    """

    rank: int
    alpha: float
    projections: tuple[str, ...]
    row_ids: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """By which A · B is multiplied."""
        return self.alpha / self.rank


def projections(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Our names of the projections that `targets`, of `TARGETS`, name."""
    return tuple(x for n, x in PROJECTIONS.items() if n in targets or ALL in targets)


@flax.struct.dataclass
class Pair:
    """The matrices beside a kernel [in…, out…], perhaps stacked by layer."""

    a: jax.Array  # [in…, r] float32
    b: jax.Array  # [r, out…] float32
    scale: float = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Rows:
    """Differences from frozen rows: [rows, D] float32, by `embedding` and `head`."""

    deltas: Any
    ids: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Frozen:
    """Weights that are not trained, and how adapters go with them."""

    params: Any
    settings: Settings = flax.struct.field(pytree_node=False)

    def with_adapters(self, adapters: Mapping[str, Any]) -> dict[str, Any]:
        """The tree that computes the policy: nothing is merged, or copied, yet.

        Args:
          adapters: as `init_adapters`, unboxed.
        """
        params = dict(self.params)
        for name, tree in adapters.items():
            if name == _ROWS:
                params[_ROWS] = Rows(tree, self.settings.row_ids)
                continue
            pairs = {
                n: Pair(**pair, scale=self.settings.scale) for n, pair in tree.items()
            }
            layer = params[name]
            params[name] = layer | {n: layer[n] | {_PAIR: x} for n, x in pairs.items()}
        return params


def policy_params(frozen: Frozen | None, trained: Any) -> Any:
    """The parameters of a policy: what is trained, with what is not, if there is such."""
    return trained if frozen is None else frozen.with_adapters(trained)


# --- Merging ------------------------------------------------------------------------


def merged(layer, *, apart: bool = False):
    """A layer's parameters, of one or of all stacked, with adapters merged; else as given.

    Args:
      apart: pairs stay beside the kernels, which have no gradient then: what multiplies
        by such a kernel hands the pair and its operand to `attach`.
    """
    if not any(_PAIR in part for part in layer.values()):
        return layer
    return {name: _merged(part, apart) for name, part in layer.items()}


def _merged(part, apart: bool):
    """A projection's own kernel, in its dtype."""
    part = dict(part)
    if (pair := part.pop(_PAIR, None)) is None:
        return part
    kernel, a, b = part["kernel"], pair.a, pair.b
    stacked = a.ndim + b.ndim - 2 - kernel.ndim  # 1 where layers are
    first, r = kernel.shape[:stacked], a.shape[-1]
    a, b = a.reshape(*first, -1, r), b.reshape(*first, r, -1)
    delta = pair.scale * _product(a, b).reshape(kernel.shape)
    kernel = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    if apart:
        return part | {"kernel": jax.lax.stop_gradient(kernel), TRAINED: pair}
    return part | {"kernel": kernel}


def attach(y, x, pair: Pair):
    """y = x W, as it is, of which a pair that is merged into W gets its gradient.

    That of A is alpha / r · xᵀ (dy Bᵀ), and that of B alpha / r · (x A)ᵀ dy: equal to what
    follows from dW = xᵀ dy, which is never made, by a third of an update's FLOPs.

    Args:
      y: [M, out]. x: [M, in].
    """
    r = pair.a.shape[-1]
    return _attach(y, x, pair.a.reshape(-1, r), pair.b.reshape(r, -1), pair.scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attach(y, x, a, b, scale):
    del x, a, b, scale
    return y


def _attach_back(scale, operands, gradient):
    x, a, b = operands
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    small = product("mo,ro->mr", gradient, b.astype(x.dtype)).astype(x.dtype)
    to_a = scale * product("mi,mr->ir", x, small)
    small = product("mi,ir->mr", x, a.astype(x.dtype)).astype(x.dtype)
    to_b = scale * product("mr,mo->ro", small, gradient)
    return gradient, None, to_a, to_b


_attach.defvjp(lambda y, x, a, b, scale: (y, (x, a, b)), _attach_back)


def _product(a, b):
    """A B, as a product over a batch of 1: policies of remat keep those without a batch,
    and this one is as large as the weights.
    """
    a, b = a[None], b[None]  # and not by jnp.matmul, which leaves such an axis out
    batch = tuple(range(a.ndim - 2))
    dimensions = ((a.ndim - 1,), (a.ndim - 2,)), (batch, batch)
    return jax.lax.dot_general(a, b, dimensions, precision="highest")[0]


def with_rows(params):
    """Parameters whose embedding, and head, have the trained rows; else as given."""
    if _ROWS not in params:
        return params
    params = dict(params)
    rows = params.pop(_ROWS)
    for name, delta in rows.deltas.items():
        ids, whole = jnp.array(rows.ids), params[name]
        new = (whole[ids].astype(jnp.float32) + delta).astype(whole.dtype)
        params[name] = whole.at[ids].set(new)
    return params


def merge_all(params):
    """Parameters like those of a model that never had adapters."""
    params = dict(with_rows(params))
    for name in params:
        if _is_layer(name):
            params[name] = merged(params[name])
    return params


def _is_layer(name: str) -> bool:
    return name == "layers" or name.startswith("layer_")


# --- The first adapters -------------------------------------------------------------


def init_adapters(config: ModelConfig, settings: Settings, key: jax.Array):
    """A drawn as in `peft`, evenly within 1 / √in, and B = 0: the policy is the frozen one.

    Returns:
      A tree like that of parameters, `layers/q/a` and so on, boxed with logical names.
    """
    base, adapters = abstract_params(config), {}
    layers = [name for name in base if _is_layer(name)]
    for i, name in enumerate(layers):
        adapters[name] = {}
        for j, part in enumerate(settings.projections):
            of_part = jax.random.fold_in(key, i * len(PROJECTIONS) + j)
            num_in = 2 if part == "o" else 1
            box = base[name][part]["kernel"]
            adapters[name][part] = _pair(box, num_in, settings.rank, of_part)
    if settings.row_ids:
        shape = len(settings.row_ids), config.width
        zeros = nn.LogicallyPartitioned(jnp.zeros(shape), ("adapter", "embed"))
        adapters[_ROWS] = {n: zeros for n in ("embedding", "head") if n in base}
    return adapters


def _pair(box, num_in: int, rank: int, key: jax.Array):
    """A and B of a boxed kernel, which split over a mesh as its axes do."""
    names, shape = box.names, box.value.shape
    stacked = int(names[0] == "layers")
    first = stacked + num_in
    bound = math.prod(shape[stacked:first]) ** -0.5
    a = jax.random.uniform(key, (*shape[:first], rank), minval=-bound, maxval=bound)
    b = jnp.zeros((*shape[:stacked], rank, *shape[first:]))
    return {
        "a": nn.LogicallyPartitioned(a, (*names[:first], "adapter")),
        "b": nn.LogicallyPartitioned(b, (*names[:stacked], "adapter", *names[first:])),
    }


@functools.lru_cache(maxsize=8)
def abstract_adapters(config: ModelConfig, settings: Settings):
    """Shapes and dtypes of `init_adapters`, boxed."""
    return jax.eval_shape(lambda: init_adapters(config, settings, jax.random.key(0)))


# --- Which weights are frozen -------------------------------------------------------


def checksum(params) -> str:
    """A short name of parameters: equal for equal ones, however they are sharded.

    It is computed where they lie, in whole numbers: a sum, modulo 2³², of every number's
    bits times a factor of its place.
    """
    sums = jax.jit(lambda tree: jax.tree.map(_sum_of_bits, tree))(params)
    named = jax.tree_util.tree_leaves_with_path(sums)
    text = "".join(f"{jax.tree_util.keystr(path)} {int(x)}\n" for path, x in named)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sum_of_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    place = jnp.uint32(1)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    odd = place * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * odd, dtype=jnp.uint32)
