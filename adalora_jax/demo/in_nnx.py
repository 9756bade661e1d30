"""Model and train step of the demo in ``flax.nnx``, with updates in place."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx

import adalora_jax as adalora
from adalora_jax.demo.methods import Method, Progress, cross_entropy, patches


class Block(nnx.Module):
    """Layer of a Vision Transformer: attention, then a multi-layer perceptron."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, width, rngs=rngs)
        self.down = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, y.shape[-1] // self.heads)

        y = self.attention_norm(x)
        q, k, v = (split(layer(y)) for layer in (self.query, self.key, self.value))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class VisionTransformer(nnx.Module):
    """Classifier that maps images, as 16 patches of 2 × 2 pixels, to one logit per digit."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.position = nnx.Param(rngs.params.normal((1, 16, width)))
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.embed(patches(pixels)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def create(seed: int) -> VisionTransformer:
    """Return a new model."""
    return VisionTransformer(nnx.Rngs(seed))


class Learner:
    """Training run of one method: its model, optimizer and train step."""

    def __init__(self, base: VisionTransformer, method: Method, seed: int) -> None:
        if method.config is None:
            # Full fine-tuning: every parameter is trained.
            self.model, self.wrt = nnx.clone(base), nnx.Param
        else:
            # adapt returns a copy of base. The adapters and the parameters of modules_to_save are
            # LoRAParams, so this filter freezes all other parameters.
            self.model = adalora.nnx.adapt(base, method.config, rngs=nnx.Rngs(seed))
            self.wrt = nnx.LoRAParam
        self.optimizer = nnx.Optimizer(self.model, method.optimizer, wrt=self.wrt)
        self._method = method

        def step(
            model: VisionTransformer, optimizer: nnx.Optimizer, pixels: jax.Array, digits: jax.Array
        ) -> Progress:
            def objective(model: VisionTransformer) -> tuple[jax.Array, jax.Array]:
                loss = cross_entropy(model(pixels), digits)
                return loss + method.penalty(nnx.state(model, self.wrt)), loss

            trained = nnx.DiffState(0, self.wrt)
            grads, loss = nnx.grad(objective, argnums=trained, has_aux=True)(model)
            optimizer.update(model, grads)
            return method.progress(loss, optimizer.opt_state)

        self._step: Callable[..., Progress] = nnx.jit(step)
        self._logits = nnx.jit(lambda model, pixels: model(pixels))

    @property
    def base(self) -> VisionTransformer:
        """Fully fine-tuned model, the base of the other methods."""
        return self.model

    @property
    def trainable(self) -> nnx.State:
        """State that the optimizer updates."""
        return nnx.state(self.model, self.wrt)

    @property
    def opt_state(self) -> optax.OptState:
        """State of the optimizer."""
        return self.optimizer.opt_state

    def step(self, pixels: np.ndarray, digits: np.ndarray) -> Progress:
        """Run one optimizer step on one batch."""
        return self._step(self.model, self.optimizer, pixels, digits)

    def finish(self) -> None:
        """Make the final mask if it is still missing, and apply the masks for evaluation."""
        if self._method.adaptive:
            self.model, self.optimizer = adalora.finish(self.optimizer, self.model)

    def logits(self, pixels: np.ndarray) -> jax.Array:
        """Return the logits of images: ``[n, 10]``, one row per image."""
        return self._logits(self.model, pixels)
