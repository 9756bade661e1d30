"""Products whose rows have the matrices of their groups, and adapters with triplets per group."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalora_jax as adalora
from adalora_jax import Layout, functional, huggingface
from adalora_jax._src.modules.ragged import axes_of
from modules.functional_models import draw

EXPERTS, WIDTH, HIDDEN = 3, 8, 6
KEY = jax.random.key(0)
CONFIG = adalora.AdaLoraConfig(
    **{"total_step": 20, "tinit": 2, "tfinal": 5, "deltaT": 2, "init_r": 4, "target_r": 2},
    target_modules="experts.*",
)


def mixture(params, x):
    """Send each row of ``x [rows, width]`` to its best two experts, by ``ragged_dot``."""
    scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    order = jnp.argsort(chosen.ravel())
    rows = jnp.repeat(x, 2, axis=0)[order]
    sizes = jnp.bincount(chosen.ravel(), length=EXPERTS)
    up, gate, down = (params["experts"][name] for name in ("up", "gate", "down"))
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(
        rows, up, sizes
    )
    y = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)]
    return x + jnp.einsum("nkd,nk->nd", y.reshape(*chosen.shape, WIDTH), scores)


def dense_mixture(params, x):
    """Compute :func:`mixture` with every expert on every row."""
    scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    up, gate, down = (params["experts"][name] for name in ("up", "gate", "down"))
    hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, gate)) * jnp.einsum("nd,edf->enf", x, up)
    y = jnp.einsum("enf,efd->end", hidden, down)
    weights = (jax.nn.one_hot(chosen, EXPERTS) * scores[..., None]).sum(1)
    return x + jnp.einsum("end,ne->nd", y, weights)


def parameters():
    return {
        "router": draw(WIDTH, EXPERTS),
        "experts": {
            "up": draw(EXPERTS, WIDTH, HIDDEN),
            "gate": draw(EXPERTS, WIDTH, HIDDEN, seed=1),
            "down": draw(EXPERTS, HIDDEN, WIDTH),
        },
    }


def random_like(adapters):
    leaves, treedef = jax.tree.flatten(adapters)
    return treedef.unflatten([draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def adapted_mixture():
    params, x = parameters(), draw(7, WIDTH)
    adapted = functional.adapt(mixture, params, CONFIG, x)
    return params, x, adapted, adapted.init(KEY, params)


def test_every_expert_has_its_own_triplets():
    params, x, adapted, adapters = adapted_mixture()
    assert set(adapters) == {"experts/down", "experts/gate", "experts/up"}
    assert adapters["experts/up"].p.shape == (EXPERTS, 4, HIDDEN)
    assert adapters["experts/up"].layout.stack == (0,)
    np.testing.assert_array_equal(adapted.apply(params, adapters, x), mixture(params, x))
    rows = adapted.describe(params).splitlines()
    assert rows[1].split()[:4] == ["experts/down", "einsum", "3", "6"]


@pytest.mark.parametrize("other", [mixture, dense_mixture])
def test_adapted_mixture_equals_the_merged_one_and_its_dense_form(other):
    params, x, adapted, adapters = adapted_mixture()
    adapters = random_like(adapters)
    merged = functional.merge(params, adapters)
    y = jax.jit(adapted.apply)(params, adapters, x)
    assert jnp.abs(y - mixture(params, x)).max() > 0.05
    np.testing.assert_allclose(y, other(merged, x), rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(functional.unmerge(merged, adapters), params, atol=1e-5)


def test_pruning_ranks_each_expert_and_ships(tmp_path):
    params, x, adapted, trained = adapted_mixture()
    tx = adalora.adalora(optax.adamw(1e-2), CONFIG)
    state = tx.init(trained)

    @jax.jit
    def step(trained, state):
        def loss(trained):
            y = adapted.apply(params, trained, x)
            # Only rows of positive sums count, so experts get different gradients.
            error = jnp.square(y - 1).sum(-1) * (x.sum(-1) > 0)
            return error.sum() + adalora.orthogonality(trained, CONFIG)

        updates, state_ = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state_

    for _ in range(CONFIG.total_step):
        trained, state = step(trained, state)
    final = adalora.eval_params(state, trained)
    masks = adalora.masks(state)
    assert sum(int(mask.sum()) for mask in masks.values()) == 2 * 3 * EXPERTS
    ranks = adalora.ranks(state)
    assert {path for path in ranks if path.startswith("experts/up")} == {
        f"experts/up[{i}]" for i in range(EXPERTS)
    }
    assert len(set(ranks.values())) > 1
    expected = adapted.apply(params, final, x)
    small = adalora.compact(final, state)
    np.testing.assert_allclose(adapted.apply(params, small, x), expected, rtol=1e-4, atol=1e-5)
    merged = functional.merge(params, final)
    np.testing.assert_allclose(mixture(merged, x), expected, rtol=1e-4, atol=1e-4)
    adalora.checkpoint.save(tmp_path / "run", final, state, CONFIG, step=20)
    run = adalora.checkpoint.restore(tmp_path / "run", tx)
    chex.assert_trees_all_equal(run.adapters, final)


def test_export_of_experts_raises_without_names_of_their_modules(tmp_path):
    _, _, _, adapters = adapted_mixture()
    with pytest.raises(ValueError, match=r"'experts/down' with 1 stack axes matches no pair"):
        huggingface.save_pretrained(tmp_path, adapters, CONFIG)
    names = [
        (f"experts/{name}[{{i}}]", f"experts.{{i}}.{name}_proj") for name in ("up", "gate", "down")
    ]
    huggingface.save_pretrained(tmp_path, adapters, CONFIG, names=names)
    loaded = huggingface.load_pretrained(tmp_path, names=names)
    assert loaded.adapters["experts/up"].p.shape == (EXPERTS, 4, HIDDEN)


def test_declared_layout_without_a_stack_adds_the_same_increment():
    layers = {"experts/up": Layout(ins=(0, 1), outs=(2,))}
    params, x = parameters(), draw(7, WIDTH)
    adapted = functional.adapt(mixture, params, CONFIG, x, layers=layers)
    adapters = random_like(adapted.init(KEY, params))
    assert adapters["experts/up"].q.shape == (4, EXPERTS * WIDTH)
    expected = mixture(functional.merge(params, adapters), x)
    np.testing.assert_allclose(adapted.apply(params, adapters, x), expected, rtol=1e-3, atol=1e-3)


def numbers_of(fn, *args):
    (eqn,) = jax.make_jaxpr(fn)(*args).jaxpr.eqns
    return axes_of(eqn)


def test_axes_are_known_only_where_groups_divide_rows():
    x, w, sizes = draw(7, 5), draw(3, 5, 4), jnp.array([4, 2, 1])
    assert numbers_of(jax.lax.ragged_dot, x, w, sizes).group == 0
    summed = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
    general = jax.lax.ragged_dot_general
    assert numbers_of(lambda *args: general(*args, summed), x, draw(7, 4), sizes) is None
