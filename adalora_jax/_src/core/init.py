"""Initial values of an adapter."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.low_rank import accumulation_dtype

INIT_STD = 0.02  # initial standard deviation of p and q, as in PEFT and loralib


def init_adapter(
    key: Array,
    in_features: int,
    out_features: int,
    config: AdaLoraConfig,
    *,
    rank: int | None = None,
    stack: tuple[int, ...] = (),
) -> Adapter:
    """Return a new adapter; with each built-in ``config.init`` its increment is zero.

    The adapter is for a dense ``kernel [*stack, in, out]``; for other layers use ``adapt``. By
    ``config.init``:

    * ``"gaussian"``: λ = 0, p and q normal with standard deviation 0.02 (PEFT, loralib);
    * ``"lambda_one"``: λ = 1, p = 0, q as for ``"gaussian"``;
    * ``"orthonormal"``: λ = 0, p and q with orthonormal rows, ``p pᵀ = q qᵀ = I``, uniformly
      distributed; if the rank exceeds the row length, the columns are orthonormal instead. At
      orthonormal rows the penalty is smooth with ``orthogonality="squared"`` and has a kink with
      ``"frobenius"``;
    * a function: called once per matrix of a stack, as
      ``init(key, in_features, out_features, rank, dtype)``; returns ``(p, lam, q)``. If their
      product is not zero, the adapted model does not start as the base model.

    With ``init_lora_weights=False`` (PEFT's switch for tests) and a built-in ``init``, all three
    factors are drawn from the standard normal distribution, so the increment is not zero.

    Args:
      key: PRNG key.
      in_features, out_features: int ≥ 1: sizes of the weight.
      config: the source of ``init``, ``init_lora_weights``, ``param_dtype``, ``scaling`` and the
        rank ``init_r``.
      rank: int ≥ 0: a rank in place of ``init_r``; the scale remains ``config.scaling``.
      stack: leading axes, for stacked weights.

    Returns:
      An :class:`Adapter` with ``p [*stack, r, out]``, ``lam [*stack, r]`` and
      ``q [*stack, r, in]``, of dtype ``param_dtype``.

    Raises:
      TypeError: ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: ``in_features`` or ``out_features`` is below 1, ``rank`` is negative, or a
        function returned other shapes.

    >>> import jax
    >>> adapter = init_adapter(jax.random.key(0), 6, 4, AdaLoraConfig(total_step=10, init_r=8))
    >>> [leaf.shape for leaf in adapter]
    [(8, 4), (8,), (8, 6)]
    """
    check_config(config)
    rank = config.init_r if rank is None else rank
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ValueError(f"`{name}={size}`: must be at least 1; pass the size of the weight.")
    if rank < 0:
        raise ValueError(f"`rank={rank}`: must be at least 0; pass the number of triplets.")
    dtype = jnp.dtype(config.param_dtype)
    if callable(config.init):
        return _custom_init(config.init, key, in_features, out_features, rank, stack, config)
    shapes = ((*stack, rank, out_features), (*stack, rank), (*stack, rank, in_features))
    p, lam, q = (
        jax.random.normal(k, shape, dtype) for k, shape in zip(jax.random.split(key, 3), shapes)
    )
    if not config.init_lora_weights:
        factors = p, lam, q
    elif config.init == "lambda_one":
        factors = jnp.zeros_like(p), jnp.ones_like(lam), INIT_STD * q
    elif config.init == "orthonormal":
        factors = _orthonormal(p), jnp.zeros_like(lam), _orthonormal(q)
    else:
        factors = INIT_STD * p, jnp.zeros_like(lam), INIT_STD * q
    return Adapter(*factors, scale=config.scaling)


def _custom_init(
    init: Callable[..., tuple[ArrayLike, ArrayLike, ArrayLike]],
    key: Array,
    in_features: int,
    out_features: int,
    rank: int,
    stack: tuple[int, ...],
    config: AdaLoraConfig,
) -> Adapter:
    """Return an adapter from a custom ``config.init``, called once per matrix of a stack."""
    dtype = jnp.dtype(config.param_dtype)

    def one(key: Array) -> Adapter:
        leaves = [*init(key, in_features, out_features, rank, dtype)]
        expected = [(rank, out_features), (rank,), (rank, in_features)]
        if (shapes := [jnp.shape(leaf) for leaf in leaves]) != expected:
            raise ValueError(
                f"`init={init!r}`: returned the shapes {shapes} for p, lam and q; return arrays of "
                f"the shapes {expected}."
            )
        return Adapter(*(jnp.asarray(leaf, dtype) for leaf in leaves), scale=config.scaling)

    for _ in stack:
        one = jax.vmap(one)
    return one(jax.random.split(key, stack) if stack else key)


def _orthonormal(normal: Inexact[Array, "... r d"]) -> Inexact[Array, "... r d"]:
    """Return each matrix with orthonormal rows, or columns where it has no more columns than rows.

    Args:
      normal: ``[..., r, d]``, drawn from the standard normal distribution.
    """
    wide_matrix = normal.shape[-2] < normal.shape[-1]
    tall = jnp.swapaxes(normal, -1, -2) if wide_matrix else normal
    q, r = jnp.linalg.qr(tall.astype(accumulation_dtype(normal.dtype)))
    # Signs that make the diagonal of r positive give the uniform distribution (Mezzadri 2007,
    # https://arxiv.org/abs/math-ph/0609050).
    q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return (jnp.swapaxes(q, -1, -2) if wide_matrix else q).astype(normal.dtype)
