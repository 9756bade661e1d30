"""Layers in the styles of several packages, which nobody declares: of one product, and others."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from modules.foreign_layers import weight


class TorchLinear(nnx.Module):
    """``y = x Wᵀ + b``, with the attributes of a PyTorch layer."""

    def __init__(self, ins, outs, *, rngs):
        self.in_features, self.out_features = ins, outs
        self.weight, self.bias = weight(rngs, outs, ins), weight(rngs, outs)

    def __call__(self, x):
        return self.after(
            x @ self.before(self.weight[...]).T + self.bias[...][(None,) * (x.ndim - 1)]
        )

    def before(self, w):
        return w

    def after(self, y):
        return y


class Kernel(nnx.Module):
    """``y = x W``, with a flag, and an input that the caller may name."""

    def __init__(self, dim_in, dim_out, *, rngs):
        self.dim_in, self.dim_out = dim_in, dim_out
        self.kernel = weight(rngs, dim_in, dim_out)

    def __call__(self, x, train=False, factor=1.0):
        y = lax.dot_general(x, self.kernel[...], (((x.ndim - 1,), (0,)), ((), ())))
        return y if factor == 1.0 else factor * y


class Heads(nnx.Module):
    """A projection to heads, with a bias of as many axes as the output."""

    def __init__(self, embed_dim, num_heads, head_dim, *, rngs):
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.w, self.b = (
            weight(rngs, embed_dim, num_heads, head_dim),
            weight(rngs, num_heads, head_dim),
        )

    def __call__(self, x):
        y = jnp.tensordot(x, self.w[...], 1)
        return y + self.b[...].reshape((1,) * (x.ndim - 1) + self.b.shape)


class OutOfHeads(nnx.Module):
    """A projection from heads, with tuples as attributes."""

    def __init__(self, ins, out, *, rngs):
        self.in_features_shape, self.out_features_shape = ins, (out,)
        self.w = weight(rngs, *ins, out)

    def __call__(self, x):
        return jnp.einsum("...nh,nhd->...d", x, self.w[...])


class TransposedHeads(nnx.Module):
    """A projection to heads with the input's axis last, whose output has one attribute."""

    def __init__(self, width, heads, size, *, rngs):
        self.input_size, self.output_size = width, heads * size
        self.w = weight(rngs, heads, size, width)

    def __call__(self, x):
        return jnp.einsum("...d,nhd->...nh", x, self.w[...])


class Residual(Kernel):
    """A product plus a function of the input."""

    def __call__(self, x):
        return x + (x @ self.kernel[...].astype(x.dtype))


class Scaled(TorchLinear):
    scale = 0.5

    def after(self, y):
        return y * self.scale


class Active(TorchLinear):
    def after(self, y):
        return jax.nn.gelu(y)


class Normalised(TorchLinear):
    def before(self, w):
        return w / jnp.linalg.norm(w, axis=1, keepdims=True)


class Quantised(TorchLinear):
    def before(self, w):
        return jnp.round(w * 127) / 127


class Halves(TorchLinear):
    """A gated unit whose two halves are one weight."""

    def after(self, y):
        up, gate = jnp.split(y, 2, axis=-1)
        return up * jax.nn.sigmoid(gate)


class Gated(nnx.Module):
    """Two weights of one shape, of which one is the gate's."""

    def __init__(self, ins, outs, *, rngs):
        self.in_features, self.out_features = ins, outs
        self.up, self.gate = weight(rngs, ins, outs), weight(rngs, ins, outs)

    def __call__(self, x):
        return (x @ self.up[...]) * jax.nn.sigmoid(x @ self.gate[...])


class Sum(nnx.Module):
    """Two weights of different numbers of axes, whose products are added."""

    def __init__(self, width, heads, size, *, rngs):
        self.in_dim, self.heads, self.size = width, heads, size
        self.w, self.v = weight(rngs, width, heads, size), weight(rngs, width, size)

    def __call__(self, x):
        return jnp.tensordot(x, self.w[...], 1) + (x @ self.v[...])[..., None, :]


class Table(nnx.Module):
    """A look-up of rows, which is also the output layer."""

    def __init__(self, rows, width, *, rngs):
        self.num_embeddings, self.features = rows, width
        self.embedding = weight(rngs, rows, width)

    def __call__(self, ids):
        return self.embedding[...][ids]


class Tied(Table):
    """An output layer whose weight another method looks up."""

    def __call__(self, x):
        return x @ self.embedding[...].T

    def encode(self, ids):
        return self.embedding[...][ids]


class EitherWay(Kernel):
    """A product with the weight or with its transpose, as the input's size demands."""

    def __init__(self, dim_in, dim_out, *, rngs):
        super().__init__(dim_in, dim_out, rngs=rngs)
        self.sizes = (dim_in, dim_out)
        del self.dim_in, self.dim_out

    def __call__(self, x):
        w = self.kernel[...]
        return x @ (w if x.shape[-1] == w.shape[0] else w.T)


