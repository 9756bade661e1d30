"""Adapters for ``flax.nnx`` models.

:func:`adapt` copies the model. Each adapted layer of the copy has an additional child, ``adalora``,
with p, lam and q, and a subclass of the layer's class that adds the adapter output. The paths of
the base's variables and the results of ``isinstance`` do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from adalora_jax._src import _compat
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.modules import sharding, targets
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.foreign import Declarations, declared, layout_of
from adalora_jax._src.modules.nnx_candidates import candidates
from adalora_jax._src.modules.nnx_layers import Adaptation, adapted_class, layer_of
from adalora_jax._src.modules.nnx_variables import (
    SavedParam,
    modules,
    parameters,
    sharded_variable,
)

_Model = TypeVar("_Model", bound=nnx.Module)


def adapt(
    model: _Model,
    config: AdaLoraConfig,
    rngs: nnx.Rngs | jax.Array | int = 0,
    *,
    rules: sharding.Rules | None = None,
    layers: Declarations | None = None,
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
      rules: shardings of the adapters on a mesh, see :func:`adalora_jax.sharding.derive_specs`. By
        default they are derived from the shardings of the base's arrays or from its
        ``out_sharding`` metadata; the adapters' variables then have such metadata, too.
      layers: ``{class: Layout}`` of layers that are not Flax's, in addition to those that are known
        (see the reference of layers). A key is a class or its qualified name,
        ``"package.module.Class"``; a value is a :class:`~adalora_jax.Layout` or a function that
        returns the Layout of the module it is given. Each layer must compute the product that its
        Layout says, plus terms without the weight: an equation such as ``"...d,df->...f"``,
        ``y = x W + b`` over the last axes of x, or a look-up of rows of W (``kind="embed"``). A
        trace of the layer checks it. A layer without a declaration is adapted if it has one weight,
        attributes with the sizes of input and output (``in_features``, ``num_heads``), and the
        trace shows that it computes ``y = x W + b``.

    Returns:
      A module of the same class as ``model``, or of a subclass if ``model`` itself is an adapted
      layer.

    Raises:
      TypeError: ``model`` is not an NNX module, ``config`` is not an ``AdaLoraConfig``, or ``rngs``
        is none of these.
      ValueError: the config selects nothing, or something that cannot be adapted; only some of the
        layers that share a weight are selected, or they use it differently; ``layers`` is invalid;
        ``rngs`` lacks a stream; or the model already has adapters.

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
    rngs = _checked_rngs(rngs, config)
    adapted = nnx.clone(model)
    by_path: dict[str, Any] = dict(modules(adapted))
    weights = {p: sharded_variable(getattr(by_path[p], t.layer.weight)) for p, t in chosen.items()}
    placed = {p: (t.layer, t.shape, placement(weights[p])) for p, t in chosen.items()}
    specs = sharding.derive_specs(placed, rules)
    at = sharding.to_named_sharding(specs, [place for _, _, place in placed.values()])
    fresh = targets.init_all(rngs.params(), chosen, config, at)
    for path, target in chosen.items():
        module = by_path[path]
        stack = target.layer.matrix(target.shape)[0][: len(target.shape) - target.layer.ndim]
        dropout = _dropout(config, rngs, stack)
        is_declared = _is_foreign(module, layers)
        module.adalora = Adaptation(fresh[path], dropout, config.forward_mode, is_declared)
        _annotate(module.adalora, target, weights[path], specs[path] if rules else None)
        _compat.set_class(module, adapted_class(type(module), is_declared, target.layer.kind))
    for path, owner in tied.items():
        module = by_path[path]
        module.adalora = by_path[owner].adalora
        is_declared, kind = _is_foreign(module, layers), chosen[owner].layer.kind
        _compat.set_class(module, adapted_class(type(module), is_declared, kind))
    _save(adapted, config)
    return adapted


def describe(
    model: nnx.Module, config: AdaLoraConfig, *, layers: Declarations | None = None
) -> str:
    """Return a table of the layers that :func:`adapt` would adapt: shapes, ranks and parameters.

    Args:
      model: any NNX module, including one made by ``nnx.eval_shape``.
      config: as in :func:`adapt`.
      layers: as in :func:`adapt`.

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
    layers = declared(layers)
    chosen, _ = _chosen(model, config, layers)
    # Flax's own adapters are not weights of the base.
    base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    params = nnx.to_flat_state(nnx.state(model, base))
    shapes = {"/".join(map(str, path)): tuple(leaf.shape) for path, leaf in params}
    return targets.describe(chosen, config, candidates(model, layers=layers), shapes)


