"""NNX models that Qwix itself quantised, with ``qwix.quantize_model``: their weights, seen as ours.

Such a model keeps each weight as integers and scales in one object, and its root has a class of
Qwix's, which puts products for quantised weights in place of JAX's while the model runs.
``nnx.adapt`` takes it as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import qwix
from flax import nnx

from adalora_jax import nnx_layers
from adalora_jax.packed import Packed

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
        is_variable = lambda node: isinstance(node, nnx.Variable)
        value = lambda node: node.get_raw_value() if is_variable(node) else node
        self.array: qwix.QArray = jax.tree.map(value, held.array, is_leaf=is_variable)

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
