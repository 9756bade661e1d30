"""A run with stacked adapters on four CPU devices, run by test_stacked_run.py in a subprocess."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as al

CONFIG = al.AdaLoraConfig(total_step=6, init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1)
# Adapters sharded along out, and along their own stack.
SPECS = {
    "layers/{}/up": al.Adapter(P(None, "model"), P(None), P(None, None)),
    "layers/{}/experts": al.Adapter(
        P("data", None, "model"), P("data", None), P("data", None, None)
    ),
}
COLLECTIVES = r" ((?:all|collective|reduce)-[a-z]+)(?:-start)?\("


def params(mesh):
    result = {}
    for name, specs in SPECS.items():
        stack = (2,) * (len(specs.lam) - 1)
        for i in range(3):
            adapter = al.init_adapter(jax.random.key(i), 6, 8, CONFIG, stack=stack)
            put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
            known = specs._replace(scale=adapter.scale)
            result[name.format(i)] = jax.tree.map(put, adapter, known)
    return result


def run(tree):
    tx = al.adalora(optax.adam(0.1), CONFIG)

    def loss(tree):
        leaves = jax.tree.leaves(al.unstack(tree))
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in leaves) + al.orthogonality(tree, CONFIG)

    @jax.jit
    def step(tree, state):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    program = step.lower(tree, state).compile().as_text()
    for _ in range(CONFIG.total_step):
        tree, state = step(tree, state)
    return tree, state, sorted(re.findall(COLLECTIVES, program))


def main(axis_type):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType[axis_type],) * 2)
    given = params(mesh)
    stacked = al.stack(given)
    for role, adapter in stacked.by_role.stacked.items():
        for leaf, spec in zip(adapter, SPECS[role.replace("*", "{}")]):
            assert leaf.sharding.spec == P(None, *spec), f"{role}: {leaf.sharding}"
    for path, adapter in al.unstack(stacked).items():
        for leaf, like in zip(adapter, given[path]):
            assert leaf.sharding == like.sharding, f"{path}: {leaf.sharding}"
    with jax.set_mesh(mesh):
        separate, state, collectives = run(given)
        trained, by_role, same = run(stacked)
    assert same == collectives, f"{same} instead of {collectives}"
    assert al.ranks(by_role) == al.ranks(state)
    for path, adapter in al.unstack(trained).items():
        for leaf, like in zip(adapter, separate[path]):
            np.testing.assert_allclose(leaf, like, rtol=1e-5, atol=1e-6, err_msg=path)


if __name__ == "__main__":
    assert jax.device_count() == 4
    with jax.numpy_rank_promotion("raise"):
        main(sys.argv[1])
