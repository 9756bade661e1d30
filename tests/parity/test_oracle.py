"""The package against the paper in NumPy: whole runs through all phases, compared at every step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracle, toy_problem
from support.custom_scores import sensitivity_over_uncertainty, signal_to_noise, upper_confidence

import adalora_jax as al

SEEDS = (0, 1, 2)


def near_tie(config):
    """Return the relative score difference that the package's float32 may not resolve.

    A decision closer than this could go either way; the runs below contain none, as each test
    asserts. λ is rounded once, while an average accumulates the rounding of all steps.
    """
    return 3e-7 if config.score == "magnitude" else 1e-5


CHOICES = {
    "score": (
        "sensitivity_uncertainty",
        "smoothed_sensitivity",
        "sensitivity",
        "magnitude",
    ),
    "init": ("gaussian", "lambda_one"),
    "sensitivity_timing": ("updated", "current"),
    "budget_schedule": ("cubic", "linear"),
    "score_reduction": ("triplet", "lam"),
    "orthogonality": ("frobenius", "squared"),
    "freeze_pruned": (False, True),
    "allow_regrowth": (True, False),
    "lambda_lr_scale": (1.0, 3.0),
    "scale": (None, 0.7),
    "inner": ("sgd", "adam"),
    "tinit": (0, 3),
    "tfinal": (0, 4),
    "deltaT": (1, 3),
}


def covering_cases():
    """Combine every score with every init and ``sensitivity_timing``; draw the other options."""
    names = list(CHOICES)
    rest = np.random.default_rng(5830)
    cases = [
        dict(zip(names, [*fixed, *(CHOICES[name][rest.integers(2)] for name in names[3:])]))
        for fixed in itertools.product(*(CHOICES[name] for name in names[:3]))
    ]
    return [*cases, cases[0] | {"inner": "adam"}]  # which the draw does not combine with "updated"


PLAIN = {
    "init": "gaussian",
    "sensitivity_timing": "updated",
    "inner": "sgd",
    "tinit": 2,
    "tfinal": 3,
    "total_step": 20,
}
BEYOND = [  # options the paper does not have
    {"score": upper_confidence, "init": "lambda_one", "sensitivity_timing": "current"},
    {"score": sensitivity_over_uncertainty},
    {"score": sensitivity_over_uncertainty, "init": "lambda_one", "inner": "adam"},
    {"score": signal_to_noise, "inner": "adam", "freeze_pruned": True},
    {"budget_unit": "parameters", "deltaT": 2},
    {"budget_unit": "flops", "inner": "adam", "allow_regrowth": False, "budget_schedule": "linear"},
    {"budget_unit": "parameters", "budget_schedule": "grow", "score": "magnitude"},
    {"budget_schedule": "grow", "init_r": 4},
    {"budget_schedule": "grow", "freeze_pruned": True, "inner": "adam", "init": "lambda_one"},
    {"prox": "soft_threshold", "prox_weight": 1e-3, "inner": "adam", "deltaT": 2},
    {
        "prox": "soft_threshold",
        "prox_weight": 1e-4,
        "lambda_lr_scale": 2.0,
        "allow_regrowth": False,
    },
]


def case_id(case):
    return "-".join(getattr(value, "__name__", str(value)) for value in case.values())


def both(case, param_dtype="float64", **settings):
    """Return the hyperparameters and inner optimizers of both implementations."""
    settings = (
        {"total_step": 15, "init_r": 3, "target_r": 2, "orth_reg_weight": 0.1} | settings | case
    )
    init, inner = settings.pop("init"), settings.pop("inner")
    config = al.AdaLoraConfig(init=init, param_dtype=param_dtype, **settings)
    theirs, ours = {"sgd": (oracle.sgd, optax.sgd), "adam": (oracle.adam, optax.adam)}[inner]
    rate = 0.03
    return config, oracle.Settings(**settings), toy_problem.lenient(ours(rate)), theirs(rate)


def runs(config, inner, seeds):
    """Train all seeds under vmap; return the initial adapters, the data and a record per step."""
    starts = [toy_problem.adapters(config, seed) for seed in seeds]
    data = [toy_problem.batches(config, seed) for seed in seeds]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    tx = al.adalora(inner, config)
    step = jax.jit(jax.vmap(toy_problem.train_step(tx, config)))
    params, batches, records = stack(starts), stack(data), []
    state = jax.vmap(tx.init)(params)
    for t in range(config.total_step):
        batch = jax.tree.map(lambda leaf, t=t: leaf[:, t], batches)
        params, state, loss = step(params, state, batch)
        records.append(jax.device_get((loss, params, al.allocator_state(state))))
    return starts, data, records


def assert_close(ours, theirs, what, rtol, atol):
    for k, (a, b) in enumerate(zip(toy_problem.matrices(ours), theirs)):
        for name in ("p", "lam", "q"):
            message = f"{what} of {name} of matrix {k}"
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=message)


def compare(history, record, closest, rtol, atol):
    """Compare every step of one run with the oracle's."""
    for t, (expected, (loss, params, state)) in enumerate(zip(history, record)):
        assert expected.margin > closest, f"step {t} decides a near tie: choose another seed"
        assert state.step == t + 1
        assert state.budget == expected.budget, f"step {t}"
        for mine, theirs in zip(toy_problem.rows(state.masks), expected.masks):
            np.testing.assert_array_equal(mine, theirs, err_msg=f"step {t}")
        np.testing.assert_allclose(loss, expected.loss, rtol=rtol)
        assert_close(params, expected.matrices, f"step {t}: value", rtol, atol)
        # The package stores the averages in float32 for any parameter dtype.
        coarse = {"rtol": max(rtol, 5e-6), "atol": max(atol, 1e-9)}
        assert_close(state.sensitivity, expected.sensitivity, f"step {t}: Ī", **coarse)
        assert_close(state.uncertainty, expected.uncertainty, f"step {t}: Ū", **coarse)


