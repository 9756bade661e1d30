"""Invariants of the allocator under random inputs drawn by hypothesis."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import toy_problem

import adalora_jax as al
from adalora_jax._src.core.selection import keep_best
from adalora_jax._src.core.sensitivity import raw_sensitivity

# The same examples in every run, and no deadline, because some examples compile.
examples = functools.partial(settings, deadline=None, derandomize=True)

LEAVES = {"a": (4,), "b": (2, 3), "c": (1,), "d": (5,)}
SIZE = 16
AWKWARD = st.sampled_from([0.0, -0.0, 1.0, 1e-30, 3e38, np.inf, -np.inf, np.nan, -np.nan])
FLOATS = st.floats(width=32, allow_subnormal=False)  # XLA flushes subnormals to 0
SCORES = st.one_of(FLOATS, AWKWARD, st.sampled_from([1.0, 2.0]))

best = jax.jit(keep_best)


def flat(tree):
    """Concatenate the leaves of a tree into one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def tree_of(values):
    """Arrange values in the shapes of LEAVES."""
    sizes = [int(np.prod(shape)) for shape in LEAVES.values()]
    parts = np.split(np.asarray(values, np.float32), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for part, (name, shape) in zip(parts, LEAVES.items())}


@given(values=st.lists(SCORES, min_size=SIZE, max_size=SIZE), count=st.integers(0, SIZE))
@example(values=[np.nan] * SIZE, count=7)
@example(values=[0.0] * SIZE, count=7)
@example(values=[-np.inf] * 8 + [np.nan] * 8, count=9)
@examples(max_examples=200)
def test_exactly_the_best_are_kept_for_any_scores(values, count):
    values = np.asarray(values, np.float32)
    kept = flat(best(tree_of(values), count))

    # NaN ranks below every number; ties are broken by position.
    def key(i):
        return np.isnan(values[i]), 0.0 if np.isnan(values[i]) else -float(values[i]), i

    expected = np.isin(np.arange(SIZE), sorted(range(SIZE), key=key)[:count])
    assert kept.sum() == count
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("value", [0.0, 1.0, np.inf, np.nan])
def test_many_ties_are_broken_by_position_in_large_leaves(value):
    """A sort of this length is stable only on request."""
    tree = {"a": np.full(1500, value, np.float32), "b": np.full((3, 500), value, np.float32)}
    np.testing.assert_array_equal(flat(best(tree, 1700)), np.arange(3000) < 1700)


def number_or_nan(value):
    """Return a key for `unique_by`: NaN is not equal to itself, so `unique` would allow several."""
    return "nan" if np.isnan(value) else value


@given(
    values=st.lists(FLOATS, min_size=SIZE, max_size=SIZE, unique_by=number_or_nan),
    order=st.permutations(range(SIZE)),
    count=st.integers(0, SIZE),
)
@examples(max_examples=100)
def test_permuting_distinct_scores_permutes_masks(values, order, count):
    values, order = np.asarray(values, np.float32), np.array(order)
    kept = flat(best(tree_of(values), count))
    permuted = flat(best(tree_of(values[order]), count))
    np.testing.assert_array_equal(permuted, kept[order])


CONFIG = al.AdaLoraConfig(
    total_step=10, init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=2, orth_reg_weight=0.1
)
TX = al.adalora(toy_problem.lenient(optax.adam(0.03)), CONFIG)
STEP = jax.jit(toy_problem.train_step(TX, CONFIG))


@functools.cache
def data(config=CONFIG):
    return toy_problem.batches(config)


def batch(t, config=CONFIG):
    return jax.tree.map(lambda leaf: leaf[t], data(config))


def start(config=CONFIG, tx=TX):
    params = toy_problem.adapters(config)
    return params, tx.init(params)


@functools.cache
def whole_run():
    """Return parameters and optimizer state before each step and after the last, on the host."""
    carry, record = start(), []
    for t in range(CONFIG.total_step):
        record.append(jax.device_get(carry))
        carry = STEP(*carry, batch(t))[:2]
    return [*record, jax.device_get(carry)]


