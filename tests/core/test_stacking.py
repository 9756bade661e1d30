"""Adapters stacked by role: the same training as with separate ones, round trips and refusals."""

import copy
import dataclasses
import functools
import pickle
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import toy_problem

import adalora_jax as adalora
from adalora_jax import checkpoint
from adalora_jax._src.core.stacking import restack

CONFIG = adalora.AdaLoraConfig(total_step=8, init_r=3, target_r=2, tinit=1, tfinal=3, deltaT=1)
# Four roles; the third layer's "up" has another shape, and one adapter is a stack of two matrices.
SHAPES = {
    "layers/0/down": (6, 4, ()),
    "layers/0/up": (4, 6, ()),
    "layers/1/down": (6, 4, ()),
    "layers/1/up": (4, 6, ()),
    "layers/2/up": (4, 5, ()),
    "scanned/0": (4, 6, (2,)),
    "scanned/1": (4, 6, (2,)),
}
ROLES = 4


def params(config=CONFIG):
    """Return adapters and the parameters of a head beside them."""
    head = {"head": {"bias": jnp.zeros(3), "kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}}
    return toy_problem.adapters(config, shapes=SHAPES) | head


def loss(tree, step):
    """Return a smooth function of all leaves of the separate parameters."""
    leaves = jax.tree.leaves(adalora.unstack(tree))
    return sum(jnp.sum(jnp.sin((3 + i + step) * leaf)) for i, leaf in enumerate(leaves))


def train(tree, config, inner, penalty=True):
    """Return parameters, optimizer and masks after every step, for either form of parameters."""
    tx, seen = adalora.adalora(inner, config), []

    def total(tree, step):
        extra = adalora.orthogonality(tree, config) if penalty else 0.0
        return loss(tree, step) + extra

    @jax.jit
    def update(tree, state, step):
        updates, state = tx.update(jax.grad(total)(tree, step), state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    for step in range(config.total_step):
        tree, state = update(tree, state, jnp.float32(step))
        seen.append((adalora.unstack(tree), adalora.masks(state)))
    return tree, state, tx, seen


def smallest_first(inputs):
    """Rank triplets of one adapter by a number that depends on the whole adapter."""
    return inputs.sensitivity.lam - jnp.mean(inputs.sensitivity.p)


def centred(lam, weight):
    """Map λ by a number that depends on all λ of one adapter."""
    return lam - weight * jnp.mean(lam)


CONFIGS = {
    "default": {},
    "squared": {"orthogonality": "squared"},
    "overrides": {
        "rank_overrides": {
            r"layers/1/.*": adalora.RankSpec(min_r=2, max_r=3),
            r"scanned/0": adalora.RankSpec(max_r=1),
        }
    },
    "per_adapter": {"allocation": "per_adapter"},
    "budget_unit": {"budget_unit": "parameters"},
    "budget_function": {"budget_unit": lambda path, *sizes: 1 + ("1" in path)},
    "no_regrowth": {"allow_regrowth": False},
    "current": {"sensitivity_timing": "current", "lambda_lr_scale": 2.0},
    "soft_threshold": {"prox": "soft_threshold", "prox_weight": 1e-3},
    "prox": {"prox": centred, "prox_weight": 1e-2},
    "score": {"score": smallest_first},
    "penalty_in_update": {"orth_reg_in_update": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_equals_that_of_separate_adapters(name):
    config = CONFIG.replace(**CONFIGS[name])
    inner, penalty = optax.adamw(0.05), not config.orth_reg_in_update
    given = params(config)
    _, state, _, separate = train(given, config, inner, penalty)
    stacked, by_role, _, seen = train(adalora.stack(given), config, inner, penalty)
    assert 0 < sum(int(m.sum()) for m in separate[-1][1].values()) < 3 * 9  # it prunes
    for (tree, masks), (other, found) in zip(separate, seen):
        chex.assert_trees_all_equal(masks, found)
        chex.assert_trees_all_close(tree, other, rtol=2e-5, atol=1e-6)
    # The allocator's state has the same form for both.
    chex.assert_trees_all_close(state.allocator, by_role.allocator, rtol=1e-4, atol=1e-6)
    assert adalora.ranks(by_role) == adalora.ranks(state)
    assert adalora.rank_pattern(by_role) == adalora.rank_pattern(state)
    assert adalora.summary(stacked, by_role) == adalora.summary(adalora.unstack(stacked), state)


def test_without_a_penalty_training_has_the_same_bits():
    """Only the mean over adapters adds in another order."""
    given = params()
    *_, separate = train(given, CONFIG, optax.sgd(0.05), penalty=False)
    *_, seen = train(adalora.stack(given), CONFIG, optax.sgd(0.05), penalty=False)
    toy_problem.assert_same_bits(separate, seen)


def test_ties_are_broken_by_order_of_parameters_not_of_roles():
    config = CONFIG.replace(score=lambda inputs: jnp.ones_like(inputs.sensitivity.lam))
    separate, seen = (
        train(tree, config, optax.sgd(0.1))[-1][-1][1]
        for tree in (params(config), adalora.stack(params(config)))
    )
    flat = np.concatenate([np.ravel(mask) for mask in seen.values()])
    assert flat.tolist() == [True] * 18 + [False] * 9
    chex.assert_trees_all_equal(separate, seen)


def test_penalty_counts_every_matrix_once():
    given = params()
    for kind in ("frobenius", "squared"):
        config = CONFIG.replace(orthogonality=kind)
        value, slope = jax.value_and_grad(adalora.orthogonality)(given, config)
        other, by_role = jax.value_and_grad(adalora.orthogonality)(adalora.stack(given), config)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        chex.assert_trees_all_close(adalora.unstack(by_role), slope, rtol=1e-5, atol=1e-7)


def test_results_are_those_of_separate_adapters():
    given = params()
    stacked, state, tx, _ = train(adalora.stack(given), CONFIG, optax.adamw(0.05))
    early = state._replace(allocator=state.allocator._replace(step=jnp.int32(4)))
    plain, plain_state = adalora.unstack((stacked, state))
    assert jax.tree.structure(plain_state) == jax.tree.structure(tx.init(given))
    ready = adalora.unstack(adalora.eval_params(state, stacked))
    chex.assert_trees_all_equal(ready, adalora.eval_params(plain_state, plain))
    finished, after = adalora.finish(early, stacked)
    others = adalora.finish(adalora.unstack(early), plain)
    chex.assert_trees_all_equal(adalora.unstack((finished, after)), others)
    seen = adalora.info(state, params=stacked)
    expected = adalora.info(plain_state, params=plain)
    np.testing.assert_allclose(seen.penalty, expected.penalty, rtol=1e-6)
    chex.assert_trees_all_equal(seen._replace(penalty=None), expected._replace(penalty=None))
    small, cut = adalora.compact(plain, plain_state, tx)
    assert sum(a.lam.size for a in adalora.adapters(small).values()) < 3 * 9
    tx.update(jax.tree.map(jnp.ones_like, small), cut, small)


def test_masks_of_some_adapters_are_applied_to_these_alone():
    stacked = adalora.stack(jax.tree.map(jnp.ones_like, params()))
    mask = {"layers/1/up": jnp.array([True, False, True])}
    state = train(stacked, CONFIG, optax.sgd(0.1))[1].allocator
    role = adalora.stack({"layers/1/up": params()["layers/1/up"]}).by_role.roles
    name = role.members[0].name
    some = state._replace(masks=type(state.masks)({name: mask["layers/1/up"][None]}, role))
    ready = adalora.unstack(adalora.eval_params(some, stacked))
    assert ready["layers/1/up"].lam.tolist() == [1, 0, 1]
    assert ready["layers/0/up"].lam.tolist() == [1, 1, 1]


def test_allocate_takes_stacked_adapters():
    def run(tree):
        state = adalora.init_state(tree, CONFIG)
        for step in range(CONFIG.total_step):
            grads = jax.tree.map(lambda leaf: jnp.cos(5 * leaf), state.adapters)
            state, masks = adalora.allocate(state, grads, step)
        return adalora.unstack(state.adapters), state.allocator, masks

    (one, allocator, masks), (other, by_role, found) = map(run, (params(), adalora.stack(params())))
    chex.assert_trees_all_equal((one, allocator), (other, by_role))
    assert found.keys() == SHAPES.keys()
    chex.assert_trees_all_equal({path: masks[path] for path in found}, found)


# The derivative of unstack


def test_one_leaf_per_role_and_factor():
    stacked = adalora.stack(params())
    assert len(jax.tree.leaves(stacked)) == 3 * ROLES + 2
    state = adalora.adalora(optax.adamw(0.1), CONFIG).init(stacked)
    assert len(jax.tree.leaves(state.inner[0].mu)) == 3 * ROLES + 2


def test_derivative_is_one_concatenation_per_role_and_factor():
    stacked = adalora.stack(params())
    count = 3 * (ROLES - 1)  # one of the roles has one member
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(stacked, 0.0))
    assert len(re.findall(r"= concatenate\[", jaxpr)) == count
    assert not re.search(r"= (pad|scatter-add|add_any)\b", jaxpr)
    program = jax.jit(jax.grad(loss)).lower(stacked, 0.0).as_text()
    assert len(re.findall(r"stablehlo\.concatenate", program)) == count
    assert "stablehlo.pad" not in program


def test_derivatives_equal_those_of_separate_parameters():
    given, directions = params(), jax.tree.map(jnp.cos, params())
    stacked = adalora.stack(given)
    function = functools.partial(loss, step=0.0)
    chex.assert_trees_all_equal(
        adalora.unstack(jax.grad(function)(stacked)), jax.grad(function)(given)
    )
    pairs = ((given,), (directions,)), ((stacked,), (adalora.stack(directions),))
    separate, by_role = (jax.jvp(function, *pair) for pair in pairs)
    np.testing.assert_allclose(by_role, separate, rtol=1e-6)


def test_unstack_runs_under_vmap_and_of_arrays_with_axes_in_front():
    stacked = adalora.stack(params())
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), stacked)
    outside, inside = adalora.unstack(many), jax.vmap(adalora.unstack)(many)
    chex.assert_trees_all_equal(outside, inside)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], outside), params())


