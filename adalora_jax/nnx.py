"""Adapters for ``flax.nnx`` models.

A copy of the model is made whose adapted layers have one more child, ``adalora``, that holds p,
lam and q, and a class that subclasses the layer's own and adds the term. Paths of the base's
variables and ``isinstance`` stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from adalora_jax import compaction, layers, sharding, targets, tree
from adalora_jax.adapter import Adapter
from adalora_jax.config import AdaLoraConfig
from adalora_jax.nnx_layers import (
    PLACED,
    Adaptation,
    Adapted,
    AdapterParam,
    SavedParam,
    adapted_class,
    base_class,
    by_qwix,
    is_weight,
    layer_of,
    modules,
    own_axes,
    stored,
)


def adapt(
    model: nnx.Module,
    config: AdaLoraConfig,
    rngs: nnx.Rngs | jax.Array | int = 0,
    *,
    rules: sharding.Rules | None = None,
) -> Any:
    """A copy of ``model`` with AdaLoRA adapters in the layers that ``config`` selects.

    The copy shares the base's arrays and leaves ``model`` as it is. The adapters' variables are
    :class:`AdapterParam`, a subclass of ``nnx.LoRAParam``, and so are those of
    ``modules_to_save`` (:class:`SavedParam`): ``wrt=nnx.LoRAParam`` selects what trains. Layers
    that share a weight share its adapter. An increment counts where its layer is called; code that
    takes the weight out of a module and computes with it sees the base.

    Args:
      model: any NNX module; also one whose weights ``qwix.quantize_model`` quantised.
      config: the targets, ranks and scale.
      rngs: where the initial values come from, and the dropout of the adapters: an ``nnx.Rngs``
        (stream ``params``, and ``dropout``), a PRNG key, or a seed.
      rules: where adapters are to lie on a mesh, see :func:`adalora_jax.sharding.derive`. By
        default as the base's arrays do, or as its ``out_sharding`` metadata says, which an
        adapter's variables have then, too.

    Returns:
      A module of the same class as ``model``, or of a subclass where ``model`` is itself adapted.

    Raises:
      TypeError: ``model`` is no NNX module, or ``config`` no :class:`AdaLoraConfig`.
      ValueError: the config selects nothing, or something that cannot be adapted; or the model
        has adapters already.

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
    chosen, tied = _chosen(model, config)
    if not isinstance(rngs, nnx.Rngs):
        rngs = nnx.Rngs(rngs)
    adapted = nnx.clone(model)
    by_path: dict[str, Any] = dict(modules(adapted))
    weights = {p: stored(getattr(by_path[p], t.layer.weight)) for p, t in chosen.items()}
    where = {p: (t.layer, t.shape, placement(weights[p])) for p, t in chosen.items()}
    specs = sharding.derive(where, rules)
    fresh = targets.init_all(rngs.params(), chosen, config, sharding.on_mesh(specs, where))
    for path, target in chosen.items():
        module = by_path[path]
        stack = target.layer.matrix(target.shape)[0][: len(target.shape) - own_axes(target.layer)]
        dropout = _dropout(config, rngs, stack)
        module.adalora = Adaptation(
            fresh[path], config.scale_of(path), dropout, config.forward_mode
        )
        _annotate(module.adalora, target, weights[path], specs[path] if rules else None)
        module.__class__ = adapted_class(type(module))
    for path, owner in tied.items():
        by_path[path].adalora = by_path[owner].adalora
        by_path[path].__class__ = adapted_class(type(by_path[path]))
    _save(adapted, config)
    return adapted


def describe(model: nnx.Module, config: AdaLoraConfig) -> str:
    """The table of what would be adapted: layers, shapes, ranks, parameters.

    Args:
      model: any NNX module; one made by ``nnx.eval_shape`` will do.
      config: as in :func:`adapt`.

    >>> model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))))
    >>> print(describe(model, AdaLoraConfig(total_step=10, target_modules="all-linear")))
    layer      kind    matrices   in   out   rank   parameters   kernel      cost
    layers/0   dense          1    6     4     12          132       24   550.0 %
    total                     1                12          132       24   550.0 %
    memory: adapters 528 bytes, importance 1.1 kB
    """
    return targets.describe(_chosen(model, config)[0], config)


