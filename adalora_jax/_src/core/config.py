"""Hyper-parameters of AdaLoRA and their validation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar
from typing import Any, Literal, cast, get_args

from jax.typing import DTypeLike

from adalora_jax._src.core import checks, peft_keys, rank_spec
from adalora_jax._src.core.checks import MissingFunction
from adalora_jax._src.core.protocols import (
    BudgetCost,
    BudgetSchedule,
    InitFunction,
    ProxFunction,
    ScoreFunction,
    TargetFunction,
)
from adalora_jax._src.core.rank_spec import LayerRank, RankSpec

Schedule = Literal["cubic", "linear", "grow"]
Unit = Literal["triplets", "parameters", "flops"]
Score = Literal[
    "sensitivity_uncertainty",
    "smoothed_sensitivity",
    "sensitivity",
    "magnitude",
]
ScoreReduction = Literal["triplet", "lam"]
Allocation = Literal["global", "per_adapter"]
Init = Literal["gaussian", "lambda_one", "orthonormal"]
Norm = Literal["frobenius", "squared"]
SensitivityTiming = Literal["updated", "current"]
Rank = int | Sequence[bool] | Sequence[Sequence[bool]]
Limit = RankSpec | Mapping[str, Any] | int

_CHOICES = {
    "budget_schedule": get_args(Schedule),
    "score": get_args(Score),
    "score_reduction": get_args(ScoreReduction),
    "allocation": get_args(Allocation),
    "init": get_args(Init),
    "orthogonality": get_args(Norm),
    "sensitivity_timing": get_args(SensitivityTiming),
    "prox": (None, "soft_threshold"),
    "budget_unit": get_args(Unit),
}
_OR_A_FUNCTION = ("budget_schedule", "budget_unit", "score", "init", "prox")
_FLAGS = (
    *("init_lora_weights", "fan_in_fan_out", "freeze_pruned", "allow_regrowth", "forward_mode"),
    *("orth_reg_in_update", "warn_small_start"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """Hyper-parameters of an AdaLoRA run: immutable, hashable, static under ``jax.jit``.

    The fields of ``peft.AdaLoraConfig`` have the same names and defaults here, so its keyword
    arguments can be pasted in. Steps are optimizer steps, counted from 0. Below, n is the number of
    adapted matrices; every slice of a stack is one.

    A run has three phases. Up to and including step ``tinit`` nothing is pruned. Then, until step
    ``total_step - tfinal``, the budget falls from ``init_r`` to ``target_r`` triplets per matrix,
    averaged over all matrices, with a new mask every ``deltaT`` steps. After that the mask is
    fixed.

    Where names are expected, any sequence or set is accepted and stored as a tuple; mappings are
    stored as pairs. :mod:`adalora_jax.protocols` has the signatures of the custom functions.

    Each entry below starts with the allowed values and the default. "PEFT" marks the fields of
    ``peft.AdaLoraConfig``; the defaults of the other fields give PEFT's behaviour. The equations
    are those of `AdaLoRA <https://arxiv.org/abs/2303.10512>`_.

    Attributes:
      total_step: int ≥ 1, required; PEFT. Number of optimizer steps in the run, the paper's T. The
        budget schedule spans them; ``tinit < total_step - tfinal`` must hold. Used by ``budget``
        and by the allocator.
      target_r: int ≥ 1, default 8; PEFT. Triplets per matrix at the end, averaged over all
        matrices: the final budget is b(T) = ``target_r`` · n. Used by ``budget``.
      init_r: int ≥ ``target_r``, default 12; PEFT. Triplets per matrix at the start: the initial
        budget is b(0) = ``init_r`` · n. ``rank_overrides`` and ``rank_pattern`` override it for
        single layers. Used by ``adapt``, ``init_adapter``, ``budget`` and ``scaling``.
      tinit: int ≥ 0, default 0; PEFT. t_i, the last step of the warm-up, in which nothing is
        pruned. Used by ``budget`` and by the allocator.
      tfinal: int ≥ 0, default 0; PEFT. t_f, the number of steps at the end, from the final mask on.
        Mask, Ī and Ū do not change after it. Used by ``budget`` and by the allocator.
      deltaT: int ≥ 1, default 1; PEFT. Δ_T, the number of steps from one mask to the next. Between
        two masks a pruned λ may grow back, see ``freeze_pruned``. Used by the allocator.
      beta1: float above 0 and below 1, default 0.85; PEFT. β1, the decay of the smoothed
        sensitivity Ī, Eq. (9). Used by the allocator.
      beta2: float above 0 and below 1, default 0.85; PEFT. β2, the decay of the uncertainty Ū,
        Eq. (10). Used by the allocator.
      orth_reg_weight: finite float ≥ 0, default 0.5; PEFT. γ, the weight of the orthogonality
        penalty, Eq. (4). Used by ``adalora_jax.orthogonality``, and by ``adalora_jax.adalora`` with
        ``orth_reg_in_update``.
      orth_reg_in_update: bool, default False. True: ``adalora_jax.adalora`` adds the gradient of
        the orthogonality penalty inside its update, for a trainer that owns the loss, and
        ``adalora_jax.orthogonality`` raises an error for this config, since the penalty would count
        twice. False: add ``orthogonality`` to the loss yourself.
      rank_pattern: ``{path: rank}``, its pairs, or None (default); PEFT. Ranks of an earlier run
        to start from, ahead of ``init_r`` and ``rank_overrides``. A rank is an int ≥ 0, or the
        booleans of ``adalora_jax.rank_pattern``, one per triplet (nested lists for a stack). None:
        the ranks follow from ``init_r`` and ``rank_overrides``. Used by ``adapt`` and by the reader
        and writer of PEFT files.
      rank_overrides: ``{pattern: RankSpec}``, its pairs, or None (default). Initial rank, limits
        and alpha of the layers that match; a value may also be a dict of the fields of
        :class:`RankSpec`, or an ``init_r`` alone. A pattern is a regex for the whole path or for
        its end at a separator, so the name of a layer is one. The first match counts. Used by
        ``adapt`` (``init_r``), the allocator (``min_r`` and ``max_r``, which
        ``allocation="per_adapter"`` excludes) and :meth:`scale_of` (``alpha``, ``init_r``).
      lora_alpha: finite number, default 8; PEFT. Increments are scaled by ``lora_alpha / init_r``
        for the whole run, or by 1 where ``lora_alpha`` is not above 0; see :attr:`scaling`. Has no
        effect if ``scale`` is set.
      scale: finite float ≥ 1.18e-38, or None (default). The factor s of the increments, for any
        rank; an ``alpha`` in ``rank_overrides`` has precedence. None: s is computed from
        ``lora_alpha``. Used by :attr:`scaling` and :meth:`scale_of`.
      lora_dropout: float ≥ 0 and below 1, default 0; PEFT. Probability of dropout on the input of
        an adapter during training. Used by the adapted linen or NNX model.
      target_modules: names, str, ``TargetFunction`` or None (default); PEFT. The layers to adapt;
        required by ``adapt``. A list of names, each of which matches the paths that end with it at
        a separator; a string, which is a regex for the whole path; ``"all-linear"``, every linear
        layer (dense, einsum, recurrent gates; no convolution, no embedding); or a function
        ``(path, module) -> bool | RankSpec``. Used by ``adapt``.
      exclude_modules: names, str, ``TargetFunction`` or None (default); PEFT. The layers that are
        not adapted, in the forms of ``target_modules``. None: no layer is excluded. Used by
        ``adapt``.
      layers_to_transform: int ≥ 0, a collection of them, or None (default); PEFT. Adapt only the
        layers with this index, or these indices, in the list of layers that contains them: 3 for
        ``h/3/mlp/up`` and for ``block_3/mlp/up``. None: all. Used by ``adapt``.
      layers_pattern: name or names, or None (default); PEFT. Regexes for the name of the list that
        ``layers_to_transform`` counts in. None: any list. Used by ``adapt``.
      modules_to_save: name or names, or None (default); PEFT. Base parameters or modules that are
        trained along with the adapters, in float32, such as a new classifier. Used by ``adapt``.
      init_lora_weights: bool, default True; PEFT. False: p, λ and q are drawn from the standard
        normal distribution, so the adapted model does not start as the base model; PEFT's switch
        for tests. Used by ``init_adapter``.
      fan_in_fan_out: bool, default False; PEFT. Has no effect on training, since Flax kernels are
        always ``[in, out]``; kept for PEFT files, where it marks GPT-2's ``Conv1D``. Used by the
        reader and writer of PEFT files and by ``merge_pretrained``.
      budget_schedule: ``"cubic"`` (default), ``"linear"``, ``"grow"`` or a ``BudgetSchedule``. How
        the budget b(t) changes between ``tinit`` and the final mask: ``"cubic"``, the paper's,
        prunes most at the beginning; ``"linear"`` prunes evenly; ``"grow"`` rises from one triplet
        per matrix, up to ``init_r`` in a single matrix (`IncreLoRA
        <https://arxiv.org/abs/2308.12043>`_). Used by ``budget``.
      budget_unit: ``"triplets"`` (default), ``"parameters"``, ``"flops"`` or a ``BudgetCost``. The
        unit of the budget; with ``"parameters"`` and ``"flops"`` a triplet of a wide layer costs
        more than one of a narrow layer. Used by the allocator.
      score: name or ``ScoreFunction``. The score that ranks the triplets, from the smoothed
        sensitivity Ī of ``|w g|``, Eqs. (8) and (9), and its uncertainty Ū, Eq. (10):
        ``"sensitivity_uncertainty"`` (default), ``Ī Ū``, Eq. (11); ``"smoothed_sensitivity"``, Ī;
        ``"sensitivity"``, ``|w g|`` of this step; ``"magnitude"``, ``|λ|``. Used by the allocator.
      score_reduction: ``"triplet"`` (default), the score of λ plus the means of the scores of p and
        q, Eq. (7); or ``"lam"``, the score of λ alone. Has no effect on ``"magnitude"`` and on a
        ``ScoreFunction``. Used by the allocator.
      allocation: ``"global"`` (default), all triplets compete for one budget, Eq. (6); or
        ``"per_adapter"``, ranks of all matrices are equal, or differ by one. Used by the allocator.
      init: ``"gaussian"`` (default), λ = 0, p and q normal with standard deviation 0.02;
        ``"lambda_one"``, λ = 1 and p = 0; ``"orthonormal"``, λ = 0, p and q with orthonormal rows;
        or an ``InitFunction``. Initial values. Used by ``init_adapter``.
      orthogonality: ``"frobenius"`` (default), PEFT's ``‖M Mᵀ − I‖``; or ``"squared"``, its square,
        as in Eq. (4). Norm of the penalty. Used by ``adalora_jax.orthogonality``, and by
        ``adalora_jax.adalora`` with ``orth_reg_in_update``.
      param_dtype: float32 (default), bfloat16, float16 or float64, as a name or a dtype; stored as
        its name. Dtype of p, λ and q. Used by ``init_adapter``.
      sensitivity_timing: ``"updated"`` (default), w in ``|w g|`` is taken after the update, as in
        PEFT; or ``"current"``, before it. Used by ``adalora_jax.adalora``.
      lambda_lr_scale: finite float ≥ 0, default 1. Factor on the inner optimizer's update of λ.
        Used by ``adalora_jax.adalora``.
      prox: None (default), ``"soft_threshold"`` or a ``ProxFunction``. Map applied to λ after each
        update: None, the identity; ``"soft_threshold"``, the proximal step of an L1 penalty (`SoRA
        <https://arxiv.org/abs/2311.11696>`_). Used by ``adalora_jax.adalora``.
      prox_weight: finite float ≥ 0, default 0. Strength of ``prox``. Used by
        ``adalora_jax.adalora``.
      forward_mode: bool, default False. True: ``jax.jvp`` and ``jax.hessian`` work; training steps
        are slower. Used by the adapted linen or NNX model.
      freeze_pruned: bool, default False. True: a pruned λ stays 0 until a later mask makes its
        triplet active again. Used by the allocator.
      allow_regrowth: bool, default True. False: a pruned λ stays 0 for the rest of the run; not
        allowed with ``budget_schedule="grow"``. Used by the allocator.
      warn_small_start: bool, default True. Whether the optimizer's ``init`` warns of increments
        that start far smaller than LoRA's: with ``init="gaussian"``, a scale times
        ``lambda_lr_scale`` below 0.25. Under ``jit`` it does not warn, because only values tell new
        adapters from trained ones. Has no effect on the run. Used by ``adalora_jax.adalora``.

    Args:
      task_type: None or one of PEFT's values. This and the arguments below are PEFT's; they are
        checked and not stored.
      bias: must be ``"none"`` or None: biases are not trained.
      inference_mode: True or False; has no effect.
      peft_type: must be ``"ADALORA"`` or None.
      r: must be None: AdaLoRA starts at ``init_r``.
      use_dora: must be False: AdaLoRA has no DoRA form.
      loftq_config: must be None or empty: quantize the base model instead.
      use_rslora: must be False: PEFT's AdaLoRA ignores it. The scale of rsLoRA is
        ``scale=lora_alpha / sqrt(init_r)``.
      layer_replication: must be None or empty: repeat the layers in the Flax model instead.
      trainable_token_indices: must be None or empty: name the embedding in ``modules_to_save``
        instead.

    Raises:
      ValueError: a value cannot work; the message has the argument, its value and a remedy.
      TypeError: ``total_step`` is missing, or a name is not an argument. For PEFT's other arguments
        use :meth:`from_peft`.

    >>> config = AdaLoraConfig(total_step=1000, tinit=100, tfinal=300, target_modules=["query"])
    >>> config.scaling
    0.6666666666666666
    >>> AdaLoraConfig(total_step=1000, init_r=4, target_r=8)
    Traceback (most recent call last):
        ...
    ValueError: `init_r=4`: is below target_r=8, but training starts at init_r triplets per \
