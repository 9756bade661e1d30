"""Variables of NNX models: those that train, and all weights by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from adalora_jax._src._compat import is_qwix_weight
from adalora_jax._src.core import pytree
from adalora_jax._src.core.low_rank import accumulation_dtype
from adalora_jax._src.core.pytree import PyTree

_Model = TypeVar("_Model", bound=nnx.Module)
# Arrays are already placed; disable Flax's eager sharding, which needs a mesh on every copy.
NO_EAGER_SHARDING = {"eager_sharding": False}


class AdapterParam(nnx.LoRAParam):
    """Trainable variable with ``p``, ``lam`` or ``q`` of an :class:`~adalora_jax.Adapter`.

    Attributes:
      scale: metadata; float, the factor s of the adapter.
      layout: metadata; the :class:`~adalora_jax.Layout` of the adapted weight.

    >>> import adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=10, target_modules="all-linear")
    >>> model = adalora.nnx.adapt(nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))), config)
    >>> [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, AdapterParam))]
    [(12,), (12, 4), (12, 6)]
    """


class SavedParam(nnx.LoRAParam):
    """Trainable copy of a base parameter that ``modules_to_save`` names, in at least float32.

    Attributes:
      root: metadata; path of the outermost module or parameter that ``modules_to_save`` names.
      base_dtype: metadata; dtype of the base parameter, which the model computes with.

    >>> saved = SavedParam.of(nnx.Param(jnp.ones(2, jnp.bfloat16)), "head/bias")
    >>> saved.get_value().dtype, saved[...].dtype
    (dtype('float32'), dtype(bfloat16))
    """

    @classmethod
    def of(cls, variable: nnx.Variable, root: str) -> SavedParam:
        """Return a trainable copy of a parameter in at least float32.

        Args:
          variable: the base parameter.
          root: path of the outermost module or parameter that ``modules_to_save`` names and that
            contains ``variable``.

        Returns:
          A :class:`SavedParam` with the metadata of ``variable``.

        >>> SavedParam.of(nnx.Param(jnp.ones(2, jnp.bfloat16)), "head").root
        'head'
        """
        value = variable.get_value()
        known = {"root": root, "base_dtype": value.dtype}
        metadata = variable.get_metadata() | NO_EAGER_SHARDING | known
        return cls(jnp.array(value, accumulation_dtype(value.dtype)), **metadata)

    def get_value(self, **index: Any) -> PyTree:
        """Return the trained value, or, with an index, the indexed value in the base's dtype.

        Layers read ``self.kernel[...]`` and compute in the base's dtype. Flax's optimizers,
        averages and copies read without an index, in full precision.

        Args:
          **index: ``index=...``, as in ``nnx.Variable.get_value``; none for the whole value.

        Returns:
          The value in at least float32, or the indexed part in the base's dtype.

        >>> SavedParam.of(nnx.Param(jnp.ones(2, jnp.bfloat16)), "head").get_value(index=0).dtype
        dtype(bfloat16)
        """
        value = super().get_value(**index)
        return self._computed(value) if index else value

    def __jax_array__(self) -> jax.Array:
        return self._computed(self.get_value())

    @property
    def value(self) -> jax.Array:
        """Trained value in the dtype of the base parameter."""
        return self._computed(super().value)

    @value.setter
    def value(self, value: PyTree) -> None:
        self.set_value(value)

    def _computed(self, value: PyTree) -> PyTree:
        dtype = self.get_metadata().get("base_dtype")
        return value.astype(dtype) if dtype is not None and hasattr(value, "astype") else value

    def released(self) -> nnx.Param:
        """Return the trained values as a plain parameter of the base's dtype.

        Returns:
          An ``nnx.Param`` with the same metadata, except for that of :class:`SavedParam` itself.

        >>> SavedParam.of(nnx.Param(jnp.ones(2, jnp.bfloat16)), "head").released().dtype
        dtype(bfloat16)
        """
        metadata = self.get_metadata()
        dtype = metadata.pop("base_dtype")
        del metadata["root"]
        return nnx.Param(self.get_raw_value().astype(dtype), **metadata)


def check_module(model: object) -> None:
    """Raise a TypeError if ``model`` is not an NNX module."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model={type(model).__name__}`: is not a flax.nnx module; adalora_jax.linen.adapt "
            "takes linen modules."
        )


def modules(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """Return each module of the model once, as ``(path, module)``, in graph order."""
    return [
        ("/".join(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    ]


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Return ``{path: variable}`` of the model's parameters, without adapters.

    >>> list(parameters(nnx.Linear(6, 4, rngs=nnx.Rngs(0))))
    ['bias', 'kernel']
    """
    return {
        "/".join(map(str, path)): variable
        for path, variable in nnx.iter_graph(model)
        if is_weight(variable) and not isinstance(variable, AdapterParam)
    }


def with_parameters(model: _Model, new: Mapping[str, PyTree]) -> _Model:
    """Return a copy of ``model`` with new values for the parameters at some paths.

    >>> model = with_parameters(
    ...     nnx.Linear(6, 4, rngs=nnx.Rngs(0)), {"bias": jax.numpy.ones(4)}
    ... )
    >>> model.bias[0]
    Array(1., dtype=float32)
    """
    copy = nnx.clone(model)
    for path, variable in parameters(copy).items():
        if path in new:
            variable.set_value(new[path])
    return copy


def is_weight(value: object) -> bool:
    """Return whether a value is a parameter, or a weight that is stored as integers."""
    packed = isinstance(value, nnx.Variable) and pytree.is_packed(value.get_raw_value())
    return packed or isinstance(value, nnx.Param) or is_qwix_weight(value)


def sharded_variable(weight: PyTree) -> nnx.Variable:
    """Return the variable with a weight's sharding and metadata: for Qwix's, its integers."""
    return weight.array.qvalue if is_qwix_weight(weight) else weight


def pure(state: PyTree) -> PyTree:
    """Return a pytree with every variable replaced by its value, like newer Flax's ``nnx.as_pure``.

    >>> pure({"scale": nnx.Param(2.0)})
    {'scale': 2.0}
    """

    def is_variable(node: object) -> bool:
        return isinstance(node, nnx.Variable)

    def value(node: PyTree) -> PyTree:
        return pure(node.get_raw_value()) if is_variable(node) else node

    return jax.tree.map(value, state, is_leaf=is_variable)
