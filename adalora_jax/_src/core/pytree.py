"""Adapters in pytrees: in a dict, a Flax dict, an NNX State, or a mixture of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax
from jax import tree_util

from adalora_jax._src.core.adapter import Adapter, check_adapter

PyTree: TypeAlias = Any  # containers of any kind, with arrays and adapters in them

ADAPTER_KEY = "adalora"  # key of an adapter's p, lam and q among the variables of a Flax module
PACKED = "quantized"  # linen collection of weights that are stored as packed integers
BATCH = 128  # maximum number of adapters per call of a traced function
_FIELDS = frozenset(Adapter._fields)


def is_adapter(node: Any) -> bool:
    """Return whether a node is an :class:`Adapter` or a mapping with exactly the keys p, lam and q.

    Flax parameter trees and NNX States represent an adapter as such a mapping.

    >>> is_adapter({"p": 0, "lam": 0, "q": 0}), is_adapter({"kernel": 0})
    (True, False)
    """
    return isinstance(node, Adapter) or (isinstance(node, Mapping) and set(node) == _FIELDS)


def is_packed(node: Any) -> bool:
    """Return whether a weight is stored as packed integers, which computations must dequantise.

    >>> is_packed(1.0)
    False
    """
    return hasattr(node, "dequantize")


def get_path(nested: Any, path: Sequence[str]) -> Any:
    """Return the node of nested dicts at ``path``; None if there is none.

    >>> get_path({"up": {"kernel": 1}}, ["up", "kernel"]), get_path({"up": 1}, ["down"])
    (1, None)
    """
    for name in path:
        nested = nested.get(name) if isinstance(nested, Mapping) else None
    return nested


def weight_path(params: Any, path: str, weight: str) -> list[str]:
    """Return the path of a layer's weight in nested parameters, as a list of names.

    A layer's path is that of its module, or that of its weight if a scope has several weights.

    >>> params = {"up": {"kernel": 1}, "mlp": {"gate": 2, "linear": 3}}
    >>> weight_path(params, "up", "kernel"), weight_path(params, "mlp/linear", "linear")
    (['up', 'kernel'], ['mlp', 'linear'])
    """
    parts = [*filter(None, path.split("/"))]
    node = get_path(params, parts)
    return [*parts, weight] if node is None or isinstance(node, Mapping) else parts


def is_variable(node: Any) -> bool:
    """Return whether a node is an NNX Variable, which holds an array and its sharding metadata.

    >>> is_variable(1.0)
    False
    """
    return hasattr(node, "get_value")


def unwrap_variables(tree: PyTree) -> PyTree:
    """Return ``tree`` with every NNX Variable replaced by its array.

    >>> unwrap_variables({"a": 1.0})
    {'a': 1.0}
    """
    get = lambda node: node.get_raw_value() if is_variable(node) else node
    return jax.tree.map(get, tree, is_leaf=is_variable)


def extract_adapters(tree: PyTree, *, variables: bool = False) -> PyTree:
    """Return the containers of ``tree`` with an :class:`Adapter` per adapter and None elsewhere.

    This canonical form is the input of ``jax.tree.map`` in all computations over adapters.

    Args:
      tree: containers of any kind.
      variables: True keeps NNX Variables; False replaces them by their arrays.

    Raises:
      ValueError: the shapes of an adapter are inconsistent, or only some of p, lam and q are masked
        out by optax.

    >>> import jax.numpy as jnp
    >>> tree = {"a": {"p": jnp.ones((2, 3)), "lam": jnp.ones(2), "q": jnp.ones((2, 4))}, "b": 1.0}
    >>> extract_adapters(tree)["a"].lam.shape, extract_adapters(tree)["b"]
    ((2,), None)
    """
    nodes, treedef = _nodes(tree)
    is_leaf = is_variable if variables else None
    return treedef.unflatten([_as_adapter(node, path, is_leaf) for path, node in nodes])


def map_adapters(function: Callable[..., Any], adapters: PyTree, *rest: PyTree) -> Any:
    """Map a function over a canonical tree like ``jax.tree.map``, but per :class:`Adapter`.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))
    >>> map_adapters(lambda adapter: adapter.lam.size, {"query": adapter, "bias": None})
    {'bias': None, 'query': 2}
    """
    is_leaf = lambda node: isinstance(node, Adapter)
    return jax.tree.map(function, adapters, *rest, is_leaf=is_leaf)


def adapter_leaves(adapters: PyTree) -> list[Any]:
    """Flatten a canonical tree to a list; each Adapter, or value in its position, is one leaf.

    >>> adapter_leaves({"key": None, "query": Adapter(1, 2, 3)})
    [Adapter(p=1, lam=2, q=3, scale=1.0)]
    >>> adapter_leaves({"key": None, "query": True})
    [True]
    """
    return jax.tree.leaves(adapters, is_leaf=lambda node: isinstance(node, Adapter))


def unflatten_adapters(adapters: PyTree, values: Sequence[Any]) -> PyTree:
    """Return a canonical tree with its adapters replaced by ``values``, in the tree's order.

    >>> unflatten_adapters({"key": None, "query": Adapter(1, 2, 3)}, [True])
    {'key': None, 'query': True}
    """
    is_leaf = lambda node: isinstance(node, Adapter)
    return jax.tree.structure(adapters, is_leaf=is_leaf).unflatten(values)


def group_by_shape(*columns: Sequence[Any]) -> list[list[int]]:
    """Group adapters with equal types in all columns; return batches of at most 128 indices.

    A type is shape, dtype and, on a mesh with explicit axes, sharding. A jitted function of one
    batch is traced per type, not per adapter, so thousands of adapters are traced in seconds.

    >>> import numpy as np
    >>> group_by_shape([np.ones(2), np.ones(3), np.ones(2)])
    [[0, 2], [1]]
    """
    kinds: dict[Any, list[int]] = {}
    for index, row in enumerate(zip(*columns)):
        kind = tuple(map(jax.typeof, jax.tree.leaves(row)))
        kinds.setdefault(kind, []).append(index)
    return [
        members[start : start + BATCH]
        for members in kinds.values()
        for start in range(0, len(members), BATCH)
    ]


def by_role(indices: Iterable[int], paths: Sequence[str]) -> list[list[int]]:
    """Return the indices in groups whose paths differ only in numbers.

    Layers of one role have the same sharding, so their arrays can be joined without communication.

    >>> by_role(range(3), ["h/0/up", "h/0/down", "h/1/up"])
    [[0, 2], [1]]
    """
    roles: dict[str, list[int]] = {}
    for index in indices:
        roles.setdefault(re.sub(r"\d+", "*", paths[index]), []).append(index)
    return list(roles.values())


def gather(batch: Sequence[int], *columns: Sequence[Any]) -> list[list[Any]]:
    """Return the entries of each column at the indices of a batch.

    >>> gather([0, 2], "abc", "xyz")
    [['a', 'c'], ['x', 'z']]
    """
    return [[column[index] for index in batch] for column in columns]


def map_groups(
    function: Callable[..., Any], batches: Iterable[Sequence[int]], *columns: Sequence[Any]
) -> list[Any]:
    """Apply a function of lists to each batch; return one result per entry, in the columns' order.

    The result is ``[f(*row) for row in zip(*columns)]``, where ``function`` maps f over lists.

    >>> map_groups(lambda a, b: [x + y for x, y in zip(a, b)], [[0, 2], [1]], "abc", "xyz")
    ['ax', 'by', 'cz']
    """
    batches = list(batches)
    return scatter(batches, [function(*gather(batch, *columns)) for batch in batches])


def scatter(batches: Sequence[Sequence[int]], values: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the values of all batches as one list, in the order of the adapters.

    >>> scatter([[0, 2], [1]], ["ac", "b"])
    ['a', 'b', 'c']
    """
    results: list[Any] = [None] * sum(map(len, batches))
    for batch, value in zip(batches, values):
        for index, one in zip(batch, value):
            results[index] = one
    return results


