"""Look-ups, replicas and automatic shardings on meshes with explicit axes.

On a mesh with ``AxisType.Explicit`` axes the sharding of an array is a part of its type, and JAX
raises an error where it cannot derive that of a result. These functions state it. Without such axes
they change nothing, and XLA chooses the shardings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from adalora_jax._src.core.low_rank import (
    explicit_mesh,
    explicit_sharding,
    reshard,
    spec_of_type,
)

Output = TypeVar("Output")


def replicate(array: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return an array that is not sharded over explicit axes.

    >>> replicate(jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """
    return reshard(array, array, [None] * array.ndim)


def take(
    array: Shaped[Array, "..."], indices: Int[Array, "..."], axis: int
) -> Shaped[Array, "..."]:
    """Return ``jnp.take(array, indices, axis)``, sharded like the indices and the other axes.

    Args:
      array: any array.
      indices: integers of any shape; their axes replace ``axis``.
      axis: at least 0.

    >>> take(jnp.arange(6.0).reshape(2, 3), jnp.array([2, 0]), 1)
    Array([[2., 0.],
           [5., 3.]], dtype=float32)
    """
    like = array if explicit_mesh(indices) is None else indices
    spec = list(spec_of_type(array))
    spec[axis : axis + 1] = spec_of_type(indices)
    sharding = explicit_sharding(like, spec)
    if sharding is None:
        return jnp.take(array, indices, axis)
    at = (slice(None),) * axis + (indices,)
    return array.at[at].get(mode="fill", out_sharding=sharding)


def with_auto_axes(
    function: Callable[..., Output], like: Shaped[Array, "..."], *args: Any
) -> Output:
    """Return ``function(*args)``, in which XLA chooses the shardings of intermediate results.

    Args:
      function: a function of arrays.
      like: an array. A result with as many axes is sharded like it, except for axes that its mesh
        axes do not divide; other results are replicated.
      *args: arguments of the function.

    >>> with_auto_axes(jnp.sin, jnp.zeros(2), jnp.zeros(2))
    Array([0., 0.], dtype=float32)
    """
    mesh = explicit_mesh(like)
    if mesh is None:
        return function(*args)

    def sharding(result: jax.ShapeDtypeStruct) -> NamedSharding | None:
        spec = spec_of_type(like) if result.ndim == like.ndim else [None] * result.ndim
        return explicit_sharding(like, map(fitting, spec, result.shape))

    def fitting(entry: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        return None if size % math.prod(mesh.shape[name] for name in names) else entry

    unsharded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    shardings = jax.tree.map(sharding, jax.eval_shape(function, *unsharded))
    auto: Any = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=shardings)
    return auto(*args)
