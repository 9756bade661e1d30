"""Values per adapter, stored as one array per role: repeated layers are one array, as in a scan."""

from __future__ import annotations

import array
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import tree_util
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.low_rank import explicit_mesh, spec_of_type


def map_leaves(function: Callable[..., Any], *adapters: Adapter) -> Adapter:
    """Return an adapter of ``function(leaf, ...)``, with the default scale and layout.

    >>> map_leaves(lambda a, b: a + b, Adapter(1, 2, 3), Adapter(4, 5, 6))
    Adapter(p=5, lam=7, q=9, scale=1.0)
    """
    p, lam, q = map(function, *adapters)
    return Adapter(p, lam, q)


def map_adapters(
    function: Callable[..., Any], adapters: Mapping[str, Any], *rest: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return ``function(value, ...)`` per adapter, or per role if the adapters are stacked by role.

    Args:
      function: called with the values of all mappings; it treats leading axes as those of a stack.
      adapters: any mapping by path.
      *rest: mappings of the same paths; of the same roles if ``adapters`` is a :class:`ByRole`.

    >>> map_adapters(lambda a, b: a + b, {"up": 1}, {"up": 2})
    {'up': 3}
    """
    if not isinstance(adapters, ByRole):
        return {path: function(v, *(other[path] for other in rest)) for path, v in adapters.items()}
    parts = [adapters.stacked, *(stored(other) for other in rest)]
    new = {name: function(*(part[name] for part in parts)) for name in adapters.stacked}
    return ByRole(new, adapters.roles)


def stored(adapters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values as they are stored: by role for a :class:`ByRole`, otherwise by path.

    >>> stored({"up": 1})
    {'up': 1}
    """
    return adapters.stacked if isinstance(adapters, ByRole) else adapters


def shapes_by_path(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return ``{path: Adapter}`` of ``jax.ShapeDtypeStruct``, so that no array is sliced.

    >>> shapes_by_path({"up": Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))})["up"].lam
    ShapeDtypeStruct(shape=(2,), dtype=float32)
    """

    def shape(leaf: Shaped[Array, "..."]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return dict(map_adapters(functools.partial(jax.tree.map, shape), adapters))


class Role(NamedTuple):
    """Adapters whose paths differ only in numbers, with equal shapes, dtypes and static fields.

    Attributes:
      name: the common path, with ``*`` for the numbers.
      paths: the paths of the members, in the order of the leading axis.
      shape: the shape of one member's λ, ``[*stack, r]``.
    """

    name: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Roles:
    """The roles of all adapters; static, so it is part of a tree's structure.

    Attributes:
      members: the roles, in the order of their first members.
      paths: the paths of all adapters, in the order of the parameters.
    """

    members: tuple[Role, ...]
    paths: tuple[str, ...]

    @functools.cached_property
    def role_and_index(self) -> dict[str, tuple[Role, int]]:
        """Role of each path, and its index on the role's leading axis."""
        return {path: (role, i) for role in self.members for i, path in enumerate(role.paths)}

    @functools.cached_property
    def positions(self) -> array.array[int]:
        """Position of every triplet in parameter order, with the roles concatenated."""
        sizes = [math.prod(self.role_and_index[path][0].shape) for path in self.paths]
        starts = dict(zip(self.paths, itertools.accumulate(sizes, initial=0)))
        spans = [
            range(starts[path], starts[path] + math.prod(role.shape))
            for role in self.members
            for path in role.paths
        ]
        return array.array("i", itertools.chain.from_iterable(spans))


