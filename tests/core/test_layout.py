"""Layouts of weights: kept with their adapter, and declared for a custom layer."""

import copy
import dataclasses
import json
import pickle

import flax.linen as nn
import jax
import numpy as np
import pytest
from support.small_models import adapted_of, draw, nnx_config

import adalora_jax as adalora
from adalora_jax._src.core.layout import equation_problem, weight_axes


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


@pytest.mark.parametrize(
    ("equation", "axes"),
    [
        ("...d,df->...f", ((), (0,), (1,))),
        ("BTD,NDH->BTNH", ((), (1,), (0, 2))),
        ("BTNH,NHD->BTD", ((), (0, 1), (2,))),
        ("ecd,edf->ecf", ((0,), (1,), (2,))),
        ("BSD,CKDH->CBSKH", ((0,), (2,), (1, 3))),  # several outputs of one input
        ("bd,dd->bd", None),  # a diagonal
        ("bd,d->bd", None),  # no output axis
        ("bd,df", None),
        ("bd,...df->...bf", None),
        ("bcd,df->bf", None),  # a sum over an axis that the weight lacks
        ("bd,de,ef->bf", None),
    ],
)
def test_weight_axes_are_stack_in_and_out(equation, axes):
    assert weight_axes(equation) == axes


@pytest.mark.parametrize(
    ("equation", "problem"),
    [
        ("...d,df", "not of the form"),
        ("...d,df,fg->...g", "not of the form"),
        ("df->f", "not of the form"),
        ("...d,...df->...f", "the weight has '...'"),
        ("...d,df->f", "'...' is in only one"),
        ("bd,dd->bd", "'d' is repeated in the weight"),
        ("bb,bf->f", "'b' is repeated in the input"),
        ("bcd,df->bf", "'c' of the input is neither in the weight nor in the output"),
        ("bd,df->b", "'f' of the weight is neither in the input nor in the output"),
        ("bd,df->bfg", "'g' of the output is in neither operand"),
        ("b1,1f->bf", "are not letters"),
        ("b,f->bf", "sums over no label"),
        ("bd,d->b", "no label of the output is the weight's alone"),
    ],
)
def test_invalid_equation_is_refused_with_its_label(equation, problem):
    assert problem in equation_problem(equation)
    assert weight_axes(equation) is None


def test_equation_determines_axes_and_kind():
    layout = adalora.Layout("w", equation="...gi,gio->...go")
    assert (layout.stack, layout.ins, layout.outs) == ((0,), (1,), (2,))
    assert layout.kind == "einsum"
    assert dataclasses.replace(layout, shape=(2, 3, 4)).equation == layout.equation
    assert adalora.Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert adalora.Layout("w", ins=(1,), outs=(0,), equation="...d,fd->...f").ins == (1,)


def test_layout_written_before_equations_is_read():
    values = adalora.Layout("w", shape=(2, 3)).to_dict()
    del values["equation"]
    assert adalora.Layout.from_dict(values) == adalora.Layout("w", shape=(2, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"equation": "bd,df"}, "`equation='bd,df'`: it is not of the form"),
        ({"equation": "bcd,df->bf"}, "label 'c' of the input"),
        ({"equation": "...d,fd->...f", "ins": (0,)}, r"`ins=\(0,\)`: contradicts equation"),
        ({"equation": "...d,fd->...f", "outs": (1,)}, r"`outs=\(1,\)`: contradicts equation"),
        ({"equation": "...d,fd->...f", "stack": (2,)}, r"`stack=\(2,\)`: contradicts equation"),
        ({"equation": "...d,df->...f", "kind": "conv"}, "`kind='conv'`: contradicts equation"),
        ({"weight": ""}, "`weight=''`: is not the name of a parameter"),
    ],
)
def test_invalid_equation_or_axes_that_contradict_it_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        adalora.Layout(**fields)
