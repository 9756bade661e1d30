"""Adapters on a base model in int8, int4 or NF4, quantised by Qwix, or loaded from GPTQ.

:func:`quantize` quantises the weights of a linen or NNX model by a :class:`Recipe`, and
:func:`load_gptq` loads a GPTQ checkpoint in its packed form. The adapters remain floating-point.
:func:`merge` adds the increments to the weights, in floating point or quantised again, and reports
the error.
"""

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
