"""Dropout, RNG streams, dtypes, precision and collections of adapters follow their layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(
    total_step=10, init_r=4, target_r=2, target_modules="all-linear", init_lora_weights=False
)
DROPPING = CONFIG.replace(lora_dropout=0.5)
X = jnp.sin(jnp.arange(10.0)).reshape(2, 5)


class Positional(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(4)(x)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        return nn.Dense(4)(x)


class Attribute(nn.Module):
    train: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class Outer(nn.Module):
    """A model that takes the flag, with blocks that do not."""

    @nn.compact
    def __call__(self, x, is_training=False):
        return Attribute()(x)


class Inner(nn.Module):
    """A block that gets another flag value than the model."""

    @nn.compact
    def __call__(self, x, train=True):
        return Positional()(x, False)


class Scanned(nn.Module):
    """Layers without a residual sum, so that each sees the same input."""

    @nn.compact
    def __call__(self, x, train=True):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x, nn.Dense(4, kernel_init=nn.initializers.zeros)(x)

        layers = nn.scan(
            *(Body, {"params": 0}),
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        return layers()(x, None)[1]


def adapted_apply(model, config, *args, **kwargs):
    variables = model.init(jax.random.key(0), X, *args, **kwargs)
    adapted = adalora.linen.adapt(model, config)
    adapters = adapted.init(jax.random.key(1), variables, X, *args, **kwargs)

    @jax.jit
    def run(key):
        return adapted.apply(variables, adapters, X, *args, **kwargs, rngs={"dropout": key})

    return run


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "drops"),
    [
        (Positional(), (True,), {}, True),
        (Positional(), (False,), {}, False),
        (Deterministic(), (), {"deterministic": False}, True),
        (Deterministic(), (), {}, False),
        (Deterministic(), (), {"deterministic": True}, False),
        (Attribute(train=True), (), {}, True),
        (Attribute(train=False), (), {}, False),
        (Outer(), (True,), {}, True),
        (Outer(), (), {"is_training": False}, False),
        (Inner(), (True,), {}, False),
    ],
)
def test_linen_adapter_dropout_follows_train_flags(model, args, kwargs, drops):
    run = adapted_apply(model, DROPPING, *args, **kwargs)
    outputs = [run(jax.random.key(i)) for i in (1, 2)]
    assert bool(np.any(outputs[0] != outputs[1])) == drops


def test_linen_scanned_layers_use_different_dropout_masks():
    module = Scanned()
    variables = module.init(jax.random.key(0), X)
    adapted = adalora.linen.adapt(module, DROPPING)
    adapters = adapted.init(jax.random.key(1), variables, X)
    adapters = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[0]), adapters)
    y = adapted.apply(variables, adapters, X, rngs={"dropout": jax.random.key(3)})
    assert np.any(y[0] != y[1])
    y = adapted.apply(variables, adapters, X)
    np.testing.assert_array_equal(y[0], y[1])


class NnxScanned(nnx.Module):
    """Two stacked layers with the same input."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(5, 4, rngs=rngs))
        self.layers = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, x):
        body = lambda x, layer: (x, layer(x))
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, self.layers)[1]


def test_nnx_stacked_dropout_differs_per_layer_and_is_off_in_eval():
    adapted = adalora.nnx.adapt(NnxScanned(nnx.Rngs(0)), DROPPING)
    kernel = adapted.layers.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    adapters = adalora.nnx.adapters(adapted)
    adapters = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[0]), adapters)
    adalora.nnx.set_adapters(adapted, adapters)
    adapted.train()
    run = nnx.jit(lambda model: model(X))
    y, z = run(adapted), run(adapted)
    assert np.any(y[0] != y[1])
    assert np.any(y != z)
    adapted.eval()
    y = run(adapted)
    np.testing.assert_array_equal(y[0], y[1])


LAYERS = {
    "dense": (lambda **k: nn.Dense(4, **k), X),
    "general": (lambda **k: nn.DenseGeneral((2, 2), **k), X),
    "einsum": (lambda **k: nn.Einsum((5, 4), "td,df->tf", **k), X),
    "conv": (lambda **k: nn.Conv(4, (3,), **k), X[None]),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_linen_adapter_computes_in_its_layers_dtype_and_precision(kind):
    make, x = LAYERS[kind]
    module = make(dtype=jnp.bfloat16, precision="highest")
    variables = module.init(jax.random.key(0), x)
    adapted = adalora.linen.adapt(module, CONFIG.replace(target_modules=".*"))
    adapters = adapted.init(jax.random.key(1), variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    run = lambda adapters: adapted.apply(variables, adapters, x)
    assert run(adapters).dtype == module.apply(variables, x).dtype == jnp.bfloat16
    products = list(_products(jax.make_jaxpr(run)(adapters).jaxpr))
    assert len(products) == 3
    for product in products:
        assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}
        assert all(operand.aval.dtype == jnp.bfloat16 for operand in product.invars)


def _products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


def test_nnx_adapted_output_has_the_layers_dtype():
    model = nnx.Linear(5, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapted = adalora.nnx.adapt(model, CONFIG)
    assert adapted.adalora.q.dtype == jnp.float32
    assert adapted(X).dtype == model(X).dtype == jnp.bfloat16


def test_param_dtype_sets_dtype_of_adapters_but_not_of_output():
    module = nn.Dense(4, param_dtype=jnp.float16)
    variables = module.init(jax.random.key(0), X)
    adapted = adalora.linen.adapt(module, CONFIG.replace(param_dtype="bfloat16"))
    adapters = adapted.init(jax.random.key(1), variables, X)
    assert adapters[""].p.dtype == jnp.bfloat16
    assert adapted.apply(variables, adapters, X).dtype == module.apply(variables, X).dtype


def test_captured_intermediates_are_the_adapted_outputs():
    model = Positional()
    variables = model.init(jax.random.key(0), X, False)
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, X, False)
    y, state = adapted.apply(
        variables, adapters, X, False, capture_intermediates=True, mutable=["intermediates"]
    )
    (captured,) = state["intermediates"]["Dense_0"]["__call__"]
    np.testing.assert_array_equal(captured, y)
    assert set(state) == {"intermediates"}
