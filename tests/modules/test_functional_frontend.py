"""Adapters of functions: a transformer in plain JAX, and Equinox models."""

from __future__ import annotations

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.small_models import agree

import adalora_jax as adalora
from adalora_jax import Layout, functional
from modules.functional_models import IDS, draw, transformer, transformer_params

KEY = jax.random.key(1)
NAMES = ["q", "v", "o", "up", "down", "embed"]


def config(**changes):
    options = {"total_step": 20, "init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 6}
    return adalora.AdaLoraConfig(**{**options, "target_modules": NAMES, **changes})


def random_like(adapters):
    """Return adapters with random factors in place of initial ones."""
    leaves, treedef = jax.tree.flatten(adapters)
    return treedef.unflatten([draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=first)
        self.mlp = eqx.nn.MLP(8, 8, 12, depth=1, key=second)
        self.norm = eqx.nn.LayerNorm(8)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(x)


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list
    conv: eqx.nn.Conv1d
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.embedding = eqx.nn.Embedding(11, 8, key=keys[0])
        self.blocks = [Block(keys[1]), Block(keys[2])]
        self.conv = eqx.nn.Conv1d(8, 8, 3, padding=1, key=keys[3])
        self.cell = eqx.nn.GRUCell(8, 8, key=keys[4])
        self.head = eqx.nn.Linear(8, 5, key=keys[5])

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids)
        for block in self.blocks:
            x = block(x)
        x = self.conv(x.T).T
        h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(8), x)
        return self.head(h)


def base_of(params, name):
    """Return a parameter, or the arrays of an Equinox module by name."""
    if isinstance(params, dict):
        return params[name]
    return {key: leaf for key, leaf in vars(getattr(params, name)).items() if eqx.is_array(leaf)}


def batched(model, ids):
    return jax.vmap(model)(ids)


EQUINOX = {
    "blocks/0/attention/key_proj": (8, 8),
    "blocks/0/mlp/layers/0": (8, 12),
    "blocks/1/mlp/layers/1": (12, 8),
    "cell/weight_hh": (8, 24),
    "conv": (24, 8),
    "embedding": (11, 8),
    "head": (8, 5),
}


@pytest.fixture(scope="module")
def equinox_model():
    with jax.numpy_rank_promotion("allow"):  # Equinox broadcasts implicitly
        return Model(jax.random.key(0))


def functions(equinox_model):
    return {
        "scan": (transformer, transformer_params()),
        "unrolled": (
            lambda params, ids: transformer(params, ids, unrolled=True),
            transformer_params(unrolled=True),
        ),
        "bfloat16": (transformer, transformer_params(dtype=jnp.bfloat16)),
        "equinox": (batched, equinox_model),
    }


@pytest.mark.usefixtures("flax_ranks")
@pytest.mark.parametrize("name", ["scan", "unrolled", "bfloat16", "equinox"])
def test_adapted_function_starts_as_the_base_and_equals_the_merged_function(equinox_model, name):
    fn, params = functions(equinox_model)[name]
    adapted = functional.adapt(fn, params, config(target_modules=".*"), IDS)
    adapters = adapted.init(KEY, params)
    apply = eqx.filter_jit(adapted.apply)
    start, base = apply(params, adapters, IDS), eqx.filter_jit(fn)(params, IDS)
    tolerance = 0.02 if name == "bfloat16" else 1e-5
    chex.assert_trees_all_close(start, base, rtol=tolerance, atol=tolerance)
    adapters = random_like(adapters)
    ours, theirs = apply(params, adapters, IDS), fn(functional.merge(params, adapters), IDS)
    assert ours.dtype == theirs.dtype
    assert jnp.abs(ours - fn(params, IDS)).max() > 0.05
    if name == "bfloat16":
        ours, theirs = (np.asarray(y, np.float32) for y in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=0.05 * np.abs(theirs).max())
    else:
        agree(ours, theirs)
    for leaf in jax.tree.leaves(adapted.init(KEY, params)):
        assert leaf.dtype == jnp.float32


