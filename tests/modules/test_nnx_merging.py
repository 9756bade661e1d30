"""NNX models with their increments merged, in the classes of the base."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.small_models import Scaled, agree, draw, in_model, linear, nnx_config

import adalora_jax as adalora
from modules.nnx_attention import Model, X, config, paths

CONFIG = nnx_config(".*")
INPUTS = draw(3, 4)


def test_merged_model_equals_adapted_model_in_base_classes():
    model = Model(nnx.Rngs(0))
    adapted = adalora.nnx.adapt(model, config(init_lora_weights=False), nnx.Rngs(1))
    adapted.eval()
    want = adapted(X)
    merged = adalora.merge(adapted)
    chex.assert_trees_all_close(merged(X), want, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(adapted(X), want)
    assert paths(merged) == paths(model)
    assert type(merged.layers[0].up) is nnx.Linear


def test_nonfinite_merge_or_unmerge_of_another_model_raises():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    options = {"total_step": 9, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = adalora.nnx.adapt(model, adalora.AdaLoraConfig(**options))
    adapted.layers[0].adalora.lam[...] = jnp.full(12, jnp.inf)
    assert not bool(jnp.isfinite(adalora.merge(adapted).layers[0].kernel[...]).all())
    with pytest.raises(ValueError, match="merged weight of 'layers/0' is not finite in float32"):
        adalora.merge(adapted, safe=True)
    with pytest.raises(ValueError, match="has no layer 'layers/0'"):
        adalora.unmerge(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), adapted)
    with pytest.raises(ValueError, match="`adapters`: the model has no adapters"):
        adalora.unmerge(adapted, model)


def test_declared_nnx_layer_is_adapted_and_merged():
    base, x = in_model(linear(Scaled)), draw(2, 6)
    layers = {Scaled: adalora.Layout("kernel")}
    model = adalora.nnx.adapt(base, nnx_config(["layers.0"]), layers=layers)
    assert not np.allclose(model(x), base(x), atol=1e-2)
    merged = adalora.merge(model)
    agree(merged(x), model(x))
    assert type(merged.layers[0]) is Scaled


class WithScale(nnx.Linear):
    """A layer with two arguments, so that it cannot be traced alone."""

    def __call__(self, x, scale):
        return super().__call__(x * scale[None])


class Scaling(nnx.Module):
    def __init__(self, tanh=False):
        self.layer, self.tanh = WithScale(4, 4, rngs=nnx.Rngs(0)), tanh

    def __call__(self, x):
        weight = jnp.tanh(self.layer.kernel[...]) if self.tanh else 0.0
        return self.layer(x, jnp.full(4, 2.0)) + x @ (weight + jnp.zeros((4, 4)))


def test_layer_with_other_arguments_merges_only_with_inputs():
    adapted = adalora.nnx.adapt(Scaling(), CONFIG)
    with pytest.raises(
        ValueError, match=r"'layer' cannot be merged.* its class takes other arg.*inputs="
    ):
        adalora.merge(adapted)
    merged = adalora.merge(adapted, inputs=(INPUTS,))
    np.testing.assert_allclose(merged(INPUTS), adapted(INPUTS), rtol=1e-4, atol=1e-5)
    back = adalora.unmerge(merged, adapted)
    np.testing.assert_allclose(back(INPUTS), Scaling()(INPUTS), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="code outside of an adapted layer reads its weight"):
        adalora.merge(adalora.nnx.adapt(Scaling(tanh=True), CONFIG), inputs=(INPUTS,))


class ByHand(nnx.Module):
    def __init__(self):
        self.table = nnx.Embed(7, 4, rngs=nnx.Rngs(0))

    def __call__(self, ids):
        return self.table(ids) @ self.table.embedding[...].T


def test_merge_raises_if_parent_reads_weight():
    adapted = adalora.nnx.adapt(ByHand(), CONFIG)
    with pytest.raises(
        ValueError, match=r"'table' cannot be merged.* code of ByHand reads.*inputs="
    ):
        adalora.merge(adapted)
    with pytest.raises(ValueError, match="code outside of an adapted layer reads its weight"):
        adalora.merge(adapted, inputs=(jnp.arange(5),))
    with pytest.raises(ValueError, match="linen variables, which contain no model"):
        adalora.merge({"params": {}}, {}, inputs=(INPUTS,))


class Printed(ByHand):
    def __call__(self, ids):
        assert self.table.embedding[...].shape == (7, 4)
        return self.table(ids)


def test_weight_read_without_effect_merges_with_inputs():
    adapted, ids = adalora.nnx.adapt(Printed(), CONFIG), jnp.arange(5)
    merged = adalora.merge(adapted, inputs=(ids,))
    np.testing.assert_allclose(merged(ids), adapted(ids), rtol=1e-4, atol=1e-5)


class ReadsShape(nnx.Module):
    def __init__(self):
        self.table = nnx.Embed(7, 4, rngs=nnx.Rngs(0))

    def __call__(self, ids):
        return self.table(ids) / self.table.embedding.shape[0]


class ReadsWeightBeforeShape(ReadsShape):
    """Reads a variable called shape next to the weight, and no shape of the weight."""

    def __call__(self, ids):
        shape = (7, 4)
        return jnp.reshape(self.table.embedding, shape)[ids]


def test_weight_of_which_only_shape_is_read_merges_without_inputs():
    adapted, ids = adalora.nnx.adapt(ReadsShape(), CONFIG), jnp.arange(5)
    merged = adalora.merge(adapted)
    np.testing.assert_allclose(merged(ids), adapted(ids), rtol=1e-4, atol=1e-5)


def test_merge_raises_if_weight_is_read_next_to_variable_called_shape():
    with pytest.raises(ValueError, match="code of ReadsWeightBeforeShape reads"):
        adalora.merge(adalora.nnx.adapt(ReadsWeightBeforeShape(), CONFIG))


class Decoder(nnx.Module):
    """Looks its embedding up by hand, and takes keyword arguments; some logits are masked."""

    def __init__(self, mask=-jnp.inf):
        self.mask = mask
        self.embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
        self.wide, self.head = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in (1, 2))

    def __call__(self, ids, *, factor):
        x = self.embed.embedding[...][ids] * factor
        assert self.head.kernel[...].size == 16
        return jnp.where(jnp.arange(4) < 3, self.head(self.wide(x)), self.mask)


def call(model):
    return model(jnp.arange(5), factor=2.0)


def test_merge_compares_outputs_of_function_with_masked_logits():
    config = CONFIG.replace(exclude_modules=["embed"])
    adapted = adalora.nnx.adapt(Decoder(), config)
    merged = adalora.merge(adapted, inputs=call)
    np.testing.assert_allclose(call(merged), call(adapted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [-jnp.inf, float(jnp.finfo(jnp.float32).min), -1e10])
def test_merge_raises_with_names_of_layers_whose_weight_is_used_elsewhere(mask):
    adapted = adalora.nnx.adapt(Decoder(mask), CONFIG)
    with pytest.raises(ValueError, match="leave 'embed' out of target_modules"):
        adalora.merge(adapted, inputs=call)


def test_merge_raises_with_name_of_layer_whose_weight_is_tied():
    model = Decoder()
    model.twin = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    model.twin.embedding = model.embed.embedding
    with pytest.raises(ValueError, match="leave 'embed', 'twin' out of target_modules"):
        adalora.merge(adalora.nnx.adapt(model, CONFIG), inputs=call)


def test_merge_raises_if_phases_of_complex_outputs_differ():
    adapted = adalora.nnx.adapt(Decoder(0.0), CONFIG)
    with pytest.raises(ValueError, match="leave 'embed' out of target_modules"):
        adalora.merge(adapted, inputs=lambda model: 1 + 1j * call(model))


def test_merge_raises_if_function_returns_no_outputs():
    adapted = adalora.nnx.adapt(Decoder(), CONFIG.replace(exclude_modules=["embed"]))
    with pytest.raises(ValueError, match="`inputs`: the model returned no array"):
        adalora.merge(adapted, inputs=lambda model: None)
