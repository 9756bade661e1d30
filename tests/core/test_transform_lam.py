"""The steps of λ: their multiplier, and the proximal step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import toy_problem
from support.toy_problem import gradients, steps

import adalora_jax as al
from adalora_jax._src.core.transform import soft_threshold

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)


@pytest.mark.parametrize(
    "inner", [optax.adam, optax.lion, optax.adafactor], ids=lambda o: o.__name__
)
@pytest.mark.parametrize("params", [None, "beside others"])
def test_lam_updates_are_inner_updates_times_multiplier(inner, params):
    config = CONFIG.replace(lambda_lr_scale=2.5, init_lora_weights=False)
    trees = toy_problem.adapters(config)
    trees = trees if params is None else {"block": trees, "head": jnp.ones((2, 3))}
    grads = gradients(trees, 0)
    inner = toy_problem.lenient(inner(0.1))
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
    params = toy_problem.adapters(CONFIG)

    def program(config):
        tx = al.adalora(optax.adam(0.1), config)
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))

    config = CONFIG.replace(lambda_lr_scale=1, allow_regrowth=True)
    assert program(config) == program(CONFIG)
    assert program(CONFIG.replace(lambda_lr_scale=2.0)) != program(CONFIG)


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
    params = toy_problem.adapters(config)
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
        assert {int((m["lam"] != 0).sum()) for m in toy_problem.matrices(params)} <= {0, 1, 2}
    config = CONFIG.replace(prox=lambda lam, weight: lam.sum())
    with pytest.raises(ValueError, match=r"prox=.*returned shape \(\).*one λ for each"):
        next(steps(config, optax.sgd(0.1)))
