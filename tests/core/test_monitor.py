"""``info`` about the allocator, compared with the paper's formulas in NumPy."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import oracle, toy_problem
from support.custom_scores import signal_to_noise

import adalora_jax as adalora
from adalora_jax import AdaLoraConfig
from adalora_jax._src.core.monitor import AllocatorInfo

CONFIG = AdaLoraConfig(total_step=24, init_r=4, target_r=2, tinit=3, tfinal=4, deltaT=3)
SCORES = [
    "sensitivity_uncertainty",
    "smoothed_sensitivity",
]
ROWS = ["down", "key", "layers[0]", "layers[1]"]  # the problem's matrices


@functools.cache
def run(config, look=adalora.info):
    """Return params, allocator, gradients, info and metrics after every step of a jitted run."""
    tx = adalora.adalora(optax.adam(1e-2), config)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(toy_problem.loss)(params, batch, config)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        info = look(state, params, grads)
        return params, state, (grads, info, info.metrics("run/", each=True))

    params, data = toy_problem.adapters(config), toy_problem.batches(config)
    state, history = tx.init(params), []
    for t in range(config.total_step):
        batch = jax.tree.map(lambda leaf, t=t: leaf[t], data)
        params, state, seen = step(params, state, batch)
        history.append(jax.device_get((params, adalora.allocator_state(state), *seen)))
    return history


def papers_scores(config, params, allocator, grads):
    """Compute every matrix's scores, triplet by triplet, by the oracle's formulas."""
    weights, gradients, *averages = (
        toy_problem.matrices(part)
        for part in (params, grads, allocator.sensitivity, allocator.uncertainty)
    )
    raw = [{k: np.abs(w[k] * g[k]) for k in w} for w, g in zip(weights, gradients)]
    return [
        np.array([oracle.triplet_score(config, *one, i) for i in range(config.init_r)])
        for one in zip(weights, raw, *averages)
    ]


@pytest.mark.parametrize(
    ("score", "score_reduction"),
    [(score, "triplet") for score in (*SCORES, "sensitivity", "magnitude", signal_to_noise)]
    + [("sensitivity_uncertainty", "lam")],
)
def test_scores_match_paper_and_metrics_summarise_them(score, score_reduction):
    config = CONFIG.replace(score=score, score_reduction=score_reduction)
    for t, (params, allocator, grads, info, metrics) in enumerate(run(config)):
        expected = papers_scores(config, params, allocator, grads)
        np.testing.assert_allclose(toy_problem.rows(info.scores), expected, rtol=1e-5)
        masks = toy_problem.rows(info.masks)
        np.testing.assert_array_equal(masks, toy_problem.rows(allocator.masks))
        assert int(info.step) == t + 1
        assert int(info.budget) == oracle.budget(config, t, toy_problem.MATRICES)
        ranks, flat = np.sum(masks, axis=1), np.concatenate(expected)
        assert int(info.active) == ranks.sum()
        wanted = {
            "budget": info.budget,
            "active": ranks.sum(),
            "rank_min": ranks.min(),
            "rank_mean": ranks.mean(),
            "rank_max": ranks.max(),
            "score_mean": flat.mean(),
            "score_max": flat.max(),
            "score_threshold": flat[np.concatenate(masks)].min(),
            "overridden": 0,
            "inactive": 0,
            "penalty": adalora.orthogonality(params, config),
            **{f"rank/{row}": rank for row, rank in zip(ROWS, ranks)},
            **{f"score/{row}": sum(scores) for row, scores in zip(ROWS, expected)},
        }
        assert set(metrics) == {f"run/{name}" for name in wanted}
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[f"run/{name}"], value, rtol=2e-5, err_msg=name)
    assert len(set(ranks)) > 1, "no rank has moved between matrices"


@pytest.mark.parametrize("score", SCORES)
def test_new_mask_keeps_best_scores(score):
    config = CONFIG.replace(score=score)
    pruned = 0
    for t, (*_, info, _) in enumerate(run(config)):
        if t in (6, 9, 12, 15, 18, 20):  # every third step after tinit, and T − tfinal
            best, margin = oracle.top(toy_problem.rows(info.scores), int(info.budget))
            assert margin > 1e-6, "a tie, which rounding decides"
            np.testing.assert_array_equal(toy_problem.rows(info.masks), best)
            pruned += not np.all(best)
    assert pruned == 6


def test_custom_score_gets_weights_and_gradients():
    config = CONFIG.replace(score=lambda e: jnp.abs(e.weight.lam) + jnp.abs(e.gradient.lam))
    for params, _, grads, info, _ in run(config):
        for path, scores in info.scores.items():
            expected = np.abs(params[path].lam) + np.abs(grads[path].lam)
            np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_highest_of_negative_scores_is_negative():
    config = CONFIG.replace(score=lambda e: -1 - jnp.abs(e.weight.lam))
    for *_, metrics in run(config):
        assert -2 < metrics["run/score_max"] <= -1


def test_metrics_omit_per_matrix_values_by_default():
    *_, (*_, info, _) = run(CONFIG)
    few, all_of_them = info.metrics(), info.metrics(each=True)
    assert set(all_of_them) - set(few) == {f"{k}/{row}" for k in ("rank", "score") for row in ROWS}
    assert all(np.shape(value) == () for value in all_of_them.values())
    assert json.loads(json.dumps({k: float(v) for k, v in few.items()}))["active"] == 8


def test_score_threshold_is_infinite_without_active_triplets():
    masks = {"query": jnp.zeros(2, bool)}
    info = AllocatorInfo(*[jnp.int32(0)] * 3, masks, {"query": jnp.ones(2)})
    assert info.metrics()["score_threshold"] == np.inf


def test_info_traces_once_and_equals_eager():
    traced = chex.assert_max_traces(adalora.info, n=1)
    params, allocator, grads, info, metrics = run(CONFIG, traced)[-1]
    eager = adalora.info(allocator, params, grads)
    chex.assert_trees_all_close((info, metrics), (eager, eager.metrics("run/", each=True)))


def test_info_survives_donation_of_state():
    tx = adalora.adalora(optax.sgd(1e-2), CONFIG)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, adalora.info(state)

    params = toy_problem.adapters(CONFIG)
    state, infos = tx.init(params), []
    infos.append(adalora.info(state))
    for _ in range(3):
        params, state, info = step(params, state)
        infos.append(info)
    assert [int(info.step) for info in infos] == [0, 1, 2, 3]
    assert [int(adalora.ranks(info)["key"]) for info in infos] == [4] * 4


def test_info_accepts_every_form_of_state():
    params = toy_problem.adapters(CONFIG)
    state = adalora.init_state(params, CONFIG)
    wrapped = optax.chain(optax.clip(1.0), adalora.adalora(optax.adam(1e-3), CONFIG)).init(params)
    infos = [adalora.info(one) for one in (state, state.allocator, wrapped)]
    for info in infos:
        chex.assert_trees_all_equal(info, infos[0])
        assert adalora.ranks(info) == adalora.ranks(state) == dict.fromkeys(ROWS, 4)
        assert adalora.summary(params, info) == adalora.summary(params, state)


def test_nnx_info_is_equal_inside_and_outside_jit():
    config = CONFIG.replace(target_modules="all-linear", score="magnitude")
    base = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    model = adalora.nnx.adapt(base, config)
    tx = adalora.adalora(optax.adam(1e-2), config)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    def look(model, optimizer):
        return adalora.info(optimizer.opt_state, nnx.state(model, nnx.LoRAParam))

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: jnp.mean((model(x) - x) ** 2)
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
        return look(model, optimizer)

    with jax.numpy_rank_promotion("allow"):
        info = step(model, optimizer, jnp.ones((2, 3)))
    chex.assert_trees_all_equal(info, look(model, optimizer))
    assert list(info.metrics(each=True))[-2:] == ["score/layers/0", "score/layers/1"]
    for path, adapter in adalora.nnx.adapters(model).items():
        np.testing.assert_array_equal(info.scores[path], np.abs(adapter.lam))


@pytest.mark.parametrize(
    ("score", "given", "message"),
    [
        ("magnitude", (), "`params=None`: .*'magnitude'.*pass params=params to info"),
        ("sensitivity", (), "pass params=params and grads=grads to info"),
        ("sensitivity", ("params",), "pass grads=grads to info"),
        (adalora.scores.ScoreInputs, ("grads",), "pass params=params to info"),
    ],
)
def test_missing_params_or_grads_error_names_them(score, given, message):
    params = toy_problem.adapters(CONFIG)
    state = adalora.init_state(params, CONFIG.replace(score=score))
    with pytest.raises(ValueError, match=message):
        adalora.info(state, **dict.fromkeys(given, params))


def test_state_without_allocator_raises():
    with pytest.raises(ValueError, match="0 AllocatorStates"):
        adalora.info(optax.adam(1e-3).init(toy_problem.adapters(CONFIG)))
