"""Layouts that a function shows or that the user declares, and the names of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import Layout
from adalora_jax._src.modules.functional_layouts import candidates, find_layouts
from modules.functional_models import draw

_IDS = np.array([1, 2])
# A function of a weight and an input, their shapes, and (kind, ins, outs, stack, axes in front).
READ = {
    "in-out": (lambda w, x: x @ w, (5, 7), (2, 5), ("dense", (0,), (1,), (), 0)),
    "out-in": (lambda w, x: x @ w.T, (7, 5), (2, 5), ("dense", (1,), (0,), (), 0)),
    "heads": (
        lambda w, x: jnp.einsum("bd,hdk->bhk", x, w),
        (3, 5, 7),
        (2, 5),
        ("einsum", (1,), (0, 2), (), 0),
    ),
    "heads-out": (
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w),
        (3, 5, 7),
        (2, 3, 5),
        ("einsum", (0, 1), (2,), (), 0),
    ),
    "experts": (
        lambda w, x: jnp.einsum("ebd,efd->ebf", x, w),
        (3, 7, 5),
        (3, 2, 5),
        ("einsum", (2,), (1,), (0,), 0),
    ),
    "ragged": (
        lambda w, x: jax.lax.ragged_dot(x, w.swapaxes(1, 2), jnp.array([1, 0, 1])),
        (3, 7, 5),
        (2, 5),
        ("einsum", (2,), (1,), (0,), 0),
    ),
    "scan-of-ragged": (
        lambda w, x: jax.lax.map(lambda w: jax.lax.ragged_dot(x, w, jnp.array([1, 0, 1])), w),
        (4, 3, 5, 7),
        (2, 5),
        ("einsum", (1,), (2,), (0,), 1),
    ),
    "scan": (
        lambda w, x: jax.lax.map(lambda w: x @ w, w),
        (3, 5, 7),
        (2, 5),
        ("dense", (0,), (1,), (), 1),
    ),
    "index": (lambda w, x: x @ w[1], (3, 5, 7), (2, 5), ("dense", (0,), (1,), (), 1)),
    "traced-index": (
        lambda w, x: x @ w[x.argmax() % 3],
        (3, 5, 7),
        (2, 5),
        ("dense", (0,), (1,), (), 1),
    ),
    "while": (
        lambda w, x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w + 1, x),
        (5, 5),
        (2, 5),
        ("dense", (0,), (1,), (), 0),
    ),
    "index-behind": (
        lambda w, x: x @ w[:, :, 1],
        (5, 7, 3),
        (2, 5),
        ("einsum", (0,), (1,), (2,), 0),
    ),
    "reshaped": (
        lambda w, x: jnp.tensordot(x, w.reshape(5, 7, 2), 1),
        (5, 14),
        (2, 5),
        ("dense", (0,), (1,), (), 0),
    ),
    "split": (
        lambda w, x: sum(x @ part for part in jnp.split(w, 2, 1)),
        (5, 14),
        (2, 5),
        ("dense", (0,), (1,), (), 0),
    ),
    "broadcast": (
        lambda w, x: x[:, None] @ jnp.broadcast_to(w[None], (2, 5, 7)),
        (5, 7),
        (2, 5),
        ("dense", (0,), (1,), (), 0),
    ),
    "look-up": (lambda w, x: w[_IDS] + x, (7, 5), (2, 5), ("embed", (0,), (1,), (), 0)),
    "tied": (lambda w, x: (w[_IDS] + x) @ w.T, (7, 5), (2, 5), ("embed", (0,), (1,), (), 0)),
    "conv": (
        lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME"),
        (7, 5, 3, 2),
        (2, 5, 4, 4),
        ("conv", (2, 3, 1), (0,), (), 0),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_products_show_the_axes(name):
    fn, shape, x, expected = READ[name]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, x)]
    layer = find_layouts(jax.make_jaxpr(fn)(*args), {0: "w"}, args)[0]
    assert layer.weight == "w"
    axes = (layer.kind, layer.ins, layer.outs, layer.stack, len(shape) - layer.ndim)
    assert axes == expected


@pytest.mark.parametrize(
    ("fn", "shape"),
    [
        (lambda w, x: x @ w[0] + (x @ w[:, 0]), (5, 5, 5)),  # another axis is indexed
        (lambda w, x: jnp.einsum("bd,bdf->bf", x, w[_IDS]), (7, 5, 3)),  # the matrix of each row
        (lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w.reshape(3, 5, 5)), (15, 5)),
    ],
)
def test_axes_in_different_roles_are_not_read(fn, shape):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (2, 5))]
    assert find_layouts(jax.make_jaxpr(fn)(*args), {0: "w"}, args) == {0: None}


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x + w[:2],
        lambda w, x: x * w.sum(),
        lambda w, x: x @ (w / jnp.linalg.norm(w)),
        lambda w, x: x @ jnp.ones((5, 5)),
    ],
)
def test_weight_in_no_product_has_no_layout(fn):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((5, 5), (2, 5))]
    assert find_layouts(jax.make_jaxpr(fn)(*args), {0: "w"}, args) == {}


def mlp(params, x):
    x = jnp.tanh(x @ params["up"]["w"] + jnp.broadcast_to(params["up"]["b"], (2, 5)))
    x = x @ params["pair"]["a"] @ params["pair"]["b"] + params["added"]
    return x @ params["list"][0] @ params["head"]


PARAMS = {
    "up": {"w": draw(5, 5), "b": draw(5), "name": "a constant"},
    "pair": {"a": draw(5, 5), "b": draw(5, 5)},
    "added": draw(2, 5),
    "list": [draw(5, 5)],
    "head": draw(5, 3),
}


def test_weight_is_named_by_its_module_if_it_is_alone_in_it():
    found = candidates(mlp, PARAMS, (draw(2, 5),), None)
    assert {path for path, c in found.items() if c.layer} == {
        *("up", "pair/a", "pair/b", "list/0", "head")
    }
    assert found["up"].layer.weight == "w"
    assert found["up"].module is PARAMS["up"]
    assert found["pair"].layer is None
    assert "no product in the function" in found["added"].cannot_adapt
    bare = candidates(lambda w, x: x @ w, PARAMS["head"], (draw(2, 5),), None)
    assert [path for path, c in bare.items() if c.layer] == [""]


def test_declared_layout_replaces_the_one_that_is_read():
    layers = {"pair/.*": Layout("any", (1,), (0,)), "added": Layout(kind="weight")}
    found = candidates(mlp, PARAMS, (draw(2, 5),), layers)
    assert found["pair/a"].layer == Layout("a", (1,), (0,))
    assert found["added"].layer == Layout("added", kind="weight")
    assert found["head"].layer == Layout("head")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Layout()], r"`layers=list`: is not a dict; pass {pattern"),
        ({"head": "dense"}, r"`layers={'head': 'dense'}`: must map a pattern to a Layout"),
        ({dict: Layout()}, r"`layers=.*: must map a pattern to a Layout"),
        ({"haed": Layout()}, r"`layers`: 'haed' matches no parameter .*: added, head, list/0"),
        ({"head": Layout(ins=(0, 1), outs=(2,))}, r"does not fit 'head', of shape \(5, 3\)"),
        ({"head": Layout(kind="unknown")}, r"does not fit 'head'"),
        ({"head": Layout(shape=(5, 3))}, r"does not fit 'head'.*without a shape"),
    ],
)
def test_invalid_declarations_raise(layers, message):
    config = adalora.AdaLoraConfig(total_step=1, target_modules=["head"])
    with pytest.raises(ValueError, match=message):
        adalora.functional.adapt(mlp, PARAMS, config, draw(2, 5), layers=layers)
