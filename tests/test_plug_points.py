"""Options for λ, initial values and masks, each against its formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import adalora_jax as al
from adalora_jax._src.core.schedule import cost
from adalora_jax._src.core.scores import triplet_scores
from adalora_jax._src.core.selection import (
    RankedScores,
    apply_threshold,
    find_threshold,
    keep_best,
    rank_scores,
)
from adalora_jax._src.core.transform import soft_threshold

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)


def gradients(params, seed):
    """Draw random gradients, different at each step."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), params)


def steps(config, inner, params=None, jit=jax.jit):
    """Yield ``(params, allocator)`` after each step of a run with random gradients."""
    params = problem.adapters(config) if params is None else params
    tx = al.adalora(problem.lenient(inner), config)
    state, update = tx.init(params), jit(tx.update)
    for seed in range(config.total_step):
        updates, state = update(gradients(params, seed), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state.allocator


# The scale ------------------------------------------------------------------------------------


def test_given_scale_does_not_depend_on_rank():
    given, derived = CONFIG.replace(scale=1.5), CONFIG
    assert (given.scaling, derived.scaling) == (1.5, 1.5)
    assert given != derived
    assert given.replace(init_r=6).scaling == 1.5
    assert given.replace(lora_alpha=1).scaling == 1.5
    assert derived.replace(init_r=6).scaling == 1.0
    assert given.replace(scale=None) == derived
    assert derived.replace(scale=derived.scaling, init_r=6).scaling == 1.5


def test_layer_alpha_overrides_config_scale():
    limits = {"query": al.RankSpec(init_r=8), "key": al.RankSpec(alpha=20)}
    config = CONFIG.replace(rank_overrides=limits)
    paths = ("a/query", "a/key", "a/up")
    assert [config.scale_of(path) for path in paths] == [6 / 8, 20 / 4, 6 / 4]
    assert [config.replace(scale=0.25).scale_of(path) for path in paths] == [0.25, 5.0, 0.25]


def test_scale_round_trips_through_dict():
    for config in (CONFIG, CONFIG.replace(scale=1.5)):
        back = al.AdaLoraConfig.from_dict(config.to_dict())
        assert back == config
        assert back.replace(init_r=6) == config.replace(init_r=6)
    # Configs saved before the option existed have no scale.
    old = {name: value for name, value in CONFIG.to_dict().items() if name != "scale"}
    assert al.AdaLoraConfig.from_dict(old) == CONFIG


def test_peft_config_expresses_scale_as_alpha():
    config = CONFIG.replace(scale=0.75)
    assert config.to_peft()["lora_alpha"] == 3
    assert "scale" not in config.to_peft()
    assert al.AdaLoraConfig.from_peft(config.to_peft()).scaling == config.scaling


@pytest.mark.parametrize("limits", [None, {"b": {"alpha": 3}}])
def test_exported_adapter_computes_with_given_scale(limits, tmp_path):
    config = CONFIG.replace(scale=0.75, rank_overrides=limits, init_lora_weights=False)
    shapes = {"a": (3, 4, ()), "b": (4, 3, ())}
    adapters = problem.adapters(config, shapes=shapes)
    al.huggingface.save_pretrained(tmp_path, adapters, config)
    loaded = al.huggingface.load_pretrained(tmp_path)
    for name, adapter in adapters.items():
        ours = al.delta_weight(adapter)
        theirs = al.delta_weight(loaded.adapters[name])
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
        if limits is None:
            problem.assert_same_bits(loaded.adapters[name]._replace(layout=None), adapter)


# The steps of λ -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner", [optax.adam, optax.lion, optax.adafactor], ids=lambda o: o.__name__
)
@pytest.mark.parametrize("params", [None, "beside others"])
def test_lam_updates_are_inner_updates_times_multiplier(inner, params):
    config = CONFIG.replace(lambda_lr_scale=2.5, init_lora_weights=False)
    trees = problem.adapters(config)
    trees = trees if params is None else {"block": trees, "head": jnp.ones((2, 3))}
    grads = gradients(trees, 0)
    inner = problem.lenient(inner(0.1))
    alone, _ = inner.update(grads, inner.init(trees), trees)
    tx = al.adalora(inner, config)
    ours, state = tx.update(grads, tx.init(trees), trees)
    new = optax.apply_updates(trees, ours)
    for name, adapter in al.adapters(ours).items():
        plain = al.adapters(alone)[name]
        np.testing.assert_array_equal(adapter.p, plain.p)
        np.testing.assert_array_equal(adapter.lam, np.float32(2.5) * plain.lam)
        # Importance uses the updated λ.
        raw = abs(al.adapters(new)[name].lam * al.adapters(grads)[name].lam)
        average = al.adapters(state.allocator.sensitivity)[name].lam
        np.testing.assert_allclose(average, 0.15 * raw, rtol=1e-5)
    if params is not None:
        np.testing.assert_array_equal(ours["head"], alone["head"])


