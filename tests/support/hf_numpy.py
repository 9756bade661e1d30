"""BERT and Llama in NumPy, computed from the tensors of a checkpoint as PyTorch would."""

from __future__ import annotations

import math

import numpy as np


def draw(shapes, seed, dtype="float32"):
    """Draw random tensors, with the norms' weights near 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape) * (0.3 if len(shape) > 1 else 0.1)
        is_scale = "norm" in name.lower() and name.endswith("weight")
        tensors[name] = (value + is_scale).astype(dtype)
    return tensors


def bert_tensors(s, seed=0, dtype="float32", prefix="", classes=0):
    d = s.width
    shapes = {
        "embeddings.word_embeddings.weight": (s.vocabulary, d),
        "embeddings.position_embeddings.weight": (s.positions, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(s.layers):
        at = f"encoder.layer.{i}"
        linear = {f"attention.self.{n}": (d, d) for n in ("query", "key", "value")}
        linear |= {"attention.output.dense": (d, d), "intermediate.dense": (s.hidden, d)}
        for name, shape in (linear | {"output.dense": (d, s.hidden)}).items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    shapes |= {f"{norm}.{end}": (d,) for norm in norms for end in ("weight", "bias")}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    if classes:
        shapes |= {"classifier.weight": (classes, d), "classifier.bias": (classes,)}
    return draw(shapes, seed, dtype)


def llama_tensors(s, seed=0, dtype="float32", prefix="model.", head=True):
    shapes = {"embed_tokens.weight": (s.vocabulary, s.width), "norm.weight": (s.width,)}
    for i in range(s.layers):
        at = f"layers.{i}"
        for name, out in (("q", s.heads), ("k", s.groups), ("v", s.groups)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out * s.head, s.width)
        shapes[f"{at}.self_attn.o_proj.weight"] = (s.width, s.heads * s.head)
        for name in ("gate", "up"):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (s.hidden, s.width)
        shapes[f"{at}.mlp.down_proj.weight"] = (s.width, s.hidden)
        for name in ("input", "post_attention"):
            shapes[f"{at}.{name}_layernorm.weight"] = (s.width,)
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    return draw(shapes | ({"lm_head.weight": (s.vocabulary, s.width)} if head else {}), seed, dtype)


class _Torch:
    """A checkpoint's tensors in float64, and PyTorch's layers on them."""

    def __init__(self, tensors, prefix):
        self.tensors = {n.removeprefix(prefix): np.asarray(t, float) for n, t in tensors.items()}

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def layer_norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def rms_norm(self, name, x):
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * scale * self.tensors[f"{name}.weight"]


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _heads(x, count):
    """Reshape ``[time, count · head]`` to ``[count, time, head]``."""
    return x.reshape(len(x), count, -1).transpose(1, 0, 2)


def _attention(q, k, v, mask):
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    mixed = _softmax(np.where(mask, scores, -1e9)) @ v
    return mixed.transpose(1, 0, 2).reshape(q.shape[1], -1)


def bert(tensors, s, ids, prefix=""):
    """Return hidden states and pooled output, or logits if there is a classifier."""
    t = _Torch(tensors, prefix)
    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    outputs = []
    for row in ids:
        table = lambda name: t.tensors[f"embeddings.{name}_embeddings.weight"]
        x = table("word")[row] + table("position")[: len(row)] + table("token_type")[0]
        x = t.layer_norm("embeddings.LayerNorm", x)
        for i in range(s.layers):
            at = f"encoder.layer.{i}"
            qkv = [t.linear(f"{at}.attention.self.{n}", x) for n in ("query", "key", "value")]
            mixed = _attention(*(_heads(y, s.heads) for y in qkv), True)
            x = x + t.linear(f"{at}.attention.output.dense", mixed)
            x = t.layer_norm(f"{at}.attention.output.LayerNorm", x)
            h = t.linear(f"{at}.output.dense", gelu(t.linear(f"{at}.intermediate.dense", x)))
            x = t.layer_norm(f"{at}.output.LayerNorm", x + h)
        pooled = np.tanh(t.linear("pooler.dense", x[0]))
        has_head = "classifier.weight" in t.tensors
        outputs.append(t.linear("classifier", pooled) if has_head else (x, pooled))
    return np.stack(outputs) if has_head else tuple(map(np.stack, zip(*outputs)))


def llama(tensors, s, ids, prefix="model."):
    """Return the logits."""
    t = _Torch(tensors, prefix)
    half = s.head // 2
    turn = np.exp(1j * np.arange(ids.shape[1])[:, None] / 10_000.0 ** (np.arange(half) / half))

    def rotated(x):
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    outputs = []
    for row in ids:
        x = t.tensors["embed_tokens.weight"][row]
        for i in range(s.layers):
            at = f"layers.{i}"
            h = t.rms_norm(f"{at}.input_layernorm", x)
            q, k, v = (
                _heads(t.linear(f"{at}.self_attn.{name}_proj", h), count)
                for name, count in (("q", s.heads), ("k", s.groups), ("v", s.groups))
            )
            mask = np.tril(np.ones((len(row), len(row)), bool))
            mixed = _attention(rotated(q), rotated(k), v, mask)
            x = x + t.linear(f"{at}.self_attn.o_proj", mixed)
            h = t.rms_norm(f"{at}.post_attention_layernorm", x)
            gate = t.linear(f"{at}.mlp.gate_proj", h)
            up = t.linear(f"{at}.mlp.up_proj", h)
            x = x + t.linear(f"{at}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        x = t.rms_norm("norm", x)
        outputs.append(x @ t.tensors.get("lm_head.weight", t.tensors["embed_tokens.weight"]).T)
    return np.stack(outputs)
