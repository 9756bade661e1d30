"""The built-in scores against their formulas, and custom scores."""

import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as al
from adalora_jax._src.core.scores import triplet_scores
from adalora_jax._src.core.selection import keep_best

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)
LONG = al.AdaLoraConfig(total_step=1000, init_r=12, target_r=8)


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


def known(values):
    """Return adapters with known scores as λ, from ``{name: list of scores}``."""
    return {
        name: al.Adapter(
            jnp.ones((len(row), 2)), jnp.asarray(row, jnp.float32), jnp.ones((len(row), 3))
        )
        for name, row in values.items()
    }


@pytest.mark.parametrize("score", ["sensitivity_uncertainty", "sensitivity", "upper_confidence"])
def test_score_over_lam_ignores_p_and_q(score):
    """Sensitivities of λ rise with the row; those of p and q fall, and are larger."""
    config = al.AdaLoraConfig(total_step=9, init_r=4, target_r=2, score=score, tfinal=1)
    rows = jnp.arange(1.0, 5.0)
    adapters = {"a": al.Adapter(jnp.ones((4, 2)), jnp.ones(4), jnp.ones((4, 3)))}
    against = jnp.broadcast_to(100 - 10 * rows[:, None], (4, 3))
    grads = {"a": al.Adapter(p=against[:, :2], lam=rows, q=against)}

    def masks_with(score_reduction):
        state = al.init_state(adapters, config.replace(score_reduction=score_reduction))
        for step in range(9):
            state, masks = al.allocate(state, grads, step)
        return masks["a"].tolist()

    assert masks_with("lam") == [False, False, True, True]
    assert masks_with("triplet") == [True, True, False, False]


def evidence(sensitivity, uncertainty):
    """Return inputs of one adapter with these averages of λ, and zeros for p and q."""
    make = lambda lam: al.Adapter(jnp.zeros((3, 2)), jnp.asarray(lam), jnp.zeros((3, 4)))
    ones = al.Adapter(jnp.ones((3, 2)), jnp.ones(3), jnp.ones((3, 4)))
    return al.scores.ScoreInputs(ones, ones, make(sensitivity), make(uncertainty))


def test_upper_confidence_ranks_by_sum_and_differs_from_product():
    given = evidence([4.0, 2.5, 0.5], [0.5, 1.5, 3.6])
    config = LONG.replace(score="upper_confidence")
    np.testing.assert_allclose(triplet_scores(given, config), [4.5, 4.0, 4.1])
    product = triplet_scores(given, LONG)
    np.testing.assert_allclose(product, [2.0, 3.75, 1.8])
    best = lambda scores: np.flatnonzero(keep_best({"a": scores}, 2)["a"]).tolist()
    assert best(triplet_scores(given, config)) == [0, 2]
    assert best(product) == [0, 1]


def test_custom_score_decides_from_all_inputs():
    """This score is the product of the norms of p and q, independent of λ and the gradients."""
    score = lambda e: jnp.linalg.norm(e.weight.p, axis=-1) * jnp.linalg.norm(e.weight.q, axis=-1)
    config = al.AdaLoraConfig(total_step=1, init_r=4, target_r=2, score=score)
    adapters = known({"a": [9.0, 8.0, 7.0, 6.0]})
    adapters["a"] = adapters["a"]._replace(p=jnp.arange(8.0).reshape(4, 2))
    _, masks = al.allocate(al.init_state(adapters, config), adapters, 0)
    assert masks["a"].tolist() == [False, False, True, True]


def test_score_of_wrong_shape_raises():
    config = al.AdaLoraConfig(total_step=1, score=lambda e: e.weight.p, init_r=4, target_r=2)
    adapters = known({"a": [1.0] * 4})
    with pytest.raises(ValueError, match=r"returned shape \(4, 2\).*one score a triplet"):
        al.allocate(al.init_state(adapters, config), adapters, 0)
