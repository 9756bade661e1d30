"""NNX models in Qwix's formats: quantised by ``qwix.quantize_model``, or with Qwix's LoRA.

A model that Qwix quantised stores each weight as one object with integers and scales. The class of
its root is created by Qwix and replaces JAX's products by quantised ones while the model runs.
``nnx.adapt`` accepts such models; this module wraps their weights as :class:`Packed` weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax.typing import DTypeLike

from adalora_jax._src import _compat
from adalora_jax._src.core.adapter import Adapter, known_scale
from adalora_jax._src.core.layout import Layout, operands
from adalora_jax._src.core.low_rank import accumulation_dtype
from adalora_jax._src.modules import einsum, layers, nnx_layers, nnx_variables
from adalora_jax._src.quantization.packed import Packed


class QwixModelWeight(Packed):
    """Weight of a model that Qwix quantised.

    Attributes:
      qwix_weight: Qwix's object, whose leaves are NNX variables.
      array: the same weight as a ``qwix.QArray`` of plain arrays.
    """

    def __init__(self, qwix_weight: _compat.QwixWeight) -> None:
        self.qwix_weight = qwix_weight
        self.array: qwix.QArray = nnx_variables.pure(qwix_weight.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the scales."""
        return self.array.scale.dtype

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Return the weight, computed in the dtype of its scales and cast to ``dtype``."""
        return dequantized(self.array, dtype)

    def requantize(self, weight: jax.Array) -> QwixModelWeight:
        """Return another weight, quantised with the settings of this one."""
        new = qwix.quantize(weight.astype(self.dtype), **_compat.qwix_settings(self.qwix_weight))
        treedef = jax.tree.structure(self.qwix_weight)
        return QwixModelWeight(treedef.unflatten(jax.tree.leaves(new)))

    def variable(self, new: QwixModelWeight | jax.Array) -> Any:
        """Return the attribute of the module for the value ``new``: Qwix's object or a Param."""
        if isinstance(new, QwixModelWeight):
            return new.qwix_weight
        metadata = (
            nnx_variables.sharded_variable(self.qwix_weight).get_metadata()
            | nnx_variables.NO_EAGER_SHARDING
        )
        return nnx.Param(new, **metadata)


def dequantized(array: qwix.QArray, dtype: DTypeLike | None = None) -> jax.Array:
    """Return Qwix's array as floats in the dtype of its scales, or cast to ``dtype``."""
    dense = qwix.dequantize(array)
    return dense if dtype is None else dense.astype(dtype)


def weights(model: nnx.Module) -> list[tuple[str, nnx.Module, str, QwixModelWeight]]:
    """Return ``(path, module, name, weight)`` of all weights that Qwix quantised.

    >>> weights(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    []
    """
    return [
        (path, module, name, QwixModelWeight(value))
        for path, module in nnx_variables.modules(model)
        for name, value in vars(module).items()
        if _compat.is_qwix_weight(value)
    ]


def release(model: nnx.Module) -> None:
    """Restore the original class of a model without quantised weights, in place.

    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> release(model)
    """
    for _, module in nnx_variables.modules(model):
        _compat.delete_qwix_attributes(module)
    _compat.set_class(model, _compat.unquantized_class(type(model)) or type(model))


def as_lora(model: nnx.Module) -> nnx.Module:
    """Return a copy of an adapted model with its adapters as LoRA parameters in Qwix's layout.

    Each adapter becomes two ``nnx.LoRAParam`` of its layer, such as ``kernel_lora_a`` and
    ``kernel_lora_b``, whose product ``A B`` is the whole increment ``ΔW = s · P Λ Q``
    (`AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_); their α / rank is 1. Use it for code
    that searches a model for such parameters, like Tunix's export. The copy computes the base
    model's outputs unless Qwix runs it. To export without pruned triplets, apply
    :func:`adalora_jax.compact` to the model first.

    Args:
      model: as :func:`adalora_jax.nnx.adapt` returns it; not changed.

    Returns:
      A copy whose layers have the classes of the base model. A has the axes that the layer sums
      over, followed by the rank; B has the rank, followed by the other axes.

    Raises:
      ValueError: a layer has an increment that Qwix's LoRA cannot represent, such as an embedding,
        or an adapter's scale is not known.

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
    for _, module in nnx_variables.modules(copy):
        if not isinstance(module, nnx_layers.Adapted):
            continue
        layer = layers.require_layer(nnx_layers.layer_of(module), module)
        shape = getattr(module, layer.weight).shape
        a, b = _lora_pair(layer, module, module.adalora.adapter, shape)
        setattr(module, f"{layer.weight}_lora_a", nnx.LoRAParam(a))
        setattr(module, f"{layer.weight}_lora_b", nnx.LoRAParam(b))
        del module.adalora
        _compat.set_class(module, nnx_layers.base_class(type(module)))
    return copy


def _lora_pair(
    layer: Layout, module: object, adapter: Adapter, shape: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Return the increment of a weight as a LoRA in Qwix's layout: ``ΔW = A B``, with s and λ in B.

    A has the axes that the layer sums over, followed by the rank; B has the rank, followed by the
    other axes. An einsum keeps its axes, in the weight's order; other kinds flatten them into one.
    Stacked matrices with one shared input, such as keys and values, share one A, so their ranks
    add up.

    Raises:
      ValueError: the layer is not dense, general or einsum, its stacked matrices have separate
        inputs, or the adapter's scale is not known.

    >>> kv = Layout("w", (2,), (1, 3), (0,), "einsum")  # BSD,CKDH->CBSKH
    >>> adapter = Adapter(jnp.ones((2, 4, 15)), jnp.ones((2, 4)), jnp.ones((2, 4, 6)))
    >>> a, b = _lora_pair(kv, None, adapter, (2, 3, 6, 5))
    >>> a.shape, b.shape
    ((6, 8), (8, 2, 3, 5))
    """
    lifted, matrix_shape = layer._split(shape)
    (xs, ws), _ = operands(einsum.equation_of(module) or ",->")
    has_separate_inputs = bool(lifted) or any(
        axis < len(ws) and ws[axis] in xs for axis in layer.stack
    )
    flat = layer.kind in ("dense", "general")
    if has_separate_inputs or not (layer.kind == "einsum" or (flat and not layer.stack)):
        raise ValueError(
            f"`model`: a {type(module).__name__} with a weight of shape {tuple(shape)} has no "
            "equivalent LoRA in Qwix; leave it out of the adapters, or merge them."
        )

    def sizes(axes: tuple[int, ...]) -> list[int]:
        return [matrix_shape[axis] for axis in axes]

    n, rank = math.prod(sizes(layer.stack)), adapter.lam.shape[-1]
    dtype = accumulation_dtype(adapter.p.dtype)
    scale = jnp.asarray(known_scale(adapter), dtype)
    c = (adapter.lam.astype(dtype) * scale).reshape(n, rank, 1)
    p = (adapter.p.astype(dtype).reshape(n, rank, -1) * c).astype(adapter.p.dtype)
    a, b = (
        adapter.q.reshape(n * rank, -1).T,
        jnp.einsum("nro,nm->nrmo", p, jnp.eye(n, dtype=p.dtype)),
    )
    if flat:
        return a, b.reshape(rank, -1)
    others = (*layer.stack, *layer.outs)
    order = [1 + others.index(axis) for axis in sorted(others)]
    b = b.reshape(n * rank, *sizes(others)).transpose(0, *order)
    return a.reshape(*sizes(layer.ins), n * rank), b
