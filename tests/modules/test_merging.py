"""Merged models compute what adapted models do; rounding, and increments that cannot be merged."""

import json
from pathlib import Path

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_models import (
    IDS,
    KEY,
    Tied,
    adapted_of,
    agree,
    draw,
    nnx_config,
)

import adalora_jax as adalora
from adalora_jax import huggingface, inits

ROOT = Path(__file__).parents[2]
CONFIG = adalora.AdaLoraConfig(total_step=10, init_r=4, target_r=2, init_lora_weights=False)


class Standardised(nn.Conv):
    """Weight standardisation, as in BiT."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        if name != "kernel":
            return w
        axes = {"axis": (0, 1, 2), "keepdims": True}
        return (w - w.mean(**axes)) / (w.std(**axes) + 1e-5)


class Halved(nn.Dense):
    """A layer whose call does not reach that of its base class."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        return x @ self.param("kernel", init, (x.shape[-1], self.features)) / 2


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


MERGED = {
    "square einsum": (nn.Einsum((8, 8), "bd,fd->bf"), draw(4, 8)),
    "transposed convolution": (
        nn.ConvTranspose(6, (3, 3), transpose_kernel=True),
        draw(1, 5, 5, 6),
    ),
    "general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), draw(2, 2, 3)),
    "attention": (nn.MultiHeadDotProductAttention(2), draw(2, 3, 4)),
    "recurrent": (nn.RNN(nn.OptimizedLSTMCell(5)), draw(2, 3, 4)),
    "extended": (Doubled(5), draw(2, 4)),
    "tied, attended": (Tied("attend"), IDS),
    "tied by hand": (Tied("by hand"), IDS),
    "tied, applied": (Tied("applied"), IDS),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_model_equals_adapted_model(name):
    model, x = MERGED[name]
    adapted, variables, adapters = adapted_of(model, x)
    output = adapted.apply(variables, adapters, x)
    assert not np.allclose(output, model.apply(variables, x), atol=1e-2)
    merged = adalora.merge(variables, adapters)
    agree(model.apply(merged, x), output)
    restored = adalora.unmerge(merged, adapters)
    agree(model.apply(restored, x), model.apply(variables, x))


TRANSFORMED = {
    "standardised": (Standardised(5, (3, 3)), draw(1, 6, 6, 3)),
    "normalised": (nn.Sequential([nn.WeightNorm(nn.Dense(6))]), draw(2, 4)),
    "more than a product": (Halved(6), draw(2, 4)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_layer_that_transforms_its_weight_is_adapted_but_not_merged(name):
    if name == "normalised" and flax.__version__ == "0.12.3":
        pytest.skip("WeightNorm reads the paths of nested dictionaries alone")
    model, x = TRANSFORMED[name]
    adapted, variables, adapters = adapted_of(model, x)
    output = adapted.apply(variables, adapters, x)
    assert not np.allclose(output, model.apply(variables, x), atol=1e-2)
    (path,) = adapters
    for function in (adalora.merge, adalora.unmerge, inits.pissa_init):
        with pytest.raises(ValueError, match=rf"increment of '{path}' cannot be merged: its layer"):
            function(variables, adapters)
    # Without the note the merged model would be a different one.
    layout = adapters[path].layout
    unaware = adapters[path]._replace(layout=adalora.Layout(**vars(layout) | {"note": ""}))
    naive = model.apply(adalora.merge(variables, {path: unaware}), x)
    assert not np.allclose(naive, output, atol=1e-2)


def test_declared_linen_layer_is_adapted_and_merged():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (5, 3, 2))  # [out, in, in]
            return jnp.einsum("...ij,oij->...o", x, w)

    x = draw(4, 3, 2)
    variables = Turned().init(KEY, x)
    layers = {Turned: adalora.Layout("w", ins=(1, 2), outs=(0,))}
    adapted = adalora.linen.adapt(Turned(), nnx_config(".*"), layers=layers)
    adapters = adapted.init(KEY, variables, x)
    output = adapted.apply(variables, adapters, x)
    assert not np.allclose(output, Turned().apply(variables, x), atol=1e-2)
    agree(Turned().apply(adalora.merge(variables, adapters), x), output)


def test_merging_adapters_from_file_without_layout_requires_like(tmp_path):
    model, x = nn.Einsum((8, 8), "bd,fd->bf"), draw(4, 8)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="flat")(nn.Einsum((8, 8), "bd,fd->bf", name="square")(x))

    adapted, variables, adapters = adapted_of(Model(), x)
    output = adapted.apply(variables, adapters, x)
    huggingface.save_pretrained(tmp_path, adapters, adapted.config)
    alone = huggingface.load_pretrained(tmp_path).adapters
    agree(adapted.apply(variables, alone, x), output)
    with pytest.raises(ValueError, match=r"'square'.*does not specify the axes.*like="):
        adalora.merge(variables, alone)
    known = huggingface.load_pretrained(tmp_path, like=adapters).adapters
    agree(Model().apply(adalora.merge(variables, known), x), output)
    del model


def adapter(seed, ins, outs, stack=()):
    return adalora.init_adapter(jax.random.key(seed), ins, outs, CONFIG, stack=stack)


@pytest.fixture
def pruned():
    adapters = {"a/query": adapter(0, 5, 6), "a/up": adapter(1, 5, 7, (2,)), "b": adapter(2, 3, 3)}
    masks = {
        "a/query": jnp.array([False, True, False, True]),
        "a/up": jnp.array([[True, False, False, False], [False, True, True, True]]),
        "b": jnp.zeros(4, bool),
    }
    return adapters, masks


def test_merge_rounds_once_to_dtype_of_weight(pruned):
    adapters, _ = pruned
    kernel = jax.random.normal(jax.random.key(9), (5, 6)).astype(jnp.bfloat16)
    variables = {"params": {"a": {"query": {"kernel": kernel, "bias": jnp.zeros(6)}}}}
    one = {"a/query": adapters["a/query"]}
    merged = adalora.merge(variables, one)["params"]["a"]["query"]["kernel"]
    delta = adalora.delta_weight(one["a/query"])
    want = (kernel.astype(jnp.float32) + delta).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(merged, want)
    chex.assert_trees_all_equal(variables["params"]["a"]["query"]["kernel"], kernel)


def test_merging_mismatched_or_nonfinite_weight_raises(pruned):
    adapters, _ = pruned
    variables = {"params": {"a": {"query": {"kernel": jnp.zeros((6, 5))}}}}
    with pytest.raises(
        ValueError, match=r"'a/query'\]`: the adapter is for \[\] matrices of 5 x 6, but the weight"
    ):
        adalora.merge(variables, {"a/query": adapters["a/query"]})
    with pytest.raises(
        ValueError, match=r"`adapters\['b'\]`: is not a layer of the model, whose parameters are a;"
    ):
        adalora.merge(variables, {"b": adapters["b"]})
    fitting = {"params": {"a": {"query": {"kernel": jnp.full((5, 6), jnp.inf)}}}}
    with pytest.raises(ValueError, match="'a/query' is not finite"):
        adalora.merge(fitting, {"a/query": adapters["a/query"]}, safe=True)


@pytest.mark.parametrize(("dtype", "small"), [("float32", 2**-23), ("bfloat16", 2**-8)])
def test_unmerge_restores_weight_to_one_rounding(dtype, small):
    one = {"a/query": adapter(0, 5, 6)}
    kernel = jax.random.normal(jax.random.key(9), (5, 6)).astype(dtype)
    variables = {"params": {"a": {"query": {"kernel": kernel}}}}
    merged = adalora.merge(variables, one)
    back = adalora.unmerge(merged, one)["params"]["a"]["query"]["kernel"]
    assert back.dtype == kernel.dtype
    largest = jnp.abs(merged["params"]["a"]["query"]["kernel"]).astype(jnp.float32) + 1
    error = jnp.abs(back.astype(jnp.float32) - kernel.astype(jnp.float32))
    assert bool((error <= small * largest).all())
    assert bool((error > 0).any()), "or this would test nothing"


def test_guide_states_measured_merge_errors():
    rows = json.loads((ROOT / "benchmarks/merging.json").read_text())["rows"]
    lost = {
        (row["dtype"], row["increment to weight"]): 100 * row["error of the increment"]
        for row in rows
    }
    guide = (ROOT / "docs/how-to/evaluate-and-ship.md").read_text(encoding="utf-8")
    for ratio in (0.1, 0.01, 0.001):
        cells = f"{lost['bfloat16', ratio]:.1f} % | {lost['float16', ratio]:.1f} %"
        assert f"| {ratio} | {cells} |" in guide


@pytest.mark.parametrize("adapters", [None, 3, "x", {"params": {"up": jnp.ones(2)}}])
def test_unmerging_without_adapters_raises(adapters):
    with pytest.raises(ValueError, match="`adapters`: no adapter was found"):
        adalora.unmerge({"params": {"up": {"kernel": jnp.ones((2, 2))}}}, adapters)
