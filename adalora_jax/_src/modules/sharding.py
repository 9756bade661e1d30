"""Shardings of adapters on a mesh, by default derived from the weights that they adapt.

This module only derives specs: arrays are sharded by JAX, with ``jax.sharding.NamedSharding`` and
``jax.jit``. ``p`` is sharded like the weight's output axes, ``q`` like its input axes, and stack
axes like the weight's stack; the triplet axis is replicated. Averages, masks and the optimizer's
moments are sharded like the leaves that they belong to; all other leaves are replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from adalora_jax._src.core import rank_spec
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import explicit_mesh
from adalora_jax._src.core.pytree import PyTree

# By pattern, or a function of a path and the Adapter of PartitionSpecs derived for it.
Rules: TypeAlias = Mapping[str, Adapter] | Callable[[str, Adapter], Adapter]


def adapter_specs(layer: Layout, shape: Sequence[int], spec: PartitionSpec) -> Adapter:
    """Return the PartitionSpecs of an adapter, derived from that of its weight.

    If several weight axes form one adapter axis, that axis is sharded like the first of them that
    is longer than 1: a block of a later axis is not contiguous in it. So a convolution's q is not
    split along its input channels, but a split along attention heads is kept.

    Args:
      layer: how the weight is read as matrices.
      shape: shape of the whole weight, stacked axes included.
      spec: PartitionSpec of the weight; axes that it omits are replicated.

    Returns:
      An :class:`~adalora_jax.Adapter` with a PartitionSpec in place of each of p, lam and q.

    >>> dense = Layout()
    >>> specs = adapter_specs(dense, (12, 64, 256), PartitionSpec("layers", "fsdp", "model"))
    >>> specs.p, specs.lam, specs.q
    (P('layers', None, 'model'), P('layers', None), P('layers', None, 'fsdp'))
    >>> conv = Layout("kernel", (0, 1), (2,), kind="conv")
    >>> adapter_specs(conv, (3, 8, 16), PartitionSpec(None, "fsdp", "model")).q
    P(None, None)
    """
    names = pad_spec(spec, len(shape))
    lifted = len(shape) - len(layer.stack) - len(layer.ins) - len(layer.outs)

    def at(axes: tuple[int, ...]) -> list[tuple[Any, int]]:
        return [(names[lifted + axis], shape[lifted + axis]) for axis in axes]

    def first(axes: tuple[int, ...]) -> str | tuple[str, ...] | None:
        return next((name for name, size in at(axes) if size > 1), None)

    stack = (*names[:lifted], *(name for name, _ in at(layer.stack)))
    specs: Any = (  # an Adapter is typed as one of arrays
        PartitionSpec(*stack, None, first(layer.outs)),
        PartitionSpec(*stack, None),
        PartitionSpec(*stack, None, first(layer.ins)),
    )
    return Adapter(*specs)


def sharding_of(
    weight: PyTree, named: NamedSharding | PartitionSpec | None = None
) -> NamedSharding | PartitionSpec | None:
    """Return the sharding of a weight: its array's NamedSharding, or else its metadata's.

    Args:
      weight: an array, a tracer, a ``jax.ShapeDtypeStruct``, or an object that contains some, such
        as packed integers with their scales; the first with as many axes as the object is used.
      named: the sharding in the framework's metadata, if any.

    >>> sharding_of(jax.numpy.ones((4, 6)), PartitionSpec("fsdp"))
    P('fsdp',)
    """

    def axes(node: object) -> int:
        return len(getattr(node, "shape", ()))

    leaf = next((x for x in jax.tree.leaves(weight) if axes(x) == axes(weight)), None)
    # A tracer's .sharding raises, and formatting the error takes time linear in the program.
    found = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if found is None and isinstance(leaf, jax.Array):  # its type has a sharding on explicit axes
        mesh = explicit_mesh(leaf)  # metadata also has the axes that are not explicit
        whole = mesh is not None and (named is None or mesh.are_all_axes_explicit)
        found = jax.typeof(leaf).sharding if whole else None
    return found if isinstance(found, NamedSharding) else named


def spec_of(placement: NamedSharding | PartitionSpec | None) -> PartitionSpec:
    """Return the PartitionSpec of a sharding from :func:`sharding_of`; None is replicated.

    >>> spec_of(None)
    P()
    """
    spec = placement.spec if isinstance(placement, NamedSharding) else placement
    return PartitionSpec() if spec is None else spec


def pad_spec(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    """Return a PartitionSpec padded with None to ``ndim`` entries.

    The entries of a padded spec belong to the last axes of an array with more axes.

    >>> pad_spec(PartitionSpec("data"), 2)
    P('data', None)
    """
    return PartitionSpec(*spec, *[None] * (ndim - len(spec)))


def derive_specs(
    weights: Mapping[str, tuple[Layout, Sequence[int], NamedSharding | PartitionSpec | None]],
    rules: Rules | None = None,
) -> dict[str, Adapter]:
    """Return the PartitionSpecs of the adapters of all adapted weights.

    Args:
      weights: by path, the layout, the whole shape, and the sharding of each weight; None for a
        replicated weight.
      rules: replacements for derived specs. Either ``{pattern: Adapter of PartitionSpecs}``, with
        patterns as in ``rank_overrides``: a regex for the whole path or for its end at a separator;
        the first match counts. Or a function ``(path, derived Adapter) -> Adapter``.

    Returns:
      ``{path: Adapter}``, with a PartitionSpec in place of each of p, lam and q.

    Raises:
      ValueError: a pattern matches nothing, or a rule returns anything but an Adapter of
        PartitionSpecs with at most as many entries as the derived ones.

    >>> dense = Layout()
    >>> weights = {"up": (dense, (64, 256), PartitionSpec("fsdp", "model"))}
    >>> derive_specs(weights, {"up": Adapter(*[PartitionSpec()] * 3)})
    {'up': Adapter(p=P(None, None), lam=P(None,), q=P(None, None), scale=1.0)}
    """
    specs = {
        path: adapter_specs(layer, shape, spec_of(placement))
        for path, (layer, shape, placement) in weights.items()
    }
    if rules is None:
        return specs
    rule = _rule_by_pattern(rules, specs) if isinstance(rules, Mapping) else rules
    return {path: _checked(path, rule(path, spec), spec) for path, spec in specs.items()}


def _rule_by_pattern(
    rules: Mapping[str, Adapter], specs: Mapping[str, Adapter]
) -> Callable[[str, Adapter], Adapter]:
    for pattern in rules:
        if not any(rank_spec.matches(pattern, path) for path in specs):
            raise ValueError(
                f"`rules`: {pattern!r} matches no adapted layer; name one of the adapted layers: "
                f"{', '.join(list(specs)[:10])}."
            )

    def rule(path: str, spec: Adapter) -> Adapter:
        return next((rules[p] for p in rules if rank_spec.matches(p, path)), spec)

    return rule


def to_named_sharding(specs: PyTree, base: PyTree) -> PyTree:
    """Convert PartitionSpecs to NamedShardings on the mesh of the base; None without a mesh."""
    mesh = mesh_of(base)
    return mesh and jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def jit_with_shardings(
    make: Callable[..., PyTree], shardings: PyTree | None, *args: PyTree
) -> PyTree:
    """Return ``make(*args)``, jitted, with the given output shardings.

    >>> jit_with_shardings(jax.numpy.zeros_like, None, jax.numpy.ones(2))
    Array([0., 0.], dtype=float32)
    """
    arrays = jax.jit(make, out_shardings=shardings)(*args)
    if shardings is None:
        return arrays

    # A nested jit does not tell the outer trace how explicit axes are sharded.
    def explicit(leaf: jax.Array, at: NamedSharding) -> bool:
        return isinstance(leaf, Tracer) and bool(at.mesh.explicit_axes)

    def put(leaf: jax.Array, at: NamedSharding) -> jax.Array:
        return jax.device_put(leaf, at) if explicit(leaf, at) else leaf

    return jax.tree.map(put, arrays, shardings)


def mesh_of(placed: PyTree) -> Mesh | AbstractMesh | None:
    """Return the mesh of the first array or NamedSharding with one, or that of ``jax.set_mesh``.

    >>> mesh_of({"query": 1.0}) is None
    True
    """
    for leaf in jax.tree.leaves(placed):
        sharding = leaf if isinstance(leaf, NamedSharding) else sharding_of(leaf)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # a trace only has an abstract mesh
        return mesh


def _checked(path: str, given: object, derived: Adapter) -> Adapter:
    def is_spec(leaf: object) -> bool:
        return isinstance(leaf, PartitionSpec)

    if not isinstance(given, Adapter) or not all(map(is_spec, given)):
        raise ValueError(
            f"`rules`: {given!r} for {path!r} is not an Adapter of three PartitionSpecs; give one, "
            f"such as {derived!r}."
        )
    pairs: Any = [*zip(given, derived)]  # an Adapter is typed as one of arrays
    if any(len(spec) > len(full) for spec, full in pairs):
        raise ValueError(
            f"`rules`: {given!r} for {path!r} has more axes than the adapter; give at most as many "
            f"as in {derived!r}."
        )
    whole: Any = (pad_spec(spec, len(full)) for spec, full in pairs)
    return Adapter(*whole)
