"""Layers that are not Flax's: known by the names of their classes, or declared by the caller."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.small_models import agree, draw, nnx_config

import adalora_jax as adalora
from adalora_jax import Layout, functional
from modules import foreign_layers as zoo

KEY = jax.random.key(0)


class Model(nnx.Module):
    """A layer, and what a caller passes on to it."""

    def __init__(self, layer, **call):
        self.layer, self.call = layer, nnx.data(call)

    def __call__(self, x):
        return self.layer(x, **self.call)


def dense_general(*args, **kwargs):
    return lambda rngs: Model(zoo.DenseGeneral(*args, **kwargs, rngs=rngs))


KNOWN = {
    "MaxText feed-forward": (dense_general((6,), (4,)), (2, 3, 6)),
    "MaxText query": (dense_general((6,), (2, 4)), (2, 3, 6)),
    "MaxText attention output": (dense_general((2, 4), (6,), (-2, -1)), (3, 2, 4)),
    "MaxText other axes": (dense_general((4, 2), (6,), (-1, -2)), (3, 2, 4)),
    "MaxText inner axis": (dense_general((5,), (4,), (-3,)), (3, 5, 2, 4)),
    "MaxText bfloat16": (dense_general((6,), (4,), dtype=jnp.bfloat16), (2, 3, 6)),
    "MaxText block": (lambda rngs: Model(zoo.MlpBlock(4, 6, False, rngs=rngs)), (2, 3, 4)),
    "MaxText fused block": (lambda rngs: Model(zoo.MlpBlock(4, 6, True, rngs=rngs)), (2, 3, 4)),
    "MaxText groups": (
        lambda rngs: Model(zoo.DeepSeekV4GroupedLinear(2, 3, 4, rngs=rngs)),
        (5, 2, 3),
    ),
    "EasyDeL": (lambda rngs: Model(zoo.ParallelLinear(4, 4, rngs=rngs)), (2, 3, 4)),
    "EasyDeL one axis": (lambda rngs: Model(zoo.ParallelLinear(4, 5, rngs=rngs)), (4,)),
    "EasyDeL subclass": (
        lambda rngs: Model(zoo.ColumnParallelLinear(4, 5, use_bias=False, rngs=rngs)),
        (3, 4),
    ),
    "bonsai": (
        lambda rngs: Model(zoo.ShardedLinear(4, 5, rngs=rngs), out_sharding=None),
        (2, 3, 4),
    ),
    "bonsai no bias": (
        lambda rngs: Model(zoo.ShardedLinear(4, 5, use_bias=False, rngs=rngs), out_sharding=None),
        (2, 3, 4),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_layer_starts_as_base_and_merges(name):
    make, shape = KNOWN[name]
    base, x = make(nnx.Rngs(0)), draw(*shape)
    fresh = adalora.nnx.adapt(base, nnx_config(".*", init_lora_weights=True))
    np.testing.assert_array_equal(fresh(x), base(x))
    adapted = adalora.nnx.adapt(base, nnx_config(".*"))
    assert not np.allclose(adapted(x), base(x), atol=1e-2)
    if "bfloat16" not in name:  # which rounds the two sums differently
        agree(adalora.merge(adapted)(x), adapted(x))


@pytest.mark.parametrize("name", ["MaxText fused block", "EasyDeL", "bonsai"])
def test_known_layer_trains_within_budget_and_leaves_base_unchanged(name):
    make, shape = KNOWN[name]
    config = nnx_config(".*", init_lora_weights=True, tinit=1, tfinal=2)
    base, x = make(nnx.Rngs(0)), draw(*shape)
    adapted = adalora.nnx.adapt(base, config)
    before = jax.tree.map(jnp.copy, nnx.state(base))
    tx = adalora.adalora(optax.adam(1e-2), config)
    optimizer = nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return ((model(x) - 1) ** 2).mean()

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    for _ in range(config.total_step):
        step(adapted, optimizer)
    final = adalora.nnx.eval_model(adapted, optimizer)
    adapters = adalora.nnx.adapters(final)
    kept = sum(int((adapter.lam != 0).sum()) for adapter in adapters.values())
    assert kept == config.target_r * len(adapters)
    assert not np.allclose(final(x), base(x), atol=1e-3)
    agree(adalora.merge(final)(x), final(x))
    merged_from = nnx.state(adalora.unmerge(adalora.merge(final), final))
    assert jax.tree.structure(merged_from) == jax.tree.structure(before)
    unchanged = jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(base))
    assert all(jax.tree.leaves(unchanged))
    trained = nnx.state(adapted)
    for path, value in nnx.to_flat_state(before):
        np.testing.assert_array_equal(dict(nnx.to_flat_state(trained))[path][...], value[...])


class Convolutions(nn.Module):
    """Hugging Face's Conv1D, stacked by ``nn.scan`` and alone."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = body(name="h")(x, None)
        return zoo.FlaxConv1D(5, name="head")(x)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(zoo.FlaxConv1D(4, name="up")(x)), None


