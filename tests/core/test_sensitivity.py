"""Sensitivities and their moving averages, element by element."""

import jax.numpy as jnp
import numpy as np
import pytest

from adalora_jax._src.core.sensitivity import raw_sensitivity, smooth


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_sensitivity_is_computed_in_float32(dtype):
    """256² does not fit into float16."""
    value = jnp.full(3, 256, dtype)
    found = raw_sensitivity(value, -value)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 65_536)


def test_uncertainty_uses_the_new_average():
    mean, deviation = smooth(*map(jnp.float32, (10.0, 2.0, 1.0)), (0.5, 0.75))
    assert (float(mean), float(deviation)) == (6.0, 0.75 * 1 + 0.25 * 4)
