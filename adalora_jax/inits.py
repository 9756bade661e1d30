"""Initial values that need the model: from its weights, or from what goes into its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adalora_jax import layers, linen_layers, nnx, nnx_layers, tree
from adalora_jax.adapter import Adapter, Observer
from adalora_jax.config import AdaLoraConfig
from adalora_jax.linen import AdaptedModule
from adalora_jax.lowrank import wide
from adalora_jax.tree import PyTree

_OBSERVED = ("dense", "general", "einsum", "conv")  # an embedding's inputs are no numbers


def principal_linen(
    adapted: AdaptedModule,
    variables: Mapping[str, Any],
    adapters: Mapping[str, Any],
    *inputs: Any,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adapters that start as the top singular vectors of their weights, and the base without them.

    With ``W = Σ_i σ_i u_i v_iᵀ``, σ falling, triplet i becomes ``p = v_i, λ = σ_i / s, q = u_i``,
    and the base ``W − Σ_{i < r} σ_i u_i v_iᵀ`` (PiSSA, in SVD form): the adapted model is what it
    was, to within rounding. Rows beyond the weight's rank stay as they are, with λ = 0.

    Args:
      adapted: the model.
      variables, adapters: as in ``adapted.apply``; not changed.
      *inputs, **kwargs: what the model is called with.

    Returns:
      ``(variables, adapters)``. Checkpoints and exports of the adapters go with these variables,
      not with the original ones.

    Raises:
      ValueError: a weight is quantised.

    >>> import adalora_jax, flax.linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 6))
    >>> variables = model.init(jax.random.key(0), x)
    >>> config = AdaLoraConfig(total_step=10, init_r=3, target_r=2, target_modules=".*")
    >>> adapted = adalora_jax.linen.adapt(model, config)
    >>> adapters = adapted.init(jax.random.key(1), variables, x)
    >>> corrected, adapters = principal_linen(adapted, variables, adapters, x)
    >>> y = adapted.apply(corrected, adapters, x)
    >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
    True
    >>> bool(abs(model.apply(corrected, x) - y).max() > 0.1)
    True
    """
    candidates = linen_layers.candidates(adapted.module, variables, inputs, kwargs)
    params, new = linen_layers.unboxed(variables), dict(adapters)
    for path, adapter in tree.adapters(new).items():
        layer = layers.known(candidates[path].layer, candidates[path].module)
        weight = tree.at(params, tree.weight_path(params, path, layer.weight))
        new[path] = _principal(adapter, layer, weight, adapted.config.scale_of(path), path)
    return adapted.unmerge(variables, new, *inputs, **kwargs), new


def principal_nnx(model: Any) -> Any:
    """:func:`principal_linen` for an adapted NNX model: a copy with both changed.

    >>> import adalora_jax
    >>> from flax import nnx
    >>> base, x = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))), jnp.ones((2, 6))
    >>> config = AdaLoraConfig(total_step=10, target_modules="all-linear")
    >>> model = principal_nnx(adalora_jax.nnx.adapt(base, config))
    >>> bool(jnp.allclose(model(x), base(x), atol=1e-5))
    True
    """
    new = nnx.adapters(model)
    for path, module in nnx_layers.modules(model):
        if isinstance(module, nnx_layers.Adapted) and path in new:
            layer = layers.known(nnx_layers.layer_of(module), module)
            variable = getattr(module, layer.weight)
            weight = variable if nnx_layers.by_qwix(variable) else variable.get_raw_value()
            new[path] = _principal(new[path], layer, weight, module.adalora.scale, path)
    changed = nnx.with_adapters(model, new)
    return nnx.unmerge(changed, changed)


