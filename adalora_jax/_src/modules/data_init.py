"""Initial values computed from the model's weights or from the inputs of its layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter, known_scale
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import accumulation_dtype, reshard, spec_of_type
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import (
    einsum,
    layers,
    linen_frontend,
    linen_layers,
    merging,
    nnx_adapters,
    nnx_layers,
    nnx_merging,
    nnx_variables,
)

_Model = TypeVar("_Model", bound=flax_nnx.Module)
_OBSERVED = ("dense", "general", "einsum", "conv")  # an embedding's inputs are indices


@overload
def pissa_init(variables: _Model) -> _Model: ...


@overload
def pissa_init(
    variables: Mapping[str, PyTree], adapters: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]: ...


def pissa_init(variables: PyTree, adapters: PyTree = None) -> PyTree:
    """Move the top singular vectors of the weights from the base into the adapters.

    With ``W = Σ_i σ_i u_i v_iᵀ``, σ in descending order, triplet i becomes ``p = v_i, λ = σ_i / s,
    q = u_i``, and the base weight ``W − Σ_{i < r} σ_i u_i v_iᵀ``
    (`PiSSA <https://arxiv.org/abs/2404.02948>`_, in SVD form). The adapted model computes the same
    function as before, to within rounding. Rows beyond ``min(in, out)`` keep p and q, with λ = 0.

    Args:
      variables: variables of a linen model, with ``params``; or an adapted NNX model. Not changed.
      adapters: ``{path: Adapter}``, newly initialised, for linen variables; None for an NNX model.

    Returns:
      ``(variables, adapters)`` for linen, a model for NNX. Checkpoints and exports of the adapters
      belong to this base, not to the original one.

    Raises:
      TypeError: the variables are not a mapping.
      ValueError: there are no adapters; a weight is quantised, its layer transforms it before use,
        or an adapter does not fit its weight or has no known scale.

    >>> import adalora_jax, flax.linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 6))
    >>> variables = model.init(jax.random.key(0), x)
    >>> config = AdaLoraConfig(total_step=10, init_r=3, target_r=2, target_modules=".*")
    >>> adapted = adalora_jax.linen.adapt(model, config)
    >>> adapters = adapted.init(jax.random.key(1), variables, x)
    >>> corrected, adapters = pissa_init(variables, adapters)
    >>> y = adapted.apply(corrected, adapters, x)
    >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
    True
    >>> bool(abs(model.apply(corrected, x) - y).max() > 0.1)
    True
    """
    if isinstance(variables, flax_nnx.Module):
        nnx_merging.check_adapted(variables, "variables")
        new = nnx_adapters.adapters(variables)
        for path, module in nnx_variables.modules(variables):
            if isinstance(module, nnx_layers.Adapted) and path in new:
                variable = getattr(module, new[path].layout.weight)
                qwix = nnx_variables.is_qwix_weight(variable)
                new[path] = _principal(
                    new[path], variable if qwix else variable.get_raw_value(), path
                )
        changed = nnx_adapters.with_adapters(variables, new)
        return nnx_merging.unmerged(changed, changed, checked=False)
    linen_layers.check_variables(variables)
    params, new = linen_layers.unboxed(variables), dict(adapters)
    for path, adapter in pytree.adapters(new).items():
        name = (adapter.layout or Layout()).weight
        weight = pytree.get_path(params, pytree.weight_path(params, path, name))
        new[path] = _principal(adapter, weight, path)
    return merging.unmerge(variables, new), new


def _principal(adapter: Adapter, weight: PyTree, path: str) -> Adapter:
    layer, scale = adapter.layout or Layout(), known_scale(adapter, path)
    if pytree.is_packed(weight) or nnx_variables.is_qwix_weight(weight):
        raise ValueError(
            f"`variables`: the weight of {path!r} is quantised, so no increment can be subtracted "
            "from it; pass the float weights, and quantise the result."
        )
    lifted = weight.ndim - layer.ndim  # only these axes may stay sharded for an svd
    spec = (*spec_of_type(weight)[:lifted], *[None] * layer.ndim)
    matrix = layer.to_matrix(reshard(weight, weight, spec))
    u, sigma, vt = jnp.linalg.svd(
        matrix.astype(accumulation_dtype(matrix.dtype)), full_matrices=False
    )
    rank = min(adapter.lam.shape[-1], sigma.shape[-1])
    lam = (sigma / scale).astype(adapter.lam.dtype)
    lam = jnp.zeros_like(adapter.lam).at[..., :rank].set(lam[..., :rank])
    q = _rows(adapter.q, jnp.matrix_transpose(u), rank)
    return adapter._replace(p=_rows(adapter.p, vt, rank), lam=lam, q=q)


def _rows(old: jax.Array, new: jax.Array, rank: int) -> jax.Array:
    """Return ``old [..., r, d]`` with its first ``rank`` rows replaced by those of ``new``."""
    first = reshard(new[..., :rank, :].astype(old.dtype), old)
    return old.at[..., :rank, :].set(first)


def input_second_moments(
    model: flax_nnx.Module | linen_frontend.AdaptedModule, *inputs: PyTree, **kwargs: Any
) -> dict[str, jax.Array]:
    """Return ``Σ xᵀx`` over all inputs x of each adapted layer, of the base model on one batch.

    The results of several batches can be added: ``jax.tree.map(jnp.add, first, second)``. The
    function takes one forward and backward pass, can be jitted, and needs ``in²`` numbers per
    matrix. A convolution's inputs are its patches. Embeddings are left out.

    Args:
      model: an adapted NNX model, which is not changed; or an adapted linen module.
      *inputs: arguments of the model; for linen ``variables`` and ``adapters`` come first, as in
        ``adapted.apply``; the values of the adapters do not matter. The outputs must be
        differentiable functions of each layer's output.
      **kwargs: keyword arguments of the model.

    Returns:
      ``{path: array [*stack, in, in]}``, in at least float32.

    Raises:
      TypeError: ``model`` is not an NNX model or an adapted linen module.
      ValueError: an NNX model has no adapters.
      TypeError, ValueError: for linen, as in :meth:`adalora_jax.linen.AdaptedModule.apply`.

    >>> import adalora_jax, flax.linen as nn
    >>> model, x = nn.Dense(4), jnp.arange(12.0).reshape(2, 6)
    >>> variables = model.init(jax.random.key(0), x)
    >>> adapted = adalora_jax.linen.adapt(model, AdaLoraConfig(total_step=9, target_modules=".*"))
    >>> adapters = adapted.init(jax.random.key(1), variables, x)
    >>> bool((input_second_moments(adapted, variables, adapters, x)[""] == x.T @ x).all())
    True
    """
    if isinstance(model, flax_nnx.Module):
        nnx_merging.check_adapted(model, "model")
        adapters = nnx_adapters.adapters(model)

        def run(probes: Mapping[str, Adapter]) -> PyTree:
            return _with_probes(model, probes)(*inputs, **kwargs)
    elif not isinstance(model, linen_frontend.AdaptedModule):
        raise TypeError(
            f"`model={type(model).__name__}`: is not an adapted model; pass what linen.adapt or "
            "nnx.adapt returned."
        )
    else:
        variables, adapters, *rest = inputs
        probed = dataclasses.replace(model, _adapter_output=_probe_output)

        def run(probes: Mapping[str, Adapter]) -> PyTree:
            return probed.apply(variables, probes, *rest, **kwargs)

    found = pytree.adapters(adapters).items()
    return _moments(run, {p: a for p, a in found if (a.layout or Layout()).kind in _OBSERVED})


def _with_probes(model: flax_nnx.Module, probes: Mapping[str, Adapter]) -> flax_nnx.Module:
    copy: Any = nnx_adapters.with_adapters(model, probes)
    for _, module in nnx_variables.modules(copy):
        if isinstance(module, nnx_layers.Adaptation):
            module._adapter_output = _probe_output
    return copy


def _moments(
    run: Callable[[dict[str, Adapter]], PyTree], adapters: Mapping[str, Adapter]
) -> dict[str, jax.Array]:
    """Return ``Σ xᵀx`` of each adapted layer's inputs x.

    They are computed as gradients, which JAX sums over the calls of a layer and stacks through any
    scan or map. Each probe has the form of an adapter of rank ``in``, with q = I.
    """

    def probe(adapter: Adapter) -> Adapter:
        *stack, _, ins = adapter.q.shape
        dtype = accumulation_dtype(adapter.q.dtype)
        p = jnp.zeros((*stack, 1, adapter.p.shape[-1]))  # only its width is used
        q = jnp.broadcast_to(jnp.eye(ins, dtype=dtype), (*stack, ins, ins))
        return adapter._replace(p=p, lam=jnp.zeros((*stack, ins)), q=q)

    def total(probes: dict[str, Adapter]) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(run(probes)) if hasattr(leaf, "dtype")]
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.sum(leaf.astype("float32")) for leaf in floats), start=jnp.zeros(()))

    grads = jax.grad(total)({path: probe(adapter) for path, adapter in adapters.items()})
    return {path: grad.q for path, grad in grads.items()}


def _probe_output(
    layer: Layout,
    module: object,
    probe: Adapter,
    x: jax.Array,
    shape: Sequence[int],
    dtype: DTypeLike,
    *,
    equation: str | None,
    convolve: Callable[[Any, jax.Array, jax.Array], jax.Array],
    **_: object,
) -> jax.Array:
    """Return 0 whose gradient for the probe's q is ``q Σ xᵀx``, for every cotangent.

    The arguments are those of :func:`layers.adapter_output`, in whose place it is called.
    """
    x = lax.stop_gradient(jnp.asarray(x).astype(dtype))
    rows = _input_rows(layer, module, x, shape, equation, convolve)
    rows = rows.astype(accumulation_dtype(dtype))
    q = jnp.asarray(probe.q).astype(rows.dtype)
    h = jnp.matmul(rows, jnp.matrix_transpose(q), precision=lax.Precision.HIGHEST)
    return _zero_with_identity_vjp(h).astype(dtype)


def _input_rows(
    layer: Layout,
    module: object,
    x: jax.Array,
    shape: Sequence[int],
    equation: str | None,
    convolve: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Return a layer's input as the rows ``[*stack, rows, in]`` that its matrices multiply.

    An axis of the stack has size 1 where all its matrices have the same input. The rows of a
    convolution are its patches.
    """
    in_features = math.prod(shape[axis] for axis in layer.ins)
    if layer.kind == "dense":
        return x.reshape(-1, in_features)
    if layer.kind == "conv":
        identity = jnp.eye(in_features, dtype=x.dtype)
        kernel = layers.conv_kernel(layer, identity, shape, x.dtype)
        return layers.convolve_groups(convolve, module, x, kernel).reshape(-1, in_features)
    xs, ws, _ = labels = einsum.labels_of(layer, module, equation, x.ndim)
    stack = [shape[axis] if ws[axis] in xs else 1 for axis in layer.stack]
    return einsum.stack_first(layer, labels, x).reshape(*stack, -1, in_features)


