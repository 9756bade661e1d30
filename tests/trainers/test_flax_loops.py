"""Training loops of Flax, or written by hand, as their users write them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import adalora_jax as adalora
from adalora_jax._src.modules.nnx_variables import pure

pytestmark = pytest.mark.usefixtures("flax_ranks")
SLOW = pytest.mark.slow
STEPS, LAYERS = 10, 4
CONFIG = adalora.AdaLoraConfig(
    total_step=STEPS,
    init_r=4,
    target_r=2,
    tinit=1,
    tfinal=3,
    deltaT=2,
    lora_dropout=0.1,
    target_modules=".*(up|down)",
)
X = jax.random.normal(jax.random.key(0), (8, 6))
Y = jnp.argmax(X[:, :3], axis=-1)
TRANSFORMS = {
    "plain": lambda: adalora.adalora(optax.adamw(0.02), CONFIG),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), adalora.adalora(optax.adam(0.02), CONFIG)
    ),
    "scheduled": lambda: optax.inject_hyperparams(
        lambda rate: adalora.adalora(optax.adam(rate), CONFIG)
    )(optax.linear_schedule(0.03, 0.01, STEPS)),
}


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def allowed(updates):
    """Return the number of triplets that may be active after so many updates."""
    if updates == 0:
        return CONFIG.init_r * LAYERS
    step = updates - 1
    if CONFIG.tinit < step < STEPS - CONFIG.tfinal:  # between two masks the last one is in effect
        step -= step % CONFIG.deltaT
    return int(adalora.budget(CONFIG, step, LAYERS))


def check(adapters, opt_state, updates):
    """Check that active triplets match the budget and, after the final mask, other λ are zero."""
    allocator = adalora.allocator_state(opt_state)
    assert int(allocator.step) == updates
    ranks = adalora.ranks(allocator)
    assert len(ranks) == LAYERS
    assert sum(ranks.values()) == allowed(updates), f"after {updates} updates"
    if updates > STEPS - CONFIG.tfinal:
        lams = {path: np.asarray(a.lam) for path, a in adapters.items()}
        assert {path: int((lam != 0).sum()) for path, lam in lams.items()} == ranks


def assert_close(ours, theirs):
    """Compare up to rounding: the two programs fuse different operations."""
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)


# linen ----------------------------------------------------------------------------------------


class Model(nn.Module):
    """A model with batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            h = nn.Dense(10, name=f"{i}_up")(x)
            h = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"{i}_norm")(h))
            h = nn.Dropout(0.1, deterministic=not train)(h)
            x = x + nn.Dense(6, name=f"{i}_down")(h)
        return nn.Dense(3, name="head")(x)


class State(TrainState):
    """A state as in Flax's guides, with running averages and a key."""

    batch_stats: Any
    key: jax.Array


@functools.cache
def linen_run():
    model = Model()
    variables = model.init(jax.random.key(1), X, train=False)
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(2), variables, X, train=False)
    return adapted, variables, adapters


def new_state(tx):
    adapted, variables, adapters = linen_run()
    copy = functools.partial(jax.tree.map, jnp.copy)  # because states are donated
    return State.create(
        apply_fn=adapted.apply,
        params=copy(adapters),
        tx=tx,
        batch_stats=copy(variables["batch_stats"]),
        key=jax.random.key(3),
    )


def train_step(state, params):
    def loss(adapters):
        logits, mutated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            adapters,
            X,
            train=True,
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits) + adalora.orthogonality(adapters, CONFIG), mutated

    (value, mutated), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=mutated["batch_stats"]), value


def looped(tx, steps):
    """Yield the state after each step of a jitted loop that donates states, and the losses."""
    _, variables, _ = linen_run()
    state, values = new_state(tx), []
    step = jax.jit(chex.assert_max_traces(train_step, n=1), donate_argnums=0)
    for _ in range(steps):
        before = jax.tree.leaves((state.params, adalora.allocator_state(state.opt_state)))
        state, value = step(state, variables["params"])
        assert all(leaf.is_deleted() for leaf in before), "states are donated"
        values.append(float(value))
        yield state, values