def _principal(adapter: Adapter, layer: layers.Layer, weight: Any, scale: float, path: str):
    if tree.is_packed(weight) or nnx_layers.by_qwix(weight):
        raise ValueError(
            f"the weight of {path!r} is quantised, so nothing can be taken out of it: start with "
            "the weights as they were, and quantise what is left."
        )
    matrix = layer.to_matrix(weight)
    u, sigma, vt = jnp.linalg.svd(matrix.astype(wide(matrix.dtype)), full_matrices=False)
    rank = min(adapter.lam.shape[-1], sigma.shape[-1])
    lam = (sigma / scale).astype(adapter.lam.dtype)
    lam = jnp.zeros_like(adapter.lam).at[..., :rank].set(lam[..., :rank])
    return Adapter(_rows(adapter.p, vt, rank), lam, _rows(adapter.q, jnp.matrix_transpose(u), rank))


def _rows(own: jax.Array, new: jax.Array, rank: int) -> jax.Array:
    """``own [..., r, d]`` with its first rows replaced."""
    return own.at[..., :rank, :].set(new[..., :rank, :].astype(own.dtype))


def moments_linen(
    adapted: AdaptedModule,
    variables: Mapping[str, Any],
    adapters: Mapping[str, Any],
    *inputs: Any,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """``Σ xᵀx`` over all inputs x of each adapted layer, of the base model on one batch.

    Those of several batches add up: ``jax.tree.map(jnp.add, first, second)``. It takes one run of
    the model there and back, may be jitted, and needs ``in²`` numbers a layer. A convolution's
    inputs are its patches. Embeddings are left out.

    Args:
      adapted: the model.
      variables, adapters: as in ``adapted.apply``; of the adapters only the shapes count.
      *inputs, **kwargs: what the model is called with. Its outputs must depend on each layer in a
        way that can be differentiated.

    Returns:
      ``{path: [*stack, in, in]}``, in at least float32.

    >>> import adalora_jax, flax.linen as nn
    >>> model, x = nn.Dense(4), jnp.arange(12.0).reshape(2, 6)
    >>> variables = model.init(jax.random.key(0), x)
    >>> adapted = adalora_jax.linen.adapt(model, AdaLoraConfig(total_step=9, target_modules=".*"))
    >>> adapters = adapted.init(jax.random.key(1), variables, x)
    >>> bool((moments_linen(adapted, variables, adapters, x)[""] == x.T @ x).all())
    True
    """
    candidates = linen_layers.candidates(adapted.module, variables, inputs, kwargs)
    kinds = {path: c.layer.kind for path, c in candidates.items() if c.layer}
    return _moments(
        lambda observers: adapted.apply(variables, observers, *inputs, **kwargs),
        {path: a for path, a in tree.adapters(adapters).items() if kinds.get(path) in _OBSERVED},
    )


def moments_nnx(model: Any, *inputs: Any, **kwargs: Any) -> dict[str, jax.Array]:
    """:func:`moments_linen` for an adapted NNX model, which is left as it is.

    >>> import adalora_jax
    >>> from flax import nnx
    >>> base, x = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))), jnp.ones((2, 6))
    >>> model = adalora_jax.nnx.adapt(
    ...     base, AdaLoraConfig(total_step=10, target_modules="all-linear")
    ... )
    >>> bool((moments_nnx(model, x)["layers/0"] == x.T @ x).all())
    True
    """
    found = nnx_layers.modules(model)
    kinds = {path: layer.kind for path, m in found if (layer := nnx_layers.layer_of(m))}

    def run(observers):
        copy: Any = nnx.with_adapters(model, observers)
        for _, module in nnx_layers.modules(copy):
            if isinstance(module, nnx_layers.Adaptation):
                module.kind = Observer
        return copy(*inputs, **kwargs)

    observed = {path: a for path, a in nnx.adapters(model).items() if kinds[path] in _OBSERVED}
    return _moments(run, observed)


def _moments(run: Callable[[Any], Any], adapters: Mapping[str, Adapter]) -> dict[str, jax.Array]:
    """The gradients of the observers' q, which are q xᵀx, for q = I."""

    def observer(adapter):
        *stack, _, ins = adapter.q.shape
        p = jnp.zeros((*stack, 1, adapter.p.shape[-1]))  # of it only the width is looked at
        q = jnp.broadcast_to(jnp.eye(ins, dtype=wide(adapter.q.dtype)), (*stack, ins, ins))
        return Observer(p, jnp.zeros((*stack, ins)), q)

    def total(observers) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves(run(observers)) if hasattr(leaf, "dtype")]
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.sum(leaf.astype("float32")) for leaf in floats), start=jnp.zeros(()))

    grads = jax.grad(total)({path: observer(adapter) for path, adapter in adapters.items()})
    return {path: observer.q for path, observer in grads.items()}


