"""Checkpoints of unrolled layers, restored into a scanned model, and the other way round."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.toy_problem import assert_same_bits, gradients

import adalora_jax as adalora
from adalora_jax._src import checkpoint, restack

CONFIG = adalora.AdaLoraConfig(
    total_step=9,
    init_r=4,
    target_r=2,
    tinit=2,
    tfinal=2,
    target_modules=["query", "out"],
    modules_to_save=["norm", "head"],
)
LAYERS = [f"layer_{i}" for i in range(3)]
STACKS = {"layers": LAYERS}
X = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = jnp.tanh(nn.Dense(3, name="query")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(5, name="out")(hidden), None


class Model(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            stack = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=len(LAYERS)
            )
            x, _ = stack(name="layers")(x, None)
        else:
            for name in LAYERS:
                x, _ = Layer(name=name)(x, None)
        return nn.Dense(2, name="head")(x)


def optimizer(config=CONFIG):
    return optax.chain(optax.clip_by_global_norm(1.0), adalora.adalora(optax.adamw(0.02), config))


@functools.cache
def parts(scanned):
    """Return ``(adapted model, base variables, adapters)``; both forms have the same values."""
    variables = Model().init(jax.random.key(0), X)
    if scanned:
        params = variables["params"]
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[n] for n in LAYERS))
        variables = {"params": {"layers": layers, "head": params["head"]}}
    adapted = adalora.linen.adapt(Model(scanned), CONFIG)
    return adapted, variables, adapted.init(jax.random.key(1), variables, X)


@functools.cache
def trainer(scanned):
    (adapted, variables, _), tx = parts(scanned), optimizer()

    def loss(adapters):
        y = adapted.apply(variables, adapters, X)
        return jnp.mean((y - 1) ** 2) + adalora.orthogonality(adapters, CONFIG)

    @jax.jit
    def step(adapters, state):
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    return step


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def run(request, tmp_path_factory):
    """Return a form, a checkpoint of step 5 in it, and the states of steps 5 and 9."""
    folder = tmp_path_factory.mktemp("run") / "5"
    with jax.numpy_rank_promotion("allow"):  # LayerNorm
        step, adapters = trainer(request.param), parts(request.param)[-1]
        state = adapters, optimizer().init(adapters)
        for _ in range(5):
            state = step(*state)
        checkpoint.save(folder, *state, CONFIG)
        end = state
        for _ in range(4):
            end = step(*end)
    return request.param, folder, state, end


def by_name(adapters, opt_state):
    """Return the arrays of a state by name, as they are stored."""
    return checkpoint._state(adapters, checkpoint._map_allocators(checkpoint._by_path, opt_state))


def assert_same_values(unrolled, scanned, assert_same):
    """Check that every array of one form has its equal in the other one."""
    compared = set()
    for name, leaf in unrolled.items():
        layer = next((layer for layer in LAYERS if f"/{layer}/" in name), None)
        if layer is None:
            assert_same(scanned[name], leaf)
            compared.add(name)
            continue
        whole = name.replace(layer, "layers")
        assert_same(scanned[whole][LAYERS.index(layer)], leaf)
        assert scanned[whole].shape == (len(LAYERS), *leaf.shape)
        compared.add(whole)
    assert compared == scanned.keys()


def assert_close(ours, theirs, rtol=1e-6, atol=0.0):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def test_other_form_has_the_same_bits_and_goes_on_alike(run):
    scanned, folder, saved, end = run
    with jax.numpy_rank_promotion("allow"):
        fresh = parts(not scanned)[-1]
    tx = optimizer()
    target = jax.eval_shape(lambda: (fresh, tx.init(fresh)))
    back = checkpoint.restore(folder, target=target, config=CONFIG, stacks=STACKS)
    assert jax.tree.structure((back.adapters, back.opt_state)) == jax.tree.structure(target)
    assert (back.step, int(back.allocator.step)) == (5, 5)
    pair = (saved, (back.adapters, back.opt_state))
    pair = [by_name(*state) for state in (pair[::-1] if scanned else pair)]
    assert_same_values(*pair, assert_same_bits)

    alone = checkpoint.restore(folder, tx, stacks=STACKS)
    assert_same_bits((alone.adapters, alone.opt_state), (back.adapters, back.opt_state))
    bare = checkpoint.restore(folder, stacks=STACKS)
    assert_same_bits(bare.adapters, back.adapters)
    assert_same_bits(bare.allocator, back.allocator)

    with jax.numpy_rank_promotion("allow"):
        step, state = trainer(not scanned), (back.adapters, back.opt_state)
        for _ in range(4):
            state = step(*state)
    pair = [by_name(*s) for s in ((state, end) if scanned else (end, state))]
    # Scanned and unrolled layers are fused differently.
    assert_same_values(*pair, functools.partial(assert_close, rtol=2e-4, atol=2e-6))


def test_same_gradients_give_the_same_updates(run):
    scanned, folder, (adapters, state), _ = run
    tx = optimizer()
    back = checkpoint.restore(folder, tx, stacks=STACKS)
    grads = gradients(adapters, seed=0)
    other = {f"adapters/{name}": leaf for name, leaf in checkpoint._flatten_named(grads).items()}
    saved = {name: checkpoint._spec(leaf) for name, leaf in other.items()}
    moved = restack.moved_names(folder, saved, {}, STACKS)
    other = checkpoint._subtree("adapters", restack.regroup(other, moved, restack.regrouped_array))
    named = checkpoint._flatten_named(back.adapters)
    other = jax.tree.unflatten(jax.tree.structure(back.adapters), [other[name] for name in named])
    update = jax.jit(tx.update)
    updates = update(grads, state, adapters), update(other, back.opt_state, back.adapters)
    pair = [by_name(*each) for each in (updates[::-1] if scanned else updates)]
    assert_same_values(*pair, assert_close)


def layers(names, config=CONFIG, **sizes):
    """Return the adapters of layers of the given names, all different."""
    keys = jax.random.split(jax.random.key(0), len(names))
    return {
        name: adalora.init_adapter(key, 3, 4, config, rank=sizes.get(name, config.init_r))
        for key, name in zip(keys, names)
    }


def save(folder, adapters, tx=None, config=CONFIG):
    checkpoint.save(folder, adapters, (tx or optimizer(config)).init(adapters), config)
    return folder


def test_state_of_nested_optimizers_is_the_same_after_a_round_trip(tmp_path):
    def only_p(tree):
        return jax.tree.map(lambda label: label == "p", adalora.param_labels(tree))

    inner = optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(3)),
        optax.masked(optax.trace(0.9), only_p),
        optax.inject_hyperparams(optax.adam)(0.1),
    )
    tx = optax.MultiSteps(adalora.adalora(inner, CONFIG), 2).gradient_transformation()
    adapters = layers(["h/0/up", "h/0/down", "h/1/up", "h/1/down", "up"])
    state = jax.tree.map(
        lambda leaf: leaf + 0.5 if leaf.dtype == jnp.float32 else leaf, tx.init(adapters)
    )
    checkpoint.save(tmp_path / "unrolled", adapters, state, CONFIG)
    stacks = {"h": ["h/0", "h/1"]}
    scanned = checkpoint.restore(tmp_path / "unrolled", tx, stacks=stacks)
    assert set(scanned.adapters) == {"up", "h/up", "h/down"}
    checkpoint.save(tmp_path / "scanned", scanned.adapters, scanned.opt_state, CONFIG)
    back = checkpoint.restore(tmp_path / "scanned", tx, stacks=stacks)

    def data(tree):
        return jax.tree.map(checkpoint._data, tree)

    assert_same_bits(data((back.adapters, back.opt_state)), data((adapters, state)))


def test_layers_of_linen_are_restored_into_a_scanned_nnx_model(tmp_path):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.Linear(3, 4, rngs=rngs)

        def __call__(self, x):
            return self.query(x)

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=2)(nnx.vmap(Block))
            self.blocks = make(rngs)

        def __call__(self, x):
            return nnx.vmap(lambda block: block(x))(self.blocks)

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [nn.Dense(4, name=f"query_{i}")(x) for i in range(2)]

    config = CONFIG.replace(target_modules="query.*|.*/query", modules_to_save=None)
    variables = Unrolled().init(jax.random.key(0), X[:, :3])
    adapters = adalora.linen.adapt(Unrolled(), config).init(jax.random.key(1), variables, X[:, :3])
    save(tmp_path / "c", adapters, config=config)
    model = adalora.nnx.adapt(Scanned(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    optim = nnx.Optimizer(model, optimizer(config), wrt=nnx.LoRAParam)
    target = nnx.state(model, nnx.LoRAParam), optim.opt_state
    stacks = {"blocks/query": ["query_0", "query_1"]}
    back = checkpoint.restore(tmp_path / "c", target=target, stacks=stacks)
    nnx.update(model, back.adapters)
    optim.opt_state = back.opt_state
    restored = adalora.nnx.adapters(model)["blocks/query"]
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], list(restored))
        assert_same_bits(one, list(adapters[f"query_{i}"]))
    assert restored.layout.shape == (2, 3, 4)


def test_converted_arrays_have_the_shardings_of_the_target(tmp_path):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    save(tmp_path / "c", layers(["h/0", "h/1"]))
    target = checkpoint.restore(tmp_path / "c", optimizer(), stacks={"h": ["h/0", "h/1"]})
    target = jax.device_put(target[:2], at)
    back = checkpoint.restore(tmp_path / "c", target=target, stacks={"h": ["h/0", "h/1"]})
    assert {leaf.sharding for leaf in jax.tree.leaves(back[:2])} == {at}
    assert_same_bits(back[:2], target)


def test_forms_that_do_not_fit_raise(tmp_path):
    names = ["layer_0/query", "layer_1/query", "layer_1/key", "stack", "head"]
    adapters = layers(names, **{"head": 3})
    adapters["stack"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[adapters["stack"]] * 2)
    save(tmp_path / "c", adapters)

    def refuse(stacks, message):
        with pytest.raises(ValueError, match=message):
            checkpoint.restore(tmp_path / "c", optimizer(), stacks=stacks)

    refuse({"layers": "layer_{i}"}, "`stacks=.*: must map the path of each stack")
    refuse({"layers": ["layer_0", "layer_0"]}, "each of them once; pass a dict")
    pair, one = ["layer_0", "layer_1"], ["layer_0"]
    for layers_ in ([], set(pair), iter(pair), dict.fromkeys(pair), b"ab", 3, None, [0, 1], [""]):
        refuse({"layers": layers_}, "must map")
    for stacks in (["layers"], [], 3, "", {0: pair}, {"": pair}, {"layers/": pair}, {"/": pair}):
        refuse(stacks, "must map")
    for odd in (None, b"layer_1", "layer_1/", 1):
        refuse({"layers": [*one, odd]}, "must map")
    refuse({"layers": ["layer_0", "layer_1"]}, r"layer_1/key.* are not in every layer with one")
    refuse({"x": ["layer_0/query", "head"]}, r"since adapters/layer_0/query/.* in every layer")
    refuse({"x": ["layer_0", "layer_7"]}, "x, layer_7 have no adapter or parameter")
    refuse({"stack": ["a", "b", "c"]}, "stack/p.* have no first axis of 3 layers")
    experts = adalora.Layout("kernel", (1,), (2,), stack=(0,), shape=(2, 3, 4))
    experts = adapters["stack"]._replace(layout=experts)
    save(tmp_path / "experts", {"experts": experts})
    with pytest.raises(ValueError, match="experts have no first axis of 2 layers"):
        checkpoint.restore(tmp_path / "experts", stacks={"experts": ["a", "b"]})
    both = ["layer_0/query", "layer_1/query"]
    refuse({"head": both}, "gives an array two names, or two arrays one")
    refuse({"a/query": both, "a": ["layer_0/query/p", "layer_1/query/p"]}, "two names")
    target = layers(both), optimizer().init(layers(both))
    with pytest.raises(ValueError, match=r"not expected \(.*or pass `stacks` if one of the"):
        checkpoint.restore(tmp_path / "c", target=target)


def test_layers_that_the_config_treats_differently_raise(tmp_path):
    def own(pattern, spec):
        return CONFIG.replace(rank_overrides={pattern: spec})

    def back(folder, config):
        return checkpoint.restore(folder, optimizer(config), stacks={"h": ["h_0", "h_1"]})

    limited = own("h_1", {"max_r": 3})
    folder = save(tmp_path / "c", layers(["h_0", "h_1"], limited), config=limited)
    with pytest.raises(ValueError, match=r"`stacks`: 'h_1' was saved with .*max_r=3.* to 'h'"):
        back(folder, limited)
    alike = own("h_.", {"min_r": 1})
    folder = save(tmp_path / "d", layers(["h_0", "h_1"], alike), config=alike)
    with pytest.raises(ValueError, match="min_r=1"):
        back(folder, alike)
    assert back(folder, own("h|h_.", {"min_r": 1})).adapters["h"].lam.shape == (2, 4)
    both = layers(["h_0", "h_1"])
    both["h_1"] = both["h_1"]._replace(scale=3.0)
    folder = save(tmp_path / "e", both)
    with pytest.raises(ValueError, match="adapters/h_0 are not in every layer with one"):
        back(folder, CONFIG)
