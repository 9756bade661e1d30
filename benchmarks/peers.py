"""Fine-tuning methods that the benchmarks compare, each as one jitted training step.

All of them have the same model, weights, batch, optimizer and initial adapters, so methods that
compute the same function have the same losses. A :class:`Peer` specifies the trainable parameters
and the loss.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adalora_jax as adalora
from adalora_jax import quantization
from benchmarks.networks import Linen, Nnx, Shape, Unsupported, cross_entropy, data

ADAMW = optax.adamw(1e-3)
RANK = 12


class Peer(NamedTuple):
    """Fine-tuning method: parameters, loss and optimizer."""

    frozen: Any  # never differentiated
    trainable: Any
    loss: Callable[[Any, Any, jax.Array, Any], jax.Array]  # of frozen, trainable, key and batch
    tx: optax.GradientTransformation = ADAMW


class Step:
    """Compiled training step and its state; a call takes one step and returns its loss."""

    def __init__(self, peer: Peer, batch: Any, seed: int = 0):
        self.frozen, self.batch = peer.frozen, jax.device_put(batch)
        trainable = jax.tree.map(jnp.copy, peer.trainable)  # a copy, because the step donates it
        self.state = trainable, peer.tx.init(trainable), jax.random.key(seed)
        self.jitted = jitted(peer)

    def __call__(self) -> jax.Array:
        *state, loss = self.jitted(self.frozen, *self.state, self.batch)
        self.state = tuple(state)
        return loss


def jitted(peer: Peer) -> Any:
    """Return the peer's step: a function of frozen, trainable, optimizer state, key and batch."""

    def step(frozen, trainable, opt, key, batch):
        key, use = jax.random.split(key)
        loss, grads = jax.value_and_grad(peer.loss, argnums=1)(frozen, trainable, use, batch)
        updates, opt = peer.tx.update(grads, opt, trainable)
        return optax.apply_updates(trainable, updates), opt, key, loss

    return jax.jit(step, donate_argnums=(1, 2, 3))


def build(name: str, shape: Shape, rank: int = RANK, dropout: float = 0.0) -> Any:
    """Return the step of a peer, in JAX or PyTorch, ready to run.

    Raises:
      Unsupported: the peer does not support the arguments, or is not installed.
    """
    try:
        if name not in TORCH:
            return Step(PEERS[name](shape, rank, dropout), data(shape))
        from benchmarks import torch_peers
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} is not installed") from error
    return torch_peers.Step(name, shape, rank, dropout)


def abstract(name: str, shape: Shape, rank: int = RANK, dropout: float = 0.0):
    """Return a peer and the arguments of its step, as shapes without arrays."""
    found = []

    def make(key):
        peer = PEERS[name](shape, rank, dropout)
        found.append(peer)
        return peer.frozen, peer.trainable, peer.tx.init(peer.trainable), key

    caches = (base, first)
    for cache in caches:  # they must not return tracers of another trace
        cache.cache_clear()
    arguments = jax.eval_shape(make, jax.random.key(0))
    for cache in caches:
        cache.cache_clear()
    return found[0], (*arguments, data(shape))