def ranks_by_variance(
    moments: Mapping[str, jax.Array], config: AdaLoraConfig, *, most: int | None = None
) -> AdaLoraConfig:
    """The config with initial ranks by how much of its input's variance each triplet explains.

    Component i of a layer explains ``ν_i / Σ_j ν_j`` of it, with the eigenvalues ν of ``Σ xᵀx``. As
    in EVA the components of all layers compete for ``init_r`` triplets a matrix on average, and the
    ranks stand in ``rank_pattern``. Each layer keeps at least one. The matrices of a stack have one
    rank, by the mean over them, and a triplet of it costs one in each.

    Args:
      moments: of the layers, ``{path: [*stack, in, in]}``.
      config: gives each layer's ``init_r`` and, in ``rank_limits``, its ``max_r``. Its scale stays.
      most: the highest rank of a layer; twice its ``init_r`` without it.

    Raises:
      ValueError: ``most`` is below 1.

    >>> moments = {"flat": jnp.eye(8), "thin": jnp.diag(jnp.array([8.0, 1, 0, 0, 0, 0, 0, 0]))}
    >>> config = AdaLoraConfig(total_step=10, init_r=4, target_r=2)
    >>> ranks_by_variance(moments, config).rank_pattern
    (('flat', 7), ('thin', 1))
    """
    if most is not None and most < 1:
        raise ValueError(f"most={most} must be at least 1, or None.")
    candidates, ranks, left = [], {}, 0
    for path, moment in moments.items():
        spec = config.spec_of(path)
        share = jnp.mean(_explained(moment), axis=range(moment.ndim - 2))
        number = math.prod(moment.shape[:-2])
        limit = min(most or 2 * spec.init_r, moment.shape[-1])
        limit = min(limit, spec.max_r) if config.rank_limits else limit
        for i, value in enumerate(np.asarray(share)[1:limit]):
            candidates.append((-value, path, i, number))
        ranks[path], left = 1, left + number * (spec.init_r - 1)
    for _, path, _, number in sorted(candidates):
        if number <= left:
            ranks[path], left = ranks[path] + 1, left - number
    return config.replace(rank_pattern=ranks)


def along_inputs(adapters: PyTree, moments: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The adapters with ``q_i`` the direction in which the inputs vary i-th most, and λ = 0.

    Those are the top right singular vectors of the inputs, stacked as rows: the eigenvectors of
    ``Σ xᵀx`` (EVA). p stays. Adapters without moments stay as they are.

    Args:
      adapters: ``{path: Adapter}``, fresh, of the ranks that :func:`ranks_by_variance` gave.
      moments: of their layers.

    >>> adapter = Adapter(jnp.ones((1, 4)), jnp.ones(1), jnp.ones((1, 3)))
    >>> moments = {"query": jnp.diag(jnp.array([1.0, 9.0, 4.0]))}
    >>> abs(along_inputs({"query": adapter}, moments)["query"].q)
    Array([[0., 1., 0.]], dtype=float32)
    """
    new = dict(adapters)
    for path, moment in moments.items():
        adapter = new[path]
        vectors = jnp.linalg.eigh(moment)[1][..., ::-1]  # by rising eigenvalues, as columns
        rank = min(adapter.q.shape[-2:])
        q = _rows(adapter.q, jnp.matrix_transpose(vectors), rank)
        new[path] = Adapter(adapter.p, jnp.zeros_like(adapter.lam), q)
    return new


def _explained(moment: jax.Array) -> jax.Array:
    """The share of each eigenvalue in their sum, highest first."""
    values = jnp.maximum(jnp.linalg.eigvalsh(moment)[..., ::-1], 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    return values / jnp.where(total > 0, total, 1)
