"""The functions that a config takes in place of a name: what each is called with, and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from adalora_jax._src.core.config import AdaLoraConfig
    from adalora_jax._src.core.rank_spec import RankSpec
    from adalora_jax._src.core.scores import ScoreInputs


class ScoreFunction(Protocol):
    """Ranks the triplets of one adapter: ``AdaLoraConfig(score=...)``.

    >>> from adalora_jax import AdaLoraConfig
    >>> def smoothed(evidence):
    ...     return evidence.sensitivity.lam
    >>> AdaLoraConfig(total_step=10, score=smoothed).score is smoothed
    True
    """

    def __call__(self, evidence: ScoreInputs, /) -> ArrayLike:
        """Return a score per triplet.

        Args:
          evidence: weight, gradient and averages of one adapter; traced.

        Returns:
          ``[..., r]``, in the shape of ``lam``; the highest scores survive.
        """
        ...


class BudgetSchedule(Protocol):
    """Sets the budget between warm-up and final mask: ``AdaLoraConfig(budget_schedule=...)``.

    >>> from adalora_jax import AdaLoraConfig, budget
    >>> def half(config, step, n_adapters):
    ...     return config.init_r * n_adapters / 2
    >>> int(budget(AdaLoraConfig(total_step=10, init_r=8, budget_schedule=half), 5, n_adapters=3))
    12
    """

    def __call__(self, config: AdaLoraConfig, step: jax.Array, n_adapters: int, /) -> ArrayLike:
        """Return the budget at ``step``.

        Args:
          config: the config of the run.
          step: int32, the optimizer step counted from 0; traced.
          n_adapters: number of matrices; with another ``budget_unit`` than triplets, the cost of
            one triplet of each.

        Returns:
          A number in the shape of ``step``; rounded down and clipped to the initial budget.
        """
        ...


class BudgetCost(Protocol):
    """Prices one triplet of an adapter: ``AdaLoraConfig(budget_unit=...)``.

    >>> from adalora_jax import AdaLoraConfig
    >>> def inputs(path, in_features, out_features):
    ...     return in_features
    >>> AdaLoraConfig(total_step=10, budget_unit=inputs).budget_unit("query", 6, 4)
    6
    """

    def __call__(self, path: str, in_features: int, out_features: int, /) -> int:
        """Return the cost of one triplet.

        Args:
          path: path of the layer, ``encoder/layers_0/query``.
          in_features, out_features: sizes of its weight as a matrix.

        Returns:
          An integer of at least 1.
        """
        ...


class InitFunction(Protocol):
    """Makes the initial factors of one matrix: ``AdaLoraConfig(init=...)``.

    >>> import jax, jax.numpy as jnp
    >>> from adalora_jax import AdaLoraConfig, init_adapter
    >>> def ones(key, in_features, out_features, rank, dtype):
    ...     p, q = jnp.ones((rank, out_features)), jnp.ones((rank, in_features))
    ...     return p, jnp.zeros(rank), q
    >>> config = AdaLoraConfig(total_step=10, init=ones)
    >>> float(init_adapter(jax.random.key(0), 6, 4, config).p.min())
    1.0
    """

    def __call__(
        self, key: jax.Array, in_features: int, out_features: int, rank: int, dtype: np.dtype, /
    ) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
        """Return ``(p, lam, q)``, of shapes ``[rank, out]``, ``[rank]`` and ``[rank, in]``.

        Args:
          key: a PRNG key; traced.
          in_features, out_features: sizes of the weight as a matrix.
          rank: number of triplets.
          dtype: ``param_dtype``, to which the results are cast.
        """
        ...


class ProxFunction(Protocol):
    """Maps λ after each update of the optimizer: ``AdaLoraConfig(prox=...)``.

    >>> import jax.numpy as jnp
    >>> from adalora_jax import AdaLoraConfig
    >>> def nonnegative(lam, weight):
    ...     return jnp.maximum(lam - weight, 0)
    >>> AdaLoraConfig(total_step=10, prox=nonnegative, prox_weight=0.1).prox is nonnegative
    True
    """

    def __call__(self, lam: jax.Array, weight: float, /) -> ArrayLike:
        """Return the new λ of one adapter.

        Args:
          lam: ``[..., r]``, as the optimizer leaves it; traced.
          weight: ``prox_weight``.

        Returns:
          An array in the shape of ``lam``.
        """
        ...


class TargetFunction(Protocol):
    """Picks layers: ``AdaLoraConfig(target_modules=...)`` or ``exclude_modules``.

    >>> from adalora_jax import AdaLoraConfig
    >>> def queries(path, module):
    ...     return path.endswith("query")
    >>> AdaLoraConfig(total_step=10, target_modules=queries).target_modules("encoder/query", None)
    True
    """

    def __call__(self, path: str, module: Any, /) -> bool | RankSpec:
        """Return whether the layer is picked.

        Args:
          path: path of the module, ``encoder/layers_0/query``.
          module: the linen or NNX module.

        Returns:
          True or False; as ``target_modules`` also a ``RankSpec``, which picks the layer and gives
          its rank once ``linen.resolve`` or ``nnx.resolve`` has written it into the config.
        """
        ...
