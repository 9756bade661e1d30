"""Axes of the weights of einsum layers, and the labels of their operands."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adalora_jax._src.core.layout import Layout
from adalora_jax._src.modules import einsum


@pytest.mark.parametrize(
    "module",
    [
        nn.DenseGeneral((2, 3), axis=(-1, 1), batch_dims=(0,)),
        nnx.LinearGeneral((5, 7), (2, 3), axis=(-1, 1), batch_axis={0: 4}, rngs=nnx.Rngs(0)),
    ],
    ids=["linen", "nnx"],
)
def test_general_layers_are_einsums_with_sorted_axes(module):
    assert einsum.general_axes(module) == ((0,), (-1, 1), (2, 3))
    layer = Layout("kernel", (1, 2), (3, 4), (0,), "general")
    xs, ws, ys = einsum.labels_of(layer, module, None, 4)
    assert (xs, ws, ys) == ("abcd", "abdef", "acef")


def test_stack_first_moves_stack_to_front_and_joins_inputs():
    layer, labels = Layout("w", (1, 2), (3,), (0,), "einsum"), ("bned", "nedf", "bnf")
    x = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    want = np.asarray(x).transpose(1, 0, 2, 3).reshape(3, 2, 20)
    np.testing.assert_array_equal(einsum.stack_first(layer, labels, x), want)
