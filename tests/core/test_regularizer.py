"""The orthogonality penalty: values, and derivatives finite where those of a plain norm are not."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adalora_jax as al
from adalora_jax._src.core.regularizer import deviation

orthogonality_room = importlib.import_module("adalora_jax._src.core.regularizer")
EYE = np.eye(3, 5, dtype=np.float32)
NORMAL = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
ROTATED = np.linalg.qr(NORMAL.T.astype(np.float64))[0].T.astype(np.float32)
POINTS = {
    "orthonormal": EYE,
    "orthonormal but for rounding": ROTATED,
    "almost orthonormal": EYE + np.float32(1e-12) * NORMAL,
    "a deviation whose square underflows": EYE + np.float32(1e-25) * (EYE == 0),
    "zero": 0 * EYE,
    "tiny": np.float32(1e-30) * NORMAL,
    "rank 0": np.zeros((0, 5), np.float32),
    "rank 1": NORMAL[:1],
    "a row of zeros": NORMAL * np.float32([[1], [0], [1]]),
    "equal rows": np.ones_like(NORMAL),
    **{f"huge {s:.0e}": np.float32(s) * NORMAL for s in (1e3, 1e6, 1e10, 1e15, 1e18, 1e20)},
    "huge orthogonal": np.float32(1e20) * EYE,
    "one huge entry": EYE + np.float32(1e20) * (np.arange(15).reshape(3, 5) == 7),
}
# Above this the gradient 4 D M of the square overflows float32.
SQUARED = {name: m for name, m in POINTS.items() if np.abs(m).max(initial=0) <= 1e10}

first = jax.jit(jax.grad(deviation))
second = jax.jit(jax.hessian(deviation))
second_in_reverse = jax.jit(jax.jacrev(jax.grad(deviation)))


def square(m):
    return deviation(m) ** 2


first_squared = jax.jit(jax.grad(square))
second_squared = jax.jit(jax.hessian(square))


def naive(m, norm=jnp.linalg.norm):
    """Return the penalty of one matrix by the textbook formula."""
    return norm(m @ m.T - jnp.eye(len(m), dtype=m.dtype))


@pytest.mark.parametrize("name", POINTS)
def test_first_and_second_derivatives_are_finite(name):
    m = POINTS[name]
    assert np.isfinite(first(m)).all()
    assert np.isfinite(second(m)).all()
    assert np.isfinite(second_in_reverse(m)).all()


@pytest.mark.parametrize("name", SQUARED)
def test_squared_form_derivatives_are_finite(name):
    assert np.isfinite(first_squared(SQUARED[name])).all()
    assert np.isfinite(second_squared(SQUARED[name])).all()


def test_naive_norm_gradient_is_not_finite_at_tested_points():
    """Exact orthonormality and 1e20 make the naive gradient fail, so these points are needed."""
    assert np.isnan(jax.grad(naive)(jnp.asarray(POINTS["orthonormal"]))).any()
    assert not np.isfinite(jax.grad(naive)(jnp.asarray(POINTS["huge 1e+20"]))).all()


def test_gradient_is_zero_at_orthonormality_and_at_zero():
    np.testing.assert_array_equal(first(POINTS["orthonormal"]), np.zeros((3, 5)))
    np.testing.assert_array_equal(first(POINTS["zero"]), np.zeros((3, 5)))


def test_huge_matrix_gradient_matches_float64():
    for scale in (1e3, 1e10, 1e18):
        wide = scale * NORMAL.astype(np.float64)
        d = wide @ wide.T - np.eye(3)
        expected = 2 * d / np.linalg.norm(d) @ wide
        np.testing.assert_allclose(first(np.float32(scale) * NORMAL), expected, rtol=1e-5)


def test_overflow_gives_infinite_value_and_zero_gradient():
    stack = jnp.stack([NORMAL, np.float32(1e20) * NORMAL])
    value, slope = deviation(stack), jax.grad(lambda m: deviation(m)[0])(stack)
    assert np.isfinite(value[0])
    assert np.isposinf(value[1])
    np.testing.assert_array_equal(first(stack[1]), np.zeros((3, 5)))
    np.testing.assert_allclose(slope[0], first(NORMAL), rtol=1e-6)


@pytest.mark.parametrize("form", ["frobenius", "squared"])
def test_joined_matrices_match_separate_ones(form):
    """This form is compiled where kernel launches are slow; the other has a product per matrix."""
    config = al.AdaLoraConfig(total_step=10, orthogonality=form, init_lora_weights=False)
    sizes = dict.fromkeys(("h/0", "h/1", "h/2"), (5, 4, (3,)))
    sizes |= {"c": (6, 5, ()), "d": (4, 6, (2, 2))}
    adapters = {
        name: al.init_adapter(jax.random.key(i), inputs, outputs, config, stack=stack)
        for i, (name, (inputs, outputs, stack)) in enumerate(sizes.items())
    }
    matrices = {(n, f): getattr(a, f) for n, a in adapters.items() for f in ("p", "q")}
    joined = orthogonality_room._joined(matrices)
    one_by_one = np.concatenate([np.ravel(deviation(m)) for m in matrices.values()])
    np.testing.assert_allclose(np.sort(joined), np.sort(one_by_one), rtol=1e-6)
    lowered = jax.jit(al.orthogonality, static_argnums=1).trace(adapters, config)
    products = lowered.lower(lowering_platforms=("cuda",)).as_text().count("dot_general")
    assert products == 2 * len({"h", "c", "d"})


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.01, 30.0),
    shape=st.sampled_from([(3, 5), (4, 2)]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_value_and_derivatives_match_naive_formula(seed, scale, shape):
    with jax.enable_x64(True):
        m = jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))
        for ours, theirs in CHECKS:
            expected = np.asarray(theirs(m))
            np.testing.assert_allclose(
                ours(m), expected, rtol=1e-9, atol=1e-9 * abs(expected).max()
            )


CHECKS = [
    (deviation, naive),
    (first, jax.jit(jax.grad(naive))),
    (second, jax.jit(jax.hessian(naive))),
    (second_in_reverse, jax.jit(jax.hessian(naive))),
]


def test_gradient_matches_finite_difference():
    with jax.enable_x64(True):
        m = jnp.asarray(NORMAL.astype(np.float64))
        slope = np.asarray(jax.grad(deviation)(m))
        for index in np.ndindex(m.shape):
            ends = [float(deviation(m.at[index].add(move))) for move in (1e-6, -1e-6)]
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope[index], rtol=1e-6)


@pytest.mark.parametrize("form", ["frobenius", "squared"])
def test_stack_slices_count_as_separate_matrices(form):
    config = al.AdaLoraConfig(total_step=10, orthogonality=form, orth_reg_weight=0.3)
    stacked = al.init_adapter(
        jax.random.key(0), 5, 4, config.replace(init_lora_weights=False), stack=(2, 3)
    )
    slices = {
        f"{i}{j}": jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], stacked)
        for i in range(2)
        for j in range(3)
    }
    together, apart = (al.orthogonality(tree, config) for tree in ({"all": stacked}, slices))
    np.testing.assert_allclose(together, apart, rtol=1e-6)
    assert together > 1


def test_forms_are_mean_of_norms_and_sum_of_squares():
    adapter = al.Adapter(p=2 * jnp.eye(3), lam=jnp.zeros(3), q=jnp.eye(3))
    config = al.AdaLoraConfig(total_step=10, orth_reg_weight=0.1)
    np.testing.assert_allclose(
        al.orthogonality({"a": adapter}, config), 0.1 * 27**0.5 / 2, rtol=1e-6
    )
    squared = config.replace(orthogonality="squared")
    np.testing.assert_allclose(al.orthogonality({"a": adapter}, squared), 0.1 * 27, rtol=1e-6)


def test_penalty_ignores_lam_and_other_parameters():
    config = al.AdaLoraConfig(total_step=10)
    adapter = al.init_adapter(jax.random.key(0), 5, 4, config)
    alone = al.orthogonality({"a": adapter}, config)
    tree = {"a": adapter._replace(lam=adapter.lam + 7), "head": jnp.ones(3)}
    assert al.orthogonality(tree, config) == alone
    grads = jax.grad(al.orthogonality)(tree, config)
    assert not np.any(grads["a"].lam)
    assert not np.any(grads["head"])
    assert np.any(grads["a"].p)


def test_bfloat16_is_summed_in_float32():
    m = jnp.asarray(NORMAL, jnp.bfloat16)
    assert deviation(m).dtype == jnp.float32
    np.testing.assert_allclose(deviation(m), naive(m.astype(jnp.float32)), rtol=1e-6)
    slope = jax.grad(deviation)(m)
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        slope.astype("float32"), jax.grad(naive)(m.astype(jnp.float32)), rtol=1e-2
    )


def test_tree_without_adapters_raises():
    with pytest.raises(ValueError, match="`adapters`: no adapter was found in the dict"):
        al.orthogonality({"head": jnp.ones(3)}, al.AdaLoraConfig(total_step=10))
