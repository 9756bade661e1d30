"""Verbs for linen variables and NNX models alike: merge, unmerge, compact, finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import jax
import optax
from flax import nnx
from flax.core import unfreeze

from adalora_jax._src.core import compaction, evaluation, pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.modules import layers, linen_layers, nnx_frontend

_Model = TypeVar("_Model", bound=nnx.Module)


@overload
def merge(
    variables: _Model, *, safe: bool = False, inputs: tuple[Any, ...] | None = None
) -> _Model: ...


@overload
def merge(
    variables: Mapping[str, Any], adapters: Mapping[str, Any], *, safe: bool = False
) -> dict[str, Any]: ...


def merge(
    variables: Any,
    adapters: Any = None,
    *,
    safe: bool = False,
    inputs: tuple[Any, ...] | None = None,
) -> Any:
    """Return the plain model's parameters with every increment added: ``W + s · qᵀ diag(λ) p``.

    Each adapter knows its weight, so this is exact for every kind of layer. Sums are made in at
    least float32 and rounded once, to the weight's dtype. In bfloat16 that costs an increment of
    1/100 of its weight's norm 16 % of itself, and one of 1/1000 77 % (``benchmarks/merging.py``).
    Parameters that ``modules_to_save`` trained replace the base's, in the base's dtype.

    Live λ are merged: pass what :func:`adalora_jax.eval_params` (or ``nnx.eval_model``) returned,
    in which the masks are applied.

    Args:
      variables: of a linen model, with ``params``; or an adapted NNX model. Not changed, so they
        are the copy to go back to.
      adapters: ``{path: Adapter}`` and the parameters of ``modules_to_save``, for linen variables.
      safe: raise where a merged weight is not finite.
      inputs: of an NNX model: raise where the merged model computes something else with them than
        the adapted one. Required where it is not known how a layer's weight is used, since its
        class takes more than one input or the code of another module reads the weight. A linen
        model needs none: it was traced with inputs when it was adapted.

    Returns:
      Variables for the plain linen module; or a copy of the NNX model without adapters, of the
      classes that it had before ``adapt``.

    Raises:
      ValueError: an adapter fits no weight of the model; a layer transforms its weight before it
        uses it, so that no sum of weights computes the same, or its use is not known and there are
        no ``inputs``; a weight is quantised (then
        :func:`adalora_jax.quantization.merge` merges); a result is not finite with ``safe``; or
        outputs for ``inputs`` differ.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"query": {"kernel": jnp.zeros((5, 6))}}}
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)), scale=0.5)
    >>> float(merge(variables, {"query": adapter})["params"]["query"]["kernel"][0, 0])
    2.0
    """
    if isinstance(variables, nnx.Module):
        if adapters is not None:
            raise ValueError(
                "adapters were given with an NNX model, which holds its own: pass the model alone, "
                "or put them into it with nnx.with_adapters(model, adapters)."
            )
        return nnx_frontend.merged(variables, safe=safe, inputs=inputs)
    if inputs is not None:
        raise ValueError(
            "inputs were given with linen variables, which hold no model: the check was made when "
            "the adapters were, by adapted.init(key, variables, *inputs)."
        )
    return _merged_variables(variables, adapters, safe, sign=1)


@overload
def unmerge(variables: _Model, adapters: nnx.Module, *, safe: bool = False) -> _Model: ...


@overload
def unmerge(
    variables: Mapping[str, Any], adapters: Mapping[str, Any], *, safe: bool = False
) -> dict[str, Any]: ...


def unmerge(variables: Any, adapters: Any, *, safe: bool = False) -> Any:
    """Subtract the increments that :func:`merge` added.

    The base comes back to within one rounding of its dtype; keep the variables themselves where it
    must come back bit for bit. Parameters of ``modules_to_save`` stay as they were merged.

    Args:
      variables: merged linen variables, or a merged NNX model.
      adapters: those that were merged; for an NNX model the adapted model that was merged.
      safe: as in :func:`merge`.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"query": {"kernel": jnp.zeros((5, 6))}}}
    >>> adapters = {"query": Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))}
    >>> restored = unmerge(merge(variables, adapters), adapters)
    >>> float(restored["params"]["query"]["kernel"][0, 0])
    0.0
    """
    if isinstance(variables, nnx.Module):
        return nnx_frontend.unmerged(variables, adapters, safe=safe)
    return _merged_variables(variables, pytree.adapters(adapters), safe, sign=-1)


def compact(params: Any, opt_state: Any, tx: optax.GradientTransformation | None = None) -> Any:
    """Return what trains without its pruned triplets, see :func:`compaction.compact`."""
    if not isinstance(params, nnx.Module):
        return compaction.compact(params, opt_state, tx)
    if not isinstance(opt_state, nnx.Optimizer):
        if tx is not None:
            raise ValueError("tx was given with an NNX model: pass its nnx.Optimizer as opt_state.")
        small = compaction.compact(nnx_frontend.adapters(params), opt_state)
        return nnx_frontend.with_adapters(params, small)
    optimizer, state = opt_state, pytree.bare(nnx.state(params, opt_state.wrt))
    small, cut = compaction.compact(state, pytree.bare(optimizer.opt_state), optimizer.tx)
    kept = {path: nnx_frontend.adapters(params)[path] for path in pytree.adapters(small)}
    model = nnx_frontend.with_adapters(params, kept)
    nnx.update(model, small)
    return model, nnx_frontend.optimizer_like(optimizer, model, cut)


def finish(opt_state: Any, params: Any, grads: Any = None) -> Any:
    """End a run within its budget, see :func:`evaluation.finish`."""
    if not isinstance(params, nnx.Module):
        return evaluation.finish(opt_state, params, grads)
    if not isinstance(opt_state, nnx.Optimizer):
        raise TypeError(
            f"opt_state is a {type(opt_state).__name__}: with an NNX model pass the nnx.Optimizer, "
            "finish(optimizer, model)."
        )
    optimizer, state = opt_state, pytree.bare(nnx.state(params, opt_state.wrt))
    state, done = evaluation.finish(pytree.bare(optimizer.opt_state), state, pytree.bare(grads))
    model = nnx.clone(params)
    nnx.update(model, state)
    return model, nnx_frontend.optimizer_like(optimizer, model, done)


compact.__doc__ = f"""{compaction.compact.__doc__}
    For an NNX model, ``compact(model, optimizer)`` returns ``(model, optimizer)``, both copies, and
    ``compact(model, opt_state)`` the model alone.
    """
finish.__doc__ = f"""{evaluation.finish.__doc__}
    For an NNX model, ``finish(optimizer, model)`` returns copies ``(model, optimizer)``.
    """


def _merged_variables(variables: Any, adapters: Any, safe: bool, sign: int) -> dict[str, Any]:
    linen_layers.check_variables(variables)
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters is a {type(adapters).__name__}: it must be the {{path: Adapter}} that "
            "adapted.init returned, trained."
        )
    params = unfreeze(linen_layers.whole(variables)["params"])
    for path, node in adapters.items():
        parts = path.split("/") if path else []
        existing = pytree.at(params, parts)
        if existing is None:
            raise ValueError(
                f"adapters[{path!r}] has no parameters in the model: it was made for another one."
            )
        if not pytree.is_adapter(node):
            pytree.at(params, parts[:-1])[parts[-1]] = linen_layers.in_base_dtype(
                node, existing, path
            )
            continue
        adapter = pytree.adapters(node)[""]
        holder = existing if isinstance(existing, dict) else pytree.at(params, parts[:-1])
        layer = _layout_of(adapter, existing, path)
        (weight, *more), treedef = jax.tree.flatten(holder[layer.weight], is_leaf=pytree.is_packed)
        if more or pytree.is_packed(weight):
            raise ValueError(
                f"the weight of {path!r} is quantised, and no increment can be added to integers "
                "in place: adalora_jax.quantization.merge dequantises or requantises it, and "
                "reports the error."
            )
        merged = layers.merged_weight(path, weight, adapter, layer, sign=sign, safe=safe)
        holder[layer.weight] = treedef.unflatten([merged])
    return linen_layers.apart({**variables, "params": params})


def _layout_of(adapter: Adapter, existing: Any, path: str) -> Layout:
    """Return the layout of the weight at ``path``, as the adapter knows it.

    Raises:
      ValueError: the parameters there are not what the adapter was made for, or a file does not
        say which axes are which and the sizes allow more than one reading.
    """
    layer = adapter.layout or Layout()
    own = existing if isinstance(existing, Mapping) else {path.rpartition("/")[2]: existing}
    shapes = {
        name: tuple(leaf.shape)
        for name, node in own.items()
        if not isinstance(node, Mapping)
        for leaf in jax.tree.leaves(node, is_leaf=pytree.is_packed)[:1]
    }
    if layer.kind == "unknown":
        return _only_reading(adapter, shapes, path)
    if layer.weight not in shapes:
        raise ValueError(
            f"adapters[{path!r}] is for a weight called {layer.weight!r}, but the model has "
            f"{shapes} there: it was made for another model"
            + ("." if adapter.layout else ", or needs its layout=.")
        )
    if layer.shape is not None and layer.shape != shapes[layer.weight]:
        raise ValueError(
            f"adapters[{path!r}] is for a weight of shape {layer.shape}, but {layer.weight!r} has "
            f"{shapes[layer.weight]}: it was made for another model."
        )
    return layer


def _only_reading(adapter: Adapter, shapes: Mapping[str, Sequence[int]], path: str) -> Layout:
    """Return the one layout that the sizes allow: a weight ``[*stack, in, out]``, not square."""
    ins, outs = adapter.q.shape[-1], adapter.p.shape[-1]
    wanted = (*adapter.lam.shape[:-1], ins, outs)
    fitting = [name for name, shape in shapes.items() if tuple(shape) == wanted]
    if ins == outs or len(fitting) != 1:
        raise ValueError(
            f"adapters[{path!r}] (in {ins}, out {outs}) was read from a file that does not say how "
            f"the axes of its weight read, and the parameters {dict(shapes)} do not tell: read it "
            "with like=adapted.init(...), the adapters of this model."
        )
    return Layout(fitting[0])
