"""Adapters found by path in containers of any kind, and results that do not depend on the kind."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import toy_problem
from support.random_runs import active

import adalora_jax as al

CONFIG = al.AdaLoraConfig(total_step=6, init_r=3, target_r=2, tinit=1, tfinal=2)
SHAPES = {"a": (2, 3, ()), "b": (3, 2, ())}


def trained(params):
    """Return the parameters and the allocator's state at the end of a run."""
    tx = al.adalora(optax.sgd(0.1), CONFIG)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(CONFIG.total_step):
        grads = jax.tree.map(lambda leaf: jnp.cos(5 * leaf) + 0.1, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, al.allocator_state(state)


@pytest.mark.parametrize("kind", ["mapping", "FrozenDict", "State", "list", "one adapter"])
def test_adapters_are_found_in_any_container(kind):
    plain = toy_problem.adapters(CONFIG, shapes=SHAPES)
    mappings = {name: a._asdict() for name, a in plain.items()}
    params = {
        "mapping": lambda: {"layer": {"adalora": mappings["a"]}, "b": mappings["b"]},
        "FrozenDict": lambda: flax.core.freeze(mappings),
        "State": lambda: nnx.State(mappings),
        "list": lambda: [plain["a"], (plain["b"], jnp.ones(2))],
        "one adapter": lambda: plain["a"],
    }[kind]()
    after, state = trained(params)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert active(after) == toy_problem.active(state.masks)
    assert active(after) == (2 if kind == "one adapter" else 4)


def test_results_do_not_depend_on_container():
    plain = toy_problem.adapters(CONFIG, shapes=SHAPES)
    mappings = {name: a._asdict() for name, a in plain.items()}
    first, second = trained(plain)[0], trained(mappings)[0]
    toy_problem.assert_same_bits({name: a._asdict() for name, a in first.items()}, second)


def test_adapters_of_nnx_model_raise():
    config = CONFIG.replace(target_modules="all-linear")
    model = al.nnx.adapt(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), config)
    with pytest.raises(TypeError, match=r"`tree=Sequential`: is an NNX model.*nnx\.adapters"):
        al.adapters(model)
    assert list(al.adapters(nnx.state(model))) == ["layers/0"]


def test_two_adapters_of_one_path_raise():
    adapter = al.Adapter(np.ones((2, 3)), np.ones(2), np.ones((2, 4)))
    with pytest.raises(
        ValueError, match=r"`adapters\['a/b'\]`: is the path of two adapters; rename"
    ):
        al.adapters({"a/b": adapter, "a": {"b": adapter}})
