"""Adapters as files of Hugging Face PEFT: written for it, and read from it. No torch needed.

========================  =====================================================================
:func:`save_pretrained`   an AdaLoRA adapter that PEFT loads
:func:`save_as_lora`      a plain LoRA adapter that computes the same, also for serving engines
:func:`load_pretrained`   an adapter that PEFT wrote, of either kind
:func:`merge_pretrained`  the base model's checkpoint with the increments in its weights
:class:`NameMap`          what layers are called in Flax and in PyTorch; :func:`hf_names` has some
========================  =====================================================================
"""

from adalora_jax.peft.adapters import Loaded, load_pretrained, save_as_lora, save_pretrained
from adalora_jax.peft.merging import merge_pretrained
from adalora_jax.peft.names import NameMap, hf_names

__all__ = [
    "Loaded",
    "NameMap",
    "hf_names",
    "load_pretrained",
    "merge_pretrained",
    "save_as_lora",
    "save_pretrained",
]
