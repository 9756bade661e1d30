"""Sharding of adapters, derived from each form in which JAX and Flax express that of the base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as adalora
from adalora_jax._src._compat import sharding_key
from adalora_jax._src.core.layout import Layout
from adalora_jax.sharding import adapter_specs

CONFIG = adalora.AdaLoraConfig(
    total_step=8, init_r=4, target_r=2, target_modules=".*(up|out|conv|table)", tfinal=2
)
ABSTRACT = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def plain(specs):
    """Remove from specs the layout of each adapter's weight."""
    is_adapter = lambda node: isinstance(node, adalora.Adapter)
    strip = lambda node: adalora.Adapter(*node) if is_adapter(node) else node
    return jax.tree.map(strip, specs, is_leaf=is_adapter)


def names_of(variable):
    """Return the names of axes in a variable's metadata."""
    return variable.get_metadata(sharding_key(variable))


def mesh(*sizes):
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize(
    ("layer", "shape", "spec"),
    [
        (Layout("kernel", (0,), (1,), (), "dense"), (8, 16), P("data", "model")),
        (Layout("kernel", (0,), (1,), (), "dense"), (4, 8, 16), P("data", None, "model")),
        (Layout("kernel", (0,), (1, 2), (), "general"), (8, 4, 6), P("data", "model", None)),
        (Layout("kernel", (0, 1), (2,), (), "general"), (4, 6, 8), P("model", "data")),
        (Layout("kernel", (1,), (2,), (0,), "einsum"), (4, 8, 16), P("model", "data")),
        (Layout("kernel", (2,), (0,), (1,), "einsum"), (3, 16, 4, 8), P(None, "data", "model")),
        (Layout("kernel", (0, 1), (2,), (), "conv"), (3, 8, 16), P(None, "data", "model")),
        (Layout("kernel", (0, 1), (2,), (), "conv"), (1, 8, 16), P(None, "data", "model")),
        (Layout("kernel", (0,), (1,), (), "dense"), (16, 8), P(("data", "model"))),
    ],
)
def test_each_device_holds_increment_of_its_weight_shard(layer, shape, spec):
    """Rows and columns of ΔW that a device holds are compared entry by entry, with NumPy alone."""
    sizes = dict(ABSTRACT.shape)
    specs = adapter_specs(layer, shape, spec)
    stack, n_in, n_out = layer.matrix(shape)
    numbers = np.arange(int(np.prod([*stack, n_in, n_out]))).reshape(*stack, n_in, n_out)
    weight = np.asarray(layer.to_weight(jnp.asarray(numbers), shape))

    def piece(array, spec, at):
        """Return the part of an array that the device at these mesh coordinates holds."""
        for axis, names in enumerate(spec):
            names = names if isinstance(names, tuple) else (names,) if names else ()
            index, count = 0, 1
            for name in names:
                index, count = index * sizes[name] + at[name], count * sizes[name]
            array = np.split(array, count, axis=axis)[index]
        return array

    rank = 3
    spread = lambda shape: np.zeros((*stack, rank, shape), int)
    columns = spread(n_out) + np.arange(n_out)
    rows = spread(n_in) + np.arange(n_in)
    split = 0
    for coordinates in np.ndindex(*sizes.values()):
        at = dict(zip(sizes, coordinates))
        own = set(piece(weight, spec, at).ravel().tolist())
        p, q = piece(columns, specs.p, at), piece(rows, specs.q, at)
        assert p.shape[:-1] == q.shape[:-1] == piece(spread(1)[..., 0], specs.lam, at).shape
        index = piece(np.arange(max(1, int(np.prod(stack)))).reshape(stack), P(*specs.lam[:-1]), at)
        held = numbers.reshape(-1, n_in, n_out)[index.ravel()]
        held = held[:, q.reshape(-1, q.shape[-1])[0]][:, :, p.reshape(-1, p.shape[-1])[0]]
        assert own <= set(held.ravel().tolist())
        split += held.size < weight.size
    assert split or (layer.kind == "conv" and shape[0] > 1)


def Dense(features, names, **kwargs):
    init = nn.initializers.lecun_normal()
    return nn.Dense(features, kernel_init=nn.with_partitioning(init, names), **kwargs)


