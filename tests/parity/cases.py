"""Inputs of both sides (models, weights, batches), and the snapshot compared at every step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

BATCH, TOKENS = 8, 3


class Snapshot(NamedTuple):
    """One side after one training step, all in NumPy; dicts are keyed by layer name.

    ``sensitivity`` and ``uncertainty`` are None once PEFT has discarded its averages.
    """

    loss: float  # with the orthogonality term, before the step
    budget: int
    masks: dict[str, np.ndarray]  # [r], the masks in effect
    adapters: dict[str, tuple[np.ndarray, ...]]  # p [r, out], lam [r], q [r, in]
    sensitivity: dict[str, tuple[np.ndarray, ...]] | None
    uncertainty: dict[str, tuple[np.ndarray, ...]] | None
    head: dict[str, np.ndarray]  # parameters that are trained in addition to adapters, if any


class Inputs(NamedTuple):
    """The inputs of both sides, in NumPy."""

    weights: dict[str, dict[str, np.ndarray]]  # of the base: {layer: {kernel [in, out], bias}}
    x: np.ndarray  # [steps, batch, ...]
    y: np.ndarray  # [steps, batch, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """Linear layers by name with (in, out), those that are adapted, and how they are connected.

    ``forward(linear, lib, x)`` is the same code for both frameworks: ``linear(name, x)`` applies a
    layer and ``lib`` is ``torch`` or ``jax.numpy``. ``loss(lib, output, y)`` likewise.
    """

    layers: dict[str, tuple[int, int]]
    adapted: tuple[str, ...]
    forward: Callable[..., Any]
    loss: Callable[..., Any]
    tokens: bool = False  # x is [batch, tokens, in] and y is one-hot

    @property
    def in_features(self) -> int:
        return next(iter(self.layers.values()))[0]

    @property
    def out_features(self) -> int:
        return list(self.layers.values())[-1][1]


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run: a model, PEFT's keyword arguments, an optimizer, a seed."""

    model: str
    config: dict[str, Any]  # of peft.AdaLoraConfig, except target_modules
    optimizer: str = "adamw"  # or "sgd" (with momentum); see the two sides
    clip: float | None = None  # global norm of the gradients, before importance sees them
    learning_rate: float = 1e-2
    trained_head: bool = False
    steps: int | None = None  # total_step of the config unless given
    overflow: int | None = None  # a step whose gradients are all infinite
    seed: int = 0


def _chain(linear, lib, x, names):
    for name in names[:-1]:
        x = lib.tanh(linear(name, x))
    return linear(names[-1], x)


def _squared_error(lib, output, y):
    return ((output - y) ** 2).mean()


def _block(linear, lib, x):
    """Apply one transformer block without norms, then the mean over tokens and a head."""
    query, key, value = (linear(name, x) for name in ("query", "key", "value"))
    weights = lib.exp(lib.einsum("btd,bsd->bts", query, key) / query.shape[-1] ** 0.5)
    weights = weights / weights.sum(-1)[..., None]
    x = x + linear("out", lib.einsum("bts,bsd->btd", weights, value))
    x = x + linear("down", lib.tanh(linear("up", x)))
    return linear("head", x.mean(1))


def _cross_entropy(lib, output, y):
    return (lib.log(lib.exp(output).sum(-1)) - (output * y).sum(-1)).mean()


def _chain_model(sizes: tuple[int, ...], adapted: tuple[int, ...]) -> Model:
    layers = {f"layer{i}": pair for i, pair in enumerate(itertools.pairwise(sizes))}
    forward = lambda linear, lib, x: _chain(linear, lib, x, list(layers))
    return Model(layers, tuple(f"layer{i}" for i in adapted), forward, _squared_error)


MODELS = {
    "chain2": _chain_model((10, 14, 6), (0, 1)),
    "chain3": _chain_model((8, 24, 12, 5), (0, 1, 2)),
    "chain4": _chain_model((9, 16, 11, 20, 6, 4), (0, 1, 3, 4)),
    "chain5": _chain_model((7, 12, 18, 9, 13, 6), (0, 1, 2, 3, 4)),
    "block6": Model(
        layers={
            "query": (12, 8),
            "key": (12, 8),
            "value": (12, 10),
            "out": (10, 12),
            "up": (12, 24),
            "down": (24, 12),
            "head": (12, 4),
        },
        adapted=("query", "key", "value", "out", "up", "down"),
        forward=_block,
        loss=_cross_entropy,
        tokens=True,
    ),
}


def inputs(case: Case) -> Inputs:
    """Return random weights, and batches whose y comes from a fixed low-rank map of x."""
    model, rng = MODELS[case.model], np.random.default_rng(case.seed)
    weights = {
        name: {
            "kernel": rng.normal(size=shape) * (1.5 / shape[0] ** 0.5),
            "bias": 0.1 * rng.normal(size=shape[1]),
        }
        for name, shape in model.layers.items()
    }
    steps = case.steps or case.config["total_step"]
    teacher = rng.normal(size=(model.in_features, 3)) @ rng.normal(size=(3, model.out_features))
    if model.tokens:
        x = rng.normal(size=(steps, BATCH, TOKENS, model.in_features))
        y = np.eye(model.out_features)[(x.mean(2) @ teacher).argmax(-1)]
    else:
        x = rng.normal(size=(steps, BATCH, model.in_features))
        y = np.tanh(x @ teacher / 4)
    return Inputs(weights, x, y)
