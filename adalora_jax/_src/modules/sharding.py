"""Where adapters lie on a mesh of devices: as the weights they adapt, unless told otherwise.

The engine is JAX's own: a ``jax.sharding.NamedSharding`` for each array, and ``jax.jit``. What is
here only says which. Of an adapter, p lies as the weight's output axes, q as its input axes, the
stack as the weight's stack; triplets are on all devices. Averages, masks and the optimizer's
moments lie as what they belong to, and everything else is on all devices.
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
from adalora_jax._src.core.pytree import PyTree

# By pattern, or as a function of a path and what was derived for it.
Rules: TypeAlias = Mapping[str, Adapter] | Callable[[str, Adapter], Adapter]


def adapter_specs(layer: Layout, shape: Sequence[int], spec: PartitionSpec) -> Adapter:
    """The :class:`Adapter` of PartitionSpecs that goes with a weight's.

    Where several axes of a weight are one axis of the adapter, that one can be split only as the
    first of them that is longer than 1: a block of a later one is in many places of the whole. So
    a convolution's q is not split by its input channels, while heads before head sizes are kept.

    Args:
      layer: how the weight reads as matrices.
      shape: of the whole weight, stacked axes included.
      spec: of the weight; what it leaves out is not split.

    >>> dense = Layout()
    >>> specs = adapter_specs(dense, (12, 64, 256), PartitionSpec("layers", "fsdp", "model"))
    >>> specs.p, specs.lam, specs.q
    (P('layers', None, 'model'), P('layers', None), P('layers', None, 'fsdp'))
    >>> conv = Layout("kernel", (0, 1), (2,), kind="conv")
    >>> adapter_specs(conv, (3, 8, 16), PartitionSpec(None, "fsdp", "model")).q
    P(None, None)
    """
    names = full(spec, len(shape))
    lifted = len(shape) - len(layer.stack) - len(layer.ins) - len(layer.outs)
    at = lambda axes: [(names[lifted + axis], shape[lifted + axis]) for axis in axes]
    first = lambda axes: next((name for name, size in at(axes) if size > 1), None)
    stack = (*names[:lifted], *(name for name, _ in at(layer.stack)))
    specs: Any = (  # an Adapter is typed as one of arrays
        PartitionSpec(*stack, None, first(layer.outs)),
        PartitionSpec(*stack, None),
        PartitionSpec(*stack, None, first(layer.ins)),
    )
    return Adapter(*specs)


def sharding_of(
    weight: Any, named: NamedSharding | PartitionSpec | None = None
) -> NamedSharding | PartitionSpec | None:
    """Where a weight lies: by its array's NamedSharding, or else as its metadata has it.

    Args:
      weight: an array, a tracer, a ``jax.ShapeDtypeStruct``, or an object that holds some, such as
        packed integers with their scales; the one that has as many axes as the object counts.
      named: what the framework's metadata says.

    >>> sharding_of(jax.numpy.ones((4, 6)), PartitionSpec("fsdp"))
    P('fsdp',)
    """
    axes = lambda node: len(getattr(node, "shape", ()))
    leaf = next((x for x in jax.tree.leaves(weight) if axes(x) == axes(weight)), None)
    # To ask a tracer for its sharding takes JAX as long as the program is, to refuse it in words.
    found = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if found is None and isinstance(leaf, jax.Array):  # its type may tell
        found = jax.typeof(leaf).sharding
        found = found if found.mesh.axis_names and found.mesh.are_all_axes_explicit else None
    return found if isinstance(found, NamedSharding) else named


def spec_of(where: NamedSharding | PartitionSpec | None) -> PartitionSpec:
    """The PartitionSpec of what :func:`sharding_of` gave; None is on all devices.

    >>> spec_of(None)
    P()
    """
    spec = where.spec if isinstance(where, NamedSharding) else where
    return PartitionSpec() if spec is None else spec


def full(spec: Any, ndim: int) -> PartitionSpec:
    """The spec with an entry for each axis, so that it can be told which of them axes in front are.

    >>> full(PartitionSpec("data"), 2)
    P('data', None)
    """
    return PartitionSpec(*spec, *[None] * (ndim - len(spec)))


def derive(
    weights: Mapping[str, tuple[Layout, Sequence[int], NamedSharding | PartitionSpec | None]],
    rules: Rules | None = None,
) -> dict[str, Adapter]:
    """``{path: Adapter}`` of PartitionSpecs for all adapted weights.

    Args:
      weights: by path: how each reads as matrices, its shape, and where it lies.
      rules: what is to be different. ``{pattern: Adapter of PartitionSpecs}``, with patterns as in
        ``rank_limits``: a regex for the whole path or for its end at a separator, of which the
        first that matches counts. Or a function of the path and the derived Adapter, which gives
        one.

    Raises:
      ValueError: a pattern matches nothing, or a rule gives something else than an Adapter of
        PartitionSpecs of the right length.

    >>> dense = Layout()
    >>> weights = {"up": (dense, (64, 256), PartitionSpec("fsdp", "model"))}
    >>> derive(weights, {"up": Adapter(*[PartitionSpec()] * 3)})
    {'up': Adapter(p=P(None, None), lam=P(None,), q=P(None, None), scale=1.0)}
    """
    specs = {
        path: adapter_specs(layer, shape, spec_of(where))
        for path, (layer, shape, where) in weights.items()
    }
    if isinstance(rules, Mapping):
        for pattern in rules:
            if not any(rank_spec.matches(pattern, path) for path in specs):
                raise ValueError(
                    f"sharding: {pattern!r} matches no adapted layer; they are "
                    f"{', '.join(list(specs)[:10])}."
                )
        by_pattern = rules
        rules = lambda path, spec: next(
            (by_pattern[p] for p in by_pattern if rank_spec.matches(p, path)), spec
        )
    if rules is None:
        return specs
    return {path: _checked(path, rules(path, spec), spec) for path, spec in specs.items()}


def on_mesh(specs: PyTree, base: PyTree) -> PyTree:
    """A tree of PartitionSpecs as NamedShardings on the mesh of the base; None without a mesh."""
    mesh = mesh_of(base)
    return mesh and jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def placed(make: Callable[..., PyTree], shardings: PyTree | None, *args: Any) -> PyTree:
    """What ``make(*args)`` gives, jitted, each array made where ``shardings`` says.

    >>> placed(jax.numpy.zeros_like, None, jax.numpy.ones(2))
    Array([0., 0.], dtype=float32)
    """
    arrays = jax.jit(make, out_shardings=shardings)(*args)
    if shardings is None:
        return arrays
    # Of a trace within another one the outer one does not learn where explicit axes lie.
    explicit = lambda leaf, at: isinstance(leaf, Tracer) and at.mesh.are_all_axes_explicit
    put = lambda leaf, at: jax.device_put(leaf, at) if explicit(leaf, at) else leaf
    return jax.tree.map(put, arrays, shardings)


def mesh_of(placed: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh of the first array or NamedSharding that has one, or else that of ``jax.set_mesh``.

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
    except ValueError:  # in a trace there are no devices
        return mesh


def _checked(path: str, given: Any, derived: Adapter) -> Adapter:
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    if not isinstance(given, Adapter) or not all(map(is_spec, given)):
        raise ValueError(
            f"sharding gave {given!r} for {path!r}: it must be an Adapter of three PartitionSpecs, "
            f"such as {derived!r}."
        )
    if any(len(spec) > len(own) for spec, own in zip(given, derived)):
        raise ValueError(
            f"sharding gave {given!r} for {path!r}, with more axes than the adapter has: at most "
            f"as many as in {derived!r}."
        )
    whole: Any = (full(spec, len(own)) for spec, own in zip(given, derived))
    return Adapter(*whole)