@pytest.mark.usefixtures("flax_ranks")
def test_adapters_have_the_shapes_of_the_weights_that_equinox_uses(equinox_model):
    adapted = functional.adapt(batched, equinox_model, config(target_modules=".*"), IDS)
    shapes = {
        path: (adapter.q.shape[-1], adapter.p.shape[-1])
        for path, adapter in adapted.init(KEY, equinox_model).items()
    }
    assert len(shapes) == 17
    assert {path: shapes[path] for path in EQUINOX} == EQUINOX
    linear = config(target_modules="all-linear")
    chosen = functional.adapt(batched, equinox_model, linear, IDS).init(KEY, equinox_model)
    assert set(shapes) - set(chosen) == {"conv", "embedding"}


@pytest.mark.usefixtures("flax_ranks")
@pytest.mark.parametrize("name", ["scan", "equinox"])
def test_training_ends_within_the_budget_and_ships(equinox_model, name, tmp_path):
    fn, params = functions(equinox_model)[name]
    head = ["positions"] if name == "scan" else ["head"]
    names = [".*(up|down)", r".*(_proj|conv)"][name == "equinox"]
    options = config(target_modules=names, modules_to_save=head)
    adapted = functional.adapt(fn, params, options, IDS)
    trained = adapted.init(jax.random.key(2), params)
    arrays = [leaf for leaf in jax.tree.leaves(params) if eqx.is_array(leaf)]
    before = [np.array(leaf) for leaf in arrays]
    tx = adalora.adalora(optax.adamw(1e-2), options)
    state = tx.init(trained)

    traces = []

    @eqx.filter_jit
    def step(params, trained, state):
        traces.append(1)

        def loss(trained):
            y = adapted.apply(params, trained, IDS)
            return jnp.square(y - 1).mean() + adalora.orthogonality(trained, options)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    values = []
    for _ in range(20):
        trained, state, value = step(params, trained, state)
        values.append(float(value))
    assert values[-1] < values[0]
    assert len(traces) == 1
    matrices = sum(
        max(1, np.prod(a.lam.shape[:-1], dtype=int)) for a in adalora.adapters(trained).values()
    )
    assert sum(np.asarray(mask).sum() for mask in adalora.masks(state).values()) == 2 * matrices
    for old, leaf in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(old, leaf)
    trained, state = adalora.finish(state, trained)
    final = adalora.eval_params(state, trained)
    assert head[0] in final
    expected = adapted.apply(params, final, IDS)
    small = adalora.compact(final, state)
    merged = functional.merge(params, final)
    agree(adapted.apply(params, small, IDS), expected)
    agree(fn(merged, IDS), expected)
    agree(fn(functional.merge(params, small), IDS), expected)
    restored = functional.unmerge(merged, final)
    # The saved parameters keep their merged values.
    for leaf, target in zip(
        jax.tree.leaves(functional.merge(restored, {head[0]: base_of(params, head[0])})),
        jax.tree.leaves(params),
        strict=True,
    ):
        if eqx.is_array(leaf):
            np.testing.assert_allclose(leaf, target, atol=1e-5)
    adalora.checkpoint.save(tmp_path / "run", final, state, options, step=20)
    run = adalora.checkpoint.restore(tmp_path / "run", tx)
    chex.assert_trees_all_equal(run.adapters, final)
    agree(adapted.apply(params, run.adapters, IDS), expected)


@pytest.mark.usefixtures("flax_ranks")
def test_same_adapters_give_the_outputs_of_the_linen_front_end():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8, name="embed")(ids)
            x = nn.MultiHeadDotProductAttention(2, name="attn")(x)
            x = nn.gelu(nn.Conv(8, (3,), name="conv")(x))
            return nn.Dense(5, name="head")(x)

    model = Net()
    variables = model.init(KEY, IDS)
    options = config(target_modules=".*")
    linen = adalora.linen.adapt(model, options)
    fn = lambda params, ids: model.apply({"params": params}, ids)
    adapted = functional.adapt(fn, variables["params"], options, IDS)
    ours, theirs = adapted.init(KEY, variables["params"]), linen.init(KEY, variables, IDS)
    assert {path: a.p.shape for path, a in ours.items()} == {
        path: a.p.shape for path, a in theirs.items()
    }
    for path, adapter in theirs.items():
        assert ours[path].layout.same_axes(adapter.layout), path
        assert (ours[path].scale, ours[path].layout.weight) == (
            *(adapter.scale, adapter.layout.weight),
        )
    random = random_like(ours)
    same = {path: theirs[path]._replace(**adapter._asdict()) for path, adapter in random.items()}
    expected = linen.apply(variables, same, IDS)
    agree(adapted.apply(variables["params"], random, IDS), expected)
    agree(adapted.apply(variables["params"], same, IDS), expected)
    plain = jax.tree.map(lambda a: a, {path: a._asdict() for path, a in random.items()})
    agree(adapted.apply(variables["params"], plain, IDS), expected)


