"""The adapters of an NNX model, set and replaced."""

import chex
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