def resolve(model: nnx.Module, config: AdaLoraConfig) -> AdaLoraConfig:
    """``config`` with a function as ``target_modules`` replaced by what it chose in ``model``.

    A function may give a :class:`~adalora_jax.RankSpec` where it would say True. The optimizer
    and merging see paths, not modules, so those must be in the config before it is used.

    >>> def choose(path, module):
    ...     return adalora_jax.RankSpec(init_r=4) if isinstance(module, nnx.Linear) else False
    >>> import adalora_jax
    >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = resolve(model, AdaLoraConfig(total_step=10, target_r=2, target_modules=choose))
    >>> adapters(adapt(model, config))["layers/0"].lam.shape
    (4,)
    """
    return targets.resolve(_candidates(model, config), config)


def adapters(model: nnx.Module) -> dict[str, Adapter]:
    """``{path: Adapter}``: what checkpoints, merging and export work on, as from linen.

    >>> adapted = adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> adapters(adapted)["layers/0"].p.shape
    (12, 4)
    """
    return tree.adapters(nnx.state(model, AdapterParam))


def set_adapters(model: nnx.Module, new: Mapping[str, Adapter]) -> None:
    """Puts other values into the adapters of ``model``, in place.

    Args:
      model: as :func:`adapt` made it.
      new: ``{path: Adapter}`` for all of its adapters.

    Raises:
      ValueError: paths or shapes are not those of the model.

    >>> import jax.numpy as jnp
    >>> adapted = adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> set_adapters(adapted, jax.tree.map(jnp.ones_like, adapters(adapted)))
    >>> float(adapted.layers[0].adalora.lam[0])
    1.0
    """
    have = adapters(model)
    shapes = lambda found: {path: [leaf.shape for leaf in a] for path, a in found.items()}
    if shapes(have) != shapes(new):
        differing = sorted(
            path for path in {*have, *new} if shapes(have).get(path) != shapes(new).get(path)
        )
        raise ValueError(
            f"the new adapters do not fit the model at {', '.join(differing[:8])}: they need the "
            "model's paths and shapes."
        )
    for path, module in modules(model):
        if isinstance(module, Adaptation):
            values = new[path.rpartition("/")[0] if "/" in path else ""]
            for name, value in zip(Adapter._fields, values):
                getattr(module, name)[...] = value


def with_adapters(model: nnx.Module, new: Mapping[str, Adapter]) -> Any:
    """A copy of an adapted model with other adapters, of any rank; a layer without loses its own.

    For the adapters that :func:`adalora_jax.compact` made smaller, for those of another run, and
    under ``jax.vmap`` for a batch in which every example has adapters of its own.

    Args:
      model: as :func:`adapt` made it; not changed.
      new: ``{path: Adapter}``.

    Raises:
      ValueError: a path is not adapted in ``model``.

    >>> adapted = adapt(
    ...     nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    ...     AdaLoraConfig(total_step=10, target_modules="all-linear"),
    ... )
    >>> small = jax.tree.map(lambda leaf: leaf[:3], adapters(adapted))
    >>> with_adapters(adapted, small).layers[0].adalora.p.shape
    (3, 4)
    """
    have = adapters(model)
    if foreign := sorted(set(new) - set(have)):
        raise ValueError(
            f"new has adapters for {', '.join(foreign[:8])}, where the model has none: it is "
            f"adapted at {', '.join(sorted(have)[:8])}."
        )
    copy = nnx.clone(model)
    found = modules(copy)
    paths = {id(m): path.rpartition("/")[0] for path, m in found if isinstance(m, Adaptation)}
    for _, module in found:
        if not isinstance(module, Adapted):
            continue
        path = paths[id(module.adalora)]
        if path not in new:
            del module.adalora
            module.__class__ = base_class(type(module))
            continue
        for name, value in zip(Adapter._fields, new[path]):
            metadata = getattr(module.adalora, name).get_metadata()
            setattr(module.adalora, name, AdapterParam(value, **metadata))
    return copy


def compact(model: Any, optimizer: nnx.Optimizer, config: AdaLoraConfig) -> tuple[Any, Any]:
    """Smaller copies of a model and its optimizer, see :func:`adalora_jax.compact_train_state`.

    Args:
      model: as :func:`adapt` made it, trained past the final mask.
      optimizer: an ``nnx.Optimizer`` with ``wrt=nnx.LoRAParam`` of this model.
      config: of the run.
    """
    state, opt_state = compaction.compact_train_state(
        nnx.state(model, optimizer.wrt), optimizer.opt_state, config
    )
    small = with_adapters(model, tree.adapters(state))
    again = nnx.Optimizer(small, optimizer.tx, wrt=optimizer.wrt)
    again.opt_state = opt_state
    again.step[...] = optimizer.step[...]
    return small, again