@pytest.mark.slow
def test_multiplier_gives_same_run_with_and_without_jit():
    config = CONFIG.replace(lambda_lr_scale=4.0, allow_regrowth=False)
    runs = [list(steps(config, optax.adam(0.03), jit=jit)) for jit in (jax.jit, lambda f: f)]
    for compiled, eager in zip(*runs):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), compiled, eager
        )


def test_multiplier_of_one_leaves_program_unchanged():
    params = problem.adapters(CONFIG)

    def program(config):
        tx = al.adalora(optax.adam(0.1), config)
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))

    config = CONFIG.replace(lambda_lr_scale=1, allow_regrowth=True)
    assert program(config) == program(CONFIG)
    assert program(CONFIG.replace(lambda_lr_scale=2.0)) != program(CONFIG)


# A proximal step on λ -------------------------------------------------------------------------


def test_soft_threshold_minimises_its_objective():
    """The objective is ``½ (y − x)² + η |y|``, minimised here by grid search."""
    grid, eta = np.linspace(-3, 3, 60001), 0.7
    x = np.array([-2.5, -0.7, -0.3, 0.0, 0.699, 0.8, 2.0])
    best = [grid[np.argmin(0.5 * (grid - one) ** 2 + eta * abs(grid))] for one in x]
    np.testing.assert_allclose(soft_threshold(jnp.asarray(x), eta), best, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prox_is_applied_to_lam_before_importance(dtype):
    config = CONFIG.replace(
        prox="soft_threshold",
        prox_weight=0.75,
        lambda_lr_scale=2.0,
        init_lora_weights=False,
        param_dtype=dtype,
    )
    params = problem.adapters(config)
    grads = gradients(params, 3)
    tx = al.adalora(optax.sgd(0.1), config)
    updates, state = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    sparse = 0
    for name, adapter in params.items():
        lam = (adapter.lam - 2 * jnp.asarray(0.1, dtype) * grads[name].lam).astype("float32")
        want = np.sign(lam) * np.maximum(abs(lam) - 0.75, 0)
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.05, "atol": 0.02}
        np.testing.assert_allclose(new[name].lam.astype("float32"), want, **close)
        np.testing.assert_array_equal(new[name].lam == 0, want == 0)
        average = state.allocator.sensitivity[name].lam
        np.testing.assert_array_equal(average == 0, want == 0)
        sparse += int((want == 0).sum())
    assert sparse > 0, "nothing was thresholded"


def test_custom_prox_is_applied_per_adapter_and_must_keep_shape():
    """This prox keeps the two largest |λ| of each matrix, independently of the masks."""

    def two_largest(lam, weight):
        return jnp.where(abs(lam) >= jnp.sort(abs(lam), axis=-1)[..., -2:-1], lam, 0)

    for params, _ in steps(CONFIG.replace(prox=two_largest), optax.sgd(0.1)):
        assert {int((m["lam"] != 0).sum()) for m in problem.matrices(params)} <= {0, 1, 2}
    config = CONFIG.replace(prox=lambda lam, weight: lam.sum())
    with pytest.raises(ValueError, match=r"prox=.*returned shape \(\).*one λ for each"):
        next(steps(config, optax.sgd(0.1)))


# Custom initial values ------------------------------------------------------------------------


def test_custom_init_is_called_for_each_matrix():
    def ones(key, ins, outs, rank, dtype):
        value = jax.random.uniform(key)
        return (value * jnp.ones((rank, outs)), jnp.zeros(rank), jnp.ones((rank, ins)))

    config = CONFIG.replace(init=ones, param_dtype="bfloat16")
    one = al.init_adapter(jax.random.key(0), 3, 5, config)
    assert [(leaf.shape, leaf.dtype) for leaf in one] == [
        (shape, jnp.bfloat16) for shape in ((4, 5), (4,), (4, 3))
    ]
    many = al.init_adapter(jax.random.key(0), 3, 5, config, stack=(2, 3), rank=2)
    assert [leaf.shape for leaf in many] == [(2, 3, 2, 5), (2, 3, 2), (2, 3, 2, 3)]
    assert len(set(np.asarray(many.p[..., 0, 0], np.float32).ravel().tolist())) == 6


