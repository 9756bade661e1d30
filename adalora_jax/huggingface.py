"""Hugging Face files: PEFT adapters and base model checkpoints. PyTorch is not required.

========================  =========================================================================
:func:`save_pretrained`   writes an AdaLoRA adapter that PEFT loads
:func:`save_as_lora`      writes an equivalent plain LoRA adapter, for PEFT and serving engines
:func:`load_pretrained`   reads an AdaLoRA or LoRA adapter of PEFT, as :class:`LoadedAdapter`
:func:`merge_pretrained`  writes the base model's checkpoint with the increments in its weights
:func:`load_base`         reads the base model's checkpoint as the parameters of a Flax model
:class:`NameMap`          maps layer names between Flax and PyTorch models
:func:`hf_names`          returns the :class:`NameMap` of a model family
========================  =========================================================================
"""

from adalora_jax._src.huggingface.adapters import (
    LoadedAdapter,
    load_pretrained,
    save_as_lora,
    save_pretrained,
)
from adalora_jax._src.huggingface.base import load_base
from adalora_jax._src.huggingface.merging import merge_pretrained
from adalora_jax._src.huggingface.names import NameMap, hf_names

__all__ = [
    "LoadedAdapter",
    "NameMap",
    "hf_names",
    "load_base",
    "load_pretrained",
    "merge_pretrained",
    "save_as_lora",
    "save_pretrained",
]
