"""The regulariser that keeps P and Q near orthonormal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adalora_jax import tree
from adalora_jax.config import AdaLoraConfig
from adalora_jax.lowrank import explicit_sharding, wide
from adalora_jax.tree import PyTree


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

    >>> from adalora_jax.adapter import Adapter
    >>> adapter = Adapter(2 * jnp.eye(3), jnp.zeros(3), jnp.eye(3))
    >>> orthogonality({"query": adapter}, AdaLoraConfig(total_step=10, orth_reg_weight=1.0))
    Array(2.598076, dtype=float32)
    """
    matrices = [m for adapter in tree.adapters(adapters).values() for m in (adapter.p, adapter.q)]
    if not matrices:
        raise ValueError(
            f"no adapter was found in the {type(adapters).__name__} given as adapters: pass the "
            "adapters, or an NNX state filtered by nnx.LoRAParam."
        )
    deviations = jnp.concatenate([deviation(m).ravel() for m in matrices])
    if config.orthogonality == "squared":
        return config.orth_reg_weight * jnp.sum(deviations**2)
    return config.orth_reg_weight * jnp.mean(deviations)


def deviation(m: jax.Array) -> jax.Array:
    """``‖M Mᵀ − I‖_F`` for ``m [..., r, d]``, one value a matrix, in at least float32.

    Its gradient ``2 (D / ‖D‖) M``, ``D = M Mᵀ − I``, is finite everywhere: 0 where M is exactly
    orthonormal, and computed from M divided by its largest entry where M Mᵀ would overflow.

    >>> import jax.numpy as jnp
    >>> deviation(2 * jnp.eye(3))
    Array(5.196152, dtype=float32)
    """
    return _deviation(m.astype(wide(m.dtype)))


@jax.custom_jvp
def _deviation(m):
    size, norm, _ = _gram_deviation(m)
    return size * size * norm


@_deviation.defjvp
def _deviation_jvp(primals, tangents):
    (m,), (tangent,) = primals, tangents
    size, norm, d = _gram_deviation(m)
    unit = d / jnp.where(norm > 0, norm, 1)[..., None, None]
    slope = 2 * (unit @ m)
    return size * size * norm, jnp.sum(slope * tangent, axis=(-2, -1))


def _gram_deviation(m):
    """``a``, ``‖D‖ / a²`` and ``D / a²`` for ``D = M Mᵀ − I`` and ``a = max(1, max |M|)``."""
    largest = jnp.max(jnp.abs(m), axis=(-2, -1), initial=1)
    size = jax.lax.stop_gradient(largest)[..., None, None]
    small = m / size
    gram = jnp.einsum(
        "...ri,...si->...rs",
        *(small, small),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=explicit_sharding(m, (*jax.typeof(m).sharding.spec[:-2], None, None)),
    )
    d = gram - jnp.broadcast_to(jnp.eye(m.shape[-2], dtype=m.dtype), gram.shape) / (size * size)
    square = jnp.sum(d * d, axis=(-2, -1))
    # The square root has an infinite slope at 0, also where it is not used.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return size[..., 0, 0], norm, d
