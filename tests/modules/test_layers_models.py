"""Whole, unmodified models: equal to the base at init, pruned by training, traced once."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import linen_models, nnx_models

import adalora_jax as adalora

pytestmark = [
    pytest.mark.usefixtures("flax_ranks"),
    pytest.mark.filterwarnings("ignore:Using 'Module.sow"),
]
IDS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) * 3 % 11
IMAGES = jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
TOKENS = jnp.sin(jnp.arange(20.0)).reshape(4, 5)
CONFIG = adalora.AdaLoraConfig(
    total_step=4, init_r=3, target_r=1, target_modules=".*", lora_dropout=0.1
)
# Model, input, training flag of the call, and the collections that it mutates.
LINEN = {
    "gpt": (linen_models.Gpt(), IDS, {"deterministic": False}, []),
    "bert": (linen_models.Bert(), IDS, {"train": True}, ["intermediates"]),
    "llama": (linen_models.Llama(), IDS, {}, []),
    "vit": (linen_models.Vit(), IMAGES, {"train": True}, []),
    "unet": (linen_models.Unet(), IMAGES, {"train": True}, ["batch_stats"]),
    "moe": (linen_models.Moe(), TOKENS, {}, ["losses"]),
    "tagger": (linen_models.Tagger(), IDS, {}, []),
}
NNX = {
    "gpt": (nnx_models.Gpt, IDS),
    "bert": (nnx_models.Bert, IDS),
    "llama": (nnx_models.Llama, IDS),
    "vit": (nnx_models.Vit, IMAGES),
    "resnet": (nnx_models.ResNet, IMAGES),
    "moe": (nnx_models.Moe, TOKENS),
    "tagger": (nnx_models.Tagger, IDS),
}


def random_like(tree):
    """Draw positive values, as a variance must be, scaled by the leaf's size."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.uniform(0, 1, leaf.shape) / max(1, leaf.size) ** 0.5
    return jax.tree.map(lambda leaf: draw(leaf).astype(leaf.dtype), tree)


def some_slow(names, quick):
    """Return every name as a parameter, marked slow if it is not in ``quick``."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in names]


def check_ranks(state):
    ranks = adalora.ranks(state)
    assert sum(ranks.values()) == CONFIG.target_r * len(ranks)
    assert int(state.budget) == sum(ranks.values())


@pytest.mark.parametrize("name", some_slow(LINEN, quick=("gpt", "resnet")))
def test_linen_model_starts_as_base_meets_budget_and_traces_once(name):
    model, x, training, collections = LINEN[name]
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = {k: random_like(v) for k, v in variables.items() if k in ("params", "batch_stats")}
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, x)
    expected = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(
        jax.jit(adapted.apply)(variables, adapters, x), expected, rtol=1e-5, atol=1e-6
    )
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    rest = {k: v for k, v in variables.items() if k != "params"}

    traces = []

    @jax.jit
    def step(adapters, opt, rest, key):
        traces.append(1)

        def loss(adapters):
            y, out = adapted.apply(
                *({"params": variables["params"], **rest}, adapters, x),
                **training,
                rngs={"dropout": key},
                mutable=collections,
            )
            return jnp.mean((y - 1) ** 2), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, opt = tx.update(grads, opt, adapters)
        return optax.apply_updates(adapters, updates), opt, out, value

    opt = tx.init(adapters)
    for key in jax.random.split(jax.random.key(2), CONFIG.total_step):
        adapters, opt, out, value = step(adapters, opt, rest, key)
        assert set(out) == set(collections)
        assert jnp.isfinite(value)
        if rest:
            chex.assert_trees_all_equal_shapes(out["batch_stats"], rest["batch_stats"])
            rest = {"batch_stats": out["batch_stats"]}
    assert len(traces) == 1
    check_ranks(adalora.allocator_state(opt))


@pytest.mark.parametrize("name", some_slow(NNX, quick=("llama",)))
def test_nnx_model_starts_as_base_meets_budget_and_traces_once(name):
    make, x = NNX[name]
    model = nnx.jit(lambda: make(nnx.Rngs(0)))()
    adapted = adalora.nnx.adapt(model, CONFIG)
    model.eval()
    adapted.eval()
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(adapted, x), run(model, x), rtol=1e-5, atol=1e-6)
    nnx.pop(adapted, nnx.Intermediate)
    adapted.train()
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    optimizer = nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss = lambda model: jnp.mean((model(x) - 1) ** 2)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    for _ in range(CONFIG.total_step):
        assert jnp.isfinite(step(adapted, optimizer))
        nnx.pop(adapted, nnx.Intermediate)
    assert len(traces) == 1
    check_ranks(adalora.allocator_state(optimizer.opt_state))
