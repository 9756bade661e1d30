"""The linen modules that the checks run on, one or more per layer kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Layout = Callable[[Any, tuple[int, ...]], Any]  # (increment [*stack, in, out], shape) -> weight


def plain(delta, shape):
    """Reshape an increment to the order of most weights: stack, in, out."""
    return delta.reshape(shape)


def turned(delta, shape):
    """Arrange an increment as a transposed convolution kernel, ``[*window, out, in]``."""
    return jnp.swapaxes(delta.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)


def ordered(order: str, weight: str, **sizes: int) -> Layout:
    """Return a layout by axis names: their order in the increment, and in the weight."""

    def layout(delta, shape):
        del shape
        return jnp.einsum(f"{order}->{weight}", delta.reshape([sizes[a] for a in order]))

    return layout


class Case(NamedTuple):
    """A module, its input shapes (or arrays), and the layouts of its increments."""

    module: Any
    inputs: tuple[Any, ...]
    layouts: Mapping[str, Layout] = MappingProxyType({})
    call: Mapping[str, Any] = MappingProxyType({})
    targets: Any = ".*"


class GemmaEinsum(nn.Module):
    """The einsum module of a model zoo, with the equation as a call argument."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(), self.shape))


class Projections(nn.Module):
    """Gemma's attention projections."""

    @nn.compact
    def __call__(self, x):
        q = GemmaEinsum((2, 5, 3), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = GemmaEinsum((2, 2, 5, 3), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        return GemmaEinsum((2, 3, 5), name="attn_vec_einsum")("BTNH,NHD->BTD", q + k * v)


class Gate(nn.Module):
    """Gemma's feed-forward block."""

    @nn.compact
    def __call__(self, x):
        gate, up = jnp.moveaxis(
            GemmaEinsum((2, 7, 5), name="gating_einsum")("...F,NHF->...NH", x), -2, 0
        )
        return GemmaEinsum((7, 5), name="linear")("...H,HF->...F", nn.gelu(gate) * up)


class Experts(nn.Module):
    """Expert kernels in one einsum each."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Einsum((3, 5, 7), "ecd,edf->ecf", name="up")(x))
        return nn.Einsum((3, 7, 5), "ecf,efd->ecd", use_bias=False, name="down")(x)


class AllExperts(nn.Module):
    """Every token through every expert."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((3, 5, 7), "td,edf->tef", use_bias=False, name="up")(x)
        return nn.Einsum((3, 7, 5), "tef,efd->ted", use_bias=False, name="down")(x)


class Doubled(nn.Dense):
    """A subclass that changes the output of the inherited layer."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs) + 1


class DoubledConv(nn.Conv):
    """A convolution with the same change."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs) + 1


class TiedHead(nn.Module):
    """An embedding that is also the output layer."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 4, name="embed")
        return embed.attend(jnp.tanh(embed(ids)))


class SharedTwice(nn.Module):
    """One module called three times."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, name="shared")
        return layer(nn.tanh(layer(nn.tanh(layer(x)))))


class Shared(nn.Module):
    """One module held by two parents."""

    def setup(self):
        self.layer = nn.Dense(5)
        self.left = Call(self.layer)
        self.right = Call(self.layer)

    def __call__(self, x):
        return self.left(x) * self.right(nn.tanh(x))


class Call(nn.Module):
    layer: Any

    def __call__(self, x):
        return self.layer(x) + 1


class CellOnce(nn.Module):
    """One step of a recurrent cell."""

    cell: Any

    @nn.compact
    def __call__(self, x):
        carry = self.cell.initialize_carry(jax.random.key(0), x.shape)
        carry = jax.tree.map(lambda leaf: (leaf + 0.1).astype(x.dtype), carry)
        return self.cell(carry, x)


def _ids(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape) * 7 % 11


def _wide() -> dict[str, Any]:
    """Return float64 as ``param_dtype`` if enabled: ``lax.scan`` needs one dtype for the carry."""
    return {"param_dtype": jnp.result_type(float)}


_DENSE = {
    "dense": lambda: Case(nn.Dense(4), ((2, 3, 5),)),
    "dense-vector": lambda: Case(nn.Dense(4, use_bias=False), ((5,),)),
    "dense-subclass": lambda: Case(Doubled(4), ((2, 5),)),
    "general-multi-axis": lambda: Case(nn.DenseGeneral((3, 4), axis=(-2, -1)), ((2, 6, 5, 2),)),
    "general-front-axis": lambda: Case(nn.DenseGeneral(4, axis=1), ((2, 5, 3),)),
    "general-crossed-axes": lambda: Case(nn.DenseGeneral((4,), axis=(2, 1)), ((2, 3, 5),)),
    "general-batch": lambda: Case(nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), ((3, 2, 5),)),
    "general-batches": lambda: Case(
        nn.DenseGeneral((4,), axis=(2, -1), batch_dims=(0, 1)), ((2, 3, 5, 2),)
    ),
    "attention": lambda: Case(
        nn.MultiHeadDotProductAttention(2, qkv_features=6), ((2, 3, 5), (2, 4, 5))
    ),
    "self-attention": lambda: Case(nn.SelfAttention(2, qkv_features=6), ((2, 3, 5),)),
}
_EINSUM = {
    "einsum": lambda: Case(nn.Einsum((5, 2, 4), "btd,dnh->btnh"), ((2, 3, 5),)),
    "einsum-out": lambda: Case(nn.Einsum((2, 4, 5), "...nh,nhd->...d"), ((3, 2, 4),)),
    "einsum-at-call": lambda: Case(nn.Einsum((5, 4)), ((3, 5),), call={"einsum_str": "td,df->tf"}),
    "einsum-crossed": lambda: Case(
        nn.Einsum((4, 5), "td,fd->tf", use_bias=False),
        ((3, 5),),
        {"": ordered("df", "fd", d=5, f=4)},
    ),
    "experts-einsum": lambda: Case(Experts(), ((3, 4, 5),)),
    "experts-all-tokens": lambda: Case(
        AllExperts(), ((4, 5),), {"up": ordered("def", "edf", e=3, d=5, f=7)}
    ),
    "custom-projections": lambda: Case(
        Projections(),
        ((2, 3, 5),),
        {
            "q_einsum": ordered("dnh", "ndh", d=5, n=2, h=3),
            "kv_einsum": ordered("cdkh", "ckdh", c=2, k=2, d=5, h=3),
        },
    ),
    "custom-gate": lambda: Case(
        Gate(), ((2, 5),), {"gating_einsum": ordered("fnh", "nhf", n=2, h=7, f=5)}
    ),
}
_EMBED = {
    "embed": lambda: Case(nn.Embed(11, 4), (_ids(2, 3),)),
    "tied-head": lambda: Case(TiedHead(), (_ids(2, 3),)),
}
_CONV = {
    "conv-1d-causal": lambda: Case(nn.Conv(4, 3, padding="CAUSAL"), ((2, 6, 3),)),
    "conv-2d-same-strides": lambda: Case(nn.Conv(4, (3, 2), strides=2), ((2, 5, 6, 3),)),
    "conv-2d-valid-dilated": lambda: Case(
        nn.Conv(4, (2, 2), padding="VALID", kernel_dilation=(2, 1)), ((2, 5, 4, 3),)
    ),
    "conv-2d-circular": lambda: Case(nn.Conv(4, (3, 3), padding="CIRCULAR"), ((2, 4, 4, 3),)),
    "conv-2d-reflect": lambda: Case(
        nn.Conv(4, (3, 3), padding="REFLECT", use_bias=False), ((2, 4, 4, 3),)
    ),
    "conv-2d-explicit-groups": lambda: Case(
        nn.Conv(6, (3, 3), padding=((1, 0), (2, 1)), feature_group_count=2), ((2, 4, 4, 4),)
    ),
    "conv-depthwise": lambda: Case(nn.Conv(8, (3,), feature_group_count=4), ((2, 5, 4),)),
    "conv-input-dilated": lambda: Case(nn.Conv(4, (3,), input_dilation=2, padding=1), ((2, 5, 3),)),
    "conv-3d": lambda: Case(nn.Conv(4, (2, 3, 2)), ((1, 3, 4, 3, 2),)),
    "conv-unbatched": lambda: Case(nn.Conv(4, (3,)), ((5, 3),)),
    "conv-many-batches": lambda: Case(nn.Conv(4, (3,)), ((2, 2, 5, 3),)),
    "conv-subclass": lambda: Case(DoubledConv(4, (3,)), ((2, 5, 3),)),
    "conv-transpose": lambda: Case(nn.ConvTranspose(4, (3, 2), strides=(2, 1)), ((2, 3, 4, 3),)),
    "conv-transpose-kernel": lambda: Case(
        nn.ConvTranspose(4, (3,), strides=(2,), transpose_kernel=True, padding="VALID"),
        ((2, 4, 3),),
        {"": turned},
    ),
    "conv-transpose-circular": lambda: Case(
        nn.ConvTranspose(4, (3,), strides=(2,), padding="CIRCULAR", kernel_dilation=(2,)),
        ((2, 4, 3),),
    ),
}
_RECURRENT = {
    "lstm": lambda: Case(CellOnce(nn.LSTMCell(4)), ((2, 3),)),
    "lstm-optimized": lambda: Case(CellOnce(nn.OptimizedLSTMCell(4)), ((2, 3),)),
    "gru": lambda: Case(CellOnce(nn.GRUCell(4)), ((2, 3),)),
    "simple": lambda: Case(CellOnce(nn.SimpleCell(4)), ((2, 3),)),
    "mgu": lambda: Case(CellOnce(nn.MGUCell(4)), ((2, 3),)),
    "conv-lstm": lambda: Case(CellOnce(nn.ConvLSTMCell(4, (3,))), ((2, 5, 3),)),
    "rnn": lambda: Case(
        nn.RNN(nn.OptimizedLSTMCell(4, **_wide()), return_carry=True), ((2, 3, 5),)
    ),
    "rnn-both-ways": lambda: Case(
        nn.Bidirectional(nn.RNN(nn.GRUCell(3, **_wide())), nn.RNN(nn.SimpleCell(3, **_wide()))),
        ((2, 3, 5),),
    ),
}
_SHARED = {
    "shared-called-again": lambda: Case(SharedTwice(), ((2, 5),)),
    "shared-two-parents": lambda: Case(Shared(), ((2, 5),)),
}
CASES = _DENSE | _EINSUM | _EMBED | _CONV | _RECURRENT | _SHARED
