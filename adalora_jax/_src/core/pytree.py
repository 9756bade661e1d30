"""Adapters in pytrees: in a dict, a Flax dict, an NNX State, or a mixture of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import optax
from jax import tree_util
from jax.tree_util import KeyPath

from adalora_jax._src import _compat
from adalora_jax._src.core.adapter import Adapter, check_adapter

PyTree: TypeAlias = Any  # containers of any kind, with arrays and adapters in them

ADAPTER_KEY = "adalora"  # key of an adapter's p, lam and q among the variables of a Flax module
PACKED = "quantized"  # linen collection of weights that are stored as packed integers
_FIELDS = frozenset(Adapter._fields)
_Found = TypeVar("_Found", bound=Mapping[str, Adapter])


def is_adapter(node: object) -> bool:
    """Return whether a node is an :class:`Adapter` or a mapping with exactly the keys p, lam and q.

    Flax parameter trees and NNX States represent an adapter as such a mapping.

    >>> is_adapter({"p": 0, "lam": 0, "q": 0}), is_adapter({"kernel": 0})
    (True, False)
    """
    return isinstance(node, Adapter) or (isinstance(node, Mapping) and set(node) == _FIELDS)


def is_packed(node: object) -> bool:
    """Return whether a weight is stored as packed integers, which computations must dequantise.

    >>> is_packed(1.0)
    False
    """
    return hasattr(node, "dequantize")


def is_by_role(node: object) -> bool:
    """Return whether a node is a :class:`ByRole`, a mapping by path with one array per role.

    >>> is_by_role({"query": 1.0})
    False
    """
    return hasattr(node, "stacked")


def is_stacked(node: object) -> bool:
    """Return whether a node is a :class:`StackedAdapters`, a tree that ``stack`` returned.

    >>> is_stacked({"query": 1.0})
    False
    """
    return hasattr(node, "by_role")


def get_path(nested: PyTree, path: Sequence[str]) -> PyTree:
    """Return the node of nested dicts at ``path``; None if there is none.

    >>> get_path({"up": {"kernel": 1}}, ["up", "kernel"]), get_path({"up": 1}, ["down"])
    (1, None)
    """
    for name in path:
        nested = nested.get(name) if isinstance(nested, Mapping) else None
    return nested


def weight_path(params: PyTree, path: str, weight: str) -> list[str]:
    """Return the path of a layer's weight in nested parameters, as a list of names.

    A layer's path is that of its module, or that of its weight if a scope has several weights.

    >>> params = {"up": {"kernel": 1}, "mlp": {"gate": 2, "linear": 3}}
    >>> weight_path(params, "up", "kernel"), weight_path(params, "mlp/linear", "linear")
    (['up', 'kernel'], ['mlp', 'linear'])
    """
    parts = [*filter(None, path.split("/"))]
    node = get_path(params, parts)
    return [*parts, weight] if node is None or isinstance(node, Mapping) else parts


def is_variable(node: object) -> bool:
    """Return whether a node is an NNX Variable, which holds an array and its sharding metadata.

    >>> is_variable(1.0)
    False
    """
    return hasattr(node, "get_value")


def stacked_variable(variable: PyTree, value: PyTree) -> PyTree:
    """Return ``value``, in a Variable if ``variable`` is one, with one axis in front of its axes.

    The new axis is not sharded: the sharding in the metadata, by which an optimizer's state is
    placed, gets a None in front.

    >>> stacked_variable(1.0, 2.0)
    2.0
    """
    if not is_variable(variable):
        return value
    key = _compat.sharding_key(variable)
    spec = variable.get_metadata(key, None)
    if hasattr(spec, "mesh"):
        mesh, inner = spec.mesh, spec.spec
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *inner))
    elif spec:
        spec = (None, *spec)
    return variable.copy(value, **{key: spec})


def unwrap_variables(tree: PyTree) -> PyTree:
    """Return ``tree`` with every NNX Variable replaced by its array.

    >>> unwrap_variables({"a": 1.0})
    {'a': 1.0}
    """

    def get(node: PyTree) -> PyTree:
        return node.get_raw_value() if is_variable(node) else node

    return jax.tree.map(get, tree, is_leaf=is_variable)


def match_containers(containers: PyTree, values: PyTree) -> PyTree:
    """Return the leaves of ``values`` in the containers and NNX Variables of ``containers``.

    >>> match_containers({"a": 1, "b": 2}, [3, 4])
    {'a': 3, 'b': 4}
    """
    return jax.tree.unflatten(jax.tree.structure(containers), jax.tree.leaves(values))


def insert_adapters(tree: PyTree, new: Mapping[str, Adapter]) -> PyTree:
    """Return ``tree`` with the arrays of its adapters replaced by those of ``{path: Adapter}``.

    Adapters whose path is not in ``new``, and all other leaves, stay as they are.

    >>> import jax.numpy as jnp
    >>> tree = {"a": {"p": jnp.ones((2, 3)), "lam": jnp.ones(2), "q": jnp.ones((2, 4))}, "b": 1.0}
    >>> zeros = {path: jax.tree.map(jnp.zeros_like, a) for path, a in adapters(tree).items()}
    >>> new = insert_adapters(tree, zeros)
    >>> new["a"]["lam"], new["b"]
    (Array([0., 0.], dtype=float32), 1.0)
    """
    if is_stacked(tree):
        return tree.replace(new)
    nodes, treedef = _nodes(tree)

    def replaced(path: KeyPath, node: PyTree) -> PyTree:
        name = path_name(path)
        return _cast_like(node, new[name]) if is_adapter(node) and name in new else node

    return treedef.unflatten([replaced(path, node) for path, node in nodes])


def with_static_fields(grads: PyTree, params: PyTree) -> PyTree:
    """Return ``grads`` with the scale and layout of the parameters in each :class:`Adapter`.

    Gradients constructed as ``Adapter(p, lam, q)`` have default metadata. Scale and layout are part
    of a pytree's structure, so JAX would reject them as a different structure.
    """
    if is_stacked(grads):
        return grads
    known = adapters(params)

    def like(path: KeyPath, node: PyTree) -> PyTree:
        adapter = known.get(path_name(path))
        if adapter is None or not isinstance(node, Adapter):
            return node
        return node._replace(scale=adapter.scale, layout=adapter.layout)

    def is_leaf(node: PyTree) -> bool:
        return isinstance(node, Adapter)

    return tree_util.tree_map_with_path(like, grads, is_leaf=is_leaf)


def insert_values(tree: PyTree, values: Mapping[str, PyTree]) -> PyTree:
    """Return the containers of ``tree`` with ``values[path]`` per adapter and None elsewhere.

    For adapters that are stacked by role, it is the mapping ``values``.

    >>> insert_values({"query": Adapter(1, 2, 3), "bias": 4}, {"query": True})
    {'bias': None, 'query': True}
    """
    if is_stacked(tree):
        return dict(values)
    nodes, treedef = _nodes(tree)
    return treedef.unflatten(
        [values.get(path_name(path)) if is_adapter(node) else None for path, node in nodes]
    )


def adapters(tree: PyTree, *, variables: bool = False) -> dict[str, Adapter]:
    """Return ``{path: Adapter}`` of all adapters in ``tree``, in the order of its leaves.

    This is the one form in which all computations take adapters. Scale and layout are None for an
    adapter that is stored as a mapping of arrays. For one in an NNX State they are read from the
    metadata of its ``lam``.

    Args:
      tree: a dict, a Flax dict, an NNX State, or a mixture of them; or a :class:`ByRole`. Adapters
        that ``optax.masked`` removed are skipped.
      variables: True keeps NNX Variables; False replaces them by their arrays.

    Returns:
      A dict of :class:`Adapter`. A path is ``encoder/query``; that of an adapter at the root is
      ``""``.

    Raises:
      TypeError: ``tree`` is an adapted NNX model; ``nnx.adapters`` reads it.
      ValueError: the shapes of an adapter are inconsistent, only some of p, lam and q are masked
        out by optax, two adapters have the same path, or adapters are stacked by role.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))
    >>> list(adapters({"encoder": {"query": adapter, "bias": jnp.ones(3)}}))
    ['encoder/query']
    """
    if is_by_role(tree):
        return dict(tree)
    result: dict[str, Adapter] = {}
    for path, node in _nodes(tree)[0]:
        adapter = _as_adapter(node, path, is_variable if variables else None)
        if tree_util.GetAttrKey(ADAPTER_KEY) in path:
            raise TypeError(
                f"`tree={type(tree).__name__}`: is an NNX model, not a tree of adapters; call "
                "adalora_jax.nnx.adapters(model), or pass nnx.state(model)."
            )
        if adapter is None:
            continue
        name = path_name(path)
        if name in result:
            raise ValueError(
                f"`adapters[{name!r}]`: is the path of two adapters; rename one of their keys."
            )
        result[name] = adapter._replace(**_static_fields(node))
    return result


def trained_adapters(tree: PyTree) -> Mapping[str, Adapter]:
    """Return the adapters by path, also those of a tree that ``stack`` returned.

    A mapping by role is returned as is: its values are slices, so that a loop over its items slices
    every array. Functions of training map over it with ``map_adapters`` instead.

    >>> adapter = Adapter(*map(jax.numpy.ones, ((2, 3), 2, (2, 4))))
    >>> list(trained_adapters({"query": adapter}))
    ['query']
    """
    if is_stacked(tree):
        _check_not_masked(tree.by_role)
        return tree.by_role
    return tree if is_by_role(tree) else adapters(tree)


def _check_not_masked(by_role: PyTree) -> None:
    """Raise an error if ``optax.masked`` or ``optax.partition`` removed leaves of a role."""

    def is_masked(node: object) -> bool:
        return isinstance(node, optax.MaskedNode)

    for name, value in by_role.stacked.items():
        if any(map(is_masked, jax.tree.leaves(value, is_leaf=is_masked))):
            raise ValueError(
                f"`params`: optax masks leaves of the role {name!r}, but ranks are allocated over "
                "all roles of stacked adapters; group or mask them inside, "
                "adalora(optax.partition(...), config), or leave adapters out before stack."
            )


def require_adapters(
    tree: PyTree, name: str, way_out: str, read: Callable[[PyTree], _Found] = adapters
) -> _Found:
    """Return ``read(tree)`` of the argument ``name``; raise a ValueError if it has no adapter.

    Args:
      tree: any tree.
      name: name of the argument, for the message.
      way_out: what to pass instead, for the message.
      read: :func:`adapters` or :func:`trained_adapters`.

    >>> require_adapters({"head": 1.0}, "params", "pass the adapters")
    Traceback (most recent call last):
        ...
    ValueError: `params`: no adapter was found in the dict; pass the adapters.
    """
    if found := read(tree):
        return found
    raise ValueError(f"`{name}`: no adapter was found in the {type(tree).__name__}; {way_out}.")


def _static_fields(node: PyTree) -> dict[str, Any]:
    """Return the scale and layout from the metadata of an NNX adapter's ``lam``."""
    lam: Any = node["lam"] if isinstance(node, Mapping) else None
    if not is_variable(lam):
        return {}
    known: Any = lam.get_metadata()
    return {name: known[name] for name in ("scale", "layout") if name in known}


