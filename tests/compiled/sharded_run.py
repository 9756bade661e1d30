"""A training run on four CPU devices, run by test_sharded_run.py in a subprocess."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as al

# Adapters sharded in three ways: along out, along the stack, and not at all.
SPECS = {
    "dense": al.Adapter(p=P(None, "d"), lam=P(None), q=P(None, None)),
    "layers": al.Adapter(p=P("d", None, None), lam=P("d", None), q=P("d", None, None)),
    "whole": al.Adapter(p=P(None, None), lam=P(None), q=P(None, None)),
}


def run(config, params):
    tx = al.adalora(optax.sgd(0.1, momentum=0.9), config)
    state, traces, carries = tx.init(params), [], []

    @jax.jit
    def step(params, state):
        traces.append(None)
        grads = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry = (params, state)
    for _ in range(config.total_step):
        carries.append(carry)
        carry = step(*carry)
    return [*carries, carry], len(traces)


def check_layer(axis_type):
    """Check gradients of an adapter's output and penalty with every axis split in several ways.

    Explicit axes need the sharding of each product, and give a gradient its value's sharding.
    """
    config = al.AdaLoraConfig(total_step=8, init_r=4, target_r=2, init_lora_weights=False)
    adapter = al.init_adapter(jax.random.key(0), 8, 12, config)
    values = adapter, jnp.cos(jnp.arange(32.0)).reshape(4, 8)

    def loss(adapter, x):
        y = al.forward(adapter._replace(scale=0.5), x)
        return jnp.sum(y**2) + al.orthogonality({"layer": adapter}, config)

    loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    wanted = loss(*values)
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType[axis_type],) * 2)
    for x, ins, outs in (
        (P("d", None), None, None),
        (P("d", None), "d", "m"),
        (P("d", None), "m", "d"),
        (P("d", "m"), "m", None),
        (P(("d", "m"), None), "m", "d"),
    ):
        specs = adapter._replace(p=P(None, outs), lam=P(None), q=P(None, ins)), x
        place = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
        placed = jax.tree.map(place, values, specs)
        with jax.set_mesh(mesh):
            ours = loss(*placed)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, wanted
        )
        for leaf, value in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(placed)):
            same = leaf.sharding.is_equivalent_to(value.sharding, leaf.ndim)
            assert same or axis_type == "Auto", f"{leaf.sharding} is not {value.sharding}"


def main(axis_type):
    config = al.AdaLoraConfig(total_step=8, init_r=4, target_r=2, tfinal=2, deltaT=2)
    init = lambda seed, stack=(): al.init_adapter(jax.random.key(seed), 6, 8, config, stack=stack)
    params = {"dense": init(0), "layers": init(1, (4,)), "whole": init(2)}
    plain, _ = run(config, params)

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType[axis_type],))
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
        params,
        {path: specs._replace(scale=config.scaling) for path, specs in SPECS.items()},
    )
    with jax.set_mesh(mesh):
        sharded, traces = run(config, placed)
    assert traces == 1, f"{traces} traces"

    first = sharded[0]
    for name, specs in SPECS.items():
        for average in (first[1].allocator.sensitivity, first[1].allocator.uncertainty):
            for leaf, like in zip(average.stacked[name], placed[name]):
                assert leaf.sharding.spec == P(None, *like.sharding.spec), (
                    f"{name}: {leaf.sharding}"
                )
        assert first[1].allocator.masks.stacked[name].sharding.spec == P(None, *specs.lam), name

    for t, carry in enumerate(sharded[1:]):
        named = jax.tree_util.tree_leaves_with_path(carry)
        for (path, leaf), before, expected in zip(
            named, jax.tree.leaves(first), jax.tree.leaves(plain[t + 1])
        ):
            where = f"{jax.tree_util.keystr(path)} after step {t}"
            if before.committed:
                assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim), where
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7, err_msg=where)
    active = sum(int(mask.sum()) for mask in jax.tree.leaves(carry[1].allocator.masks))
    assert active == 2 * 6


if __name__ == "__main__":
    assert jax.device_count() == 4
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        main(sys.argv[1])
        check_layer(sys.argv[1])
