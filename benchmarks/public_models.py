"""Tiny configurations of public models, for ``python -m benchmarks.models``.

Nothing of these models is changed: each is built from its own class, and is called with the
arguments that its own project passes. A family is imported only when it is checked.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def direct(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the outputs of an NNX model that is called with its inputs."""
    return model(*args, **kwargs)


class Case(NamedTuple):
    """A model with its inputs.

    Attributes:
      model: a linen module, or an NNX model.
      variables: the linen model's variables; None for NNX.
      args, kwargs: arguments of ``module.apply`` or of ``call``.
      call: runs an NNX model.
      options: changes of the config, of layers that cannot be adapted together.
    """

    model: Any
    variables: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Callable[..., Any] = direct
    options: dict[str, Any] = {}  # noqa: RUF012


Builds = dict[str, Callable[[], Case]]

TITLES = {
    "huggingface": "Hugging Face's Flax models",
    "tunix": "Tunix",
    "gemma": "Google DeepMind's gemma",
    "bonsai": "bonsai",
    "flax": "Flax's examples",
}
INSTALL = {
    "huggingface": "pip install 'transformers<5'",
    "tunix": "pip install '.[tunix]'",
    "gemma": "pip install '.[gemma]'",
    "bonsai": "--path FOLDER, a checkout of jax-ml/bonsai",
    "flax": "--path FOLDER, the examples of a checkout of google/flax",
}


def package(family: str) -> str | None:
    """Return the package of a family and its version; None if it is not installed."""
    modules = {"huggingface": "transformers", "flax": "lm1b"}
    if importlib.util.find_spec(modules.get(family, family)) is None:
        return None
    names = {"huggingface": "transformers", "tunix": "google-tunix", "gemma": "gemma"}
    if family not in names:
        return f"a checkout of {'jax-ml/bonsai' if family == 'bonsai' else 'google/flax'}"
    version = importlib.metadata.version(names[family])
    if family == "huggingface" and int(version.partition(".")[0]) >= 5:
        return None  # has no Flax models
    return f"{names[family]} {version}"


def cases(family: str) -> Builds:
    """Return ``{name: function that builds the model}`` of a family."""
    builders = {
        "huggingface": huggingface,
    }
    return builders[family]()


IDS = np.arange(12).reshape(2, 6) * 5 % 29 + 2
WIDE, HEADS, HIDDEN, VOCABULARY = 16, 2, 24, 31


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
    variables = jax.tree.map(_noisy, jax.tree_util.tree_map(np.asarray, dict(variables)))
    return Case(module, variables, args, {**kwargs, "mutable": False})


def _noisy(leaf: np.ndarray) -> jax.Array:
    """Return a parameter with noise, since some weights start at zero and pass on no gradient."""
    if leaf.ndim < 2 or not np.issubdtype(leaf.dtype, np.floating):
        return jnp.asarray(leaf)
    noise = np.random.default_rng(leaf.size).normal(size=leaf.shape)
    return jnp.asarray(leaf + 0.1 * noise, leaf.dtype)


def huggingface() -> Builds:
    """Return the Flax models of transformers 4."""
    transformers = importlib.import_module("transformers")
    bert = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDE,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 16,
    }
    llama = {**bert, "num_key_value_heads": 1, "pad_token_id": 0}
    gpt = {"vocab_size": VOCABULARY, "n_embd": WIDE, "n_layer": 2, "n_head": HEADS}
    gpt |= {"n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
    t5 = {"vocab_size": VOCABULARY, "d_model": WIDE, "d_kv": 8, "d_ff": HIDDEN, "num_layers": 2}
    t5 |= {"num_heads": HEADS, "decoder_start_token_id": 0}
    bart = {
        "vocab_size": VOCABULARY,
        "d_model": WIDE,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": HIDDEN,
        "decoder_ffn_dim": HIDDEN,
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
    pixels = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("f4")}
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    text, vision = {**bert, "eos_token_id": 30}, image
    projection = {"projection_dim": 12}
    audio = np.random.default_rng(0).normal(size=(2, 8, 12)).astype("f4")
    speech = {"input_features": audio, "decoder_input_ids": IDS[:, :4]}
    whisper = {**bart, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}
    whisper = {k: v for k, v in whisper.items() if k != "max_position_embeddings"}
    wave = np.random.default_rng(0).normal(size=(2, 400)).astype("f4")
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
                "dim": WIDE,
                "n_layers": 2,
                "n_heads": HEADS,
                "hidden_dim": HIDDEN,
                "max_position_embeddings": 16,
            },
            ids,
        ),
        "FlaxRoFormerForMaskedLM": ("RoFormerConfig", {**bert, "embedding_size": WIDE}, ids),
        "FlaxGPT2Model": ("GPT2Config", gpt, ids),
        "FlaxGPT2LMHeadModel": ("GPT2Config", gpt, ids),
        "FlaxGPTNeoForCausalLM": (
            "GPTNeoConfig",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": WIDE,
                "num_layers": 2,
                "num_heads": HEADS,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 3,
                "max_position_embeddings": 16,
                "intermediate_size": HIDDEN,
            },
            ids,
        ),
        "FlaxGPTJForCausalLM": ("GPTJConfig", {**gpt, "rotary_dim": 4}, ids),
        "FlaxOPTForCausalLM": (
            "OPTConfig",
            {
                **{k: v for k, v in bert.items() if k != "intermediate_size"},
                "ffn_dim": HIDDEN,
                "word_embed_proj_dim": WIDE,
            },
            ids,
        ),
        "FlaxBloomForCausalLM": (
            "BloomConfig",
            {"vocab_size": VOCABULARY, "hidden_size": WIDE, "n_layer": 2, "n_head": HEADS},
            ids,
        ),
        "FlaxXGLMForCausalLM": (
            "XGLMConfig",
            {
                "vocab_size": VOCABULARY,
                "d_model": WIDE,
                "ffn_dim": HIDDEN,
                "num_layers": 2,
                "attention_heads": HEADS,
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
        "FlaxBartForSequenceClassification": ("BartConfig", bart, both),
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
