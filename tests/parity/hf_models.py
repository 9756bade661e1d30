"""Tiny, randomly initialised transformers models, and the names of their layers in Flax.

The correspondence is written by hand, module by module and slice by slice, as a reference for the
package's name maps.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora

torch = pytest.importorskip("torch", reason="needs torch: pip install '.[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install '.[parity]'"
)
torch.set_num_threads(1)

LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY = 2, 16, 24, 2, 40
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


@functools.cache
def _model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
        return transformers.BertForSequenceClassification(config)
    if family == "vit":
        config = transformers.ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            initializer_range=0.2,
        )
        return transformers.ViTForImageClassification(config)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            initializer_range=0.2,
        )
        return transformers.GPT2LMHeadModel(config)
    kind = {"llama": "Llama", "gemma": "Gemma", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{kind}Config")(**DECODER, initializer_range=0.2)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def model(family: str) -> Any:
    return copy.deepcopy(_model(family)).eval()


def logits(model: Any) -> np.ndarray:
    """Compute the logits of a fixed batch."""
    if model.config.model_type == "vit":
        batch = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
    else:
        batch = {"input_ids": torch.arange(14).reshape(2, 7) * 5 % VOCABULARY}
    with torch.no_grad():
        return model(**batch).logits.float().numpy()


class Piece(NamedTuple):
    """One PyTorch module, or a part of its outputs, in one adapter."""

    index: tuple[int, ...]  # the slice of the adapter's stack
    module: str
    ours: slice = slice(None)  # of the adapter's outputs
    theirs: slice = slice(None)  # of the module's outputs


Layout = dict[str, tuple[tuple[int, ...], list[Piece]]]  # {path: (stack, pieces)}


def _separate(form: str, pairs: dict[str, str], hf: str) -> Layout:
    return {
        form.format(i=i) + ours: ((), [Piece((), f"{hf}.{i}.{theirs}")])
        for i in range(LAYERS)
        for ours, theirs in pairs.items()
    }


def _stacked(form: str, pairs: dict[str, str], hf: str) -> Layout:
    return {
        form + ours: ((LAYERS,), [Piece((i,), f"{hf}.{i}.{theirs}") for i in range(LAYERS)])
        for ours, theirs in pairs.items()
    }


def _slashes(*names: str) -> dict[str, str]:
    return {name.replace(".", "/"): name for name in names}


BERT = _slashes("attention.self.query", "attention.self.value", "intermediate.dense")
BERT |= _slashes("attention.self.key", "attention.output.dense", "output.dense")
FLAX_BERT = {"attention/query": "attention.self.query", "attention/out": "attention.output.dense"}
VIT = {f"attention/attention/{n}": f"attention.{n[0]}_proj" for n in ("query", "key", "value")}
VIT |= {"attention/output/dense": "attention.o_proj", "output/dense": "mlp.fc2"}
VIT |= {"intermediate/dense": "mlp.fc1"}
FLAX_VIT = {"attention/query": "attention.q_proj", "attention/out": "attention.o_proj"}
LLAMA = _slashes("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA |= _slashes("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TUNIX = {f"attn/{n}_proj": f"self_attn.{n}_proj" for n in "qkvo"}
TUNIX |= {f"mlp/{n}_proj": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
GPT2 = _slashes("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def _gpt2_apart() -> Layout:
    layout: Layout = {}
    for i in range(LAYERS):
        for k, name in enumerate(("query", "key", "value")):
            part = slice(k * WIDTH, (k + 1) * WIDTH)
            piece = Piece((), f"transformer.h.{i}.attn.c_attn", theirs=part)
            layout[f"h_{i}/attn/{name}"] = (), [piece]
        layout[f"h_{i}/attn/out"] = (), [Piece((), f"transformer.h.{i}.attn.c_proj")]
    return layout


def _gemma(gating_is_stacked: bool) -> Layout:
    """Return the layout of google-deepmind/gemma."""
    layout: Layout = {}
    for i in range(LAYERS):
        hf = f"model.layers.{i}"
        at = f"layer_{i}/"
        layout[f"{at}attn/q_einsum"] = (), [Piece((), f"{hf}.self_attn.q_proj")]
        layout[f"{at}attn/attn_vec_einsum"] = (), [Piece((), f"{hf}.self_attn.o_proj")]
        both = [Piece((k,), f"{hf}.self_attn.{n}_proj") for k, n in enumerate("kv")]
        layout[f"{at}attn/kv_einsum"] = (2,), both
        if gating_is_stacked:
            gates = [Piece((k,), f"{hf}.mlp.{n}_proj") for k, n in enumerate(("gate", "up"))]
            layout[f"{at}mlp/gating_einsum"] = (2,), gates
        else:
            gates = [
                Piece((), f"{hf}.mlp.{n}_proj", ours=slice(k * HIDDEN, (k + 1) * HIDDEN))
                for k, n in enumerate(("gate", "up"))
            ]
            layout[f"{at}mlp/gating_einsum"] = (), gates
        layout[f"{at}mlp/linear"] = (), [Piece((), f"{hf}.mlp.down_proj")]
    return layout


def _scanned_gemma() -> Layout:
    pieces = [
        Piece((i, k), f"model.layers.{i}.self_attn.{n}_proj")
        for i in range(LAYERS)
        for k, n in enumerate("kv")
    ]
    return {"layers/attn/kv_einsum": ((LAYERS, 2), pieces)}


LAYOUTS: dict[str, tuple[str, Layout]] = {
    "bert": ("bert", _separate("bert/encoder/layer/{i}/", BERT, "bert.encoder.layer")),
    "bert, stacked": ("bert", _stacked("bert/encoder/layer/", BERT, "bert.encoder.layer")),
    "bert, Flax": ("bert", _separate("encoder/layers_{i}/", FLAX_BERT, "bert.encoder.layer")),
    "gpt2": ("gpt2", _separate("transformer/h/{i}/", GPT2, "transformer.h")),
    "gpt2, q k v apart": ("gpt2", _gpt2_apart()),
    "llama": ("llama", _separate("model/layers/{i}/", LLAMA, "model.layers")),
    "llama, Tunix": ("llama", _separate("layers/{i}/", TUNIX, "model.layers")),
    "llama, stacked": ("llama", _stacked("layers/", TUNIX, "model.layers")),
    "gemma": ("gemma", _separate("model/layers/{i}/", LLAMA, "model.layers")),
    "gemma, DeepMind": ("gemma", _gemma(gating_is_stacked=True)),
    "gemma, gates in one": ("gemma", _gemma(gating_is_stacked=False)),
    "gemma, scanned": ("gemma", _scanned_gemma()),
    "vit": ("vit", _separate("vit/encoder/layer/{i}/", VIT, "vit.layers")),
    "vit, stacked": ("vit", _stacked("encoder/layers/", FLAX_VIT, "vit.layers")),
    "qwen2": ("qwen2", _separate("model/layers_{i}/", LLAMA, "model.layers")),
    "qwen3, Tunix": ("qwen3", _separate("layers/{i}/", TUNIX, "model.layers")),
}


def weight(model: Any, name: str) -> Any:
    """Return the weight of a module as a view ``[out, in]``, also for Conv1D."""
    module = model.get_submodule(name)
    turned = type(module).__name__ == "Conv1D"
    return module.weight.data.T if turned else module.weight.data


def adapters(layout: Layout, model: Any, config: adalora.AdaLoraConfig, seed: int = 0):
    """Return random adapters of the right sizes, and masks of all ranks from 0 on."""
    rng = np.random.default_rng(seed)
    result, masks = {}, {}
    for number, (path, (stack, pieces)) in enumerate(layout.items()):
        outs, ins = weight(model, pieces[0].module).shape
        if pieces[0].ours != slice(None):
            outs = max(piece.ours.stop for piece in pieces)
        if pieces[0].theirs != slice(None):
            outs = pieces[0].theirs.stop - pieces[0].theirs.start
        key = jax.random.key(seed + number)
        rank = config.spec_of(path).init_r
        result[path] = adalora.init_adapter(key, ins, outs, config, rank=rank, stack=stack)
        masks[path] = rng.random((*stack, rank)) < rng.random((*stack, 1)) * 1.2
    first, (stack, _) = next(iter(layout.items()))
    masks[first][(0,) * len(stack)] = False  # a rank of 0
    return result, {path: jnp.asarray(mask) for path, mask in masks.items()}


def deltas(
    layout: Layout, adapters, config: adalora.AdaLoraConfig
) -> Iterator[tuple[str, slice, np.ndarray]]:
    """Yield each module's increment ``[out, in]`` for some of its outputs, by the dense formula."""
    for path, (_, pieces) in layout.items():
        dense = np.asarray(adalora.delta_weight(adapters[path]))
        for piece in pieces:
            yield piece.module, piece.theirs, dense[piece.index].T[piece.ours]


def with_increments(family: str, layout: Layout, adapters, config) -> Any:
    """Return the plain PyTorch model with all increments added to its weights by hand."""
    plain = model(family)
    for name, part, delta in deltas(layout, adapters, config):
        weight(plain, name)[part] += torch.tensor(delta)
    return plain