@pytest.mark.parametrize("name", TRANSFORMS)
def test_train_state_with_batch_stats_and_key_prunes_to_budget(name):
    chex.clear_trace_counter()
    adapted, variables, _ = linen_run()
    before = jax.tree.map(np.array, variables)
    structure = jax.tree.structure(new_state(TRANSFORMS[name]()))
    for updates, (state, values) in enumerate(looped(TRANSFORMS[name](), STEPS), 1):  # noqa: B007
        check(state.params, state.opt_state, updates)
        assert jax.tree.structure(state).num_leaves == structure.num_leaves
    assert values[-1] < values[0] - 0.1
    for old, new in zip(jax.tree.leaves(before["batch_stats"]), jax.tree.leaves(state.batch_stats)):
        assert not np.array_equal(old, new)
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))
    trained = {"params": variables["params"], "batch_stats": state.batch_stats}
    merged = adalora.merge(trained, state.params)
    assert_close(
        Model().apply(merged, X, train=False), adapted.apply(trained, state.params, X, train=False)
    )


def test_train_state_with_multisteps_counts_updates():
    chex.clear_trace_counter()
    tx = optax.MultiSteps(TRANSFORMS["plain"](), every_k_schedule=3)
    last = None
    for calls, (state, _) in enumerate(looped(tx, 3 * STEPS), 1):
        check(state.params, state.opt_state, calls // 3)
        lams = np.concatenate([np.asarray(a.lam) for a in state.params.values()])
        assert calls % 3 == 0 or last is None or np.array_equal(lams, last), "between two updates"
        last = lams


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=SLOW)])
def test_scanned_run_equals_python_loop(every):
    """The carry keeps its structure, shapes and dtypes, and the run equals the Python loop."""
    chex.clear_trace_counter()
    tx = TRANSFORMS["plain"]()
    tx = tx if every == 1 else optax.MultiSteps(tx, every)
    _, variables, _ = linen_run()
    state = new_state(tx)

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(chex.assert_max_traces, n=1)
    def run(state, params):
        return jax.lax.scan(lambda s, _: train_step(s, params), state, length=every * STEPS)

    scanned, values = run(state, variables["params"])
    *_, (state, losses) = looped(tx, every * STEPS)
    assert_close((scanned.params, scanned.batch_stats), (state.params, state.batch_stats))
    np.testing.assert_allclose(values, losses, rtol=1e-4)
    ours, theirs = (adalora.allocator_state(s.opt_state) for s in (scanned, state))
    chex.assert_trees_all_equal(ours.masks, theirs.masks)
    assert int(scanned.step) == every * STEPS
    check(scanned.params, scanned.opt_state, STEPS)


def test_scan_can_return_infos():
    tx = TRANSFORMS["plain"]()
    _, variables, _ = linen_run()

    @jax.jit
    def run(state):
        def step(state, _):
            state, value = train_step(state, variables["params"])
            return state, (value, adalora.info(state.opt_state))

        return jax.lax.scan(step, state, length=STEPS)

    _, (_, infos) = run(new_state(tx))
    assert np.asarray(infos.active).tolist() == [allowed(t) for t in range(1, STEPS + 1)]


# NNX ------------------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(6, 10, rngs=rngs), nnx.Linear(10, 6, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(10, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted_nnx():
    return adalora.nnx.adapt(NnxModel(nnx.Rngs(0)), CONFIG, nnx.Rngs(1))


def loss_of(model):
    penalty = adalora.orthogonality(nnx.state(model, nnx.LoRAParam), CONFIG)
    return cross_entropy(model(X)) + penalty


def copied(tree):
    return jax.tree.map(np.array, pure(tree))