@given(rng=st.integers(0, 2**32 - 1), step=st.sampled_from([2, 4, 6]))
@examples(max_examples=20)
def test_renaming_adapters_permutes_their_masks(rng, step):
    """Names decide only the order of adapters, and so only ties."""
    rng = np.random.default_rng(rng)

    def draw():
        return al.Adapter(
            *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (4,), (4, 5)))
        )

    new = {"a": "z", "b": "c", "m": "a"}
    weights, grads = ({name: draw() for name in new} for _ in range(2))

    def rename(tree):
        return {new[name]: value for name, value in tree.items()}

    masks = al.allocate(al.init_state(weights, CONFIG), grads, step)[1]
    renamed = al.allocate(al.init_state(rename(weights), CONFIG), rename(grads), step)[1]
    toy_problem.assert_same_bits(renamed, rename(masks))
    assert 0 < toy_problem.active(masks) < 12


@given(data=st.data(), schedule=st.sampled_from(["cubic", "linear"]))
@examples(max_examples=15)
def test_budget_never_rises(data, schedule):
    def integer(low, high):
        return data.draw(st.integers(low, high))

    total, target = integer(2, 60), integer(1, 5)
    tfinal = integer(0, total - 1)
    tinit = integer(0, total - tfinal - 1)
    config = al.AdaLoraConfig(
        total_step=total, tfinal=tfinal, tinit=tinit, target_r=target, init_r=target + integer(0, 4)
    ).replace(budget_schedule=schedule)
    matrices = integer(1, 9)
    budgets = np.asarray(al.budget(config, np.arange(64), matrices))
    assert (np.diff(budgets) <= 0).all()
    assert (budgets[: min(tinit, config.final_step - 1) + 1] == config.init_r * matrices).all()
    assert (budgets[config.final_step :] == config.target_r * matrices).all()


def test_run_meets_budget_at_every_mask_and_ends_on_target():
    active, allowed, alive = [], [], []
    for params, state in whole_run()[1:]:
        active.append(toy_problem.active(state.allocator.masks))
        allowed.append(int(state.allocator.budget))
        alive.append(sum(int((a.lam != 0).sum()) for a in params.values()))
    made = [2, 4, 6, 8]  # deltaT = 2 after tinit = 1, and the final mask at 10 − 2
    assert [active[t] for t in made] == [allowed[t] for t in made]
    assert [alive[t] for t in (*made, 9)] == [active[t] for t in (*made, 9)]
    assert active[0] == active[1] == 16
    assert active[8] == active[9] == 8
    assert alive[3] > active[3], "between two masks λ grows back"
    assert all(earlier >= later for earlier, later in itertools.pairwise(allowed))


@given(steps=st.sets(st.integers(0, 11), min_size=1), seed=st.integers(0, 99))
@examples(max_examples=30)
def test_skipped_final_step_is_made_up_for(steps, seed):
    state = al.init_state(toy_problem.adapters(CONFIG, seed % 3), CONFIG)
    rng, final = np.random.default_rng(seed), None
    for step in sorted(steps):
        grads = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), state.adapters
        )
        state, masks = al.allocate(state, grads, step)
        if step >= CONFIG.final_step:
            final = masks if final is None else final
            toy_problem.assert_same_bits(masks, final)
            assert toy_problem.active(masks) == 2 * toy_problem.MATRICES
    if final is None:
        due = steps & {2, 4, 6}  # before the final step, masks are made at these alone
        step = max(due, default=0)
        allowed = int(al.budget(CONFIG, step, toy_problem.MATRICES))
        assert toy_problem.active(state.allocator.masks) == allowed


FIELDS = st.tuples(
    st.sampled_from(sorted(toy_problem.SHAPES)),
    st.sampled_from(al.Adapter._fields),
    st.integers(0, 10**6),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
GUARDED = al.adalora(optax.apply_if_finite(optax.sgd(0.1), 99), CONFIG)
GUARDED_UPDATE = jax.jit(GUARDED.update)


@given(where=FIELDS, at=st.integers(0, 9))
@examples(max_examples=30)
def test_bad_gradient_leaves_allocator_unchanged_and_pruning_continues(where, at):
    name, field, position, value = where
    params, state = start(tx=GUARDED)
    rng = np.random.default_rng(position)
    for call in range(CONFIG.total_step + 1):
        grads = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params
        )
        before = state.allocator
        if call == at:
            bad = np.array(getattr(grads[name], field))
            bad.flat[position % bad.size] = value
            grads[name] = grads[name]._replace(**{field: jnp.asarray(bad)})
        updates, state = GUARDED_UPDATE(grads, state, params)
        params = optax.apply_updates(params, updates)
        if call == at:
            toy_problem.assert_same_bits(state.allocator, before)
        else:
            assert int(state.allocator.step) == int(before.step) + 1
    assert int(state.allocator.step) == CONFIG.total_step
    assert toy_problem.active(state.allocator.masks) == 2 * toy_problem.MATRICES
    assert sum(int((a.lam != 0).sum()) for a in params.values()) == 2 * toy_problem.MATRICES