adapter and prunes to target_r; pass an init_r of at least 8.
    """

    total_step: int
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    orth_reg_in_update: bool = False
    rank_pattern: Mapping[str, Rank] | Sequence[tuple[str, Rank]] | None = None
    rank_overrides: Mapping[str, Limit] | Sequence[tuple[str, Limit]] | None = None
    lora_alpha: float = 8
    scale: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] | TargetFunction | None = None
    exclude_modules: str | Collection[str] | TargetFunction | None = None
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    modules_to_save: str | Collection[str] | None = None
    init_lora_weights: bool = True
    fan_in_fan_out: bool = False
    budget_schedule: Schedule | BudgetSchedule = "cubic"
    budget_unit: Unit | BudgetCost = "triplets"
    score: Score | ScoreFunction = "sensitivity_uncertainty"
    score_reduction: ScoreReduction = "triplet"
    allocation: Allocation = "global"
    init: Init | InitFunction = "gaussian"
    orthogonality: Norm = "frobenius"
    param_dtype: DTypeLike = "float32"
    sensitivity_timing: SensitivityTiming = "updated"
    lambda_lr_scale: float = 1.0
    prox: Literal["soft_threshold"] | ProxFunction | None = None
    prox_weight: float = 0.0
    forward_mode: bool = False
    freeze_pruned: bool = False
    allow_regrowth: bool = True
    warn_small_start: bool = dataclasses.field(default=True, compare=False)
    task_type: InitVar[str | None] = None
    bias: InitVar[str | None] = "none"
    inference_mode: InitVar[bool] = False
    peft_type: InitVar[str | None] = "ADALORA"
    r: InitVar[int | None] = None
    use_dora: InitVar[bool] = False
    loftq_config: InitVar[Mapping[str, Any] | None] = None
    use_rslora: InitVar[bool | None] = False
    layer_replication: InitVar[Collection[Any] | None] = None
    trainable_token_indices: InitVar[Collection[Any] | None] = None

    def __post_init__(self, *only_peft: object) -> None:
        peft_keys.check_accepted(*only_peft)
        if self.total_step in (None, 0):
            raise ValueError(
                f"`total_step={self.total_step!r}`: the number of optimizer steps of the whole run "
                "is required, since the budget schedule is laid out over it; pass the steps per "
                "epoch times the epochs."
            )
        for name in ("total_step", "target_r", "init_r", "deltaT"):
            self._check(name, checks.integer, minimum=1)
        for name in ("tinit", "tfinal"):
            self._check(name, checks.integer, minimum=0)
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"`tinit={self.tinit}`: leaves no step for pruning with tfinal={self.tfinal} and "
                f"total_step={self.total_step}; choose them so that tinit < total_step - tfinal."
            )
        if self.init_r < self.target_r:
            raise ValueError(
                f"`init_r={self.init_r}`: is below target_r={self.target_r}, but training starts "
                "at init_r triplets per adapter and prunes to target_r; pass an init_r of at least "
                f"{self.target_r}."
            )
        for name in ("beta1", "beta2"):
            self._check(name, checks.number, "strictly between 0 and 1", lambda v: 0 < v < 1)
        self._check("lora_dropout", checks.number, "at least 0 and below 1", lambda v: 0 <= v < 1)
        self._check("lora_alpha", checks.number, "a finite number", math.isfinite)
        for name in ("orth_reg_weight", "lambda_lr_scale", "prox_weight"):
            self._check(name, checks.number, "0 or more", lambda v: 0 <= v < math.inf)
        if self.scale is None:
            checks.scaling("lora_alpha", self.lora_alpha, self.init_r)
        else:
            least = f"above 0, or None, and at least {checks.MIN_NUMBER:.3g}"

            def ok(v: float) -> bool:
                return checks.MIN_NUMBER <= v < math.inf

            self._check("scale", checks.number, least, ok)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            self._check(name, checks.names)
        self._check("layers_to_transform", checks.indices)
        self._set("rank_pattern", checks.rank_pattern(self.rank_pattern))
        limits = rank_spec.parse(self.rank_overrides, self.init_r)
        self._set("rank_overrides", limits)
        self._check("param_dtype", checks.dtype_name)
        for name, allowed in _CHOICES.items():
            self._check(name, checks.choice, allowed, name in _OR_A_FUNCTION)
        if self.allocation == "per_adapter" and any(
            spec.min_r is not None or spec.max_r is not None for _, spec in limits or ()
        ):
            raise ValueError(
                "`allocation='per_adapter'`: gives every adapter the same rank, so min_r and max_r "
                "in rank_overrides have no meaning; leave them out, or use allocation='global'."
            )
        if self.budget_schedule == "grow" and not self.allow_regrowth:
            raise ValueError(
                "`allow_regrowth=False`: excludes budget_schedule='grow', in which a rank rises "
                "by triplets that become active again; leave allow_regrowth=True."
            )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}`: must be True or False; pass one of the two."
                )

    def _check(
        self, name: str, check: Callable[..., object], *args: object, **kwargs: object
    ) -> None:
        self._set(name, check(name, getattr(self, name), *args, **kwargs))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def scaling(self) -> float:
        """Factor s of the increments, ``scale`` if it is set, else ``lora_alpha / init_r``.

        It is 1 where ``lora_alpha`` is not above 0. :meth:`scale_of` returns the factor of one
        layer.

        >>> AdaLoraConfig(total_step=9, lora_alpha=24).scaling
        2.0
        """
        if self.scale is not None:
            return self.scale
        return self.lora_alpha / self.init_r if self.lora_alpha > 0 else 1.0

    def scale_of(self, path: str) -> float:
        """Return the factor s of the adapter at ``path``.

        It is :attr:`scaling`, unless ``rank_overrides`` sets the layer's alpha or, if ``scale`` is
        None, its ``init_r``. Then it is ``alpha / init_r`` with the layer's values, or 1 where that
        alpha is not above 0.

        Args:
          path: path of the layer, such as ``encoder/query``.

        Returns:
          The factor by which ``P Λ Q`` of this layer is multiplied.

        >>> config = AdaLoraConfig(total_step=9, rank_overrides={"query": RankSpec(alpha=24)})
        >>> config.scale_of("encoder/query"), config.scale_of("encoder/key") == config.scaling
        (2.0, True)
        """
        if self.scale is not None and rank_spec.find(self._limits, path).alpha is None:
            return self.scale
        spec = self.spec_of(path)
        return spec.alpha / spec.init_r if spec.alpha > 0 else 1.0

    def spec_of(self, path: str) -> LayerRank:
        """Return the rank of the layer at ``path``, with defaults for the fields that are None.

        A pattern of ``rank_overrides`` is a regex for the whole path or for its end at a separator,
        so the name of a layer is one. The first match counts.

        Args:
          path: path of the layer, with ``/`` or ``.`` as separator.

        Returns:
          The layer's ``init_r``, ``min_r``, ``max_r`` and ``alpha``; none of them is None.

        >>> limits = {"query": 24, r".*/mlp/.*": {"max_r": 8}}
        >>> config = AdaLoraConfig(total_step=9, rank_overrides=limits)
        >>> config.spec_of("layers/0/query")
        LayerRank(init_r=24, min_r=0, max_r=24, alpha=8)
        >>> config.spec_of("layers.0.mlp.up").max_r
        8
        """
        spec = rank_spec.find(self._limits, path)
        init_r = self.init_r if spec.init_r is None else spec.init_r
        return LayerRank(
            init_r=init_r,
            min_r=0 if spec.min_r is None else spec.min_r,
            max_r=init_r if spec.max_r is None else spec.max_r,
            alpha=self.lora_alpha if spec.alpha is None else spec.alpha,
        )

    @property
    def final_step(self) -> int:
        """Step of the final mask, ``total_step - tfinal``, at most ``total_step - 1``.

        >>> AdaLoraConfig(total_step=100, tfinal=30).final_step
        70
        """
        return min(self.total_step - self.tfinal, self.total_step - 1)

    @property
    def _limits(self) -> tuple[tuple[str, RankSpec], ...]:
        return cast("Any", self.rank_overrides or ())

    @classmethod
    def recommended(cls, total_step: int, target_r: int = 8, **changes: Any) -> AdaLoraConfig:
        """Return a config with the settings that came out best on small models, at rank 1.

        - ``init_r``: four times ``target_r``.
        - ``allow_regrowth``: False, so a pruned triplet stays pruned.
        - ``tinit`` and ``tfinal``: 10 % and 30 % of ``total_step``, rounded down.
        - ``scale``: 1.

        Other fields have the constructor's defaults. AdaLoRA as in PEFT, with ``init_r`` twice
        ``target_r`` and regrowth, was behind these settings on three language models and level with
        them on three classifiers, each at its best learning rate; the page "When does AdaLoRA pay?"
        has the table. The price: adapters and their averages have four times the final rank, so
        they take up twice the memory of an ``init_r`` of twice the rank.

        Args:
          total_step: number of optimizer steps in the run.
          target_r: triplets per matrix at the end, averaged over all matrices.
          **changes: values of further fields, or of those above.

        Returns:
          A config, validated like any other.

        Raises:
          ValueError: a value cannot work, as for a new config, or ``lora_alpha`` is given, which
            has no effect beside ``scale``.
          TypeError: a name is not a field.

        >>> config = AdaLoraConfig.recommended(1000, target_r=4, target_modules=["q", "v"])
        >>> config.init_r, config.tinit, config.tfinal, config.scaling, config.allow_regrowth
        (16, 100, 300, 1.0, False)
        """
        # As ints of Python: those of NumPy and JAX overflow.
        total_step = checks.integer("total_step", total_step, minimum=1)
        target_r = checks.integer("target_r", target_r, minimum=1)
        if "lora_alpha" in changes and changes.get("scale", 1.0) is not None:
            raise ValueError(
                f"`lora_alpha={changes['lora_alpha']!r}`: has no effect, since the recommended "
                "scale is set directly; pass scale=..., or scale=None for lora_alpha / init_r."
            )
        settings: dict[str, Any] = {
            "total_step": total_step,
            "target_r": target_r,
            "init_r": 4 * target_r,
            "allow_regrowth": False,
            "tinit": total_step // 10,
            "tfinal": 3 * total_step // 10,
            "scale": 1.0,
        }
        return cls(**{**settings, **changes})

    def replace(self, **changes: Any) -> AdaLoraConfig:
        """Return a copy with some fields changed, validated like a new config.

        Equivalent to ``dataclasses.replace(config, **changes)``.

        Args:
          **changes: new values of fields, by name.

        Returns:
          A new config; this one does not change.

        Raises:
          ValueError: a value cannot work, as for a new config.
          TypeError: a name is not a field.

        >>> config = AdaLoraConfig(total_step=10, lora_alpha=24)
        >>> config.replace(init_r=8).scaling, config.replace(scale=1.5).replace(init_r=8).scaling
        (3.0, 1.5)
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, for checkpoints; :meth:`from_dict` reads them.

        Functions are represented by their names, since JSON cannot represent functions.

        Returns:
          ``{field: value}`` of numbers, strings, lists and dicts; a function is
          ``{"function": name}``.

        >>> config = AdaLoraConfig(total_step=10, target_modules=["q"], rank_overrides={"q": 4})
        >>> AdaLoraConfig.from_dict(config.to_dict()) == config
        True
        """
        return {name: _to_json(getattr(self, name)) for name in _DEFAULTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaLoraConfig:
        """Return the config that :meth:`to_dict` wrote.

        Functions are restored by name only and raise an error when called, see
        :meth:`missing_functions`.

        Args:
          values: the result of :meth:`to_dict`, also after a passage through JSON. A field that is
            absent has its default; a function may be given in place of its name.

        Returns:
          The config, validated like a new one.

        Raises:
          TypeError: ``values`` is not a mapping.
          ValueError: a field is unknown, or its value is not valid.

        >>> saved = AdaLoraConfig(total_step=10, score=min).to_dict()
        >>> AdaLoraConfig.from_dict(saved).missing_functions()
        {'score': 'builtins.min'}
        >>> AdaLoraConfig.from_dict(saved | {"score": min}).score
        <built-in function min>
        """
        if not isinstance(values, Mapping):
            raise TypeError(
                f"`values={reprlib.repr(values)}`: is not a mapping; pass the result of to_dict()."
            )
        if unknown := sorted(map(str, set(values) - set(_DEFAULTS))):
            raise ValueError(
                f"`values`: has fields that are unknown here ({', '.join(unknown)}), since another "
                "version of adalora_jax or another library wrote them; read the config there, or "
                "leave them out."
            )

        def is_function(value: object) -> bool:
            return isinstance(value, Mapping) and set(value) == {"function"}

        values = {
            name: MissingFunction(str(value["function"])) if is_function(value) else value
            for name, value in values.items()
        }
        return cls(**{"total_step": None, **values})

    def missing_functions(self) -> dict[str, str]:
        """Return ``{field: name}`` of the functions that :meth:`from_dict` could not restore.

        Returns:
          The qualified names of the functions; an empty dict if none is missing.

        >>> config = AdaLoraConfig(total_step=10, score=min)
        >>> config.missing_functions()
        {}
        >>> AdaLoraConfig.from_dict(config.to_dict()).missing_functions()
        {'score': 'builtins.min'}
        """
        values = {name: getattr(self, name) for name in _DEFAULTS}
        return {n: v.name for n, v in values.items() if isinstance(v, MissingFunction)}

    @classmethod
    def from_peft(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> AdaLoraConfig:
        """Read a PEFT AdaLoRA config: a mapping, an ``adapter_config.json``, or its folder.

        Keys that describe the origin of the model are dropped. Unknown keys, and keys that PEFT's
        AdaLoRA inherits from LoRA but does not use, are dropped with a ``UserWarning``. The paths
        in ``rank_pattern`` are converted: ``encoder.query.lora_E`` to ``encoder/query``.

        Args:
          source: the result of ``peft.AdaLoraConfig.to_dict()``, or a path to the saved config.

        Returns:
          The config, with the defaults of this class for the fields that PEFT does not have.

        Raises:
          TypeError: ``source`` is neither a mapping nor a path.
          ValueError: the config is not an AdaLoRA config, or sets an option that changes the
            computation and is not supported here.
          OSError: the file cannot be read.

        >>> saved = {"peft_type": "ADALORA", "total_step": 10, "bias": "none", "r": 8}
        >>> AdaLoraConfig.from_peft(saved | {"target_modules": ["value", "query"]}).target_modules
        ('query', 'value')
        >>> AdaLoraConfig.from_peft(saved | {"bias": "all"})
        Traceback (most recent call last):
            ...
        ValueError: `bias='all'`: PEFT would train biases of the base, which stay frozen here; \