def test_forward_mode_through_a_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="layer_1")(nn.Dense(4, name="layer_0")(x))

    config = CONFIG.replace(target_modules="all-linear", forward_mode=True, init="lambda_one")
    x = jnp.ones((2, 4))
    variables = Model().init(jax.random.key(0), x)
    adapted = adalora.linen.adapt(Model(), config)
    given = adapted.init(jax.random.key(1), variables, x)
    directions = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), given)

    def output(tree):
        return adapted.apply(variables, adalora.unstack(tree), x)

    separate = jax.jvp(output, (given,), (directions,))
    by_role = jax.jvp(output, (adalora.stack(given),), (adalora.stack(directions),))
    chex.assert_trees_all_close(by_role, separate, rtol=1e-6)


# Round trips


@pytest.mark.parametrize("seed", [0, 1])
def test_unstack_is_the_inverse_of_stack(seed):
    config = CONFIG.replace(init_r=4)
    layout = adalora.Layout("w", shape=(5, 3))
    odd = toy_problem.adapters(config, seed)
    tree = {
        "blocks": [params(config)["layers/0/up"]._replace(scale=s) for s in (1.0, 1.0, 0.5)],
        "a/b": odd["down"]._replace(layout=layout, scale=2.0),
        "as_mapping_0": odd["key"]._asdict(),
        "as_mapping_1": {"adalora": odd["key"]._asdict(), "bias": jnp.ones(4)},
        "half": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), odd["down"]),
        "nothing": None,
        "others": ({"lam": jnp.ones(3)}, jnp.arange(3)),
    }
    stacked = adalora.stack(tree)
    assert stacked.by_role.stacked["blocks/*"].p.shape == (2, 4, 6)
    restored = adalora.unstack(stacked)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    toy_problem.assert_same_bits(restored, tree)
    assert restored["a/b"].layout == layout
    assert adalora.unstack(tree) is not None
    chex.assert_trees_all_equal(restack(stacked, restored), stacked)


