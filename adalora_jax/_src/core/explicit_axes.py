"""Products, look-ups and reshards on meshes with explicit axes, where shardings are in the types.

On a mesh with ``AxisType.Explicit`` axes the sharding of an array is a part of its type, and JAX
raises an error where it cannot derive that of a result. These functions state it. Without such axes
they change nothing, and XLA chooses the shardings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

Output = TypeVar("Output")
Spec: TypeAlias = Iterable[str | tuple[str, ...] | None]


def explicit_mesh(array: Shaped[Array, "..."]) -> AbstractMesh | None:
    """Return the mesh that is part of an array's type if some of its axes are explicit.

    >>> explicit_mesh(jnp.ones(3)) is None
    True
    """
    mesh = jax.typeof(array).sharding.mesh
    return mesh if mesh.explicit_axes else None


def spec_of_type(array: Shaped[Array, "..."]) -> tuple[str | tuple[str, ...] | None, ...]:
    """Return the explicit axes over which an array is sharded, one entry for each of its axes.

    >>> spec_of_type(jnp.ones((2, 3)))
    (None, None)
    """
    spec = jax.typeof(array).sharding.spec
    return *spec, *[None] * (array.ndim - len(spec))


def explicit_sharding(like: Shaped[Array, "..."], spec: Spec) -> NamedSharding | None:
    """Return the ``out_sharding`` of a product on a mesh with explicit axes; None on other meshes.

    >>> explicit_sharding(jnp.ones((2, 3)), ("data", None)) is None
    True
    """
    mesh = explicit_mesh(like)
    if mesh is None:
        return None
    used, kept = set(), []
    for entry in spec:  # a mesh axis may shard only one array axis: the first one wins
        names = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        kept.append(None if names & used else entry)
        used |= names
    return NamedSharding(mesh, PartitionSpec(*kept))


def reshard(
    array: Shaped[Array, "*shape"], like: Shaped[Array, "..."], spec: Spec | None = None
) -> Shaped[Array, "*shape"]:
    """Return an array with a spec on the explicit axes of another array's mesh.

    Args:
      array: any array.
      like: the other array.
      spec: the spec; None for that of ``like``.

    >>> reshard(jnp.zeros(2), jnp.ones(2))
    Array([0., 0.], dtype=float32)
    """
    sharding = explicit_sharding(like, spec_of_type(like) if spec is None else spec)
    return array if sharding is None else jax.sharding.reshard(array, sharding)


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