def config(shape: Shape, rank: int, dropout: float) -> adalora.AdaLoraConfig:
    """Return the config of maximum work: new averages and a new mask at every step."""
    return adalora.AdaLoraConfig(
        total_step=100_000,
        init_r=rank,
        target_r=max(1, rank * 2 // 3),
        lora_alpha=rank,  # a scale of 1
        lora_dropout=dropout,
        target_modules=pattern(shape),
        init="lambda_one",
        param_dtype=shape.dtype,
    )


def pattern(shape: Shape) -> str:
    """Return a regular expression for the paths of all adapted layers of the blocks."""
    return rf"layer.*/({'|'.join(shape.adapted)})"


@functools.lru_cache(maxsize=1)
def base(shape: Shape) -> dict[str, Any]:
    """Return the weights; all peers share these arrays."""
    return Linen(shape).init(jax.random.key(0), data(shape)[0])["params"]


@functools.lru_cache(maxsize=1)
def first(shape: Shape, rank: int) -> dict[str, adalora.Adapter]:
    """Return the initial adapters: q random, p 0 and λ 1, so that they equal LoRA's."""
    adapted = adalora.linen.adapt(Linen(shape), config(shape, rank, 0.0))
    return adapted.init(jax.random.key(1), {"params": base(shape)}, data(shape)[0])


def products(shape: Shape, rank: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the initial adapters as LoRA's ``A [..., in, r]`` and ``B [..., r, out]``."""
    return {path: (a.q.swapaxes(-1, -2), a.p) for path, a in first(shape, rank).items()}


def joined(params: Any, pairs: Any, names: tuple[str, str]) -> dict[str, Any]:
    """Return the parameters with ``{path: (A, B)}`` added next to the kernels, as ``names``."""
    params = copy.copy(params)
    for path, pair in pairs.items():
        node = params
        for name in path.split("/"):
            node[name] = node = copy.copy(node[name])
        node |= zip(names, pair)
    return params


def linen_loss(module, params, batch, key, dropout):
    rngs = {"dropout": key} if dropout else {}
    return cross_entropy(module.apply({"params": params}, batch[0], rngs=rngs), batch[1])


# Without adapters


def frozen(shape: Shape, rank: int, dropout: float) -> Peer:
    """Return the lower bound: forward, and backward to the activations after the embedding."""

    def loss(params, probe, key, batch):
        def add(call, args, kwargs, context):
            output = call(*args, **kwargs)
            here = (context.module.path, context.method_name) == (("embed",), "__call__")
            return output + probe if here else output

        with nn.intercept_methods(add):
            return linen_loss(Linen(shape), params, batch, key, 0)

    side = shape.image // shape.patch
    places = (side, side) if side else (shape.length,)
    probe = jnp.zeros((shape.batch, *places, shape.width), shape.dtype)
    return Peer(base(shape), probe, loss, optax.sgd(1e-3))  # the cheapest optimizer


def full(shape: Shape, rank: int, dropout: float) -> Peer:
    def loss(_, params, key, batch):
        return linen_loss(Linen(shape), params, batch, key, 0)

    return Peer((), base(shape), loss)


# flax.linen


def ours(shape: Shape, rank: int, dropout: float, form: str, qtype: str = "") -> Peer:
    """Return this library's "lora" (λ fixed at 1), "svd" (λ trained) or complete "adalora".

    "stacked" is "adalora" with the adapters stacked by role. With a ``qtype``, such as "nf4", the
    weights of the base are quantised.
    """
    found = config(shape, rank, dropout)
    model, variables = Linen(shape), {"params": base(shape)}
    if qtype:
        recipe = quantization.Recipe(qtype=qtype)
        model, variables = quantization.quantize(model, recipe, variables, data(shape)[0])
    adapted = adalora.linen.adapt(model, found)

    def task(variables, adapters, key, batch):
        rngs = {"dropout": key} if dropout else {}
        logits = adapted.apply(variables, adapters, batch[0], rngs=rngs)
        return cross_entropy(logits, batch[1])

    def lora(variables, factors, key, batch):
        def ones(p):
            return jnp.ones(p.shape[:-1], p.dtype)

        adapters = {
            path: adalora.Adapter(p, ones(p), q, *known[path]) for path, (p, q) in factors.items()
        }
        return task(variables, adapters, key, batch)

    def with_penalty(variables, adapters, key, batch):
        loss = task(variables, adalora.unstack(adapters), key, batch)
        return loss + adalora.orthogonality(adapters, found)

    adapters = first(shape, rank)
    known = {path: (adapter.scale, adapter.layout) for path, adapter in adapters.items()}
    if form == "lora":
        return Peer(variables, {path: (a.p, a.q) for path, a in adapters.items()}, lora)
    if form == "svd":
        return Peer(variables, adapters, task)
    if form == "stacked":
        adapters = adalora.stack(adapters)
    return Peer(variables, adapters, with_penalty, adalora.adalora(ADAMW, found))


def autodiff(shape: Shape, rank: int, dropout: float) -> Peer:
    """Return hand-written LoRA, ``y + x A B``, differentiated by JAX's autodiff."""
    names = ("lora_a", "lora_b")

    def add(call, args, kwargs, context):
        output, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not module.has_variable("params", names[0]):
            return output
        (x,), (a, b) = args, (module.get_variable("params", name) for name in names)
        if dropout:
            kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - dropout, x.shape)
            x = jnp.where(kept, x / jnp.asarray(1 - dropout, x.dtype), jnp.zeros((), x.dtype))
        return output + x @ a @ b

    def loss(params, pairs, key, batch):
        with nn.intercept_methods(add):
            params = joined(params, pairs, names)
            return linen_loss(Linen(shape), params, batch, key, dropout)

    return Peer(base(shape), products(shape, rank), loss)


def qwix_linen(shape: Shape, rank: int, dropout: float) -> Peer:
    import qwix

    model = qwix.apply_lora_to_model(Linen(shape), _provider(shape, rank, dropout))

    def loss(params, pairs, key, batch):
        params = joined(params, pairs, ("kernel_lora_a", "kernel_lora_b"))
        return linen_loss(model, params, batch, key, dropout)

    return Peer(base(shape), products(shape, rank), loss)


def _provider(shape, rank, dropout):
    import qwix

    rule = qwix.LoraRule(module_path=pattern(shape), rank=rank, alpha=rank, dropout=dropout)
    return qwix.LoraProvider([rule])


# flax.nnx


def nnx_base(shape: Shape) -> Nnx:
    """Return the NNX model with the shared weights."""
    model = nnx.eval_shape(lambda: Nnx(shape, nnx.Rngs(0)))
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, base(shape))
    nnx.update(model, state)
    return model