leave bias out, or name the biases to train in modules_to_save, or merge a trained adapter with \
PEFT.
        """
        fields = {*_DEFAULTS, "use_dora", "loftq_config"} - _OURS
        return cls(**{"total_step": None, **peft_keys.read(source, fields)})

    def to_peft(self) -> dict[str, Any]:
        """Return the keyword arguments of ``peft.AdaLoraConfig``, as plain JSON values.

        The result has no ``task_type``, which has no counterpart here. Add one, because PEFT omits
        the orthogonality penalty without it. Fields that PEFT does not have and that change the
        computation must have their defaults, which give PEFT's behaviour; ``scale`` is written as
        ``lora_alpha``. ``orth_reg_in_update`` is omitted, because PEFT's model adds the penalty to
        its loss, and ``warn_small_start``, because it does not affect the run.

        Returns:
          ``{argument: value}``, with lists in place of tuples.

        Raises:
          ValueError: a field has a value that PEFT does not support.

        >>> AdaLoraConfig(total_step=10, target_modules=["q"]).to_peft()["target_modules"]
        ['q']
        """
        omitted = {"scale", "orth_reg_in_update", "warn_small_start"}
        for name in (n for n in _DEFAULTS if n in _OURS - omitted):
            value, default = getattr(self, name), _DEFAULTS[name]
            if value != default:
                raise ValueError(
                    f"`{name}={value!r}`: has no counterpart in PEFT; set it to {default!r}, or "
                    "save the config in a checkpoint of this library."
                )
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            if callable(getattr(self, name)):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}`: is a function, which PEFT does not "
                    "support; set it to a list of suffixes or a regex."
                )
        layers = self.layers_to_transform is not None
        if isinstance(self.target_modules, str) and (layers or self.layers_pattern is not None):
            raise ValueError(
                f"`target_modules={self.target_modules!r}`: is a regex, with which PEFT does not "
                "accept layers_to_transform or layers_pattern; select the layers in the regex."
            )
        if self.layers_pattern is not None and not layers:
            raise ValueError(
                f"`layers_pattern={self.layers_pattern!r}`: needs layers_to_transform in PEFT; set "
                "it too, or leave layers_pattern out."
            )
        result: dict[str, Any] = {"peft_type": "ADALORA"}
        for name in (name for name in _DEFAULTS if name not in _OURS):
            value = getattr(self, name)
            result[name] = list(value) if isinstance(value, tuple) else value
        if self.scale is not None:
            result["lora_alpha"] = self.scale * self.init_r
        if self.rank_pattern is not None:
            result["rank_pattern"] = peft_keys.written_pattern(
                cast("Any", self.rank_pattern), self.init_r
            )
        # Options that this config rejects, with PEFT's values for "not used".
        result |= {"use_dora": False, "loftq_config": {}, "bias": "none", "use_rslora": False}
        return result | {"layer_replication": None, "trainable_token_indices": None}


def check_config(config: object, call: str = "") -> None:
    """Raise a TypeError if ``config`` is not an :class:`AdaLoraConfig`; ``call`` is the right call.

    >>> check_config(10)
    Traceback (most recent call last):
        ...
    TypeError: `config=10`: is not an AdaLoraConfig; pass one.
    """
    if not isinstance(config, AdaLoraConfig):
        way_out = f"pass one, as in {call}" if call else "pass one"
        raise TypeError(f"`config={reprlib.repr(config)}`: is not an AdaLoraConfig; {way_out}.")


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(AdaLoraConfig)}
# Fields that PEFT does not have; their defaults give PEFT's behaviour.
_OURS = {
    "rank_overrides",
    "scale",
    "budget_schedule",
    "budget_unit",
    "score",
    "score_reduction",
    "allocation",
    "init",
    "orthogonality",
    "param_dtype",
    "sensitivity_timing",
    "lambda_lr_scale",
    "prox",
    "prox_weight",
    "forward_mode",
    "freeze_pruned",
    "allow_regrowth",
    "orth_reg_in_update",
    "warn_small_start",
}


_init = AdaLoraConfig.__init__


@functools.wraps(_init)
def _init_or_explain(self: AdaLoraConfig, *args: Any, **kwargs: Any) -> None:
    peft_keys.check_no_peft_names(set(kwargs) - set(inspect.signature(_init).parameters))
    _init(self, *args, **kwargs)


# The generated method would report PEFT's other keys only as "unexpected keyword argument".
setattr(AdaLoraConfig, "__init__", _init_or_explain)  # noqa: B010


def _to_json(value: object) -> Any:
    if isinstance(value, RankSpec):
        return dataclasses.asdict(value)
    if isinstance(value, (tuple, list)):
        return [_to_json(entry) for entry in value]
    if isinstance(value, MissingFunction):
        return {"function": value.name}
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"function": f"{getattr(value, '__module__', '')}.{name}"}
    return value
