"""Shardings that are part of a type, on a mesh of one device with explicit axes.

The checks of types are those of a mesh of any size; ``tests/compiled/test_explicit_meshes.py``
compares values on eight devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adalora_jax._src.core import explicit_axes, low_rank


@pytest.fixture(params=["explicit", "mixed"])
def mesh(request):
    if request.param == "mixed" and jax.__version_info__ < (0, 10, 1):
        pytest.skip("JAX leaves such shardings out of types")
    other = AxisType.Explicit if request.param == "explicit" else AxisType.Auto
    made = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit, other))
    with jax.set_mesh(made):
        yield made


def array(mesh, shape, *spec):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return jax.device_put(values, NamedSharding(mesh, P(*spec)))


def spec(array):
    return low_rank.spec_of_type(array)


def test_arrays_without_explicit_axes_have_no_explicit_mesh():
    automatic = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    for mesh in (None, automatic):
        x = jnp.ones(2) if mesh is None else array(mesh, (2,), "data")
        assert low_rank.explicit_mesh(x) is None
        assert low_rank.explicit_sharding(x, ("data",)) is None
        assert low_rank.reshard(x, x, ("data",)) is x
        assert explicit_axes.replicate(x) is x


def test_first_array_axis_keeps_a_mesh_axis_that_two_ask_for(mesh):
    x = array(mesh, (2, 3), "data")
    assert low_rank.explicit_sharding(x, ("data", ("data", "model"))).spec == P("data", None)


def test_reshard_gives_the_sharding_of_another_array(mesh):
    x = array(mesh, (2, 3), "data")
    moved = low_rank.reshard(x, array(mesh, (2, 3), None, "data"))
    assert spec(moved) == (None, "data")
    assert spec(explicit_axes.replicate(x)) == (None, None)
    np.testing.assert_array_equal(moved, x)


@pytest.mark.parametrize("axis", [0, 1])
def test_take_is_sharded_like_indices_and_other_axes(mesh, axis):
    table = array(mesh, (2, 2, 3), None, None, "data")
    whole = explicit_axes.take(table, jnp.array([1, 0]), axis)
    assert spec(whole) == (None, None, "data")
    np.testing.assert_array_equal(whole, np.asarray(table).take([1, 0], axis))
    split = explicit_axes.take(table, jax.device_put(jnp.array([1, 0]), P("data")), axis)
    expected = [None, None, None]
    expected[axis] = "data"  # the table's last axis yields
    assert spec(split) == tuple(expected)


def test_take_fills_out_of_range_as_without_a_mesh(mesh):
    table = array(mesh, (2, 3), "data")
    np.testing.assert_array_equal(
        explicit_axes.take(table, jnp.array([-1, 5]), 0),
        np.stack([np.asarray(table)[1], np.full(3, np.nan)]),
    )


def test_with_auto_axes_shards_results_like_the_array(mesh):
    x = array(mesh, (4, 6), "data")

    def function(x):  # JAX cannot derive the sharding of the first reshape
        return x.T.reshape(-1)[::-1].reshape(4, 6), x.sum()

    same, total = jax.jit(lambda x: explicit_axes.with_auto_axes(function, x, x))(x)
    assert spec(same) == ("data", None)
    assert spec(total) == ()
    np.testing.assert_array_equal(same, np.asarray(x).T.ravel()[::-1].reshape(4, 6))
