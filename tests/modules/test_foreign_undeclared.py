"""Layers of one weight that nobody declared: adapted if a trace proves their product."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.small_models import adapted_of, agree, draw, in_model, nnx_config

import adalora_jax as adalora
from adalora_jax import huggingface as peft
from modules import undeclared_layers as zoo

KEY = jax.random.key(0)

# A layer, the shape of its input, and its product for an adapter's P, λ and Q.
NNX = {
    "torch": (lambda r: zoo.TorchLinear(6, 4, rngs=r), (2, 3, 6), "...d,rd,r,rf->...f"),
    "torch square": (lambda r: zoo.TorchLinear(4, 4, rngs=r), (5, 4), "...d,rd,r,rf->...f"),
    "kernel": (lambda r: zoo.Kernel(6, 4, rngs=r), (2, 3, 6), "...d,rd,r,rf->...f"),
    "kernel square": (lambda r: zoo.Kernel(4, 4, rngs=r), (4,), "...d,rd,r,rf->...f"),
    "residual": (lambda r: zoo.Residual(4, 4, rngs=r), (3, 4), "...d,rd,r,rf->...f"),
    "heads": (lambda r: zoo.Heads(6, 2, 3, rngs=r), (5, 6), "...d,rd,r,rnh->...nh"),
    "cubic heads": (lambda r: zoo.Heads(3, 3, 3, rngs=r), (5, 3), "...d,rd,r,rnh->...nh"),
    "out of heads": (
        lambda r: zoo.OutOfHeads((2, 3), 5, rngs=r),
        (4, 2, 3),
        "...nh,rnh,r,rf->...f",
    ),
    "transposed heads": (
        lambda r: zoo.TransposedHeads(4, 2, 3, rngs=r),
        (2, 4),
        "...d,rd,r,rnh->...nh",
    ),
}
LINEN = {
    "torch": (zoo.LinenTorchLinear(4), (2, 3, 6), "...d,rd,r,rf->...f"),
    "torch square": (zoo.LinenTorchLinear(4), (5, 4), "...d,rd,r,rf->...f"),
    "kernel": (zoo.LinenKernel(4), (2, 3, 6), "...d,rd,r,rf->...f"),
    "kernel square": (zoo.LinenKernel(4), (4,), "...d,rd,r,rf->...f"),
    "heads": (zoo.LinenHeads(2, 3), (5, 6), "...d,rd,r,rnh->...nh"),
    "cubic heads": (zoo.LinenHeads(3, 3), (5, 3), "...d,rd,r,rnh->...nh"),
    "out of heads": (zoo.LinenOutOfHeads(5), (4, 2, 3), "...nh,rnh,r,rf->...f"),
}


def increment(product, adapter, x, y):
    """Return the adapter's term of an output ``y``, by hand."""
    _, q, _, p = product.split("->")[0].split(",")
    q = np.asarray(adapter.q).reshape(-1, *x.shape[x.ndim - len(q) + 1 :])
    p = np.asarray(adapter.p).reshape(-1, *y.shape[y.ndim - len(p) + 1 :])
    return adapter.scale * np.einsum(product, x, q, adapter.lam, p)


@pytest.mark.parametrize("targets", [".*", "all-linear", ["layers/0"]])
def test_undeclared_nnx_layer_is_described_as_adapted(targets):
    text = adalora.nnx.describe(in_model(zoo.Kernel(6, 4, rngs=nnx.Rngs(0))), nnx_config(targets))
    assert text.splitlines()[1].split()[:6] == ["layers/0", "dense", "1", "6", "4", "3"]
    assert text.splitlines()[-1].startswith("memory")


