"""Parameters of a model by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import unfreeze

from adalora_jax._src.core import pytree
from adalora_jax._src.core.low_rank import accumulation_dtype
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import linen_layers, nnx_variables

Model: TypeAlias = nn.Module | nnx.Module


def parameters_of(model: Model, variables: Mapping[str, PyTree] | None) -> dict[str, PyTree]:
    """Return a model's parameters by path: arrays or shapes for linen, variables for NNX.

    Args:
      model: an NNX module, or a linen module.
      variables: the variables of a linen module; None for an NNX module.

    Raises:
      TypeError: ``model`` is neither, an NNX module with variables, or a linen module without.
      ValueError: ``variables`` has no ``params``.
    """
    if isinstance(model, nnx.Module) and variables is None:
        return nnx_variables.parameters(model)
    if not isinstance(model, nn.Module) or variables is None:
        raise TypeError(
            f"`model={type(model).__name__}, variables={type(variables).__name__}`: must be an NNX "
            "module without variables, or a linen module with its variables; pass one of the two."
        )
    linen_layers.check_variables(variables)
    return by_path(linen_layers.unboxed(variables))


def by_path(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return the leaves of nested dicts by path.

    >>> by_path({"up": {"kernel": 1}})
    {'up/kernel': 1}
    """
    return traverse_util.flatten_dict(unfreeze(dict(params)), sep="/")


def replaced(params: Mapping[str, PyTree], leaves: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return nested dicts with the leaves at the given paths replaced.

    >>> replaced({"up": {"kernel": 1, "bias": 2}}, {"up/kernel": 3})
    {'up': {'kernel': 3, 'bias': 2}}
    """
    flat = traverse_util.flatten_dict(unfreeze(dict(params)), keep_empty_nodes=True)
    flat |= {tuple(path.split("/")): leaf for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(flat)


def trainable_copy(leaf: PyTree) -> PyTree:
    """Return a copy in at least float32, since bfloat16 would round small updates away.

    Values that are not floats keep their dtype, and packed weights become floats.

    >>> trainable_copy(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    if pytree.is_packed(leaf):
        leaf = leaf.dequantize()
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
    dtype = accumulation_dtype(leaf.dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return jnp.array(leaf, dtype)
