"""The adapters of an NNX model, set and replaced."""

import chex
import flax.linen as nn
import numpy as np
import pytest
from flax import nnx
from support.small_models import in_model, linear, nnx_config

import adalora_jax as adalora
from modules.nnx_attention import Model, X, config


def test_set_adapters_replaces_all_adapters_of_model():
    adapted = adalora.nnx.adapt(Model(nnx.Rngs(0)), config(), nnx.Rngs(1))
    adapted.eval()
    adapters = adalora.nnx.adapters(adapted)
    other = adalora.nnx.adapt(Model(nnx.Rngs(0)), config(init_lora_weights=False), nnx.Rngs(2))
    other.eval()
    assert not np.allclose(other(X), adapted(X))
    adalora.nnx.set_adapters(adapted, adalora.nnx.adapters(other))
    chex.assert_trees_all_equal(adapted(X), other(X))
    adapters.pop("layers/0/up")
    with pytest.raises(ValueError, match="do not fit the model at layers/0/up"):
        adalora.nnx.set_adapters(adapted, adapters)


def test_with_adapters_leaves_out_layers_and_rejects_unknown_paths():
    model = adalora.nnx.adapt(in_model(linear()), nnx_config(".*"))
    bare = adalora.nnx.with_adapters(model, {})
    assert type(bare.layers[0]) is nnx.Linear
    assert list(adalora.nnx.adapters(model)) == ["layers/0"]
    with pytest.raises(ValueError, match=r"the model has no adapters at head; .*: layers/0"):
        adalora.nnx.with_adapters(model, {"head": adalora.nnx.adapters(model)["layers/0"]})


@pytest.mark.parametrize("model", [None, {}, nn.Dense(3)])
def test_adapters_of_what_is_no_nnx_module_raise(model):
    for function in (
        adalora.nnx.adapters,
        lambda model: adalora.nnx.set_adapters(model, {}),
        lambda model: adalora.nnx.with_adapters(model, {}),
        lambda model: adalora.nnx.describe(model, nnx_config(["up"])),
    ):
        with pytest.raises(TypeError, match=r"`model=.*`: is not a flax.nnx module"):
            function(model)


def test_invalid_new_adapters_raise():
    base = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    options = {"target_modules": ["layers.0"], "modules_to_save": ["layers.1"]}
    model = adalora.nnx.adapt(base, nnx_config(["layers.0"]).replace(**options))
    good = adalora.nnx.adapters(model)
    for function in (adalora.nnx.set_adapters, adalora.nnx.with_adapters):
        for new in (None, model):
            with pytest.raises(TypeError, match=r"`new=\w+`: is not a mapping"):
                function(model, new)
    with pytest.raises(ValueError, match="do not fit the model at layers/0"):
        adalora.nnx.set_adapters(model, {**good, "layers/0": 3})
    with pytest.raises(ValueError, match=r"`new\['layers/0'\]=int`: must be an Adapter"):
        adalora.nnx.with_adapters(model, {**good, "layers/0": 3})
    with pytest.raises(ValueError, match=r"`new\['layers/1'\]=int`: must be parameters"):
        adalora.nnx.with_adapters(model, {**good, "layers/1": 3})
    with pytest.raises(ValueError, match="where it is adapted: none"):
        adalora.nnx.with_adapters(base, good)
    assert list(adalora.nnx.adapters(adalora.nnx.with_adapters(model, good))) == list(good)