@jax.custom_vjp
def _zero_with_identity_vjp(h: jax.Array) -> jax.Array:
    """Return 0 whose gradient for h is h itself, ``∂ ½‖h‖² / ∂h``."""
    return jnp.zeros((), h.dtype)


# The cotangent does not depend on h and is ignored.
_zero_with_identity_vjp.defvjp(lambda h: (_zero_with_identity_vjp(h), h), lambda h, g: (h,))


def eva_ranks(
    moments: Mapping[str, jax.Array], config: AdaLoraConfig, *, max_rank: int | None = None
) -> AdaLoraConfig:
    """Return the config with initial ranks chosen by the input variance that triplets explain.

    Component i of a layer explains ``ν_i / Σ_j ν_j`` of its input's variance, with the eigenvalues
    ν of ``Σ xᵀx``. As in `EVA <https://arxiv.org/abs/2410.07170>`_ the components of all layers
    compete for a mean of ``init_r`` triplets per matrix. Each layer keeps at least one. The
    matrices of a stack have one rank, by their mean shares, so that a higher rank costs one triplet
    in each of them.

    Args:
      moments: ``{path: array [*stack, in, in]}`` as :func:`input_second_moments` returns them.
      config: has each layer's ``init_r`` and, in ``rank_overrides``, its ``max_r``.
      max_rank: the highest rank of a layer; None: twice its ``init_r``.

    Returns:
      A copy of the config with the ranks in ``rank_pattern``; its scale is the same.

    Raises:
      TypeError: ``moments`` is not a mapping, or ``config`` not an :class:`AdaLoraConfig`.
      ValueError: ``max_rank`` is below 1; or there are no moments, or some of another shape or with
        numbers that are not finite.

    >>> moments = {"flat": jnp.eye(8), "thin": jnp.diag(jnp.array([8.0, 1, 0, 0, 0, 0, 0, 0]))}
    >>> config = AdaLoraConfig(total_step=10, init_r=4, target_r=2)
    >>> eva_ranks(moments, config).rank_pattern
    (('flat', 7), ('thin', 1))
    """
    check_config(config)
    if max_rank is not None and max_rank < 1:
        raise ValueError(
            f"`max_rank={max_rank}`: must be at least 1; pass None for twice each layer's init_r."
        )
    _check_mapping(moments)
    candidates, ranks, remaining = [], {}, 0
    for path, moment in moments.items():
        _check_moment(path, moment)
        spec = config.spec_of(path)
        share = jnp.mean(_explained(moment), axis=range(moment.ndim - 2))
        number = math.prod(moment.shape[:-2])
        limit = min(max_rank or 2 * spec.init_r, moment.shape[-1])
        limit = min(limit, spec.max_r) if config.rank_overrides else limit
        for i, value in enumerate(np.asarray(share)[1:limit]):
            candidates.append((-value, path, i, number))
        ranks[path], remaining = 1, remaining + number * (spec.init_r - 1)
    for _, path, _, number in sorted(candidates):
        if number <= remaining:
            ranks[path], remaining = ranks[path] + 1, remaining - number
    return config.replace(rank_pattern=ranks)


