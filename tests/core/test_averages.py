"""Moving averages of the sensitivities, against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax._src.core import averages
from adalora_jax._src.core.averages import update_averages
from adalora_jax._src.core.roles import group_by_role, stack

BETAS = (0.9, 0.8)
SIZES = {
    **{f"h/{i}/up": (2, 6) for i in range(3)},
    **{f"h/{i}/down": (6, 2) for i in range(3)},
    "head": (4, 3),
}


def random(seed, dtype=jnp.float32, stacked=()):
    def one(key, inputs, outputs):
        p, lam, q = jax.random.split(key, 3)
        return adalora.Adapter(
            jax.random.normal(p, (*stacked, 2, outputs), dtype),
            jax.random.normal(lam, (*stacked, 2), dtype),
            jax.random.normal(q, (*stacked, 2, inputs), dtype),
        )

    keys = jax.random.split(jax.random.key(seed), len(SIZES))
    return {path: one(key, *size) for key, (path, size) in zip(keys, SIZES.items())}


@pytest.fixture(params=["all small", "downs large", "all large"])
def limit(request, monkeypatch):
    """Set the number of parameters from which a role is large; ups and downs have 54 each."""
    limits = {"all small": 10**9, "downs large": 40, "all large": 0}
    monkeypatch.setattr(averages, "LARGE", limits[request.param])
    if request.param == "downs large":
        is_large = averages._is_large
        monkeypatch.setattr(averages, "_is_large", lambda a: a.p.shape[-1] == 2 and is_large(a))


def before(adapters):
    roles = group_by_role(adapters)
    return tuple(
        stack(roles, jax.tree.map(lambda x: jnp.abs(x.astype(jnp.float32)), random(seed)))
        for seed in (2, 3)
    )


def updated(old, weights, gradients, wanted=True):
    arguments = old, weights, gradients, BETAS, jnp.asarray(wanted)
    return jax.jit(update_averages, static_argnums=3)(*arguments)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("by_role", [False, True])
def test_averages_follow_equations(limit, dtype, by_role):
    weights, gradients = random(0, dtype), random(1, dtype)
    old = before(weights)
    mean, deviation = (dict(average) for average in old)
    if by_role:
        weights, gradients = (stack(old[0].roles, values) for values in (weights, gradients))
    (new_mean, new_deviation), finite = updated(old, weights, gradients)
    assert finite
    assert list(new_mean) == list(SIZES)
    for path in SIZES:
        for name in ("p", "lam", "q"):
            w, g, m, d = (
                np.asarray(getattr(values[path], name), np.float32)
                for values in (weights, gradients, mean, deviation)
            )
            raw = np.abs(w * g)
            m = np.float32(0.9) * m + np.float32(0.1) * raw
            d = np.float32(0.8) * d + np.float32(0.2) * np.abs(raw - m)
            np.testing.assert_allclose(getattr(new_mean[path], name), m, rtol=1e-6)
            np.testing.assert_allclose(getattr(new_deviation[path], name), d, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["p", "lam", "q"])
@pytest.mark.parametrize("path", ["h/1/up", "h/2/down", "head"])
def test_sensitivity_that_is_not_finite_changes_nothing(limit, path, name, value):
    weights, gradients = random(0), random(1)
    leaf = getattr(gradients[path], name)
    last = (-1,) * leaf.ndim
    gradients[path] = gradients[path]._replace(**{name: leaf.at[last].set(value)})
    old = before(weights)
    new, finite = updated(old, weights, gradients)
    assert not finite
    assert_equal(new, old)


def test_product_that_overflows_is_not_finite(limit):
    weights, gradients = random(0), random(1)
    large = jax.tree.map(lambda x: jnp.full_like(x, 1e30), weights["h/0/up"])
    _, finite = updated(
        before(weights), {**weights, "h/0/up": large}, {**gradients, "h/0/up": large}
    )
    assert not finite


def test_unwanted_averages_do_not_change(limit):
    weights, gradients = random(0), random(1)
    old = before(weights)
    new, finite = updated(old, weights, gradients, wanted=False)
    assert finite
    assert_equal(new, old)


def test_platforms_agree(limit):
    """Values may differ in the last bit, because fusions differ."""
    arguments = (weights := random(0)), random(1)
    arguments = before(weights), *arguments, BETAS, jnp.asarray(True)
    branches, selection = (
        jax.jit(function, static_argnums=3)(*arguments)
        for function in (averages._by_branches, averages._by_selection)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), branches, selection)
