"""Training parameters whose adapters are stored as one array per role and factor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax import tree_util

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import ByRole, group_by_role, stack_like
from adalora_jax._src.core.roles import stack as stack_by_role


@functools.partial(
    tree_util.register_dataclass, data_fields=["by_role", "others"], meta_fields=["structure"]
)
@dataclasses.dataclass(frozen=True)
class StackedAdapters:
    """Parameters as :func:`stack` returns them: a pytree with one leaf per role and factor.

    Any optax optimizer takes it, :func:`adalora_jax.adalora` included, and so do ``jax.grad``,
    ``TrainState``, ``flax.serialization`` and orbax. Of this library, the functions of training
    take it: ``adalora``, ``allocate``, ``orthogonality``, ``eval_params``, ``finish``, ``info``,
    ``summary`` and ``checkpoint``; masks and ranks are by path as ever. All others take
    ``unstack(...)`` of it.

    Attributes:
      by_role: ``{path: Adapter}`` to read, stored as one :class:`Adapter` per role whose arrays
        have a leading axis, ``by_role.stacked``.
      others: ``{path: leaf}`` of the leaves that do not belong to an adapter.
      structure: the structure of the tree that was stacked; static.

    >>> from adalora_jax import AdaLoraConfig, init_adapter
    >>> adapter = init_adapter(jax.random.key(0), 6, 5, AdaLoraConfig(total_step=4))
    >>> stacked = stack({"layer_0/query": adapter, "layer_1/query": adapter})
    >>> {role: leaf.p.shape for role, leaf in stacked.by_role.stacked.items()}
    {'layer_*/query': (2, 12, 5)}
    >>> stacked.by_role["layer_1/query"].p.shape
    (12, 5)
    """

    by_role: ByRole
    others: dict[str, PyTree]
    structure: Any = dataclasses.field(repr=False)

    def replace(self, new: Mapping[str, Adapter]) -> StackedAdapters:
        """Return these parameters with the arrays of ``{path: Adapter}``, which has all paths."""
        return dataclasses.replace(self, by_role=stack_like(self.by_role, new))

    def unstacked(self) -> PyTree:
        """Return the tree that was stacked, with the present leaves."""
        leaves: list[PyTree] = [0] * self.structure.num_leaves  # replaced below, for adapters
        for path, index in _positions_of_others(self.structure).items():
            leaves[index] = self.others[path]
        return pytree.insert_adapters(self.structure.unflatten(leaves), self.by_role.split())


def stack(adapters: PyTree) -> StackedAdapters:
    """Return parameters whose adapters are stored as one array per role and factor.

    A role is all adapters with the same path except for numbers, the same shapes and dtypes, the
    same scale and layout: the queries of all layers. A model of 24 layers with six adapters each
    has 18 trainable arrays instead of 432, so its optimizer compiles faster and runs fewer
    kernels. Train the result like the adapters themselves, and take :func:`unstack` of it in the
    loss::

        stacked = adalora.stack(adapters)
        opt_state = tx.init(stacked)

        def loss(stacked):
            logits = adapted.apply(variables, adalora.unstack(stacked), x)
            return task_loss(logits, y) + adalora.orthogonality(stacked, config)

    The allocation is that of the separate adapters: ranks, budget, limits by path and the order of
    ties do not depend on the roles. Only sums over adapters, such as the penalty's mean, may add in
    another order. The new leading axis is not sharded; members of a role are sharded alike.

    Args:
      adapters: a tree with adapters in it: the dict that ``adapted.init`` or ``nnx.adapters``
        returned, or a larger one, whose other leaves do not change. The whole tree that is trained:
        a tree with stacked adapters in a part of it is refused.

    Returns:
      The parameters as a :class:`StackedAdapters`.

    Raises:
      TypeError: ``adapters`` contains NNX Variables, or something else than arrays in an adapter.
      ValueError: ``adapters`` contains no adapter, stacked ones, or two leaves of one path.

    >>> import jax, optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> adapters = {f"layer_{i}/query": adalora.init_adapter(keys[i], 6, 5, config) for i in (0, 1)}
    >>> adapters["head"] = jax.numpy.ones(3)
    >>> stacked = adalora.stack(adapters)
    >>> len(jax.tree.leaves(adapters)), len(jax.tree.leaves(stacked))
    (7, 4)
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> opt_state = tx.init(stacked)
    >>> grads = jax.tree.map(jax.numpy.ones_like, stacked)
    >>> updates, opt_state = tx.update(grads, opt_state, stacked)
    >>> stacked = optax.apply_updates(stacked, updates)
    >>> list(adalora.unstack(adalora.eval_params(opt_state, stacked)))
    ['head', 'layer_0/query', 'layer_1/query']
    """
    way_out = "pass the adapters that adapted.init returned, or adalora_jax.nnx.adapters(model)"
    if any(map(pytree.is_variable, jax.tree.leaves(adapters, is_leaf=pytree.is_variable))):
        raise TypeError(
            f"`adapters={type(adapters).__name__}`: contains NNX Variables, which belong to one "
            "model; pass adalora_jax.nnx.adapters(model), and run the model of "
            "adalora_jax.nnx.with_adapters(model, unstack(stacked)) in the loss."
        )
    found = pytree.require_adapters(adapters, "adapters", way_out)
    for path, adapter in found.items():
        if not all(hasattr(leaf, "dtype") for leaf in adapter):
            kinds = ", ".join(type(leaf).__name__ for leaf in adapter)
            raise TypeError(f"`adapters[{path!r}]`: contains {kinds} instead of arrays; {way_out}.")
    structure = jax.tree.structure(adapters)
    by_role = stack_by_role(group_by_role(found), found)
    return StackedAdapters(by_role, _others(structure, adapters), structure)


def unstack(stacked: PyTree) -> PyTree:
    """Return the parameters as they were before :func:`stack`, ``{path: Adapter}`` for a dict.

    The derivative of each role's arrays is one concatenation of its adapters' cotangents, in
    reverse mode, and forward mode works, too. Use it in the loss, and on the result of
    :func:`adalora_jax.eval_params` to merge, export or compact. The state of an optimizer that was
    initialised with stacked parameters becomes that of separate ones.

    Args:
      stacked: what :func:`stack` returned, as trained since; or any tree with such nodes in it,
        such as an optimizer's state. Other nodes do not change.

    Returns:
      The tree with the original containers in place of every :class:`StackedAdapters`.

    >>> import jax, jax.numpy as jnp, adalora_jax as adalora
    >>> adapter = adalora.Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)), scale=0.5)
    >>> stacked = adalora.stack({"layer_0": adapter, "layer_1": adapter})
    >>> adalora.unstack(stacked)["layer_1"].q.shape, adalora.unstack(stacked)["layer_1"].scale
    ((2, 3), 0.5)
    >>> gradient = jax.grad(lambda s: adalora.unstack(s)["layer_1"].lam.sum())(stacked)
    >>> gradient.by_role.stacked["layer_*"].lam
    Array([[0., 0.],
           [1., 1.]], dtype=float32)
    """

    def unstacked(node: PyTree) -> PyTree:
        return node.unstacked() if isinstance(node, StackedAdapters) else node

    return jax.tree.map(unstacked, stacked, is_leaf=pytree.is_stacked)


def restack(like: PyTree, tree: PyTree) -> PyTree:
    """Return ``tree`` with the adapters stacked where ``like`` has stacked ones.

    It is the inverse of :func:`unstack`: ``restack(like, unstack(like))`` equals ``like``.

    >>> import jax.numpy as jnp
    >>> stacked = stack({"up": Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))})
    >>> restack([stacked, 1], unstack([stacked, 2]))[1]
    2
    """

    def stacked(node: PyTree, part: PyTree) -> PyTree:
        if not isinstance(node, StackedAdapters):
            return part
        by_role = stack_like(node.by_role, pytree.adapters(part))
        return StackedAdapters(by_role, _others(node.structure, part), node.structure)

    return jax.tree.map(stacked, like, tree, is_leaf=pytree.is_stacked)


def _others(structure: Any, tree: PyTree) -> dict[str, PyTree]:
    """Return ``{path: leaf}`` of the leaves of ``tree`` that do not belong to an adapter."""
    leaves = structure.flatten_up_to(tree)
    return {path: leaves[index] for path, index in _positions_of_others(structure).items()}


def _positions_of_others(structure: Any) -> dict[str, int]:
    """Return ``{path: index}`` of a structure's leaves that do not belong to an adapter."""
    indices = structure.unflatten(range(structure.num_leaves))
    nodes = tree_util.tree_flatten_with_path(indices, is_leaf=pytree.is_adapter)[0]
    found: dict[str, int] = {}
    for path, index in nodes:
        if pytree.is_adapter(index):
            continue
        name = tree_util.keystr(path, simple=True, separator="/")
        if name in found:
            raise ValueError(
                f"`adapters[{name!r}]`: is the path of two leaves; rename one of their keys."
            )
        found[name] = index
    return found
