"""The ways to fine-tune a model that the benchmarks compare, each as one jitted training step.

All have the model, the weights, the batch and the optimizer in common. A :class:`Peer` says what
trains and how that becomes a loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from networks import BLOCK, Linen, Shape, cross_entropy, data

import adalora_jax as adalora

ADAMW = optax.adamw(1e-3)


class Peer(NamedTuple):
    """A way to fine-tune."""

    frozen: Any  # never differentiated
    trainable: Any
    loss: Callable[[Any, Any, jax.Array, Any], jax.Array]  # of frozen, trainable, key, batch
    tx: optax.GradientTransformation = ADAMW


class Step:
    """A compiled training step with its state; calling it takes one step and gives the loss."""

    def __init__(self, peer: Peer, batch: Any, seed: int = 0):
        def step(frozen, trainable, opt, key, batch):
            key, use = jax.random.split(key)
            loss, grads = jax.value_and_grad(peer.loss, argnums=1)(frozen, trainable, use, batch)
            updates, opt = peer.tx.update(grads, opt, trainable)
            return optax.apply_updates(trainable, updates), opt, key, loss

        self.frozen, self.batch = peer.frozen, jax.device_put(batch)
        # Its own copy: the step donates it.
        trainable = jax.tree.map(jnp.copy, peer.trainable)
        self.state = trainable, peer.tx.init(trainable), jax.random.key(seed)
        start = time.perf_counter()
        traced = jax.jit(step, donate_argnums=(1, 2, 3)).trace(self.frozen, *self.state, self.batch)
        lowered = traced.lower()
        middle = time.perf_counter()
        self.compiled = lowered.compile()
        self.tracing_s = middle - start
        self.compile_s = time.perf_counter() - middle

    def __call__(self) -> jax.Array:
        *state, loss = self.compiled(self.frozen, *self.state, self.batch)
        self.state = tuple(state)
        return loss


def config(shape: Shape, rank: int, dropout: float) -> adalora.AdaLoraConfig:
    """AdaLoRA in its busiest phase: importance and a new mask at every step."""
    return adalora.AdaLoraConfig(
        total_step=100_000,
        init_r=rank,
        target_r=max(1, rank * 2 // 3),
        lora_alpha=rank,
        lora_dropout=dropout,
        target_modules=pattern(shape),
        init="lambda_one",
        param_dtype=shape.dtype,
    )


def pattern(shape: Shape) -> str:
    """All linear layers of the blocks."""
    names = [name for name, (kind, *_) in BLOCK[shape.kind].items() if kind == "dense"]
    return rf".*layer.*/({'|'.join(names)})"


def base(shape: Shape) -> dict[str, Any]:
    return Linen(shape).init(jax.random.key(0), data(shape)[0])


def _rngs(key, dropout):
    return {"dropout": key} if dropout else {}


def frozen(shape: Shape, rank: int, dropout: float) -> Peer:
    """No adapter: forward, and backward to the activations down to the embeddings' output."""
    module, variables = Linen(shape), base(shape)

    def loss(variables, probe, key, batch):
        def add(call, args, kwargs, context):
            output = call(*args, **kwargs)
            here = (context.module.name, context.method_name) == ("embed", "__call__")
            return output + probe if here else output

        with nn.intercept_methods(add):
            return cross_entropy(module.apply(variables, batch[0]), batch[1])

    probe = jnp.zeros((shape.batch, shape.tokens, shape.width), shape.dtype)
    return Peer(variables, probe, loss, optax.sgd(1e-3))


def full(shape: Shape, rank: int, dropout: float) -> Peer:
    """Full fine-tuning."""
    module = Linen(shape)
    loss = lambda _, variables, key, batch: cross_entropy(
        module.apply(variables, batch[0]), batch[1]
    )
    return Peer((), base(shape), loss)


def ours(shape: Shape, rank: int, dropout: float, form: str) -> Peer:
    """This library in linen: as AdaLoRA, as LoRA (λ held at 1), or with λ and nothing more."""
    found = config(shape, rank, dropout)
    adapted, variables = adalora.linen.adapt(Linen(shape), found), base(shape)
    adapters = adapted.init(jax.random.key(1), variables, data(shape)[0])
    task = lambda variables, adapters, key, batch: cross_entropy(
        adapted.apply(variables, adapters, batch[0], rngs=_rngs(key, dropout)), batch[1]
    )
    if form == "svd":
        return Peer(variables, adapters, task)
    if form == "adalora":
        with_penalty = lambda variables, adapters, key, batch: (
            task(variables, adapters, key, batch) + adalora.orthogonality(adapters, found)
        )
        return Peer(variables, adapters, with_penalty, adalora.adalora(ADAMW, found))
    whole = lambda factors: {
        path: adalora.Adapter(p, jnp.ones(p.shape[:-1], p.dtype), q)
        for path, (p, q) in factors.items()
    }
    loss = lambda variables, factors, key, batch: task(variables, whole(factors), key, batch)
    return Peer(variables, {path: (a.p, a.q) for path, a in adapters.items()}, loss)


def autodiff(shape: Shape, rank: int, dropout: float) -> Peer:
    """LoRA as one writes it by hand, ``x A B``, its derivative left to JAX."""
    module = Linen(shape)
    variables, factors, _, _ = ours(shape, rank, dropout, "lora")
    factors = {path: (q.swapaxes(-1, -2), p) for path, (p, q) in factors.items()}

    def loss(variables, factors, key, batch):
        def add(call, args, kwargs, context):
            output, module = call(*args, **kwargs), context.module
            if context.method_name != "__call__" or not module.has_variable("params", "lora"):
                return output
            (x,), (a, b) = args, module.get_variable("params", "lora")
            if dropout:
                kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - dropout, x.shape)
                x = jnp.where(kept, x / jnp.asarray(1 - dropout, x.dtype), 0)
            return output + x @ a @ b

        params = jax.tree.map(lambda leaf: leaf, variables["params"])  # new dicts
        for path, pair in factors.items():
            node = params
            for name in path.split("/"):
                node = node[name]
            node["lora"] = pair
        with nn.intercept_methods(add):
            logits = module.apply({"params": params}, batch[0], rngs=_rngs(key, dropout))
        return cross_entropy(logits, batch[1])

    return Peer(variables, factors, loss)


def _form(form):
    return lambda shape, rank, dropout: ours(shape, rank, dropout, form)


PEERS: dict[str, Callable[[Shape, int, float], Peer]] = {
    "frozen": frozen,
    "lora": _form("lora"),
    "svd": _form("svd"),
    "adalora": _form("adalora"),
    "autodiff": autodiff,
    "full": full,
}


def build(name: str, shape: Shape, rank: int = 12, dropout: float = 0.0) -> Step:
    """The compiled step of a peer."""
    return Step(PEERS[name](shape, rank, dropout), data(shape))