def changed(before, after):
    """Return the paths of the leaves that differ."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after))
    return [jax.tree_util.keystr(path) for (path, a), b in pairs if not np.array_equal(a, b)]


FILTERS = {
    "adapters": nnx.LoRAParam,
    "the whole model": nnx.Param,
    "adapters and the head": nnx.Any(nnx.LoRAParam, nnx.PathContains("head")),
}


@pytest.mark.parametrize(
    "name", ["adapters", "the whole model", pytest.param("adapters and the head", marks=SLOW)]
)
def test_nnx_optimizer_trains_only_filtered_params(name):
    chex.clear_trace_counter()
    model, wrt = adapted_nnx(), FILTERS[name]
    warned = pytest.warns(UserWarning, match=r"base weights that have .*'blocks/0/down/kernel'")
    with warned if name == "the whole model" else contextlib.nullcontext():
        optimizer = nnx.Optimizer(model, TRANSFORMS["plain"](), wrt=wrt)
    is_base = lambda path, leaf: type(leaf) is nnx.Param
    before = copied(nnx.state(model, is_base))

    @nnx.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return value

    values = []
    for updates in range(1, STEPS + 1):
        values.append(float(step(model, optimizer)))
        check(adalora.nnx.adapters(model), optimizer.opt_state, updates)
    assert values[-1] < values[0] - 0.1
    after = changed(before, copied(nnx.state(model, is_base)))
    if name == "adapters":
        assert after == []
    elif name == "the whole model":
        assert len(after) == len(jax.tree.leaves(before))
    else:
        assert after == ["['head']['bias']", "['head']['kernel']"]
    model.eval()
    assert_close(adalora.merge(model)(X), model(X))


def test_nnx_optimizer_with_multisteps_counts_updates():
    model = adapted_nnx()
    tx = optax.MultiSteps(TRANSFORMS["plain"](), every_k_schedule=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    for calls in range(1, 2 * STEPS + 1):
        step(model, optimizer)
        check(adalora.nnx.adapters(model), optimizer.opt_state, calls // 2)


def test_scanned_nnx_run_equals_python_loop():
    """The carry is the state of the model and its optimizer."""
    model = adapted_nnx()
    optimizer = nnx.Optimizer(model, TRANSFORMS["plain"](), wrt=nnx.LoRAParam)
    graph, state = nnx.split((model, optimizer))

    def step(state, _):
        model, optimizer = nnx.merge(graph, state)
        loss = lambda model: loss_of(model)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value

    scanned, values = jax.jit(lambda state: jax.lax.scan(step, state, length=STEPS))(state)
    jitted, losses = nnx.jit(step), []
    for _ in range(STEPS):
        state, value = jitted(state, None)
        losses.append(float(value))
    np.testing.assert_allclose(values, losses, rtol=1e-4)
    (ours, my_optimizer), (theirs, their_optimizer) = (
        nnx.merge(graph, s) for s in (scanned, state)
    )
    assert_close(adalora.nnx.adapters(ours), adalora.nnx.adapters(theirs))
    masks = [adalora.allocator_state(o.opt_state).masks for o in (my_optimizer, their_optimizer)]
    chex.assert_trees_all_equal(*map(adalora.rank_pattern, masks))
    check(adalora.nnx.adapters(ours), my_optimizer.opt_state, STEPS)


class WithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(x)


def test_loop_for_linen_modules_runs_unmodified_on_bound_model():
    """Flax's examples call ``apply({"params": ..., "batch_stats": ...}, x)``."""
    x = jax.random.normal(jax.random.key(0), (16, 6))
    y = jax.random.randint(jax.random.key(1), (16,), 0, 3)
    base = WithStatistics().init(jax.random.key(2), x)
    config = adalora.AdaLoraConfig(
        total_step=6, init_r=4, target_r=2, target_modules=["up"], modules_to_save=["head"]
    )
    adapted = adalora.linen.adapt(WithStatistics(), config)

    def train(model):
        variables = model.init(jax.random.key(3), x)
        params, statistics = variables["params"], variables["batch_stats"]
        state = TrainState.create(
            apply_fn=model.apply, params=params, tx=adalora.adalora(optax.adam(1e-2), config)
        )

        @jax.jit
        def step(state, statistics):
            def loss(params):
                logits, changed = state.apply_fn(
                    {"params": params, "batch_stats": statistics},
                    *(x, True),
                    mutable=["batch_stats"],
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean(), changed["batch_stats"]

            grads, statistics = jax.grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads), statistics

        for _ in range(config.total_step):
            state, statistics = step(state, statistics)
        return state, statistics

    bound = adapted.bind(base)
    state, statistics = train(bound)
    assert sum(adalora.ranks(state.opt_state).values()) == 2
    outputs = bound.apply({"params": state.params, "batch_stats": statistics}, x)
    merged = adalora.merge({**base, "batch_stats": statistics}, state.params)
    np.testing.assert_allclose(WithStatistics().apply(merged, x), outputs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"pass \{'params': adapters\}"):
        bound.apply(state.params, x)
