"""The low-rank product's custom derivative, compared with JAX's of the same formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from support.compiling import AS_USERS, skip_unless_cpu

from adalora_jax._src.core.low_rank import (
    apply_dropout,
    dropout_mask,
    linear_with_dropout,
    low_rank,
    low_rank_autodiff,
)

NAMES = ("x", "p", "c", "q")


def operands(seed=0, tokens=(4,), r=3, n_in=5, n_out=2, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = ((*tokens, n_in), (r, n_out), (r,), (r, n_in))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def scalar(product):
    """Return a loss that weights every output differently and has curvature."""

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


def both(transform):
    """Transform the product with the custom derivative, and the plain form."""
    return [transform(scalar(product)) for product in (low_rank, low_rank_autodiff)]


gradient = functools.partial(jax.grad, argnums=(0, 1, 2, 3))


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.sampled_from([((), 3, 5, 2), ((4,), 1, 2, 6), ((2, 3), 4, 3, 3), ((3,), 0, 4, 2)]),
)
@settings(max_examples=24, deadline=None, derandomize=True)
def test_derivative_equals_autodiff_of_plain_form(seed, sizes):
    with jax.enable_x64(True):
        arguments = operands(seed, *sizes)
        ours, theirs = both(gradient)
        assert_close(ours(*arguments), theirs(*arguments))
        np.testing.assert_array_equal(low_rank(*arguments), low_rank_autodiff(*arguments))


def test_derivative_equals_finite_difference():
    with jax.enable_x64(True):
        check_grads(jax.jit(low_rank), operands(), order=1, modes=["rev"], eps=1e-5)


def test_product_equals_dense_matrix_product():
    with jax.enable_x64(True):
        x, p, c, q = operands()
        np.testing.assert_allclose(low_rank(x, p, c, q), x @ (q.T @ jnp.diag(c) @ p), rtol=1e-12)


def test_vmap_over_all_operands_or_input_equals_autodiff():
    with jax.enable_x64(True):
        batch = [jnp.stack(leaves) for leaves in zip(*(operands(seed) for seed in range(3)))]
        for axes in (0, (0, None, None, None)):
            arguments = batch if axes == 0 else [batch[0], *(leaf[0] for leaf in batch[1:])]
            ours, theirs = (jax.vmap(grad, in_axes=axes) for grad in both(gradient))
            assert_close(ours(*arguments), theirs(*arguments))


def test_derivative_under_remat_equals_autodiff():
    with jax.enable_x64(True):
        arguments = operands()
        ours = gradient(scalar(jax.checkpoint(low_rank)))
        assert_close(ours(*arguments), both(gradient)[1](*arguments))


def layered(product):
    """Return adapted layers under lax.scan, each with its own factors."""

    def apply(x, p, c, q):
        def layer(h, factors):
            return jnp.tanh(h + product(h, *factors)), None

        return jax.lax.scan(layer, x, (p, c, q))[0]

    return apply


def test_derivative_of_scanned_layers_equals_autodiff():
    with jax.enable_x64(True):
        layers = [operands(seed, n_in=5, n_out=5) for seed in range(3)]
        factors = [jnp.stack(leaves) for leaves in zip(*(layer[1:] for layer in layers))]
        ours, theirs = (gradient(scalar(layered(f))) for f in (low_rank, low_rank_autodiff))
        assert_close(ours(layers[0][0], *factors), theirs(layers[0][0], *factors))


def test_second_derivatives_equal_autodiff():
    """Reverse over reverse, as the custom rule leaves forward mode to the plain form."""
    with jax.enable_x64(True):
        arguments = operands(tokens=(2,), r=2, n_in=2, n_out=2)

        def hessians(f):
            return jax.jacrev(gradient(f), argnums=(0, 1, 2, 3))

        ours, theirs = (jax.jit(hessian)(*arguments) for hessian in both(hessians))
        for row, expected in zip(ours, theirs):
            assert_close(row, expected)
        assert all(np.abs(ours[i][j]).max() > 0.01 for i in range(4) for j in range(4))


SEED = np.array([0x12345678, 0x9ABCDEF0], np.uint32)


def numpy_keep(seed, shape, rate):
    """Compute the mask by its definition, one element at a time, in Python's integers."""

    def mixed(v):
        v = ((v ^ (v >> 16)) * 0x7FEB352D) % 2**32
        v = ((v ^ (v >> 15)) * 0x846CA68B) % 2**32
        return v ^ (v >> 16)

    kept = np.zeros(shape, bool)
    for place in np.ndindex(*shape):
        bits = int(seed[0])
        for axis, index in enumerate(place):
            bits ^= int(seed[1]) if axis == len(shape) - 1 else 0
            bits = mixed(bits ^ ((index + 1) * 0x9E3779B9) % 2**32)
        kept[place] = bits >= rate * 2**32
    return kept


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_dropout_mask_matches_its_definition(shape):
    kept = jax.jit(lambda seed: dropout_mask(seed, shape, 0.4))(SEED)
    np.testing.assert_array_equal(kept, numpy_keep(SEED, shape, 0.4))


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.5, 0.97])
def test_dropout_mask_is_statistically_random(rate):
    """Frequency, and correlation of positions, axes and seeds, are within five standard errors."""
    seeds = [jax.random.key_data(jax.random.key(number)) for number in range(3)]
    masks = np.stack([dropout_mask(seed, (400, 300), rate) for seed in seeds]).astype(float)
    error = 5 * np.sqrt(rate * (1 - rate))
    assert abs(masks.mean() - (1 - rate)) <= error / np.sqrt(masks.size)
    centred = masks - (1 - rate)
    one, pairs = centred[0], []
    pairs += [(one[shift:], one[:-shift]) for shift in (1, 2, 16)]
    pairs += [(one[:, shift:], one[:, :-shift]) for shift in (1, 2, 16)]
    pairs += [(one[:300, :300], one[:300, :300].T), (one, centred[1]), (centred[1], centred[2])]
    for a, b in pairs:
        off = np.mean(a * b) if a is not b.T else np.mean((a * b)[np.triu_indices(300, 1)])
        assert abs(off) <= error**2 / 5 / np.sqrt(a.size / 2)
    for axis in (0, 1):  # counts along rows and columns vary as independent draws do
        counts = masks[0].sum(axis)
        expected = masks.shape[1 + axis] * rate * (1 - rate)
        assert abs(counts.var() - expected) <= 6 * expected * np.sqrt(2 / counts.size)