def match_containers(own: PyTree, values: PyTree) -> Any:
    """Return the leaves of ``values`` in the containers and NNX Variables of ``own``.

    >>> match_containers({"a": 1, "b": 2}, [3, 4])
    {'a': 3, 'b': 4}
    """
    return jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(values))


def replace_adapters(tree: PyTree, adapters: PyTree) -> PyTree:
    """Return ``tree`` with the values of its adapters replaced by those of a canonical tree.

    >>> import jax.numpy as jnp
    >>> tree = {"a": {"p": jnp.ones((2, 3)), "lam": jnp.ones(2), "q": jnp.ones((2, 4))}, "b": 1.0}
    >>> zeros = jax.tree.map(jnp.zeros_like, extract_adapters(tree))
    >>> new = replace_adapters(tree, zeros)
    >>> new["a"]["lam"], new["b"]
    (Array([0., 0.], dtype=float32), 1.0)
    """
    nodes, treedef = _nodes(tree)
    values = treedef.flatten_up_to(adapters)
    return treedef.unflatten(
        [
            node if value is None else _cast_like(node, value)
            for (_, node), value in zip(nodes, values)
        ]
    )


def adapters(tree: PyTree) -> dict[str, Adapter]:
    """Return ``{path: Adapter}`` of all adapters in ``tree``, in the order of its leaves.

    Scale and layout are None for an adapter that is stored as a mapping of arrays. For one in an
    NNX State they are read from the metadata of its ``lam``.

    Args:
      tree: a dict, a Flax dict, an NNX State, or a mixture of them. Adapters that
        ``optax.masked`` removed are skipped.

    Returns:
      A dict of :class:`Adapter` with the arrays of NNX Variables in place of the Variables. A path
      is ``encoder/query``; that of an adapter at the root is ``""``.

    Raises:
      ValueError: the shapes of an adapter are inconsistent, or only some of p, lam and q are masked
        out by optax.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))
    >>> list(adapters({"encoder": {"query": adapter, "bias": jnp.ones(3)}}))
    ['encoder/query']
    """
    result = {}
    for path, node in _nodes(tree)[0]:
        adapter = _as_adapter(node, path)
        if adapter is not None:
            result[path_name(path)] = adapter._replace(**_facts(node))
    return result


