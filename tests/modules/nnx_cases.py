"""The NNX modules that the checks run on, one or more per layer kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modules.linen_cases import Layout, ordered, turned


class Case(NamedTuple):
    """A function that makes a module, its input shapes (or arrays), and its increments' layouts."""

    make: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[Any, ...]
    layouts: Mapping[str, Layout] = MappingProxyType({})
    targets: Any = ".*"


def _wide() -> dict[str, Any]:
    """Return float64 as ``param_dtype`` if enabled, for layers that cast to their own dtype."""
    return {"param_dtype": jnp.result_type(float)}


class TunixEinsum(nnx.Module):
    """The einsum module of a model zoo."""

    def __init__(self, einsum_str, shape, rngs, w_scale=None):
        self.einsum_str = einsum_str
        self.shape = shape
        self.w_scale = w_scale
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        w = self.w[...] if self.w_scale is None else self.w[...] * self.w_scale
        return jnp.einsum(self.einsum_str, x, w)


class Projections(nnx.Module):
    """Attention projections in Tunix' style, whose fields are also read as attributes."""

    def __init__(self, rngs):
        self.q = TunixEinsum("BTD,NDH->BTNH", (2, 5, 3), rngs)
        self.kv = TunixEinsum("BSD,CKDH->CBSKH", (2, 2, 5, 3), rngs)
        self.out = TunixEinsum("BTNH,NHD->BTD", (2, 3, 5), rngs)

    def __call__(self, x):
        k, v = self.kv(x)
        assert self.out.shape[-1] == x.shape[-1]
        return self.out(self.q(x) + k * v)


