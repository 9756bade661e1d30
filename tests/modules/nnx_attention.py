"""An NNX model with attention, batch norm and dropout, and a config for it."""

import jax
from flax import nnx

import adalora_jax as adalora


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, 8, rngs=rngs, decode=False)
        self.up = nnx.Linear(8, 24, rngs=rngs)
        self.down = nnx.Linear(24, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x + self.dropout(self.attn(self.norm(x)))
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=1))


X = jax.random.normal(jax.random.key(0), (6, 4, 8))


def config(**changes):
    options = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 6, "lora_alpha": 16}
    return adalora.AdaLoraConfig(
        **{"total_step": 20, "target_modules": ["query", "value", "up"], **options, **changes}
    )


def paths(model):
    return {path: type(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
