"""The regulariser that keeps P and Q near orthonormal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adalora_jax._src.core import pytree
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.low_rank import explicit_sharding, wide
from adalora_jax._src.core.pytree import PyTree


def orthogonality(adapters: PyTree, config: AdaLoraConfig) -> jax.Array:
    """The weighted penalty, to be added to the training loss and left out of evaluation::

        orth_reg_weight · mean over all P and Q of ‖M Mᵀ − I‖_F        "frobenius", PEFT's
        orth_reg_weight · sum over all P and Q of ‖M Mᵀ − I‖²_F        "squared", Eq. 4

    Pruned triplets stay in it. Every slice of a stack is a matrix of its own.

    Args:
      adapters: any tree with adapters in it: the dict, a bigger tree, an NNX State.
      config: the weight and, by ``config.orthogonality``, the form.

    Returns:
      A scalar in at least float32. Its gradient is finite everywhere; that of ``"squared"``, which
      grows with the third power of M, as long as it can be represented.

    Raises:
      ValueError: there is no adapter in ``adapters``.

    >>> from adalora_jax import Adapter
    >>> adapter = Adapter(2 * jnp.eye(3), jnp.zeros(3), jnp.eye(3))
    >>> orthogonality({"query": adapter}, AdaLoraConfig(total_step=10, orth_reg_weight=1.0))
    Array(2.598076, dtype=float32)
    """
    if not isinstance(config, AdaLoraConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: it must be an AdaLoraConfig; arguments are "
            "orthogonality(adapters, config)."
        )
    if config.orth_reg_in_update:
        raise ValueError(
            "orth_reg_in_update=True: the penalty's gradient is added inside adalora's update, so "
            "in the loss it would count twice: leave one of the two out."
        )
    return penalty(adapters, config)


def penalty(adapters: PyTree, config: AdaLoraConfig) -> jax.Array:
    """Return :func:`orthogonality`, wherever it is added."""
    found = pytree.adapters(adapters)
    matrices = {
        (path, name): getattr(adapter, name)
        for path, adapter in found.items()
        for name in ("p", "q")
    }
    if not matrices:
        raise ValueError(
            f"no adapter was found in the {type(adapters).__name__} given as adapters: pass the "
            "adapters, or an NNX state filtered by nnx.LoRAParam."
        )
    # Starting a kernel is quick on a CPU, where joined matrices take longer to compile.
    one_by_one = lambda: jnp.concatenate([_deviations(m) for m in matrices.values()])
    deviations = jax.lax.platform_dependent(cpu=one_by_one, default=lambda: _joined(matrices))
    if config.orthogonality == "squared":
        return config.orth_reg_weight * jnp.sum(deviations**2)
    return config.orth_reg_weight * jnp.mean(deviations)


def _joined(matrices: Mapping[tuple[str, str], jax.Array]) -> jax.Array:
    """Return the deviations from one array per role: a few kernels instead of many.

    Matrices of one role have the same path but for numbers, and the same type: shape, dtype and
    explicit sharding. They are sharded alike, so a new axis in front, which is not sharded, moves
    nothing between devices.
    """
    roles: dict[Any, list[jax.Array]] = {}
    for (path, name), m in matrices.items():
        role = (re.sub(r"\d+", "*", path), name, jax.typeof(m))
        roles.setdefault(role, []).append(m)
    return jnp.concatenate([deviation(jnp.stack(members)).ravel() for members in roles.values()])


@jax.jit  # one trace for all matrices that are alike
def _deviations(m):
    return deviation(m).ravel()


def deviation(m: jax.Array) -> jax.Array:
    """``‖M Mᵀ − I‖_F`` for ``m [..., r, d]``, one value a matrix, in at least float32.

    Its gradient ``2 (D / ‖D‖) M``, ``D = M Mᵀ − I``, is finite everywhere: 0 where M is exactly
    orthonormal, and where M Mᵀ is beyond the dtype, with infinity as the value.

    >>> import jax.numpy as jnp
    >>> deviation(2 * jnp.eye(3))
    Array(5.196152, dtype=float32)
    """
    gram = _gram(m.astype(wide(m.dtype)))
    return _norm(gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape))


@jax.custom_jvp
def _gram(m):
    """``M Mᵀ``, whose derivative is one product instead of two, because the result is symmetric."""
    return _rows_by_rows(m, m)


@_gram.defjvp
def _gram_jvp(primals, tangents):
    (m,), (tangent,) = primals, tangents
    half = _rows_by_rows(tangent, m)
    return _gram(m), half + half.swapaxes(-1, -2)


def _rows_by_rows(a, b):
    spec = (*jax.typeof(b).sharding.spec[:-2], None, None)
    return jnp.einsum(
        "...ri,...si->...rs",
        *(a, b),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=explicit_sharding(b, spec),
    )


@jax.custom_jvp
def _norm(d):
    """``‖D‖_F`` of each matrix, infinite where D is not finite.

    Squares are added up twice, as they are and of a D made small, for where they are beyond the
    dtype. That is one kernel; to look for the largest entry first would be another.
    """
    small = 2.0 ** -(jnp.finfo(d.dtype).maxexp // 2)
    scales = jnp.array([1, small], d.dtype).reshape(2, *[1] * d.ndim)
    plain, scaled = jnp.sqrt(jnp.sum((scales * d[None]) ** 2, axis=(-2, -1)))
    norm = jnp.where(plain < jnp.inf, plain, scaled / small)
    return jnp.where(norm < jnp.inf, norm, jnp.inf)


@_norm.defjvp
def _norm_jvp(primals, tangents):
    (d,), (tangent,) = primals, tangents
    norm = _norm(d)
    return norm, jnp.sum(_unit(d, norm) * tangent, axis=(-2, -1))


@jax.custom_jvp
def _unit(d, norm):
    """``D / ‖D‖_F``, the slope of the norm; 0 where that is 0 or infinite."""
    some = ((norm > 0) & (norm < jnp.inf))[..., None, None]
    return jnp.where(some, d, 0) / jnp.where(some, norm[..., None, None], 1)


@_unit.defjvp
def _unit_jvp(primals, tangents):
    """``E − U ⟨U, E⟩`` with ``E = dD / ‖D‖_F``: of numbers around 1 only, whatever D is."""
    (d, norm), (tangent, _) = primals, tangents
    unit, change = _unit(d, norm), _unit(tangent, norm)
    return unit, change - unit * jnp.sum(unit * change, axis=(-2, -1), keepdims=True)