def nnx_peer(model, wrt, reseed, penalty=lambda trainable: 0.0, tx=ADAMW) -> Peer:
    """Return a peer that trains the parameters ``wrt`` selects, as split state for ``jax.jit``."""
    graph, trainable, rest = nnx.split(model, wrt, ...)

    def loss(rest, trainable, key, batch):
        model = nnx.merge(graph, trainable, rest, copy=True)  # new variables, which may change
        reseed(model, key)
        return cross_entropy(model(batch[0]), batch[1]) + penalty(trainable)

    return Peer(rest, trainable, loss, tx)


def nnx_ours(shape: Shape, rank: int, dropout: float, form: str) -> Peer:
    found = config(shape, rank, dropout)
    model = adalora.nnx.adapt(nnx_base(shape), found, nnx.Rngs(1))
    adalora.nnx.set_adapters(model, first(shape, rank))

    def reseed(model, key):
        return nnx.reseed(model, dropout=key, policy="match_shape")

    if form == "lora":

        def factors(path, value):
            return isinstance(value, nnx.LoRAParam) and path[-1] != "lam"

        return nnx_peer(model, factors, reseed)

    def penalty(trainable):
        return adalora.orthogonality(trainable, found)

    return nnx_peer(model, nnx.LoRAParam, reseed, penalty, adalora.adalora(ADAMW, found))


def flax_lora(shape: Shape, rank: int, dropout: float) -> Peer:
    """Return a model with ``nnx.LoRA`` around each layer; it has neither a scale nor dropout."""
    if dropout:
        raise Unsupported("nnx.LoRA has no dropout")
    model = nnx_base(shape)
    for path, (a, b) in products(shape, rank).items():
        *above, name = path.split("/")
        block = functools.reduce(getattr, above, model)
        layer = getattr(block, name)
        lora = nnx.LoRA(*a.shape[-2:], b.shape[-1], base_module=layer, rngs=nnx.Rngs(0))
        lora.lora_a, lora.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        setattr(block, name, lora)
    return nnx_peer(model, nnx.LoRAParam, lambda model, key: None)


def qwix_nnx(shape: Shape, rank: int, dropout: float) -> Peer:
    import qwix

    if shape.scan:
        raise Unsupported("Qwix's LoRA of NNX models does not run under nnx.scan")
    inputs = data(shape)[0]
    # These rngs serve only this first run; ``reseed`` sets the dropout keys of the training steps.
    model = nnx_base(shape)
    model = qwix.apply_lora_to_model(
        model, _provider(shape, rank, dropout), inputs, rngs=nnx.Rngs(1)
    )
    for path, (a, b) in products(shape, rank).items():
        layer = functools.reduce(getattr, path.split("/"), model)
        layer.kernel_lora_a[...], layer.kernel_lora_b[...] = a, b

    def reseed(model, key):
        if dropout:
            model.set_attributes(qwix_rngs=nnx.Rngs(dropout=key))

    return nnx_peer(model, nnx.LoRAParam, reseed)


def _form(make, *form):
    return lambda shape, rank, dropout: make(shape, rank, dropout, *form)


PEERS: dict[str, Callable[[Shape, int, float], Peer]] = {
    "frozen": frozen,
    "lora": _form(ours, "lora"),
    "svd": _form(ours, "svd"),
    "adalora": _form(ours, "adalora"),
    "adalora-stacked": _form(ours, "stacked"),
    "nf4-lora": _form(ours, "lora", "nf4"),
    "nf4-adalora": _form(ours, "adalora", "nf4"),
    "autodiff": autodiff,
    "qwix": qwix_linen,
    "full": full,
    "nnx-lora": _form(nnx_ours, "lora"),
    "nnx-adalora": _form(nnx_ours, "adalora"),
    "flax-lora": flax_lora,
    "qwix-nnx": qwix_nnx,
}
TORCH = {
    "torch-frozen": "PyTorch: frozen model",
    "peft-lora": "PEFT: LoRA",
    "peft-adalora": "PEFT: AdaLoRA",
    "peft-lora-compiled": "PEFT: LoRA, torch.compile",
    "peft-adalora-compiled": "PEFT: AdaLoRA, torch.compile",
}
TITLES = {
    "frozen": "frozen model",
    "lora": "adalora_jax: LoRA",
    "svd": "adalora_jax: LoRA with trained λ",
    "adalora": "adalora_jax: AdaLoRA",
    "adalora-stacked": "adalora_jax: AdaLoRA, stacked by role",
    "nf4-lora": "adalora_jax: LoRA, NF4 base",
    "nf4-adalora": "adalora_jax: AdaLoRA, NF4 base",
    "autodiff": "hand-written LoRA",
    "qwix": "Qwix: LoRA",
    "full": "full fine-tuning",
    "nnx-lora": "adalora_jax (NNX): LoRA",
    "nnx-adalora": "adalora_jax (NNX): AdaLoRA",
    "flax-lora": "Flax (NNX): nnx.LoRA",
    "qwix-nnx": "Qwix (NNX): LoRA",
    **TORCH,
}
