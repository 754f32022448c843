"""The state of training, sharded like its parameters."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pr1_jax.system.mesh import replicated


@flax.struct.dataclass
class TrainState:
    """All that an update changes."""

    step: jax.Array  # int32, updates so far
    params: Any
    opt_state: Any


def abstract_state(
    abstract_params: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a state; moments are sharded like parameters.

    Args:
      abstract_params: tree of jax.ShapeDtypeStruct, or arrays, with shardings.
    """
    everywhere = replicated(mesh)
    struct = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params = jax.tree.map(lambda x: struct(x, x.sharding), abstract_params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: struct(moment, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: struct(x, everywhere),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(step, params, opt_state)


def from_params(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A fresh state around given parameters."""
    new = lambda params: TrainState(jnp.int32(0), params, optimizer.init(params))
    shardings = shardings_of(abstract_state(params, optimizer, mesh))
    return jax.jit(new, out_shardings=shardings)(params)


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)
