"""Model and train step of the demo in ``flax.linen``, as pure functions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import adalora_jax as adalora
from adalora_jax.demo.methods import Method, Progress, cross_entropy, patches


class Block(nn.Module):
    """Layer of a Vision Transformer: attention, then a multi-layer perceptron."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        y = nn.LayerNorm(name="attention_norm")(x)
        q, k, v = (split(nn.Dense(width, name=name)(y)) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.Dense(width, name="out")(y)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(width, name="up")(y))
        return x + nn.Dense(width, name="down")(y)


class VisionTransformer(nn.Module):
    """Classifier that maps images, as 16 patches of 2 × 2 pixels, to one logit per digit."""

    width: int = 64
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = nn.Dense(self.width, name="embed")(patches(pixels))
        x = x + self.param("position", nn.initializers.normal(1.0), (1, *x.shape[1:]))
        for i in range(self.depth):
            x = Block(self.heads, name=f"blocks_{i}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(10, name="head")(x.mean(axis=1))


def create(seed: int) -> PyTree:
    """Return the variables of a new model."""
    return VisionTransformer().init(jax.random.key(seed), jnp.zeros((1, 8, 8)))


class Learner:
    """Training run of one method: its parameters, optimizer state and train step."""

    def __init__(self, base: PyTree, method: Method, seed: int) -> None:
        model = VisionTransformer()
        if method.config is None:
            # Full fine-tuning: nothing is frozen.
            self.frozen, self.trainable = None, base

            def apply(_: None, variables: PyTree, pixels: jax.Array) -> PyTree:
                return model.apply(variables, pixels)
        else:
            # Gradients are computed with respect to a small separate tree, which contains the
            # adapters and the parameters of modules_to_save, and not with respect to the base.
            adapted: Any = adalora.linen.adapt(model, method.config)
            self.frozen = base
            self.trainable = adapted.init(jax.random.key(seed), base, jnp.zeros((1, 8, 8)))
            apply = adapted.apply
        self.opt_state = method.optimizer.init(self.trainable)
        self._method = method

        def step(
            frozen: PyTree,
            trainable: PyTree,
            opt_state: optax.OptState,
            pixels: jax.Array,
            digits: jax.Array,
        ) -> tuple[PyTree, optax.OptState, Progress]:
            def objective(trainable: PyTree) -> tuple[jax.Array, jax.Array]:
                loss = cross_entropy(apply(frozen, trainable, pixels), digits)
                return loss + method.penalty(trainable), loss

            grads, loss = jax.grad(objective, has_aux=True)(trainable)
            updates, opt_state = method.optimizer.update(grads, opt_state, trainable)
            trainable = optax.apply_updates(trainable, updates)
            return trainable, opt_state, method.progress(loss, opt_state)

        self._step = jax.jit(step)
        self._logits = jax.jit(apply)

    @property
    def base(self) -> PyTree:
        """Fully fine-tuned variables, the base of the other methods."""
        return self.trainable

    def step(self, pixels: np.ndarray, digits: np.ndarray) -> Progress:
        """Run one optimizer step on one batch."""
        self.trainable, self.opt_state, progress = self._step(
            self.frozen, self.trainable, self.opt_state, pixels, digits
        )
        return progress

    def finish(self) -> None:
        """Make the final mask if it is still missing, and apply the masks for evaluation."""
        if self._method.adaptive:
            self.trainable, self.opt_state = adalora.finish(self.opt_state, self.trainable)

    def logits(self, pixels: np.ndarray) -> jax.Array:
        """Return the logits of images: ``[n, 10]``, one row per image."""
        return self._logits(self.frozen, self.trainable, pixels)
