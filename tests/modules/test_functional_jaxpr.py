"""A function's jaxpr with increments computes the function of ``W + ΔW``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax._src.modules.functional_jaxpr import evaluate
from adalora_jax._src.modules.functional_layouts import find_layouts
from adalora_jax._src.modules.layers import merged_weight
from modules.functional_models import draw


class Case(NamedTuple):
    """A function of a weight and an input, their shapes, and whether it forms no increment."""

    fn: Callable
    weight: tuple[int, ...]
    is_low_rank: bool = True
    x: tuple[int, ...] = (2, 5)


@jax.custom_vjp
def _product(x, w):
    return x @ w


_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def _scan(step, **options):
    return lambda w, x: jax.lax.scan(lambda x, w: (step(w, x), x.sum()), x, w, **options)


def _tanh(w, x):
    return jnp.tanh(x @ w)


def _conv(*numbers, **options):
    return lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 2), "SAME", dimension_numbers=numbers or None, **options
    )


_IDS = np.array([[1, 2, 3], [5, 0, 5]])
_SIZES, _FOUR = jnp.array([2, 0, 3]), jnp.array([1, 2, 0, 2])  # of six rows, the last in no group
CASES = {
    "dense": Case(lambda w, x: x @ w, (5, 7)),
    "out-in": Case(lambda w, x: x @ w.T, (7, 5)),
    "weight-on-the-left": Case(lambda w, x: (w @ x.T).T, (7, 5)),
    "vmap-over-inputs": Case(lambda w, x: jax.vmap(lambda x: w @ x)(x), (7, 5)),
    "vmap-over-weights": Case(lambda w, x: jax.vmap(jnp.matmul)(x, w), (2, 5, 7), x=(2, 3, 5)),
    "jit": Case(jax.jit(lambda w, x: jax.jit(jnp.dot)(x, w.T)), (7, 5)),
    "called-again": Case(lambda w, x: _tanh(w, _tanh(w, x)), (5, 5)),
    "transposed-again": Case(lambda w, x: jnp.tanh(x @ w) @ w.T, (5, 7)),
    "heads": Case(lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (5, 2, 7)),
    "heads-out": Case(lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), (3, 5, 7), x=(2, 3, 5)),
    "experts": Case(lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 5, 7), x=(3, 2, 5)),
    "reshaped-to-heads": Case(lambda w, x: jnp.tensordot(x, w.reshape(5, 2, 7), 1), (5, 14)),
    "heads-flattened": Case(lambda w, x: x @ w.reshape(5, 14), (5, 2, 7)),
    "scan": Case(_scan(_tanh), (3, 5, 5)),
    "scan-reversed-and-unrolled": Case(_scan(_tanh, reverse=True, unroll=2), (3, 5, 5)),
    "scan-of-remat": Case(_scan(jax.checkpoint(lambda w, x: jnp.tanh(x @ w.T))), (3, 5, 5)),
    "scan-in-scan": Case(_scan(lambda w, x: _scan(_tanh)(w, x)[0]), (2, 3, 5, 5)),
    "indexed-stack": Case(lambda w, x: _tanh(w[2], _tanh(w[0], x)), (3, 5, 5)),
    "loop-over-stack": Case(
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, x: _tanh(w[i], x), x), (3, 5, 5)
    ),
    "remat": Case(jax.checkpoint(_tanh, policy=jax.checkpoint_policies.dots_saveable), (5, 7)),
    "cond": Case(lambda w, x: jax.lax.cond(x.sum() > 0, _tanh, lambda w, x: x @ w, w, x), (5, 7)),
    "look-up": Case(lambda w, x: w[_IDS] * x.sum(), (11, 7)),
    "take-along-columns": Case(lambda w, x: jnp.take(w, _IDS, axis=1) + x.sum(), (7, 11)),
    "tied": Case(lambda w, x: jnp.tanh(w[_IDS]) @ w.T * x.sum(), (11, 7)),
    "conv": Case(_conv("NHWC", "HWIO", "NHWC"), (3, 3, 5, 7), x=(2, 6, 6, 5)),
    "conv-out-in": Case(_conv(), (7, 5, 3, 3), x=(2, 5, 6, 6)),
    "custom-jvp": Case(lambda w, x: jax.nn.silu(x @ w), (5, 7)),
    "gradient-inside": Case(lambda w, x: jax.grad(lambda x: _tanh(w, x).sum())(x), (5, 7)),
    "bfloat16-computation": Case(
        lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (5, 7)
    ),
    "ragged": Case(lambda w, x: jax.lax.ragged_dot(x, w, _SIZES), (3, 5, 7), x=(6, 5)),
    "ragged-out-in": Case(
        lambda w, x: jax.lax.ragged_dot(x, w.swapaxes(1, 2), _SIZES), (3, 7, 5), x=(6, 5)
    ),
    "ragged-up-and-down": Case(
        lambda w, x: jax.lax.ragged_dot(
            jnp.tanh(jax.lax.ragged_dot(x, w, _SIZES)), w.swapaxes(1, 2), _SIZES
        ),
        (3, 5, 7),
        x=(6, 5),
    ),
    "ragged-fused-gate": Case(
        lambda w, x: jax.lax.ragged_dot(x, w.transpose(0, 3, 1, 2).reshape(3, 5, 14), _SIZES),
        (3, 2, 7, 5),
        x=(6, 5),
    ),
    "ragged-group-of-stack-axes": Case(
        lambda w, x: jax.lax.ragged_dot(x, w.swapaxes(0, 1).reshape(4, 5, 7), _FOUR),
        (2, 2, 5, 7),
        x=(6, 5),
    ),
    "ragged-general": Case(
        lambda w, x: jax.lax.ragged_dot_general(
            x, w, _SIZES, jax.lax.RaggedDotDimensionNumbers((([0, 3], [3, 0]), ([], [])), [2], [2])
        ),
        (5, 7, 3, 2),
        x=(2, 3, 6, 5),
    ),
    "scan-of-ragged": Case(
        _scan(lambda w, x: jnp.tanh(jax.lax.ragged_dot(x, w, _SIZES))), (2, 3, 5, 5), x=(6, 5)
    ),
    "ragged-bfloat16-computation": Case(
        lambda w, x: jax.lax.ragged_dot(
            x.astype(jnp.bfloat16),
            w.astype(jnp.bfloat16),
            _SIZES,
            preferred_element_type=jnp.float32,
        ),
        (3, 5, 7),
        x=(6, 5),
    ),
    "vmap-of-ragged": Case(
        lambda w, x: jax.vmap(jax.lax.ragged_dot)(x, w, jnp.stack([_SIZES, _SIZES])),
        (2, 3, 5, 7),
        x=(2, 6, 5),
    ),
    # These form the sum, W + ΔW.
    "ragged-on-the-left": Case(
        lambda w, x: x @ w + jax.lax.ragged_dot(w, jnp.stack([x, 2 * x, x]), _SIZES)[:4, :4],
        (6, 4),
        False,
        x=(4, 6),
    ),
    "conv-groups": Case(_conv(feature_group_count=2), (4, 5, 3, 3), False, (2, 10, 6, 6)),
    "conv-transpose": Case(
        lambda w, x: jax.lax.conv_transpose(x, w, (2, 2), "SAME", transpose_kernel=True),
        (3, 3, 7, 5),
        False,
        (2, 4, 4, 5),
    ),
    "custom-vjp": Case(lambda w, x: _product(x, w), (5, 7), False),
    "split": Case(lambda w, x: sum(x @ part for part in jnp.split(w, 2, 1)), (5, 14), False),
    "integers": Case(lambda w, x: x @ w.astype(jnp.int8).astype(x.dtype), (5, 7), False),
    "float8": Case(lambda w, x: x @ w.astype(jnp.float8_e4m3fn).astype(x.dtype), (5, 7), False),
    "reduced-precision": Case(lambda w, x: x @ jax.lax.reduce_precision(w, 4, 3), (5, 7), False),
    "norm-of-weight": Case(
        lambda w, x: x @ w * jnp.broadcast_to(jnp.abs(w).sum(), (2, 7)), (5, 7), False
    ),
}


def prepared(case, dtype=jnp.float32):
    """Return a case's weight, input, jaxpr and an adapter with random factors."""
    w, x = draw(*case.weight).astype(dtype), draw(*case.x).astype(dtype)
    closed = jax.make_jaxpr(case.fn)(w, x)
    layer = find_layouts(closed, {0: "w"}, [w, x])[0]
    stack, ins, outs = layer.matrix(w.shape)
    adapter = adalora.Adapter(
        *(draw(*stack, 3, outs), draw(*stack, 3, seed=1), draw(*stack, 3, ins, seed=2)), 0.5, layer
    )
    return w, x, closed, adapter