def merge(model: nnx.Module, *, safe: bool = False) -> Any:
    """A copy of an adapted model with every increment added to its weight, and no adapters.

    Sums are made in at least float32 and rounded once, to the weight's dtype; see
    :func:`adalora_jax.merge` for what that costs in bfloat16.

    Args:
      model: as :func:`adapt` made it; not changed, so it is the copy to go back to.
      safe: refuse a result that is not finite.

    Raises:
      ValueError: a weight is quantised, or with ``safe`` a result is not finite.

    >>> base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = AdaLoraConfig(total_step=10, target_modules="all-linear", init_lora_weights=False)
    >>> adapted, x = adapt(base, config), jax.numpy.ones((2, 6))
    >>> bool(jax.numpy.allclose(merge(adapted)(x), adapted(x), rtol=1e-4))
    True
    >>> type(merge(adapted).layers[0])
    <class 'flax.nnx.nn.linear.Linear'>
    """
    merged = nnx.clone(model)
    _add_increments(merged, model, 1, safe)
    for _, module in modules(merged):
        if isinstance(module, Adapted):
            del module.adalora
            module.__class__ = base_class(type(module))
    return merged


def unmerge(model: nnx.Module, adapted: nnx.Module, *, safe: bool = False) -> Any:
    """A copy of a merged model with the increments of ``adapted`` taken off its weights again.

    The weights come back to within one rounding of their dtype.

    Args:
      model: as :func:`merge` gave it.
      adapted: the model that was merged.
      safe: refuse a result that is not finite.

    >>> base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> config = AdaLoraConfig(total_step=10, target_modules="all-linear", init_lora_weights=False)
    >>> adapted = adapt(base, config)
    >>> back = unmerge(merge(adapted), adapted)
    >>> difference = back.layers[0].kernel[...] - base.layers[0].kernel[...]
    >>> bool(abs(difference).max() < 1e-6)
    True
    """
    back = nnx.clone(model)
    _add_increments(back, adapted, -1, safe)
    return back


def _add_increments(model: nnx.Module, adapted: nnx.Module, sign: int, safe: bool) -> None:
    """Adds the increments of ``adapted`` to the weights of ``model``, in place."""
    own = dict(modules(model))
    done: set[int] = set()  # a tied weight has several layers
    for path, module in modules(adapted):
        if not isinstance(module, Adapted):
            continue
        adaptation, layer = module.adalora, layers.known(layer_of(module), module)
        weight = getattr(own.get(path), layer.weight, None)
        if weight is None:
            raise ValueError(f"model has no layer {path!r}: it is another one than was adapted.")
        if by_qwix(weight):
            raise ValueError(
                f"the weight of {path!r} is quantised: adalora_jax.quantized.merge_nnx merges into "
                "such a model, and says what error that makes."
            )
        if id(weight) in done:
            continue
        done.add(id(weight))
        scale = sign * adaptation.scale
        delta = layers.weight_increment(layer, adaptation.adapter, weight.shape, scale)
        new = layers.add_increment(weight[...], delta)
        weight[...] = layers.finite(new, path) if safe else new