def test_overflowing_product_counts_as_bad_gradient():
    params, state = start(tx=GUARDED)
    params["key"] = params["key"]._replace(lam=params["key"].lam.at[0].set(1e30))
    grads = jax.tree.map(jnp.ones_like, params)
    grads["key"] = grads["key"]._replace(lam=grads["key"].lam.at[0].set(1e30))
    _, after = GUARDED_UPDATE(grads, state, params)
    toy_problem.assert_same_bits(after.allocator, state.allocator)


@pytest.mark.parametrize("split", range(CONFIG.total_step + 1))
def test_run_resumed_at_any_step_is_bit_identical(split):
    carry = jax.tree.map(jnp.asarray, jax.tree.map(np.copy, whole_run()[split]))
    for t in range(split, CONFIG.total_step):
        carry = STEP(*carry, batch(t))[:2]
    toy_problem.assert_same_bits(carry, whole_run()[-1])


def test_donated_run_is_bit_identical():
    donating = jax.jit(toy_problem.train_step(TX, CONFIG), donate_argnums=(0, 1))
    carry = start()
    for t in range(CONFIG.total_step):
        given_away = carry
        carry = donating(*carry, batch(t))[:2]
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given_away))
    toy_problem.assert_same_bits(carry, whole_run()[-1])


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.size]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("inner", ["adam", "prodigy", "dog"])
def test_params_and_state_share_no_buffers(inner, jit):
    """This includes optimizers that keep the initial parameters in their state."""
    makers = {"adam": optax.adam, "prodigy": optax.contrib.prodigy, "dog": optax.contrib.dog}
    tx = al.adalora(makers[inner](1e-3), CONFIG)
    params = toy_problem.adapters(CONFIG)
    state = (jax.jit(tx.init) if jit else tx.init)(params)
    found = pointers((params, state))
    assert len(found) == len(set(found))


def test_init_state_and_allocate_share_no_buffers_with_inputs():
    params = toy_problem.adapters(CONFIG)
    state = al.init_state(params, CONFIG)
    after, _ = al.allocate(state, jax.tree.map(jnp.ones_like, params), 3)
    found = pointers((params, state, after))
    assert len(found) == len(set(found))


SMALL = {"a": (3, 4, ()), "s": (2, 3, (2,))}


def test_jit_eager_and_vmap_agree():
    config = CONFIG.replace(total_step=5, tfinal=1, deltaT=1)
    tx = al.adalora(optax.sgd(0.5), config)

    def gradient(params, seed):
        return jax.tree.map(
            lambda leaf: jnp.asarray(
                np.random.default_rng(seed).normal(size=leaf.shape), leaf.dtype
            ),
            params,
        )

    runs = [toy_problem.adapters(config, seed, SMALL) for seed in range(3)]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def run(update, params, state, gradients):
        for grads in gradients:
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    gradients = [[gradient(p, (i, t)) for t in range(5)] for i, p in enumerate(runs)]
    eager = run(tx.update, runs[0], tx.init(runs[0]), gradients[0])
    jitted = [run(jax.jit(tx.update), p, tx.init(p), g) for p, g in zip(runs, gradients)]
    start = stack(runs)
    mapped = run(
        jax.jit(jax.vmap(tx.update)),
        *(start, jax.vmap(tx.init)(start)),
        [stack(step) for step in zip(*gradients)],
    )
    close = functools.partial(
        jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-6)
    )
    close(eager, jitted[0])
    close(mapped, stack(jitted))
    for state in (eager[1], jitted[0][1]):
        toy_problem.assert_same_bits(state.allocator.masks, jitted[0][1].allocator.masks)
    toy_problem.assert_same_bits(
        mapped[1].allocator.masks, stack([state.allocator.masks for _, state in jitted])
    )
    assert len({tuple(flat(state.allocator.masks)) for _, state in jitted}) == 3


