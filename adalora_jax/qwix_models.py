"""NNX models in Qwix's own formats: quantised by ``qwix.quantize_model``, or with its LoRA.

A model that Qwix quantised stores each weight as one object of integers and scales. The class of
its root is one of Qwix's, which replaces JAX's products by those of quantised weights while the
model runs. :func:`adalora_jax.nnx.adapt` accepts such a model. :func:`as_lora` converts adapters to
the parameters of a Qwix LoRA.
"""

from adalora_jax._src.quantization.qwix_models import as_lora

__all__ = [
    "as_lora",
]
