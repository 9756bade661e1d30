"""Initial values of adapters: custom, orthonormal, and with λ at one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as al

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)
LONG = al.AdaLoraConfig(total_step=1000, init_r=12, target_r=8)


def test_custom_init_is_called_for_each_matrix():
    def ones(key, ins, outs, rank, dtype):
        value = jax.random.uniform(key)
        return (value * jnp.ones((rank, outs)), jnp.zeros(rank), jnp.ones((rank, ins)))

    config = CONFIG.replace(init=ones, param_dtype="bfloat16")
    one = al.init_adapter(jax.random.key(0), 3, 5, config)
    assert [(leaf.shape, leaf.dtype) for leaf in one] == [
        (shape, jnp.bfloat16) for shape in ((4, 5), (4,), (4, 3))
    ]
    many = al.init_adapter(jax.random.key(0), 3, 5, config, stack=(2, 3), rank=2)
    assert [leaf.shape for leaf in many] == [(2, 3, 2, 5), (2, 3, 2), (2, 3, 2, 3)]
    assert len(set(np.asarray(many.p[..., 0, 0], np.float32).ravel().tolist())) == 6


def test_custom_init_of_wrong_shapes_raises():
    config = CONFIG.replace(init=lambda key, ins, outs, rank, dtype: [jnp.ones((ins, rank))] * 3)
    message = r"`init=.*`: returned the shapes .*; return .* shapes \[\(4, 5\), \(4,\)"
    with pytest.raises(ValueError, match=message):
        al.init_adapter(jax.random.key(0), 3, 5, config)


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ins", "outs"), [(9, 7), (9, 3), (4, 4)])
def test_orthonormal_init_makes_rows_or_columns_orthonormal(stack, dtype, ins, outs):
    config = CONFIG.replace(init="orthonormal", param_dtype=dtype)
    adapter = al.init_adapter(jax.random.key(0), ins, outs, config, stack=stack)
    assert {leaf.dtype for leaf in adapter} == {jnp.dtype(dtype)}
    assert not np.any(adapter.lam)
    for matrix in (adapter.p, adapter.q):
        matrix = np.asarray(matrix, np.float64).reshape(-1, *matrix.shape[-2:])
        for one, other in itertools.pairwise([*matrix, matrix[0] + 1]):
            short = one if len(one) <= one.shape[1] else one.T
            np.testing.assert_allclose(
                short @ short.T, np.eye(len(short)), atol=1e-6 if dtype == "float32" else 2e-2
            )
            assert not np.allclose(one, other)


def test_orthonormal_init_is_isotropic():
    """Over many draws, each entry of 2 orthonormal rows of 3 has mean 0 and variance 1/3."""
    config = CONFIG.replace(init="orthonormal")
    q = al.init_adapter(jax.random.key(1), 3, 3, config, rank=2, stack=(20000,)).q
    np.testing.assert_allclose(q.mean(axis=0), np.zeros((2, 3)), atol=0.02)
    np.testing.assert_allclose(q.var(axis=0), np.full((2, 3), 1 / 3), atol=0.01)


def test_lambda_one_starts_at_one_and_adds_nothing_until_p_moves():
    config = LONG.replace(init="lambda_one")
    adapter = al.init_adapter(jax.random.key(0), 6, 5, config)
    assert adapter.lam.tolist() == [1.0] * 12
    assert not np.any(adapter.p)
    assert 0.015 < float(jnp.std(adapter.q)) < 0.025
    x, kernel = jnp.ones((2, 6)), jax.random.normal(jax.random.key(1), (6, 5))
    y = al.forward(adapter, x, kernel)
    np.testing.assert_array_equal(y, x @ kernel)
    slope = jax.grad(lambda a: jnp.sum(al.forward(a, x, kernel)))(adapter)
    assert np.all(slope.p)
    assert not np.any(slope.lam)