def group_by_role(adapters: Mapping[str, Adapter]) -> Roles:
    """Group adapters whose paths differ only in numbers and whose arrays have one type.

    Repeated layers are sharded alike, so their arrays can be joined along a new axis, which is not
    sharded, without communication. On a mesh with explicit axes the sharding is part of the type.

    Args:
      adapters: ``{path: Adapter}``; arrays may be abstract.

    >>> make = lambda: Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))
    >>> roles = group_by_role({"h/0/up": make(), "h/0/down": make(), "h/1/up": make()})
    >>> [(role.name, role.paths) for role in roles.members]
    [('h/*/up', ('h/0/up', 'h/1/up')), ('h/*/down', ('h/0/down',))]
    """
    groups: dict[Any, list[str]] = {}
    for path, adapter in adapters.items():
        types = tuple((leaf.shape, jnp.dtype(leaf.dtype), _spec(leaf)) for leaf in adapter)
        kind = re.sub(r"\d+", "*", path), types, adapter.scale, adapter.layout
        groups.setdefault(kind, []).append(path)
    names: dict[str, int] = {}
    members = []
    for (name, *_), paths in groups.items():
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}:{names[name]}"
        members.append(Role(unique, tuple(paths), tuple(adapters[paths[0]].lam.shape)))
    return Roles(tuple(members), tuple(adapters))


def _spec(leaf: Shaped[Array, "..."]) -> tuple[Any, ...] | None:
    """Return the sharding that is part of an array's type, on a mesh with explicit axes."""
    return None if explicit_mesh(leaf) is None else spec_of_type(leaf)


@tree_util.register_pytree_with_keys_class
class ByRole(Mapping[str, Any]):
    """One value per adapter, read by path and stored as one array per role.

    The value of an adapter is an array over its triplets, ``[..., r]``, or an :class:`Adapter`. As
    a mapping it is ``{path: value}`` in the order of the parameters, where each value is a slice.
    As a pytree its leaves are the arrays of the roles.

    Axes in front of a role's, such as those of ``jax.vmap`` or ``jax.lax.scan``, remain in front.

    Attributes:
      stacked: ``{role: value}``; the value has one leading axis more than that of one adapter.
      roles: the roles and paths; static.

    >>> make = lambda value: Adapter(jnp.ones((1, 3)), jnp.array([value]), jnp.ones((1, 4)))
    >>> adapters = {"h/0": make(0.0), "h/1": make(1.0), "head": make(2.0)}
    >>> by_role = stack(group_by_role(adapters), adapters)
    >>> {role: value.lam.shape for role, value in by_role.stacked.items()}
    {'h/*': (2, 1), 'head': (1, 1)}
    >>> by_role["h/1"].lam, list(by_role)
    (Array([1.], dtype=float32), ['h/0', 'h/1', 'head'])
    """

    def __init__(self, stacked: Mapping[str, Any], roles: Roles) -> None:
        self.stacked, self.roles = dict(stacked), roles

    def __getitem__(self, path: str) -> Any:
        role, index = self.roles.role_and_index[path]
        value, ndim = self.stacked[role.name], len(role.shape)
        if not isinstance(value, Adapter):
            return _member(value, index, ndim)
        p, lam, q = value
        return value._replace(
            p=_member(p, index, ndim + 1),
            lam=_member(lam, index, ndim),
            q=_member(q, index, ndim + 1),
        )

    def split(self) -> dict[str, Any]:
        """Return ``{path: value}`` in the order of the parameters.

        The derivative concatenates the cotangents of a role's members. That of indexing would add
        arrays that are zero except for one member.
        """
        found = {}
        for role in self.roles.members:
            value, count, ndim = self.stacked[role.name], len(role.paths), len(role.shape)
            split = functools.partial(_split, count=count, stack=ndim - 1)
            if isinstance(value, Adapter):
                each = zip(*(split(x, ndim=n) for x, n in zip(value, (ndim + 1, ndim, ndim + 1))))
                members = [value._replace(**dict(zip(Adapter._fields, one))) for one in each]
            else:
                members = split(value, ndim=ndim)
            found |= zip(role.paths, members)
        return {path: found[path] for path in self.roles.paths}

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles.paths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByRole):
            return NotImplemented
        return self.roles == other.roles and self.stacked == other.stacked

    def __len__(self) -> int:
        return len(self.roles.paths)

    def __repr__(self) -> str:
        return f"ByRole({self.stacked!r})"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Roles]:
        keyed = [(tree_util.DictKey(r.name), self.stacked[r.name]) for r in self.roles.members]
        return keyed, self.roles

    @classmethod
    def tree_unflatten(cls, roles: Roles, values: Sequence[Any]) -> ByRole:
        return cls({role.name: value for role, value in zip(roles.members, values)}, roles)


