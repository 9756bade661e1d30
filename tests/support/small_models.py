"""Small models with random increments, in linen and NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adalora_jax as adalora

KEY = jax.random.key(0)
# It adapts the layer `a` and trains the layer `head` as a whole.
HEAD = adalora.AdaLoraConfig(
    total_step=12, init_r=4, target_r=2, deltaT=4, target_modules=["a"], modules_to_save=["head"]
)


def draw(*shape, seed=0):
    """Draw a random array."""
    return jax.random.normal(jax.random.key(seed), shape)


def adapted_of(model, x, targets=".*", **changes):
    """Return a linen model with random increments, its variables and its adapters."""
    options = {"total_step": 8, "init_r": 3, "target_r": 1, "init_lora_weights": False}
    config = adalora.AdaLoraConfig(**options | {"target_modules": targets} | changes)
    variables = model.init(KEY, x)
    adapted = adalora.linen.adapt(model, config)
    return adapted, variables, adapted.init(jax.random.key(1), variables, x)


def agree(ours, theirs):
    """Check that two arrays are close on the scale of the larger entries of the second."""
    scale = float(jnp.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


class Tied(nn.Module):
    """A head that is the embedding: through ``attend``, by hand, or applied in a layer."""

    way: str

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6, name="embed")
        h = nn.Dense(6, name="proj")(embed(ids))
        if self.way == "attend":
            return embed.attend(h)
        if self.way == "by hand":
            return h @ embed.embedding.T
        head = nn.Dense(11, use_bias=False, name="head")
        return head.apply({"params": {"kernel": embed.embedding.T}}, h)


IDS = jnp.array([[1, 2, 3]])


class Scaled(nnx.Linear):
    """A layer whose call does not reach that of its base class."""

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...][None]


def nnx_config(targets, **changes):
    """Return a config whose adapters have random increments."""
    options = {"total_step": 8, "init_r": 3, "target_r": 1, "init_lora_weights": False}
    return adalora.AdaLoraConfig(**options | {"target_modules": targets} | changes)


def in_model(layer):
    """Return a model that is this one layer, at ``layers/0``."""
    return nnx.Sequential(layer)


def linear(cls=nnx.Linear):
    """Return a layer of the given class."""
    return cls(6, 6, rngs=nnx.Rngs(0))
