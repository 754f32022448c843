"""What XLA's loop fusion on CPU would otherwise compute many times over."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def made_once(make: Callable, *args: jax.Array):
    """`make(*args)`, held in memory for all that read it.

    On CPU, XLA fuses cheap producers into every loop that reads them, sines, cosines and
    masks too: they are then made anew for each head and layer, in loops that can no
    longer be vectorised. It does so behind `optimization_barrier` as well, but not
    through a branch. Other platforms do not need it, and get `make(*args)`.

    Args:
      args: integer arrays without negative elements; the first must not be empty.
    """

    def behind_branch(*args):
        zeros = lambda *args: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, *args)
        )
        return jax.lax.cond(args[0][(0,) * args[0].ndim] >= 0, make, zeros, *args)

    return jax.lax.platform_dependent(*args, cpu=behind_branch, default=make)
