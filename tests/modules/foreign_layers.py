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


def _route(scores, count):
    """Return the weights and numbers of each row's best experts, and the rows by expert."""
    weights, chosen = lax.top_k(jax.nn.softmax(scores), count)
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=scores.shape[-1])
    return weights / weights.sum(-1, keepdims=True), chosen, order, sizes


def _collect(y, weights, order):
    """Return the weighted sum of each row's experts, from the rows by expert."""
    y = y[jnp.argsort(order)].reshape(*weights.shape, -1)
    return jnp.einsum("nkd,nk->nd", y, weights)


@as_if_in("tunix.models.qwen3.model")
class MoELayer(nnx.Module):
    """A mixture of experts that loops over slices of its weights, as on a CPU."""

    def __init__(self, width, hidden, experts, *, rngs):
        self.num_experts, self.experts_per_tok = experts, 2
        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.gate_proj = weight(rngs, experts, width, hidden)
        self.up_proj = weight(rngs, experts, width, hidden)
        self.down_proj = weight(rngs, experts, hidden, width)

    def __call__(self, x):
        weights, chosen, _, _ = _route(self.router(x), self.experts_per_tok)
        share = (jax.nn.one_hot(chosen, self.num_experts) * weights[..., None]).sum(-2)
        y = jnp.zeros_like(x)
        for i in range(self.num_experts):
            hidden = nnx.silu(x @ self.gate_proj[...][i]) * (x @ self.up_proj[...][i])
            y = y + hidden @ self.down_proj[...][i] * share[..., i : i + 1]
        return y


@as_if_in("tunix.models.gemma4.moe")
class MoERagged(nnx.Module):
    """A mixture of experts that computes ``ragged_dot`` with gate and input in one weight."""

    def __init__(self, width, hidden, experts, *, rngs):
        self.router_logits = weight(rngs, width, experts)
        self.gating_einsum = weight(rngs, experts, 2, hidden, width)
        self.linear = weight(rngs, experts, hidden, width)

    def __call__(self, x):
        weights, _, order, sizes = _route(x @ self.router_logits[...], 2)
        rows = jnp.repeat(x, 2, axis=0)[order]
        experts, _, hidden, width = self.gating_einsum.shape
        both = self.gating_einsum[...].transpose(0, 3, 1, 2).reshape(experts, width, 2 * hidden)
        both = lax.ragged_dot(rows, both, sizes).reshape(-1, 2, hidden)
        y = lax.ragged_dot(nnx.gelu(both[:, 0]) * both[:, 1], self.linear[...], sizes)
        return _collect(y, weights, order)


@as_if_in("maxtext.layers.moe")
class RoutedMoE(nnx.Module):
    """A mixture of experts that computes einsums, or ``ragged_dot`` under ``shard_map``."""

    def __init__(self, width, hidden, experts, sparse, *, rngs):
        self.sparse, self.num_experts = sparse, experts
        self.gate = DenseGeneral((width,), (experts,), rngs=rngs)
        self.wi_0 = weight(rngs, experts, width, hidden)
        self.wi_1 = weight(rngs, experts, width, hidden)
        self.wo = weight(rngs, experts, hidden, width)

    def __call__(self, x):
        weights, chosen, order, sizes = _route(self.gate(x), 2)
        kernels = (self.wi_0[...], self.wi_1[...], self.wo[...])
        if not self.sparse:
            share = (jax.nn.one_hot(chosen, self.num_experts) * weights[..., None]).sum(-2)
            up, gate = (jnp.einsum("nd,edh->neh", x, kernel) for kernel in kernels[:2])
            y = jnp.einsum("neh,ehd->ned", nnx.silu(up) * gate, kernels[2])
            return jnp.einsum("ned,ne->nd", y, share)

        def experts(rows, sizes, wi_0, wi_1, wo):
            hidden = lax.ragged_dot(rows, wi_0, sizes) * nnx.silu(lax.ragged_dot(rows, wi_1, sizes))
            return lax.ragged_dot(hidden, wo, sizes)

        whole = jax.P()
        run = jax.shard_map(
            experts, mesh=jax.make_mesh((1,), ("all",)), in_specs=whole, out_specs=whole
        )
        return _collect(run(jnp.repeat(x, 2, axis=0)[order], sizes, *kernels), weights, order)


QUANT = SimpleNamespace(name="int8")