def test_paths_and_shapes_need_no_arrays():
    stacked = jax.eval_shape(adalora.stack, params())
    chex.assert_trees_all_equal_shapes_and_dtypes(
        adalora.unstack(stacked), jax.eval_shape(lambda: params())
    )


def test_copies_and_files_keep_it():
    stacked = adalora.stack(params())
    for other in (
        pickle.loads(pickle.dumps(stacked)),
        copy.deepcopy(stacked),
        jax.tree.map(lambda leaf: leaf, stacked),
        serialization.from_bytes(
            jax.tree.map(jnp.zeros_like, stacked), serialization.to_bytes(stacked)
        ),
    ):
        toy_problem.assert_same_bits(adalora.unstack(other), params())
        assert jax.tree.structure(other) == jax.tree.structure(stacked)


def test_training_continues_from_a_serialized_state():
    stacked, state, tx, _ = train(adalora.stack(params()), CONFIG, optax.adamw(0.05))
    restored = serialization.from_bytes(tx.init(stacked), serialization.to_bytes(state))
    toy_problem.assert_same_bits(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_checkpoint_of_either_form_restores_either(tmp_path):
    given = params()
    stacked, state, tx, _ = train(adalora.stack(given), CONFIG, optax.adamw(0.05))
    checkpoint.save(tmp_path / "stacked", stacked, state, CONFIG)
    seen = checkpoint.restore(tmp_path / "stacked", tx)
    toy_problem.assert_same_bits((seen.adapters, seen.opt_state), adalora.unstack((stacked, state)))
    checkpoint.save(tmp_path / "separate", seen.adapters, seen.opt_state, CONFIG)
    fresh = adalora.stack(given)
    for name in ("stacked", "separate"):
        back = checkpoint.restore(tmp_path / name, target=(fresh, tx.init(fresh)), config=CONFIG)
        assert jax.tree.structure(back.opt_state) == jax.tree.structure(state)
        toy_problem.assert_same_bits((back.adapters, back.opt_state), (stacked, state))


def test_other_optimizers_and_wrappers_take_it():
    given = adalora.stack(params())
    rates = {
        "p": optax.sgd(0.1),
        "q": optax.sgd(0.1),
        "lam": optax.adam(0.1),
        "other": optax.sgd(0),
    }
    inner = optax.partition(rates, adalora.param_labels)
    found = train(given, CONFIG, inner)[0]
    chex.assert_trees_all_equal(found.others, given.others)
    labels = jax.tree.map(lambda _: "adapters", given)
    head = jax.tree.map(lambda _: "head", labels.others)
    labels = dataclasses.replace(labels, others=head)
    whole = {"adapters": adalora.adalora(optax.adam(0.05), CONFIG), "head": optax.sgd(0.1)}
    tx = optax.MultiSteps(optax.partition(whole, labels), 2)
    state, tree = tx.init(given), given
    for step in range(2 * CONFIG.total_step):
        updates, state = tx.update(jax.grad(loss)(tree, float(step)), state, tree)
        tree = optax.apply_updates(tree, updates)
    assert sum(adalora.ranks(state).values()) == 18


def test_members_are_sharded_alike_and_the_leading_axis_is_not():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = adalora.Adapter(P(None, "model"), P(None), P(None, "data"))
    put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    one = adalora.Adapter(jnp.ones((3, 4)), jnp.ones(3), jnp.ones((3, 6)))
    given = {f"layers/{i}/up": jax.tree.map(put, one, specs) for i in range(2)}
    stacked = adalora.stack(given)
    spec_of = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
    assert spec_of(stacked).by_role.stacked["layers/*/up"].p == P(None, None, "model")
    assert spec_of(adalora.unstack(stacked)) == spec_of(given)
    tx = adalora.adalora(optax.adam(0.1), CONFIG)
    placed = adalora.sharding.shardings(jax.eval_shape(tx.init, stacked), stacked, tx=tx)
    assert placed.inner[0].mu.by_role.stacked["layers/*/up"].q.spec == P(None, None, "data")
    assert placed.allocator.sensitivity.stacked["layers/*/up"].p.spec == P(None, None, "model")


# Refusals


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


def test_stack_of_other_things_raises():
    given = params()
    with raises(ValueError, "`adapters`: no adapter was found in the dict; pass the adapters that"):
        adalora.stack({"head": jnp.ones(3)})
    with raises(ValueError, "`adapters`: are stacked by role, which only functions of training"):
        adalora.stack(adalora.stack(given))
    found = ", ".join([P.__name__] * 3)  # the class's name differs between versions of JAX
    with raises(TypeError, f"`adapters['up']`: contains {found} instead of arrays; pass the"):
        adalora.stack({"up": adalora.Adapter(P(), P(), P())})
    with raises(ValueError, "`adapters['a/b']`: is the path of two leaves; rename one of their"):
        adalora.stack(given | {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})


def test_stack_of_an_nnx_state_raises_and_its_adapters_are_stacked():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    config = CONFIG.replace(target_modules="all-linear", init="lambda_one")
    model = adalora.nnx.adapt(Model(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    with raises(TypeError, "`adapters=State`: contains NNX Variables, which belong to one model;"):
        adalora.stack(nnx.state(model, nnx.LoRAParam))
    given, x = adalora.nnx.adapters(model), jnp.ones((2, 4))

    def output(tree):
        return adalora.nnx.with_adapters(model, adalora.unstack(tree))(x).sum()

    stacked = adalora.stack(given)
    assert list(stacked.by_role.stacked) == ["layers/*"]
    chex.assert_trees_all_close(
        adalora.unstack(jax.jit(jax.grad(output))(stacked)), jax.grad(output)(given), rtol=1e-6
    )


def test_stacked_adapters_inside_of_another_tree_raise():
    tree = {"lora": adalora.stack(params()), "head": jnp.ones(3)}
    for call in (
        lambda: adalora.adalora(optax.sgd(0.1), CONFIG).init(tree),
        lambda: adalora.orthogonality(tree, CONFIG),
        lambda: adalora.init_state(tree, CONFIG),
    ):
        with raises(ValueError, "`adapters['lora']`: are stacked by role, which only functions of"):
            call()


def test_functions_that_do_not_take_stacked_adapters_raise(tmp_path):
    stacked, state, tx, _ = train(adalora.stack(params()), CONFIG, optax.sgd(0.1))
    variables = {"params": {"query": {"kernel": jnp.zeros((5, 6))}}}
    adapted = adalora.linen.adapt(nn.Dense(4), CONFIG.replace(target_modules="all-linear"))
    with raises(ValueError, "`params`: are stacked by role, whose adapters may get different"):
        adalora.compact(stacked, state, tx)
    with raises(TypeError, "`adapters=StackedAdapters`: is not a mapping; pass the dict that"):
        adapted.apply(variables, stacked, jnp.ones((2, 5)))
    with raises(TypeError, "`adapters=StackedAdapters`: is not a mapping; pass the dict that"):
        adalora.merge(variables, stacked)
    with raises(ValueError, "`adapters`: are stacked by role, which only functions of training"):
        adalora.adapters(stacked)
    with raises(ValueError, "`adapters`: are stacked by role, which only functions of training"):
        adalora.AdapterBank.from_dict({"one": stacked})


def test_gradients_of_another_form_raise():
    stacked = adalora.stack(params())
    tx = adalora.adalora(optax.sgd(0.1), CONFIG)
    state = tx.init(stacked)
    with raises(ValueError, "`grads`: do not match the adapters, since layers/*/down has no grad"):
        tx.update(params(), state, stacked)
    plain = tx.init(params())
    with raises(ValueError, "`grads`: do not match the adapters, since layers/0/down has no grad"):
        tx.update(stacked, plain, params())
    alone = {"head": params()["layers/2/up"]}
    with raises(ValueError, "`grads`: do not match the adapters, since"):
        tx.update(alone, tx.init(adalora.stack(alone)), adalora.stack(alone))


def test_state_of_other_adapters_raises():
    stacked = adalora.stack(params())
    fewer = adalora.stack({path: a for path, a in params().items() if path != "layers/1/up"})
    tx = adalora.adalora(optax.sgd(0.1), CONFIG)
    with raises(ValueError, "`params`: the adapters differ from those that tx.init saw, at ['lay"):
        tx.update(stacked, tx.init(fewer), stacked)
    with raises(ValueError, "`opt_state`: has masks for 'layers/1/up', of which there are no"):
        adalora.eval_params(tx.init(stacked), fewer)


def test_masked_roles_raise():
    stacked = adalora.stack(params())
    tx = optax.masked(
        adalora.adalora(optax.sgd(0.1), CONFIG), jax.tree.map(lambda _: False, stacked)
    )
    with raises(ValueError, "`params`: optax masks leaves of the role 'layers/*/down', but ranks"):
        tx.init(stacked)
