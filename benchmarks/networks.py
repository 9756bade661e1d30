"""The models of the benchmarks, each written once and run by ``flax.linen`` and ``flax.nnx`` alike.

A model is a function that asks for its layers by name. What it gets is a linen or an NNX layer, so
all that differs between two ways of adapting a model is how it is adapted. ``TABLE`` says which
layers there are. Dropout is the adapters' alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Get = Callable[[str], Callable[..., jax.Array]]  # a layer by its name


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch."""

    kind: str  # "bert", "vit", "gpt" or "llama"
    depth: int
    width: int
    hidden: int  # of the MLP
    heads: int
    batch: int
    length: int  # tokens of an example; of a ViT that follows from the image
    vocabulary: int = 1000
    classes: int = 10
    image: int = 0  # pixels of a side
    patch: int = 1
    scan: bool = False  # layers under a scan, their activations recomputed
    dtype: str = "float32"  # of weights, adapters and arithmetic

    @property
    def tokens(self) -> int:
        """What the layers see of an example."""
        return (self.image // self.patch) ** 2 + 1 if self.kind == "vit" else self.length

    def replace(self, **changes: Any) -> Shape:
        return dataclasses.replace(self, **changes)


# The kind of a layer, with the names of the sizes it goes from and to.
_MLP = {"up": ("dense", "width", "hidden"), "down": ("dense", "hidden", "width")}
_SEPARATE = {name: ("dense", "width", "width") for name in ("query", "key", "value", "out")}
_BIASED = _SEPARATE | _MLP | {name: ("norm", "width") for name in ("attention_norm", "mlp_norm")}
BLOCK: dict[str, Mapping[str, tuple[str, ...]]] = {
    "bert": _BIASED,
    "vit": _BIASED,
}
ENDS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "bert": {
        "embed": ("embed", "vocabulary", "width"),
        "position": ("embed", "length", "width"),
        "embed_norm": ("norm", "width"),
        "pooler": ("dense", "width", "width"),
        "head": ("dense", "width", "classes"),
    },
}


def attend(q: jax.Array, k: jax.Array, v: jax.Array, shape: Shape, causal: bool) -> jax.Array:
    split = lambda y: y.reshape(*y.shape[:-1], shape.heads, -1)
    y = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=causal)
    return y.reshape(*y.shape[:-2], -1)


def block(get: Get, x: jax.Array, shape: Shape) -> jax.Array:
    """One layer of the model."""
    attention = lambda x: get("out")(
        attend(*(get(n)(x) for n in ("query", "key", "value")), shape, causal=False)
    )
    mlp = lambda x: get("down")(nn.gelu(get("up")(x)))
    if shape.kind == "bert":
        x = get("attention_norm")(x + attention(x))
        return get("mlp_norm")(x + mlp(x))
    raise ValueError(f"kind={shape.kind!r} is no model.")


def model(get: Get, layers: Callable[[jax.Array], jax.Array], inputs: jax.Array, shape: Shape):
    """Inputs to logits; ``layers`` runs all blocks."""
    if shape.kind == "bert":
        x = get("embed")(inputs) + get("position")(jnp.arange(shape.length)[None])
        x = layers(get("embed_norm")(x))
        return get("head")(jnp.tanh(get("pooler")(x[:, 0])))
    raise ValueError(f"kind={shape.kind!r} is no model.")


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all labels, in float32."""
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logits, labels[..., None], -1))


def data(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A batch: inputs and labels."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, shape.vocabulary, (shape.batch, shape.length), dtype=np.int32)
    return ids, random.integers(0, shape.classes, shape.batch, dtype=np.int32)


def linen_layer(shape: Shape, table: Mapping[str, tuple[str, ...]], name: str) -> nn.Module:
    kind, *sizes = table[name]
    size = [getattr(shape, size) for size in sizes]
    same = {"name": name, "dtype": shape.dtype, "param_dtype": shape.dtype}
    if kind == "dense":
        return nn.Dense(size[-1], **same)
    if kind == "embed":
        return nn.Embed(*size, **same)
    return nn.LayerNorm(**same)


class LinenBlock(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x, _=None):
        get = functools.partial(linen_layer, self.shape, BLOCK[self.shape.kind])
        return block(get, x, self.shape), None


class Linen(nn.Module):
    """The model in ``flax.linen``."""

    shape: Shape

    @nn.compact
    def __call__(self, inputs):
        def layers(x):
            for i in range(self.shape.depth):
                x, _ = LinenBlock(self.shape, name=f"layer_{i}")(x)
            return x

        get = functools.partial(linen_layer, self.shape, ENDS[self.shape.kind])
        return model(get, layers, inputs, self.shape)