def test_known_linen_layer_starts_as_base_trains_and_merges():
    model, x = Convolutions(), draw(2, 3, 4)
    variables = model.init(KEY, x)
    config = nnx_config(".*", init_lora_weights=True, tinit=1, tfinal=2)
    adapted = adalora.linen.adapt(model, config)
    adapters = adapted.init(KEY, variables, x)
    assert {path: a.layout.ins for path, a in adapters.items()} == {"h/up": (1,), "head": (1,)}
    agree(adapted.apply(variables, adapters, x), model.apply(variables, x))
    tx = adalora.adalora(optax.adam(1e-2), config)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state):
        grads = jax.grad(lambda a: ((adapted.apply(variables, a, x) - 1) ** 2).mean())(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(config.total_step):
        adapters, state = step(adapters, state)
    final = adalora.eval_params(state, adapters)
    kept = sum(int((adapter.lam != 0).sum()) for adapter in final.values())
    assert kept == 4 * config.target_r  # three stacked layers and one
    agree(model.apply(adalora.merge(variables, final), x), adapted.apply(variables, final, x))


def test_stacked_known_nnx_layer_is_adapted_per_slice():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return zoo.ParallelLinear(4, 4, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = make(jax.random.split(KEY, 3))

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return x + layer(x)

            return forward(x, self.layers)

    base, x = Stack(), draw(2, 3, 4)
    adapted = adalora.nnx.adapt(base, nnx_config(".*"))
    assert adalora.nnx.adapters(adapted)["layers"].lam.shape == (3, 3)
    agree(adalora.merge(adapted)(x), adapted(x))


def stacked_along_one(metadata):
    layer = zoo.DenseGeneral((6,), (4,), rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((6, 3, 4)), **metadata)
    return layer


def of_layers_as_many_as_features():
    layer = zoo.DenseGeneral((3,), (4,), rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((3, 3, 4)))
    return layer


REFUSED = {
    "scaled": (
        lambda: zoo.ParallelLinear(4, 4, scale=0.5, rngs=nnx.Rngs(0)),
        r"its layout is Layout\('kernel'.*applies `mul` to the product",
    ),
    "quantised": (
        lambda: zoo.DenseGeneral((4,), (4,), quant=zoo.QUANT, rngs=nnx.Rngs(0)),
        "MaxText quantises its product",
    ),
    "scan axis": (lambda: stacked_along_one({}), r"\(6, 3, 4\) is stacked.*param_scan_axis=0"),
    "scan axis known": (
        lambda: stacked_along_one({"param_scan_axis": 1}),
        "stacked along another axis than the first",
    ),
    "ambiguous scan axis": (of_layers_as_many_as_features, "stacked along another axis"),
    "axis from the front": (
        lambda: zoo.DenseGeneral((4,), (4,), (1,), rngs=nnx.Rngs(0)),
        "counts from the first axis",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_known_layer_that_is_not_a_plain_product_raises(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"'layer' cannot be adapted, because .*{message}"):
        adalora.nnx.adapt(Model(make()), nnx_config(["layer"]))


def test_module_with_two_weights_raises_with_way_out():
    model, x = nn.Sequential([zoo.FeedForward(4, 6), nn.Dense(4)]), draw(2, 4)
    variables = model.init(KEY, x)
    adapted = adalora.linen.adapt(model, nnx_config(["layers_0"]))
    with pytest.raises(ValueError, match=r"several weights with an activation.*openpi's Einsum"):
        adapted.init(KEY, variables, x)
    table = adalora.linen.describe(model, nnx_config(".*"), variables, x)
    assert "not adapted: layers_0 (): it has several weights" in table


_IN_STACK = Layout("w", ins=(1,), outs=(2,), stack=(0,))
# A mixture of experts, its weights with their sizes [in, out], and the layouts to declare.
MIXTURES = {
    "Tunix MoELayer": (
        lambda rngs: zoo.MoELayer(8, 6, 4, rngs=rngs),
        {"gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8)},
        None,
    ),
    "Tunix MoERagged": (
        lambda rngs: zoo.MoERagged(8, 6, 4, rngs=rngs),
        {"gating_einsum": (8, 12), "linear": (6, 8)},
        None,
    ),
    "MaxText RoutedMoE, dense": (
        lambda rngs: zoo.RoutedMoE(8, 6, 4, False, rngs=rngs),
        {"wi_0": (8, 6), "wi_1": (8, 6), "wo": (6, 8)},
        {"(wi_0|wi_1|wo)/value": _IN_STACK},
    ),
    "MaxText RoutedMoE, sparse": (
        lambda rngs: zoo.RoutedMoE(8, 6, 4, True, rngs=rngs),
        {"wi_0": (8, 6), "wi_1": (8, 6), "wo": (6, 8)},
        {"(wi_0|wi_1|wo)/value": _IN_STACK},
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_of_experts_raises_with_way_out(name):
    make, _, _ = MIXTURES[name]
    with pytest.raises(ValueError, match=r"'layer' cannot be adapted, .*functional\.adapt\("):
        adalora.nnx.adapt(Model(make(nnx.Rngs(0))), nnx_config(["layer"]))


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_of_experts_is_adapted_as_a_function(name):
    make, weights, declared = MIXTURES[name]
    model, x = Model(make(nnx.Rngs(0))), draw(7, 8)
    graph, params = nnx.split(model)

    def fn(params, x):
        return nnx.merge(graph, params)(x)

    config = nnx_config(f".*({'|'.join(weights)})")
    adapted = functional.adapt(fn, params, config, x, layers=declared)
    adapters = adapted.init(KEY, params)
    sizes = {path: (a.q.shape[-1], a.p.shape[-1]) for path, a in adapters.items()}
    assert sizes == {f"layer/{name}": size for name, size in weights.items()}
    assert {a.lam.shape[:-1] for a in adapters.values()} == {(4,)}
    y = jax.jit(adapted.apply)(params, adapters, x)
    assert jnp.abs(y - model(x)).max() > 1e-3
    merged = functional.merge(params, adapters)
    agree(nnx.merge(graph, merged)(x), y)
    for one, other in zip(
        jax.tree.leaves(functional.unmerge(merged, adapters)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "call", "message"),
    [
        (
            lambda rngs: zoo.ParallelLinear(4, 4, rngs=rngs),
            {"w": jnp.ones((4, 4))},
            "ParallelLinear does not compute.*output does not depend on its weight",
        ),
        (
            lambda rngs: zoo.DenseGeneral((4,), (4,), rngs=rngs),
            {"slice_bounds": (0, 1)},
            "DenseGeneral does not compute.*applies `slice` to its weight",
        ),
    ],
)
def test_call_whose_arguments_change_the_product_raises(layer, call, message):
    model = adalora.nnx.adapt(Model(layer(nnx.Rngs(0)), **call), nnx_config(".*"))
    with pytest.raises(ValueError, match=message):
        model(draw(2, 4))
    model.call = {}
    assert model(draw(2, 4)).shape == (2, 4)


class Proj(nnx.Module):
    """A layer that a caller declares."""

    def __init__(self, shape=(4, 4), after=None, before=None):
        self.w = nnx.Param(jax.random.normal(KEY, shape))
        self.after, self.before = after or (lambda y: y), before or (lambda w: w)

    def __call__(self, x):
        return self.after(x @ self.before(self.w[...]))


class Experts(nnx.Module):
    """One product per expert."""

    def __init__(self):
        self.up = nnx.Param(jax.random.normal(KEY, (3, 4, 5)))

    def __call__(self, x):
        return jnp.einsum("ecd,edf->ecf", x, self.up[...])


class LinenProj(nn.Module):
    activation: bool = False

    @nn.compact
    def __call__(self, x, scale=1.0):
        y = x @ self.param("w", nn.initializers.normal(), (4, 4))
        y = y if scale == 1.0 else y * scale
        return jnp.tanh(y) if self.activation else y


EQUATION = adalora.Layout("w", equation="...d,df->...f")
DECLARED = {
    "equation": {Proj: EQUATION},
    "axes": {Proj: adalora.Layout("w", ins=(0,), outs=(1,))},
    "function": {Proj: lambda module: adalora.Layout("w", equation="bd,df->bf")},
    "name": {f"{__name__}.Proj": EQUATION},
}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_layer_is_adapted_and_merged(name):
    base, x, layers = Model(Proj()), draw(3, 4), DECLARED[name]
    adapted = adalora.nnx.adapt(base, nnx_config(["layer"]), layers=layers)
    assert not np.allclose(adapted(x), base(x), atol=1e-2)
    agree(adalora.merge(adapted)(x), adapted(x))
    assert "layer" in adalora.nnx.describe(base, nnx_config(["layer"]), layers=layers)


def test_declared_stack_of_experts_has_a_rank_per_expert():
    base, x = Model(Experts()), draw(3, 2, 4)
    layers = {Experts: adalora.Layout("up", equation="ecd,edf->ecf")}
    adapted = adalora.nnx.adapt(base, nnx_config(["layer"]), layers=layers)
    assert adalora.nnx.adapters(adapted)["layer"].lam.shape == (3, 3)
    agree(adalora.merge(adapted)(x), adapted(x))


def test_function_of_targets_is_resolved_with_declared_layers():
    config = nnx_config(lambda path, module: isinstance(module, Proj))
    layers = {Proj: EQUATION}
    resolved = adalora.nnx.resolve(Model(Proj()), config, layers=layers)
    assert resolved.target_modules == "(?:layer)"
    model, x = LinenProj(), draw(2, 4)
    config = nnx_config(lambda path, module: isinstance(module, LinenProj))
    layers = {LinenProj: EQUATION}
    variables = model.init(KEY, x)
    resolved = adalora.linen.resolve(model, config, variables, x, layers=layers)
    assert adalora.linen.describe(model, resolved, variables, x, layers=layers)


WRONG = {
    "activation": (lambda: Proj(after=jnp.tanh), EQUATION, "applies `tanh` to the product"),
    "factor": (lambda: Proj(after=lambda y: 2 * y), EQUATION, "applies `mul` to the product"),
    "changed weight": (lambda: Proj(before=jnp.tanh), EQUATION, "applies `tanh` to its weight"),
    "other axes": (
        Proj,
        adalora.Layout("w", equation="...d,fd->...f"),
        "it computes abc,cd->abd",
    ),
    "other axes by number": (
        lambda: Proj(before=jnp.transpose),
        adalora.Layout("w"),
        "it computes abc,dc->abd",
    ),
    "look-up": (Proj, adalora.Layout("w", kind="embed"), "its call raises"),
    "too many axes": (Proj, adalora.Layout("w", equation="hd,hdf->hf"), "has fewer axes"),
    "stacked weight": (
        lambda: Proj((2, 4, 4)),
        adalora.Layout("w", (1, 2), (0,)),
        "computes abcd,bde",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_declaration_raises_with_path(name):
    make, layout, message = WRONG[name]
    with pytest.raises(ValueError, match=rf"`layers={{Proj: Layout\(.*'layer' .*{message}"):
        adalora.nnx.adapt(Model(make()), nnx_config(".*"), layers={Proj: layout})


def test_weight_with_more_axes_than_declared_raises_at_call():
    base = Model(Proj((2, 4, 4)))
    adapted = adalora.nnx.adapt(base, nnx_config(".*"), layers={Proj: EQUATION})
    with pytest.raises(ValueError, match=r"its weight has 3 axes, and is not in nnx\.vmap"):
        adapted(draw(3, 4))


def test_wrong_linen_declaration_raises_in_init_or_apply():
    model, x = LinenProj(), draw(2, 4)
    variables, layers = model.init(KEY, x), {LinenProj: EQUATION}
    adapted = adalora.linen.adapt(model, nnx_config(".*"), layers=layers)
    adapters = adapted.init(KEY, variables, x)
    assert adapted.apply(variables, adapters, x, scale=1.0).shape == (2, 4)
    with pytest.raises(ValueError, match="with these arguments a LinenProj does not compute"):
        adapted.apply(variables, adapters, x, scale=2.0)
    for layers, message in (
        ({LinenProj: adalora.Layout("v")}, "it has no parameter 'v'"),
        ({LinenProj: adalora.Layout("w", equation="...d,fd->...f")}, "it computes ab,bc->ac"),
    ):
        with pytest.raises(ValueError, match=message):
            adalora.linen.adapt(model, nnx_config(".*"), layers=layers).init(KEY, variables, x)
    active = adalora.linen.adapt(LinenProj(True), nnx_config(".*"), layers={LinenProj: EQUATION})
    with pytest.raises(ValueError, match="applies `tanh` to the product"):
        active.init(KEY, variables, x)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"Proj": EQUATION}, "must map a class to a Layout"),
        ({Proj: "dense"}, "must map a class to a Layout"),
        ({Proj: adalora.Layout("w", shape=(4, 4))}, "without stack axes and shape"),
        ({"zoo.Proj": EQUATION}, rf"no module of the model.*{__name__}.Proj"),
        ({Proj: lambda module: None}, "the function returned None"),
        ({Proj: lambda module: adalora.Layout(kind="conv")}, "kind 'dense'"),
    ],
)
def test_invalid_declaration_raises(layers, message):
    with pytest.raises(ValueError, match=message):
        adalora.nnx.adapt(Model(Proj()), nnx_config(".*"), layers=layers)


def test_error_for_unknown_layer_shows_declaration_to_write():
    message = r"layers={Proj: Layout\('w', equation='...a,ab->...b'\)}\), or leave it out"
    with pytest.raises(ValueError, match=f"'layer' is a Proj, which cannot be adapted.*{message}"):
        adalora.nnx.adapt(Model(Proj()), nnx_config(["layer"]))
    model, x = LinenProj(), draw(2, 4)
    with pytest.raises(ValueError, match=r"layers={LinenProj: Layout\('w'"):
        adalora.linen.adapt(model, nnx_config(".*")).init(KEY, model.init(KEY, x), x)


class Table(nnx.Module):
    """A look-up of rows, ``offset`` rows further on."""

    def __init__(self, offset=0):
        self.table, self.offset = nnx.Param(jax.random.normal(KEY, (9, 4))), offset

    def __call__(self, ids):
        return self.table[...][ids + self.offset if self.offset else ids]

    def attend(self, x):
        return x @ self.table[...].T


class LinenTable(nn.Module):
    factor: float = 1.0

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(), (9, 4))

    def __call__(self, ids):
        return jnp.take(self.table, ids, axis=0)

    def attend(self, x):
        y = x @ self.table.T
        return y if self.factor == 1 else self.factor * y


def test_declared_look_up_is_adapted_also_as_output_layer():
    class Tied(nnx.Module):
        def __init__(self, table):
            self.table = table

        def __call__(self, ids):
            return self.table.attend(jnp.tanh(self.table(ids)))

    ids, layers = jnp.array([[0, 8, 3]]), {Table: adalora.Layout("table", kind="embed")}
    adapted = adalora.nnx.adapt(Tied(nnx.Embed(9, 4, rngs=nnx.Rngs(0))), nnx_config(".*"))
    assert adapted(ids).shape == (1, 3, 9)
    base = Model(Table())
    adapted = adalora.nnx.adapt(base, nnx_config(["layer"]), layers=layers)
    agree(adalora.merge(adapted)(ids), adapted(ids))
    with pytest.raises(ValueError, match="'layer' computes something else"):
        adalora.nnx.adapt(Model(Table(2)), nnx_config(["layer"]), layers=layers)
    layers = {LinenTable: adalora.Layout("table", kind="embed")}
    variables = LinenTable().init(KEY, ids)
    adapted = adalora.linen.adapt(LinenTable(), nnx_config(".*"), layers=layers)
    adapters, x = adapted.init(KEY, variables, ids), draw(2, 4)
    merged = adalora.merge(variables, adapters)
    agree(LinenTable().apply(merged, ids), adapted.apply(variables, adapters, ids))
    attended = adapted.apply(variables, adapters, x, method="attend")
    agree(LinenTable().apply(merged, x, method="attend"), attended)
    scaled = adalora.linen.adapt(LinenTable(0.5), nnx_config(".*"), layers=layers)
    with pytest.raises(ValueError, match="applies `mul` to the product"):
        scaled.init(KEY, variables, ids)
