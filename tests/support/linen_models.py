"""Small linen models as users write them, without any code for adapters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class GptBlock(nn.Module):
    """Pre-norm causal attention and MLP."""

    @nn.compact
    def __call__(self, x, deterministic):
        mask = nn.make_causal_mask(x[..., 0])
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadAttention(2, dropout_rate=0.1)(
            h, mask=mask, deterministic=deterministic
        )
        h = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1)(nn.Dense(8, name="down")(h), deterministic=deterministic)


class Gpt(nn.Module):
    """A decoder with a tied head."""

    @nn.compact
    def __call__(self, ids, deterministic=True):
        embed = nn.Embed(11, 8, name="wte")
        x = embed(ids) + nn.Embed(16, 8, name="wpe")(jnp.arange(ids.shape[-1]))[None]
        for i in range(2):
            x = GptBlock(name=f"h_{i}")(x, deterministic)
        return embed.attend(nn.LayerNorm()(x))


class Bert(nn.Module):
    """An encoder with padding mask, segment embeddings and a pooler; setup style."""

    def setup(self):
        self.words = nn.Embed(11, 8)
        self.segments = nn.Embed(2, 8)
        self.norm = nn.LayerNorm()
        self.attention = [nn.MultiHeadDotProductAttention(2) for _ in range(2)]
        self.intermediate = [nn.Dense(16) for _ in range(2)]
        self.output = [nn.Dense(8) for _ in range(2)]
        self.dropout = nn.Dropout(0.1)
        self.pooler = nn.Dense(8)
        self.classifier = nn.Dense(3)

    def __call__(self, ids, train=False):
        mask = nn.make_attention_mask(ids > 0, ids > 0)
        x = self.norm(self.words(ids) + self.segments(jnp.zeros_like(ids)))
        for attention, up, down in zip(self.attention, self.intermediate, self.output):
            x = self.norm(x + attention(x, mask=mask, deterministic=not train))
            x = self.norm(x + self.dropout(down(nn.gelu(up(x))), deterministic=not train))
            self.sow("intermediates", "hidden", x)
        return self.classifier(jnp.tanh(self.pooler(x[:, 0])))


def rotary(x):
    """Apply rotary position embedding to ``[batch, time, heads, 2 n]``."""
    time, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(time)[:, None] / 100.0 ** (jnp.arange(half)[None] / half)
    sin, cos = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def grouped_attention(q, k, v):
    """Compute causal attention in which several query heads share a key head."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(causal[None, None, None], scores, -1e9)
    mixed = jnp.einsum("bkgts,bskh->btkgh", nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


class LlamaBlock(nn.Module):
    """RMSNorm, rotary grouped-query attention, SwiGLU; a body for nn.scan."""

    width: int = 8
    heads: int = 4
    groups: int = 2
    head: int = 2
    hidden: int = 12
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, _):
        def project(heads, name):
            return nn.DenseGeneral((heads, self.head), use_bias=False, dtype=self.dtype, name=name)

        dense = lambda size, name: nn.Dense(size, use_bias=False, dtype=self.dtype, name=name)
        h = nn.RMSNorm(dtype=self.dtype)(x)
        q, k = rotary(project(self.heads, "q")(h)), rotary(project(self.groups, "k")(h))
        mixed = grouped_attention(q, k, project(self.groups, "v")(h))
        out = nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="o")
        x = x + out(mixed)
        h = nn.RMSNorm(dtype=self.dtype)(x)
        h = nn.silu(dense(self.hidden, "gate")(h)) * dense(self.hidden, "up")(h)
        return x + dense(self.width, "down")(h), None


class Llama(nn.Module):
    """Scanned and rematerialised layers."""

    vocabulary: int = 11
    depth: int = 3
    block: LlamaBlock = LlamaBlock(parent=None)

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.block.width, dtype=self.block.dtype, name="embed")(ids)
        fields = {n: getattr(self.block, n) for n in ("width", "heads", "groups", "head", "hidden")}
        layers = nn.scan(
            nn.remat(LlamaBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(**fields, dtype=self.block.dtype, name="layers")(x, None)
        x = nn.RMSNorm(dtype=self.block.dtype)(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=self.block.dtype, name="lm_head")(x)


class Vit(nn.Module):
    """A vision transformer."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, 8)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 8))
        for i in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attention_{i}")(h, h)
            h = nn.gelu(nn.Dense(16, name=f"up_{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dropout(0.1, deterministic=not train)(nn.Dense(8, name=f"down_{i}")(h))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x)[:, 0])


class Unet(nn.Module):
    """Down, up and a skip connection, with residual blocks and batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        def block(x, features):
            norm = lambda x: nn.BatchNorm(use_running_average=not train)(x)
            h = nn.relu(norm(nn.Conv(features, (3, 3))(x)))
            h = norm(nn.Conv(features, (3, 3), feature_group_count=2)(h))
            return nn.relu(h + nn.Conv(features, (1, 1))(x))

        skip = block(x, 4)
        h = block(nn.max_pool(skip, (2, 2), (2, 2)), 6)
        h = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(h)
        return nn.Conv(2, (1, 1), name="head")(block(jnp.concatenate([skip, h], -1), 4))


class Moe(nn.Module):
    """A router and expert kernels; top-1 by a mask."""

    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 3) * gates
        routed = jnp.einsum("te,td->etd", chosen, x)
        h = nn.relu(nn.Einsum((3, 5, 7), "etd,edf->etf", use_bias=False, name="up")(routed))
        h = nn.Einsum((3, 7, 5), "etf,efd->etd", use_bias=False, name="down")(h)
        self.sow("losses", "load", jnp.sum(jnp.mean(chosen, 0) ** 2))
        return x + h.sum(0)


class Tagger(nn.Module):
    """Embeddings, a bidirectional LSTM, a tag for every word."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6)(ids)
        x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(4)), nn.RNN(nn.OptimizedLSTMCell(4)))(x)
        return nn.Dense(3, name="tags")(x)
