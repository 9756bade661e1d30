"""Layers that compute with packed weights, which get no gradient and are not merged in place."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adalora_jax as adalora
from adalora_jax._src.modules.nnx_variables import pure
from adalora_jax._src.quantization import quantize as quantization
from quantization.models import NnxModel, X, config, linen, task


@pytest.mark.slow
def test_linen_params_and_adapters_are_differentiable_without_filter():
    model, variables, _ = linen()
    adapted = adalora.linen.adapt(model, config())
    adapters = adapted.init(jax.random.key(2), variables, X)
    adapters = {path: a._replace(lam=jnp.ones_like(a.lam)) for path, a in adapters.items()}
    apply = lambda params, adapters: adapted.apply({**variables, "params": params}, adapters, X)
    grads = jax.jit(jax.grad(lambda tree: task(apply(*tree))))((variables["params"], adapters))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads[1]))
    assert np.any(grads[0]["layers_0"]["up"]["bias"])
    assert np.any(grads[0]["layers_0"]["n"]["scale"])
    # Without a filter, integers have float0 tangents, as in JAX, and scales have zeros.
    whole = jax.grad(lambda variables: task(adapted.apply(variables, adapters, X)), allow_int=True)(
        variables
    )
    for leaf in jax.tree.leaves(whole["quantized"]):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)
    chex.assert_trees_all_close(whole["params"], grads[0], rtol=1e-4, atol=1e-6)


def test_nnx_params_are_differentiable_without_filter():
    quantised = quantization.quantize(NnxModel(nnx.Rngs(0)), "int4", X)
    adapted = adalora.nnx.adapt(quantised, config(init_lora_weights=False))
    grads = pure(nnx.jit(nnx.grad(lambda model: task(model(X))))(adapted))
    graph, params, rest = nnx.split(adapted, nnx.Param, ...)
    same = jax.jit(jax.grad(lambda params: task(nnx.merge(graph, params, rest)(X))))(params)
    chex.assert_trees_all_close(grads, pure(same), rtol=1e-4, atol=1e-6)
    assert set(grads["layers"][0]["up"]) == {"adalora", "bias"}
    assert np.any(grads["layers"][0]["up"]["adalora"]["q"])
    assert np.any(grads["layers"][0]["up"]["bias"])


def test_jit_and_vmap_match_eager():
    model, variables, _ = linen()
    apply = lambda x: model.apply(variables, x[None])[0]
    want = model.apply(variables, X)
    np.testing.assert_allclose(jax.jit(jax.vmap(apply))(X), want, rtol=1e-4, atol=1e-5)


def test_mutable_apply_returns_packed_params_separately():
    model, variables, _ = linen()
    output, mutated = model.apply(variables, X, mutable=True)
    chex.assert_trees_all_equal(mutated, variables)
    adapted = adalora.linen.adapt(model, config())
    adapters = adapted.init(jax.random.key(2), variables, X)
    again, mutated = adapted.apply(variables, adapters, X, mutable=True)
    chex.assert_trees_all_equal(mutated, variables)
    chex.assert_trees_all_equal(output, again)


def test_plain_merge_of_quantised_base_raises():
    model, variables, _ = linen()
    adapted = adalora.linen.adapt(model, config())
    adapters = adapted.init(jax.random.key(2), variables, X)
    for merge in (
        lambda: adalora.merge(variables, adapters),
        lambda: adalora.unmerge(variables, adapters),
        lambda: adalora.merge(variables, adapters, safe=True),
    ):
        with pytest.raises(ValueError, match=r"query' is quantised.*quantization\.merge"):
            merge()
    base = quantization.quantize(NnxModel(nnx.Rngs(0)), "int8", X)
    with pytest.raises(ValueError, match=r"is quantised and cannot.*quantization\.merge"):
        adalora.merge(adalora.nnx.adapt(base, config()))
    with pytest.raises(ValueError, match=r"`to='int16'`: must be a floating-point dtype"):
        quantization.merge(variables, adapters, to="int16")


def test_repr_of_quantised_nnx_model_has_packed_arrays():
    quantised = quantization.quantize(NnxModel(nnx.Rngs(0)), "int4", X)
    for model in (quantised, adalora.nnx.adapt(quantised, config())):
        assert "QwixWeight(qvalue=Array(shape=" in repr(model)