def with_mask(product, rate=0.4):
    return lambda *operands: product(*operands, jnp.asarray(SEED), rate)


def test_dropout_derivative_equals_masked_product():
    with jax.enable_x64(True):
        arguments = operands(tokens=(6,))
        mask = jnp.asarray(numpy_keep(SEED, (6, 5), 0.4), float)

        def written_out(x, p, c, q):
            return ((x * mask) @ q.T * c[None]) @ p

        expected = gradient(scalar(written_out))(*arguments)
        for product in (low_rank, low_rank_autodiff):
            assert_close(gradient(scalar(with_mask(product)))(*arguments), expected)

        def second(f):
            return jax.jacrev(gradient(scalar(f)), argnums=(0, 1, 2, 3))(*arguments)

        for row, wanted in zip(second(with_mask(low_rank)), second(written_out)):
            assert_close(row, wanted)


def test_dropout_derivative_of_custom_product_equals_masked_product():
    with jax.enable_x64(True):
        x, _, _, q = operands(tokens=(6,))

        def product(x, q):
            return x @ q.T

        def loss(f):
            return jax.grad(lambda x, q: jnp.sum(jnp.sin(f(x, q))), argnums=(0, 1))

        seed = jnp.asarray(SEED)
        ours = loss(lambda x, q: linear_with_dropout(product, x, q, seed, 0.4))(x, q)
        theirs = loss(lambda x, q: product(apply_dropout(x, seed, 0.4), q))(x, q)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, theirs)


