"""The low-rank product's own derivative against JAX's of the same formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from adalora_jax.lowrank import low_rank, low_rank_plain

NAMES = ("x", "p", "c", "q")


def operands(seed=0, tokens=(4,), r=3, n_in=5, n_out=2, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = ((*tokens, n_in), (r, n_out), (r,), (r, n_in))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def scalar(product):
    """A loss in which every output has a weight of its own, and a curvature."""

    def loss(x, p, c, q):
        y = product(x, p, c, q)
        weight = jnp.asarray(np.linspace(-1, 2, y.size).reshape(y.shape), y.dtype)
        return jnp.sum(jnp.sin(y) * weight)

    return loss


def assert_close(ours, theirs, tolerance=1e-10):
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert a.dtype == b.dtype, name
        scale = float(np.abs(np.asarray(b, np.float64)).max(initial=0))
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=tolerance,
            atol=tolerance * scale,
            err_msg=name,
        )


both = lambda transform: [transform(scalar(product)) for product in (low_rank, low_rank_plain)]
gradient = functools.partial(jax.grad, argnums=(0, 1, 2, 3))


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.sampled_from([((), 3, 5, 2), ((4,), 1, 2, 6), ((2, 3), 4, 3, 3), ((3,), 0, 4, 2)]),
)
@settings(max_examples=24, deadline=None, derandomize=True)
def test_the_derivative_is_autodiffs_of_the_plain_form(seed, sizes):
    with jax.enable_x64(True):
        arguments = operands(seed, *sizes)
        ours, theirs = both(gradient)
        assert_close(ours(*arguments), theirs(*arguments))
        np.testing.assert_array_equal(low_rank(*arguments), low_rank_plain(*arguments))


def test_the_derivative_is_the_finite_difference():
    with jax.enable_x64(True):
        check_grads(low_rank, operands(), order=1, modes=["rev"], eps=1e-5)


def test_the_product_is_that_of_the_dense_matrix():
    with jax.enable_x64(True):
        x, p, c, q = operands()
        np.testing.assert_allclose(low_rank(x, p, c, q), x @ (q.T @ jnp.diag(c) @ p), rtol=1e-12)


def test_vmap_over_everything_and_over_the_input_alone():
    with jax.enable_x64(True):
        batch = [jnp.stack(leaves) for leaves in zip(*(operands(seed) for seed in range(3)))]
        for axes in (0, (0, None, None, None)):
            arguments = batch if axes == 0 else [batch[0], *(leaf[0] for leaf in batch[1:])]
            ours, theirs = (jax.vmap(grad, in_axes=axes) for grad in both(gradient))
            assert_close(ours(*arguments), theirs(*arguments))


def test_remat_recomputes_the_same_derivative():
    with jax.enable_x64(True):
        arguments = operands()
        ours = gradient(scalar(jax.checkpoint(low_rank)))
        assert_close(ours(*arguments), both(gradient)[1](*arguments))


def layered(product):
    """Three adapted layers under lax.scan, each with its own factors."""

    def apply(x, p, c, q):
        layer = lambda h, factors: (jnp.tanh(h + product(h, *factors)), None)
        return jax.lax.scan(layer, x, (p, c, q))[0]

    return apply


def test_a_scan_over_stacked_layers_has_the_same_derivative():
    with jax.enable_x64(True):
        layers = [operands(seed, n_in=5, n_out=5) for seed in range(3)]
        factors = [jnp.stack(leaves) for leaves in zip(*(layer[1:] for layer in layers))]
        ours, theirs = (gradient(scalar(layered(f))) for f in (low_rank, low_rank_plain))
        assert_close(ours(layers[0][0], *factors), theirs(layers[0][0], *factors))


def test_second_derivatives_are_autodiffs():
    """Reverse over reverse: the custom rule leaves forward mode to ``low_rank_plain``."""
    with jax.enable_x64(True):
        arguments = operands(tokens=(2,), r=2, n_in=2, n_out=2)
        hessians = lambda f: jax.jacrev(gradient(f), argnums=(0, 1, 2, 3))
        ours, theirs = (jax.jit(hessian)(*arguments) for hessian in both(hessians))
        for row, expected in zip(ours, theirs):
            assert_close(row, expected)
        assert all(np.abs(ours[i][j]).max() > 0.01 for i in range(4) for j in range(4))


def test_plain_has_forward_mode_and_low_rank_says_no():
    x, p, c, q = operands(dtype=np.float32)
    _, tangent = jax.jvp(lambda c: low_rank_plain(x, p, c, q), (c,), (2 * c,))
    np.testing.assert_allclose(tangent, 2 * low_rank(x, p, c, q), rtol=1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda c: low_rank(x, p, c, q), (c,), (c,))


@pytest.mark.parametrize("factors", ["bfloat16", "float32"])
def test_bfloat16_keeps_its_dtypes_and_the_accuracy_of_its_inputs(factors):
    x, p, c, q = operands(tokens=(64,), dtype=np.float32)
    rounded = [x.astype("bfloat16"), *(leaf.astype(factors) for leaf in (p, c, q))]
    ours = gradient(scalar(lambda *a: low_rank(*a).astype(jnp.float32)))(*rounded)
    assert [leaf.dtype for leaf in ours] == [leaf.dtype for leaf in rounded]
    exact = gradient(scalar(low_rank_plain))(*(leaf.astype("float32") for leaf in rounded))
    for name, a, b in zip(NAMES, ours, exact):
        worst = float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
        assert worst < 0.03, f"{name}: {worst}"
        if a.dtype == jnp.float32:
            assert np.any(a != a.astype("bfloat16").astype("float32")), f"{name} was rounded"


def test_sums_over_many_bfloat16_tokens_do_not_stall():
    """4096 equal terms: a bfloat16 sum stops at 256 of them."""
    tokens = 4096
    x, one = jnp.ones((tokens, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    loss = lambda p, c, q: jnp.sum(low_rank(x, p, c, q).astype(jnp.float32))
    for slope in jax.grad(loss, argnums=(0, 1, 2))(one, jnp.ones(1, jnp.bfloat16), one):
        assert float(slope.ravel()[0]) == tokens


@pytest.mark.parametrize("precision", [None, "highest", jax.lax.Precision.HIGH])
def test_precision_is_static_and_passed_on(precision):
    x, p, c, q = operands(dtype=np.float32)
    text = jax.jit(functools.partial(low_rank, precision=precision)).lower(x, p, c, q).as_text()
    expected = {None: "DEFAULT", "highest": "HIGHEST"}.get(precision, "HIGH")
    assert text.count(f"precision = [{expected}, {expected}]") == 2
