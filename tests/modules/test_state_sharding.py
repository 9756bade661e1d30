"""Shardings of a training state, derived from those of its parameters."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(
    total_step=8, init_r=4, target_r=2, target_modules=".*(up|out|conv|table)", tfinal=2
)
ABSTRACT = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def mesh(*sizes):
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def inner_states():
    """Return optimizers whose state has the parameters' shapes, fewer axes, more axes, or none."""
    return {
        "adamw": optax.adamw(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),
        "lbfgs": optax.scale_by_lbfgs(memory_size=3),
        "masked": optax.masked(optax.trace(0.9), {"up": True, "head": {"kernel": False}}),
    }


@pytest.mark.parametrize("name", inner_states())
def test_state_shardings_follow_their_parameters(name):
    config = CONFIG.replace(target_modules=["up"])
    adapter = jax.eval_shape(
        lambda key: adalora.init_adapter(key, 8, 16, config, stack=(2,)), jax.random.key(0)
    )
    params = {"up": adapter, "head": {"kernel": jax.ShapeDtypeStruct((16, 4), jnp.float32)}}
    like = {
        "up": adalora.Adapter(P("data", None, "model"), P("data", None), P("data", None, None)),
        "head": {"kernel": P("model", None)},
    }
    tx = optax.chain(optax.clip(1.0), adalora.adalora(inner_states()[name], config))
    state = jax.eval_shape(tx.init, params)
    shardings = functools.partial(adalora.sharding.shardings, like=like, mesh=ABSTRACT)
    placed = shardings(params), shardings(state, tx=tx)
    assert jax.tree.structure(placed) == jax.tree.structure((params, state))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    by_shape = dict(zip(shapes, jax.tree.leaves(like)))
    split = 0
    for leaf, at in zip(jax.tree.leaves((params, state)), jax.tree.leaves(placed)):
        at.shard_shape(leaf.shape)  # raises if sizes do not divide
        own = next((s for s in by_shape if leaf.shape[max(0, leaf.ndim - len(s)) :] == s), None)
        wanted = P(*[None] * (leaf.ndim - len(own)), *by_shape[own]) if own else P()
        # The factored moments of p happen to have the shape of λ.
        assert at.spec == wanted or (name == "adafactor" and at.spec == P()), leaf.shape
        split += at.spec != P()
    assert split >= 4 + 3 * 2 + 1


def test_short_spec_applies_to_first_axes():
    adapters = {"up": adalora.init_adapter(jax.random.key(0), 8, 16, CONFIG, stack=(2,))}
    tx = adalora.adalora(optax.scale_by_lbfgs(memory_size=2), CONFIG)
    at = NamedSharding(mesh(1), P("data"))
    placed = adalora.sharding.shardings(jax.device_put(adapters, at))
    for like in (jax.device_put(adapters, at), placed):
        state = adalora.sharding.shardings(jax.eval_shape(tx.init, adapters), like, tx=tx)
        assert state.allocator.sensitivity.stacked["up"].p.spec == P(None, "data", None, None)
        assert state.inner.diff_params_memory["up"].p.spec == P(None, "data", None, None)


def test_shardings_take_mesh_from_context_or_arrays():
    adapters = {"up": adalora.init_adapter(jax.random.key(0), 8, 16, CONFIG)}
    assert isinstance(adapters["up"].p.sharding, SingleDeviceSharding)
    with pytest.raises(ValueError, match=r"`mesh=None`: .*; .*jax\.set_mesh"):
        adalora.sharding.shardings(adapters)
    one = mesh(1)
    with jax.set_mesh(one):
        assert adalora.sharding.shardings(adapters)["up"].p == NamedSharding(one, P(None, None))
    at = NamedSharding(one, P(None, "data"))
    placed = adapters | {"up": adapters["up"]._replace(p=jax.device_put(adapters["up"].p, at))}
    assert adalora.sharding.shardings(placed)["up"].p == at
