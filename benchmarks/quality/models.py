"""Models of the study; their layers are stacked and scanned, so that they compile quickly."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adalora_jax.demo.methods import patches

DIGITS: dict[str, Any] = {"width": 64, "depth": 4, "heads": 4, "hidden": 64, "outputs": 10}
PROSE: dict[str, Any] = {
    **{"width": 128, "depth": 4, "heads": 4, "hidden": 512},
    **{"outputs": 128, "vocabulary": 128},
}
# Of crossover: narrow, so that few training examples exceed the capacity of their adapters.
FASHION: dict[str, Any] = {"width": 32, "depth": 4, "heads": 4, "hidden": 32, "outputs": 10}
TOPICS: dict[str, Any] = {
    **{"width": 64, "depth": 2, "heads": 4, "hidden": 128},
    **{"outputs": 128, "vocabulary": 128},
}
MINILM: dict[str, Any] = {"width": 384, "depth": 6, "heads": 12, "hidden": 1536}
WORDNET: dict[str, Any] = {**MINILM, "depth": 2}  # the last layers only, so that a core suffices


def scanned(block: Any, length: int) -> Any:
    """Return ``block`` as a scanned stack of ``length`` layers."""
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)


def attend(q, k, v, heads: int, mask=None, causal: bool = False) -> jax.Array:
    """Return multi-head attention of arrays ``[batch, tokens, width]``."""

    def split(y):
        return y.reshape(*y.shape[:-1], heads, -1)

    y = jax.nn.dot_product_attention(split(q), split(k), split(v), mask=mask, is_causal=causal)
    return y.reshape(q.shape)


class Block(nn.Module):
    """Transformer layer with normalisation before attention and MLP."""

    heads: int
    hidden: int
    causal: bool

    @nn.compact
    def __call__(self, x, _=None):
        width = x.shape[-1]
        y = nn.LayerNorm(name="attention_norm")(x)
        q, k, v = (nn.Dense(width, name=name)(y) for name in ("query", "key", "value"))
        x = x + nn.Dense(width, name="out")(attend(q, k, v, self.heads, causal=self.causal))
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(y))
        return x + nn.Dense(width, name="down")(y), None


class Transformer(nn.Module):
    """Vision Transformer of the demo; with a ``vocabulary``, a causal language model."""

    width: int
    depth: int
    heads: int
    hidden: int
    outputs: int
    vocabulary: int = 0

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        text = self.vocabulary > 0
        if text:
            x = nn.Embed(self.vocabulary, self.width, name="embed")(inputs)
        else:
            x = nn.Dense(self.width, name="embed")(patches(inputs))
        x = x + self.param("position", nn.initializers.normal(1.0), (1, *x.shape[1:]))
        stack = scanned(Block, self.depth)(self.heads, self.hidden, text, name="blocks")
        x = nn.LayerNorm(name="norm")(stack(x, None)[0])
        return nn.Dense(self.outputs, name="head")(x if text else x.mean(axis=1))


class BertLayer(nn.Module):
    """Layer of BERT; its modules have the names of transformers."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, state, _=None):
        x, mask = state
        width = x.shape[-1]
        q, k, v = (
            nn.Dense(width, name=f"attention_self_{name}")(x) for name in ("query", "key", "value")
        )
        y = nn.Dense(width, name="attention_output_dense")(attend(q, k, v, self.heads, mask))
        x = nn.LayerNorm(epsilon=1e-12, name="attention_output_LayerNorm")(x + y)
        y = nn.gelu(nn.Dense(self.hidden, name="intermediate_dense")(x), approximate=False)
        y = nn.Dense(width, name="output_dense")(y)
        x = nn.LayerNorm(epsilon=1e-12, name="output_LayerNorm")(x + y)
        return (x, mask), None


class SentenceEncoder(nn.Module):
    """BERT, followed by the mean over tokens and a classifier. Token 0 is padding.

    Without a ``vocabulary``, the inputs are hidden states ``[batch, tokens, width]`` instead of
    token ids, and rows of zeros are padding. Without ``outputs``, it returns such hidden states.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    outputs: int = 0
    vocabulary: int = 0
    positions: int = 0

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if self.vocabulary > 0:
            real = inputs != 0
            x = nn.Embed(self.vocabulary, self.width, name="word_embeddings")(inputs)
            places = jnp.arange(inputs.shape[1])[None]
            x = x + nn.Embed(self.positions, self.width, name="position_embeddings")(places)
            x = x + nn.Embed(2, self.width, name="token_type_embeddings")(jnp.zeros_like(places))
            x = nn.LayerNorm(epsilon=1e-12, name="embeddings_LayerNorm")(x)
        else:
            real = (inputs != 0).any(axis=-1)
            x = inputs.astype(jnp.float32)
        stack = scanned(BertLayer, self.depth)(self.heads, self.hidden, name="layers")
        (x, _), _ = stack((x, real[:, None, None, :]), None)
        weight = real[..., None].astype(x.dtype)
        if self.outputs == 0:
            return x * weight
        x = (x * weight).sum(axis=1) / weight.sum(axis=1)
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="head")(x)