def test_custom_init_of_wrong_shapes_raises():
    config = CONFIG.replace(init=lambda key, ins, outs, rank, dtype: [jnp.ones((ins, rank))] * 3)
    with pytest.raises(ValueError, match=r"returned the shapes .*must be \[\(4, 5\), \(4,\)"):
        al.init_adapter(jax.random.key(0), 3, 5, config)


# Scores ---------------------------------------------------------------------------------------


def test_sensitivity_over_uncertainty_is_finite_at_zero_uncertainty():
    make = lambda lam: al.Adapter(jnp.zeros((4, 2)), jnp.asarray(lam), jnp.zeros((4, 3)))
    evidence = al.scores.ScoreInputs(
        *(make([1.0] * 4),) * 2, make([3.0, 0.0, 2.0, 0.0]), make([0.5, 0.5, 0.0, 0.0])
    )
    config = CONFIG.replace(score="sensitivity_over_uncertainty")
    np.testing.assert_allclose(triplet_scores(evidence, config), [6, 0, 1e6, 0], rtol=1e-6)


def test_signal_to_noise_is_that_of_posterior():
    """With constant gradients, σ⁻² is the squared gradient plus the prior's precision."""
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 5)).astype("float32")
    lam = lambda values: al.Adapter(jnp.zeros((5, 2)), jnp.asarray(values), jnp.zeros((5, 3)))
    evidence = al.scores.ScoreInputs(lam(w), lam(g), lam(abs(w * g)), lam(0 * w))
    scores = triplet_scores(evidence, CONFIG.replace(score="signal_to_noise"))
    np.testing.assert_allclose(scores, abs(w) / (1 / np.sqrt(g**2 + 1e-4)), rtol=1e-5)


# Costs of triplets ----------------------------------------------------------------------------


def greedy(scores, turns, costs, budget):
    """Keep turn 0, then the best of turn 1 one by one, until one costs more than remains."""
    keep = turns == 0
    left = budget - costs[keep].sum()
    for i in sorted(np.flatnonzero(turns == 1), key=lambda i: (-scores[i], i)):
        if costs[i] > left:
            break
        keep[i], left = True, left - costs[i]
    return keep


@pytest.mark.parametrize("kinds", [3, 10**6])
@pytest.mark.parametrize("limited", [False, True])
def test_selection_under_costs_matches_greedy_reference(kinds, limited):
    """Three distinct scores give ties everywhere; a million give none."""

    def best(scores, turns, budget, costs):
        row = RankedScores(rank_scores(scores).keys, turns, costs)
        return apply_threshold([row], find_threshold(row, budget))[0]

    ours = jax.jit(jax.vmap(best, in_axes=(None, None, 0, None)))
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = rng.integers(kinds, size=50).astype("float32")
        costs = rng.choice([3, 7, 1000], size=50).astype("int32")
        turns = rng.choice(3, size=50, p=[0.2, 0.6, 0.2]) if limited else np.ones(50, int)
        budgets = np.array([0, costs.sum(), *rng.integers(0, costs.sum() + 1, size=20)])
        found = ours(scores, jnp.asarray(turns) if limited else None, budgets, costs)
        for budget, keep in zip(budgets, found):
            np.testing.assert_array_equal(keep, greedy(scores, turns, costs, budget))


@pytest.mark.parametrize("kinds", [3, 10**6])
def test_leaves_of_different_costs_are_ranked_together(kinds):
    ours = jax.jit(
        jax.vmap(lambda s, b, c: keep_best(list(s), b, costs=list(c)), in_axes=(None, 0, None))
    )
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = rng.integers(kinds, size=(8, 5)).astype("float32")
        costs = rng.choice([3, 7, 1000], size=8).astype("int32")
        each = np.repeat(costs, 5)
        budgets = np.array([0, each.sum(), *rng.integers(0, each.sum() + 1, size=20)])
        found = np.concatenate(ours(jnp.asarray(scores), budgets, jnp.asarray(costs)), axis=-1)
        for budget, keep in zip(budgets, found):
            expected = greedy(scores.ravel(), np.ones(40, int), each, budget)
            np.testing.assert_array_equal(keep, expected)


def test_triplet_cost_depends_on_layer_size():
    config = CONFIG.replace(budget_unit="parameters")
    assert cost(CONFIG, "up", 512, 2048) == 1
    assert cost(config, "up", 512, 2048) == 512 + 1 + 2048
    assert cost(config.replace(budget_unit="flops"), "up", 8, 32) == (2 * 8) + 1 + (2 * 32)
    own = config.replace(budget_unit=lambda path, ins, outs: 100 * len(path) + ins - outs)
    assert cost(own, "up", 8, 32) == 176
    with pytest.raises(ValueError, match=r"budget_unit\('up', .*\)=0.5 must be an integer"):
        cost(config.replace(budget_unit=lambda *_: 0.5), "up", 8, 32)


