"""Layouts of weights: kept with their adapter, and declared for a custom layer."""

import copy
import pickle

import flax.linen as nn
import jax
import numpy as np
import pytest
from support.small_models import adapted_of, draw, nnx_config

import adalora_jax as adalora


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"Dense": adalora.Layout()}, "must map a class to a Layout"),
        ({nn.Dense: adalora.Layout(kind="conv")}, "kind 'dense'"),
        ({nn.Dense: adalora.Layout(stack=(2,))}, "without stack axes"),
    ],
)
def test_invalid_layer_declaration_raises(layers, message):
    with pytest.raises(ValueError, match=message):
        adalora.linen.adapt(nn.Dense(3), nnx_config(".*"), layers=layers)


def test_layout_and_scale_are_kept_by_copies_and_transforms():
    adapted, variables, adapters = adapted_of(nn.Einsum((8, 8), "bd,fd->bf"), draw(4, 8))
    (adapter,) = adapters.values()
    assert (adapter.layout.ins, adapter.layout.outs) == ((1,), (0,))
    assert adapter.layout.shape == (8, 8)
    for other in (
        jax.tree.map(lambda leaf: 2 * leaf, adapter),
        jax.jit(lambda a: a)(adapter),
        pickle.loads(pickle.dumps(adapter)),
        copy.deepcopy(adapter),
        adapter._replace(lam=0 * adapter.lam),
    ):
        assert (other.scale, other.layout) == (adapter.scale, adapter.layout)
    mapping, x = {"": adapter._asdict()}, draw(4, 8)
    with pytest.raises(ValueError, match="`adapter`: the scale is not known"):
        adalora.merge(variables, mapping)
    outputs = adapted.apply(variables, mapping, x)  # the adapted model's config has the scale
    np.testing.assert_array_equal(outputs, adapted.apply(variables, adapters, x))
