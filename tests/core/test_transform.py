"""The transformation inside and around other optax transformations, and its errors."""

import re
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import compiling, toy_problem

import adalora_jax as al

CONFIG = al.AdaLoraConfig(total_step=6, init_r=3, target_r=2, tinit=1, tfinal=2)
SHAPES = {"a": (2, 3, ()), "b": (3, 2, ())}


def parameters():
    return {"block": toy_problem.adapters(CONFIG, shapes=SHAPES), "head": jnp.ones((2, 3))}


def gradients(params):
    return jax.tree.map(lambda leaf: jnp.cos(5 * leaf) + 0.1, params)


def run(tx, params, grads=gradients, steps=CONFIG.total_step):
    """Return the parameters and the state after some steps."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def alive(params):
    return sum(int((a.lam != 0).sum()) for a in al.adapters(params).values())


def ours(inner=None):
    return al.adalora(inner or optax.sgd(0.1), CONFIG)


NESTED = {
    "chain": lambda: optax.chain(optax.clip(1.0), ours()),
    "chain of chains": lambda: optax.chain(optax.identity(), optax.chain(optax.clip(1.0), ours())),
    "chain within": lambda: ours(optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale(-0.1))),
    "named chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("rank", ours())),
    "masked": lambda: optax.masked(ours(), {"block": True, "head": False}),
    "partition": lambda: optax.partition(
        {"ours": ours(), "frozen": optax.set_to_zero()}, {"block": "ours", "head": "frozen"}
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"ours": ours(), "sgd": optax.sgd(0.1)}, {"block": "ours", "head": "sgd"}
    ),
    "partition within": lambda: ours(
        optax.partition(
            {
                "p": optax.sgd(0.1),
                "q": optax.sgd(0.2),
                "lam": optax.sgd(0.3),
                "other": optax.sgd(0.1),
            },
            al.param_labels,
        )
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(ours(), 3),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_transformation_prunes_and_its_state_is_found(name):
    params, state = run(NESTED[name](), parameters())
    allocator = al.allocator_state(state)
    assert int(allocator.step) == CONFIG.total_step
    assert toy_problem.active(allocator.masks) == alive(params) == 4
    assert al.ranks(allocator).keys() == {"block/a", "block/b"}


def test_other_part_of_partition_is_unaffected():
    head = run(NESTED["partition"](), parameters())[0]["head"]
    np.testing.assert_array_equal(head, jnp.ones((2, 3)))
    moved = run(NESTED["multi_transform"](), parameters())[0]["head"]
    alone = run(optax.sgd(0.1), {"head": jnp.ones((2, 3))})[0]["head"]
    np.testing.assert_array_equal(moved, alone)


def test_param_labels_give_each_factor_its_own_rate():
    params = parameters()
    ones = lambda params: jax.tree.map(jnp.ones_like, params)
    moved = run(NESTED["partition within"](), params, ones, steps=1)[0]["block"]["a"]
    start = params["block"]["a"]
    for leaf, before, rate in zip(moved, start, (0.1, 0.3, 0.2)):
        np.testing.assert_allclose(leaf, before - rate, rtol=1e-5, atol=1e-6)


def test_importance_sees_clipping_outside_but_not_inside():
    """Gradients of 4 are clipped to 1 before adalora, but are raw if adalora wraps the clipping."""

    def fours(params):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, 4.0), params)

    before = run(optax.chain(optax.clip(1.0), ours()), parameters(), fours, steps=1)
    within = run(ours(optax.chain(optax.clip(1.0), optax.sgd(0.1))), parameters(), fours, steps=1)
    toy_problem.assert_same_bits(before[0], within[0])
    averages = [al.allocator_state(state).sensitivity for _, state in (before, within)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(4 * a, b, rtol=1e-6), *averages)
    # λ was 0 and moved by −0.1: I = 0.4, of which the average takes 15 %.
    np.testing.assert_allclose(averages[1]["block/a"].lam, 0.15 * 0.4, rtol=1e-5)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_apply_if_finite_and_adalora_skip_same_step(where):
    guard = lambda tx: optax.apply_if_finite(tx, 3)
    tx = guard(ours()) if where == "outside" else ours(guard(optax.sgd(0.1)))
    params, state = run(tx, parameters(), steps=3)

    def broken(params):
        grads = gradients(params)
        grads["block"]["a"] = grads["block"]["a"]._replace(lam=jnp.array([0.1, jnp.nan, 0.2]))
        return grads

    updates, after = jax.jit(tx.update)(broken(params), state, params)
    toy_problem.assert_same_bits(al.allocator_state(after), al.allocator_state(state))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    for _ in range(3):
        updates, after = jax.jit(tx.update)(gradients(params), after, params)
        params = optax.apply_updates(params, updates)
    assert int(al.allocator_state(after).step) == CONFIG.total_step
    assert toy_problem.active(al.allocator_state(after).masks) == alive(params) == 4


# Errors ---------------------------------------------------------------------------------------


def test_update_without_params_raises():
    tx, params = ours(), parameters()
    with pytest.raises(ValueError, match=r"`params=None`: .*tx.update\(grads, state, params\)"):
        tx.update(gradients(params), tx.init(params))


@pytest.mark.parametrize(
    "empty",
    [{}, [], (), None, nnx.State({}), flax.core.FrozenDict({}), {"head": np.ones(3)}, np.ones(3)],
    ids=lambda empty: type(empty).__name__,
)
def test_tree_without_adapters_raises(empty):
    name = type(empty).__name__
    with pytest.raises(ValueError, match=f"`params`: no adapter was found in the {name}.*adapt"):
        ours().init(empty)


def test_gradients_of_another_structure_raise():
    tx, params = ours(), parameters()
    state, grads = tx.init(params), gradients(params)
    del grads["block"]["a"]
    grads["elsewhere"] = gradients(params)["block"]["a"]
    with pytest.raises(ValueError, match="block/a has no gradient, elsewhere has a gradient but"):
        tx.update(grads, state, params)


def test_gradients_of_another_shape_raise():
    tx, params = ours(), parameters()
    grads = gradients(params)
    grads["block"]["b"] = grads["block"]["b"]._replace(q=jnp.ones((3, 7)))
    message = r"gradient of block/b\.q has shape \(3, 7\), not \(3, 3\);.*same tree that is trained"
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"^`adapters\['a'\]`: has p .*, lam \(4,\) and q"):
        tx.init({"a": params["block"]["a"]._replace(lam=jnp.ones(4))})


def test_allocate_and_init_state_validate_trees():
    params = parameters()["block"]
    state = al.init_state(params, CONFIG)
    with pytest.raises(ValueError, match="b has no gradient"):
        al.allocate(state, {"a": params["a"]}, 0)
    with pytest.raises(ValueError, match="no adapter was found"):
        al.init_state({"head": jnp.ones(3)}, CONFIG)


def test_allocator_state_requires_exactly_one():
    params = parameters()
    with pytest.raises(
        ValueError, match=r"`opt_state`: holds 0 AllocatorStates.*adalora\(...\) once"
    ):
        al.allocator_state(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="`opt_state`: holds 2 AllocatorStates"):
        al.allocator_state(optax.chain(ours(), ours()).init(params))


def test_invalid_inner_or_config_raises():
    with pytest.raises(TypeError, match=r"`inner=0\.1`: is not an optax GradientTransformation"):
        al.adalora(0.1, CONFIG)
    with pytest.raises(TypeError, match="`config=10`: is not an AdaLoraConfig"):
        al.adalora(optax.sgd(0.1), 10)


@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)])
def test_inner_that_is_wrapped_already_raises(around):
    with pytest.raises(ValueError, match=r"`inner`: contains an optimizer that adalora\("):
        ours(around(ours(optax.sgd(0.1)))).init(parameters())


def test_run_without_jit_matches_jitted_run():
    tx = ours(optax.sgd(0.1))
    compiled, state = run(tx, parameters())
    with jax.disable_jit():
        plain, plain_state = parameters(), tx.init(parameters())
        for _ in range(CONFIG.total_step):
            updates, plain_state = tx.update(gradients(plain), plain_state, plain)
            plain = optax.apply_updates(plain, updates)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, plain, compiled)
    masks = [al.masks(found) for found in (state, plain_state)]
    jax.tree.map(np.testing.assert_array_equal, *masks)


PROGRAM = """
import jax, optax, adalora_jax as al
config = al.AdaLoraConfig(total_step=9, init_r=4, target_r=2)
make = lambda: {f"l{i}": al.init_adapter(jax.random.key(i), 6, 5, config) for i in range(3)}
tx = al.adalora(optax.adam(1e-2), config)
adapters = jax.eval_shape(make)
state = jax.eval_shape(tx.init, adapters)
print(jax.make_jaxpr(tx.update)(adapters, state, adapters))
print(jax.make_jaxpr(lambda a: jax.grad(al.orthogonality)(a, config))(adapters))
"""


def test_traced_program_does_not_depend_on_number_of_devices():
    traced = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=compiling.environment(devices),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for devices in (1, 4)
    ]
    assert len(traced[0]) > 1000
    assert re.sub("0x[0-9a-f]+", "", traced[0]) == re.sub("0x[0-9a-f]+", "", traced[1])
