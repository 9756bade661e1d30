"""Layers whose weights share a scope."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import quantization
from adalora_jax._src.modules import linen_layers
from modules.linen_scopes import CONFIG, Shared, X


def of_matrices(equation, x, adapter, outs):
    """Compute the low-rank term by the dense formula, with the axes of the outputs."""
    delta = np.asarray(adalora.delta_weight(adapter), np.float64)
    return np.einsum(equation, x, delta.reshape(-1, *outs))


@pytest.mark.parametrize("by_name", [True, False])
def test_weights_in_one_scope_get_separate_adapters(by_name):
    model = Shared(by_name)
    variables = model.init(jax.random.key(1), X)
    assert set(variables["params"]["mlp"]) == {"wide", "narrow"}
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(2), variables, X)
    assert list(adapters) == ["mlp/narrow", "mlp/wide", "out"]
    got = adapted.apply(variables, adapters, X)
    x = np.asarray(X, np.float64)
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    h = np.einsum("...d,gfd->...gf", x, w["mlp"]["wide"])
    h = h + of_matrices("...d,dgf->...gf", x, adapters["mlp/wide"], (2, 7))
    h = np.asarray(nn.gelu(jnp.asarray(h[..., 0, :]))) * h[..., 1, :]
    y = x + h @ w["mlp"]["narrow"]
    y = y + of_matrices("...f,fd->...d", h, adapters["mlp/narrow"], (6,))
    z = y @ w["out"]["kernel"] + w["out"]["bias"]
    z = z + of_matrices("...f,fd->...d", y, adapters["out"], (6,))
    np.testing.assert_allclose(got, z, rtol=1e-4, atol=1e-5)
    merged = adalora.merge(variables, adapters)
    np.testing.assert_allclose(model.apply(merged, X), got, rtol=1e-4, atol=1e-5)
    back = adalora.unmerge(merged, adapters)
    chex.assert_trees_all_close(back, variables, atol=1e-6)
    _, mutated = adapted.apply(variables, adapters, X, mutable=["params"])
    chex.assert_trees_all_equal(mutated["params"], variables["params"])
    specs = adapted.specs(variables, X)
    assert jax.tree.structure(specs) == jax.tree.structure(adapters)


def test_one_of_two_weights_in_a_scope_can_be_targeted():
    variables = Shared().init(jax.random.key(1), X)
    whole = adalora.linen.adapt(Shared(), CONFIG)
    adapters = whole.init(jax.random.key(2), variables, X)
    alone = adalora.linen.adapt(Shared(), CONFIG.replace(target_modules=["narrow"]))
    only = alone.init(jax.random.key(2), variables, X)
    assert list(only) == ["mlp/narrow"]
    kept = {**jax.tree.map(jnp.zeros_like, adapters), "mlp/narrow": only["mlp/narrow"]}
    np.testing.assert_allclose(
        alone.apply(variables, only, X), whole.apply(variables, kept, X), rtol=1e-5
    )


def test_weights_in_one_scope_can_be_quantized_and_adapted():
    model = Shared()
    variables = model.init(jax.random.key(1), X)
    on_int8, packed = quantization.quantize(model, "int8", variables, X)
    assert set(packed["quantized"]["mlp"]) == {"wide", "narrow"}
    adapted = adalora.linen.adapt(on_int8, CONFIG)
    adapters = adapted.init(jax.random.key(2), packed, X)
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if hasattr(leaf, "dequantize") else leaf,
        {"params": linen_layers.join_quantized(packed)["params"]},
        is_leaf=lambda leaf: hasattr(leaf, "dequantize"),
    )
    want = adalora.linen.adapt(model, CONFIG).apply(dense, adapters, X)
    np.testing.assert_allclose(adapted.apply(packed, adapters, X), want, rtol=1e-4, atol=1e-5)
    merged, errors = quantization.merge(packed, adapters, to="float32")
    assert set(errors) == set(adapters)
    np.testing.assert_allclose(model.apply(merged, X), want, rtol=1e-4, atol=1e-5)