def test_stacked_layers_have_one_triplet_set_per_slice():
    params = transformer_params(depth=3)
    adapters = functional.adapt(transformer, params, config(), IDS).init(KEY, params)
    assert adapters["layers/up"].p.shape == (3, 4, 12)
    assert adapters["layers/attn/q"].q.shape == (3, 4, 8)
    assert adapters["layers/attn/o"].q.shape == (3, 4, 8)
    assert adapters["embed"].q.shape == (4, 11)


def test_inputs_may_have_other_shapes_and_static_leaves():
    def fn(params, batch, activation, factor):
        y = activation(batch["x"] @ params["w"]) * factor
        return {"y": y, "name": batch["name"]}

    params, x = {"w": draw(5, 7), "tag": "constant"}, draw(2, 5)
    adapted = functional.adapt(
        fn, params, config(target_modules=["w"]), {"x": x, "name": "a"}, jnp.tanh, 2
    )
    adapters = random_like(adapted.init(KEY, params))
    result = adapted.apply(params, adapters, {"x": draw(3, 4, 5), "name": "b"}, jnp.sin, 3.0)
    expected = fn(functional.merge(params, adapters), {"x": draw(3, 4, 5), "name": "b"}, jnp.sin, 3)
    agree(result["y"], expected["y"])
    assert result["name"] == "b"


def test_vmap_and_nested_transformations_work():
    params = transformer_params()
    adapted = functional.adapt(transformer, params, config(), IDS)
    adapters = random_like(adapted.init(KEY, params))
    one = lambda ids: adapted.apply(params, adapters, ids[None])[0]
    agree(jax.vmap(one)(IDS), adapted.apply(params, adapters, IDS))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapters)
    both = jax.jit(jax.vmap(lambda a: adapted.apply(params, a, IDS)))(many)
    agree(both[0], adapted.apply(params, adapters, IDS))
    grad = jax.grad(lambda p: adapted.apply(p, adapters, IDS).sum())(params)
    assert jax.tree.structure(grad) == jax.tree.structure(params)


