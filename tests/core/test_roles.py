"""Values by role: which adapters share an array, and how they are read by path."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import toy_problem

import adalora_jax as al
from adalora_jax._src.core.roles import ByRole, by_path, group_by_role, stack

CONFIG = al.AdaLoraConfig(total_step=6, init_r=3, target_r=1, tinit=1, tfinal=2, deltaT=1)
SHAPES = {
    "layers/0/up": (4, 6, ()),
    "layers/0/down": (6, 4, ()),
    "layers/1/up": (4, 6, ()),
    "layers/1/down": (6, 4, ()),
    "layers/2/up": (4, 5, ()),
    "scanned": (4, 6, (2,)),
}


def adapters(config=CONFIG):
    return toy_problem.adapters(config, shapes=dict(sorted(SHAPES.items())))


def test_roles_are_paths_but_for_numbers_with_equal_types():
    found = {role.name: role.paths for role in group_by_role(adapters()).members}
    assert found == {
        "layers/*/down": ("layers/0/down", "layers/1/down"),
        "layers/*/up": ("layers/0/up", "layers/1/up"),
        "layers/*/up:2": ("layers/2/up",),
        "scanned": ("scanned",),
    }


def test_other_dtypes_scales_and_layouts_are_other_roles():
    make = lambda **facts: adapters()["layers/0/up"]._replace(**facts)
    plain = make()
    others = [
        make(scale=2.0),
        make(layout=al.Layout(shape=(4, 6))),
        make(lam=plain.lam.astype("bfloat16")),
    ]
    for other in others:
        assert len(group_by_role({"h/0": plain, "h/1": plain, "h/2": other}).members) == 2


def test_values_are_read_by_path_as_they_were_given():
    given = adapters()
    by_role = stack(group_by_role(given), given)
    assert list(by_role) == list(given)
    assert len(jax.tree.leaves(by_role)) == 3 * 4
    chex.assert_trees_all_equal(dict(by_role), given)
    masks = {path: adapter.lam > 0 for path, adapter in given.items()}
    chex.assert_trees_all_equal(dict(stack(by_role.roles, masks)), masks)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_unstacked_values_are_those_that_are_read_by_path(rank):
    given = {
        path: a._replace(p=a.p[..., :rank, :], lam=a.lam[..., :rank], q=a.q[..., :rank, :])
        for path, a in adapters().items()
    }
    lams = stack(group_by_role(given), {path: a.lam for path, a in given.items()})
    chex.assert_trees_all_equal(jax.jit(by_path)(lams), dict(lams))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), lams)
    for function in (jax.jit(by_path), jax.vmap(by_path)):
        chex.assert_trees_all_equal(function(many), dict(many))


def test_tree_functions_keep_roles_and_equality_compares_them():
    given = adapters()
    by_role = stack(group_by_role(given), given)
    twice = jax.tree.map(lambda leaf: 2 * leaf, by_role)
    assert isinstance(twice, ByRole)
    chex.assert_trees_all_equal(twice["layers/1/up"].p, 2 * given["layers/1/up"].p)
    shapes = jax.tree.map(jnp.shape, by_role)
    assert shapes == jax.tree.map(jnp.shape, twice)
    assert shapes != jax.tree.map(
        jnp.shape, stack(group_by_role({"a": given["scanned"]}), {"a": given["scanned"]})
    )
    with pytest.raises(KeyError, match="nowhere"):
        by_role["nowhere"]


def test_axes_of_vmap_and_scan_stay_in_front():
    given = adapters()
    roles = group_by_role(given)
    many = jax.vmap(lambda factor: stack(roles, jax.tree.map(lambda leaf: factor * leaf, given)))(
        jnp.arange(3.0)
    )
    for path, adapter in given.items():
        for name in al.Adapter._fields:
            expected = jnp.arange(3.0).reshape(3, *[1] * getattr(adapter, name).ndim)
            np.testing.assert_array_equal(
                getattr(many[path], name), expected * getattr(adapter, name)[None]
            )


def test_values_with_axes_in_front_are_stacked_as_vmap_stacks_them():
    given = adapters()
    roles = group_by_role(given)
    many = jax.vmap(lambda factor: jax.tree.map(lambda leaf: factor * leaf, given))(jnp.arange(3.0))
    inside, outside = jax.vmap(lambda one: stack(roles, one))(many), stack(roles, many)
    assert jax.tree.map(jnp.shape, inside) == jax.tree.map(jnp.shape, outside)
    chex.assert_trees_all_equal(inside, outside)
    chex.assert_trees_all_equal(dict(outside), many)


def test_abstract_values_are_read_by_path():
    given = adapters()
    by_role = jax.eval_shape(lambda a: stack(group_by_role(a), a), given)
    chex.assert_trees_all_equal_shapes_and_dtypes(dict(by_role), jax.eval_shape(lambda: given))


def test_ties_are_broken_by_order_of_parameters_not_of_roles():
    """With equal scores everywhere, the first triplets of the first adapters stay active."""
    config = CONFIG.replace(score=lambda inputs: jnp.ones_like(inputs.sensitivity.lam))
    params = adapters(config)
    tx = al.adalora(optax.sgd(0.1), config)
    state = tx.init(params)
    for _ in range(config.total_step):
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    masks = al.masks(state)
    flat = np.concatenate([np.ravel(masks[path]) for path in params])
    assert flat.tolist() == [True] * 7 + [False] * (3 * 7 - 7)


def test_run_with_roles_equals_runs_with_one_array_per_adapter():
    """Names without numbers give every adapter its own role; nothing else may change."""
    names = dict(zip(sorted(SHAPES), "abcdef"))

    def run(rename):
        params = {rename(path): adapter for path, adapter in adapters().items()}
        tx, seen = al.adalora(optax.adam(0.05), CONFIG), []
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(CONFIG.total_step):
            grads = jax.tree.map(lambda leaf: jnp.cos(5 * leaf), params)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            masks = al.masks(state)
            seen.append({path: (params[path], masks[path]) for path in params})
        return [list(step.values()) for step in seen], len(state.allocator.masks.stacked)

    (by_role, few), (alone, many) = run(lambda path: path), run(names.__getitem__)
    assert (few, many) == (4, 6)
    chex.assert_trees_all_close(by_role, alone, rtol=1e-6)
    chex.assert_trees_all_equal(
        *([mask for step in r for _, mask in step] for r in (by_role, alone))
    )