def merged(w, adapter):
    return merged_weight("w", w, adapter, adapter.layout, safe=False)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_sum(name):
    case = CASES[name]
    w, x, closed, adapter = prepared(case)

    def ours(adapter, x):
        return evaluate(closed, [w, x], {0: adapter})

    def theirs(adapter, x):
        return jax.tree.leaves(case.fn(merged(w, adapter), x))

    def total(function):
        return lambda *args: sum(jnp.tanh(y.astype("float32")).sum() for y in function(*args))

    tolerance = 3e-2 if "bfloat16" in name else 1e-4
    changed = jax.tree.leaves(case.fn(w, x))[0] - theirs(adapter, x)[0]
    assert jnp.abs(changed).max() > 0.01
    for function in (lambda f: f, lambda f: jax.grad(total(f), argnums=(0, 1))):
        a, b = (jax.jit(function(f))(adapter, x) for f in (ours, theirs))
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            scale = np.abs(np.asarray(other, np.float32)).max() + 1e-6
            np.testing.assert_allclose(
                np.asarray(one, np.float32), np.asarray(other, np.float32), 0, tolerance * scale
            )


def additions(jaxpr):
    """Return the sorted shapes of all sums in a jaxpr and in those inside it."""
    found = [
        sorted(eqn.outvars[0].aval.shape)
        for eqn in jaxpr.eqns
        if eqn.primitive.name in ("add", "add_any")
    ]
    for inner in _inner(jaxpr):
        found += additions(inner)
    return found


