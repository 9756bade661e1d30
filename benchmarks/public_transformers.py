"""Tiny configurations of the Flax models of transformers, for ``python -m benchmarks.models``.

Each model is built from its own class, and is called with the arguments that this class passes on.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.public_models import IDS, VOCABULARY, Builds, Case, floats, noisy


def _clip(x: Any, a_min: Any = None, a_max: Any = None, **new: Any) -> jax.Array:
    """Clip with the argument names of older versions of JAX, which T5's code uses."""
    low, high = new.get("min", a_min), new.get("max", a_max)
    x = x if low is None else jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)


class _Recorder:
    """A linen module that records the arguments with which its wrapper applies it."""

    def __init__(self, module: Any) -> None:
        self.module, self.calls = module, []

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((variables, args, kwargs))
        return self.module.apply(variables, *args, **kwargs)


def _transformers(name: str, config: Any, inputs: dict[str, Any], **options: Any) -> Case:
    """Return a model of transformers with the arguments that its own class passes on."""
    transformers = importlib.import_module("transformers")
    model = getattr(transformers, name)(config, seed=0, **options)
    module = model.module
    recorder = model._module = _Recorder(module)
    model(**inputs)
    variables, args, kwargs = recorder.calls[-1]
    variables = jax.tree.map(noisy, dict(variables))
    return Case(module, variables, args, {**kwargs, "mutable": False})