def resolve(
    model: nnx.Module, config: AdaLoraConfig, *, layers: Declarations | None = None
) -> AdaLoraConfig:
    """Return ``config`` with a ``target_modules`` function replaced by the paths it selects.

    The function may return a :class:`~adalora_jax.RankSpec` instead of True. The optimizer and
    merging see paths, not modules, so the config must contain these ranks before it is used.

    Args:
      model: any NNX module.
      config: as in :func:`adapt`; returned as it is if ``target_modules`` is not a function.
      layers: as in :func:`adapt`.

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
    >>> adalora_jax.nnx.adapters(adapt(model, config))["layers/0"].lam.shape
    (4,)
    """
    return targets.resolve(_candidates(model, config, declared(layers)), config)


def _checked_rngs(rngs: nnx.Rngs | jax.Array | int, config: AdaLoraConfig) -> nnx.Rngs:
    try:
        rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    except ValueError:
        raise TypeError(
            f"`rngs={type(rngs).__name__}`: is not an nnx.Rngs, a PRNG key or a seed; pass "
            "nnx.Rngs(0)."
        ) from None
    for stream in ("params", "dropout") if config.lora_dropout else ("params",):
        if not hasattr(rngs, stream):  # "default" stands for each of them
            raise ValueError(
                f"`rngs`: has no stream {stream!r}; pass nnx.Rngs(0), which has all streams."
            )
    return rngs


def _candidates(
    model: nnx.Module, config: AdaLoraConfig, layers: Declarations
) -> dict[str, Candidate]:
    found = candidates(model, layers=layers)
    check_config(config)
    return found


def _chosen(
    model: nnx.Module, config: AdaLoraConfig, layers: Declarations
) -> tuple[dict[str, targets.Target], dict[str, str]]:
    """Return the adapted layers, and ``{path: path}`` from other layers to the one they share with.

    A weight has one adapter, at the first of its layers in graph order, just as it has one path in
    the model's state.

    Raises:
      ValueError: layers that share a weight use it differently, or only some of them are selected.
    """
    candidates = _candidates(model, config, layers)
    chosen = targets.select(candidates, config)
    _check_tied_layers(model, candidates, chosen)
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
                f"`target_modules`: {owner!r} and {path!r} share a weight of shape {shape} but use "
                f"it differently ({first.kind}, {layer.kind}), so no adapter fits both; name one "
                "of them in exclude_modules."
            )
        tied[path] = owner
    return {path: target for path, target in chosen.items() if path not in tied}, tied


def _check_tied_layers(
    model: nnx.Module, candidates: Mapping[str, Candidate], chosen: Mapping[str, targets.Target]
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
                f"`target_modules`: {path!r} shares its weight with {layers}, which would not have "
                "the increment, while a merged model has it in both; adapt all of them, or none."
            )


def _is_foreign(module: nnx.Module, layers: Declarations) -> bool:
    """Return whether the layout of an adapted layer is declared, known or inferred."""
    return layout_of(module, layers) is not None or layer_of(module) is None


def _dropout(config: AdaLoraConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> nnx.Dropout | None:
    """Return the adapter's dropout, with one key per stacked layer; None if the rate is 0."""
    if not config.lora_dropout:
        return None
    dropout = nnx.Dropout(config.lora_dropout, rngs=rngs)
    if stack:
        stream = rngs["dropout"]
        dropout.rngs = nnx.RngStream(jax.random.split(stream(), stack), tag=stream.tag)
    return dropout


def placement(variable: nnx.Variable) -> NamedSharding | PartitionSpec | None:
    """Return the sharding of a variable's array, else the one that its metadata specify."""
    named = variable.get_metadata(_compat.sharding_key(variable), None)
    mesh = variable.get_metadata("mesh", None)
    if named and not isinstance(named, NamedSharding):
        named = nnx.spmd.get_var_pspec(variable)
        named = NamedSharding(mesh, named) if mesh and named else named
    return sharding.sharding_of(variable.get_value(), named or None)


def _annotate(
    adaptation: Adaptation, target: targets.Target, weight: nnx.Variable, specs: Adapter | None
) -> None:
    """Set sharding metadata of an adapter's variables, if its weight has some.

    Axis names are derived from the weight's unless ``specs`` are given; mesh and sharding rules are
    copied.
    """
    key = _compat.sharding_key(weight)
    named = weight.get_metadata(key, None)
    if not named:
        return
    named = named.spec if isinstance(named, NamedSharding) else PartitionSpec(*named)
    specs = specs or sharding.adapter_specs(target.layer, target.shape, named)
    rest = {n: v for n, v in weight.get_metadata().items() if n in ("mesh", "sharding_rules")}
    for name, spec in zip(Adapter._fields, specs):
        getattr(adaptation, name).set_metadata(**{key: tuple(spec)}, **rest)


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
                    f"`modules_to_save`: {path!r} is quantised, so it cannot train; exclude it "
                    "from Qwix's rules, or from modules_to_save."
                )
            root = next(r for r in roots if path == r or path.startswith(f"{r}/"))
            setattr(by_path[parent], name, SavedParam.of(variable, root))
