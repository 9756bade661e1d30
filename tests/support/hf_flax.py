"""BERT and Llama in Flax, with separate axes for heads and unrolled or stacked layers.

Modules are named as in transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class Sizes(NamedTuple):
    """Model sizes, named as in transformers' configs but shorter."""

    vocabulary: int = 40
    width: int = 16
    hidden: int = 24
    layers: int = 2
    heads: int = 2
    groups: int = 1  # key and value heads
    head: int = 8
    positions: int = 32


def scanned(block: Any, length: int) -> Any:
    """Stack ``block`` into scanned layers that all get the same further arguments."""
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
    )


def attend(q, k, v, mask):
    """Compute attention of ``[batch, time, heads, head]``, keys and values possibly grouped."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(mask, scores, -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def rotary(x, theta=10_000.0):
    """Apply rotary embedding, pairing the first half of a head's features with the second."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / theta ** (jnp.arange(half)[None] / half)
    sin, cos = (f(angle)[None, :, None] for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def causal(time):
    return jnp.tril(jnp.ones((time, time), bool))[None, None]


class SelfAttention(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        s = self.sizes
        q, k, v = (
            nn.DenseGeneral((s.heads, s.width // s.heads), name=name)(x)
            for name in ("query", "key", "value")
        )
        return attend(q, k, v, jnp.ones((1, 1, 1, 1), bool))


class AddAndNorm(nn.Module):
    width: int
    axes: Any = -1

    @nn.compact
    def __call__(self, x, residual):
        x = nn.DenseGeneral(self.width, axis=self.axes, name="dense")(x)
        return nn.LayerNorm(epsilon=1e-12, name="LayerNorm")(x + residual)


class BertAttention(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        mixed = SelfAttention(self.sizes, name="self")(x)
        return AddAndNorm(self.sizes.width, (-2, -1), name="output")(mixed, x)


class Intermediate(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.gelu(nn.Dense(self.hidden, name="dense")(x), approximate=False)


class BertLayer(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x, _=None):
        x = BertAttention(self.sizes, name="attention")(x)
        h = Intermediate(self.sizes.hidden, name="intermediate")(x)
        x = AddAndNorm(self.sizes.width, name="output")(h, x)
        return x, None


class BertEmbeddings(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, ids):
        s = self.sizes
        at = jnp.arange(ids.shape[1])[None]
        x = nn.Embed(s.vocabulary, s.width, name="word_embeddings")(ids)
        x = x + nn.Embed(s.positions, s.width, name="position_embeddings")(at)
        x = x + nn.Embed(2, s.width, name="token_type_embeddings")(jnp.zeros_like(ids))
        return nn.LayerNorm(epsilon=1e-12, name="LayerNorm")(x)


class BertEncoder(nn.Module):
    sizes: Sizes
    stacked: bool

    @nn.compact
    def __call__(self, x):
        if self.stacked:
            return scanned(BertLayer, self.sizes.layers)(self.sizes, name="layers")(x, None)[0]
        for i in range(self.sizes.layers):
            x, _ = BertLayer(self.sizes, name=f"layers_{i}")(x)
        return x


class Pooler(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(self.width, name="dense")(x[:, 0]))


class Bert(nn.Module):
    """The encoder, and a classifier on top of the pooler if there are classes."""

    sizes: Sizes = Sizes()
    stacked: bool = False
    classes: int = 0

    @nn.compact
    def __call__(self, ids):
        x = BertEmbeddings(self.sizes, name="embeddings")(ids)
        x = BertEncoder(self.sizes, self.stacked, name="encoder")(x)
        pooled = Pooler(self.sizes.width, name="pooler")(x)
        return nn.Dense(self.classes, name="classifier")(pooled) if self.classes else (x, pooled)


class LlamaAttention(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        s = self.sizes
        heads = lambda n, name: nn.DenseGeneral((n, s.head), use_bias=False, name=name)(x)
        q, k = rotary(heads(s.heads, "q_proj")), rotary(heads(s.groups, "k_proj"))
        mixed = attend(q, k, heads(s.groups, "v_proj"), causal(x.shape[1]))
        return nn.DenseGeneral(s.width, axis=(-2, -1), use_bias=False, name="o_proj")(mixed)


class LlamaMlp(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        dense = lambda size, name: nn.Dense(size, use_bias=False, name=name)
        gate = nn.silu(dense(self.sizes.hidden, "gate_proj")(x))
        return dense(self.sizes.width, "down_proj")(gate * dense(self.sizes.hidden, "up_proj")(x))


class LlamaLayer(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x, _=None):
        norm = lambda name: nn.RMSNorm(epsilon=1e-6, name=name)
        x = x + LlamaAttention(self.sizes, name="self_attn")(norm("input_layernorm")(x))
        x = x + LlamaMlp(self.sizes, name="mlp")(norm("post_attention_layernorm")(x))
        return x, None


class Llama(nn.Module):
    """A decoder with a separate output layer or tied embeddings."""

    sizes: Sizes = Sizes()
    stacked: bool = False
    attends: bool = False

    @nn.compact
    def __call__(self, ids):
        s = self.sizes
        embed = nn.Embed(s.vocabulary, s.width, name="embed_tokens")
        x = embed(ids)
        if self.stacked:
            x, _ = scanned(LlamaLayer, s.layers)(s, name="layers")(x, None)
        else:
            for i in range(s.layers):
                x, _ = LlamaLayer(s, name=f"layers_{i}")(x)
        x = nn.RMSNorm(epsilon=1e-6, name="norm")(x)
        if self.attends:
            return embed.attend(x)
        return nn.Dense(s.vocabulary, use_bias=False, name="lm_head")(x)


class NnxAttention(nnx.Module):
    """Attention with keys and values in one einsum weight."""

    def __init__(self, sizes, rngs):
        s = sizes
        self.q_proj = nnx.LinearGeneral(s.width, (s.heads, s.head), use_bias=False, rngs=rngs)
        self.kv = nnx.Einsum("btd,ckdh->cbtkh", (2, s.groups, s.width, s.head), rngs=rngs)
        self.o_proj = nnx.Einsum("btnh,nhd->btd", (s.heads, s.head, s.width), rngs=rngs)

    def __call__(self, x):
        k, v = self.kv(x)
        mixed = attend(rotary(self.q_proj(x)), rotary(k), v, causal(x.shape[1]))
        return self.o_proj(mixed)


class NnxMlp(nnx.Module):
    """An MLP with the gate and up projections in one layer."""

    def __init__(self, sizes, rngs):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.gate_up = linear(sizes.width, 2 * sizes.hidden)
        self.down_proj = linear(sizes.hidden, sizes.width)

    def __call__(self, x):
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down_proj(nnx.silu(gate) * up)


class NnxLlamaLayer(nnx.Module):
    def __init__(self, sizes, rngs):
        norm = lambda: nnx.RMSNorm(sizes.width, epsilon=1e-6, rngs=rngs)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn, self.mlp = NnxAttention(sizes, rngs), NnxMlp(sizes, rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class NnxLlama(nnx.Module):
    """Layers in a list, or stacked by nnx.vmap and run by nnx.scan."""

    def __init__(self, sizes=Sizes(), stacked=False, rngs=None):  # noqa: B008
        rngs = rngs or nnx.Rngs(0)
        self.embed_tokens = nnx.Embed(sizes.vocabulary, sizes.width, rngs=rngs)
        if stacked:
            make = nnx.split_rngs(splits=sizes.layers)(nnx.vmap(lambda r: NnxLlamaLayer(sizes, r)))
            self.layers = make(rngs)
        else:
            self.layers = nnx.List([NnxLlamaLayer(sizes, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.width, epsilon=1e-6, rngs=rngs)
        self.lm_head = nnx.Linear(sizes.width, sizes.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        if isinstance(self.layers, nnx.List):
            for layer in self.layers:
                x = layer(x)
        else:
            run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            x = run(x, self.layers)
        return self.lm_head(self.norm(x))


# Not in ``names="llama"``: the projections that share one weight.
NNX_LLAMA = [
    ("layers/{i}/self_attn/kv[0]", "model.layers.{i}.self_attn.k_proj"),
    ("layers/{i}/self_attn/kv[1]", "model.layers.{i}.self_attn.v_proj"),
    ("layers/self_attn/kv[{i},0]", "model.layers.{i}.self_attn.k_proj"),
    ("layers/self_attn/kv[{i},1]", "model.layers.{i}.self_attn.v_proj"),
    ("layers/{i}/mlp/gate_up:0/2", "model.layers.{i}.mlp.gate_proj"),
    ("layers/{i}/mlp/gate_up:1/2", "model.layers.{i}.mlp.up_proj"),
    ("layers/mlp/gate_up[{i}]:0/2", "model.layers.{i}.mlp.gate_proj"),
    ("layers/mlp/gate_up[{i}]:1/2", "model.layers.{i}.mlp.up_proj"),
]
