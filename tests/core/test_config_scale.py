"""The scale of adapters: given, or derived from alpha and the rank."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import toy_problem

import adalora_jax as al

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)


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
    adapters = toy_problem.adapters(config, shapes=shapes)
    al.huggingface.save_pretrained(tmp_path, adapters, config)
    loaded = al.huggingface.load_pretrained(tmp_path)
    for name, adapter in adapters.items():
        ours = al.delta_weight(adapter)
        theirs = al.delta_weight(loaded.adapters[name])
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
        if limits is None:
            toy_problem.assert_same_bits(loaded.adapters[name]._replace(layout=None), adapter)


LEADERBOARD = al.AdaLoraConfig(total_step=12, init_r=64, target_r=32, lora_alpha=8)  # scale 0.125


def started(config, adapters=None, shapes=toy_problem.SHAPES):
    """Return the optimizer's initial state for adapters of the config."""
    adapters = toy_problem.adapters(config, shapes=shapes) if adapters is None else adapters
    return al.adalora(optax.adam(1e-2), config).init(adapters)


def test_small_start_warns_with_numbers_and_remedy():
    message = (
        r"`scale=0\.125`: 3 of 3 adapters start far too small, at 'layers' "
        r"13,333 times smaller.* set scale=1\.0 .*warn_small_start=False"
    )
    with pytest.warns(UserWarning, match=message):
        started(LEADERBOARD)


@pytest.mark.parametrize(
    "changes",
    [
        {"warn_small_start": False},
        {"scale": 0.25},
        {"scale": 1.0},
        {"init_r": 32},
        {"lambda_lr_scale": 2.0},
        {"init": "lambda_one"},
        {"init_lora_weights": False},
    ],
    ids=repr,
)
def test_no_warning_for_other_starts(changes):
    started(LEADERBOARD.replace(**changes))


def test_peft_defaults_do_not_warn():
    started(al.AdaLoraConfig(total_step=12))


def test_adapters_that_were_trained_do_not_warn():
    trained = {
        path: adapter._replace(lam=adapter.lam + 1)
        for path, adapter in toy_problem.adapters(LEADERBOARD).items()
    }
    started(LEADERBOARD, trained)


def test_scale_of_each_layer_decides_about_the_warning():
    config = LEADERBOARD.replace(init_r=4, target_r=2, scale=1.0)
    adapters = toy_problem.adapters(config)
    adapters["key"] = adapters["key"]._replace(scale=0.1)
    started(config, toy_problem.adapters(config))
    with pytest.warns(UserWarning, match=r"`scale=0\.1`: 1 of 3 adapters .* at 'key'"):
        started(config, adapters)


def test_nnx_optimizer_warns_of_small_start():
    layer = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    model = al.nnx.adapt(layer, LEADERBOARD.replace(target_modules=".*"), rngs=nnx.Rngs(1))
    with pytest.warns(UserWarning, match="start far too small"):
        nnx.Optimizer(model, al.adalora(optax.adam(1e-2), LEADERBOARD), wrt=nnx.LoRAParam)


def test_training_steps_do_not_repeat_the_warning():
    adapters = toy_problem.adapters(LEADERBOARD)
    tx = al.adalora(optax.adam(1e-2), LEADERBOARD)
    with pytest.warns(UserWarning, match="start far too small"):
        state = tx.init(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, adapters), state, adapters)
            adapters = optax.apply_updates(adapters, updates)


@pytest.mark.parametrize("wrap", [jax.jit, lambda init: functools.partial(jax.eval_shape, init)])
def test_traced_init_does_not_warn(wrap):
    """``restore`` and ``compact`` trace ``tx.init`` for adapters that were trained."""
    wrap(al.adalora(optax.adam(1e-2), LEADERBOARD).init)(toy_problem.adapters(LEADERBOARD))


def test_init_from_shapes_does_not_warn():
    shapes = jax.eval_shape(lambda: toy_problem.adapters(LEADERBOARD))
    jax.eval_shape(al.adalora(optax.adam(1e-2), LEADERBOARD).init, shapes)


def test_trained_adapters_of_which_one_is_pruned_do_not_warn():
    adapters = toy_problem.adapters(LEADERBOARD)
    first = next(iter(adapters))
    adapters[first] = adapters[first]._replace(lam=adapters[first].lam + 1)
    started(LEADERBOARD, adapters)


def test_resumed_run_may_turn_the_warning_off(tmp_path):
    quiet = LEADERBOARD.replace(warn_small_start=False)
    adapters = toy_problem.adapters(LEADERBOARD)
    with pytest.warns(UserWarning, match="start far too small"):
        state = started(LEADERBOARD, adapters)
    al.checkpoint.save(tmp_path / "run", adapters, state, LEADERBOARD)
    tx = al.adalora(optax.adam(1e-2), quiet)
    restored = al.checkpoint.restore(tmp_path / "run", tx, config=quiet)
    assert not restored.config.warn_small_start


def test_ratio_in_the_warning_is_that_of_the_first_adam_steps():
    """LoRA's B and AdaLoRA's λ take one Adam step on the same loss."""
    rank, sizes, rate = 16, (512, 384), 1e-3
    config = LEADERBOARD.replace(init_r=rank, target_r=8, scale=0.125)
    with pytest.warns(UserWarning, match="start far too small") as caught:
        started(config, shapes={"w": (*sizes, ())})
    (stated,) = re.findall(r"([\d,]+) times smaller", str(caught[0].message))
    slope = jax.random.normal(jax.random.key(0), sizes)

    def size_after_one_step(adapter, trained):
        def loss(adapter):
            return jnp.sum(slope * al.delta_weight(adapter))

        grads = jax.grad(loss)(adapter)
        step = lambda grad, name: -rate * jnp.sign(grad) * (name in trained)
        move = jax.tree.map(step, grads, type(grads)("p", "lam", "q", adapter.scale))
        return float(jnp.std(al.delta_weight(jax.tree.map(jnp.add, adapter, move))))

    bound = sizes[0] ** -0.5
    a = jax.random.uniform(jax.random.key(1), (rank, sizes[0]), minval=-bound, maxval=bound)
    lora = al.Adapter(jnp.zeros((rank, sizes[1])), jnp.ones(rank), a, scale=2.0)
    ours = al.init_adapter(jax.random.key(2), *sizes, config)
    ratio = size_after_one_step(lora, ("p",)) / size_after_one_step(ours, ("lam",))
    np.testing.assert_allclose(float(stated.replace(",", "")), ratio, rtol=0.15)