def leaves_with_path(tree: PyTree) -> dict[str, PyTree]:
    """Return ``{path: leaf}`` for a tree with one leaf per adapter, such as the masks.

    >>> leaves_with_path({"encoder": {"query": 1, "adalora": 2}})
    {'encoder': 2, 'encoder/query': 1}
    """
    if is_by_role(tree):
        return dict(tree)
    return {path_name(path): leaf for path, leaf in tree_util.tree_flatten_with_path(tree)[0]}


def param_labels(tree: PyTree, other: str = "other") -> PyTree:
    """Return ``"p"``, ``"lam"`` or ``"q"`` for the leaves of adapters, ``other`` for other leaves.

    With ``optax.partition`` these labels give each factor its own optimizer: freeze one, or train
    it with another learning rate.

    Args:
      tree: any tree with adapters in it, such as the trainable parameters.
      other: label of the leaves that do not belong to an adapter.

    Returns:
      A tree of strings in the containers of ``tree``.

    >>> import jax.numpy as jnp, optax
    >>> adapter = Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))
    >>> param_labels({"query": adapter, "head": jnp.ones(3)})
    {'head': 'other', 'query': Adapter(p='p', lam='lam', q='q', scale=1.0)}
    >>> rates = {"p": optax.sgd(1.0), "q": optax.sgd(1.0), "lam": optax.set_to_zero()}
    >>> tx = optax.partition(rates, param_labels)
    """
    nodes, treedef = _nodes(tree, inside=True)
    names: Any = Adapter._fields
    return treedef.unflatten(
        [_cast_like(n, Adapter(*names)) if is_adapter(n) else other for _, n in nodes]
    )


