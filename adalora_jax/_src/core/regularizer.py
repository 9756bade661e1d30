"""The orthogonality regulariser of P and Q."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from adalora_jax._src.core import pytree
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.low_rank import accumulation_dtype, explicit_sharding, spec_of_type
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import ByRole, stored


def orthogonality(adapters: PyTree, config: AdaLoraConfig) -> Float[Array, ""]:
    """Return the weighted orthogonality penalty of all P and Q, a term of the training loss.

    By ``config.orthogonality`` it is one of::

        orth_reg_weight · mean over all P and Q of ‖M Mᵀ − I‖_F        "frobenius", as in PEFT
        orth_reg_weight · sum over all P and Q of ‖M Mᵀ − I‖²_F        "squared"

    where ``"squared"`` is `AdaLoRA, Eq. (4) <https://arxiv.org/abs/2303.10512>`_, and M is the
    stored ``p [r, out]``, the paper's P transposed, or ``q [r, in]``. Pruned triplets count. Every
    slice of a stack is a separate matrix. Omit the penalty in evaluation.

    Args:
      adapters: any tree with adapters in it: the dict, a larger tree, an NNX State, or what
        :func:`adalora_jax.stack` returned.
      config: the config of the run; ``orth_reg_weight`` and ``orthogonality`` are read.

    Returns:
      A scalar in at least float32. Its gradient is finite everywhere, for ``"squared"`` as long as
      the dtype can represent it: that gradient grows with the third power of M.

    Raises:
      TypeError: ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: ``adapters`` contains no adapter; or ``config.orth_reg_in_update`` is True, so
        that the penalty would count twice.

    >>> from adalora_jax import Adapter
    >>> adapter = Adapter(2 * jnp.eye(3), jnp.zeros(3), jnp.eye(3))
    >>> orthogonality({"query": adapter}, AdaLoraConfig(total_step=10, orth_reg_weight=1.0))
    Array(2.598076, dtype=float32)
    """
    check_config(config, "orthogonality(adapters, config)")
    if config.orth_reg_in_update:
        raise ValueError(
            "`orth_reg_in_update=True`: the penalty's gradient is added inside adalora's update, "
            "so in the loss it would count twice; leave one of the two out."
        )
    return penalty(adapters, config)


def penalty(adapters: PyTree, config: AdaLoraConfig) -> Float[Array, ""]:
    """Return the value of :func:`orthogonality`, also with ``config.orth_reg_in_update``."""
    found = pytree.require_adapters(
        adapters,
        "adapters",
        "pass the adapters, or an NNX state filtered by nnx.LoRAParam",
        pytree.trained_adapters,
    )
    matrices = {
        (path, name): getattr(adapter, name)
        for path, adapter in stored(found).items()
        for name in ("p", "q")
    }

    # On a CPU, kernel launches are cheap and joined matrices take longer to compile.
    def one_by_one() -> Float[Array, " matrices"]:
        return jnp.concatenate([_deviations(m) for m in matrices.values()])

    def joined() -> Float[Array, " matrices"]:
        return _joined(matrices if isinstance(found, ByRole) else _stacked(matrices))

    deviations = jax.lax.platform_dependent(cpu=one_by_one, default=joined)
    if config.orthogonality == "squared":
        return config.orth_reg_weight * jnp.sum(deviations**2)
    return config.orth_reg_weight * jnp.mean(deviations)


def _stacked(matrices: Mapping[tuple[str, str], Inexact[Array, "..."]]) -> dict[Any, Array]:
    """Return the matrices of each role as one array with a leading axis.

    Matrices of one role have paths that differ only in numbers, and the same type: shape, dtype and
    explicit sharding. They have the same sharding, so stacking them along a new unsharded leading
    axis needs no communication.
    """
    roles: dict[Any, list[jax.Array]] = {}
    for (path, name), m in matrices.items():
        role = (re.sub(r"\d+", "*", path), name, jax.typeof(m))
        roles.setdefault(role, []).append(m)
    return {role: jnp.stack(members) for role, members in roles.items()}


def _joined(roles: Mapping[Any, Inexact[Array, "n ..."]]) -> Float[Array, " matrices"]:
    """Return the deviations of all matrices, computed per role: a few kernels instead of many."""
    grams: dict[Any, list[jax.Array]] = {}
    for role, members in roles.items():
        gram = _minus_identity(members)
        # A stack axis may be sharded. Without one, all devices have the whole products.
        kind = (gram.dtype, gram.shape[1:], None if gram.ndim == 3 else role)
        grams.setdefault(kind, []).append(gram)
    return jnp.concatenate([_flat(_norm(jnp.concatenate(some))) for some in grams.values()])


@jax.jit  # one trace for all matrices of one shape and dtype
def _deviations(m: Inexact[Array, "*stack r d"]) -> Float[Array, " matrices"]:
    return _flat(deviation(m))


def _flat(deviations: Float[Array, "*stack"]) -> Float[Array, " matrices"]:
    """Return the deviations in one row, which a mesh with explicit axes replicates."""
    replicated = explicit_sharding(deviations, (None,))
    return deviations.reshape(-1, out_sharding=replicated)


def deviation(m: Inexact[Array, "*stack r d"]) -> Float[Array, "*stack"]:
    """Return ``‖M Mᵀ − I‖_F`` for ``m [..., r, d]``, one value per matrix, in at least float32.

    Its gradient ``2 (D / ‖D‖) M``, with ``D = M Mᵀ − I``, is finite everywhere. It is 0 if the rows
    of M are exactly orthonormal, and also if M Mᵀ overflows the dtype; the value is then infinite.

    >>> import jax.numpy as jnp
    >>> deviation(2 * jnp.eye(3))
    Array(5.196152, dtype=float32)
    """
    return _norm(_minus_identity(m))


def _minus_identity(m: jax.Array) -> jax.Array:
    """Return ``M Mᵀ − I``, in at least float32."""
    gram = _gram(m.astype(accumulation_dtype(m.dtype)))
    return gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)


@jax.custom_jvp
def _gram(m: Inexact[Array, "*stack r d"]) -> Inexact[Array, "*stack r r"]:
    """Compute ``M Mᵀ``; its derivative is one product, not two, because the result is symmetric."""
    return _rows_by_rows(m, m)


@_gram.defjvp
def _gram_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (m,), (tangent,) = primals, tangents
    half = _rows_by_rows(tangent, m)
    return _gram(m), half + half.swapaxes(-1, -2)


def _rows_by_rows(
    a: Inexact[Array, "*stack r d"], b: Inexact[Array, "*stack s d"]
) -> Inexact[Array, "*stack r s"]:
    spec = (*spec_of_type(b)[:-2], None, None)
    return jnp.einsum(
        "...ri,...si->...rs",
        *(a, b),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=explicit_sharding(b, spec),
    )


@jax.custom_jvp
def _norm(d: Float[Array, "*stack r r"]) -> Float[Array, "*stack"]:
    """Compute ``‖D‖_F`` of each matrix; infinite if D is not finite.

    Squares are summed twice, of D and of a scaled-down D, whose sum is used if the first overflows.
    Both sums are one kernel; a search for the largest entry would need a second one.
    """
    small = 2.0 ** -(jnp.finfo(d.dtype).maxexp // 2)
    scales = jnp.array([1, small], d.dtype).reshape(2, *[1] * d.ndim)
    plain, scaled = jnp.sqrt(jnp.sum((scales * d[None]) ** 2, axis=(-2, -1)))
    norm = jnp.where(plain < jnp.inf, plain, scaled / small)
    return jnp.where(norm < jnp.inf, norm, jnp.inf)


@_norm.defjvp
def _norm_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (d,), (tangent,) = primals, tangents
    norm = _norm(d)
    return norm, jnp.sum(_unit(d, norm) * tangent, axis=(-2, -1))


@jax.custom_jvp
def _unit(
    d: Float[Array, "*stack r r"], norm: Float[Array, "*stack"]
) -> Float[Array, "*stack r r"]:
    """Compute ``D / ‖D‖_F``, the gradient of the norm; 0 if the norm is 0 or infinite."""
    some = ((norm > 0) & (norm < jnp.inf))[..., None, None]
    return jnp.where(some, d, 0) / jnp.where(some, norm[..., None, None], 1)


@_unit.defjvp
def _unit_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Compute ``E − U ⟨U, E⟩`` with ``E = dD / ‖D‖_F``, so that the scale of D cancels."""
    (d, norm), (tangent, _) = primals, tangents
    unit, change = _unit(d, norm), _unit(tangent, norm)
    return unit, change - unit * jnp.sum(unit * change, axis=(-2, -1), keepdims=True)