def stack(roles: Roles, values: Mapping[str, Any]) -> ByRole:
    """Return the values of all adapters by role.

    Args:
      roles: the roles; their paths are keys of ``values``.
      values: ``{path: value}``, with an array or an :class:`Adapter` per path. The adapters of a
        role have the scale and layout of its first member. Axes in front of a value's own, such as
        those of ``jax.vmap``, remain in front. A :class:`ByRole` of these roles is returned as is.
    """
    if isinstance(values, ByRole) and values.roles == roles:
        return values
    joined = {
        role.name: _join([values[path] for path in role.paths], len(role.shape))
        for role in roles.members
    }
    return ByRole(joined, roles)


@overload
def part_of(values: ByRole, members: Sequence[Role]) -> ByRole: ...
@overload
def part_of(values: Mapping[str, Any], members: Sequence[Role]) -> Mapping[str, Any]: ...


def part_of(values: Mapping[str, Any], members: Sequence[Role]) -> Mapping[str, Any]:
    """Return the values of the members of some roles.

    >>> make = lambda: Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))
    >>> adapters = {"h/0": make(), "h/1": make(), "head": make()}
    >>> roles = group_by_role(adapters)
    >>> list(part_of(adapters, roles.members[:1])), list(part_of(stack(roles, adapters), []))
    (['h/0', 'h/1'], [])
    """
    if not isinstance(values, ByRole):
        return {path: values[path] for role in members for path in role.paths}
    paths = {path for role in members for path in role.paths}
    roles = Roles(tuple(members), tuple(path for path in values.roles.paths if path in paths))
    return ByRole({role.name: values.stacked[role.name] for role in members}, roles)


def stack_like(like: ByRole, values: Mapping[str, Adapter]) -> ByRole:
    """Return adapters by role, with the scales and layouts of ``like``.

    Gradients and adapters in Flax containers do not store a scale or a layout.
    """
    joined = stack(like.roles, values).stacked
    static = {name: (a.scale, a.layout) for name, a in like.stacked.items()}
    known = {n: a._replace(scale=static[n][0], layout=static[n][1]) for n, a in joined.items()}
    return ByRole(known, like.roles)


def by_path(values: ByRole) -> dict[str, Shaped[Array, "*stack r"]]:
    """Return ``dict(values)``, computed on a CPU by kernels that the members of a role share.

    XLA's CPU compiler compiles each distinct kernel, in 10 to 20 ms, and equal ones once. The start
    of a slice is part of its kernel, so it would compile one per member; the indices of a gather
    are an argument.

    Args:
      values: arrays over the triplets, ``[..., r]``.

    >>> make = lambda lam: Adapter(jnp.ones((2, 3)), jnp.array(lam), jnp.ones((2, 4)))
    >>> adapters = {"h/0": make([1, 2]), "h/1": make([3, 4])}
    >>> lams = stack(group_by_role(adapters), {path: a.lam for path, a in adapters.items()})
    >>> by_path(lams)["h/1"].tolist()
    [3, 4]
    """
    return jax.lax.platform_dependent(
        cpu=lambda: {path: _gathered(values, path) for path in values},
        default=lambda: dict(values),
    )


def per_triplet(reduce: Callable[..., Array], values: ByRole) -> Shaped[Array, " n"]:
    """Reduce values to one number per member of a role and triplet, all in one row.

    Reducing the row takes one kernel, where one reduction per array would take two for each. The
    axes of members and triplets are not sharded, so the parts of the row are on every device.

    Args:
      reduce: reduces an array over its axes ``axis``, such as ``jnp.all``.
      values: arrays over the triplets, ``[..., r]``, or adapters.

    >>> adapters = {"up": Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))}
    >>> per_triplet(jnp.sum, stack(group_by_role(adapters), adapters))
    Array([3., 3., 1., 1., 4., 4.], dtype=float32)
    """
    row = []
    for role in values.roles.members:
        inside = tuple(range(1, len(role.shape)))  # the axes of a stack
        for leaf in jax.tree.leaves(values.stacked[role.name]):
            elements = range(len(role.shape) + 1, leaf.ndim)
            row.append(reduce(leaf, axis=(*inside, *elements)).ravel())
    if not row:
        return jnp.ones(0, bool)
    # Without the barrier, XLA would reduce each array to a number first.
    return jax.lax.optimization_barrier(jnp.concatenate(row))