def test_x64_keeps_dtypes_and_masks_of_float32_run():
    with jax.enable_x64(True):
        tx = al.adalora(toy_problem.lenient(optax.adam(0.03)), CONFIG)
        step = jax.jit(toy_problem.train_step(tx, CONFIG))
        carry = jax.tree.map(jnp.asarray, whole_run()[0])
        assert_like(tx.init(carry[0]), carry[1])
        for t in range(CONFIG.total_step):
            carry = step(*carry, batch(t))[:2]
            assert_like(carry, whole_run()[0])
            masks = carry[1].allocator.masks
            toy_problem.assert_same_bits(masks, whole_run()[t + 1][1].allocator.masks)


def assert_like(tree, other):
    """Check that structures, shapes and dtypes are equal."""

    def describe(leaf):
        return np.shape(leaf), jnp.result_type(leaf)

    assert jax.tree.map(describe, tree) == jax.tree.map(describe, other)


@pytest.mark.parametrize("form", ["Adapter", "mapping"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_structure_shapes_and_dtypes_never_change(dtype, form):
    config = CONFIG.replace(param_dtype=dtype)
    params = {"block": toy_problem.adapters(config), "head": jnp.ones(3, dtype)}
    if form == "mapping":
        params["block"] = {name: a._asdict() for name, a in params["block"].items()}
    tx = al.adalora(toy_problem.lenient(optax.adamw(1e-3)), config)
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    assert_like(jax.eval_shape(step, params, state), (params, state))
    averages = (state.allocator.sensitivity, state.allocator.uncertainty)
    assert {leaf.dtype for leaf in jax.tree.leaves(averages)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.allocator.masks)} == {jnp.dtype("bool")}


def test_bfloat16_products_are_not_rounded_to_bfloat16():
    value = jnp.bfloat16(1 + 2**-7)  # its square needs 15 binary digits
    assert float(raw_sensitivity(value, -value)) == float(value) ** 2


def test_averages_of_bfloat16_params_do_not_stall():
    """The average of a constant converges, though its last steps are too small for bfloat16."""
    config = al.AdaLoraConfig(
        total_step=4000, tinit=3000, init_r=2, target_r=1, beta1=0.995, param_dtype="bfloat16"
    )
    ones = {"a": al.Adapter(*(jnp.ones(shape, jnp.bfloat16) for shape in ((2, 3), 2, (2, 3))))}
    state, grads = al.init_state(ones, config), jax.tree.map(lambda leaf: leaf / 1000, ones)
    state = jax.lax.fori_loop(0, 2000, lambda t, s: al.allocate(s, grads, t)[0], state)
    target = float(grads["a"].lam[0])
    for leaf in jax.tree.leaves(state.allocator.sensitivity):
        np.testing.assert_allclose(leaf, target, rtol=1e-3)
    for leaf in jax.tree.leaves(state.allocator.uncertainty):
        np.testing.assert_array_less(leaf, 1e-4 * target)
    # The same sum in bfloat16 stalls far from the target.
    beta, one_minus = jnp.bfloat16(0.995), jnp.bfloat16(0.005)
    stalled = jax.lax.fori_loop(
        0, 2000, lambda _, e: beta * e + one_minus * grads["a"].lam[0], jnp.bfloat16(0)
    )
    assert abs(float(stalled) - target) > 0.1 * target


@pytest.mark.parametrize("init", ["gaussian", "lambda_one", "orthonormal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_adapted_layer_equals_base_layer_at_init(init, dtype, stack):
    config = CONFIG.replace(init=init, param_dtype=dtype)
    adapter = al.init_adapter(jax.random.key(0), 5, 3, config, stack=stack)

    def draw(seed, *shape):
        return jax.random.normal(jax.random.key(seed), (*stack, *shape), dtype)

    x, kernel, bias = draw(1, 4, 5), draw(2, 5, 3), draw(3, 3)
    zero = adapter._replace(lam=0 * adapter.lam, p=0 * adapter.p, scale=1.0)
    base = al.forward(zero, x, kernel, bias)
    toy_problem.assert_same_bits(al.forward(adapter, x, kernel, bias), base)
    np.testing.assert_allclose(
        base.astype("float32"),
        (x.astype("float32") @ kernel.astype("float32") + bias[..., None, :].astype("float32")),
        rtol=1e-2,
        atol=5e-2,
    )
    assert not np.any(al.delta_weight(adapter))
    trained = adapter.lam if init == "lambda_one" else adapter.p
    assert np.any(np.asarray(trained, "float32")), "an adapter of zeros alone could not learn"
