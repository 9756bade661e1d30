"""NNX layers that cannot be adapted, or whose weight other code reads."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.small_models import Scaled, in_model, linear, nnx_config

import adalora_jax as adalora

CONFIG = nnx_config(".*")


@pytest.mark.parametrize("targets", ["all-linear", ".*", ["layers.0"]])
def test_nnx_layer_without_super_call_raises(targets):
    with pytest.raises(ValueError, match=r"'layers/0'.*does not call super\(\)\.__call__.*layers="):
        adalora.nnx.adapt(in_model(linear(Scaled)), nnx_config(targets))


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_nnx_wrapper_that_rewrites_its_layer_is_named_in_error(wrapper):
    model = wrapper(linear(), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=f"it is inside of {wrapper.__name__}, which rewrites"):
        adalora.nnx.adapt(model, nnx_config(".*"))


class Elsewhere(nnx.Module):
    """A table that is a child of two modules, of which the second reads its weight."""

    def __init__(self, *, within):
        class Head(nnx.Module):
            def __init__(self, table):
                self.table = table

            def __call__(self, x):
                if within == "a function":
                    return (lambda x: x @ self.table.embedding[...].T)(x)
                return x @ getattr(self.table, "embedding")[...].T  # noqa: B009

        self.first = nnx.Sequential(nnx.Embed(7, 4, rngs=nnx.Rngs(0)))
        self.head = Head(self.first.layers[0])

    def __call__(self, ids):
        return self.head(self.first(ids))


@pytest.mark.parametrize("within", ["a function", "getattr"])
def test_merge_and_pissa_raise_if_another_module_reads_weight(within):
    adapted = adalora.nnx.adapt(Elsewhere(within=within), CONFIG)
    with pytest.raises(ValueError, match=r"cannot be merged.* the code of Head reads `.embedding`"):
        adalora.merge(adapted)
    with pytest.raises(ValueError, match=r"cannot be merged.* the code of Head reads `.embedding`"):
        adalora.inits.pissa_init(adapted)


class ReadKernel(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(64, 64, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.up(x) @ self.up.kernel[...]


def test_merge_raises_if_parent_reads_quantized_weight():
    quantization = pytest.importorskip("adalora_jax.quantization")
    adapted = adalora.nnx.adapt(quantization.quantize(ReadKernel(), "int8"), CONFIG)
    with pytest.raises(ValueError, match=r"'up' cannot be merged.*or merge a float model"):
        quantization.merge(adapted, to="float32")


class Named(nnx.Module):
    """Children named like weights, which the model calls and does not read."""

    def __init__(self):
        self.embedding = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
        self.kernel = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, ids):
        embed = lambda ids: self.embedding(ids)
        return self.embedding.attend(self.kernel(embed(ids)))


def test_child_module_named_like_a_weight_merges():
    adapted, ids = adalora.nnx.adapt(Named(), CONFIG), jnp.arange(5)
    merged = adalora.merge(adapted)
    np.testing.assert_allclose(merged(ids), adapted(ids), rtol=1e-4, atol=1e-5)
