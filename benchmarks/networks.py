"""Models of the benchmarks, each defined once for both ``flax.linen`` and ``flax.nnx``.

A model is a function that gets its layers by name, as linen or NNX layers. Two ways of adapting a
model therefore differ only in the adaptation. The only dropout is that of the adapters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Get = Callable[[str], Callable[..., jax.Array]]  # returns a layer by its name
Table = Mapping[str, tuple[str, ...]]  # {name: (kind, names of its sizes)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch."""

    kind: str  # a key of NETWORKS
    depth: int
    width: int
    hidden: int  # width of the MLP
    heads: int
    batch: int
    length: int = 0  # tokens per example; 0 for a ViT, whose tokens are the image patches
    image: int = 0  # side of the image, in pixels
    patch: int = 1
    vocabulary: int = 1000
    classes: int = 10
    targets: tuple[str, ...] = ()  # the adapted linear layers; all of a block if empty
    scan: bool = False  # scanned layers with recomputed activations
    dtype: str = "float32"  # dtype of weights, adapters and arithmetic

    @property
    def tokens(self) -> int:
        """Number of tokens per example that the layers see."""
        return (self.image // self.patch) ** 2 + 1 if self.image else self.length

    @property
    def adapted(self) -> tuple[str, ...]:
        """Linear layers of a block that get an adapter."""
        block = NETWORKS[self.kind].block
        linear = (name for name, (kind, *_) in block.items() if kind in ("dense", "bare"))
        return self.targets or tuple(linear)

    def size(self, name: str) -> int:
        """Return the number that has this name in a table of layers."""
        own = {"one": 1, "colours": 3, "three": 3 * self.width, "tokens": self.tokens}
        return own[name] if name in own else getattr(self, name)

    def replace(self, **changes: Any) -> Shape:
        return dataclasses.replace(self, **changes)


class Unsupported(Exception):
    """Error of a method that does not support a model; the message is the reason."""


class Network(NamedTuple):
    """Model: the tables of its layers, and the functions that run them."""

    block: Table  # layers of a block
    ends: Table  # layers before and after the blocks
    run_block: Callable[[Get, jax.Array, Shape], jax.Array]
    run: Callable[[Get, Callable[[jax.Array], jax.Array], jax.Array, Shape], jax.Array]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, causal: bool) -> jax.Array:
    y = jax.nn.dot_product_attention(
        *(part.reshape(*part.shape[:-1], heads, -1) for part in (q, k, v)), is_causal=causal
    )
    return y.reshape(*y.shape[:-2], -1)


def rotated(x: jax.Array, heads: int) -> jax.Array:
    """Apply rotary position embeddings to ``x [batch, tokens, width]``."""
    x = x.reshape(*x.shape[:-1], heads, -1)
    half = x.shape[-1] // 2
    angle = jnp.outer(jnp.arange(x.shape[1]), 1e4 ** (-jnp.arange(half) / half))
    cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return y.reshape(*y.shape[:-2], -1)


def _attention(get, x, shape):
    qkv = (get(name)(x) for name in ("query", "key", "value"))
    return get("out")(attend(*qkv, shape.heads, causal=False))


def _mlp(get, x):
    return get("down")(nn.gelu(get("up")(x)))


def bert_block(get, x, shape):
    x = get("attention_norm")(x + _attention(get, x, shape))
    return get("mlp_norm")(x + _mlp(get, x))


def bert(get, layers, ids, shape):
    x = get("embed")(ids) + get("position")(jnp.arange(shape.length)[None])
    x = layers(get("embed_norm")(x))
    return get("head")(jnp.tanh(get("pooler")(x[:, 0])))


def vit_block(get, x, shape):
    x = x + _attention(get, get("attention_norm")(x), shape)
    return x + _mlp(get, get("mlp_norm")(x))


def vit(get, layers, images, shape):
    x = get("embed")(images)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    first = get("first")(jnp.zeros((x.shape[0], 1), int))
    x = jnp.concatenate([first, x], axis=1) + get("position")(jnp.arange(shape.tokens)[None])
    return get("head")(get("norm")(layers(x))[:, 0])


def gpt_block(get, x, shape):
    qkv = jnp.split(get("qkv")(get("attention_norm")(x)), 3, axis=-1)
    x = x + get("out")(attend(*qkv, shape.heads, causal=True))
    return x + _mlp(get, get("mlp_norm")(x))


def gpt(get, layers, ids, shape):
    x = get("embed")(ids) + get("position")(jnp.arange(shape.length)[None])
    return get("head")(get("norm")(layers(x)))


def llama_block(get, x, shape):
    h = get("attention_norm")(x)
    q, k = (rotated(get(name)(h), shape.heads) for name in ("query", "key"))
    x = x + get("out")(attend(q, k, get("value")(h), shape.heads, causal=True))
    h = get("mlp_norm")(x)
    return x + get("down")(nn.silu(get("gate")(h)) * get("up")(h))


def llama(get, layers, ids, shape):
    return get("head")(get("norm")(layers(get("embed")(ids))))


def _same(kind, names, *sizes):
    return dict.fromkeys(names.split(), (kind, *sizes))