def _facts(node: Any) -> dict[str, Any]:
    """Return the scale and layout from the metadata of an NNX adapter's ``lam``."""
    lam: Any = node["lam"] if isinstance(node, Mapping) else None
    if not is_variable(lam):
        return {}
    known: Any = lam.get_metadata()
    return {name: known[name] for name in ("scale", "layout") if name in known}


def leaves_with_path(tree: PyTree) -> dict[str, Any]:
    """Return ``{path: leaf}`` for a tree with one leaf per adapter, such as the masks.

    >>> leaves_with_path({"encoder": {"query": 1, "adalora": 2}})
    {'encoder': 2, 'encoder/query': 1}
    """
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
    nodes, treedef = _nodes(tree)
    names: Any = Adapter._fields
    return treedef.unflatten(
        [_cast_like(n, Adapter(*names)) if is_adapter(n) else other for _, n in nodes]
    )


def path_name(path: tuple[Any, ...]) -> str:
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


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return a leaf's key path as ``a/b/c``, equal for a dict, a Flax dict and an NNX State.

    >>> leaf_name([tree_util.DictKey(key) for key in ("up", ADAPTER_KEY, "lam")])
    'up/lam'
    """
    if path and path[-1] == tree_util.GetAttrKey("value"):  # the array in an NNX Variable
        path = path[:-1]
    parts = (tree_util.keystr((key,), simple=True) for key in path)
    return "/".join(part for part in parts if part not in ("", ADAPTER_KEY))


def _nodes(tree):
    """Flatten ``tree`` with path; each adapter, and each NNX Variable elsewhere, is one leaf.

    The structure is then independent of whether the parameters are Variables, as in an optimizer's
    ``init``, or arrays, as in its ``update``.
    """
    is_leaf = lambda node: is_adapter(node) or is_variable(node)
    return tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)


def _as_adapter(node: Any, path: tuple[Any, ...], is_leaf: Any = None) -> Adapter | None:
    """Return the node as an :class:`Adapter`; None if it is not one or is masked out by optax.

    A mapping of arrays has no metadata about its weight, so its scale and layout are unknown.
    """
    if not is_adapter(node):
        return None
    get = node.__getitem__ if isinstance(node, Mapping) else functools.partial(getattr, node)
    masked = [name for name in Adapter._fields if isinstance(get(name), optax.MaskedNode)]
    if len(masked) == len(Adapter._fields):
        return None
    if masked:
        raise ValueError(
            f"the adapter of {path_name(path)!r} comes without {' and '.join(masked)}: rank is "
            "allocated from all three of p, lam and q, so group or mask them inside, "
            "adalora(optax.partition(...), config), or leave whole adapters out."
        )
    if isinstance(node, Adapter):
        leaves = jax.tree.leaves(node, is_leaf=is_leaf)
        adapter = node._replace(**dict(zip(Adapter._fields, leaves)))
    else:
        named = tree_util.tree_flatten_with_path(node, is_leaf)[0]
        leaves = {_field(key): leaf for key, leaf in named}
        adapter = Adapter(**leaves, scale=None, layout=None)
    if all(hasattr(leaf, "shape") for leaf in adapter):
        check_adapter(adapter, path_name(path) or "adapter")
    return adapter


def _cast_like(node: Any, adapter: Adapter) -> Any:
    """Return ``adapter`` in the containers of ``node``: an Adapter, a dict, or an NNX State."""
    named, treedef = tree_util.tree_flatten_with_path(node)
    return treedef.unflatten([getattr(adapter, _field(key)) for key, _ in named])


def _field(path: tuple[Any, ...]) -> str:
    """Return the first entry of a leaf's path inside an adapter: p, lam or q."""
    return tree_util.keystr(path[:1], simple=True)
