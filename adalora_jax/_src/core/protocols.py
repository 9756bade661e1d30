"""Protocols of the functions that a config accepts in place of the name of a built-in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact, Int32, Num, Shaped

if TYPE_CHECKING:
    from adalora_jax._src.core.config import AdaLoraConfig
    from adalora_jax._src.core.rank_spec import RankSpec
    from adalora_jax._src.core.scores import ScoreInputs


class ScoreFunction(Protocol):
    """Custom score of the triplets of one adapter, for ``AdaLoraConfig(score=...)``.

    >>> from adalora_jax import AdaLoraConfig
    >>> def smoothed(inputs):
    ...     return inputs.sensitivity.lam
    >>> AdaLoraConfig(total_step=10, score=smoothed).score is smoothed
    True
    """

    def __call__(self, inputs: ScoreInputs, /) -> Shaped[ArrayLike, "*stack r"]:
        """Return one score per triplet.

        Args:
          inputs: weight, gradient and moving averages of one adapter; traced.

        Returns:
          Scores in the shape of ``lam``, ``[..., r]``. The triplets with the highest scores stay
          active.
        """
        ...


class BudgetSchedule(Protocol):
    """Custom budget between warm-up and final mask, for ``AdaLoraConfig(budget_schedule=...)``.

    >>> from adalora_jax import AdaLoraConfig, budget
    >>> def half(config, step, n_adapters):
    ...     return config.init_r * n_adapters / 2
    >>> int(budget(AdaLoraConfig(total_step=10, init_r=8, budget_schedule=half), 5, n_adapters=3))
    12
    """

    def __call__(
        self, config: AdaLoraConfig, step: Int32[Array, "*steps"], n_adapters: int, /
    ) -> Num[ArrayLike, "*steps"]:
        """Return the budget at ``step``.

        Args:
          config: the config of the run.
          step: int32, the optimizer step counted from 0; traced.
          n_adapters: number of matrices; if ``budget_unit`` is not ``"triplets"``, the cost of one
            triplet of each matrix, summed over the matrices.

        Returns:
          The budget, in the shape of ``step``. It is rounded down and clipped to between 0 and the
          initial budget; NaN counts as the initial budget.
        """
        ...


class BudgetCost(Protocol):
    """Custom cost per triplet of an adapter, for ``AdaLoraConfig(budget_unit=...)``.

    >>> from adalora_jax import AdaLoraConfig
    >>> def inputs(path, in_features, out_features):
    ...     return in_features
    >>> AdaLoraConfig(total_step=10, budget_unit=inputs).budget_unit("query", 6, 4)
    6
    """

    def __call__(self, path: str, in_features: int, out_features: int, /) -> int:
        """Return the cost of one triplet.

        Args:
          path: path of the layer, such as ``encoder/layers_0/query``.
          in_features, out_features: sizes of the layer's weight as a matrix.

        Returns:
          The cost, an integer of at least 1.
        """
        ...


class InitFunction(Protocol):
    """Custom initial factors of one matrix, for ``AdaLoraConfig(init=...)``.

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
        self, key: Array, in_features: int, out_features: int, rank: int, dtype: jnp.dtype, /
    ) -> tuple[Num[ArrayLike, "r out"], Num[ArrayLike, " r"], Num[ArrayLike, "r in"]]:
        """Return the initial factors of one matrix.

        Args:
          key: PRNG key; traced.
          in_features, out_features: sizes of the weight as a matrix.
          rank: number of triplets.
          dtype: ``param_dtype``, to which the results are cast.

        Returns:
          ``(p, lam, q)``, of shapes ``[rank, out]``, ``[rank]`` and ``[rank, in]``.
        """
        ...


class ProxFunction(Protocol):
    """Custom map of λ after each optimizer update, for ``AdaLoraConfig(prox=...)``.

    >>> import jax.numpy as jnp
    >>> from adalora_jax import AdaLoraConfig
    >>> def nonnegative(lam, weight):
    ...     return jnp.maximum(lam - weight, 0)
    >>> AdaLoraConfig(total_step=10, prox=nonnegative, prox_weight=0.1).prox is nonnegative
    True
    """

    def __call__(
        self, lam: Inexact[Array, "*stack r"], weight: float, /
    ) -> Inexact[ArrayLike, "*stack r"]:
        """Return the new λ of one adapter.

        Args:
          lam: λ after the inner optimizer's update, ``[..., r]``; traced.
          weight: ``prox_weight``.

        Returns:
          The new λ, in the shape of ``lam``.
        """
        ...


class TargetFunction(Protocol):
    """Custom selection of layers, for ``AdaLoraConfig(target_modules=...)`` or ``exclude_modules``.

    >>> from adalora_jax import AdaLoraConfig
    >>> def queries(path, module):
    ...     return path.endswith("query")
    >>> AdaLoraConfig(total_step=10, target_modules=queries).target_modules("encoder/query", None)
    True
    """

    def __call__(self, path: str, module: object, /) -> bool | RankSpec:
        """Return whether the layer is selected.

        Args:
          path: path of the module, such as ``encoder/layers_0/query``.
          module: the linen or NNX module, or the node of a function's parameters.

        Returns:
          True or False. A function for ``target_modules`` may also return a ``RankSpec``, which
          selects the layer and sets its rank; ``resolve`` of the front end must then write it into
          the config.
        """
        ...