def _inner(jaxpr):
    for eqn in jaxpr.eqns:
        for leaf in jax.tree.leaves([*eqn.params.values()], is_leaf=lambda n: hasattr(n, "eqns")):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield inner


@pytest.mark.parametrize("name", CASES)
def test_increment_is_formed_only_where_no_low_rank_product_fits(name):
    case = CASES[name]
    w, x, closed, adapter = prepared(case)
    jaxpr = jax.make_jaxpr(lambda a: evaluate(closed, [w, x], {0: a}))(adapter).jaxpr
    lifted = w.ndim - adapter.layout.ndim
    sizes = {tuple(sorted(w.shape[lead:])) for lead in range(lifted + 1)}
    formed = [shape for shape in additions(jaxpr) if tuple(shape) in sizes]
    assert (not formed) == case.is_low_rank


@pytest.mark.parametrize("name", ["dense", "heads", "look-up", "conv", "split", "tied"])
def test_zero_increment_changes_no_bit(name):
    w, x, closed, adapter = prepared(CASES[name])
    adapter = adapter._replace(lam=jnp.zeros_like(adapter.lam))
    expected = jax.tree.leaves(CASES[name].fn(w, x))
    for one, other in zip(evaluate(closed, [w, x], {0: adapter}), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_small_increment_of_bfloat16_weight_is_not_rounded_away():
    w, x, closed, adapter = prepared(CASES["dense"], jnp.bfloat16)
    small = adapter._replace(lam=adapter.lam * 1e-3)
    w, x = jnp.zeros_like(w).at[0].set(1), jnp.ones_like(x).at[:, 0].set(0)
    exact = (x.astype("float32") @ adalora.delta_weight(small)).astype("bfloat16")
    (y,) = evaluate(closed, [w, x], {0: small})
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype("float32"), exact.astype("float32"), rtol=2e-2, atol=1e-6)


def test_forward_mode_differentiates_with_jvp():
    w, x, closed, adapter = prepared(CASES["dense"])
    tangent = jax.tree.map(jnp.ones_like, adapter)
    jvp = lambda function: jax.jvp(function, (adapter,), (tangent,))[1]
    ours = jvp(lambda a: evaluate(closed, [w, x], {0: a}, forward_mode=True)[0])
    np.testing.assert_allclose(ours, jvp(lambda a: x @ merged(w, a)), rtol=1e-4, atol=1e-5)


def test_vmap_over_adapters_equals_a_loop():
    w, x, closed, adapter = prepared(CASES["scan"])
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapter)
    run = lambda adapter: evaluate(closed, [w, x], {0: adapter})[0]
    one = [run(jax.tree.map(lambda leaf, i=i: leaf[i], many)) for i in range(2)]
    np.testing.assert_allclose(jax.vmap(run)(many), jnp.stack(one), rtol=1e-5, atol=1e-6)
