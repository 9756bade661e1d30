"""Adapters on a base in int8, int4 or NF4: Qwix quantises the weights, the adapters go on top."""

from adalora_jax._src.quantization.gptq import load_gptq
from adalora_jax._src.quantization.quantize import Merged, MergeLoss, Recipe, merge, quantize

__all__ = [
    "MergeLoss",
    "Merged",
    "Recipe",
    "load_gptq",
    "merge",
    "quantize",
]
