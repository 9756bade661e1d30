"""NNX models as Qwix has them: quantised by ``qwix.quantize_model``, or with its LoRA.

A model that Qwix quantised keeps each weight as integers and scales in one object, and its root has
a class of Qwix's, which puts products for quantised weights in place of JAX's while the model runs.
``nnx.adapt`` takes it as it is; what is here sees its weights as ours.
"""

from adalora_jax._src.quantization.qwix_models import as_lora

__all__ = [
    "as_lora",
]