@pytest.mark.parametrize("case", [*covering_cases(), *(PLAIN | c for c in BEYOND)], ids=case_id)
def test_runs_match_paper_at_every_step(case):
    with jax.enable_x64(True):
        config, settings, inner, theirs = both(case)
        starts, data, records = runs(config, inner, SEEDS)
        ranks = set()
        for i, (start, batches) in enumerate(zip(starts, data)):
            history = oracle.train(
                toy_problem.matrices(start), toy_problem.oracle_batches(batches), settings, theirs
            )
            record = jax.tree.map(lambda leaf, i=i: leaf[i], records)
            compare(history, record, near_tie(config), rtol=1e-9, atol=1e-12)
            ranks.add(tuple(int(mask.sum()) for mask in history[-1].masks))
        if config.budget_unit == "triplets":
            assert {sum(row) for row in ranks} == {config.target_r * toy_problem.MATRICES}
        assert any(len(set(row)) > 1 for row in ranks), "no run moved rank between matrices"


def test_cases_cover_every_pair_of_options():
    cases = covering_cases()
    for (a, first), (b, second) in itertools.combinations(CHOICES.items(), 2):
        pairs = {(case[a], case[b]) for case in cases}
        assert pairs == set(itertools.product(first, second)), (a, b)


@pytest.mark.parametrize(("inner", "sensitivity_timing"), [("sgd", "current"), ("adam", "updated")])
def test_float32_runs_match_paper_up_to_rounding(inner, sensitivity_timing):
    case = {
        "inner": inner,
        "sensitivity_timing": sensitivity_timing,
        "init": "gaussian",
        "tinit": 3,
        "tfinal": 4,
    }
    config, settings, ours, theirs = both(case, param_dtype="float32")
    starts, data, records = runs(config, ours, SEEDS)
    for i, (start, batches) in enumerate(zip(starts, data)):
        history = oracle.train(
            toy_problem.matrices(start), toy_problem.oracle_batches(batches), settings, theirs
        )
        record = jax.tree.map(lambda leaf, i=i: leaf[i], records)
        compare(history, record, closest=1e-3, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("score_reduction", "freeze_pruned"), [("triplet", False), ("lam", True)])
@pytest.mark.parametrize("score", CHOICES["score"])
def test_allocate_matches_paper_with_unequal_ranks_and_bad_gradients(
    score, score_reduction, freeze_pruned
):
    """Weights and gradients are random; four gradients are not finite, one at a mask's step."""
    common = {
        "score": score,
        "score_reduction": score_reduction,
        "freeze_pruned": freeze_pruned,
        "tinit": 2,
        "tfinal": 3,
    }
    common |= {
        "total_step": 14,
        "init_r": 4,
        "target_r": 2,
        "deltaT": 2,
        "beta1": 0.6,
        "beta2": 0.7,
    }
    config, settings = al.AdaLoraConfig(**common), oracle.Settings(**common)
    trees = toy_problem.adapters(config, ranks={"down": 2, "layers": 5})
    state = al.init_state(trees, config)
    theirs = oracle.Allocator(toy_problem.matrices(trees), settings)
    bad = {3: np.nan, 4: np.inf, 6: -np.inf, 9: np.nan}
    rng = np.random.default_rng(5)
    for call in range(config.total_step + len(bad)):
        weights, grads = (
            jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), trees)
            for _ in range(2)
        )
        if call in bad:
            grads["key"] = grads["key"]._replace(p=grads["key"].p.at[1, 2].set(bad[call]))
        state = dataclasses.replace(state, adapters=weights)
        state, masks = al.allocate(state, grads, state.allocator.step)
        keep = theirs.update(toy_problem.matrices(weights), toy_problem.matrices(grads))
        assert theirs.margin > near_tie(config)
        assert int(state.allocator.step) == theirs.step
        assert int(state.allocator.budget) == theirs.budget
        for mine, mask in zip(toy_problem.rows(masks), theirs.masks):
            np.testing.assert_array_equal(mine, mask, err_msg=f"call {call}")
        averages = (state.allocator.sensitivity, state.allocator.uncertainty)
        for mine, average in zip(averages, (theirs.sensitivity, theirs.uncertainty)):
            assert_close(mine, average, f"call {call}", rtol=2e-5, atol=1e-7)
        for mine, before, mask in zip(*map(toy_problem.matrices, (state.adapters, weights)), keep):
            np.testing.assert_array_equal(mine["lam"], np.where(mask, before["lam"], 0))
            np.testing.assert_array_equal(mine["p"], before["p"])
    assert theirs.step == config.total_step
    assert sum(int(mask.sum()) for mask in theirs.masks) == 2 * toy_problem.MATRICES


