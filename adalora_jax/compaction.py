"""What pruning left: ranks, rank patterns, smaller adapters, merged weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from adalora_jax import tree
from adalora_jax.adapter import Adapter
from adalora_jax.allocator import AdaLoraState, AllocatorState
from adalora_jax.config import AdaLoraConfig
from adalora_jax.diagnostics import AllocatorInfo
from adalora_jax.layers import Layer, add_increment, check_fit, finite, weight_increment
from adalora_jax.transform import allocator_state
from adalora_jax.tree import PyTree


def ranks(state_or_masks: Any) -> dict[str, int]:
    """``{path: rank}``: the live triplets of every adapter, a slice of a stack on its own row.

    Args:
      state_or_masks: an :class:`AllocatorState`, an :class:`AllocatorInfo`, an
        :class:`AdaLoraState`, or masks.

    >>> import jax.numpy as jnp
    >>> ranks({"query": jnp.array([True, False]), "up": jnp.array([[True, True], [False, True]])})
    {'query': 1, 'up[0]': 2, 'up[1]': 1}
    """
    result = {}
    for path, mask in _masks(state_or_masks).items():
        live = mask.sum(axis=-1)
        for index in np.ndindex(live.shape):
            result[tree.row_name(path, index)] = int(live[index])
    return result


def rank_pattern(state_or_masks: Any) -> dict[str, list]:
    """``{path: [True, False, ...]}``, what PEFT calls by that name; nested lists for a stack.

    Args:
      state_or_masks: as in :func:`ranks`.

    >>> import jax.numpy as jnp
    >>> rank_pattern({"query": jnp.array([True, False])})
    {'query': [True, False]}
    """
    return {path: mask.tolist() for path, mask in _masks(state_or_masks).items()}


def compact(adapters: PyTree, masks: PyTree) -> dict[str, Adapter]:
    """The adapters without their pruned triplets: the same function, each at its own rank.

    An adapter of rank 0 is left out. The adapters of a stack stay one array, of the largest rank
    among them; what a smaller one has too many is filled up with λ = 0, see :func:`compact_masks`.
    The scale is the config's, as before. The masks decide, never the values of λ. Not for use
    under ``jit``, since the shapes depend on the masks.

    Args:
      adapters: any tree with adapters in it.
      masks: as in :func:`ranks`, of the same paths.

    Returns:
      ``{path: Adapter}``.

    Raises:
      ValueError: an adapter has no mask.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))
    >>> small = compact({"query": adapter}, {"query": jnp.array([True, False, True, False])})
    >>> small["query"].p.shape
    (2, 6)
    """
    by_path = _masks(masks)
    result = {}
    for path, adapter in tree.adapters(adapters).items():
        if path not in by_path:
            raise ValueError(f"masks has none for {path!r}, only for {', '.join(by_path)}.")
        rows, live = _kept(by_path[path])
        if rows.shape[-1] == 0:
            continue
        take = lambda leaf, rows=rows: jnp.take_along_axis(leaf, rows[..., None], axis=-2)
        lam = jnp.take_along_axis(adapter.lam, rows, axis=-1)
        lam = jnp.where(live, lam, jnp.zeros((), lam.dtype))
        result[path] = Adapter(take(adapter.p), lam, take(adapter.q))
    return result


def compact_masks(masks: PyTree) -> dict[str, np.ndarray]:
    """The masks of what :func:`compact` gives: False where a stack's smaller ranks are filled up.

    >>> import jax.numpy as jnp
    >>> compact_masks({"up": jnp.array([[True, False, True], [False, True, False]])})["up"].tolist()
    [[True, True], [True, False]]
    """
    kept = {path: _kept(mask)[1] for path, mask in _masks(masks).items()}
    return {path: live for path, live in kept.items() if live.shape[-1]}


def compact_train_state(
    params: PyTree, opt_state: PyTree, config: AdaLoraConfig
) -> tuple[PyTree, PyTree]:
    """Parameters and optimizer state without the pruned triplets, to go on training at that size.

    To be called once, after the final mask. The inner optimizer's moments, the averages and the
    masks are cut like the adapters, and everything else stays as it is; a jitted step compiles once
    more for the new shapes. Adapters are cut as by :func:`compact`. The task's gradients are those
    of before; the orthogonality penalty no longer counts the rows that are gone.

    Args:
      params: what trains: a tree with adapters in it, as the optimizer sees it.
      opt_state: of any optimizer that keeps arrays of the parameters' shapes, with one
        :class:`AllocatorState` in it.
      config: of this run.

    Returns:
      ``(params, opt_state)``, in the same containers, less the entries of adapters of rank 0.

    Raises:
      ValueError: the final mask is still to come, or the optimizer keeps something of an adapter
        that is not of its shape.

    >>> import jax, jax.numpy as jnp, optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2, tfinal=1)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> state = tx.init(adapters)
    >>> for _ in range(4):
    ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, adapters), state, adapters)
    >>> adapters, state = compact_train_state(adapters, state, config)
    >>> adapters["query"].p.shape, state.inner[0].mu["query"].p.shape
    ((2, 5), (2, 5))
    """
    allocator = allocator_state(opt_state)
    if int(allocator.step) <= config.final_step:
        raise ValueError(
            f"opt_state has made {int(allocator.step)} updates, but the final mask comes with "
            f"update {config.final_step + 1}: ranks may still change, so compact after it."
        )
    cut = functools.partial(_cut, masks=_masks(allocator))
    return tuple(_without_gone(tree_map_with_path(cut, part)) for part in (params, opt_state))


def merge(
    variables: Mapping[str, Any],
    adapters: Mapping[str, Any],
    config: AdaLoraConfig,
    *,
    layers: Mapping[str, Layer] | None = None,
    safe: bool = False,
) -> dict[str, Any]:
    """The model's variables with every increment added to its weight: ``W + s · qᵀ diag(λ) p``.

    Sums are made in at least float32 and rounded once, to the weight's dtype. In bfloat16 that
    costs an increment of 1/100 of its weight's norm 16 % of itself, and one of 1/1000 77 %
    (``benchmarks/merging.py``). What ``modules_to_save`` trained takes its place.

    Args:
      variables: of the model, with ``params``; not changed, so they are the copy to go back to.
      adapters: as ``adapted.init`` gave them, trained; masked where the run ended in between.
      config: of the adapters, for the scale.
      layers: how each weight reads as a matrix, by path. Without it the axes are taken to be stack,
        in and out in this order, which holds for all Flax layers but einsum modules and transposed
        convolutions; ``adapted.merge`` passes it.
      safe: refuse a result that is not finite.

    Returns:
      The merged variables, to be used with the model itself.

    Raises:
      ValueError: an adapter fits no weight of its module, or the result is not finite.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"query": {"kernel": jnp.zeros((5, 6))}}}
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))
    >>> config = AdaLoraConfig(total_step=10, init_r=4, target_r=2, lora_alpha=4)
    >>> float(merge(variables, {"query": adapter}, config)["params"]["query"]["kernel"][0, 0])
    4.0
    """
    return _merged(variables, adapters, config, layers, safe, sign=1)


def unmerge(
    variables: Mapping[str, Any],
    adapters: Mapping[str, Any],
    config: AdaLoraConfig,
    *,
    layers: Mapping[str, Layer] | None = None,
    safe: bool = False,
) -> dict[str, Any]:
    """Takes the increments of :func:`merge` off again.

    The base comes back to within one rounding of its dtype; keep the variables themselves where it
    must come back bit for bit. ``modules_to_save`` are left as they are.

    Args:
      variables, adapters, config, layers, safe: as in :func:`merge`.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"query": {"kernel": jnp.zeros((5, 6))}}}
    >>> adapters = {"query": Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))}
    >>> config = AdaLoraConfig(total_step=10, init_r=4, target_r=2)
    >>> back = unmerge(merge(variables, adapters, config), adapters, config)
    >>> float(back["params"]["query"]["kernel"][0, 0])
    0.0
    """
    only = {path: node for path, node in adapters.items() if tree.is_adapter(node)}
    return _merged(variables, only, config, layers, safe, sign=-1)


def _merged(variables, adapters, config, layers, safe, sign):
    params = _copied(variables["params"])
    for path, node in adapters.items():
        parts = path.split("/") if path else []
        holder = own = _node(params, parts)
        if not tree.is_adapter(node):
            _node(params, parts[:-1])[parts[-1]] = node
            continue
        if not isinstance(holder, dict):  # the weight itself, of a module with several
            holder, own = _node(params, parts[:-1]), {parts[-1]: holder}
        if tree.PACKED in variables and tree.at(variables[tree.PACKED], parts):
            raise ValueError(
                f"the weight of {path!r} is quantised, and no increment can be added to integers "
                "in place: adalora_jax.quantized.merge_linen dequantises or requantises it, and "
                "says what error that makes."
            )
        adapter = tree.adapters(node)[""]
        name, layer = _weight_of(own, adapter, path, (layers or {}).get(path))
        (weight,), treedef = jax.tree.flatten(holder[name])
        delta = weight_increment(layer, adapter, weight.shape, sign * config.scale_of(path))
        merged = add_increment(weight, delta)
        holder[name] = treedef.unflatten([finite(merged, path) if safe else merged])
    return {**variables, "params": params}


def _weight_of(own, adapter, path, layer):
    """The parameter of a module that the adapter fits, and how it reads as a matrix."""
    shapes = {
        name: jax.tree.leaves(leaf)[0].shape
        for name, leaf in own.items()
        if not isinstance(leaf, Mapping)
    }
    if layer is not None:
        check_fit(layer, adapter, shapes[layer.weight], path)
        return layer.weight, layer
    fits = [(name, _standard_layer(name, shape, adapter)) for name, shape in shapes.items()]
    fits = [(name, found) for name, found in fits if found]
    if len(fits) != 1:
        raise ValueError(
            f"adapters[{path!r}] (in {adapter.q.shape[-1]}, out {adapter.p.shape[-1]}) fits "
            f"{len(fits)} of the parameters {shapes} by their axes alone: merge with "
            "adapted.merge(variables, adapters, *inputs), which knows the layer."
        )
    return fits[0]


def _standard_layer(name: str, shape: tuple[int, ...], adapter: Adapter) -> Layer | None:
    """The layer whose weight has the axes stack, in, out in this order; None if sizes differ."""
    *stack, _ = adapter.lam.shape
    ins, outs = adapter.q.shape[-1], adapter.p.shape[-1]
    if len(shape) < 2 or list(shape[: len(stack)]) != stack:
        return None
    own = shape[len(stack) :]
    for split in range(1, len(own)):
        if math.prod(own[:split]) == ins and math.prod(own[split:]) == outs:
            axes = tuple(range(len(own)))
            return Layer("weight", name, (), axes[:split], axes[split:])
    return None


def _copied(node: Any) -> Any:
    """Nested dicts anew, with the same leaves."""
    if not isinstance(node, Mapping):
        return node
    return {name: _copied(child) for name, child in node.items()}


def _node(params: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(params, Mapping) or name not in params:
            raise ValueError(
                f"adapters[{'/'.join(path)!r}] has no parameters in the model: it was made for "
                "another one."
            )
        params = params[name]
    return params


def summary(adapters: PyTree, state_or_masks: Any = None) -> str:
    """A table for people: one row an adapter, with its shape, live rank and parameters.

    Args:
      adapters: any tree with adapters in it.
      state_or_masks: as in :func:`ranks`; without it every triplet counts as live.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))
    >>> print(summary({"query": adapter}, {"query": jnp.array([True, True, False, False])}))
    adapter   in   out   rank   of   parameters
    query      5     6      2    4           24
    total                   2    4           24
    """
    found = tree.adapters(adapters)
    if state_or_masks is None:
        state_or_masks = {path: np.ones(a.lam.shape, bool) for path, a in found.items()}
    live = ranks(state_or_masks)
    rows = []
    for path, adapter in found.items():
        *stack, rank = adapter.lam.shape
        sizes = adapter.q.shape[-1], adapter.p.shape[-1]
        for index in np.ndindex(*stack):
            row = tree.row_name(path, index)
            rows.append((row, *sizes, live[row], rank, live[row] * (sum(sizes) + 1)))
    totals = [sum(row[column] for row in rows) for column in (3, 4, 5)]
    header = ("adapter", "in", "out", "rank", "of", "parameters")
    return table([header, *rows, ("total", "", "", *totals)])


def table(rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Rows of cells as aligned text, the first ``left`` columns to the left.

    >>> print(table([("a", 1), ("bcd", 23)]))
    a      1
    bcd   23
    """
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "   ".join(
            str(cell).ljust(width) if i < left else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _masks(state_or_masks: Any) -> dict[str, np.ndarray]:
    if isinstance(state_or_masks, AdaLoraState):
        state_or_masks = state_or_masks.allocator
    if isinstance(state_or_masks, (AllocatorState, AllocatorInfo)):
        state_or_masks = state_or_masks.masks
    return tree.leaves_with_path(jax.device_get(state_or_masks))


def _kept(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of an adapter that stay, and which of them live: all but a stack's filling."""
    rank = int(mask.sum(axis=-1).max(initial=0))
    rows = np.argsort(~mask, axis=-1, kind="stable")[..., :rank]
    return rows, np.take_along_axis(mask, rows, axis=-1)


_GONE = object()  # in the place of a leaf whose adapter has rank 0


def _cut(path: tuple[Any, ...], leaf: Any, masks: Mapping[str, np.ndarray]) -> Any:
    """A leaf of the training state with the rows of its adapter that stay; others as they are."""
    name = tree.leaf_name(path)
    head, _, field = name.rpartition("/")
    is_mask = leaf.dtype == bool and "masks" in name.split("/")
    owner = tree.owner(name if is_mask else head, masks)
    if owner is None or not (is_mask or field in Adapter._fields):
        return leaf
    rows, live = _kept(masks[owner])
    if rows.shape[-1] == 0:
        return _GONE
    if is_mask:
        return jnp.asarray(live)
    after = 0 if field == "lam" else 1  # axes behind that of the triplets
    before = leaf.ndim - after - rows.ndim  # and in front of the stack's, such as a history
    if before < 0 or leaf.shape[before : leaf.ndim - after] != masks[owner].shape:
        if leaf.size == 1:
            return leaf  # a placeholder
        raise ValueError(
            f"opt_state: {name} has shape {leaf.shape}, which is not that of {field} in {owner!r}, "
            "so it cannot be cut: start the final phase with tx.init(compact(adapters, masks))."
        )
    index = rows.reshape(*(1,) * before, *rows.shape, *(1,) * after)
    return jnp.take_along_axis(leaf, index, axis=leaf.ndim - after - 1)


def _without_gone(node: PyTree) -> PyTree:
    """The tree without the entries of mappings that hold nothing but what is gone."""
    children, treedef = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    if jax.tree_util.treedef_is_leaf(treedef):
        return node
    gone = lambda child: {id(leaf) for leaf in jax.tree.leaves(child)} == {id(_GONE)}
    if isinstance(node, Mapping):
        kept: Any = {key.key: _without_gone(c) for (key,), c in children if not gone(c)}
        return type(node)(kept)  # pyright: ignore[reportCallIssue]
    return treedef.unflatten([_without_gone(child) for _, child in children])
