"""Other projects' mixtures of experts, adapted as functions of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

import adalora_jax as adalora
from adalora_jax import functional


def train_and_check(
    fn: Callable[..., jax.Array],
    params: Any,
    config: adalora.AdaLoraConfig,
    inputs: list[Any],
    loss: Callable[[jax.Array, Any], jax.Array],
    count: int,
    layers: Mapping[str, adalora.Layout] | None = None,
) -> None:
    """Train adapters of all experts for a step per input, and check them and the base.

    Args:
      fn: ``(params, x) -> output``: the model.
      params: its parameters.
      config: it selects the weights of experts alone.
      inputs: the inputs of the steps.
      loss: of an output and the input.
      count: number of experts.
      layers: declared layouts.
    """
    before = [np.array(leaf) for leaf in jax.tree.leaves(params)]
    adapted, x = functional.adapt(fn, params, config, inputs[0], layers=layers), inputs[0]
    adapters = adapted.init(jax.random.key(1), params)
    assert {adapter.lam.shape for adapter in adapters.values()} == {(count, config.init_r)}
    close(adapted.apply(params, adapters, x), fn(params, x))
    tx = adalora.adalora(optax.adamw(1e-2), config)
    state = tx.init(adapters)

    @jax.jit
    def step(params, adapters, state, x):
        def loss_of(adapters):
            return loss(adapted.apply(params, adapters, x), x)

        value, grads = jax.value_and_grad(loss_of)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for each in inputs:
        adapters, state, value = step(params, adapters, state, each)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    ranks = adalora.ranks(state)  # {"mlp/gate_proj[0]": 3, ...}, an entry per expert
    assert set(ranks) == {f"{path}[{expert}]" for path in adapters for expert in range(count)}
    assert sum(ranks.values()) == config.target_r * len(ranks)
    assert len(set(ranks.values())) > 1
    final = adalora.eval_params(state, adapters)
    for path, adapter in final.items():
        kept = (np.asarray(adapter.lam) != 0).sum(-1).tolist()
        assert kept == [ranks[f"{path}[{expert}]"] for expert in range(count)]
    y = adapted.apply(params, final, x)
    assert not np.allclose(y, fn(params, x), rtol=1e-3, atol=1e-3)
    close(fn(functional.merge(params, final), x), y)
    for one, other in zip(jax.tree.leaves(params), before, strict=True):
        np.testing.assert_array_equal(one, other)


def close(ours: jax.Array, theirs: jax.Array) -> None:
    """Check that two arrays are close on the scale of the larger entries of the second."""
    scale = float(np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * max(scale, 1))
