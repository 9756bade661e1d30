"""Linen models in which one scope has the weights of two layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(
    total_step=4, init_r=3, target_r=1, target_modules="all-linear", init_lora_weights=False
)
X = jax.random.normal(jax.random.key(0), (2, 5, 6))


class Einsum(nn.Module):
    """An einsum with the weight's name as a field and the equation as a call argument."""

    shape: tuple[int, ...]
    weight: str | None = "w"

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(
            equation, x, self.param(self.weight, nn.initializers.normal(), self.shape)
        )


class OfShape(nn.Module):
    """The same, but the weight's name depends on its shape alone."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        name = "wide" if len(self.shape) == 3 else "narrow"
        return jnp.einsum(equation, x, self.param(name, nn.initializers.normal(), self.shape))


class Mlp(nn.Module):
    """Two layers whose weights are both in this module's scope."""

    by_name: bool = True

    @nn.compact
    def __call__(self, x):
        kinds = [functools.partial(Einsum, weight=w) for w in ("wide", "narrow")]
        kinds = kinds if self.by_name else [OfShape] * 2
        wide, narrow = kinds[0]((2, 7, 6)), kinds[1]((7, 6))
        nn.share_scope(self, wide)
        h = wide("...d,gfd->...gf", x)
        nn.share_scope(self, narrow)
        return x + narrow("...f,fd->...d", nn.gelu(h[..., 0, :]) * h[..., 1, :])


class Shared(nn.Module):
    by_name: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="out")(Mlp(self.by_name, name="mlp")(x))
