"""Lifted layers: each slice of a stack is a separate matrix in outputs, ranks and reports."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adalora_jax as adalora
from modules import checks, linen_adapted, nnx_adapted
from modules.linen_cases import Case as LinenCase
from modules.linen_cases import GemmaEinsum
from modules.nnx_cases import Case as NnxCase


class Block(nn.Module):
    """A residual block with three kinds of layers."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.DenseGeneral((2, 3), name="query")(x)
        h = nn.DenseGeneral(5, axis=(-2, -1), name="out")(jnp.tanh(h))
        return x + GemmaEinsum((5, 5), name="mix")("...F,HF->...H", h), None


class Scanned(nn.Module):
    """Layers under nn.scan, optionally with nn.remat inside."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Rematted(nn.Module):
    """Layers under nn.remat_scan, which stacks twice."""

    @nn.compact
    def __call__(self, x):
        block = nn.remat_scan(Residual, lengths=(2, 3))
        return block(name="layers")(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(5, name="up")(jnp.tanh(x))


class Mapped(nn.Module):
    """Experts under nn.vmap."""

    @nn.compact
    def __call__(self, x):
        expert = nn.vmap(Residual, variable_axes={"params": 0}, split_rngs={"params": True})
        return expert(name="experts")(x)


class Nested(nn.Module):
    """Experts under nn.vmap in layers under nn.scan."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Mapped(name="moe")(x), None


def _turned(delta, shape):
    del shape
    return jnp.swapaxes(delta, -1, -2)


LINEN = {
    "scan": LinenCase(Scanned(), ((2, 5),), {"layers/mix": _turned}),
    "scan-remat": LinenCase(Scanned(remat=True), ((2, 5),), {"layers/mix": _turned}),
    "remat-scan": LinenCase(Rematted(), ((2, 5),)),
    "vmap": LinenCase(Mapped(), ((3, 2, 5),)),
    "scan-vmap": LinenCase(Nested(), ((3, 2, 5),)),
}


class NnxBlock(nnx.Module):
    """The same block in NNX, optionally with experts under nnx.vmap."""

    def __init__(self, rngs, experts=0):
        self.query = nnx.LinearGeneral(5, (2, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=rngs)
        self.experts = NnxMapped(rngs, experts) if experts else None

    def __call__(self, x):
        x = x + self.out(jnp.tanh(self.query(x)))
        return x if self.experts is None else self.experts(x)


class NnxMapped(nnx.Module):
    """Experts under nnx.vmap."""

    def __init__(self, rngs, count=3):
        @nnx.split_rngs(splits=count)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(5, 5, rngs=rngs)

        self.linear = make(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: x + layer(jnp.tanh(x)))(self.linear, x)


class NnxScanned(nnx.Module):
    """Layers under nnx.scan, optionally with nnx.remat inside."""

    def __init__(self, rngs, remat=False, experts=0):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return NnxBlock(rngs, experts)

        self.layers, self.remat = make(rngs), remat

    def __call__(self, x):
        call = lambda x, block: block(x)
        call = nnx.remat(call) if self.remat else call
        return nnx.scan(call, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


NNX = {
    "scan": NnxCase(NnxScanned, ((2, 5),)),
    "scan-remat": NnxCase(lambda r: NnxScanned(r, remat=True), ((2, 5),)),
    "vmap": NnxCase(NnxMapped, ((3, 2, 5),)),
    "scan-vmap": NnxCase(lambda r: NnxScanned(r, experts=3), ((3, 2, 5),)),
}
CASES = {f"linen-{name}": (linen_adapted.adapt_case, case) for name, case in LINEN.items()}
CASES |= {f"nnx-{name}": (nnx_adapted.adapt_case, case) for name, case in NNX.items()}


@pytest.mark.parametrize("name", CASES)
def test_stacked_layer_equals_dense_increment_in_float64(name):
    adapt_case, case = CASES[name]
    with jax.enable_x64(True):
        checks.check_adapter(adapt_case(case, "float64"), rtol=1e-10, merge_rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_stacked_layer_equals_dense_increment_in_float32_and_prunes(name):
    adapt_case, case = CASES[name]
    found = adapt_case(case, "float32")
    checks.check_adapter(found, rtol=2e-5)
    checks.check_training(found)


ROWS = {
    "linen-scan": [f"layers/{name}[{i}]" for name in ("mix", "out", "query") for i in range(3)],
    "linen-remat-scan": [f"layers/up[{i},{j}]" for i in range(2) for j in range(3)],
    "linen-vmap": [f"experts/up[{i}]" for i in range(3)],
    "linen-scan-vmap": [f"layers/moe/experts/up[{i},{j}]" for i in range(2) for j in range(3)],
    "nnx-vmap": [f"linear[{i}]" for i in range(3)],
}


@pytest.mark.parametrize("name", ROWS)
def test_ranks_have_one_entry_per_slice(name):
    adapt_case, case = CASES[name]
    found = adapt_case(case, "float32")
    adapters = jax.eval_shape(found.init, jax.random.key(0))
    masks = {path: np.ones(a.lam.shape, bool) for path, a in adapters.items()}
    assert list(adalora.ranks(masks)) == ROWS[name]


def test_slices_of_a_stack_have_different_initial_values():
    case = LINEN["vmap"]
    adapter = linen_adapted.adapt_case(case, "float32").init(jax.random.key(0))["experts/up"]
    assert not np.allclose(adapter.q[0], adapter.q[1])


@pytest.mark.parametrize("kind", ["einsum", "vmap"])
def test_expert_outside_the_loss_has_zero_gradient(kind):
    module: Any = nn.Einsum((3, 5, 5), "ecd,edf->ecf") if kind == "einsum" else Mapped()
    case = LinenCase(module, ((3, 2, 5),))
    found = linen_adapted.adapt_case(case, "float32")
    adapters = checks.random_like(jax.eval_shape(found.init, jax.random.key(0)), 1)
    x = found.inputs[0]

    @jax.jit
    def loss(adapters):
        return jnp.sum(found.apply(found.base, adapters, x)[1])

    for adapter in jax.grad(loss)(adapters).values():
        for leaf in adapter:
            assert [bool(np.any(row)) for row in leaf] == [False, True, False]
