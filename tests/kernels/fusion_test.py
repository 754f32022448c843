"""What is made once: the same values, and once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.kernels import fusion
from pr1_jax.model.layers import rotary_angles, rotate

POSITIONS = np.array([[0, 1, 2, 3], [0, 5, 1, 0]])


def angles(positions):
    return rotary_angles(positions, 8, 1e4)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap, jax.checkpoint])
def test_values_are_those_of_the_function(wrap):
    made = wrap(lambda x: fusion.made_once(angles, x))(jnp.array(POSITIONS))
    for one, other in zip(made, angles(POSITIONS), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        assert one.dtype == other.dtype


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other platforms fuse well")
def test_layers_share_what_is_made_once():
    """Without it, each layer's rotary product of queries and keys makes sines anew."""

    def sines(make):
        def loss(x, positions):
            shared = make(positions)
            for _ in range(3):
                x = x + rotate(x, shared) @ jnp.ones((8, 8))
            return (x * x).sum()

        x = jnp.ones((*POSITIONS.shape, 2, 8))
        lowered = jax.jit(jax.grad(loss)).lower(x, jnp.array(POSITIONS))
        return len(re.findall(r" sine\(", lowered.compile().as_text()))

    assert sines(lambda p: fusion.made_once(angles, p)) == 1
    assert sines(angles) > 1