def test_shapes_are_enough_to_adapt_describe_and_initialise():
    params = jax.eval_shape(transformer_params)
    ids = jax.ShapeDtypeStruct(IDS.shape, IDS.dtype)
    options = config(modules_to_save=["positions"])
    adapted = functional.adapt(transformer, params, options, ids)
    shapes = jax.eval_shape(adapted.init, KEY, params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    table = adapted.describe(params)
    assert table == functional.describe(transformer, params, options, ids)
    assert "layers/attn/q   einsum          2    8     8" in table
    assert "also trained: positions" in table


def test_adapters_are_sharded_like_their_weights():
    mesh = jax.make_mesh((1,), ("model",))
    params = {"w": jax.device_put(draw(8, 6), NamedSharding(mesh, PartitionSpec(None, "model")))}
    adapted = functional.adapt(
        lambda p, x: x @ p["w"], params, config(target_modules=["w"]), draw(2, 8)
    )
    assert adapted.specs(params)["w"].p == PartitionSpec(None, "model")
    adapters = adapted.init(KEY, params)
    assert adapters["w"].p.sharding.spec == PartitionSpec(None, "model")
    assert jax.tree.structure(adapters) == jax.tree.structure(
        adapted.specs(params), is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


def test_config_selects_excludes_and_overrides_as_for_modules():
    params = transformer_params(unrolled=True)
    fn = lambda params, ids: transformer(params, ids, unrolled=True)
    adapt = lambda **changes: functional.adapt(fn, params, config(**changes), IDS)
    chosen = lambda **changes: adapt(**changes).init(KEY, params)
    assert set(chosen(target_modules=["up"])) == {"layers/0/up", "layers/1/up"}
    assert set(chosen(target_modules=["up"], layers_to_transform=[1])) == {"layers/1/up"}
    assert set(chosen(target_modules=".*(up|down)", exclude_modules=["down"])) == {
        *("layers/0/up", "layers/1/up")
    }
    ranks = chosen(target_modules=["up"], rank_overrides={"0/up": 3}, rank_pattern=None)
    assert [a.lam.shape for a in ranks.values()] == [(3,), (4,)]

    def choose(path, node):
        return adalora.RankSpec(init_r=3) if isinstance(node, dict) and "w" in node else False

    options = functional.resolve(fn, params, config(target_modules=choose), IDS)
    adapters = functional.adapt(fn, params, options, IDS).init(KEY, params)
    assert len(adapters) == 4
    assert {a.lam.size for a in adapters.values()} == {3}
    with pytest.raises(ValueError, match=r"functional\.resolve\(fn, params, config"):
        adapt(target_modules=choose).init(KEY, params)


def test_declared_weights_are_adapted_wherever_they_are_used():
    params = transformer_params()
    layers = {"positions": Layout(kind="weight"), "attn/q": Layout(equation="h...d,dhk->h...k")}
    adapted = functional.adapt(
        transformer, params, config(target_modules=["positions", "q"]), IDS, layers=layers
    )
    adapters = random_like(adapted.init(KEY, params))
    assert adapters["layers/attn/q"].p.shape == (2, 2, 4, 4)
    expected = transformer(functional.merge(params, adapters), IDS)
    agree(adapted.apply(params, adapters, IDS), expected)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lora_dropout": 0.1}, r"`lora_dropout=0.1`: cannot be applied .* set lora_dropout=0.0"),
        ({"target_modules": ["querry"]}, r"'querry' matches no module.*layers/"),
        ({"target_modules": None}, "`target_modules=None`: no layer is selected; pass"),
        ({"target_modules": ["attn"]}, "'layers/attn' is a dict, .*: layers/attn/k"),
        (
            {"target_modules": ["positions"]},
            r"'positions' cannot be adapted, .*declare them: layers={'positions': Layout\(ins=",
        ),
        ({"exclude_modules": ["attn"]}, "'attn' matches 'layers/attn', which contains layers"),
        ({"rank_overrides": {"key": 2}}, "'key' matches no adapted layer"),
        ({"target_modules": ["up"], "modules_to_save": ["up"]}, "already trains 'layers/up'"),
    ],
)
def test_invalid_selection_raises(bad, message):
    with pytest.raises(ValueError, match=message):
        functional.adapt(transformer, transformer_params(), config(**bad), IDS)


def test_other_invalid_arguments_raise():
    params = transformer_params()
    adapted = functional.adapt(transformer, params, config(), IDS)
    adapters = adapted.init(KEY, params)
    with pytest.raises(TypeError, match=r"`fn=Model`: is not a function; pass one"):
        functional.adapt(Model, params, config(), IDS)
    with pytest.raises(TypeError, match=r"`config={}`: is not an AdaLoraConfig"):
        functional.adapt(transformer, params, {}, IDS)
    with pytest.raises(TypeError, match=r"`adapters=list`: is not a mapping"):
        adapted.apply(params, [adapters], IDS)
    with pytest.raises(TypeError, match=r"`key=int`: is not a PRNG key"):
        adapted.init(0, params)
    with pytest.raises(ValueError, match=r"`params`: the weight 'embed' has the shape None"):
        adapted.init(KEY, adapters)
    with pytest.raises(ValueError, match=r"`adapters\['other'\]`: is not a weight that is read"):
        adapted.apply(params, {"other": adapters["embed"]}, IDS)
    with pytest.raises(ValueError, match=r"`adapters\['embed'\]`: the adapter is for"):
        adapted.apply(params, {"embed": adapters["layers/up"]}, IDS)
    unknown = functional.adapt(transformer, params, config(modules_to_save=["nothing"]), IDS)
    with pytest.raises(ValueError, match=r"'nothing' matches no parameter or module"):
        unknown.init(KEY, params)