_NORMS = _same("norm", "attention_norm mlp_norm", "width")
_MLP = {"up": ("dense", "width", "hidden"), "down": ("dense", "hidden", "width")}
_ENCODER = {**_same("dense", "query key value out", "width", "width"), **_MLP, **_NORMS}
_TEXT = {"embed": ("embed", "vocabulary", "width"), "position": ("embed", "length", "width")}
_LOGITS = {"norm": ("norm", "width"), "head": ("bare", "width", "vocabulary")}
NETWORKS = {
    "bert": Network(
        _ENCODER,
        {
            **_TEXT,
            "embed_norm": ("norm", "width"),
            "pooler": ("dense", "width", "width"),
            "head": ("dense", "width", "classes"),
        },
        bert_block,
        bert,
    ),
    "vit": Network(
        _ENCODER,
        {
            "embed": ("patches", "colours", "width"),
            "first": ("embed", "one", "width"),
            "position": ("embed", "tokens", "width"),
            "norm": ("norm", "width"),
            "head": ("dense", "width", "classes"),
        },
        vit_block,
        vit,
    ),
    "gpt": Network(
        {
            "qkv": ("dense", "width", "three"),
            "out": ("dense", "width", "width"),
            **_MLP,
            **_NORMS,
        },
        {**_TEXT, **_LOGITS},
        gpt_block,
        gpt,
    ),
    "llama": Network(
        {
            **_same("bare", "query key value out", "width", "width"),
            **_same("bare", "gate up", "width", "hidden"),
            "down": ("bare", "hidden", "width"),
            **_same("scale", "attention_norm mlp_norm", "width"),
        },
        {
            "embed": ("embed", "vocabulary", "width"),
            "norm": ("scale", "width"),
            "head": ("bare", "width", "vocabulary"),
        },
        llama_block,
        llama,
    ),
}


def linen_layer(shape: Shape, table: Table, name: str) -> nn.Module:
    kind, *sizes = table[name]
    size = [shape.size(size) for size in sizes]
    how: dict[str, Any] = {"name": name, "dtype": shape.dtype, "param_dtype": shape.dtype}
    if kind == "embed":
        return nn.Embed(*size, **how)
    if kind == "patches":
        return nn.Conv(size[1], (shape.patch,) * 2, shape.patch, **how)
    if kind in ("dense", "bare"):
        return nn.Dense(size[1], use_bias=kind == "dense", **how)
    return nn.RMSNorm(**how) if kind == "scale" else nn.LayerNorm(**how)


def nnx_layer(shape: Shape, table: Table, name: str, rngs: nnx.Rngs) -> nnx.Module:
    kind, *sizes = table[name]
    size = [shape.size(size) for size in sizes]
    how: dict[str, Any] = {"dtype": shape.dtype, "param_dtype": shape.dtype, "rngs": rngs}
    if kind == "embed":
        return nnx.Embed(*size, **how)
    if kind == "patches":
        return nnx.Conv(*size, (shape.patch,) * 2, shape.patch, **how)
    if kind in ("dense", "bare"):
        return nnx.Linear(*size, use_bias=kind == "dense", **how)
    return nnx.RMSNorm(*size, **how) if kind == "scale" else nnx.LayerNorm(*size, **how)


class LinenBlock(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x, _=None):
        network = NETWORKS[self.shape.kind]
        get = functools.partial(linen_layer, self.shape, network.block)
        return network.run_block(get, x, self.shape), None


class Linen(nn.Module):
    """Model of a ``Shape`` in ``flax.linen``."""

    shape: Shape

    @nn.compact
    def __call__(self, inputs):
        def layers(x):
            if self.shape.scan:
                stack = nn.scan(
                    nn.remat(LinenBlock, prevent_cse=False),
                    variable_axes={"params": 0},
                    split_rngs={"params": True, "dropout": True},
                    length=self.shape.depth,
                )
                return stack(self.shape, name="layers")(x, None)[0]
            for i in range(self.shape.depth):
                x, _ = LinenBlock(self.shape, name=f"layer_{i}")(x)
            return x

        network = NETWORKS[self.shape.kind]
        get = functools.partial(linen_layer, self.shape, network.ends)
        return network.run(get, layers, inputs, self.shape)


class NnxBlock(nnx.Module):
    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        self.shape = shape
        for name in NETWORKS[shape.kind].block:
            setattr(self, name, nnx_layer(shape, NETWORKS[shape.kind].block, name, rngs))

    def __call__(self, x):
        get = functools.partial(getattr, self)
        return NETWORKS[self.shape.kind].run_block(get, x, self.shape)


class Nnx(nnx.Module):
    """Model of a ``Shape`` in ``flax.nnx``, with the same parameter names as ``Linen``."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        self.shape = shape
        for name in NETWORKS[shape.kind].ends:
            setattr(self, name, nnx_layer(shape, NETWORKS[shape.kind].ends, name, rngs))
        if shape.scan:

            def make(rngs):
                return NnxBlock(shape, rngs)

            self.layers = nnx.split_rngs(splits=shape.depth)(nnx.vmap(make))(rngs)
        else:
            for i in range(shape.depth):
                setattr(self, f"layer_{i}", NnxBlock(shape, rngs))

    def __call__(self, inputs):
        def layers(x):
            if self.shape.scan:
                call = nnx.remat(lambda block, x: block(x), prevent_cse=False)
                return nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
            for i in range(self.shape.depth):
                x = getattr(self, f"layer_{i}")(x)
            return x

        get = functools.partial(getattr, self)
        return NETWORKS[self.shape.kind].run(get, layers, inputs, self.shape)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy over all labels, computed in float32."""
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logits, labels[..., None], -1))


def data(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a random batch: the model's inputs and the labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, shape.classes, shape.batch, dtype=np.int32)
    if shape.kind == "vit":
        images = random.standard_normal((shape.batch, shape.image, shape.image, 3), np.float32)
        return images.astype(jnp.dtype(shape.dtype)), labels
    ids = random.integers(0, shape.vocabulary, (shape.batch, shape.length + 1), dtype=np.int32)
    return (ids[:, :-1], labels) if shape.kind == "bert" else (ids[:, :-1], ids[:, 1:])