def candidates(model: nnx.Module, *, of_adapted: bool = False) -> dict[str, targets.Candidate]:
    """All modules of the model by path, as selection sees them.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: the model has adapters, and is not meant to.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not a flax.nnx module; adalora_jax.linen.adapt "
            "takes linen modules."
        )
    found: dict[str, targets.Candidate] = {}
    for path, module in modules(model):
        if isinstance(module, Adaptation) and not of_adapted:
            raise ValueError(
                f"the model is adapted already, at {path!r}: adapt the base model, or set its "
                "adapters with set_adapters."
            )
        if tree.HOLDER in path.split("/"):
            continue
        layer = layer_of(module)
        shape = tuple(getattr(module, layer.weight).shape) if layer else ()
        if layer is None or len(shape) >= own_axes(layer):
            found[path] = targets.Candidate(module, layer, shape)
    return found


def _candidates(model: Any, config: AdaLoraConfig) -> dict[str, targets.Candidate]:
    found = candidates(model)
    if not isinstance(config, AdaLoraConfig):
        raise TypeError(f"config={config!r} must be an AdaLoraConfig.")
    return found


def _chosen(
    model: nnx.Module, config: AdaLoraConfig
) -> tuple[dict[str, targets.Target], dict[str, str]]:
    """What is adapted, by path; and the layers whose weight is that of such a layer, with its path.

    A weight has one adapter, at the first of its layers in the order of the graph, as it has one
    place in the model's state.
    """
    candidates = _candidates(model, config)
    chosen = targets.select(candidates, config)
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    for path in (path for path in candidates if path in chosen):
        layer, shape, _ = chosen[path]
        owner = owners.setdefault(id(getattr(candidates[path].module, layer.weight)), path)
        if owner == path:
            continue
        first = chosen[owner].layer
        if first[2:] != layer[2:]:
            raise ValueError(
                f"{owner!r} and {path!r} share a weight of shape {shape} but use it differently "
                f"({first.kind}, {layer.kind}), so no adapter fits both: name one of them in "
                "exclude_modules."
            )
        tied[path] = owner
    return {path: target for path, target in chosen.items() if path not in tied}, tied


def _dropout(config: AdaLoraConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> nnx.Dropout | None:
    """The adapter's dropout, with a key for each of the stacked layers."""
    if not config.lora_dropout:
        return None
    dropout = nnx.Dropout(config.lora_dropout, rngs=rngs)
    if stack:
        dropout.rngs = rngs["dropout"].split(stack)
    return dropout


def parameters(model: nnx.Module) -> dict[str, Any]:
    """``{path: variable}`` of the base's parameters, adapters left out.

    >>> list(parameters(nnx.Linear(6, 4, rngs=nnx.Rngs(0))))
    ['bias', 'kernel']
    """
    return {
        "/".join(map(str, path)): variable
        for path, variable in nnx.iter_graph(model)
        if is_weight(variable) and not isinstance(variable, AdapterParam)
    }


def with_parameters(model: nnx.Module, new: Mapping[str, Any]) -> Any:
    """A copy of ``model`` with other values in the parameters at some paths.

    >>> model = with_parameters(
    ...     nnx.Linear(6, 4, rngs=nnx.Rngs(0)), {"bias": jax.numpy.ones(4)}
    ... )
    >>> model.bias[0]
    Array(1., dtype=float32)
    """
    copy = nnx.clone(model)
    for path, variable in parameters(copy).items():
        if path in new:
            variable.set_value(new[path])
    return copy


def placement(variable: Any) -> Any:
    """Where a variable's array lies, or is to lie by its metadata."""
    named, mesh = variable.get_metadata("out_sharding", None), variable.get_metadata("mesh", None)
    if named and not isinstance(named, NamedSharding):
        named = nnx.spmd.get_var_pspec(variable)
        named = NamedSharding(mesh, named) if mesh and named else named
    return sharding.sharding_of(variable.get_value(), named or None)


def _annotate(adaptation: Any, target: targets.Target, weight: Any, specs: Adapter | None) -> None:
    """The base's sharding metadata for its adapter: the names that it has, by its own rules."""
    named = weight.get_metadata("out_sharding", None)
    if not named:
        return
    named = named.spec if isinstance(named, NamedSharding) else PartitionSpec(*named)
    specs = specs or sharding.adapter_specs(target.layer, target.shape, named)
    rest = {n: v for n, v in weight.get_metadata().items() if n in ("mesh", "sharding_rules")}
    for name, spec in zip(Adapter._fields, specs):
        getattr(adaptation, name).set_metadata(out_sharding=tuple(spec), **rest)


def _save(model: nnx.Module, config: AdaLoraConfig) -> None:
    """Makes the parameters named by ``modules_to_save`` trainable: a copy, of another type."""
    if not config.modules_to_save:
        return
    nodes = parameters(model)
    targets.saved_roots(list(nodes), config)
    by_path = dict(modules(model))
    for path, variable in nodes.items():
        if targets.saved(path, config):
            parent, _, name = path.rpartition("/")
            if parent not in by_path:  # inside of what Qwix made of a weight
                raise ValueError(
                    f"modules_to_save: {path!r} is quantised, so it cannot train: leave it as it "
                    "is in the rules for Qwix, or do not name it."
                )
            metadata = variable.get_metadata() | PLACED
            copied = SavedParam(jax.numpy.copy(variable[...]), **metadata)
            setattr(by_path[parent], name, copied)
