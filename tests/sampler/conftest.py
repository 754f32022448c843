"""A fixture of the tests whose models are scripts."""

import jax
import pytest


@pytest.fixture(scope="module")
def compile_quickly():
    """Compilation is nearly all that these tests take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