def test_dropout_mask_is_recomputed_instead_of_stored():
    """The residuals of a layer are x and ``[tokens, r]``, with dropout, too."""
    skip_unless_cpu("the bound is of its compiler's temporary memory")
    tokens, width, rank, depth = 256, 64, 2, 8
    rng = np.random.default_rng(0)

    def layer(*shape):
        return jnp.asarray(rng.normal(size=(depth, *shape)), jnp.float32)

    factors = layer(rank, width), layer(rank), layer(rank, width)
    x = jnp.ones((tokens, width))

    def loss(factors, seeds, rate):
        h = x
        for i in range(depth):
            h = h + low_rank(h, *(f[i] for f in factors), None if seeds is None else seeds[i], rate)
        return jnp.sum(h * h)

    seeds = jax.random.bits(jax.random.key(0), (depth, 2), jnp.uint32)
    needed = []
    for rate, arrays in ((0.0, None), (0.5, seeds)):
        step = jax.jit(jax.grad(functools.partial(loss, rate=rate)))
        compiled = step.lower(factors, arrays).compile(AS_USERS)
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    activation = 4 * tokens * width
    assert needed[1] - needed[0] < 3 * activation  # not one per layer


def test_only_plain_form_supports_forward_mode():
    x, p, c, q = operands(dtype=np.float32)
    _, tangent = jax.jvp(lambda c: low_rank_autodiff(x, p, c, q), (c,), (2 * c,))
    np.testing.assert_allclose(tangent, 2 * low_rank(x, p, c, q), rtol=1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda c: low_rank(x, p, c, q), (c,), (c,))


@pytest.mark.parametrize("factors", ["bfloat16", "float32"])
def test_bfloat16_gradients_keep_dtypes_and_input_accuracy(factors):
    x, p, c, q = operands(tokens=(64,), dtype=np.float32)
    rounded = [x.astype("bfloat16"), *(leaf.astype(factors) for leaf in (p, c, q))]
    ours = gradient(scalar(lambda *a: low_rank(*a).astype(jnp.float32)))(*rounded)
    assert [leaf.dtype for leaf in ours] == [leaf.dtype for leaf in rounded]
    exact = gradient(scalar(low_rank_autodiff))(*(leaf.astype("float32") for leaf in rounded))
    for name, a, b in zip(NAMES, ours, exact):
        worst = float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
        assert worst < 0.03, f"{name}: {worst}"
        if a.dtype == jnp.float32:
            assert np.any(a != a.astype("bfloat16").astype("float32")), f"{name} was rounded"


def test_sums_over_many_bfloat16_tokens_do_not_stall():
    """4096 equal terms: a bfloat16 sum stops at 256 of them."""
    tokens = 4096
    x, one = jnp.ones((tokens, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)

    def loss(p, c, q):
        return jnp.sum(low_rank(x, p, c, q).astype(jnp.float32))

    for slope in jax.grad(loss, argnums=(0, 1, 2))(one, jnp.ones(1, jnp.bfloat16), one):
        assert float(slope.ravel()[0]) == tokens


@pytest.mark.parametrize("precision", [None, "highest", jax.lax.Precision.HIGH])
def test_precision_is_static_and_passed_to_both_products(precision):
    x, p, c, q = operands(dtype=np.float32)
    product = jax.jit(functools.partial(low_rank, precision=precision))
    with jax.default_matmul_precision(None):  # the tests' own, on a GPU
        text = product.lower(x, p, c, q).as_text()
    expected = {None: "DEFAULT", "highest": "HIGHEST"}.get(precision, "HIGH")
    assert text.count(f"precision = [{expected}, {expected}]") == 2


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="JAX rejects derivatives that vary over the mesh"
)
def test_derivative_under_shard_map_equals_autodiff():
    """``shard_map`` checks which values vary over the mesh, as it does by default."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    shapes = ((8, 6), (3, 5), (3,), (3, 6))
    x, p, c, q = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))

    def slopes(product, weights, x):
        def loss(w):
            return jax.lax.pmean((product(x, *w) ** 2).mean(), "d")

        return jax.grad(loss)(weights)

    results = [
        jax.jit(
            jax.shard_map(
                functools.partial(slopes, product),
                mesh=mesh,
                in_specs=(P(), P("d")),
                out_specs=P(),
            )
        )((p, c, q), x)
        for product in (low_rank, low_rank_autodiff)
    ]
    whole = jax.grad(lambda w: (low_rank(x, *w) ** 2).mean())((p, c, q))
    for found in results:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, whole)
