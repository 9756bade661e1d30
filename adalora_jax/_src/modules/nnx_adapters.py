"""The adapters of an NNX model, as a dict by path: get, set and replace them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from adalora_jax._src import _compat
from adalora_jax._src.core import evaluation, pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import layers as kinds
from adalora_jax._src.modules.nnx_layers import Adaptation, Adapted, base_class
from adalora_jax._src.modules.nnx_variables import (
    AdapterParam,
    SavedParam,
    check_module,
    modules,
    parameters,
)

_Model = TypeVar("_Model", bound=nnx.Module)


def adapters(model: nnx.Module) -> dict[str, PyTree]:
    """Return ``{path: Adapter}`` and the parameters of ``modules_to_save``.

    The form is that of ``init`` of an adapted linen module. Checkpoints, banks and exports take it.

    Args:
      model: as :func:`adapt` returns it.

    Returns:
      A dict by path, with an :class:`~adalora_jax.Adapter` of known scale and layout per adapted
      layer, and the parameters, in at least float32, per module or parameter that
      ``modules_to_save`` names. Empty for a model without adapters.

    Raises:
      TypeError: ``model`` is not an NNX module.

    >>> import adalora_jax as adalora
    >>> adapted = adalora.nnx.adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     adalora.AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> adapters(adapted)["layers/0"].p.shape
    (12, 4)
    """
    check_module(model)
    found: dict[str, Any] = dict(pytree.adapters(nnx.state(model, AdapterParam)))
    saved: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, SavedParam)):
        name = "/".join(map(str, path))
        root = variable.get_metadata()["root"]
        parts = name.removeprefix(root).strip("/").split("/") if name != root else []
        _insert(saved, [root, *parts], variable.get_raw_value())
    return found | saved


def _insert(nested: dict[str, PyTree], parts: list[str], leaf: PyTree) -> None:
    for part in parts[:-1]:
        nested = nested.setdefault(part, {})
    nested[parts[-1]] = leaf


def set_adapters(model: nnx.Module, new: Mapping[str, PyTree]) -> None:
    """Set the adapters of ``model`` and its parameters of ``modules_to_save``, in place.

    Args:
      model: as :func:`adapt` returns it.
      new: new values as :func:`adapters` returns them, with all of the model's paths and shapes.
        Their scales replace those of the model.

    Raises:
      TypeError: ``model`` is not an NNX module, or ``new`` is not a mapping.
      ValueError: the paths or shapes are not those of the model, or an adapter was made for a
        weight with other axes.

    >>> import jax.numpy as jnp
    >>> import adalora_jax as adalora
    >>> adapted = adalora.nnx.adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     adalora.AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> set_adapters(adapted, jax.tree.map(jnp.ones_like, adapters(adapted)))
    >>> float(adapted.layers[0].adalora.lam[0])
    1.0
    """
    existing = adapters(model)
    _check_mapping(new)
    if differing := sorted(
        path for path in {*existing, *new} if _shapes(existing.get(path)) != _shapes(new.get(path))
    ):
        raise ValueError(
            f"`new`: the adapters do not fit the model at {', '.join(differing[:8])}; pass all of "
            "the model's paths with its shapes, and the parameters of modules_to_save where it has "
            "some, or call with_adapters, which takes others."
        )
    _check_layouts(existing, new)
    for path, module in modules(model):
        if isinstance(module, Adaptation):
            adapter = new[path.rpartition("/")[0] if "/" in path else ""]
            for name, value in zip(Adapter._fields, adapter):
                getattr(module, name)[...] = value
            if adapter.scale is not None and adapter.scale != module.scale:
                module.replace(module.adapter._replace(scale=adapter.scale), keep_metadata=True)
    _set_saved(model, new)


def _shapes(node: PyTree) -> list[tuple[int, ...]] | dict[str, tuple[int, ...]]:
    if isinstance(node, Adapter):
        return [tuple(leaf.shape) for leaf in node]
    flat = jax.tree_util.tree_flatten_with_path(node)[0]
    return {pytree.leaf_name(path): tuple(getattr(leaf, "shape", ())) for path, leaf in flat}


def _check_mapping(new: object) -> None:
    if not isinstance(new, Mapping):
        raise TypeError(
            f"`new={type(new).__name__}`: is not a mapping; pass {{path: Adapter}}, as "
            "nnx.adapters returns it."
        )


def _check_layouts(existing: Mapping[str, PyTree], new: Mapping[str, PyTree]) -> None:
    for path, adapter in new.items():
        if not isinstance(adapter, Adapter):
            continue
        layer = existing[path].layout
        if layer is not None and layer.shape is not None and adapter.layout is not None:
            kinds.check_fit(layer, adapter, layer.shape, path)


def _set_saved(model: nnx.Module, new: Mapping[str, PyTree]) -> None:
    """Set the parameters of ``modules_to_save`` that are in ``new``, in place."""
    for path, variable in nnx.to_flat_state(nnx.state(model, SavedParam)):
        name = "/".join(map(str, path))
        root = variable.get_metadata()["root"]
        if root in new:
            parts = name.removeprefix(root).strip("/").split("/") if name != root else []
            variable = parameters(model)[name]
            variable.set_raw_value(
                jax.numpy.asarray(pytree.get_path(new[root], parts), variable.get_raw_value().dtype)
            )


def with_adapters(model: _Model, new: Mapping[str, PyTree]) -> _Model:
    """Return a copy of an adapted model with other adapters, of any rank.

    Use it for adapters that :func:`adalora_jax.compact` made smaller, for those of another run, and
    under ``jax.vmap`` for a batch in which every example has its own adapters.

    Args:
      model: as :func:`adapt` returns it; not changed.
      new: ``{path: Adapter}`` and parameters of ``modules_to_save``. Layers that are not in ``new``
        lose their adapters; parameters of ``modules_to_save`` that are not in ``new`` keep their
        values.

    Returns:
      The copy. Adapters without a scale or layout in ``new`` have those of ``model``.

    Raises:
      TypeError: ``model`` is not an NNX module, or ``new`` is not a mapping.
      ValueError: a path is not adapted in ``model``, an adapter was made for another weight, or an
        entry is neither an adapter nor parameters of the model's shapes.

    >>> import adalora_jax as adalora
    >>> adapted = adalora.nnx.adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     adalora.AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> small = jax.tree.map(lambda leaf: leaf[:3], adapters(adapted))
    >>> with_adapters(adapted, small).layers[0].adalora.p.shape
    (3, 4)
    """
    existing = adapters(model)
    _check_mapping(new)
    if foreign := sorted(set(new) - set(existing)):
        raise ValueError(
            f"`new`: the model has no adapters at {', '.join(foreign[:8])}; pass those of paths "
            f"where it is adapted: {', '.join(sorted(existing)[:8]) or 'none'}."
        )
    for path, node in new.items():
        adapted = isinstance(existing[path], Adapter)
        if not (isinstance(node, Adapter) if adapted else _shapes(node) == _shapes(existing[path])):
            form = "an Adapter" if adapted else "parameters with the shapes of the model's"
            raise ValueError(
                f"`new[{path!r}]={type(node).__name__}`: must be {form}; pass it as nnx.adapters "
                "returns it."
            )
    _check_layouts(existing, new)
    copy = nnx.clone(model)
    found = modules(copy)
    paths = {id(m): path.rpartition("/")[0] for path, m in found if isinstance(m, Adaptation)}
    replaced: set[int] = set()  # layers that share a weight share its adapter
    for _, module in found:
        if not isinstance(module, Adapted):
            continue
        path, adaptation = paths[id(module.adalora)], module.adalora
        if path not in new:
            del module.adalora
            _compat.set_class(module, base_class(type(module)))
        elif id(adaptation) not in replaced:
            replaced.add(id(adaptation))
            adapter = new[path]
            facts = existing[path]
            if adapter.scale is None or adapter.layout is None:
                scale = facts.scale if adapter.scale is None else adapter.scale
                adapter = adapter._replace(scale=scale, layout=facts.layout)
            adaptation.replace(adapter, keep_metadata=True)
    _set_saved(copy, new)
    return copy


def eval_model(model: _Model, optimizer: nnx.Optimizer) -> _Model:
    """Return a copy of a model with the masks applied, for evaluation, merging and export.

    Between two masks a pruned λ may become non-zero again, so the model in training can have more
    active triplets than the allocator's masks; see :func:`adalora_jax.eval_params`. The copy is in
    the mode of the model: call its ``eval()`` where the model or its adapters have dropout.

    Args:
      model: an adapted model in training; not changed.
      optimizer: the ``nnx.Optimizer`` that trains it, or its ``opt_state``.

    Returns:
      The copy, with λ exactly 0 wherever a mask is False.

    Raises:
      ValueError: the optimizer's state has no allocator, or one for another model.

    >>> import optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=10, target_modules="all-linear")
    >>> model = adalora.nnx.adapt(nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))), config)
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    >>> type(eval_model(model, optimizer)) is type(model)
    True
    """
    opt_state = optimizer.opt_state if isinstance(optimizer, nnx.Optimizer) else optimizer
    copy = nnx.clone(model)
    state = nnx.state(copy, nnx.LoRAParam)
    nnx.update(copy, evaluation.eval_params(opt_state, state))
    return copy


def optimizer_like(optimizer: nnx.Optimizer, model: nnx.Module, opt_state: PyTree) -> nnx.Optimizer:
    """Return a copy of an optimizer for another model, with another state but the same step."""
    copy = nnx.Optimizer(model, optimizer.tx, wrt=optimizer.wrt)
    copy.opt_state = pytree.match_containers(copy.opt_state, opt_state)
    copy.step[...] = optimizer.step[...]
    return copy