def path_name(path: KeyPath) -> str:
    """Return a key path as ``a/b/c``; the key :data:`ADAPTER_KEY` at its end is omitted.

    >>> path_name([tree_util.DictKey(key) for key in ("layers", 0, ADAPTER_KEY)])
    'layers/0'
    """
    if path and tree_util.keystr(path[-1:], simple=True) == ADAPTER_KEY:
        path = path[:-1]
    return tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: PyTree) -> list[str]:
    """Return the paths of the leaves; an NNX Variable counts as one leaf.

    >>> leaf_paths({"up": {"kernel": 1.0}})
    ['up/kernel']
    """
    named = tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]
    return [tree_util.keystr(path, simple=True, separator="/") for path, _ in named]


def row_name(path: str, index: tuple[int, ...]) -> str:
    """Return the name of a matrix: its path, with its index if it is a slice of a stack.

    >>> row_name("layers/up", (0, 3)), row_name("head", ())
    ('layers/up[0,3]', 'head')
    """
    return f"{path}[{','.join(map(str, index))}]" if index else path


def leaf_name(path: KeyPath) -> str:
    """Return a leaf's key path as ``a/b/c``, equal for a dict, a Flax dict and an NNX State.

    >>> leaf_name([tree_util.DictKey(key) for key in ("up", ADAPTER_KEY, "lam")])
    'up/lam'
    """
    if path and path[-1] == tree_util.GetAttrKey("value"):  # the array in an NNX Variable
        path = path[:-1]
    parts = (tree_util.keystr((key,), simple=True) for key in path)
    return "/".join(part for part in parts if part not in ("", ADAPTER_KEY))