@pytest.mark.parametrize("unit", ["parameters", "flops"])
@pytest.mark.parametrize(
    "changes", [{}, {"allocation": "per_adapter"}, {"allow_regrowth": False}], ids=str
)
def test_live_cost_is_less_than_one_triplet_below_budget(unit, changes):
    """The budget falls from the cost of init_r per matrix to that of target_r per matrix."""
    config = CONFIG.replace(budget_unit=unit, **changes)
    params = problem.adapters(config)
    each = {"down": 5 + 3, "key": 4 + 4, "layers": 3 + 5}
    each = {name: (2 if unit == "flops" else 1) * n + 1 for name, n in each.items()}
    one = each["down"] + each["key"] + 2 * each["layers"]
    budgets = []
    for _, state in steps(config, optax.sgd(0.5), params):
        spent = sum(each[name] * int(mask.sum()) for name, mask in state.masks.items())
        budgets.append(int(state.budget))
        assert 0 <= budgets[-1] - spent < max(each.values())
    assert (budgets[0], budgets[-1]) == (4 * one, 2 * one)
    assert budgets == sorted(budgets, reverse=True)


def test_score_per_cost_prefers_several_cheap_triplets():
    make = lambda lam, n: al.Adapter(jnp.ones((3, n)), jnp.asarray(lam), jnp.ones((3, n)))
    adapters = {"narrow": make([1.0, 2.0, 3.0], 5), "wide": make([9.0, 8.0, 7.0], 50)}
    config = al.AdaLoraConfig(total_step=1, init_r=3, target_r=1, score="magnitude")

    def masks(config):
        _, masks = al.allocate(al.init_state(adapters, config), adapters, 0)
        return {name: mask.tolist() for name, mask in masks.items()}

    assert masks(config) == {"narrow": [False] * 3, "wide": [True, True, False]}
    # Triplets cost 11 or 101, so the budget is 112: after one wide triplet, 11 remain, the next one
    # is wide and too expensive, and selection stops.
    assert masks(config.replace(budget_unit="parameters")) == {
        "narrow": [False] * 3,
        "wide": [True, False, False],
    }
    by_price = lambda e: abs(e.weight.lam) / (e.weight.p.shape[-1] + e.weight.q.shape[-1] + 1)
    assert masks(config.replace(budget_unit="parameters", score=by_price)) == {
        "narrow": [True, True, True],
        "wide": [False] * 3,
    }


def test_budget_beyond_int32_raises():
    config = CONFIG.replace(budget_unit=lambda path, ins, outs: 10**9)
    with pytest.raises(ValueError, match=r"budget_unit=.*more than an int32 can count"):
        al.init_state(problem.adapters(config), config)


# Growing ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_pruned", [False, True])
@pytest.mark.parametrize("init", ["gaussian", "lambda_one", "orthonormal"])
def test_grow_schedule_increases_ranks_and_new_triplets_train(freeze_pruned, init):
    """The problem needs rank: triplets that were pruned early are live and non-zero at the end."""
    config = CONFIG.replace(
        total_step=60,
        init_r=3,
        tfinal=20,
        deltaT=4,
        budget_schedule="grow",
        freeze_pruned=freeze_pruned,
        init=init,
    )
    params, data = problem.adapters(config), problem.batches(config)
    tx = al.adalora(problem.lenient(optax.adam(0.03)), config)
    state, step = tx.init(params), jax.jit(problem.train_step(tx, config))
    budgets, masks = [], []
    for t in range(config.total_step):
        params, state, _ = step(params, state, jax.tree.map(lambda leaf, t=t: leaf[t], data))
        budgets.append(int(state.allocator.budget))
        masks.append(problem.rows(state.allocator.masks))
        if t > config.tinit and t % config.deltaT == 0 and t < config.final_step:
            assert problem.live(state.allocator.masks) == budgets[-1]
    growing = budgets[2 : config.final_step + 1]
    assert (growing[0], growing[-1]) == (problem.MATRICES, 2 * problem.MATRICES)
    assert growing == sorted(growing)
    assert problem.live(state.allocator.masks) == 2 * problem.MATRICES
    early, late = masks[8], masks[-1]
    grown = [now & ~then for now, then in zip(late, early)]
    assert sum(map(np.sum, grown)) >= problem.MATRICES
    moves = []
    for adapter, new in zip(problem.matrices(params), grown):
        assert np.all(adapter["lam"][new] != 0)
        moves.extend(np.abs(adapter["lam"][new, None] * adapter["p"][new]).max(axis=-1))
    assert np.mean(np.array(moves) > 1e-3) > 0.7