class Experts(nnx.Module):
    """Expert kernels in one einsum each."""

    def __init__(self, rngs):
        self.up = nnx.Einsum("ecd,edf->ecf", (3, 5, 7), (3, 7), rngs=rngs)
        self.down = nnx.Einsum("ecf,efd->ecd", (3, 7, 5), rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class Doubled(nnx.Linear):
    """A subclass that changes the output of the inherited layer."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs) + 1


class DoubledConv(nnx.Conv):
    """A convolution with the same change."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs) + 1


class TiedHead(nnx.Module):
    """An embedding that is also the output layer."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 4, **_wide(), rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class Shared(nnx.Module):
    """One module under two names, called three times."""

    def __init__(self, rngs):
        self.a = nnx.Linear(5, 5, rngs=rngs)
        self.z = self.a

    def __call__(self, x):
        return self.z(jnp.tanh(self.a(jnp.tanh(self.z(x)))))


class TiedWeights(nnx.Module):
    """Two layers that share one parameter."""

    def __init__(self, rngs):
        self.a = nnx.Linear(5, 5, rngs=rngs)
        self.b = nnx.Linear(5, 5, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


class Containers(nnx.Module):
    """Layers in a list, in a dict and in a Sequential."""

    def __init__(self, rngs):
        self.items = nnx.List([nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)])
        self.named = nnx.Dict(up=nnx.Linear(5, 3, rngs=rngs))
        self.stack = nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), jnp.tanh, nnx.Linear(4, 2, rngs=rngs)
        )

    def __call__(self, x):
        for layer in self.items:
            x = jnp.tanh(layer(x))
        return self.stack(self.named["up"](x))


class CellOnce(nnx.Module):
    """One step of a recurrent cell."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, x):
        carry = self.cell.initialize_carry(x.shape, nnx.Rngs(0))
        carry = jax.tree.map(lambda leaf: (leaf + 0.1).astype(x.dtype), carry)
        return self.cell(carry, x)


def _attention(rngs):
    return nnx.MultiHeadAttention(2, in_features=5, qkv_features=6, decode=False, rngs=rngs)


def _ids(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape) * 7 % 11


def _rnn(rngs):
    wide = {**_wide(), "rngs": rngs}
    forward, backward = nnx.RNN(nnx.LSTMCell(5, 3, **wide)), nnx.RNN(nnx.GRUCell(5, 3, **wide))
    return nnx.Bidirectional(forward, backward, rngs=rngs)


def _general(inputs, in_features, out_features, **kwargs):
    return Case(lambda r: nnx.LinearGeneral(in_features, out_features, rngs=r, **kwargs), (inputs,))


def _conv(inputs, in_features, out_features, window, **kwargs):
    return Case(lambda r: nnx.Conv(in_features, out_features, window, rngs=r, **kwargs), (inputs,))


def _transposed(inputs, in_features, out_features, window, layouts=None, **kwargs):
    make = lambda r: nnx.ConvTranspose(in_features, out_features, window, rngs=r, **kwargs)
    return Case(make, (inputs,), layouts or {})


CASES = {
    "linear": Case(lambda r: nnx.Linear(5, 4, rngs=r), ((2, 3, 5),)),
    "linear-subclass": Case(lambda r: Doubled(5, 4, rngs=r), ((2, 5),)),
    "general-multi-axis": _general((2, 6, 5, 2), (5, 2), (3, 4), axis=(-2, -1)),
    "general-crossed-axes": _general((2, 3, 5), (3, 5), 4, axis=(2, 1)),
    "general-batch": _general((3, 2, 5), 5, 4, batch_axis={0: 3}),
    "attention": Case(_attention, ((2, 3, 5), (2, 4, 5))),
    "einsum": Case(lambda r: nnx.Einsum("btd,dnh->btnh", (5, 2, 4), (2, 4), rngs=r), ((2, 3, 5),)),
    "einsum-crossed": Case(
        lambda r: nnx.Einsum("...d,fd->...f", (4, 5), (4,), rngs=r),
        ((2, 3, 5),),
        {"": ordered("df", "fd", d=5, f=4)},
    ),
    "experts-einsum": Case(Experts, ((3, 4, 5),)),
    "custom-einsum": Case(
        Projections,
        ((2, 3, 5),),
        {
            "q": ordered("dnh", "ndh", d=5, n=2, h=3),
            "kv": ordered("cdkh", "ckdh", c=2, k=2, d=5, h=3),
        },
    ),
    "custom-einsum-scaled": Case(
        lambda r: TunixEinsum("BTD,DNP->BTNP", (5, 2, 3), r, w_scale=0.25), ((2, 3, 5),)
    ),
    "embed": Case(lambda r: nnx.Embed(11, 4, **_wide(), rngs=r), (_ids(2, 3),)),
    "tied-head": Case(TiedHead, (_ids(2, 3),)),
    "conv-1d-causal": _conv((2, 6, 3), 3, 4, 3, padding="CAUSAL"),
    "conv-2d-same-strides": _conv((2, 5, 6, 3), 3, 4, (3, 2), strides=2),
    "conv-2d-valid-dilated": _conv(
        (2, 5, 4, 3), 3, 4, (2, 2), padding="VALID", kernel_dilation=(2, 1)
    ),
    "conv-2d-circular": _conv((2, 4, 4, 3), 3, 4, (3, 3), padding="CIRCULAR"),
    "conv-2d-reflect": _conv((2, 4, 4, 3), 3, 4, (3, 3), padding="REFLECT", use_bias=False),
    "conv-2d-explicit-groups": _conv(
        (2, 4, 4, 4), 4, 6, (3, 3), padding=((1, 0), (2, 1)), feature_group_count=2
    ),
    "conv-depthwise": _conv((2, 5, 4), 4, 8, (3,), feature_group_count=4),
    "conv-3d": _conv((1, 3, 4, 3, 2), 2, 4, (2, 3, 2)),
    "conv-unbatched": _conv((5, 3), 3, 4, (3,)),
    "conv-subclass": Case(lambda r: DoubledConv(3, 4, (3,), rngs=r), ((2, 5, 3),)),
    "conv-transpose": _transposed((2, 3, 4, 3), 3, 4, (3, 2), strides=(2, 1)),
    "conv-transpose-kernel": _transposed(
        *((2, 4, 3), 3, 4, (3,)),
        layouts={"": turned},
        strides=(2,),
        transpose_kernel=True,
        padding="VALID",
    ),
    "lstm": Case(lambda r: CellOnce(nnx.LSTMCell(3, 4, rngs=r)), ((2, 3),)),
    "lstm-optimized": Case(lambda r: CellOnce(nnx.OptimizedLSTMCell(3, 4, rngs=r)), ((2, 3),)),
    "gru": Case(lambda r: CellOnce(nnx.GRUCell(3, 4, rngs=r)), ((2, 3),)),
    "simple": Case(
        lambda r: CellOnce(nnx.SimpleCell(3, 4, dtype=jnp.result_type(float), **_wide(), rngs=r)),
        ((2, 3),),
    ),
    "rnn-both-ways": Case(_rnn, ((2, 3, 5),)),
    "shared": Case(Shared, ((2, 5),)),
    "tied-weights": Case(TiedWeights, ((2, 5),)),
    "containers": Case(Containers, ((2, 5),)),
}
