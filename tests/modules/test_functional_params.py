"""Increments merged into the parameters of a function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import Adapter, Layout
from adalora_jax.functional import merge, unmerge
from modules.functional_models import draw


def adapter(ins=5, outs=7, layout=None, **changes):
    return Adapter(draw(3, outs), draw(3), draw(3, ins), 0.5, layout or Layout("w"))._replace(
        **changes
    )


PARAMS = {"layers": [{"w": draw(5, 7), "b": draw(7)}], "head": draw(7, 3), "step": 3}


def test_merge_adds_the_increment_and_changes_nothing_else():
    one = adapter()
    merged = merge(PARAMS, {"layers/0": one})
    expected = PARAMS["layers"][0]["w"] + adalora.delta_weight(one)
    np.testing.assert_allclose(merged["layers"][0]["w"], expected, rtol=1e-6)
    assert merged["layers"][0]["b"] is PARAMS["layers"][0]["b"]
    assert (merged["head"] is PARAMS["head"], merged["step"]) == (True, 3)
    restored = unmerge(merged, {"layers/0": one})
    np.testing.assert_allclose(restored["layers"][0]["w"], PARAMS["layers"][0]["w"], atol=1e-6)
    assert merge(PARAMS, {}) == unmerge(PARAMS, {}) == PARAMS


def test_merge_rounds_once_to_the_dtype_of_the_weight():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"w": PARAMS["layers"][0]["w"]})
    one = adapter()
    expected = params["w"].astype(jnp.float32) + adalora.delta_weight(one)
    np.testing.assert_array_equal(merge(params, {"w": one})["w"], expected.astype(jnp.bfloat16))


def test_merge_replaces_saved_parameters_in_the_dtype_of_the_base():
    saved = {"head": jnp.ones((7, 3)), "layers/0": {"b": jnp.ones(7, jnp.bfloat16)}}
    merged = merge(PARAMS, saved)
    assert (merged["head"] == 1).all()
    assert (merged["layers"][0]["b"] == 1).all()
    assert merged["layers"][0]["b"].dtype == jnp.float32
    assert merged["layers"][0]["w"] is PARAMS["layers"][0]["w"]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"layers/1": adapter()}, r"`adapters\['layers/1'\]`: the adapter is for a weight called"),
        ({"layers/0": adapter(7, 5)}, r"`adapters\['layers/0'\]`: the adapter is for .* 7 x 5"),
        ({"layers/0": adapter(scale=None)}, r"`adapters\['layers/0'\]`: the scale is not known"),
        ({"head": jnp.ones((3, 7))}, r"`adapters\['head'\]`: has 'head' of shape \(3, 7\)"),
        ({"layers/0": {"c": jnp.ones(7)}}, r"has 'layers/0/c' .*the parameters have no array"),
        (
            {"layers/0": adapter(layout=Layout("w", kind="unknown"))},
            r"comes from a file .*like=adapted.init",
        ),
    ],
)
def test_adapters_of_other_parameters_raise(adapters, message):
    with pytest.raises(ValueError, match=message):
        merge(PARAMS, adapters)


def test_other_invalid_arguments_raise():
    with pytest.raises(TypeError, match=r"`adapters=list`: is not a mapping"):
        merge(PARAMS, [adapter()])
    with pytest.raises(ValueError, match=r"`adapters`: no adapter was found"):
        unmerge(PARAMS, {"head": jnp.ones((7, 3))})
    with pytest.raises(
        ValueError, match=r"`params`: the merged weight of 'layers/0' is not finite"
    ):
        merge(PARAMS, {"layers/0": adapter(lam=jnp.full(3, jnp.nan))}, safe=True)
    with pytest.raises(ValueError, match=r"`params`: 'a/b' is the path of two leaves"):
        merge({"a/b": draw(2, 2), "a": {"b": draw(2, 2)}}, {})
