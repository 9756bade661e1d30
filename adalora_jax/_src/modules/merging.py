"""Functions for both linen variables and NNX models: merge, unmerge, compact, finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, overload

import jax
import optax
from flax import nnx
from flax.core import unfreeze

from adalora_jax._src.core import compaction, evaluation, pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import layers, linen_layers, nnx_adapters, nnx_merging

_Model = TypeVar("_Model", bound=nnx.Module)


@overload
def merge(
    variables: _Model, *, safe: bool = False, inputs: nnx_merging.Inputs | None = None
) -> _Model: ...


@overload
def merge(
    variables: Mapping[str, PyTree], adapters: Mapping[str, PyTree], *, safe: bool = False
) -> dict[str, PyTree]: ...


def merge(
    variables: PyTree,
    adapters: PyTree = None,
    *,
    safe: bool = False,
    inputs: nnx_merging.Inputs | None = None,
) -> PyTree:
    """Return the plain model's parameters with every increment added.

    Each weight becomes ``W + s · qᵀ diag(λ) p``
    (`AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_). An adapter stores the layout of its
    weight, so this is exact for every kind of layer. Sums are computed in at least float32 and
    rounded once, to the weight's dtype. In bfloat16 an increment of 1/100 of its weight's norm
    loses 16 % of itself to rounding, and one of 1/1000 loses 77 % (``benchmarks/merging.py``).
    Parameters that ``modules_to_save`` trained replace the base's, in the base's dtype.

    Masks are not applied: pass the result of :func:`adalora_jax.eval_params` (or
    ``nnx.eval_model``), which applies them. For the parameters of a function, see
    :func:`adalora_jax.functional.merge`.

    Args:
      variables: variables of a linen model, with ``params``; or an adapted NNX model. They are not
        changed, so they can serve as a backup of the base.
      adapters: ``{path: Adapter}`` and the parameters of ``modules_to_save``, for linen variables;
        None for an NNX model.
      safe: raise an error if a merged weight is not finite.
      inputs: arguments for an NNX model, or a function that calls a model and returns its outputs,
        to compare those of the adapted and the merged model. Required if the use of a layer's
        weight is not known, because its class takes more than one input or the code of another
        module reads the weight. Not for linen variables: a linen model was traced with inputs when
        it was adapted.

    Returns:
      Variables for the plain linen module; or a copy of the NNX model without adapters, of the
      classes that it had before ``adapt``.

    Raises:
      TypeError: linen variables or adapters are not a mapping.
      ValueError: an adapter fits no weight of the model or has no known scale; a layer transforms
        its weight before use, so that no sum of weights is equivalent; the use of a weight is not
        known and ``inputs`` is None; a weight is quantised (use
        :func:`adalora_jax.quantization.merge`); with ``safe`` a result is not finite; the outputs
        for ``inputs`` differ; an NNX model has no adapters or is given with ``adapters``; or
        ``inputs`` are given with linen variables.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"query": {"kernel": jnp.zeros((5, 6))}}}
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)), scale=0.5)
    >>> float(merge(variables, {"query": adapter})["params"]["query"]["kernel"][0, 0])
    2.0
    """
    if isinstance(variables, nnx.Module):
        if adapters is not None:
            raise ValueError(
                "`adapters`: cannot be given with an NNX model, which contains its own; pass only "
                "the model, or replace its adapters with nnx.with_adapters(model, adapters)."
            )
        return nnx_merging.merged(variables, safe=safe, inputs=inputs)
    if inputs is not None:
        raise ValueError(
            "`inputs`: cannot be given with linen variables, which contain no model; leave them "
            "out, since adapted.init(key, variables, *inputs) has made this check."
        )
    return _merged_variables(variables, adapters, safe, sign=1)


@overload
def unmerge(variables: _Model, adapters: nnx.Module, *, safe: bool = False) -> _Model: ...


@overload
def unmerge(
    variables: Mapping[str, PyTree], adapters: Mapping[str, PyTree], *, safe: bool = False
) -> dict[str, PyTree]: ...


def unmerge(variables: PyTree, adapters: PyTree, *, safe: bool = False) -> PyTree:
    """Return the base parameters: subtract the increments that :func:`merge` added.

    The result equals the base to within one rounding of its dtype; keep the original variables if
    you need it bit for bit. Parameters of ``modules_to_save`` keep their merged values.

    Args:
      variables: merged linen variables, or a merged NNX model. Not changed.
      adapters: the adapters that were merged; for an NNX model the adapted model that was merged.
      safe: raise an error if a resulting weight is not finite.

    Returns:
      Linen variables, or an NNX model.

    Raises:
      TypeError: linen variables are not a mapping; or for an NNX model, ``adapters`` is not one.
      ValueError: ``adapters`` contains no adapter but other values, or one that fits no weight of
        the model; its layer transforms the weight before use; a weight is quantised; or with
        ``safe`` a result is not finite.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"query": {"kernel": jnp.zeros((5, 6))}}}
    >>> adapters = {"query": Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))}
    >>> restored = unmerge(merge(variables, adapters), adapters)
    >>> float(restored["params"]["query"]["kernel"][0, 0])
    0.0
    """
    if isinstance(variables, nnx.Module):
        return nnx_merging.unmerged(variables, adapters, safe=safe)
    if adapters != {}:  # as compact returns where every rank became 0
        pytree.require_adapters(adapters, "adapters", "pass the adapters that were merged")
    return _merged_variables(variables, adapters, safe, sign=-1)


def compact(
    params: PyTree, opt_state: PyTree, tx: optax.GradientTransformation | None = None
) -> PyTree:
    """Return the parameters without their pruned triplets: the same function at smaller ranks.

    The masks are applied first and alone determine the removed triplets, independently of the
    values of λ. An adapter of rank 0 is removed. A stack remains one array of its largest rank;
    lower-rank slices are padded with λ = 0. Scales and all other leaves do not change. It does not
    work under ``jit``, because the shapes depend on the masks.

    With ``tx`` the optimizer's state is compacted, too, so training can continue at the new size:
    moments, moving averages and masks lose the same rows as the adapters. A jitted step compiles
    again for the new shapes. The gradients of the task's loss do not change; the orthogonality
    penalty no longer counts the removed rows.

    For an NNX model, ``compact(model, optimizer)`` returns ``(model, optimizer)``, both copies, and
    ``compact(model, opt_state)`` the model alone.

    Args:
      params: the trained parameters: a tree with adapters in it, as the optimizer updates it.
      opt_state: masks, or a state that contains them, as in :func:`adalora_jax.masks`; with ``tx``
        its complete state.
      tx: the optimizer, if its state is to be compacted.

    Returns:
      ``params`` in their containers, without the entries of adapters of rank 0; with ``tx``
      ``(params, opt_state)``.

    Raises:
      ValueError: an adapter has no mask, or a mask has no adapter of its shape; with ``tx``, the
        final mask is missing, or the optimizer stores an array of another shape for an adapter;
        ``params`` are stacked by role; or ``tx`` is given with an NNX model.

    Warns:
      UserWarning: without ``tx``, if the final mask is missing; :func:`finish` makes it.

    >>> import jax, jax.numpy as jnp, optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2, tfinal=1)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> state = tx.init(adapters)
    >>> for _ in range(4):
    ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, adapters), state, adapters)
    >>> compact(adapters, state)["query"].p.shape
    (2, 5)
    >>> adapters, state = compact(adapters, state, tx)
    >>> adapters["query"].p.shape, state.inner[0].mu["query"].p.shape
    ((2, 5), (2, 5))
    """
    if not isinstance(params, nnx.Module):
        return compaction.compact(params, opt_state, tx)
    if not isinstance(opt_state, nnx.Optimizer):
        if tx is not None:
            raise ValueError(
                "`tx`: cannot be given with an NNX model; pass its nnx.Optimizer as opt_state, and "
                "no tx."
            )
        small = compaction.compact(nnx_adapters.adapters(params), opt_state)
        return nnx_adapters.with_adapters(params, small)
    optimizer, state = opt_state, pytree.unwrap_variables(nnx.state(params, opt_state.wrt))
    small, cut = compaction.compact(
        state, pytree.unwrap_variables(optimizer.opt_state), optimizer.tx
    )
    kept = {path: nnx_adapters.adapters(params)[path] for path in pytree.adapters(small)}
    model = nnx_adapters.with_adapters(params, kept)
    nnx.update(model, small)
    return model, nnx_adapters.optimizer_like(optimizer, model, cut)


def finish(opt_state: PyTree, params: PyTree, grads: PyTree = None) -> PyTree:
    """End a run within its budget: make the final mask if it is missing, and apply the masks.

    A run has no final mask if it stops early, or if updates were skipped (a loss scale's overflow
    under ``optax.apply_if_finite``). The final mask is made from the current moving averages, with
    the budget of ``config.final_step``. If there is one already, only the masks are applied, so
    every run may end with this call. Works under ``jit``.

    For an NNX model, ``finish(optimizer, model)`` returns copies ``(model, optimizer)``.

    Args:
      opt_state: the optimizer's state, which contains one :class:`AllocatorState`.
      params: the trained parameters, in the containers that the optimizer updates.
      grads: the last gradients, in the same containers. Needed by scores that depend on gradients
        (``"sensitivity"`` and functions) if the final mask is missing, or under ``jit``.

    Returns:
      ``(params, opt_state)``, in their containers. Further updates belong to the final phase.

    Raises:
      TypeError: ``params`` is an NNX model, but ``opt_state`` is not an ``nnx.Optimizer``.
      ValueError: no update was made yet, so there are no averages; the score needs ``grads``; the
        state contains no allocator state or more than one, or one for other adapters.

    >>> import jax, jax.numpy as jnp, optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=40, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> opt_state = tx.init(adapters)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> updates, opt_state = tx.update(grads, opt_state, adapters)
    >>> adapters = optax.apply_updates(adapters, updates)
    >>> adapters, opt_state = finish(opt_state, adapters)
    >>> adalora.ranks(opt_state)
    {'query': 2}
    """
    if not isinstance(params, nnx.Module):
        return evaluation.finish(opt_state, params, grads)
    if not isinstance(opt_state, nnx.Optimizer):
        raise TypeError(
            f"`opt_state={type(opt_state).__name__}`: is not an nnx.Optimizer, which an NNX model "
            "needs; call finish(optimizer, model)."
        )
    optimizer, state = opt_state, pytree.unwrap_variables(nnx.state(params, opt_state.wrt))
    state, done = evaluation.finish(
        pytree.unwrap_variables(optimizer.opt_state), state, pytree.unwrap_variables(grads)
    )
    model = nnx.clone(params)
    nnx.update(model, state)
    return model, nnx_adapters.optimizer_like(optimizer, model, done)


def _merged_variables(
    variables: Mapping[str, PyTree], adapters: Mapping[str, PyTree], safe: bool, sign: int
) -> dict[str, PyTree]:
    linen_layers.check_variables(variables)
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"`adapters={type(adapters).__name__}`: is not a mapping; pass the dict that init "
            "returned."
        )
    params = unfreeze(linen_layers.join_quantized(variables)["params"])
    for path, node in adapters.items():
        parts = path.split("/") if path else []
        existing = pytree.get_path(params, parts)
        if existing is None:
            raise ValueError(
                f"`adapters[{path!r}]`: is not a layer of the model, whose parameters are "
                f"{', '.join(sorted(params))}; pass the adapters of this model."
            )
        if not pytree.is_adapter(node):
            pytree.get_path(params, parts[:-1])[parts[-1]] = linen_layers.in_base_dtype(
                node, existing, path
            )
            continue
        adapter = pytree.adapters(node)[""]
        holder = existing if isinstance(existing, dict) else pytree.get_path(params, parts[:-1])
        layer = _layout_of(adapter, existing, path)
        (weight, *more), treedef = jax.tree.flatten(holder[layer.weight], is_leaf=pytree.is_packed)
        layers.check_not_quantised(bool(more) or pytree.is_packed(weight), path)
        merged = layers.merged_weight(path, weight, adapter, layer, sign=sign, safe=safe)
        holder[layer.weight] = treedef.unflatten([merged])
    return linen_layers.split_quantized({**variables, "params": params})


def _layout_of(adapter: Adapter, existing: PyTree, path: str) -> Layout:
    """Return the adapter's layout of the weight at ``path``.

    Raises:
      ValueError: the adapter was made for another weight, or its file does not specify the axes'
        roles and the sizes do not determine them.
    """
    layer = adapter.layout or Layout()
    params = existing if isinstance(existing, Mapping) else {path.rpartition("/")[2]: existing}
    shapes = {
        name: tuple(leaf.shape)
        for name, node in params.items()
        if not isinstance(node, Mapping)
        for leaf in jax.tree.leaves(node, is_leaf=pytree.is_packed)[:1]
    }
    if layer.kind == "unknown":
        return _only_reading(adapter, shapes, path)
    if layer.weight not in shapes:
        layout = "" if adapter.layout else ", or give the adapter its layout="
        raise ValueError(
            f"`adapters[{path!r}]`: the adapter is for a weight called {layer.weight!r}, but the "
            f"model has {shapes} there; pass the adapters of this model{layout}."
        )
    if layer.shape is not None and layer.shape != shapes[layer.weight]:
        raise ValueError(
            f"`adapters[{path!r}]`: the adapter is for a weight of shape {layer.shape}, but "
            f"{layer.weight!r} has {shapes[layer.weight]}; pass the adapters of this model."
        )
    return layer


def _only_reading(adapter: Adapter, shapes: Mapping[str, Sequence[int]], path: str) -> Layout:
    """Return the only layout that the sizes allow: a non-square weight ``[*stack, in, out]``.

    Raises:
      ValueError: the weight is square, or no or several parameters have this shape.
    """
    ins, outs = adapter.q.shape[-1], adapter.p.shape[-1]
    sizes = (*adapter.lam.shape[:-1], ins, outs)
    fitting = [name for name, shape in shapes.items() if tuple(shape) == sizes]
    if ins == outs or len(fitting) != 1:
        raise ValueError(
            f"`adapters[{path!r}]`: the adapter (in {ins}, out {outs}) comes from a file that does "
            f"not specify the axes of its weight, and the parameters {dict(shapes)} do not "
            "determine them; read it with like=adapted.init(...), the adapters of this model."
        )
    return Layout(fitting[0])
