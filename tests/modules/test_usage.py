"""NNX layers with other uses of their weight: merged exactly, or an error names them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import adalora_jax as adalora

pytestmark = pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
CONFIG = adalora.AdaLoraConfig(
    total_step=9, init_r=4, target_r=2, target_modules=".*", init_lora_weights=False
)
X = jax.random.normal(jax.random.key(0), (3, 4))
WAVES = jax.random.normal(jax.random.key(1), (2, 5, 4))


def squashed(x, kernel, *args, **kwargs):
    return jax.lax.dot_general(x, jnp.tanh(kernel), *args, **kwargs)


def convolved(x, kernel, *args, **kwargs):
    return jax.lax.conv_general_dilated(x, jnp.tanh(kernel), *args, **kwargs)


def normalised(arrays, **options):
    x, kernel, *bias = arrays
    return x, kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True), *bias


class Hooked(nnx.Param):
    def get_value(self, **index):
        return jnp.tanh(super().get_value(**index))


def with_kernel(kind, **metadata):
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    layer.kernel = kind(layer.kernel[...], **metadata)
    return layer


class Twice(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) + jnp.tanh(x) @ self.kernel[...]


class DividedByItsNorm(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) / jnp.linalg.norm(self.kernel[...])


class Before(nnx.Linear):
    def __call__(self, x):
        return super().__call__(jnp.tanh(x))


class After(nnx.Linear):
    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


class Halved(nnx.Einsum):
    def __call__(self, x):
        return 0.5 * super().__call__(x)


class Own(nnx.Module):
    """An einsum layer as in model zoos, with functions around its parts."""

    def __init__(self, before=lambda x: x, of_weight=lambda w: w, after=lambda y: y):
        self.w = nnx.Param(jax.random.normal(jax.random.key(2), (4, 4)))
        self.einsum_str = "bd,fd->bf"
        self.w_scale = 0.5
        self.functions = before, of_weight, after

    def __call__(self, x):
        before, of_weight, after = self.functions
        weight = self.w_scale * of_weight(self.w[...])
        return after(jnp.einsum(self.einsum_str, before(x), weight))


MERGED = {
    "own einsum": (Own, X),
    "own einsum, a constant on top": (lambda: Own(after=lambda y: y + 1), X),
    "before": (lambda: Before(4, 4, rngs=nnx.Rngs(0)), X),
    "after": (lambda: After(4, 4, rngs=nnx.Rngs(0)), X),
    "halved": (lambda: Halved("bd,fd->bf", (4, 4), rngs=nnx.Rngs(0)), X),
    "circular": (lambda: nnx.Conv(4, 4, (3,), padding="CIRCULAR", rngs=nnx.Rngs(0)), WAVES),
}
NOT_MERGED = {
    "promote_dtype": lambda: nnx.Linear(4, 4, promote_dtype=normalised, rngs=nnx.Rngs(0)),
    "dot_general": lambda: nnx.Linear(4, 4, dot_general=squashed, rngs=nnx.Rngs(0)),
    "convolution": lambda: nnx.Conv(
        *(4, 4, (3,)), conv_general_dilated=convolved, rngs=nnx.Rngs(0)
    ),
    "on_get_value": lambda: with_kernel(nnx.Param, on_get_value=lambda _, value: jnp.tanh(value)),
    "get_value": lambda: with_kernel(Hooked),
    "own einsum of a norm": lambda: Own(of_weight=lambda w: w / jnp.linalg.norm(w)),
    "own einsum of a tanh": lambda: Own(before=jnp.tanh),
    "tanh of an own einsum": lambda: Own(after=jnp.tanh),
}
REFUSED = {
    "twice": lambda: Twice(4, 4, rngs=nnx.Rngs(0)),
    "by its norm": lambda: DividedByItsNorm(4, 4, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize(("make", "x"), MERGED.values(), ids=MERGED)
def test_supported_use_of_weight_merges_exactly(make, x):
    base = nnx.Sequential(make())
    adapted = adalora.nnx.adapt(base, CONFIG)
    assert np.abs(adapted(x) - base(x)).max() > 1e-2
    merged = adalora.merge(adapted, inputs=(x,))
    np.testing.assert_allclose(merged(x), adapted(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("make", NOT_MERGED.values(), ids=NOT_MERGED)
def test_unmergeable_layer_is_adapted_and_its_merge_raises(make, abstract):
    if abstract:
        adapted = nnx.eval_shape(lambda: adalora.nnx.adapt(nnx.Sequential(make()), CONFIG))
        assert adalora.nnx.adapters(adapted)["layers/0"].layout.note
        return
    adapted = adalora.nnx.adapt(nnx.Sequential(make()), CONFIG)
    with pytest.raises(ValueError, match="increment of 'layers/0' cannot be merged"):
        adalora.merge(adapted)


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_layer_that_uses_its_weight_twice_raises(make):
    with pytest.raises(ValueError, match="'layers/0': its weight is also used outside"):
        adalora.nnx.adapt(nnx.Sequential(make()), CONFIG)


class Tied(nnx.Module):
    """A table and a layer that share a weight under two names."""

    def __init__(self):
        self.table, self.layer = nnx.Embed(4, 4, rngs=nnx.Rngs(0)), Before(4, 4, rngs=nnx.Rngs(1))
        self.layer.kernel = self.table.embedding

    def __call__(self, ids):
        return self.layer(self.table(ids))


def test_shared_weight_is_merged_once():
    adapted, ids = adalora.nnx.adapt(Tied(), CONFIG), jnp.arange(4)
    merged = adalora.merge(adapted, inputs=(ids,))
    np.testing.assert_allclose(merged(ids), adapted(ids), rtol=1e-4, atol=1e-5)
    back = adalora.unmerge(merged, adapted)
    np.testing.assert_allclose(back(ids), Tied()(ids), rtol=1e-4, atol=1e-5)


class OwnInLinen(nn.Module):
    before: bool

    @nn.compact
    def __call__(self, x):
        weight = self.param("w", nn.initializers.normal(1.0), (4, 4))
        return jnp.einsum(self.einsum_str, jnp.tanh(x) if self.before else x, weight)

    einsum_str: str = "bd,fd->bf"


@pytest.mark.parametrize("before", [False, True])
def test_linen_einsum_merges_only_if_it_multiplies_its_input(before):
    model = nn.Sequential([OwnInLinen(before)])
    variables = model.init(jax.random.key(0), X)
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, X)
    if before:
        with pytest.raises(ValueError, match=r"'layers_0' cannot be merged.*multiply its input"):
            adalora.merge(variables, adapters)
    else:
        outputs = model.apply(adalora.merge(variables, adapters), X)
        np.testing.assert_allclose(outputs, adapted.apply(variables, adapters, X), rtol=1e-4)
