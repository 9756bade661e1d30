"""The side of adalora_jax: a dict of adapters, allocation inside ``tx.update``, and no torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adalora_jax as adalora
from parity.cases import MODELS, Case, Inputs, Snapshot, inputs


def from_arrays(adapters, dtype=jnp.float32) -> dict[str, adalora.Adapter]:
    """Convert ``{layer: (p, lam, q)}`` of NumPy arrays to adapters."""
    return {
        name: adalora.Adapter(*(jnp.asarray(leaf, dtype) for leaf in leaves))
        for name, leaves in adapters.items()
    }


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def to_arrays(tree) -> dict[str, tuple[np.ndarray, ...]]:
    return {name: tuple(np.array(leaf) for leaf in leaves) for name, leaves in tree.items()}


def by_name(by_path):
    return {path.removeprefix("adapters/"): value for path, value in by_path.items()}


def peft_scale(config: adalora.AdaLoraConfig) -> float:
    """Return PEFT's scale: a guard against rank 0 makes it 1e-6 smaller than ``config.scaling``."""
    alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
    return alpha / (config.init_r + 1e-5)


def transform(case: Case, config: adalora.AdaLoraConfig) -> optax.GradientTransformationExtraArgs:
    if case.optimizer == "adamw":
        inner = optax.adamw(case.learning_rate, weight_decay=0.01)
    else:
        inner = optax.sgd(case.learning_rate, momentum=0.9)
    if case.overflow is not None:  # as under loss scaling
        inner = optax.apply_if_finite(inner, max_consecutive_errors=5)
    tx = adalora.adalora(inner, config)
    return tx if case.clip is None else optax.chain(optax.clip_by_global_norm(case.clip), tx)


def task_loss(case: Case, base, params, x, y, scale):
    """Compute the loss without the orthogonality term, as in evaluation."""
    model = MODELS[case.model]
    layers = base | {"head": params["head"]} if params["head"] else base

    def linear(name, x):
        layer, adapter = layers[name], params["adapters"].get(name)
        if adapter is None:
            y = x @ layer["kernel"]
            return y + jnp.broadcast_to(layer["bias"], y.shape)
        adapter = adapter._replace(scale=scale)
        return adalora.forward(adapter, x, layer["kernel"], layer["bias"])

    return model.loss(jnp, model.forward(linear, jnp, x), y)


def start(
    case: Case, config: adalora.AdaLoraConfig, adapters, weights, *, scale: float, dtype=jnp.float32
):
    """Return parameters, optimizer state, ``step(params, opt, x, y, overflow) → (…, …, loss)``."""
    base = cast(weights, dtype)
    head = base["head"] if case.trained_head else {}
    params = {"adapters": from_arrays(adapters, dtype), "head": head}
    tx = transform(case, config)
    # In float64 the algorithm is tested, and optimising compilation takes longer than the run.
    quick = {"xla_backend_optimization_level": 0} if dtype == jnp.float64 else None

    @functools.partial(jax.jit, compiler_options=quick)
    def step(params, opt, x, y, overflow):
        def loss(params):
            penalty = adalora.orthogonality(params["adapters"], config)
            return task_loss(case, base, params, x, y, scale) + penalty

        value, grads = jax.value_and_grad(loss)(params)
        grads = jax.tree.map(lambda leaf: jnp.where(overflow, jnp.inf, leaf), grads)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return params, tx.init(params), step


def train(
    case: Case,
    config: adalora.AdaLoraConfig,
    adapters,
    given: Inputs | None = None,
    *,
    scale: float,
    dtype=jnp.float32,
) -> Iterator[Snapshot]:
    """Train from the given initial adapters; yield a snapshot after each step."""
    given = given or inputs(case)
    params, opt, step = start(case, config, adapters, given.weights, scale=scale, dtype=dtype)
    for i, (x, y) in enumerate(zip(given.x, given.y)):
        x, y = cast((x, y), dtype)
        params, opt, loss = step(params, opt, x, y, i == case.overflow)
        state = adalora.allocator_state(opt)
        yield Snapshot(
            loss=float(loss),
            budget=int(state.budget),
            masks={name: np.array(mask) for name, mask in by_name(state.masks).items()},
            adapters=to_arrays(params["adapters"]),
            sensitivity=to_arrays(by_name(state.sensitivity)),
            uncertainty=to_arrays(by_name(state.uncertainty)),
            head={name: np.array(leaf) for name, leaf in params["head"].items()},
        )