class Stacked(nn.Module):
    """Layers under nn.scan and a separate one, all with metadata."""

    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            lambda up, x, _: (up(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
            metadata_params={nn.PARTITION_NAME: "data"},
        )
        up = Dense(8, (None, "model"), name="up")
        return Dense(16, ("data", "model"), name="out")(block(up, x, None)[0])


EXPECTED = {
    "out": adalora.Adapter(P(None, "model"), P(None), P(None, "data")),
    "up": adalora.Adapter(P("data", None, "model"), P("data", None), P("data", None, None)),
}


def test_specs_follow_linen_metadata():
    model, x = Stacked(), jnp.ones((2, 8))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert plain(adalora.linen.adapt(model, CONFIG).specs(variables, x)) == EXPECTED


def test_specs_follow_linen_logical_axes_and_rules():
    class Model(nn.Module):
        rules: tuple | None = None

        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            init = nn.with_logical_partitioning(init, ("embed", "hidden"), rules=self.rules)
            return nn.Dense(16, kernel_init=init, name="up")(x)

    rules, x = (("embed", "data"), ("hidden", ("model",))), jnp.ones((2, 8))
    wanted = adalora.Adapter(P(None, ("model",)), P(None), P(None, "data"))
    for own, context in ((rules, ()), (None, rules)):
        model = Model(own)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        with nn.logical_axis_rules(context):
            assert plain(adalora.linen.adapt(model, CONFIG).specs(variables, x)) == {"up": wanted}


def test_array_shardings_override_metadata():
    model, x = Stacked(), jnp.ones((2, 8))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    at = NamedSharding(ABSTRACT, P("model"))
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
    placed = jax.tree.map(place, variables)
    assert plain(adalora.linen.adapt(model, CONFIG).specs(placed, x)) == {
        "out": adalora.Adapter(P(None, None), P(None), P(None, "model")),
        "up": adalora.Adapter(P("model", None, None), P("model", None), P("model", None, None)),
    }


@pytest.mark.parametrize("boxed", [True, False])
def test_linen_adapters_have_same_values_on_mesh_as_without(boxed):
    model, x, key = Stacked(), jnp.ones((2, 8)), jax.random.key(1)
    config = CONFIG.replace(modules_to_save=["out"], target_modules=["up"])
    variables = model.init(jax.random.key(0), x)
    plain = adalora.linen.adapt(model, config).init(key, nn.meta.unbox(variables), x)
    one = mesh(1, 1)
    if boxed:  # metadata and a mesh context; the arrays may be anywhere
        with jax.set_mesh(one):
            placed = adalora.linen.adapt(model, config).init(key, variables, x)
    else:
        sharded = jax.device_put(nn.meta.unbox(variables), nn.get_sharding(variables, one))
        placed = adalora.linen.adapt(model, config).init(key, sharded, x)
    assert placed["up"].p.sharding == NamedSharding(one, EXPECTED["up"].p)
    assert placed["out"]["kernel"].sharding == NamedSharding(one, P("data", "model"))
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, placed))
    specs = adalora.linen.adapt(model, config).specs(variables, x)
    assert specs["out"] == {"bias": P(None), "kernel": P("data", "model")}


def test_rules_override_specs():
    model, x = Stacked(), jnp.ones((2, 8))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    whole = adalora.Adapter(P(), P(), P())
    by_pattern = adalora.linen.adapt(model, CONFIG, rules={"o.t": whole})
    everywhere = adalora.Adapter(P(None, None), P(None), P(None, None))
    assert plain(by_pattern.specs(variables, x)) == EXPECTED | {"out": everywhere}
    hash(by_pattern)
    function = lambda path, spec: spec._replace(q=P()) if path == "up" else spec
    by_function = adalora.linen.adapt(model, CONFIG, rules=function)
    changed = EXPECTED["up"]._replace(q=P(None, None, None))
    assert plain(by_function.specs(variables, x)) == EXPECTED | {"up": changed}
    for rules, words in (
        (
            {"down": whole},
            "`rules`: 'down' matches no adapted layer; name one of the adapted layers: out, up",
        ),
        ({"out": P()}, r"`rules`: P(artitionSpec)?\(\) for 'out' is not an Adapter"),
        (
            {"out": whole._replace(lam=P(None, None))},
            "has more axes than the adapter; give at most",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            adalora.linen.adapt(model, CONFIG, rules=rules).specs(variables, x)


class Nnx(nnx.Module):
    def __init__(self, rngs, names=(None, "model"), **metadata):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names, **metadata)
        make = lambda rngs: nnx.Linear(8, 8, kernel_init=init, rngs=rngs)
        stacked = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "data"})
        self.up = nnx.split_rngs(splits=4)(stacked)(rngs)
        self.out = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        layers = nnx.scan(
            lambda x, up: up(x),
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: "data"},
        )
        return self.out(layers(x, self.up))


def nnx_model(*args, **metadata):
    """Build the model on a mesh, sharded by its metadata."""
    one = mesh(1, 1)
    with jax.set_mesh(one):
        model = Nnx(nnx.Rngs(0), *args, **metadata)
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, one)))
    return model


def test_nnx_metadata_carries_over_to_adapters_and_optimizer():
    x = jnp.ones((2, 8))
    model = nnx_model()
    adapted = adalora.nnx.adapt(model, CONFIG)  # outside the context: the arrays know their mesh
    state = nnx.state(adapted, nnx.LoRAParam)
    named = nnx.get_partition_spec(state)["up"]["adalora"]
    specs = [named[name].get_value() for name in adalora.Adapter._fields]
    assert specs == [*EXPECTED["up"]]
    assert adapted.up.adalora.p.get_value().sharding.spec == EXPECTED["up"].p
    assert np.array_equal(adapted(x), model(x))
    optimizer = nnx.Optimizer(adapted, adalora.adalora(optax.adam(1e-3), CONFIG), wrt=nnx.LoRAParam)
    placed = adalora.sharding.shardings(optimizer.opt_state, state, tx=optimizer.tx)
    assert placed.inner[0].mu["up"]["adalora"]["p"].get_value().spec == EXPECTED["up"].p
    mask = placed.allocator.masks.stacked["up"].get_value()
    assert mask.spec == P(None, *EXPECTED["up"].lam)
    other = adalora.nnx.with_adapters(adapted, adalora.nnx.adapters(adapted))
    assert names_of(other.up.adalora.p) == tuple(EXPECTED["up"].p)


def test_nnx_specs_follow_logical_names_and_rules():
    rules = (("hidden", "model"),)
    model = nnx_model((None, "hidden"), sharding_rules=rules)
    param = adalora.nnx.adapt(model, CONFIG).up.adalora.p
    assert param.get_value().sharding.spec == EXPECTED["up"].p
    assert names_of(param) == ("data", None, "hidden")
    assert nnx.spmd.get_var_pspec(param) == EXPECTED["up"].p
    whole = adalora.Adapter(P("data"), P("data"), P("data"))
    adapted = adalora.nnx.adapt(model, CONFIG, rules={"up": whole})
    assert adapted.up.adalora.p.get_value().sharding.spec == P("data", None, None)
    assert names_of(adapted.up.adalora.p) == ("data", None, None)
