"""The parameters of a function by path, and increments added to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.tree_util import KeyPath, keystr, tree_flatten_with_path

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import layers


class Params(NamedTuple):
    """A parameter pytree.

    Attributes:
      leaves: its leaves by path, arrays or not.
      treedef: its structure.
    """

    leaves: dict[str, PyTree]
    treedef: Any

    @classmethod
    def of(cls, params: PyTree) -> Params:
        """Return the leaves and the structure.

        Raises:
          ValueError: two leaves have the same path.
        """
        named, treedef = tree_flatten_with_path(params)
        leaves: dict[str, PyTree] = {}
        for path, leaf in named:
            name = name_of(path)
            if name in leaves:
                raise ValueError(
                    f"`params`: {name!r} is the path of two leaves; rename one of their keys."
                )
            leaves[name] = leaf
        return cls(leaves, treedef)

    def rebuilt(self, leaves: Mapping[str, PyTree]) -> PyTree:
        """Return the pytree with other leaves."""
        return self.treedef.unflatten([leaves[name] for name in self.leaves])

    def with_saved(self, adapters: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Return the leaves, with those of ``modules_to_save`` in place of the base's.

        Raises:
          ValueError: a saved parameter is not in ``params``, or has another shape.
        """
        leaves = dict(self.leaves)
        for path, node in adapters.items() if isinstance(adapters, Mapping) else ():
            if pytree.is_adapter(node):
                continue
            for inner, leaf in tree_flatten_with_path(node)[0]:
                name = "/".join(filter(None, (path, name_of(inner))))
                base: Any = leaves.get(name)
                if not is_array(base) or tuple(base.shape) != tuple(leaf.shape):
                    raise ValueError(
                        f"`adapters[{path!r}]`: has {name!r} of shape {tuple(leaf.shape)}, but the "
                        f"parameters have {_shape(base)} there; pass the adapters of this function."
                    )
                leaves[name] = leaf.astype(base.dtype)
        return leaves


def merge(params: PyTree, adapters: Mapping[str, PyTree], *, safe: bool = False) -> PyTree:
    """Return the parameters with every increment added: ``W + s · qᵀ diag(λ) p``.

    As :func:`adalora_jax.merge`, for the parameters of a function
    (`AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_): each adapter stores the layout of its
    weight, sums are computed in at least float32 and rounded once, to the weight's dtype, and the
    parameters of ``modules_to_save`` replace those of ``params``, in the dtypes of ``params``.
    Masks are not applied: pass the result of :func:`adalora_jax.eval_params`, which applies them.

    Args:
      params: the function's parameters; not changed.
      adapters: ``{path: Adapter}`` and the parameters of ``modules_to_save``, as
        :meth:`AdaptedFunction.init` returned them.
      safe: raise an error if a merged weight is not finite.

    Returns:
      Parameters for ``fn``, in the containers of ``params``.

    Raises:
      TypeError: ``adapters`` is not a mapping.
      ValueError: an adapter fits no weight or has no known scale; or with ``safe`` a result is not
        finite.

    >>> import jax.numpy as jnp
    >>> params = {"query": {"w": jnp.zeros((5, 6))}}
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)), 0.5, Layout("w"))
    >>> float(merge(params, {"query": adapter})["query"]["w"][0, 0])
    2.0
    """
    return _with_increments(params, adapters, safe, sign=1)


def unmerge(params: PyTree, adapters: Mapping[str, PyTree], *, safe: bool = False) -> PyTree:
    """Return the base parameters: subtract the increments that :func:`merge` added.

    The result equals the base to within one rounding of its dtype; keep the original parameters if
    you need them bit for bit. Parameters of ``modules_to_save`` keep their merged values.

    Args:
      params: merged parameters; not changed.
      adapters: the adapters that were merged.
      safe: raise an error if a resulting weight is not finite.

    Returns:
      Parameters, in the containers of ``params``.

    Raises:
      TypeError: ``adapters`` is not a mapping.
      ValueError: as in :func:`merge`, or ``adapters`` contains no adapter but other values.

    >>> import jax.numpy as jnp
    >>> params = {"query": {"w": jnp.zeros((5, 6))}}
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)), 0.5, Layout("w"))
    >>> restored = unmerge(merge(params, {"query": adapter}), {"query": adapter})
    >>> float(restored["query"]["w"][0, 0])
    0.0
    """
    if adapters != {}:  # as compact returns where every rank became 0
        pytree.require_adapters(adapters, "adapters", "pass the adapters that were merged")
    return _with_increments(params, adapters, safe, sign=-1)


def _with_increments(
    params: PyTree, adapters: Mapping[str, PyTree], safe: bool, sign: int
) -> PyTree:
    tree = Params.of(params)
    leaves = tree.with_saved(adapters)
    for path, adapter in adapters_of(adapters).items():
        layer = adapter.layout or Layout(weight_name(path))
        name = leaf_name(path, layer.weight, leaves)
        if name is None:
            raise ValueError(
                f"`adapters[{path!r}]`: the adapter is for a weight called {layer.weight!r}, but "
                f"the parameters are {', '.join([*leaves][:10])}; pass the adapters of these "
                "parameters."
            )
        if layer.kind == "unknown":
            raise ValueError(
                f"`adapters[{path!r}]`: the adapter comes from a file that does not specify the "
                "axes of its weight; read it with like=adapted.init(...), the adapters of this "
                "function."
            )
        leaves[name] = layers.merged_weight(
            path, leaves[name], adapter, layer, sign=sign, safe=safe, name="params"
        )
    return tree.rebuilt(leaves)


def adapters_of(adapters: Mapping[str, PyTree]) -> dict[str, Adapter]:
    """Return ``{path: Adapter}`` of a flat dict of adapters and other parameters.

    Raises:
      TypeError: ``adapters`` is not a mapping.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"`adapters={type(adapters).__name__}`: is not a mapping; pass the dict that init "
            "returned. The arguments are (params, adapters, ...)."
        )
    found = {path: node for path, node in adapters.items() if pytree.is_adapter(node)}
    return {path: pytree.adapters(node)[""] for path, node in found.items()}


def weight_name(name: str) -> str:
    """Return the last part of a leaf's path; ``weight`` for a leaf without a path.

    >>> weight_name("layers/0/w"), weight_name("")
    ('w', 'weight')
    """
    return name.rpartition("/")[2] or "weight"


def leaf_name(path: str, weight: str, leaves: Mapping[str, PyTree]) -> Any:
    """Return the path of the leaf that an adapter is for; None if there is none.

    >>> import jax.numpy as jnp
    >>> leaf_name("query", "w", {"query/w": jnp.ones(2)}), leaf_name("w", "w", {"w": jnp.ones(2)})
    ('query/w', 'w')
    """
    return next((name for name in (f"{path}/{weight}", path) if is_array(leaves.get(name))), None)


def name_of(path: KeyPath) -> str:
    """Return a key path as ``layers/0/w``.

    >>> name_of(tree_flatten_with_path({"layers": [{"w": 1}]})[0][0][0])
    'layers/0/w'
    """
    return keystr(path, simple=True, separator="/")


def is_array(leaf: object) -> bool:
    """Return whether a leaf is an array, a tracer or a ``jax.ShapeDtypeStruct``.

    >>> is_array(1.0)
    False
    """
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _shape(leaf: PyTree) -> str:
    return str(tuple(leaf.shape)) if is_array(leaf) else "no array"
