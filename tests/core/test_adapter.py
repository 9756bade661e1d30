"""A single adapter: init, output, dense form, and invalid arguments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def config(**changes):
    return adalora.AdaLoraConfig(**{"total_step": 10, "init_r": 3, "target_r": 2, **changes})


def random_adapter(seed=0, stack=(), ins=5, outs=4, **changes):
    options = config(init_lora_weights=False, **changes)
    return adalora.init_adapter(jax.random.key(seed), ins, outs, options, stack=stack)


def dense(adapter, scale):
    """Compute ``s · Σ_i λ_i q_i p_iᵀ`` in float64, one triplet at a time."""
    p, lam, q = (np.asarray(leaf, np.float64) for leaf in adapter)
    return scale * sum(lam[i] * np.outer(q[i], p[i]) for i in range(len(lam)))


@pytest.mark.parametrize("init", ["gaussian", "lambda_one"])
def test_fresh_adapter_has_documented_shapes_and_zero_increment(init):
    options = config(init=init, init_r=8, param_dtype="bfloat16")
    adapter = adalora.init_adapter(jax.random.key(0), 400, 300, options, stack=(2,))
    chex.assert_shape(list(adapter), [(2, 8, 300), (2, 8), (2, 8, 400)])
    assert {leaf.dtype for leaf in adapter} == {jnp.dtype("bfloat16")}
    assert not np.asarray(adalora.delta_weight(adapter)).any()
    assert float(adapter.q.astype(jnp.float32).std()) == pytest.approx(0.02, rel=0.05)
    zero, one = (adapter.lam, adapter.p) if init == "gaussian" else (adapter.p, adapter.lam)
    assert not np.asarray(zero).any()
    assert np.asarray(one).any()


def test_forward_equals_layer_with_dense_increment():
    adapter, x = random_adapter(), jax.random.normal(jax.random.key(1), (2, 6, 5))
    kernel, bias = jax.random.normal(jax.random.key(2), (5, 4)), jnp.arange(4.0)
    weight = np.asarray(kernel, np.float64) + dense(adapter, 0.5)
    want = np.asarray(x, np.float64) @ weight + np.asarray(bias)
    got = adalora.forward(adapter._replace(scale=0.5), x, kernel, bias)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    increment = adalora.forward(adapter._replace(scale=0.5), x)
    np.testing.assert_allclose(increment, np.asarray(x) @ dense(adapter, 0.5), atol=1e-5)
    delta = adalora.delta_weight(adapter._replace(scale=0.5))
    np.testing.assert_allclose(delta, dense(adapter, 0.5), 1e-5)


def test_stacked_forward_equals_each_layer_separately():
    adapter, x = random_adapter(stack=(3,)), jax.random.normal(jax.random.key(1), (3, 6, 5))
    kernel, bias = jnp.ones((3, 5, 4)), jnp.ones((3, 4))
    got = adalora.forward(adapter._replace(scale=2.0), x, kernel, bias)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], adapter)
        want = adalora.forward(one._replace(scale=2.0), x[i], kernel[i], bias[i])
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def test_masked_triplet_does_not_contribute():
    adapter, x = random_adapter(), jnp.ones((2, 5))
    mask = jnp.array([True, False, True])
    two = jax.tree.map(lambda leaf: leaf[np.array([0, 2])], adapter)
    got = adalora.forward(adapter, x, mask=mask)
    np.testing.assert_allclose(got, adalora.forward(two, x), rtol=1e-5)


def test_output_has_dtype_of_base_layer():
    adapter, x = random_adapter(), jnp.ones((2, 5), jnp.bfloat16)
    kernel = jnp.ones((5, 4), jnp.bfloat16)
    assert adalora.forward(adapter, x, kernel).dtype == jnp.bfloat16
    assert adalora.forward(adapter, x).dtype == jnp.bfloat16
    want = adalora.forward(adapter, x.astype(jnp.float32), kernel.astype(jnp.float32))
    got = adalora.forward(adapter, x, kernel).astype(jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0.03, atol=0.1)


def test_dropout_acts_on_input_keeps_mean_and_needs_key():
    x, key = jnp.ones((100, 100)), jax.random.key(0)
    identity = adalora.Adapter(jnp.eye(100), jnp.ones(100), jnp.eye(100))
    run = lambda key: adalora.forward(identity, x, dropout_rate=0.25, dropout_key=key)
    dropped = run(key)
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    chex.assert_trees_all_equal(run(None), x)


def test_stacked_adapters_use_different_dropout_masks():
    one = random_adapter()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    y = adalora.forward(
        *(stacked, jnp.ones((2, 6, 5))),
        dropout_rate=0.5,
        dropout_key=jax.random.key(0),
    )
    assert np.any(y[0] != y[1])


def test_forward_mode_supports_jvp_with_equal_output():
    adapter, x = random_adapter(), jnp.ones((2, 5))
    adapter, options = (
        adapter._replace(scale=2.0),
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(1)},
    )
    run = lambda adapter: adalora.forward(adapter, x, forward_mode=True, **options)
    y, tangent = jax.jvp(run, (adapter,), (adapter,))
    chex.assert_trees_all_equal(y, adalora.forward(adapter, x, **options))
    np.testing.assert_allclose(tangent, 3 * y, rtol=1e-5)  # homogeneous of degree 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: adalora.forward(a, jnp.ones((2, 6))), r"`x`: has shape \(2, 6\)"),
        (
            lambda a: adalora.forward(a, jnp.ones((2, 5)), jnp.ones((4, 5))),
            r"`kernel`: has shape \(4, 5\).*\(5, 4\)",
        ),
        (
            lambda a: adalora.forward(a, jnp.ones((2, 5)), jnp.ones((5, 4)), jnp.ones(5)),
            r"`bias`: has shape \(5,\), but .* a bias of shape \(4,\)",
        ),
        (
            lambda a: adalora.forward(a, jnp.ones((2, 5)), dropout_rate=1.0),
            "`dropout_rate=1.0`: must be at least 0 and below 1",
        ),
        (
            lambda a: adalora.delta_weight(a._replace(lam=jnp.ones(4))),
            r"p \(3, 4\), lam \(4,\) and q \(3, 5\)",
        ),
        (
            lambda a: adalora.init_adapter(jax.random.key(0), 0, 4, config()),
            "`in_features=0`: must be at least 1",
        ),
    ],
)
def test_invalid_shapes_and_dropout_rate_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_adapter())


@pytest.mark.parametrize("other", [None, jnp.ones((2, 5)), {}, (1, 2, 3)])
def test_what_is_no_adapter_raises(other):
    for function in (lambda a: adalora.forward(a, jnp.ones((2, 5))), adalora.delta_weight):
        with pytest.raises(TypeError, match="`adapter`: is not an Adapter"):
            function(other)


@pytest.mark.parametrize("name", ["x", "kernel", "bias", "mask"])
def test_lists_in_place_of_arrays_raise(name):
    arguments = {"x": jnp.ones((2, 5)), name: [1.0, 2.0]}
    with pytest.raises(TypeError, match=f"`{name}=list`: is not an array"):
        adalora.forward(random_adapter(), **arguments)


def test_mask_must_fit_the_triplets():
    adapter = random_adapter()
    (rank,) = adapter.lam.shape
    for shape in ((rank + 1,), (2, rank)):
        with pytest.raises(ValueError, match=r"`mask`: has shape .* triplets are"):
            adalora.forward(adapter, jnp.ones((2, 5)), mask=jnp.ones(shape, bool))
    for shape in ((), (1,), (rank,)):
        mask = jnp.ones(shape, bool)
        output = jax.eval_shape(
            lambda a, m: adalora.forward(a, jnp.ones((2, 5)), mask=m), adapter, mask
        )
        assert output.shape == (2, 4)