SCHEDULED = [  # total_step, tinit, tfinal, init_r, target_r, matrices, sum of initial ranks
    (1000, 100, 300, 12, 8, 36, None),
    (300, 0, 0, 12, 8, 5, None),
    (97, 13, 29, 6, 4, 1, None),
    (200, 50, 149, 5, 1, 24, None),  # one step of pruning
    (2, 0, 0, 4, 2, 3, None),
    (150, 7, 20, 8, 8, 4, None),  # nothing to prune
    (150, 7, 20, 8, 4, 4, 29),  # unequal initial ranks
    (150, 7, 20, 8, 4, 4, 11),  # fewer than the target
]


@pytest.mark.parametrize("schedule", [*CHOICES["budget_schedule"], "grow"])
@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_budget_matches_schedule_at_every_step(case, schedule):
    names = ("total_step", "tinit", "tfinal", "init_r", "target_r")
    common = dict(zip(names, case)) | {"budget_schedule": schedule}
    config, settings = al.AdaLoraConfig(**common), oracle.Settings(**common)
    steps, (matrices, initial) = range(config.total_step + 3), case[5:]
    ours = al.budget(config, np.array(steps), matrices, initial=initial)
    theirs = [oracle.budget(settings, t, matrices, initial) for t in steps]
    np.testing.assert_array_equal(ours, theirs)


def test_forward_and_delta_weight_match_equation_3():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        trees = {
            "a": al.Adapter(
                *(jnp.asarray(rng.normal(size=n)) for n in ((3, 4), 3, (3, 5))), scale=1.7
            )
        }
        x, kernel = rng.normal(size=(7, 5)), rng.normal(size=(5, 4))
        expected = oracle.forward(toy_problem.matrices(trees)[0], x, kernel, 1.7)
        y = al.forward(trees["a"], jnp.asarray(x), jnp.asarray(kernel))
        np.testing.assert_allclose(y, expected, rtol=1e-12)
        increment = np.asarray(al.delta_weight(trees["a"]))
        np.testing.assert_allclose(x @ (kernel + increment), expected, rtol=1e-12)


@pytest.mark.parametrize("form", CHOICES["orthogonality"])
def test_oracle_gradients_match_finite_differences(form):
    """All other tests rely on the oracle."""
    settings = oracle.Settings(total_step=5, init_r=3, orthogonality=form)
    rng = np.random.default_rng(1)
    model = [
        {"p": rng.normal(size=(3, b)), "lam": rng.normal(size=3), "q": rng.normal(size=(3, a))}
        for a, b in ((5, 4), (2, 6))
    ]
    batch = [
        (rng.normal(size=(7, a)), rng.normal(size=(a, b)), rng.normal(size=(7, b)))
        for a, b in ((5, 4), (2, 6))
    ]
    _, gradients = oracle.objective(model, batch, settings)
    for matrix, gradient in zip(model, gradients):
        for name, values in matrix.items():
            for index in np.ndindex(values.shape):
                losses, centre = [], values[index]
                for move in (1e-6, -1e-6):
                    values[index] = centre + move
                    losses.append(oracle.objective(model, batch, settings)[0])
                values[index] = centre
                slope = (losses[0] - losses[1]) / 2e-6
                np.testing.assert_allclose(slope, gradient[name][index], rtol=1e-5, atol=1e-7)


def test_oracle_averages_match_hand_calculation():
    settings = oracle.Settings(total_step=9, beta1=0.5, beta2=0.75)
    one = lambda lam: [{"p": np.ones((1, 1)), "lam": np.array([lam]), "q": np.ones((1, 1))}]
    allocator = oracle.Allocator(one(0.0), settings)
    allocator.update(one(2.0), one(-4.0))
    allocator.update(one(2.0), one(1.0))
    # I = 8, then 2. Ī = 4, then 3. Ū = 0.25 · 4 = 1, then 0.75 · 1 + 0.25 · 1.
    assert allocator.sensitivity[0]["lam"] == 3.0
    assert allocator.uncertainty[0]["lam"] == 1.0
