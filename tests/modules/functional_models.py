"""Functions of a parameter pytree as users write them, without any code for adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, HEADS, HIDDEN, VOCABULARY = 8, 2, 12, 11


def draw(*shape, seed=0):
    """Draw a random array of moderate size."""
    return 0.5 * jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def norm(x):
    """Normalise the last axis."""
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)


def linear(p, x):
    """Compute ``x W + b``."""
    return x @ p["w"] + jnp.broadcast_to(p["b"], (*x.shape[:-1], p["b"].size))


def block(p, x):
    """Apply causal attention and an MLP to ``x [batch, time, width]``."""
    h = norm(x)
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p["attn"][name]) for name in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    causal = jnp.broadcast_to(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores.shape)
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9).astype(jnp.float32))
    mixed = jnp.einsum("bhts,bshk->bthk", weights.astype(v.dtype), v)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, p["attn"]["o"])
    return x + linear(p["down"], jax.nn.gelu(linear(p["up"], norm(x))))


def transformer(params, ids, unrolled=False):
    """Apply a decoder with stacked layers, under ``jax.checkpoint``, and a tied head."""
    x = params["embed"][ids] + jnp.broadcast_to(
        params["positions"][None, : ids.shape[1]], (*ids.shape, WIDTH)
    )
    step = jax.checkpoint(block)
    if unrolled:
        for layer in params["layers"]:
            x = step(layer, x)
    else:
        x, _ = jax.lax.scan(lambda x, layer: (step(layer, x), None), x, params["layers"])
    return jnp.einsum("btd,vd->btv", norm(x), params["embed"])


def transformer_params(depth=2, dtype=jnp.float32, unrolled=False):
    """Return the parameters of :func:`transformer`."""
    head = WIDTH // HEADS

    def layer(seed):
        return {
            "attn": {
                **{n: draw(WIDTH, HEADS, head, seed=seed + i) for i, n in enumerate("qkv")},
                "o": draw(HEADS, head, WIDTH, seed=seed),
            },
            "up": {"w": draw(WIDTH, HIDDEN, seed=seed), "b": jnp.zeros(HIDDEN)},
            "down": {"w": draw(HIDDEN, WIDTH, seed=seed), "b": jnp.zeros(WIDTH)},
        }

    layers = [layer(10 * i) for i in range(depth)]
    if not unrolled:
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    params = {
        "embed": draw(VOCABULARY, WIDTH),
        "positions": draw(6, WIDTH),
        "layers": layers,
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


IDS = jnp.arange(12).reshape(2, 6) * 5 % VOCABULARY