# Orthonormal rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ins", "outs"), [(9, 7), (9, 3), (4, 4)])
def test_orthonormal_init_makes_rows_or_columns_orthonormal(stack, dtype, ins, outs):
    config = CONFIG.replace(init="orthonormal", param_dtype=dtype)
    adapter = al.init_adapter(jax.random.key(0), ins, outs, config, stack=stack)
    assert {leaf.dtype for leaf in adapter} == {jnp.dtype(dtype)}
    assert not np.any(adapter.lam)
    for matrix in (adapter.p, adapter.q):
        matrix = np.asarray(matrix, np.float64).reshape(-1, *matrix.shape[-2:])
        for one, other in itertools.pairwise([*matrix, matrix[0] + 1]):
            short = one if len(one) <= one.shape[1] else one.T
            np.testing.assert_allclose(
                short @ short.T, np.eye(len(short)), atol=1e-6 if dtype == "float32" else 2e-2
            )
            assert not np.allclose(one, other)


def test_orthonormal_init_is_isotropic():
    """Over many draws, each entry of 2 orthonormal rows of 3 has mean 0 and variance 1/3."""
    config = CONFIG.replace(init="orthonormal")
    q = al.init_adapter(jax.random.key(1), 3, 3, config, rank=2, stack=(20000,)).q
    np.testing.assert_allclose(q.mean(axis=0), np.zeros((2, 3)), atol=0.02)
    np.testing.assert_allclose(q.var(axis=0), np.full((2, 3), 1 / 3), atol=0.01)


# No revival -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocation", "limits"),
    [
        ("global", None),
        ("global", {"key": {"min_r": 1, "max_r": 2}, "down": {"min_r": 2}}),
        ("per_adapter", None),  # does not allow limits
    ],
)
def test_without_revival_ranks_only_fall_and_budget_is_met(allocation, limits):
    config = CONFIG.replace(rank_overrides=limits, allocation=allocation, score="sensitivity")

    def run(config):
        """Count the triplets that masks revived, and those that are live after the last mask."""
        before, revived = None, 0
        for t, (params, state) in enumerate(steps(config, optax.sgd(0.5))):
            masks = problem.rows(state.masks)
            assert sum(map(np.sum, masks)) == int(state.budget), f"step {t}"
            if before is not None:
                revived += sum(int((now & ~then).sum()) for now, then in zip(masks, before))
            if not config.allow_regrowth:
                for adapter, mask in zip(problem.matrices(params), masks):
                    assert not adapter["lam"][~mask].any(), f"step {t}"
            before = masks
        return revived, sum(map(np.sum, masks))

    assert run(config.replace(allow_regrowth=False)) == (0, 2 * problem.MATRICES)
    revived, live = run(config)
    assert revived > 0, "nothing was at stake"
    assert live == 2 * problem.MATRICES


def test_pruned_triplets_do_not_count_towards_min_r():
    """Only live triplets count, even where a pruned one has the highest score."""
    limits = {"a": {"min_r": 1}}
    config = al.AdaLoraConfig(
        total_step=4,
        init_r=3,
        target_r=1,
        score="magnitude",
        rank_overrides=limits,
        allow_regrowth=False,
    )
    make = lambda lam: al.Adapter(jnp.ones((3, 2)), jnp.asarray(lam), jnp.ones((3, 2)))
    adapters = {"a": make([1.0, 2.0, 3.0]), "b": make([9.0, 8.0, 7.0])}
    state = al.init_state(adapters, config)
    dead = {"a": jnp.array([True, True, False]), "b": jnp.ones(3, bool)}
    state = al.AdaLoraState(adapters, state.allocator._replace(masks=dead))
    _, masks = al.allocate(state, adapters, 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, True, False],
        "b": [True, False, False],
    }


def test_nan_budget_schedule_prunes_nothing_before_final_step():
    config = CONFIG.replace(budget_schedule=lambda config, step, n: jnp.nan * step)
    budgets = [int(al.budget(config, step, 3)) for step in range(config.total_step)]
    assert budgets[: config.final_step] == [3 * config.init_r] * config.final_step
    assert budgets[-1] == 3 * config.target_r
