"""Files of Hugging Face: adapters for PEFT and from it, and the base's own. No torch needed.

========================  =====================================================================
:func:`save_pretrained`   an AdaLoRA adapter that PEFT loads
:func:`save_as_lora`      a plain LoRA adapter that computes the same, also for serving engines
:func:`load_pretrained`   an adapter that PEFT wrote, of either kind
:func:`merge_pretrained`  the base model's checkpoint with the increments in its weights
:func:`load_base`         the base model's checkpoint as the parameters of a Flax model
:class:`NameMap`          what layers are called in Flax and in PyTorch; :func:`hf_names` has some
========================  =====================================================================
"""

from adalora_jax._src.huggingface.adapters import (
    Loaded,
    load_pretrained,
    save_as_lora,
    save_pretrained,
)
from adalora_jax._src.huggingface.base import load_base
from adalora_jax._src.huggingface.merging import merge_pretrained
from adalora_jax._src.huggingface.names import NameMap, hf_names

__all__ = [
    "Loaded",
    "NameMap",
    "hf_names",
    "load_base",
    "load_pretrained",
    "merge_pretrained",
    "save_as_lora",
    "save_pretrained",
]
