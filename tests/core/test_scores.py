"""The built-in scores against their formulas, and custom scores."""

import jax.numpy as jnp
import pytest

import adalora_jax as al


def known(values):
    """Return adapters with known scores as λ, from ``{name: list of scores}``."""
    return {
        name: al.Adapter(
            jnp.ones((len(row), 2)), jnp.asarray(row, jnp.float32), jnp.ones((len(row), 3))
        )
        for name, row in values.items()
    }


@pytest.mark.parametrize(
    "score", ["sensitivity_uncertainty", "sensitivity", "smoothed_sensitivity"]
)
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
    with pytest.raises(ValueError, match=r"returned shape \(4, 2\).*one score per triplet"):
        al.allocate(al.init_state(adapters, config), adapters, 0)
