"""Adapters for ``flax.nnx`` models.

:func:`adapt` copies the model. Each adapted layer of the copy has an additional child, ``adalora``,
with p, lam and q, and a subclass of the layer's class that adds the adapter output. The paths of
the base's variables and the results of ``isinstance`` do not change.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from adalora_jax._src import _compat
from adalora_jax._src.core import evaluation, pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.layout import Layout, declared
from adalora_jax._src.modules import layers as kinds
from adalora_jax._src.modules import sharding, targets
from adalora_jax._src.modules.candidates import UNKNOWN_USE, Candidate, judge_use
from adalora_jax._src.modules.nnx_layers import (
    FLAX_LAYERS,
    Adaptation,
    Adapted,
    AdapterParam,
    SavedParam,
    adapted_class,
    base_class,
    is_qwix_weight,
    layer_of,
    modules,
    parameters,
    readers,
    rewritten,
    sharded_variable,
    unreached,
    use_of,
    weight_name,
)

_Model = TypeVar("_Model", bound=nnx.Module)


def adapt(
    model: _Model,
    config: AdaLoraConfig,
    rngs: nnx.Rngs | jax.Array | int = 0,
    *,
    rules: sharding.Rules | None = None,
    layers: Mapping[type, Layout] | None = None,
) -> _Model:
    """Return a copy of ``model`` with AdaLoRA adapters in the layers that ``config`` selects.

    A dense layer ``y = x W + b`` becomes ``y = x (W + s · P Λ Q) + b``, where ``P Λ Q`` is
    ``qᵀ diag(lam) p`` (`AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_).

    The copy shares the base's arrays; ``model`` is not changed. The adapters' variables are
    :class:`AdapterParam` and the parameters of ``modules_to_save`` are :class:`SavedParam`, both
    subclasses of ``nnx.LoRAParam``, so ``wrt=nnx.LoRAParam`` selects everything that trains. Layers
    that share a weight share its adapter.

    The adapter output is added when the layer is called. Code that reads the weight from the module
    and computes with it uses the base's weight. If the code of another module reads a layer's
    weight, the layer can only be merged by ``adalora_jax.merge(model, inputs=...)``, which compares
    outputs.

    Args:
      model: any NNX module, including one whose weights ``qwix.quantize_model`` quantised.
      config: targets, ranks and scale.
      rngs: random numbers for the initial values and for the adapters' dropout: an ``nnx.Rngs``
        (streams ``params`` and ``dropout``), a PRNG key, or a seed.
      rules: shardings of the adapters on a mesh, see :func:`adalora_jax.sharding.derive`. By
        default they are derived from the shardings of the base's arrays or from its
        ``out_sharding`` metadata; the adapters' variables then have such metadata, too.
      layers: ``{class: Layout}`` of layers that are not Flax's. Each must compute
        ``y = x W + b`` over the last axes of x with the weight that its layout names, or be an
        embedding.

    Returns:
      A module of the same class as ``model``, or of a subclass if ``model`` itself is an adapted
      layer.

    Raises:
      TypeError: ``model`` is not an NNX module, or ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: the config selects nothing, or something that cannot be adapted; only some of the
        layers that share a weight are selected, or they use it differently; ``layers`` is invalid;
        or the model already has adapters.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.query = nnx.Linear(6, 4, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.query(x)
    >>> model, x = Model(nnx.Rngs(0)), jnp.ones((2, 6))
    >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=["query"]), nnx.Rngs(1))
    >>> bool((adapted(x) == model(x)).all()), isinstance(adapted.query, nnx.Linear)
    (True, True)
    """
    layers = declared(layers)
    chosen, tied = _chosen(model, config, layers)
    if not isinstance(rngs, nnx.Rngs):
        rngs = nnx.Rngs(rngs)
    adapted = nnx.clone(model)
    by_path: dict[str, Any] = dict(modules(adapted))
    weights = {p: sharded_variable(getattr(by_path[p], t.layer.weight)) for p, t in chosen.items()}
    where = {p: (t.layer, t.shape, placement(weights[p])) for p, t in chosen.items()}
    specs = sharding.derive(where, rules)
    at = sharding.to_named_sharding(specs, [place for _, _, place in where.values()])
    fresh = targets.init_all(rngs.params(), chosen, config, at)
    for path, target in chosen.items():
        module = by_path[path]
        stack = target.layer.matrix(target.shape)[0][: len(target.shape) - target.layer.ndim]
        dropout = _dropout(config, rngs, stack)
        foreign = bool(layers) and type(module) in layers
        module.adalora = Adaptation(fresh[path], dropout, config.forward_mode, foreign)
        _annotate(module.adalora, target, weights[path], specs[path] if rules else None)
        _compat.set_class(module, adapted_class(type(module), foreign))
    for path, owner in tied.items():
        module = by_path[path]
        module.adalora = by_path[owner].adalora
        foreign = bool(layers) and type(module) in layers
        _compat.set_class(module, adapted_class(type(module), foreign))
    _save(adapted, config)
    return adapted


def describe(model: nnx.Module, config: AdaLoraConfig) -> str:
    """Return a table of the layers that :func:`adapt` would adapt: shapes, ranks and parameters.

    Args:
      model: any NNX module, including one made by ``nnx.eval_shape``.
      config: as in :func:`adapt`.

    Returns:
      Text with one row per layer, a row of totals, and the memory of the adapters and of the
      importance averages.

    Raises:
      TypeError: as in :func:`adapt`.
      ValueError: as in :func:`adapt`.

    >>> model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))))
    >>> print(describe(model, AdaLoraConfig(total_step=10, target_modules="all-linear")))
    layer      kind    matrices   in   out   rank   parameters   kernel      cost
    layers/0   dense          1    6     4     12          132       24   550.0 %
    total                     1                12          132       24   550.0 %
    memory: adapters 528 bytes, importance 1.1 kB
    """
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    shapes = {"/".join(map(str, path)): tuple(leaf.shape) for path, leaf in params}
    return targets.describe(_chosen(model, config)[0], config, candidates(model), shapes)


def resolve(model: nnx.Module, config: AdaLoraConfig) -> AdaLoraConfig:
    """Return ``config`` with a ``target_modules`` function replaced by the paths it selects.

    The function may return a :class:`~adalora_jax.RankSpec` instead of True. The optimizer and
    merging see paths, not modules, so the config must contain these ranks before it is used.

    Args:
      model: any NNX module.
      config: as in :func:`adapt`; returned as it is if ``target_modules`` is not a function.

    Returns:
      A config in which ``target_modules`` is a regex of the selected paths and the RankSpecs are
      entries of ``rank_overrides``.

    Raises:
      TypeError: as in :func:`adapt`.
      ValueError: the function selects nothing that can be adapted, a pattern matches nothing, or
        the model already has adapters.

    >>> def choose(path, module):
    ...     return adalora_jax.RankSpec(init_r=4) if isinstance(module, nnx.Linear) else False
    >>> import adalora_jax
    >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = resolve(model, AdaLoraConfig(total_step=10, target_r=2, target_modules=choose))
    >>> adapters(adapt(model, config))["layers/0"].lam.shape
    (4,)
    """
    return targets.resolve(_candidates(model, config), config)


def adapters(model: nnx.Module) -> dict[str, Any]:
    """Return ``{path: Adapter}`` and the parameters of ``modules_to_save``.

    The form is that of ``init`` of an adapted linen module. Checkpoints, banks and exports take it.

    Args:
      model: as :func:`adapt` returns it.

    Returns:
      A dict by path: an :class:`~adalora_jax.Adapter` with scale and layout per adapted layer, and
      the parameters, in at least float32, per module or parameter that ``modules_to_save`` names.

    >>> adapted = adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> adapters(adapted)["layers/0"].p.shape
    (12, 4)
    """
    found: dict[str, Any] = dict(pytree.adapters(nnx.state(model, AdapterParam)))
    saved: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, SavedParam)):
        name = "/".join(map(str, path))
        root = variable.get_metadata()["root"]
        parts = name.removeprefix(root).strip("/").split("/") if name != root else []
        _put(saved, [root, *parts], variable.get_raw_value())
    return found | saved


def _put(nested: dict[str, Any], parts: list[str], leaf: Any) -> None:
    for part in parts[:-1]:
        nested = nested.setdefault(part, {})
    nested[parts[-1]] = leaf


def set_adapters(model: nnx.Module, new: Mapping[str, Any]) -> None:
    """Set the adapters of ``model`` and its parameters of ``modules_to_save``, in place.

    Args:
      model: as :func:`adapt` returns it.
      new: new values as :func:`adapters` returns them, with all of the model's paths and shapes.
        Their scales replace those of the model.

    Raises:
      ValueError: the paths or shapes are not those of the model, or an adapter was made for a
        weight with other axes.

    >>> import jax.numpy as jnp
    >>> adapted = adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> set_adapters(adapted, jax.tree.map(jnp.ones_like, adapters(adapted)))
    >>> float(adapted.layers[0].adalora.lam[0])
    1.0
    """
    existing = adapters(model)
    if differing := sorted(
        path for path in {*existing, *new} if _shapes(existing.get(path)) != _shapes(new.get(path))
    ):
        raise ValueError(
            f"the new adapters do not fit the model at {', '.join(differing[:8])}: they need the "
            "model's paths and shapes, and the parameters of modules_to_save where it has some; "
            "with_adapters takes others."
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


def _shapes(node: Any) -> Any:
    if isinstance(node, Adapter):
        return [tuple(leaf.shape) for leaf in node]
    flat = jax.tree_util.tree_flatten_with_path(node)[0]
    return {pytree.leaf_name(path): tuple(leaf.shape) for path, leaf in flat}


def _check_layouts(existing: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for path, adapter in new.items():
        if not isinstance(adapter, Adapter):
            continue
        layer = existing[path].layout
        if layer is not None and layer.shape is not None and adapter.layout is not None:
            kinds.check_fit(layer, adapter, layer.shape, path)


def _set_saved(model: nnx.Module, new: Mapping[str, Any]) -> None:
    """Set the parameters of ``modules_to_save`` that are in ``new``, in place."""
    for path, variable in nnx.to_flat_state(nnx.state(model, SavedParam)):
        name = "/".join(map(str, path))
        root = variable.get_metadata()["root"]
        if root in new:
            parts = name.removeprefix(root).strip("/").split("/") if name != root else []
            own = parameters(model)[name]
            own.set_raw_value(
                jax.numpy.asarray(pytree.get_path(new[root], parts), own.get_raw_value().dtype)
            )


def with_adapters(model: _Model, new: Mapping[str, Any]) -> _Model:
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
      ValueError: a path is not adapted in ``model``, or an adapter was made for another weight.

    >>> adapted = adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> small = jax.tree.map(lambda leaf: leaf[:3], adapters(adapted))
    >>> with_adapters(adapted, small).layers[0].adalora.p.shape
    (3, 4)
    """
    existing = adapters(model)
    if foreign := sorted(set(new) - set(existing)):
        raise ValueError(
            f"new has adapters for {', '.join(foreign[:8])}, where the model has none: it is "
            f"adapted at {', '.join(sorted(existing)[:8])}."
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


def optimizer_like(optimizer: nnx.Optimizer, model: Any, opt_state: Any) -> nnx.Optimizer:
    """Return a copy of an optimizer for another model, with another state but the same step."""
    copy = nnx.Optimizer(model, optimizer.tx, wrt=optimizer.wrt)
    copy.opt_state = pytree.match_containers(copy.opt_state, opt_state)
    copy.step[...] = optimizer.step[...]
    return copy


def merged(model: _Model, *, safe: bool = False, inputs: tuple[Any, ...] | None = None) -> _Model:
    """Return a copy of an adapted model with its increments merged, see :func:`adalora_jax.merge`.

    Args:
      model: as :func:`adapt` returns it; not changed.
      safe: whether to raise an error if a merged weight is not finite.
      inputs: arguments for which the outputs of both models are compared.

    Raises:
      ValueError: as in :func:`adalora_jax.merge`.

    >>> base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = AdaLoraConfig(total_step=10, target_modules="all-linear", init_lora_weights=False)
    >>> adapted, x = adapt(base, config), jax.numpy.ones((2, 6))
    >>> bool(jax.numpy.allclose(merged(adapted)(x), adapted(x), rtol=1e-4))
    True
    >>> type(merged(adapted).layers[0])
    <class 'flax.nnx.nn.linear.Linear'>
    """
    copy = nnx.clone(model)
    if not any(isinstance(module, Adapted) for _, module in modules(copy)):
        raise ValueError("the model has no adapters: there is nothing to merge.")
    _add_increments(copy, model, 1, safe, checked=inputs is not None)
    for _, module in modules(copy):
        if isinstance(module, Adapted):
            del module.adalora
            _compat.set_class(module, base_class(type(module)))
    copy = release_saved(copy)
    if inputs is not None:
        _refuse_another_output(model, copy, inputs)
    return copy


def _refuse_another_output(adapted: nnx.Module, plain: nnx.Module, inputs: tuple[Any, ...]) -> None:
    """Raise an error if the outputs of a merged model differ from those of the adapted one.

    The bound on the relative error is the square root of the machine epsilon of the coarsest weight
    dtype, about the effect of rounding the weights.

    Raises:
      ValueError: an output differs by more; the message has its index, error and norm.
    """
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(plain, nnx.Param))}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    bound = max(float(jnp.finfo(dtype).eps) for dtype in floats) ** 0.5
    ours, theirs = (
        [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(nnx.clone(model)(*inputs))]
        for model in (adapted, plain)
    )
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error, size = float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(a))
        if not error <= bound * size:
            raise ValueError(
                f"inputs: output {index} of the merged model is off by {error:.2g}, of a norm of "
                f"{size:.2g}: the code reads the weight of an adapted layer by hand, where there "
                "is no increment (layer.kernel[...] outside of the layer): leave that layer out of "
                "target_modules, or serve the model unmerged."
            )


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
      ValueError: as in :func:`adalora_jax.merge`.

    >>> base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = AdaLoraConfig(total_step=10, target_modules="all-linear", init_lora_weights=False)
    >>> adapted = adapt(base, config)
    >>> restored = unmerged(merged(adapted), adapted)
    >>> difference = restored.layers[0].kernel[...] - base.layers[0].kernel[...]
    >>> bool(abs(difference).max() < 1e-6)
    True
    """
    if not isinstance(adapted, nnx.Module):
        raise TypeError(
            f"adapters is a {type(adapted).__name__}: for an NNX model it must be the adapted "
            "model that was merged."
        )
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
    own = dict(modules(model))
    done: set[int] = set()  # a tied weight has several layers
    for path, module in modules(adapted):
        if not isinstance(module, Adapted):
            continue
        adapter = module.adalora.adapter
        layer = adapter.layout or kinds.require_layer(layer_of(module), module)
        if layer.note.startswith(UNKNOWN_USE):
            if not checked:
                raise ValueError(
                    f"the increment of {path!r} cannot be merged: {layer.note}: "
                    "merge(model, inputs=(...)) merges it where the outputs stay the same."
                )
            layer = dataclasses.replace(layer, note="")
            adapter = adapter._replace(layout=layer)
        weight = getattr(own.get(path), weight_name(module), None)
        if weight is None:
            raise ValueError(f"model has no layer {path!r}: it is another one than was adapted.")
        if is_qwix_weight(weight) or pytree.is_packed(weight.get_raw_value()):
            raise ValueError(
                f"the weight of {path!r} is quantised and cannot be merged into in place: "
                "adalora_jax.quantization.merge dequantises or requantises it, and reports the "
                "error."
            )
        if id(weight) in done:
            continue
        done.add(id(weight))
        weight[...] = kinds.merged_weight(path, weight[...], adapter, layer, sign=sign, safe=safe)


def eval_model(model: _Model, optimizer: nnx.Optimizer) -> _Model:
    """Return a copy of a model with the masks applied, for evaluation, merging and export.

    Between two masks a pruned λ may become non-zero again, so the model in training can have more
    active triplets than the allocator's masks; see :func:`adalora_jax.eval_params`.

    Args:
      model: an adapted model in training; not changed.
      optimizer: the ``nnx.Optimizer`` that trains it, or its ``opt_state``.

    Returns:
      The copy, with λ exactly 0 wherever a mask is False.

    Raises:
      ValueError: the optimizer's state has no allocator, or one for another model.

    >>> import optax, adalora_jax as adalora
    >>> config = AdaLoraConfig(total_step=10, target_modules="all-linear")
    >>> model = adapt(nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))), config)
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


def candidates(
    model: nnx.Module,
    *,
    of_adapted: bool = False,
    layers: Mapping[type, Layout] | None = None,
) -> dict[str, Candidate]:
    """Return all modules of the model by path, as input of the selection.

    Args:
      model: any NNX module.
      of_adapted: whether the model may have adapters. If so, the uses of its weights are not
        traced.
      layers: layouts of declared layers, by class.

    Raises:
      TypeError: ``model`` is not an NNX module.
      ValueError: the model has adapters and ``of_adapted`` is False, or a declared layer does not
        have the parameter that its layout names.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not a flax.nnx module; adalora_jax.linen.adapt "
            "takes linen modules."
        )
    found: dict[str, Candidate] = {}
    reasons, reading = rewritten(model), readers(model)
    for path, module in modules(model):
        if isinstance(module, Adaptation) and not of_adapted:
            raise ValueError(
                f"the model is adapted already, at {path!r}: adapt the base model, or set its "
                "adapters with set_adapters."
            )
        if pytree.ADAPTER_KEY in path.split("/"):
            continue
        layer = layer_of(module, declared=(layers or {}).get(type(module)))
        if layer and not hasattr(module, layer.weight):
            raise ValueError(
                f"layers={{{type(module).__name__}: ...}}: the layer {path!r} has no parameter "
                f"called {layer.weight!r}."
            )
        shape = tuple(getattr(module, layer.weight).shape) if layer else ()
        if layer is None or len(shape) >= layer.ndim:
            refused = reasons.get(path, "")
            if layer and not refused and type(module) not in (layers or {}):
                refused = unreached(base_class(type(module)))
            candidate = Candidate(module, layer, shape, refused if layer else "")
            use = use_of(module, layer) if layer and not refused and not of_adapted else None
            if use and use.unseen and type(module) in (layers or {}):
                use = None  # the declaration specifies the computation
            if layer and use:
                foreign = not issubclass(type(module), FLAX_LAYERS)
                candidate = judge_use(candidate, use, foreign)
            if layer and not candidate.note and (id(module), layer.weight) in reading:
                reader = reading[id(module), layer.weight]
                candidate = candidate._replace(
                    note=f"{UNKNOWN_USE}the code of {reader} reads `.{layer.weight}` of a layer"
                )
            found[path] = candidate
    return found


def _candidates(
    model: Any, config: AdaLoraConfig, layers: Mapping[type, Layout] | None = None
) -> dict[str, Candidate]:
    found = candidates(model, layers=layers)
    if not isinstance(config, AdaLoraConfig):
        raise TypeError(f"config={reprlib.repr(config)} must be an AdaLoraConfig.")
    return found


def _chosen(
    model: nnx.Module, config: AdaLoraConfig, layers: Mapping[type, Layout] | None = None
) -> tuple[dict[str, targets.Target], dict[str, str]]:
    """Return the adapted layers, and ``{path: path}`` from other layers to the one they share with.

    A weight has one adapter, at the first of its layers in graph order, just as it has one path in
    the model's state.

    Raises:
      ValueError: layers that share a weight use it differently, or only some of them are selected.
    """
    candidates = _candidates(model, config, layers)
    chosen = targets.select(candidates, config)
    _refuse_tied_outside(model, candidates, chosen)
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    for path in (path for path in candidates if path in chosen):
        layer, shape = chosen[path][:2]
        owner = owners.setdefault(id(getattr(candidates[path].module, layer.weight)), path)
        if owner == path:
            continue
        first = chosen[owner].layer
        if not first.same_axes(layer):
            raise ValueError(
                f"{owner!r} and {path!r} share a weight of shape {shape} but use it differently "
                f"({first.kind}, {layer.kind}), so no adapter fits both: name one of them in "
                "exclude_modules."
            )
        tied[path] = owner
    return {path: target for path, target in chosen.items() if path not in tied}, tied


def _refuse_tied_outside(
    model: nnx.Module, candidates: Mapping[str, Candidate], chosen: Mapping[str, Any]
) -> None:
    """Raise an error if only some of the layers that share a weight are adapted.

    Raises:
      ValueError: the message names an adapted layer and the others.
    """
    places: dict[int, list[str]] = {}
    for path, module in modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                places.setdefault(id(value), []).append(f"{path}/{name}".lstrip("/"))
    for path, target in chosen.items():
        weight = getattr(candidates[path].module, target.layer.weight)
        adapted = {f"{p}/{t.layer.weight}".lstrip("/") for p, t in chosen.items()}
        if others := [place for place in places.get(id(weight), []) if place not in adapted]:
            layers = ", ".join(repr(place.rpartition("/")[0]) for place in others)
            raise ValueError(
                f"target_modules: {path!r} shares its weight with {layers}, which would not have "
                "the increment, while a merged model has it in both: adapt all of them, or none."
            )


def _dropout(config: AdaLoraConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> nnx.Dropout | None:
    """Return the adapter's dropout, with one key per stacked layer; None if the rate is 0."""
    if not config.lora_dropout:
        return None
    dropout = nnx.Dropout(config.lora_dropout, rngs=rngs)
    if stack:
        dropout.rngs = rngs["dropout"].split(stack)
    return dropout


def placement(variable: Any) -> Any:
    """Return the sharding of a variable's array, else the one that its metadata specify."""
    named, mesh = variable.get_metadata("out_sharding", None), variable.get_metadata("mesh", None)
    if named and not isinstance(named, NamedSharding):
        named = nnx.spmd.get_var_pspec(variable)
        named = NamedSharding(mesh, named) if mesh and named else named
    return sharding.sharding_of(variable.get_value(), named or None)


def _annotate(adaptation: Any, target: targets.Target, weight: Any, specs: Adapter | None) -> None:
    """Set sharding metadata of an adapter's variables, if its weight has some.

    Axis names are derived from the weight's unless ``specs`` are given; mesh and sharding rules are
    copied.
    """
    named = weight.get_metadata("out_sharding", None)
    if not named:
        return
    named = named.spec if isinstance(named, NamedSharding) else PartitionSpec(*named)
    specs = specs or sharding.adapter_specs(target.layer, target.shape, named)
    rest = {n: v for n, v in weight.get_metadata().items() if n in ("mesh", "sharding_rules")}
    for name, spec in zip(Adapter._fields, specs):
        getattr(adaptation, name).set_metadata(out_sharding=tuple(spec), **rest)


def _save(model: nnx.Module, config: AdaLoraConfig) -> None:
    """Replace the parameters that ``modules_to_save`` names by trainable SavedParams, in place."""
    if not config.modules_to_save:
        return
    nodes = parameters(model)
    roots = targets.saved_roots(list(nodes), config)
    by_path = dict(modules(model))
    for path, variable in nodes.items():
        if targets.saved_params(path, config):
            parent, _, name = path.rpartition("/")
            if parent not in by_path:  # inside of a weight that Qwix quantised
                raise ValueError(
                    f"modules_to_save: {path!r} is quantised, so it cannot train: leave it as it "
                    "is in the rules for Qwix, or do not name it."
                )
            root = next(r for r in roots if path == r or path.startswith(f"{r}/"))
            setattr(by_path[parent], name, SavedParam.of(variable, root))
