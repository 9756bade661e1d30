"""Conformance to optax's conventions with 13 inner optimizers.

The tests follow those of optax's contributed optimizers, ``optax/contrib/_common_test.py``.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from support import toy_problem

import adalora_jax as al

CONFIG = al.AdaLoraConfig(total_step=8, init_r=3, target_r=2, tinit=1, tfinal=2, deltaT=2)
SHAPES = {"a": (2, 3, ()), "b": (3, 2, ())}
MASKED = (2, 4, 6, 7)  # a new mask every second step after the first, the final one at 8 − 2
OPTIMIZERS = {
    "adabelief": optax.adabelief,
    "adafactor": lambda learning_rate: optax.adafactor(learning_rate, min_dim_size_to_factor=2),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lamb": optax.lamb,
    "lion": optax.lion,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9, nesterov=True),
    "muon": contrib.muon,
    "prodigy": contrib.prodigy,
    "radam": optax.radam,
    "rmsprop": optax.rmsprop,
    "schedule_free": lambda learning_rate: contrib.schedule_free(
        optax.adamw(learning_rate, b1=0.0), learning_rate=learning_rate
    ),
    "sgd": optax.sgd,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def make(name, rate=0.01):
    return toy_problem.lenient(OPTIMIZERS[name](learning_rate=rate))


def parameters(dtype="float32"):
    """Return adapters together with a head and a bias."""
    adapters = toy_problem.adapters(CONFIG.replace(param_dtype=dtype), shapes=SHAPES)
    return {"block": adapters, "head": jnp.full((2, 3), 0.5, dtype), "bias": jnp.ones(3, dtype)}


def gradients(params):
    return jax.tree.map(
        lambda leaf: jnp.sin(7 * leaf) + leaf / 3 + jnp.asarray(0.1, leaf.dtype), params
    )


def train_step(tx, **extra):
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def describe(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@every_optimizer
def test_run_traces_once_and_prunes_exactly(name):
    tx = al.adalora(make(name), CONFIG)
    extra = {"value": jnp.float32(1), "an_argument_nobody_expects": 1}
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(train_step(tx, **extra), n=1))
    carry = (params, state) = parameters(), jax.jit(tx.init)(parameters())
    for t in range(CONFIG.total_step):
        carry = (after, state) = step(*carry)
        assert describe(carry) == describe((params, tx.init(params)))
        allocator = al.allocator_state(state)
        assert int(allocator.step) == t + 1
        for adapter, mask in zip(after["block"].values(), allocator.masks.values()):
            zeros = np.asarray(adapter.lam) == 0
            expected = ~np.asarray(mask) if t in MASKED else np.zeros(3, bool)
            np.testing.assert_array_equal(zeros, expected, err_msg=f"step {t}")
            assert np.isfinite(adapter.p).all()
        assert toy_problem.active(allocator.masks) == {2: 5, 3: 5}.get(t, 6 if t < 2 else 4)
    assert step._cache_size() == 1


@every_optimizer
def test_other_parameters_get_inner_optimizer_updates(name):
    """So do p and q, and λ where no mask is applied."""
    inner = make(name)
    tx = al.adalora(inner, CONFIG)
    params, state = parameters(), tx.init(parameters())

    @jax.jit
    def two_ways(params, state):
        grads = gradients(params)
        plain, _ = inner.update(grads, state.inner, params)
        ours, state = tx.update(grads, state, params)
        return plain, ours, state, optax.apply_updates(params, ours)

    for t in range(4):
        plain, ours, state, params = two_ways(params, state)
        if t in MASKED:
            for path, mask in state.allocator.masks.items():
                where = path.removeprefix("block/")
                for updates in (plain, ours):
                    adapter = updates["block"][where]
                    updates["block"][where] = adapter._replace(lam=jnp.where(mask, adapter.lam, 0))
        toy_problem.assert_same_bits(ours, plain)
    assert toy_problem.active(state.allocator.masks) == 5


@both_dtypes
@every_optimizer
def test_state_is_stable_under_cond_and_scan_and_updates_keep_dtype(name, dtype):
    """Tracing is the test: JAX rejects a branch or a loop whose state changes type."""
    tx = al.adalora(make(name), CONFIG)
    params = parameters(dtype)

    def step(carry, turn):
        params, state = carry
        grads = gradients(params)
        updates, state = jax.lax.cond(
            turn, lambda: tx.update(grads, state, params), lambda: (grads, state)
        )
        return (optax.apply_updates(params, updates), state), updates

    start = jax.eval_shape(lambda: (params, tx.init(params)))
    run = lambda carry: jax.lax.scan(step, carry, jnp.array([True, False]))
    end, updates = jax.eval_shape(run, start)
    assert describe(end) == describe(start)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    averages = (end[1].allocator.sensitivity, end[1].allocator.uncertainty)
    assert {leaf.dtype for leaf in jax.tree.leaves(averages)} == {jnp.dtype("float32")}


@every_optimizer
def test_injected_schedule_matches_schedule_in_optimizer(name):
    """A schedule given by ``inject_hyperparams`` gives the same run; the state shows its values."""
    schedule = optax.linear_schedule(0.02, 0.0, 4)
    params = parameters()
    factory = lambda learning_rate: al.adalora(OPTIMIZERS[name](learning_rate), CONFIG)
    with jax.numpy_dtype_promotion("standard"):
        injected = optax.inject_hyperparams(factory)(learning_rate=schedule)
        plain = factory(schedule)

        @jax.jit
        def both(ours, theirs):
            return train_step(injected)(*ours), train_step(plain)(*theirs)

        ours, theirs = (params, injected.init(params)), (params, plain.init(params))
        for t in range(4):
            ours, theirs = both(ours, theirs)
            rate = ours[1].hyperparams["learning_rate"]
            np.testing.assert_allclose(rate, 0.02 * (1 - t / 4), rtol=1e-6)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, ours[0], theirs[0])
        masks = [al.allocator_state(state).masks for state in (ours[1], theirs[1])]
    toy_problem.assert_same_bits(*masks)
    assert toy_problem.active(masks[0]) == 5


def test_inject_hyperparams_works_inside_and_around_adalora():
    """A rate that is set in the inner state takes effect; ``adalora`` itself can be the factory."""
    params = parameters()
    within = al.adalora(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), CONFIG)
    around = optax.inject_hyperparams(al.adalora)(inner=optax.sgd(0.1), config=CONFIG)
    plain = al.adalora(optax.sgd(0.1), CONFIG)
    expected, _ = plain.update(gradients(params), plain.init(params), params)
    for tx in (within, around):
        updates, state = tx.update(gradients(params), tx.init(params), params)
        toy_problem.assert_same_bits(updates, expected)
        assert int(al.allocator_state(state).step) == 1
    state = within.init(params)
    state.inner.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = within.update(gradients(params), state, params)
    assert not np.any(updates["head"])


@every_optimizer
def test_multisteps_counts_applied_updates(name):
    """Three mini-steps make one step; between steps nothing changes."""
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.MultiSteps(al.adalora(make(name), CONFIG), every_k_schedule=3)
        step = jax.jit(train_step(tx))
        params = parameters()
        carry = (params, tx.init(params))
        for mini in range(1, 3 * CONFIG.total_step + 1):
            before, carry = carry, step(*carry)
            allocator = al.allocator_state(carry[1])
            assert int(allocator.step) == mini // 3 == int(carry[1].gradient_step)
            if mini % 3:
                toy_problem.assert_same_bits(carry[0], before[0])
                toy_problem.assert_same_bits(allocator, al.allocator_state(before[1]))
    assert toy_problem.active(allocator.masks) == 4
    assert sum(int((a.lam != 0).sum()) for a in carry[0]["block"].values()) == 4


@every_optimizer
def test_map_params_with_identity_changes_nothing(name):
    tx = al.adalora(make(name), CONFIG)
    state = tx.init(parameters())
    toy_problem.assert_same_bits(optax.tree.map_params(tx, lambda leaf: leaf, state), state)


# One optimizer is enough for the rest ---------------------------------------------------------


def test_map_params_treats_averages_as_params_and_masks_as_non_params():
    tx = al.adalora(optax.adam(0.01), CONFIG)
    params = toy_problem.adapters(CONFIG, shapes=SHAPES)
    state = tx.init(params)
    specs = {
        name: a._replace(**{f: f"{f} of {name}" for f in a._fields}) for name, a in params.items()
    }
    mapped = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
    )
    assert mapped.allocator == al.AllocatorState(*[None] * 8, CONFIG), (
        "arrays of roles, not of params"
    )
    assert mapped.inner[0].mu == specs
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 2, state)
    assert {float(leaf.max()) for leaf in jax.tree.leaves(doubled.inner[0].mu)} == {2.0}
    toy_problem.assert_same_bits(doubled.allocator, state.allocator)


def test_scan_over_steps_equals_loop():
    tx = al.adalora(make("adamw"), CONFIG)
    step = train_step(tx)
    start = (parameters(), tx.init(parameters()))

    def scan(carry):
        return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=8)

    scanned, _ = jax.jit(scan)(start)
    looped, jitted = start, jax.jit(step)
    for _ in range(8):
        looped = jitted(*looped)
    toy_problem.assert_same_bits(scanned[1].allocator.masks, looped[1].allocator.masks)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), scanned, looped
    )
    assert toy_problem.active(scanned[1].allocator.masks) == 4


@pytest.mark.parametrize(
    ("params_in", "updates_in"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_pruned_lam_is_exactly_zero_when_update_and_param_dtypes_differ(params_in, updates_in):
    """Updates are applied outside the compiled update, where XLA cannot drop the rounding."""
    cast = optax.stateless(lambda updates, params: optax.tree.cast(updates, updates_in))
    tx = al.adalora(toy_problem.lenient(optax.chain(optax.sgd(0.3), cast)), CONFIG)
    drawn = CONFIG.replace(param_dtype=params_in, init_lora_weights=False)  # λ has a full mantissa
    params = {"block": toy_problem.adapters(drawn, shapes=SHAPES)}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(CONFIG.total_step):
        updates, state = update(gradients(params), state, params)
        with jax.numpy_dtype_promotion("standard"):  # apply_updates adds two dtypes
            params = optax.apply_updates(params, updates)
        for name, adapter in params["block"].items():
            assert adapter.lam.dtype == jnp.dtype(params_in)
            mask = np.asarray(state.allocator.masks[f"block/{name}"])
            if t in MASKED:
                np.testing.assert_array_equal(np.asarray(adapter.lam) != 0, mask)
    assert toy_problem.active(state.allocator.masks) == 4


def test_extra_args_reach_inner_optimizer():
    seen = []

    def update(updates, state, params=None, *, value, **rest):
        seen.append((value, rest))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = al.adalora(inner, CONFIG)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = parameters()
    tx.update(gradients(params), tx.init(params), params, value=3, more="words")
    assert seen == [(3, {"more": "words"})]


def test_inner_optimizer_receives_loss_value():
    """``momo`` sets its step size by the value of the loss."""
    params = parameters()
    moved = []
    for value in (0.1, 10.0):
        tx = al.adalora(toy_problem.lenient(contrib.momo(learning_rate=1.0)), CONFIG)
        updates, _ = tx.update(gradients(params), tx.init(params), params, value=jnp.float32(value))
        moved.append(float(jnp.abs(updates["head"]).sum()))
    assert 0 < moved[0] < moved[1]


def test_schedule_free_eval_params_are_pruned_by_eval_params():
    """Its evaluation point mixes in another sequence, in which a pruned λ is not zero."""
    tx = al.adalora(make("schedule_free"), CONFIG)
    carry, step = (parameters(), tx.init(parameters())), jax.jit(train_step(tx))
    for _ in range(CONFIG.total_step):
        carry = step(*carry)
    params, state = carry
    evaluated = contrib.schedule_free_eval_params(state.inner, params)
    count = lambda tree: sum(int((a.lam != 0).sum()) for a in tree["block"].values())
    assert count(params) == 4
    assert count(evaluated) == 6
    assert count(al.eval_params(state, params)) == 4
