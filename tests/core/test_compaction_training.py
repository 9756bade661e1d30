"""Training after compaction equals training without it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.toy_problem import adapters as fresh
from support.toy_problem import batches, lenient, train_step

import adalora_jax as adalora

# "key" ends with rank 0; "layers" is a stack whose matrices end with different ranks.
CONFIG = adalora.AdaLoraConfig(
    total_step=14,
    init_r=4,
    target_r=2,
    tinit=2,
    tfinal=6,
    orth_reg_weight=0.0,
    rank_overrides={"key": {"max_r": 0}},
)

# Without its norms over whole blocks, which would include pruned rows.
ADAFACTOR = optax.adafactor(0.02, multiply_by_parameter_scale=False, clipping_threshold=None)
OPTIMIZERS = {
    "adamw": lambda tx: tx(optax.adamw(0.02)),
    "momentum": lambda tx: optax.chain(optax.clip(1.0), tx(optax.sgd(0.1, momentum=0.9))),
    "schedule-free": lambda tx: tx(optax.contrib.schedule_free_adamw(0.02)),
    "adafactor": lambda tx: tx(lenient(ADAFACTOR)),
    "if-finite": lambda tx: optax.apply_if_finite(tx(optax.adam(0.02)), 3),
    "by label": lambda tx: tx(
        optax.partition(
            {"p": optax.adam(0.1), "lam": optax.sgd(0.1), "q": optax.adam(0.01)},
            adalora.param_labels,
        )
    ),
    "accumulating": lambda tx: optax.MultiSteps(tx(optax.adam(0.02)), 1).gradient_transformation(),
}

RARE = ("momentum", "schedule-free", "if-finite", "adafactor")


def run(tx, params, state, data, start, stop):
    step = jax.jit(train_step(tx, CONFIG))
    losses = []
    for t in range(start, stop):
        batch = jax.tree.map(lambda a, t=t: a[t], {name: data[name] for name in params})
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return params, state, losses


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in RARE else []) for name in OPTIMIZERS],
)
def test_training_after_compaction_equals_uncompacted_run(name):
    tx = OPTIMIZERS[name](lambda inner: adalora.adalora(inner, CONFIG))
    data, params = batches(CONFIG), fresh(CONFIG)
    params, state, _ = run(tx, params, tx.init(params), data, 0, 9)
    small, small_state = adalora.compact(params, state, tx)

    masks = adalora.allocator_state(state).masks
    chex.assert_trees_all_equal(small, adalora.compact(params, masks))
    assert sorted(small) == ["down", "layers"]
    ranks = adalora.ranks(masks)
    assert small["down"].lam.shape == (ranks["down"],) != (4,)
    widest = max(ranks["layers[0]"], ranks["layers[1]"])
    assert small["layers"].lam.shape == (2, widest)
    want = {path: rank for path, rank in ranks.items() if path != "key"}
    assert adalora.ranks(adalora.allocator_state(small_state)) == want
    fresh_state = jax.eval_shape(tx.init, small)
    assert jax.tree.structure(fresh_state) == jax.tree.structure(small_state)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), fresh_state, small_state
    )
    assert all(jax.tree.leaves(same))

    # "key" has no adapter any more, but its loss is part of the comparison.
    key_loss = [
        float(jnp.mean((x @ kernel - y) ** 2))
        for x, kernel, y in zip(*(array[9:] for array in data["key"]))
    ]
    whole, whole_state, losses = run(tx, params, state, data, 9, 14)
    part, part_state, small_losses = run(tx, small, small_state, data, 9, 14)
    np.testing.assert_allclose(np.add(small_losses, key_loss), losses, rtol=1e-5)
    expected = adalora.compact(whole, adalora.allocator_state(whole_state).masks)
    chex.assert_trees_all_close(part, expected, rtol=1e-5, atol=1e-6)
    assert int(adalora.allocator_state(part_state).step) == 14
    assert int(adalora.allocator_state(part_state).budget) == sum(ranks.values())


def test_adapters_nested_in_larger_tree_are_compacted():
    tx = adalora.adalora(optax.adam(0.02), CONFIG)
    nested = {"model": fresh(CONFIG), "head": (jnp.ones(3), {"bias": jnp.zeros(2)})}
    state, update = tx.init(nested), jax.jit(tx.update)
    for t in range(10):
        grads = jax.tree.map(lambda leaf, t=t: jnp.cos(leaf * 7 + t), nested)
        updates, state = update(grads, state, nested)
        nested = optax.apply_updates(nested, updates)
    small, small_state = adalora.compact(nested, state, tx)
    assert sorted(small["model"]) == ["down", "layers"]
    chex.assert_trees_all_equal(small["head"], nested["head"])
    structure = jax.tree.structure(jax.eval_shape(tx.init, small))
    assert jax.tree.structure(small_state) == structure


def test_compaction_preserves_linen_model_outputs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return nn.Dense(2, name="head")(body(name="blocks")(x, None)[0])

    config = CONFIG.replace(
        target_modules=["up", "head"], rank_overrides={"head": {"max_r": 0}}, orth_reg_weight=0.1
    )
    x = jax.random.normal(jax.random.key(0), (5, 6))
    variables = Model().init(jax.random.key(1), x)
    adapted = adalora.linen.adapt(Model(), config)
    params = adapted.init(jax.random.key(2), variables, x)
    tx = adalora.adalora(optax.adam(0.05), config)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss = lambda a: jnp.mean((adapted.apply(variables, a, x) - 1) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(9):
        params, state = step(params, state)
    small, small_state = adalora.compact(params, state, tx)
    assert list(small) == ["blocks/up"]
    want = adapted.apply(variables, params, x)
    np.testing.assert_allclose(adapted.apply(variables, small, x), want, rtol=1e-5, atol=1e-6)
    merged = adalora.merge(variables, small)
    np.testing.assert_allclose(Model().apply(merged, x), want, rtol=1e-4, atol=1e-5)
    for _ in range(3):
        small, small_state = step(small, small_state)
    assert not np.allclose(adapted.apply(variables, small, x), want, atol=1e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="up")(x), None


def test_compacted_nnx_model_and_optimizer_train_equally():
    config = CONFIG.replace(target_modules="all-linear", rank_overrides={"layers/1": {"max_r": 0}})
    base = nnx.Sequential(*(nnx.Linear(5, 5, rngs=nnx.Rngs(i)) for i in range(3)))
    model = adalora.nnx.adapt(base, config)
    tx = adalora.adalora(optax.adam(0.05), config)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    x = jax.random.normal(jax.random.key(0), (4, 5))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(
            lambda m: jnp.mean((m(x) - 1) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam)
        )
        optimizer.update(model, grads(model))

    for _ in range(9):
        step(model, optimizer)
    small, small_optimizer = adalora.compact(model, optimizer)
    np.testing.assert_allclose(small(x), model(x), rtol=1e-5, atol=1e-6)
    assert sorted(adalora.nnx.adapters(small)) == ["layers/0", "layers/2"]
    assert type(small.layers[1]) is nnx.Linear
    assert sorted(adalora.nnx.adapters(model)) == ["layers/0", "layers/1", "layers/2"]
    for _ in range(3):
        step(model, optimizer)
        step(small, small_optimizer)
    np.testing.assert_allclose(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert int(small_optimizer.step[...]) == 12


def test_compaction_before_final_mask_raises():
    tx = adalora.adalora(optax.adam(0.02), CONFIG)
    params = fresh(CONFIG)
    with pytest.raises(ValueError, match=r"made 0 updates, but the final mask is made at update 9"):
        adalora.compact(params, tx.init(params), tx)


def test_optimizer_state_of_unknown_shape_raises():
    def per_column():
        def init(params):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[-1:]), params)

        return optax.GradientTransformation(
            init, lambda updates, state, params=None: (updates, state)
        )

    tx = adalora.adalora(per_column(), CONFIG)
    params = {"down": fresh(CONFIG)["down"]}
    state = tx.init(params)
    for _ in range(9):
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    with pytest.raises(
        ValueError, match=r"an array of shape \(3,\) for 'down.p' of shape \(4, 3\)"
    ):
        adalora.compact(params, state, tx)
