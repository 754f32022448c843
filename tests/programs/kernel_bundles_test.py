"""The table of kernels calls them as they are."""

import jax
import pytest

from tests.programs import kernel_bundles


@pytest.mark.parametrize("name", kernel_bundles.KERNELS)
def test_each_kernel_can_be_traced(name):
    function, shapes = kernel_bundles.KERNELS[name]()
    arguments = [jax.ShapeDtypeStruct(*x) for x in shapes]
    assert "pallas_call" in str(jax.make_jaxpr(function)(*arguments))
