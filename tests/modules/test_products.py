"""The product of input and weight that a layer computes, derived from its program."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalora_jax._src.modules import products

X = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
W = jax.ShapeDtypeStruct((5, 4), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 3), jnp.int32)
DENSE = ("abd", "df", "abf")
ROWS = ("ab", "vd", "abd")


def problem(function, labels, x=X, w=W):
    jaxpr = jax.make_jaxpr(function)(w, x).jaxpr
    return products.problem_with(jaxpr, 0, 1, labels)


def stacked(w, x):
    return jnp.einsum("ged,edf->gef", x, w)


def heads(w, x):
    return jnp.tensordot(x.reshape(2, 15), w.reshape(15, 4), 1)


EXACT = {
    "matmul": (lambda w, x: x @ w, DENSE, X, W),
    "jitted": (jax.jit(lambda w, x: x @ w), DENSE, X, W),
    "rematerialised": (jax.checkpoint(lambda w, x: x @ w), DENSE, X, W),
    "weight first": (lambda w, x: jnp.einsum("df,abd->abf", w, x), DENSE, X, W),
    "transposed": (lambda w, x: x @ w.T, ("abd", "fd", "abf"), X, (4, 5)),
    "cast": (lambda w, x: x.astype("bfloat16") @ w.astype("bfloat16"), DENSE, X, W),
    "bias": (lambda w, x: jnp.ones((2, 3, 4)) + x @ w, DENSE, X, W),
    "term of the input": (lambda w, x: x @ w - jnp.tanh(x[..., :4]), DENSE, X, W),
    "not used further": (lambda w, x: (jnp.tanh(w), x @ w)[1], DENSE, X, W),
    "several axes": (
        lambda w, x: jnp.tensordot(x, w, 2),
        ("abd", "bdf", "af"),
        X,
        (3, 5, 4),
    ),
    "joined axes": (heads, ("abd", "bdf", "af"), X, (3, 5, 4)),
    "joined before the product": (lambda w, x: (x.reshape(6, 5) @ w).reshape(2, 3, 4), DENSE, X, W),
    "axis of size 1": (lambda w, x: x @ w, DENSE, (2, 1, 5), (5, 1)),
    "experts": (stacked, ("ged", "edf", "gef"), X, (3, 5, 4)),
    "look-up": (lambda w, x: w[x], ROWS, IDS, W),
    "take": (lambda w, x: jnp.take(w, x, axis=0), ROWS, IDS, W),
    "look-up of columns": (lambda w, x: w.T[x], ("ab", "dv", "abd"), IDS, W),
}


def struct(value):
    return jax.ShapeDtypeStruct(value, jnp.float32) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", EXACT)
def test_product_is_found(name):
    function, labels, x, w = EXACT[name]
    assert problem(function, labels, struct(x), struct(w)) == ""


SQUARE = (5, 5)
OTHER = {
    "activation": (lambda w, x: jnp.tanh(x @ w), DENSE, X, W, "applies `tanh` to the product"),
    "factor": (lambda w, x: 2 * (x @ w), DENSE, X, W, "applies `mul` to the product"),
    "subtracted": (lambda w, x: 1 - x @ w, DENSE, X, W, "applies `sub` to the product"),
    "twice": (lambda w, x: x @ w + x @ w, DENSE, X, W, "applies `add` to the product"),
    "weight changed": (lambda w, x: x @ jnp.tanh(w), DENSE, X, W, "applies `tanh` to its weight"),
    "weight quantised": (
        lambda w, x: x @ w.astype("int8").astype("float32"),
        *(DENSE, X, W, "applies `convert_element_type` to its weight"),
    ),
    "input changed": (lambda w, x: jnp.tanh(x) @ w, DENSE, X, W, "another array than its input"),
    "weight squared": (lambda w, x: x @ (w @ w), DENSE, X, SQUARE, "another array than its input"),
    "weight repeated": (
        lambda w, x: (x[:, :, None] @ jnp.broadcast_to(w, (2, 3, 5, 4)))[:, :, 0],
        *(DENSE, X, W, "`broadcast_in_dim` to its weight"),
    ),
    "other axis summed": (lambda w, x: x @ w.T, DENSE, X, SQUARE, "computes abc,dc->abd"),
    "other order": (
        lambda w, x: jnp.einsum("abd,df->afb", x, w),
        *(DENSE, (2, 5, 5), SQUARE, "computes abc,cd->adb"),
    ),
    "batch of another axis": (
        lambda w, x: jnp.einsum("bed,edf->bef", x, w),
        *(("bed", "edf", "ebf"), (3, 3, 5), (3, 5, 4), "computes abc,bcd->abd"),
    ),
    "joined result": (
        lambda w, x: (x @ w).reshape(6, 4),
        *(DENSE, X, W, r"computes abc,cd->\(ab\)d"),
    ),
    "loop": (
        lambda w, x: jax.lax.map(lambda row: row @ w, x),
        *(DENSE, X, W, "applies `scan` to its weight"),
    ),
    "independent": (lambda w, x: x[..., :4], DENSE, X, W, "does not depend on its weight"),
    "several results": (lambda w, x: (x @ w, x), DENSE, X, W, "it returns 2 arrays"),
    "other rows": (lambda w, x: w[x + 2], ROWS, IDS, W, "to its weight"),
    "remainder of rows": (lambda w, x: w[x % 3], ROWS, IDS, W, "to its weight"),
    "columns": (lambda w, x: w[:, x], ROWS, IDS, SQUARE, "computes ab,cd->cab"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_computation_is_named(name):
    function, labels, x, w, message = OTHER[name]
    found = problem(function, labels, struct(x), struct(w))
    assert found
    assert re.search(message, found), found


def test_product_that_is_found_is_what_numpy_computes():
    rng = np.random.default_rng(0)
    for name, (function, labels, x, w) in EXACT.items():
        if x is IDS or name in ("bias", "term of the input", "cast"):
            continue
        arrays = [rng.normal(size=struct(value).shape).astype("float32") for value in (w, x)]
        want = np.einsum(f"{labels[0]},{labels[1]}->{labels[2]}", arrays[1], arrays[0])
        np.testing.assert_allclose(function(*map(jnp.asarray, arrays)), want, rtol=1e-5, atol=1e-5)
