"""Increments added to the weights of an NNX model, and subtracted again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from adalora_jax._src import _compat
from adalora_jax._src.core import pytree
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import layers as kinds
from adalora_jax._src.modules.candidates import UNKNOWN_USE
from adalora_jax._src.modules.nnx_layers import Adapted, base_class, layer_of, weight_name
from adalora_jax._src.modules.nnx_variables import SavedParam, is_qwix_weight, modules, parameters

_Model = TypeVar("_Model", bound=nnx.Module)
# Arguments of a model, or a function that calls it.
Inputs: TypeAlias = tuple[PyTree, ...] | Callable[[nnx.Module], PyTree]


def merged(model: _Model, *, safe: bool = False, inputs: Inputs | None = None) -> _Model:
    """Return a copy of an adapted model with its increments merged, see :func:`adalora_jax.merge`.

    Args:
      model: as :func:`adapt` returns it; not changed.
      safe: whether to raise an error if a merged weight is not finite.
      inputs: arguments for which the outputs of both models are compared, or a function that calls
        a model and returns its outputs.

    Raises:
      ValueError: as in :func:`adalora_jax.merge`.

    >>> import adalora_jax as adalora
    >>> base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = adalora.AdaLoraConfig(
    ...     total_step=10, target_modules="all-linear", init_lora_weights=False
    ... )
    >>> adapted, x = adalora.nnx.adapt(base, config), jax.numpy.ones((2, 6))
    >>> bool(jax.numpy.allclose(merged(adapted)(x), adapted(x), rtol=1e-4))
    True
    >>> type(merged(adapted).layers[0])
    <class 'flax.nnx.nn.linear.Linear'>
    """
    check_adapted(model, "variables")
    copy = _merged_copy(model, safe, checked=inputs is not None)
    if inputs is not None:
        _check_outputs(model, copy, inputs)
    return copy


def _merged_copy(model: _Model, safe: bool = False, checked: bool = True) -> _Model:
    copy = nnx.clone(model)
    _add_increments(copy, model, 1, safe, checked=checked)
    for _, module in modules(copy):
        if isinstance(module, Adapted):
            del module.adalora
            _compat.set_class(module, base_class(type(module)))
    return release_saved(copy)


def check_adapted(model: nnx.Module, name: str) -> None:
    """Raise an error if ``model``, the argument ``name``, has no adapters.

    >>> check_adapted(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), "variables")
    Traceback (most recent call last):
        ...
    ValueError: `variables`: the model has no adapters; pass the model that nnx.adapt returned.
    """
    if not any(isinstance(module, Adapted) for _, module in modules(model)):
        raise ValueError(
            f"`{name}`: the model has no adapters; pass the model that nnx.adapt returned."
        )


def _check_outputs(adapted: nnx.Module, plain: nnx.Module, inputs: Inputs) -> None:
    """Raise an error if the outputs of a merged model differ from those of the adapted one.

    Raises:
      ValueError: an output differs; the message has its index, error and norm, and the layers.
    """
    found = _difference(adapted, plain, inputs)
    if found is None:
        return
    index, error, size = found
    uncertain = [
        path
        for path, module in modules(adapted)
        if isinstance(module, Adapted) and _layout(module).note.startswith(UNKNOWN_USE)
    ]

    def differs_alone(path: str) -> bool:
        model = _with_one_increment(adapted, path)
        return _difference(model, _merged_copy(model), inputs) is not None

    layers = list(filter(differs_alone, uncertain)) or uncertain
    named = ", ".join(map(repr, layers)) or "that layer"
    raise ValueError(
        f"`inputs`: output {index} of the merged model is off by {error:.2g}, of a norm of "
        f"{size:.2g}, because code outside of an adapted layer reads its weight "
        f"(layer.kernel[...]), where there is no increment; leave {named} out of target_modules, "
        "or use the model unmerged."
    )


def _with_one_increment(adapted: _Model, path: str) -> _Model:
    """Return a copy of an adapted model whose increments are 0 except that of one layer."""
    copy = nnx.clone(adapted)
    values = {p: m.adalora.lam for p, m in modules(copy) if isinstance(m, Adapted)}
    for lam in values.values():
        if lam is not values[path]:  # layers with a tied weight share their adapter
            lam[...] = jnp.zeros_like(lam[...])
    return copy


def _difference(
    adapted: nnx.Module, plain: nnx.Module, inputs: Inputs
) -> tuple[int, float, float] | None:
    """Return index, error and norm of the first output that differs between two models, if any.

    Masked logits, equal in both and infinite or so large that no other entry would count, are left
    out. The bound on the relative error is the square root of the machine epsilon of the coarsest
    weight dtype, about the effect of rounding the weights. The models run in evaluation mode.

    Raises:
      ValueError: there are no outputs.
    """
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(plain, nnx.Param))}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    bound = max(float(jnp.finfo(dtype).eps) for dtype in floats) ** 0.5

    def outputs(model: nnx.Module) -> list[jax.Array]:
        model = nnx.clone(model)
        model.eval()  # dropout would differ between the two
        leaves = jax.tree.leaves(inputs(model) if callable(inputs) else model(*inputs))
        if not leaves:
            raise ValueError(
                "`inputs`: the model returned no array, so there is nothing to compare; pass a "
                "function that calls the model and returns its outputs."
            )
        arrays = map(jnp.asarray, leaves)
        return [x if jnp.iscomplexobj(x) else x.astype(jnp.float32) for x in arrays]

    for index, (a, b) in enumerate(zip(outputs(adapted), outputs(plain), strict=True)):
        masked = (a == b) & (abs(a) > 1e6)
        error, size = (float(jnp.linalg.norm(jnp.where(masked, 0, x))) for x in (a - b, a))
        if not error <= bound * size < jnp.inf:
            return index, error, size
    return None


def _layout(module: Adapted) -> Layout:
    return module.adalora.adapter.layout or kinds.require_layer(layer_of(module), module)


def release_saved(model: _Model) -> _Model:
    """Convert SavedParams to plain parameters of the base's dtype, in place; return the model."""
    by_path = dict(modules(model))
    for path, variable in parameters(model).items():
        if isinstance(variable, SavedParam):
            parent, _, name = path.rpartition("/")
            setattr(by_path[parent], name, variable.released())
    return model


