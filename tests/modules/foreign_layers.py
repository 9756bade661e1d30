"""Layers with the attributes and computations of other projects' layers, under these names."""

from __future__ import annotations

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def as_if_in(module):
    """Return a decorator that gives a class the qualified name that it has in ``module``."""

    def named(cls):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        return cls

    return named


def weight(rngs, *shape):
    return nnx.Param(jax.random.normal(rngs.params(), shape) / 3)


@as_if_in("maxtext.layers.linears")
class DenseGeneral(nnx.Module):
    """A product over any axes of the input, with a kernel ``[*in, *out]``."""

    def __init__(self, ins, outs, axis=(-1,), quant=None, dtype=jnp.float32, *, rngs):
        self.in_features_shape, self.out_features_shape = ins, outs
        self.axis, self.quant, self.dtype = axis, quant, dtype
        self.kernel = weight(rngs, *ins, *outs)
        self.bias = weight(rngs, *outs)

    def __call__(self, inputs, _initializing=False, out_sharding=None, slice_bounds=None):
        inputs = jnp.asarray(inputs, self.dtype)
        axes = tuple(a % inputs.ndim for a in self.axis)
        for axis, size in zip(axes, self.in_features_shape):
            if inputs.shape[axis] != size:
                raise ValueError(f"axis {axis} of the input has another size than {size}")
        kernel, bias = jnp.asarray(self.kernel[...], self.dtype), self.bias[...]
        if slice_bounds is not None:
            kernel, bias = (a[..., slice(*slice_bounds)] for a in (kernel, bias))
        dims = ((axes, tuple(range(len(axes)))), ((), ()))
        y = lax.dot_general(inputs, kernel, dims, precision="default", out_sharding=out_sharding)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


@as_if_in("maxtext.layers.linears")
class DeepSeekV4GroupedLinear(nnx.Module):
    """One product for each of several groups of features."""

    def __init__(self, groups, ins, outs, *, rngs):
        self.kernel = weight(rngs, groups, ins, outs)

    def __call__(self, inputs):
        return jnp.einsum("...gi,gio->...go", inputs, self.kernel[...])


@as_if_in("maxtext.layers.linears")
class MlpBlock(nnx.Module):
    """A gated feed-forward block, whose two input projections may be one layer."""

    def __init__(self, ins, hidden, fused, *, rngs):
        self.fused = fused
        if fused:
            self.wi = DenseGeneral((ins,), (2, hidden), rngs=rngs)
        else:
            self.wi_0 = DenseGeneral((ins,), (hidden,), rngs=rngs)
            self.wi_1 = DenseGeneral((ins,), (hidden,), rngs=rngs)
        self.wo = DenseGeneral((hidden,), (ins,), rngs=rngs)

    def __call__(self, x):
        if self.fused:
            both = self.wi(x, out_sharding=None)
            gate, up = both[..., 0, :], both[..., 1, :]
        else:
            gate, up = self.wi_0(x), self.wi_1(x)
        return self.wo(nn.silu(gate) * up)


@as_if_in("easydel.layers.linears._linear")
class ParallelLinear(nnx.Module):
    """``y = x W + b``, in which a call may replace W, and the product may be scaled."""

    def __init__(self, in_features, out_features, *, scale=1.0, use_bias=True, rngs):
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self._scale = (lambda y: y) if scale == 1.0 else (lambda y: y * scale)
        self.kernel = weight(rngs, in_features, out_features)
        self.bias = weight(rngs, out_features) if use_bias else None

    def __call__(self, inputs, w=None):
        kernel = self.kernel[...] if w is None else w
        equation = "...ik,...kj->...ij" if inputs.ndim > 1 else "...k,...kj->...j"
        y = self._scale(jnp.einsum(equation, inputs, kernel, optimize=True))
        if self.bias is None:
            return y
        return y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


@as_if_in("easydel.layers.linears._linear")
class ColumnParallelLinear(ParallelLinear):
    """The subclass that models use."""


@as_if_in("bonsai.models.llada.modeling")
class ShardedLinear(nnx.Module):
    """A linear layer whose calls require a sharding, and whose bias may not be a parameter."""

    def __init__(self, in_dim, out_dim, *, use_bias=True, rngs):
        self.kernel = weight(rngs, in_dim, out_dim)
        self.bias = weight(rngs, out_dim) if use_bias else nnx.data(jnp.zeros(out_dim))

    def __call__(self, x, *, out_sharding):
        y = jnp.matmul(x, self.kernel[...], out_sharding=out_sharding)
        return y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


@as_if_in("transformers.models.gpt2.modeling_flax_gpt2")
class FlaxConv1D(nn.Module):
    """A linear layer with a kernel ``[out, in]``."""

    features: int
    use_bias: bool = True
    dtype: object = jnp.float32
    precision: object = None

    @nn.compact
    def __call__(self, inputs):
        inputs = jnp.asarray(inputs, self.dtype)
        shape = (self.features, inputs.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(0.3), shape)
        kernel = jnp.asarray(kernel.transpose(), self.dtype)
        dims = (((inputs.ndim - 1,), (0,)), ((), ()))
        y = lax.dot_general(inputs, kernel, dims, precision=self.precision)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.normal(), (self.features,))
            y = y + jnp.asarray(bias, self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


@as_if_in("openpi.models.lora")
class FeedForward(nn.Module):
    """Two products in one module, with an activation between them."""

    features: int
    hidden_dim: int
    lora_config: object = None

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal()
        gating = self.param("gating_einsum", init, (2, self.features, self.hidden_dim))
        linear = self.param("linear", init, (self.hidden_dim, self.features))
        return jnp.dot(nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1]), linear)


QUANT = SimpleNamespace(name="int8")