@pytest.mark.parametrize("name", NNX)
def test_undeclared_nnx_layer_computes_base_and_increment_and_merges(name):
    make, shape, product = NNX[name]
    base, x = in_model(make(nnx.Rngs(0))), draw(*shape)
    fresh = adalora.nnx.adapt(base, nnx_config(["layers/0"], init_lora_weights=True))
    np.testing.assert_array_equal(fresh(x), base(x))
    adapted = adalora.nnx.adapt(base, nnx_config(["layers/0"]))
    adapter = adalora.nnx.adapters(adapted)["layers/0"]
    term = increment(product, adapter, x, base(x))
    assert np.abs(term).max() > 1e-2
    agree(adapted(x), base(x) + term)
    merged = adalora.merge(adapted)
    agree(merged(x), base(x) + term)
    for one, other in zip(
        jax.tree.leaves(nnx.state(adalora.unmerge(merged, adapted))),
        jax.tree.leaves(nnx.state(base)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", LINEN)
def test_undeclared_linen_layer_computes_base_and_increment_and_merges(name):
    layer, shape, product = LINEN[name]
    model, x = nn.Sequential([layer]), draw(*shape)
    fresh, variables, adapters = adapted_of(model, x, ["layers_0"], init_lora_weights=True)
    np.testing.assert_array_equal(fresh.apply(variables, adapters, x), model.apply(variables, x))
    adapted, variables, adapters = adapted_of(model, x, ["layers_0"])
    y = model.apply(variables, x)
    term = increment(product, adapters["layers_0"], x, y)
    assert np.abs(term).max() > 1e-2
    agree(jax.jit(adapted.apply)(variables, adapters, x), y + term)
    agree(model.apply(adalora.merge(variables, adapters), x), y + term)
    text = adalora.linen.describe(model, adapted.config, variables, x)
    assert text.splitlines()[1].startswith("layers_0")
    assert text.splitlines()[-1].startswith("memory")


def stacked(count, make):
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(KEY, count))


NNX_REFUSED = {
    "scale": lambda r: zoo.Scaled(4, 4, rngs=r),
    "activation": lambda r: zoo.Active(4, 4, rngs=r),
    "normalised weight": lambda r: zoo.Normalised(4, 4, rngs=r),
    "quantised weight": lambda r: zoo.Quantised(4, 4, rngs=r),
    "gated halves": lambda r: zoo.Halves(4, 4, rngs=r),
    "two weights": lambda r: zoo.Gated(4, 4, rngs=r),
    "two weights that are added": lambda r: zoo.Sum(4, 2, 3, rngs=r),
    "look-up": lambda r: zoo.Table(4, 4, rngs=r),
    "tied look-up": lambda r: zoo.Tied(4, 5, rngs=r),
    "either orientation": lambda r: zoo.EitherWay(5, 4, rngs=r),
    "one number": lambda r: zoo.Kernel(1, 1, rngs=r),
    "dropout": lambda r: zoo.WithDropout(4, 5, rngs=r),
    "no attributes": lambda r: zoo.NoAttributes(4, 5, rngs=r),
    "other attributes": lambda r: zoo.OtherAttributes(4, 5, rngs=r),
    "batched": lambda r: zoo.Batched(3, 4, 5, rngs=r),
    "sum of neighbours": lambda r: zoo.Windowed(4, 4, rngs=r),
    "state": lambda r: zoo.Counting(4, 4, rngs=r),
    "groups as many as inputs": lambda r: zoo.Batched(4, 4, 4, rngs=r),
    "stacked": lambda r: stacked(3, lambda r: zoo.Heads(4, 2, 3, rngs=r)),
    "stacked as often as features": lambda r: stacked(4, lambda r: zoo.TorchLinear(4, 4, rngs=r)),
}


@pytest.mark.parametrize("name", NNX_REFUSED)
def test_nnx_module_of_another_computation_raises_and_is_left_out(name):
    layer = NNX_REFUSED[name](nnx.Rngs(0))
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=f"'layers/0' is a {kind}, which cannot be adapted"):
        adalora.nnx.adapt(in_model(layer), nnx_config(["layers/0"]))
    model = nnx.Sequential(layer, nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    assert list(adalora.nnx.adapters(adalora.nnx.adapt(model, nnx_config(".*")))) == ["layers/1"]


def test_nnx_weight_next_to_a_layer_is_not_adapted():
    model = adalora.nnx.adapt(in_model(zoo.Block(4, rngs=nnx.Rngs(0))), nnx_config(".*"))
    assert list(adalora.nnx.adapters(model)) == ["layers/0/norm"]


LINEN_REFUSED = {
    "scale": zoo.LinenTorchLinear(4, factor=0.5),
    "activation": zoo.LinenTorchLinear(4, activation=True),
    "normalised weight": zoo.LinenKernel(4, normalised=True),
    "two weights": zoo.LinenGated(4),
    "an inner axis": zoo.LinenHeads(4, 4, axis=-2),
    "sum of neighbours": zoo.LinenReduced(),
    "another method": zoo.LinenMethods(),
    "state": zoo.LinenState(),
}


@pytest.mark.parametrize("name", LINEN_REFUSED)
def test_linen_module_of_another_computation_raises_and_is_left_out(name):
    layer, x = LINEN_REFUSED[name], draw(4, 4)
    message = f"'layers_0' is a {type(layer).__name__}, which cannot be adapted"
    with pytest.raises(ValueError, match=message):
        adapted_of(nn.Sequential([layer]), x, ["layers_0"])
    _, _, adapters = adapted_of(nn.Sequential([layer, nn.Dense(4)]), x)
    assert list(adapters) == ["layers_1"]


def test_linen_look_up_and_weight_used_twice_and_flag_raise():
    with pytest.raises(ValueError, match="'layer' is a LinenTorchLinear, which cannot be adapted"):
        adapted_of(zoo.LinenFlags(), draw(2, 4), ["layer"])
    with pytest.raises(ValueError, match="'layers_0' is a LinenTable, which cannot be adapted"):
        adapted_of(nn.Sequential([zoo.LinenTable(7, 4)]), jnp.array([1, 2]), ["layers_0"])
    with pytest.raises(ValueError, match=r"'layer' cannot be adapted, .*also used outside of the"):
        adapted_of(zoo.LinenTied(), draw(2, 4), ["layer"])


def test_call_that_computes_something_else_raises():
    x, model = draw(2, 4), zoo.LinenTorchLinear(4)
    adapted, variables, adapters = adapted_of(model, x)
    assert adapted.apply(variables, adapters, x, factor=1.0).shape == (2, 4)
    with pytest.raises(ValueError, match="these arguments a LinenTorchLinear does not compute"):
        adapted.apply(variables, adapters, x, factor=2.0)
    kernel = adalora.nnx.adapt(zoo.Kernel(4, 4, rngs=nnx.Rngs(0)), nnx_config(".*"))
    np.testing.assert_array_equal(kernel(x=x, train=True), kernel(x))
    with pytest.raises(ValueError, match="these arguments a Kernel does not compute"):
        kernel(x, factor=2.0)


@pytest.mark.parametrize("name", ["mode", "square input", "dtype", "None"])
def test_nnx_call_that_computes_something_else_than_the_traced_one_raises(name):
    model = adalora.nnx.adapt(zoo.ByMode(4, 4, rngs=nnx.Rngs(0)), nnx_config(".*"))
    x, args = draw(2, 4), ()
    assert model(x).shape == (2, 4)
    if name == "mode":
        model.training = True
    elif name == "None":
        args = (None,)
    else:
        x = draw(2, 4, 4) if name == "square input" else x.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="these arguments a ByMode does not compute"):
        jax.jit(lambda x: model(x, *args))(x)