def eva_init(adapters: PyTree, moments: Mapping[str, jax.Array]) -> dict[str, PyTree]:
    """Return the adapters with the inputs' principal directions as q, and λ = 0.

    ``q_i`` is the i-th right singular vector of the inputs, stacked as rows: the i-th eigenvector
    of ``Σ xᵀx`` (`EVA <https://arxiv.org/abs/2410.07170>`_). p is kept. Adapters without moments
    are not changed.

    Args:
      adapters: ``{path: Adapter}``, newly initialised, of the ranks that :func:`eva_ranks` chose.
      moments: ``{path: array [*stack, in, in]}`` as :func:`input_second_moments` returns them.

    Returns:
      ``{path: Adapter}``, a new dict.

    Raises:
      TypeError: ``moments`` is not a mapping.
      ValueError: ``moments`` has no paths, or one without an adapter; or a moment has another shape
        than its adapter, or numbers that are not finite.

    >>> adapter = Adapter(jnp.ones((1, 4)), jnp.ones(1), jnp.ones((1, 3)))
    >>> moments = {"query": jnp.diag(jnp.array([1.0, 9.0, 4.0]))}
    >>> abs(eva_init({"query": adapter}, moments)["query"].q)
    Array([[0., 1., 0.]], dtype=float32)
    """
    _check_mapping(moments)
    new = dict(adapters)
    for path, moment in moments.items():
        if path not in new:
            raise ValueError(
                f"`moments[{path!r}]`: no adapter has this path; pass the moments of these "
                "adapters."
            )
        adapter = new[path]
        _check_moment(path, moment, (*adapter.q.shape[:-2], adapter.q.shape[-1]))
        vectors = jnp.linalg.eigh(moment)[1][..., ::-1]  # eigh: columns, ascending
        rank = min(adapter.q.shape[-2:])
        q = _rows(adapter.q, jnp.matrix_transpose(vectors), rank)
        new[path] = adapter._replace(lam=jnp.zeros_like(adapter.lam), q=q)
    return new


