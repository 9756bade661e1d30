"""Properties that trainers of NNX models rely on, tested without any trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import adalora_jax as adalora
from adalora_jax._src.modules.nnx_variables import pure

CONFIG = adalora.AdaLoraConfig(
    total_step=5,
    tfinal=1,
    init_r=4,
    target_r=2,
    target_modules=["up", "down"],
    modules_to_save=["head"],
)
X = jax.random.normal(jax.random.key(0), (8, 4, 6))
Y = jnp.array([0, 1, 2, 2, 1, 0, 1, 2])


class Model(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        options = {"param_dtype": dtype, "dtype": dtype, "rngs": rngs}

        def split(*names):
            return nnx.with_partitioning(
                nnx.initializers.lecun_normal(), names, eager_sharding=False
            )

        self.up = nnx.Linear(6, 12, kernel_init=split("data", "model"), **options)
        self.down = nnx.Linear(12, 6, kernel_init=split("model", "data"), **options)
        self.head = nnx.Linear(6, 3, **options)

    def __call__(self, x):
        return self.head((x + self.down(nnx.gelu(self.up(x)))).mean(axis=1))


def adapted(dtype=jnp.float32):
    config = CONFIG.replace(param_dtype=jnp.dtype(dtype).name)
    return adalora.nnx.adapt(Model(nnx.Rngs(0), dtype), config, nnx.Rngs(1)), config


def loss(model, x, y):
    logits = model(x).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def gradients(model, x, y):
    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x, y)


def as_in_memory(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_trainable_variables_can_be_rebuilt_from_arrays():
    model, _ = adapted()
    variables = jax.tree.leaves(
        nnx.state(model, nnx.LoRAParam), is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    assert {type(v) for v in variables} == {adalora.nnx.AdapterParam, adalora.nnx.SavedParam}
    for variable in variables:
        again = type(variable)(variable[...] + 1)
        assert isinstance(again, nnx.LoRAParam)
        np.testing.assert_array_equal(again[...], variable[...] + 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_keeps_structure_and_dtypes_and_is_iterable(dtype):
    model, config = adapted(dtype)
    # MultiSteps is left out because it multiplies bfloat16 by a float32 itself.
    tx = adalora.adalora(optax.adamw(1e-2), config)
    params = pure(nnx.state(model, nnx.LoRAParam))
    state = pure(nnx.Optimizer(model, tx, wrt=nnx.LoRAParam).opt_state)
    updates, after = jax.eval_shape(tx.update, params, state, params)

    def kinds(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert kinds(after) == kinds(state)
    assert kinds(updates) == kinds(params)
    assert len([*state]) == 2
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    assert not any(map(is_masked, jax.tree.leaves(state, is_leaf=is_masked)))


@pytest.mark.parametrize("inner", [optax.adamw(1e-2), optax.contrib.schedule_free_adamw(1e-2)])
def test_state_can_be_donated(inner):
    model, config = adapted()
    tx = optax.MultiSteps(adalora.adalora(inner, config), 2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    places = as_in_memory((nnx.state(model), nnx.state(optimizer)))
    assert len(set(places)) == len(places)


def test_averages_and_masks_have_sharding_metadata_like_moments():
    model, config = adapted()
    tx = adalora.adalora(optax.adamw(1e-2), config)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    place = nnx.get_partition_spec(nnx.state(optimizer, nnx.optimizer.OptState))["opt_state"]
    moments, own = place["inner"][0]["mu"], place["allocator"]
    for name, p, q in (("up", "model", "data"), ("down", "data", "model")):
        expected = {"p": P(None, p), "lam": P(None), "q": P(None, q)}

        def spec(tree, name=name):
            return {key: leaf.get_value() for key, leaf in dict(tree[name]["adalora"]).items()}

        assert spec(moments) == expected
        for average in ("sensitivity", "uncertainty"):
            of_role = own[average][name]
            assert {key: of_role[key].get_value() for key in expected} == {
                key: P(None, *of_one) for key, of_one in expected.items()
            }
        assert own["masks"][name].get_value() == P(None, None)


def test_variables_train_like_their_arrays():
    model, config = adapted()
    tx = adalora.adalora(optax.adamw(1e-2), config)
    variables = nnx.state(model, nnx.LoRAParam)
    arrays = pure(variables)
    step = jax.jit(lambda grads, state, params: tx.update(grads, state, params))
    ends = []
    for params in (variables, arrays):
        state = tx.init(params)
        structure = jax.tree.structure(state)
        for _ in range(config.total_step):
            grads = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert jax.tree.structure(state) == structure
        allocator = adalora.allocator_state(state)
        assert sum(adalora.ranks(allocator).values()) == 4
        ends.append([np.asarray(leaf) for leaf in jax.tree.leaves((params, allocator))])
    for ours, theirs in zip(*ends):
        np.testing.assert_array_equal(ours, theirs)


class Accumulator(nnx.Module):
    """Sums of gradients, returned in new Variables of the same types, as in newer trainers."""

    def __init__(self, model):
        zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.LoRAParam))
        self.sums = nnx.data(zeros)

    def variables(self, function, *trees):
        is_leaf = lambda node: isinstance(node, nnx.Variable)
        return jax.tree.map(function, self.sums, *trees, is_leaf=is_leaf)

    def add(self, grads):
        self.variables(lambda own, new: own.set_value(own[...] + new[...]), grads)

    def take(self, count):
        mean = self.variables(lambda own: type(own)(own[...] / count))
        self.variables(lambda own: own.set_value(jnp.zeros_like(own[...])))
        return mean


def test_conditional_accumulation_matches_multisteps():
    """The allocator counts applied updates, so both give the same count."""
    every, ends = 2, []

    @nnx.jit
    def with_multi_steps(model, optimizer, x, y):
        optimizer.update(model, gradients(model, x, y))

    @nnx.jit
    def with_condition(model, optimizer, accumulator, x, y, due):
        accumulator.add(gradients(model, x, y))
        apply = lambda m, o, a: o.update(m, a.take(every)) and None
        nnx.cond(due, apply, lambda *_: None, model, optimizer, accumulator)

    for by_condition in (False, True):
        model, config = adapted()
        tx = adalora.adalora(optax.sgd(0.1), config)
        tx = tx if by_condition else optax.MultiSteps(tx, every)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
        accumulator = Accumulator(model)
        for i in range(every * config.total_step):
            part = slice(4 * (i % 2), 4 * (i % 2) + 4)
            if by_condition:
                due = jnp.array(i % every == every - 1)
                with_condition(model, optimizer, accumulator, X[part], Y[part], due)
            else:
                with_multi_steps(model, optimizer, X[part], Y[part])
        state = adalora.allocator_state(optimizer.opt_state)
        assert int(state.step) == config.total_step
        assert sum(adalora.ranks(state).values()) == 4
        ends.append((jax.device_get(state.masks), adalora.nnx.adapters(model)))
    (masks, adapters), (their_masks, their_adapters) = ends
    assert jax.tree.all(jax.tree.map(np.array_equal, masks, their_masks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), adapters, their_adapters)