def test_layer_that_returns_a_tuple_raises_and_is_left_out():
    class Model(nnx.Module):
        def __init__(self):
            self.first = zoo.InTuple(4, 4, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.second(self.first(x)[0])

    class LinenModel(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="second")(zoo.LinenInTuple(name="first")(x)[0])

    with pytest.raises(ValueError, match="'first' is a InTuple, which cannot be adapted"):
        adalora.nnx.adapt(Model(), nnx_config(["first"]))
    adapted = adalora.nnx.adapt(Model(), nnx_config(".*"))
    assert list(adalora.nnx.adapters(adapted)) == ["second"]
    assert adapted(draw(2, 4)).shape == (2, 4)
    assert list(adapted_of(LinenModel(), draw(2, 4))[2]) == ["second"]


def test_weight_shared_with_another_class_of_layer_raises():
    class Model(nnx.Module):
        def __init__(self):
            self.first = zoo.TorchLinear(4, 4, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.second.kernel = self.first.weight

        def __call__(self, x):
            return self.second(self.first(x))

    with pytest.raises(ValueError, match="'second' shares its weight with 'first'"):
        adalora.nnx.adapt(Model(), nnx_config(["second"]))
    with pytest.raises(ValueError, match="'first' is a TorchLinear, which cannot be adapted"):
        adalora.nnx.adapt(Model(), nnx_config(["first"]))


def test_linen_call_with_another_stream_of_random_numbers_raises():
    x = draw(2, 4)
    adapted, variables, adapters = adapted_of(zoo.LinenRng(), x)
    assert adapted.apply(variables, adapters, x).shape == (2, 4)
    with pytest.raises(ValueError, match="these arguments a LinenRng does not compute"):
        adapted.apply(variables, adapters, x, rngs={"noise": KEY})


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(zoo.LinenTorchLinear(4, name="up")(x)), None


class Lifted(nn.Module):
    """An undeclared layer in ``nn.scan``, ``nn.vmap``, ``nn.remat`` and ``nn.jit``."""

    @nn.compact
    def __call__(self, x):
        stack = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Body, length=3, **stack)(name="h")(x, None)
        x = nn.vmap(zoo.LinenKernel, **stack)(4, name="mapped")(x)
        x = nn.remat(zoo.LinenKernel)(4, name="remat")(x)
        return nn.jit(zoo.LinenTorchLinear)(4, name="jit")(x)


def test_lifted_undeclared_linen_layers_have_an_adapter_per_slice_and_merge():
    model, x = Lifted(), draw(2, 3, 4)
    adapted, variables, adapters = adapted_of(model, x)
    ranks = {path: adapter.lam.shape for path, adapter in adapters.items()}
    assert ranks == {"h/up": (3, 3), "jit": (3,), "mapped": (2, 3), "remat": (3,)}
    y = jax.jit(adapted.apply)(variables, adapters, x)
    assert not np.allclose(y, model.apply(variables, x), atol=1e-2)
    agree(model.apply(adalora.merge(variables, adapters), x), y)


def test_adapters_of_undeclared_layers_are_exported_and_read_again(tmp_path):
    base, x = in_model(zoo.TorchLinear(4, 4, rngs=nnx.Rngs(0))), draw(2, 4)
    adapted = adalora.nnx.adapt(base, nnx_config(".*"))
    adapters = adalora.nnx.adapters(adapted)
    peft.save_pretrained(tmp_path, adapters, nnx_config(".*"))
    read = peft.load_pretrained(tmp_path, like=adapters).adapters
    other = adalora.nnx.adapt(base, nnx_config(".*"), rngs=nnx.Rngs(3))
    adalora.nnx.set_adapters(other, read)
    agree(other(x), adapted(x))


def test_function_of_targets_sees_undeclared_layers():
    def choose(path, module):
        return isinstance(module, zoo.Kernel)

    model = in_model(zoo.Kernel(6, 4, rngs=nnx.Rngs(0)))
    assert adalora.nnx.resolve(model, nnx_config(choose)).target_modules == "(?:layers/0)"


def test_nnx_layer_whose_weight_other_code_reads_is_merged_only_by_outputs():
    class Head(nnx.Module):
        def __init__(self, rngs):
            self.layer = zoo.Kernel(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.layer(x) @ self.layer.kernel[...]

    adapted = adalora.nnx.adapt(Head(nnx.Rngs(0)), nnx_config(".*"))
    with pytest.raises(ValueError, match=r"the code of Head reads `\.kernel` of a layer"):
        adalora.merge(adapted)


def test_undeclared_layer_is_declared_to_the_same_effect():
    base, x = in_model(zoo.TorchLinear(6, 4, rngs=nnx.Rngs(0))), draw(2, 6)
    layers = {zoo.TorchLinear: adalora.Layout("weight", ins=(1,), outs=(0,))}
    adapted, declared = (
        adalora.nnx.adapt(base, nnx_config(".*"), layers=given) for given in (None, layers)
    )
    np.testing.assert_array_equal(adapted(x), declared(x))
    assert jax.tree.structure(nnx.state(adapted)) == jax.tree.structure(nnx.state(declared))