def unmerged(
    model: _Model, adapted: nnx.Module, *, safe: bool = False, checked: bool = True
) -> _Model:
    """Return a copy of a merged model without its increments, see :func:`adalora_jax.unmerge`.

    Args:
      model: as :func:`merged` returned it; not changed.
      adapted: the model that was merged.
      safe: whether to raise an error if a result is not finite.
      checked: whether outputs were compared at merging, so that layers whose weight has an unknown
        use are unmerged, too.

    Raises:
      TypeError: ``adapted`` is not an NNX module.
      ValueError: ``adapted`` has no adapters, or as in :func:`adalora_jax.merge`.

    >>> import adalora_jax as adalora
    >>> base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = adalora.AdaLoraConfig(
    ...     total_step=10, target_modules="all-linear", init_lora_weights=False
    ... )
    >>> adapted = adalora.nnx.adapt(base, config)
    >>> restored = unmerged(merged(adapted), adapted)
    >>> difference = restored.layers[0].kernel[...] - base.layers[0].kernel[...]
    >>> bool(abs(difference).max() < 1e-6)
    True
    """
    if not isinstance(adapted, nnx.Module):
        raise TypeError(
            f"`adapters={type(adapted).__name__}`: is not an NNX module; pass the adapted model "
            "that was merged."
        )
    check_adapted(adapted, "adapters")
    restored = nnx.clone(model)
    _add_increments(restored, adapted, -1, safe, checked=checked)
    return restored


def _add_increments(
    model: nnx.Module, adapted: nnx.Module, sign: int, safe: bool, checked: bool = False
) -> None:
    """Add the increments of ``adapted`` to the weights of ``model``, in place.

    Args:
      model: the model whose weights change.
      adapted: the model with the adapters.
      sign: 1 to add, -1 to subtract.
      safe: whether to raise an error if a result is not finite.
      checked: whether outputs are compared, so that layers whose weight has an unknown use are
        merged, too.

    Raises:
      ValueError: a weight cannot be merged, is quantised, or is not in ``model``.
    """
    by_path = dict(modules(model))
    done: set[int] = set()  # a tied weight has several layers
    for path, module in modules(adapted):
        if not isinstance(module, Adapted):
            continue
        adapter, layer = module.adalora.adapter, _layout(module)
        if layer.note.startswith(UNKNOWN_USE):
            if not checked:
                raise ValueError(
                    f"`variables`: the increment of {path!r} cannot be merged: {layer.note}; "
                    "merge(model, inputs=(...)) merges it where the outputs stay the same; a "
                    "function that calls the model can be passed as well."
                )
            layer = dataclasses.replace(layer, note="")
            adapter = adapter._replace(layout=layer)
        weight = getattr(by_path.get(path), weight_name(module), None)
        if weight is None:
            raise ValueError(
                f"`variables`: the model has no layer {path!r}, so it is not the one that was "
                "adapted; pass that one."
            )
        is_quantised = is_qwix_weight(weight) or pytree.is_packed(weight.get_raw_value())
        kinds.check_not_quantised(is_quantised, path)
        if id(weight) in done:
            continue
        done.add(id(weight))
        weight[...] = kinds.merged_weight(path, weight[...], adapter, layer, sign=sign, safe=safe)
