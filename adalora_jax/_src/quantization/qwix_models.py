"""NNX models as Qwix has them: quantised by ``qwix.quantize_model``, or with its LoRA.

A model that Qwix quantised keeps each weight as integers and scales in one object, and its root has
a class of Qwix's, which puts products for quantised weights in place of JAX's while the model runs.
``nnx.adapt`` takes it as it is; what is here sees its weights as ours.
"""

from __future__ import annotations

from typing import Any

import jax
import qwix
from flax import nnx

from adalora_jax._src.modules import layers, nnx_layers
from adalora_jax._src.quantization.packed import Packed

# What Qwix writes into the modules of a model.
_NOTES = {"qwix_path", "qwix_rngs", "disable_quant_stats_update"}


class QwixHeld(Packed):
    """One weight as Qwix holds it.

    Attributes:
      held: Qwix's object, with its variables.
      array: the same as a plain ``qwix.QArray``.
    """

    def __init__(self, held: Any):
        self.held = held
        self.array: qwix.QArray = nnx_layers.pure(held.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """That of the scales."""
        return self.array.scale.dtype

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight, computed in the dtype of its scales."""
        dense = qwix.dequantize(self.array)
        return dense if dtype is None else dense.astype(dtype)

    def requantize(self, weight: jax.Array) -> QwixHeld:
        """Another weight, quantised as Qwix did this one."""
        how = self.held.how
        new = qwix.quantize(
            weight.astype(self.dtype),
            how.qtype,
            channelwise_axes=how.channelwise_axes,
            tiled_axes=how.tiled_axes,
            calibration_method=how.calibration_method,
        )
        return QwixHeld(jax.tree.unflatten(jax.tree.structure(self.held), jax.tree.leaves(new)))

    def variable(self, new: QwixHeld | jax.Array) -> Any:
        """What a module holds in place of this weight when that is ``new``."""
        if isinstance(new, QwixHeld):
            return new.held
        metadata = nnx_layers.stored(self.held).get_metadata() | nnx_layers.PLACED
        return nnx.Param(new, **metadata)


def weights(model: nnx.Module) -> list[tuple[str, nnx.Module, str, QwixHeld]]:
    """Path, module, name and value of all weights that Qwix quantised.

    >>> weights(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    []
    """
    return [
        (path, module, name, QwixHeld(value))
        for path, module in nnx_layers.modules(model)
        for name, value in vars(module).items()
        if nnx_layers.by_qwix(value)
    ]


def release(model: nnx.Module) -> None:
    """Gives a model without quantised weights the class back that it had, in place.

    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> release(model)
    """
    for _, module in nnx_layers.modules(model):
        for name in _NOTES & set(vars(module)):
            delattr(module, name)
    cls = type(model)
    model.__class__ = vars(cls).get(nnx_layers.UNQUANTIZED, cls)


def as_lora(model: nnx.Module) -> Any:
    """A copy of an adapted model with the adapters as Qwix names and lays out a LoRA.

    Each becomes two ``nnx.LoRAParam`` of its layer, such as ``kernel_lora_a`` and
    ``kernel_lora_b``, whose product is the whole increment: α / rank is 1 for them. This is for
    what looks for such parameters in a model, as Tunix's export does. The copy itself computes
    what the base does, unless Qwix runs it. For the ranks that training left, give the model
    those first, with ``nnx.with_adapters`` and ``compact``.

    Args:
      model: as :func:`adalora_jax.nnx.adapt` made it; not changed.

    Raises:
      ValueError: a layer whose increment is no LoRA of Qwix's, such as an embedding.

    >>> import adalora_jax as adalora
    >>> base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = adalora.AdaLoraConfig(
    ...     total_step=10, init_r=2, target_r=1, target_modules="all-linear"
    ... )
    >>> layer = as_lora(adalora.nnx.adapt(base, config)).layers[0]
    >>> layer.kernel_lora_a.shape, layer.kernel_lora_b.shape
    ((6, 2), (2, 4))
    """
    copy = nnx.clone(model)
    for _, module in nnx_layers.modules(copy):
        if not isinstance(module, nnx_layers.Adapted):
            continue
        layer, own = layers.known(nnx_layers.layer_of(module), module), module.adalora
        shape = getattr(module, layer.weight).shape
        a, b = layers.lora_pair(layer, module, own.adapter, shape)
        setattr(module, f"{layer.weight}_lora_a", nnx.LoRAParam(a))
        setattr(module, f"{layer.weight}_lora_b", nnx.LoRAParam(b))
        del module.adalora
        module.__class__ = nnx_layers.base_class(type(module))
    return copy
