"""Small NNX models as users write them, without any code for adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from support.linen_models import grouped_attention, rotary


class GptBlock(nnx.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.1, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norms[1](x)))))


class Gpt(nnx.Module):
    """A decoder with a tied head."""

    def __init__(self, rngs):
        self.wte, self.wpe = nnx.Embed(11, 8, rngs=rngs), nnx.Embed(16, 8, rngs=rngs)
        self.h = nnx.List([GptBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, ids):
        x = self.wte(ids) + self.wpe(jnp.arange(ids.shape[-1]))[None]
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.norm(x))


class Bert(nnx.Module):
    """An encoder with padding mask, segment embeddings and a pooler."""

    def __init__(self, rngs):
        self.words, self.segments = nnx.Embed(11, 8, rngs=rngs), nnx.Embed(2, 8, rngs=rngs)
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs) for _ in range(2)]
        )
        self.mlp = nnx.List(
            [
                nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 8, rngs=rngs))
                for _ in range(2)
            ]
        )
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.pooler, self.classifier = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, ids):
        mask = nnx.make_attention_mask(ids > 0, ids > 0)
        x = self.norm(self.words(ids) + self.segments(jnp.zeros_like(ids)))
        for attention, mlp in zip(self.attention, self.mlp):
            x = self.norm(x + attention(x, mask=mask))
            x = self.norm(x + mlp(x))
            self.sow(nnx.Intermediate, "hidden", x)
        return self.classifier(jnp.tanh(self.pooler(x[:, 0])))


class LlamaBlock(nnx.Module):
    """RMSNorm, rotary grouped-query attention by einsum, SwiGLU."""

    def __init__(self, rngs, width=8, heads=4, groups=2, head=2, hidden=12):
        einsum = lambda *args: nnx.Einsum(*args, rngs=rngs)
        linear = lambda *sizes: nnx.Linear(*sizes, use_bias=False, rngs=rngs)
        self.q = einsum("btd,dnh->btnh", (width, heads, head))
        self.kv = einsum("btd,cdkh->cbtkh", (2, width, groups, head))
        self.o = einsum("btnh,nhd->btd", (heads, head, width))
        self.gate, self.up, self.down = (
            linear(width, hidden),
            linear(width, hidden),
            linear(hidden, width),
        )
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        h = self.norms[0](x)
        k, v = self.kv(h)
        x = x + self.o(grouped_attention(rotary(self.q(h)), rotary(k), v))
        h = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """Layers stacked by nnx.vmap, run by nnx.scan over nnx.remat."""

    def __init__(self, rngs, depth=3, vocabulary=11, width=8, **sizes):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def layers(rngs):
            return LlamaBlock(rngs, width, **sizes)

        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = layers(rngs)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.lm_head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.lm_head(self.norm(run(self.embed(ids), self.layers)))


class Vit(nnx.Module):
    """A vision transformer, with one block."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 8, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 4, 8)))
        self.block = GptBlock(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, 8) + self.positions[...]
        return self.head(self.block(x).mean(axis=1))


class ResNet(nnx.Module):
    """Residual convolutions with batch norm."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.convs = nnx.List([nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms):
            x = x + nnx.relu(norm(conv(x)))
        return self.head(x.mean(axis=(1, 2)))


class Moe(nnx.Module):
    """A router and experts under nnx.vmap."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def experts(rngs):
            return nnx.Linear(5, 5, rngs=rngs)

        self.router, self.experts = nnx.Linear(5, 3, rngs=rngs), experts(rngs)

    def __call__(self, x):
        gates = nnx.softmax(self.router(x))
        each = nnx.vmap(lambda expert, x: jnp.tanh(expert(x)), in_axes=(0, None))
        return x + jnp.einsum("te,etd->td", gates, each(self.experts, x))


class Tagger(nnx.Module):
    """Embeddings, an LSTM, a tag for every word."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(6, 4, rngs=rngs), rngs=rngs)
        self.tags = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, ids):
        return self.tags(self.lstm(self.embed(ids)))