def _check_mapping(moments: Mapping[str, jax.Array]) -> None:
    if not isinstance(moments, Mapping):
        raise TypeError(
            f"`moments={type(moments).__name__}`: is not a mapping; pass {{path: array}}, as "
            "input_second_moments returns it."
        )
    if not moments:
        raise ValueError(
            "`moments`: are empty; pass those of input_second_moments for a model with adapters "
            "that are not of embeddings."
        )


def _check_moment(path: str, moment: jax.Array, axes: tuple[int, ...] | None = None) -> None:
    """Raise an error unless a moment is finite, of shape ``[*axes, in]`` or any ``[..., in, in]``.

    Values that are traced, or on devices of other processes, are not checked.
    """
    shape = tuple(jnp.shape(moment))
    expected = shape[:-1] if axes is None else axes
    if shape != (*expected, *expected[-1:]) or len(shape) < 2:
        wanted = "[..., in, in]" if axes is None else [*axes, axes[-1]]
        raise ValueError(
            f"`moments[{path!r}]`: has shape {list(shape)}, but must have {wanted}; pass the "
            "moments that input_second_moments returns for this model."
        )
    known = not isinstance(moment, Tracer) and getattr(moment, "is_fully_addressable", True)
    if known and not np.isfinite(np.asarray(moment)).all():
        raise ValueError(
            f"`moments[{path!r}]`: has numbers that are not finite; leave out the batches whose "
            "activations overflow."
        )


def _explained(moment: jax.Array) -> jax.Array:
    """Return each eigenvalue's share of their sum, highest first."""
    values = jnp.maximum(jnp.linalg.eigvalsh(moment)[..., ::-1], 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    return values / jnp.where(total > 0, total, 1)