def _nodes(tree: PyTree, *, inside: bool = False) -> tuple[list[tuple[KeyPath, PyTree]], Any]:
    """Flatten ``tree`` with path; each adapter, and each NNX Variable elsewhere, is one leaf.

    The structure is then independent of whether the parameters are Variables, as in an optimizer's
    ``init``, or arrays, as in its ``update``.

    Args:
      tree: any tree; unless ``inside``, without adapters that are stacked by role.
      inside: True: the adapters of a tree that ``stack`` returned are those of its roles.
    """

    def is_leaf(node: PyTree) -> bool:
        whole = is_stacked(node) and not (inside and node is tree)
        return is_adapter(node) or is_variable(node) or whole

    nodes, treedef = tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    for path, node in nodes:
        if is_stacked(node):
            at = f"adapters[{path_name(path)!r}]" if path else "adapters"
            raise ValueError(
                f"`{at}`: are stacked by role, which only functions of training take, and as the "
                "whole tree; pass unstack(adapters), or stack the whole tree of parameters."
            )
    return nodes, treedef


def _as_adapter(
    node: PyTree, path: KeyPath, is_leaf: Callable[[PyTree], bool] | None = None
) -> Adapter | None:
    """Return the node as an :class:`Adapter`; None if it is not one or is masked out by optax.

    A mapping of arrays has no metadata about its weight, so its scale and layout are unknown.
    """
    if not is_adapter(node):
        return None
    get = node.__getitem__ if isinstance(node, Mapping) else functools.partial(getattr, node)
    name = f"adapters[{path_name(path)!r}]" if path_name(path) else "adapter"
    masked = [name for name in Adapter._fields if isinstance(get(name), optax.MaskedNode)]
    if len(masked) == len(Adapter._fields):
        return None
    if masked:
        raise ValueError(
            f"`{name}`: has no {' and '.join(masked)}, but ranks are allocated from p, lam and q "
            "together; group or mask them inside, adalora(optax.partition(...), config), or "
            "leave whole adapters out."
        )
    if isinstance(node, Adapter):
        leaves = jax.tree.leaves(node, is_leaf=is_leaf)
        adapter = node._replace(**dict(zip(Adapter._fields, leaves)))
    else:
        named = tree_util.tree_flatten_with_path(node, is_leaf)[0]
        leaves = {_field(key): leaf for key, leaf in named}
        adapter = Adapter(**leaves, scale=None, layout=None)
    if all(hasattr(leaf, "shape") for leaf in adapter):
        check_adapter(adapter, name)
    return adapter


def _cast_like(node: PyTree, adapter: Adapter) -> PyTree:
    """Return ``adapter`` in the containers of ``node``: an Adapter, a dict, or an NNX State."""
    named, treedef = tree_util.tree_flatten_with_path(node)
    return treedef.unflatten([getattr(adapter, _field(key)) for key, _ in named])


def _field(path: KeyPath) -> str:
    """Return the first entry of a leaf's path inside an adapter: p, lam or q."""
    return tree_util.keystr(path[:1], simple=True)
