"""Runs of three adapters on random gradients."""

import jax
import jax.numpy as jnp
import optax

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(
    total_step=20, init_r=4, target_r=1, deltaT=5, lora_alpha=8, target_modules=["a", "b"]
)


def fresh(config=CONFIG):
    """Return three new adapters, ``{path: Adapter}``."""
    return {f"l{i}": adalora.init_adapter(jax.random.key(i), 6, 5, config) for i in range(3)}


def gradients(params, step, finite=True):
    """Draw random gradients, different at each step, or infinite ones."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    noise = noise if finite else [jnp.inf * leaf for leaf in noise]
    return treedef.unflatten(noise)


def run(tx, params, steps, bad=()):
    """Train for some steps; the gradients of the steps in ``bad`` are infinite."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        grads = gradients(params, step, step not in bad)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def active(params):
    """Return the number of triplets whose λ is not zero."""
    return sum(int((a.lam != 0).sum()) for a in adalora.adapters(params).values())