class WithDropout(Kernel):
    """A product with dropout, which is off until training."""

    def __init__(self, dim_in, dim_out, *, rngs):
        super().__init__(dim_in, dim_out, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.dropout(x @ self.kernel[...])


class NoAttributes(Kernel):
    def __init__(self, dim_in, dim_out, *, rngs):
        super().__init__(dim_in, dim_out, rngs=rngs)
        del self.dim_in, self.dim_out


class OtherAttributes(Kernel):
    def __init__(self, dim_in, dim_out, *, rngs):
        super().__init__(dim_in, dim_out, rngs=rngs)
        self.dim_in, self.dim_out = dim_out, dim_in


class Block(nnx.Module):
    """A weight next to a layer."""

    def __init__(self, width, *, rngs):
        self.in_dim, self.out_dim = width, width
        self.w, self.norm = weight(rngs, width, width), nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return self.norm(x) + x @ self.w[...]


class Batched(nnx.Module):
    """A product per group, which looks like a stacked layer."""

    def __init__(self, groups, ins, outs, *, rngs):
        self.in_features, self.out_features = ins, outs
        self.w = weight(rngs, groups, ins, outs)

    def __call__(self, x):
        return x @ self.w[...]


class LinenTorchLinear(nn.Module):
    features: int
    activation: bool = False
    factor: float = 1.0

    @nn.compact
    def __call__(self, x, factor=1.0):
        init = nn.initializers.normal(0.3)
        w = self.param("weight", init, (self.features, x.shape[-1]))
        b = self.param("bias", init, (self.features,))
        y = x @ w.T + b.reshape((1,) * (x.ndim - 1) + b.shape)
        y = y if factor * self.factor == 1.0 else y * (factor * self.factor)
        return nn.gelu(y) if self.activation else y


class LinenFlags(nn.Module):
    """A layer that passes on a flag, such as one for dropout."""

    @nn.compact
    def __call__(self, x):
        return LinenTorchLinear(4, name="layer")(x, factor=1.0)


class LinenKernel(nn.Module):
    features: int
    normalised: bool = False

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.3), (x.shape[-1], self.features))
        return x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True) if self.normalised else w)


class LinenHeads(nn.Module):
    heads: int
    size: int
    axis: int = -1

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.3)
        w = self.param("w", init, (x.shape[self.axis], self.heads, self.size))
        b = self.param("bias", init, (self.heads, self.size))
        y = jnp.tensordot(x, w, ((self.axis,), (0,)))
        return y + b.reshape((1,) * (x.ndim - 1) + b.shape)


class LinenOutOfHeads(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[-2:], self.features)
        return jnp.einsum("...nh,nhd->...d", x, self.param("w", nn.initializers.normal(0.3), shape))


class LinenGated(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape, init = (x.shape[-1], self.features), nn.initializers.normal(0.3)
        up, gate = self.param("up", init, shape), self.param("gate", init, shape)
        return (x @ up) * nn.sigmoid(x @ gate)


class LinenTable(nn.Module):
    rows: int
    features: int

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(), (self.rows, self.features))

    def __call__(self, ids):
        return self.table[ids]

    def attend(self, x):
        return x @ self.table.T


class LinenTied(nn.Module):
    """A layer whose weight the model uses a second time."""

    @nn.compact
    def __call__(self, x):
        layer = LinenKernel(x.shape[-1], name="layer")
        y = layer(x)
        return y @ layer.variables["params"]["w"].T


class Windowed(Kernel):
    """Sums neighbours of the product by a custom function."""

    def __call__(self, x):
        def add(a, b):
            return a + b + 0.0

        y = x @ self.kernel[...]
        return lax.reduce_window(y, jnp.float32(0), add, (1, 3), (1, 1), "SAME")


class InTuple(Kernel):
    """Returns its output and no bias."""

    def __call__(self, x):
        return x @ self.kernel[...], None


class Counting(Kernel):
    """Adds the last output, which it stores."""

    def __init__(self, ins, outs, *, rngs):
        super().__init__(ins, outs, rngs=rngs)
        self.last = nnx.BatchStat(jnp.zeros(outs))

    def __call__(self, x):
        y = x @ self.kernel[...] + self.last[...]
        self.last[...] = y[0]
        return y


class ByMode(Kernel):
    """Computes something else in another mode, for a square input, and for None."""

    training = False

    def __call__(self, x, factor=1.0):
        square = x.ndim == 3 and x.shape[-2] == x.shape[-1]
        y = x @ (self.kernel[...].T if square else self.kernel[...])
        y = 2 * y if x.dtype == jnp.bfloat16 or self.training else y
        return y if factor == 1.0 else 3 * y


class LinenMethods(nn.Module):
    """Has a method that ``init`` does not call."""

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(), (4, 4))

    def __call__(self, x):
        return x @ self.kernel

    def decode(self, x):
        return x @ self.kernel.T


class LinenReduced(nn.Module):
    @nn.compact
    def __call__(self, x):
        def add(a, b):
            return a + b + 0.0

        y = x @ self.param("kernel", nn.initializers.normal(), (4, 4))
        return lax.reduce_window(y, jnp.float32(0), add, (1, 3), (1, 1), "SAME")


class LinenInTuple(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(), (4, 4)), None


class LinenRng(nn.Module):
    """Computes something else if a stream of random numbers is given."""

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.normal(), (4, 4))
        return 2 * y if self.has_rng("noise") else y


class LinenState(nn.Module):
    """Adds the last output, which it stores."""

    @nn.compact
    def __call__(self, x):
        last = self.variable("state", "last", jnp.zeros, (1, 4))
        y = x @ self.param("kernel", nn.initializers.normal(), (4, 4)) + last.value
        if self.is_mutable_collection("state"):
            last.value = y[:1]
        return y
