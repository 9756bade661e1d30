"""A model with attention in linen and in NNX, and its quantised forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adalora_jax as adalora
from adalora_jax._src.quantization import quantize as quantization

WIDTH = 64


class Block(nn.Module):
    width: int = WIDTH

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(nn.LayerNorm(name="n")(x))
        h = nn.gelu(nn.Dense(2 * self.width, name="up")(x))
        return x + nn.Dense(self.width, use_bias=False, name="down")(h)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x.mean(axis=1))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(x)
        return x + self.down(nnx.gelu(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=1))


X = jax.random.normal(jax.random.key(0), (6, 4, WIDTH))
Y = jnp.array([0, 1, 2, 2, 1, 0])


def config(**changes):
    options = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 6, "lora_alpha": 16}
    return adalora.AdaLoraConfig(
        **{"total_step": 20, "target_modules": ["query", "value", "up"], **options, **changes}
    )


@functools.cache
def linen(recipe="nf4"):
    """Return a quantised model with its variables, and the float variables they come from."""
    variables = Model().init(jax.random.key(1), X)
    return *quantization.quantize(Model(), recipe, variables, X), variables


def task(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()
