"""Dropout of stacks, dtypes and precision of adapters follow their layers."""

from __future__ import annotations

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
