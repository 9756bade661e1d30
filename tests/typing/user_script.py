"""A user's script: adapt, train, evaluate and merge a linen and an NNX model.

Type checkers read it as a user's code, pyright strictly; ``tests/test_typing.py`` runs it.
"""

# Flax and optax leave parts of their signatures untyped.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]
from flax import nnx

import adalora_jax as adalora


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="query")(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.query(x)


def size(inputs: adalora.scores.ScoreInputs) -> jax.Array:
    return jnp.abs(inputs.weight.lam)


config = adalora.AdaLoraConfig(
    total_step=4,
    init_r=3,
    target_r=2,
    target_modules=["query"],
    rank_overrides={"query": adalora.RankSpec(init_r=3)},
    score=size,
)
x = jnp.ones((2, 4))


def linen_run() -> float:
    model = Model()
    variables = model.init(jax.random.key(0), x)
    adapted = adalora.linen.adapt(model, config)
    adapters: dict[str, Any] = adapted.init(jax.random.key(1), variables, x)
    tx = adalora.adalora(optax.adam(1e-2), config)
    opt_state = tx.init(adapters)

    def loss(adapters: dict[str, Any]) -> jax.Array:
        output: jax.Array = adapted.apply(variables, adapters, x)
        return jnp.mean(output**2) + adalora.orthogonality(adapters, config)

    for _ in range(config.total_step):
        updates, opt_state = tx.update(jax.grad(loss)(adapters), opt_state, adapters)
        adapters = optax.apply_updates(adapters, updates)  # type: ignore[assignment]
    final: dict[str, Any] = adalora.eval_params(opt_state, adapters)
    ranks: dict[str, int] = adalora.ranks(opt_state)
    assert sum(ranks.values()) == 2
    merged: dict[str, Any] = adalora.merge(variables, final)
    expected: jax.Array = adapted.apply(variables, final, x)
    return float(jnp.abs(jnp.asarray(model.apply(merged, x)) - expected).max())


def nnx_run() -> float:
    model: NnxModel = adalora.nnx.adapt(NnxModel(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    tx = adalora.adalora(optax.adam(1e-2), config)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    def loss(model: NnxModel) -> jax.Array:
        return jnp.mean(model(x) ** 2)

    for _ in range(config.total_step):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
    final: NnxModel = adalora.nnx.eval_model(model, optimizer)
    merged: NnxModel = adalora.merge(final)
    return float(jnp.abs(merged(x) - final(x)).max())
