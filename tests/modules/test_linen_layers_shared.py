"""Models under ``nn.jit``, whose code runs once for many calls, and layers that share a scope."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import quantization
from adalora_jax._src.modules import linen_layers

CONFIG = adalora.AdaLoraConfig(
    total_step=4, init_r=3, target_r=1, target_modules="all-linear", init_lora_weights=False
)
X = jax.random.normal(jax.random.key(0), (2, 5, 6))


class Einsum(nn.Module):
    """An einsum with the weight's name as a field and the equation as a call argument."""

    shape: tuple[int, ...]
    weight: str | None = "w"

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(
            equation, x, self.param(self.weight, nn.initializers.normal(), self.shape)
        )


class OfShape(nn.Module):
    """The same, but the weight's name depends on its shape alone."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        name = "wide" if len(self.shape) == 3 else "narrow"
        return jnp.einsum(equation, x, self.param(name, nn.initializers.normal(), self.shape))


class Mlp(nn.Module):
    """Two layers whose weights are both in this module's scope."""

    by_name: bool = True

    @nn.compact
    def __call__(self, x):
        kinds = [functools.partial(Einsum, weight=w) for w in ("wide", "narrow")]
        kinds = kinds if self.by_name else [OfShape] * 2
        wide, narrow = kinds[0]((2, 7, 6)), kinds[1]((7, 6))
        nn.share_scope(self, wide)
        h = wide("...d,gfd->...gf", x)
        nn.share_scope(self, narrow)
        return x + narrow("...f,fd->...d", nn.gelu(h[..., 0, :]) * h[..., 1, :])


class Shared(nn.Module):
    by_name: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="out")(Mlp(self.by_name, name="mlp")(x))


class Jitted(nn.Module):
    """The same layer three times, traced once, all under another jit."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + nn.jit(nn.Dense)(6, name=f"layer_{i}")(nn.tanh(x))
        return nn.jit(Shared)(name="end")(x)


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


class Unjitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + nn.Dense(6, name=f"layer_{i}")(nn.tanh(x))
        return Shared(name="end")(x)


def test_nn_jit_cache_is_not_shared_between_adapters():
    """The model has identical layers; successive calls change scales or have no adapters."""
    variables = Jitted().init(jax.random.key(1), X)
    plain = Jitted().apply(variables, X)
    limits = {"layer_1": adalora.RankSpec(alpha=40)}
    for config in (CONFIG, CONFIG.replace(lora_alpha=30), CONFIG.replace(rank_overrides=limits)):
        jitted, unjitted = (adalora.linen.adapt(m(), config) for m in (Jitted, Unjitted))
        adapters = jitted.init(jax.random.key(2), variables, X)
        assert list(adapters) == [
            *("end/mlp/narrow", "end/mlp/wide", "end/out"),
            *(f"layer_{i}" for i in range(3)),
        ]
        want = unjitted.apply(variables, adapters, X)
        np.testing.assert_allclose(jitted.apply(variables, adapters, X), want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(Jitted().apply(variables, X), plain)
    grads = [
        jax.grad(lambda a, model=model: jnp.sum(model.apply(variables, a, X) ** 2))(adapters)
        for model in (jitted, unjitted)
    ]
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)
    described = adalora.linen.describe(Jitted(), CONFIG, variables, X)
    assert described == adalora.linen.describe(Unjitted(), CONFIG, variables, X)


def test_nn_jit_cache_is_not_shared_between_dropout_rates():
    variables = Jitted().init(jax.random.key(1), X)
    adapters = adalora.linen.adapt(Jitted(), CONFIG).init(jax.random.key(2), variables, X)
    rngs = {"dropout": jax.random.key(3)}
    run = lambda rate: adalora.linen.adapt(Jitted(), CONFIG.replace(lora_dropout=rate)).apply(
        variables, adapters, X, rngs=rngs
    )
    assert np.abs(run(0.0) - run(0.5)).max() > 1e-3
    np.testing.assert_array_equal(run(0.0), run(0.0))