def _join(members: Sequence[Any], ndim: int) -> Any:
    if not isinstance(members[0], Adapter):
        return _join_arrays(members, ndim)
    p, lam, q = zip(*members)
    return members[0]._replace(
        p=_join_arrays(p, ndim + 1), lam=_join_arrays(lam, ndim), q=_join_arrays(q, ndim + 1)
    )


def _join_arrays(members: Sequence[Shaped[Any, "..."]], ndim: int) -> Shaped[Array, "..."]:
    """Stack arrays along a new axis, which is not sharded, in front of their last ``ndim`` axes."""
    first = members[0]
    axis = first.ndim - ndim
    if ndim == 1:  # λ: on a TPU, each new axis would be a copy
        joined = jnp.concatenate(members, axis)
        joined = joined.reshape(*first.shape[:axis], len(members), first.shape[-1])
    else:
        joined = jnp.stack(members, axis)
    sharding = None if isinstance(first, Tracer) else getattr(first, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return joined
    # Outside of jit, XLA may replicate the result.
    spec = [*sharding.spec, *[None] * (axis - len(sharding.spec))]
    spec = P(*spec[:axis], None, *spec[axis:])
    return jax.device_put(joined, NamedSharding(sharding.mesh, spec))


def _gathered(values: ByRole, path: str) -> Shaped[Array, "*stack r"]:
    """Return ``values[path]`` by a gather, unless its role has one member, a stack or one triplet.

    The axes of members and triplets are not sharded, so joining them needs no communication; those
    of a stack may be. XLA replaces a gather of a single element by a slice.
    """
    role, index = values.roles.role_and_index[path]
    *stacked, rank = role.shape
    if stacked or len(role.paths) == 1 or rank < 2:
        return values[path]
    value = values.stacked[role.name]
    row = value.reshape(*value.shape[:-2], len(role.paths) * rank)
    indices = jnp.asarray(array.array("i", range(index * rank, (index + 1) * rank)))
    return row.at[..., indices].get(mode="promise_in_bounds")


def _split(leaf: Shaped[Any, "..."], count: int, ndim: int, stack: int) -> list[Shaped[Any, "..."]]:
    """Return the slices of a role's array, in which ``ndim`` axes follow the axis of the members.

    Args:
      leaf: the role's array.
      count: number of members.
      ndim: number of axes of a member, without those in front.
      stack: number of axes of a member's stack, which may be sharded.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return [_member(leaf, index, ndim) for index in range(count)]
    axis = leaf.ndim - ndim - 1
    # The transpose of a split is one concatenation.
    if stack:
        parts = [jax.lax.squeeze(p, [axis]) for p in jax.lax.split(leaf, [1] * count, axis)]
    else:  # On a GPU, an axis of size 1 between a slice and its use would cost a kernel.
        size = leaf.shape[axis + 1]
        rows = leaf.reshape(*leaf.shape[:axis], count * size, *leaf.shape[axis + 2 :])
        parts = jax.lax.split(rows, [size] * count, axis)
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return list(parts)
    # Outside of jit, XLA may replicate the results.
    return list(jax.device_put(parts, _without_axis(sharding, leaf.ndim, axis)))


def _without_axis(sharding: NamedSharding, ndim: int, axis: int) -> NamedSharding:
    """Return the sharding of an array of ``ndim`` axes without one of them."""
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return NamedSharding(sharding.mesh, P(*spec[:axis], *spec[axis + 1 :]))


def _member(leaf: Shaped[Any, "..."], index: int, ndim: int) -> Shaped[Any, "..."]:
    """Return a slice of a role's array, in which ``ndim`` axes follow the axis of the members."""
    axis = leaf.ndim - ndim - 1
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf[(slice(None),) * axis + (index,)]
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = _without_axis(sharding, leaf.ndim, axis)
    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