def cases() -> Builds:
    """Return the Flax models of transformers 4."""
    jnp.clip = _clip
    transformers = importlib.import_module("transformers")
    bert = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
    }
    llama = {**bert, "num_key_value_heads": 1, "pad_token_id": 0}
    gpt = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
    gpt |= {"n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
    t5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    t5 |= {"num_heads": 2, "decoder_start_token_id": 0}
    bart = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 16,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    image = {k: v for k, v in bert.items() if "vocab" not in k and "position" not in k}
    image |= {"image_size": 8, "patch_size": 4}
    ids = {"input_ids": IDS}
    ended = {"input_ids": np.where(IDS == 2, 3, IDS)}
    ended["input_ids"][:, -1] = bart["eos_token_id"]
    pixels = {"pixel_values": floats(2, 3, 8, 8)}
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    text, vision = {**bert, "eos_token_id": 30}, image
    projection = {"projection_dim": 12}
    audio = floats(2, 8, 12)
    speech = {"input_features": audio, "decoder_input_ids": IDS[:, :4]}
    whisper = {**bart, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}
    whisper = {k: v for k, v in whisper.items() if k != "max_position_embeddings"}
    wave = floats(2, 400)
    wav = {
        **{k: v for k, v in bert.items() if "position" not in k},
        "conv_dim": (8, 8),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
        "mask_time_prob": 0.0,
    }
    resnet = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    found: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "FlaxBertModel": ("BertConfig", bert, ids),
        "FlaxBertForMaskedLM": ("BertConfig", bert, ids),
        "FlaxBertForPreTraining": ("BertConfig", bert, ids),
        "FlaxBertForSequenceClassification": ("BertConfig", bert, ids),
        "FlaxRobertaForMaskedLM": ("RobertaConfig", bert, ids),
        "FlaxXLMRobertaForMaskedLM": ("XLMRobertaConfig", bert, ids),
        "FlaxRobertaPreLayerNormForMaskedLM": ("RobertaPreLayerNormConfig", bert, ids),
        "FlaxAlbertForMaskedLM": ("AlbertConfig", {**bert, "embedding_size": 12}, ids),
        "FlaxBigBirdForMaskedLM": (
            "BigBirdConfig",
            {**bert, "attention_type": "original_full"},
            ids,
        ),
        "FlaxElectraForMaskedLM": ("ElectraConfig", {**bert, "embedding_size": 12}, ids),
        "FlaxElectraForPreTraining": ("ElectraConfig", {**bert, "embedding_size": 12}, ids),
        "FlaxDistilBertForMaskedLM": (
            "DistilBertConfig",
            {
                "vocab_size": VOCABULARY,
                "dim": 16,
                "n_layers": 2,
                "n_heads": 2,
                "hidden_dim": 24,
                "max_position_embeddings": 16,
            },
            ids,
        ),
        "FlaxRoFormerForMaskedLM": ("RoFormerConfig", {**bert, "embedding_size": 16}, ids),
        "FlaxGPT2Model": ("GPT2Config", gpt, ids),
        "FlaxGPT2LMHeadModel": ("GPT2Config", gpt, ids),
        "FlaxGPTNeoForCausalLM": (
            "GPTNeoConfig",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 3,
                "max_position_embeddings": 16,
                "intermediate_size": 24,
            },
            ids,
        ),
        "FlaxGPTJForCausalLM": ("GPTJConfig", {**gpt, "rotary_dim": 4}, ids),
        "FlaxOPTForCausalLM": (
            "OPTConfig",
            {
                **{k: v for k, v in bert.items() if k != "intermediate_size"},
                "ffn_dim": 24,
                "word_embed_proj_dim": 16,
            },
            ids,
        ),
        "FlaxBloomForCausalLM": (
            "BloomConfig",
            {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
            ids,
        ),
        "FlaxXGLMForCausalLM": (
            "XGLMConfig",
            {
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "ffn_dim": 24,
                "num_layers": 2,
                "attention_heads": 2,
                "max_position_embeddings": 16,
            },
            ids,
        ),
        "FlaxLlamaForCausalLM": ("LlamaConfig", llama, ids),
        "FlaxMistralForCausalLM": ("MistralConfig", llama, ids),
        "FlaxGemmaForCausalLM": ("GemmaConfig", {**llama, "head_dim": 8}, ids),
        "FlaxT5ForConditionalGeneration": ("T5Config", t5, both),
        "FlaxT5EncoderModel": ("T5Config", t5, ids),
        "FlaxMT5ForConditionalGeneration": ("MT5Config", t5, both),
        "FlaxLongT5ForConditionalGeneration": (
            "LongT5Config",
            {**t5, "local_radius": 2},
            both,
        ),
        "FlaxBartForConditionalGeneration": ("BartConfig", bart, both),
        "FlaxBartForSequenceClassification": ("BartConfig", bart, ended),
        "FlaxMBartForConditionalGeneration": ("MBartConfig", bart, both),
        "FlaxPegasusForConditionalGeneration": ("PegasusConfig", bart, both),
        "FlaxMarianMTModel": ("MarianConfig", bart, both),
        "FlaxBlenderbotForConditionalGeneration": ("BlenderbotConfig", bart, both),
        "FlaxWhisperForConditionalGeneration": ("WhisperConfig", whisper, speech),
        "FlaxWhisperForAudioClassification": (
            "WhisperConfig",
            whisper,
            {"input_features": audio},
        ),
        "FlaxWav2Vec2Model": ("Wav2Vec2Config", wav, {"input_values": wave}),
        "FlaxWav2Vec2ForCTC": ("Wav2Vec2Config", wav, {"input_values": wave}),
        "FlaxViTModel": ("ViTConfig", image, pixels),
        "FlaxViTForImageClassification": ("ViTConfig", image, pixels),
        "FlaxBeitForImageClassification": (
            "BeitConfig",
            {**image, "vocab_size": VOCABULARY},
            pixels,
        ),
        "FlaxDinov2Model": ("Dinov2Config", image, pixels),
        "FlaxResNetForImageClassification": ("ResNetConfig", resnet, pixels),
        "FlaxRegNetForImageClassification": (
            "RegNetConfig",
            {**resnet, "layer_type": "y", "groups_width": 4},
            pixels,
        ),
        "FlaxCLIPModel": (
            "CLIPConfig",
            {
                "text_config": {**text, **projection},
                "vision_config": {**vision, **projection},
                **projection,
            },
            {**ids, **pixels},
        ),
        "FlaxCLIPTextModel": ("CLIPTextConfig", text, ids),
        "FlaxCLIPVisionModel": ("CLIPVisionConfig", vision, pixels),
    }
    sizes = {
        "FlaxBeitForImageClassification": (1, 8, 8, 3),
        "FlaxResNetForImageClassification": (1, 8, 8, 3),
        "FlaxRegNetForImageClassification": (1, 8, 8, 3),
        "FlaxWav2Vec2Model": (1, 400),
        "FlaxWav2Vec2ForCTC": (1, 400),
        "FlaxWhisperForConditionalGeneration": (1, 8, 12),
        "FlaxWhisperForAudioClassification": (1, 8, 12),
    }

    def build(name: str) -> Case:
        config, values, inputs = found[name]
        options = {"input_shape": sizes[name]} if name in sizes else {}
        return _transformers(name, getattr(transformers, config)(**values), inputs, **options)

    return {name: lambda name=name: build(name) for name in found}
