"""The hyper-parameters of AdaLoRA, and every refusal of one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
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
    "upper_confidence",
    "sensitivity_over_uncertainty",
    "signal_to_noise",
]
ScoreOver = Literal["triplet", "lam"]
Allocation = Literal["global", "per_adapter"]
Init = Literal["gaussian", "lambda_one", "orthonormal"]
Norm = Literal["frobenius", "squared"]
SensitivityAt = Literal["updated", "current"]
Rank = int | Sequence[bool] | Sequence[Sequence[bool]]
Limit = RankSpec | Mapping[str, Any] | int

_CHOICES = {
    "budget_schedule": get_args(Schedule),
    "score": get_args(Score),
    "score_over": get_args(ScoreOver),
    "allocation": get_args(Allocation),
    "init": get_args(Init),
    "orthogonality": get_args(Norm),
    "sensitivity_at": get_args(SensitivityAt),
    "prox": (None, "soft_threshold"),
    "budget_unit": get_args(Unit),
}
_OR_A_FUNCTION = ("budget_schedule", "budget_unit", "score", "init", "prox")
_FLAGS = (
    *("init_lora_weights", "fan_in_fan_out", "hold_mask", "revive", "forward_mode"),
    "orth_reg_in_update",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """The hyper-parameters of an AdaLoRA run; immutable, hashable, static under ``jax.jit``.

    Fields shared with Hugging Face PEFT have its names and defaults, so the keyword arguments of
    ``peft.AdaLoraConfig`` can be pasted in. Steps are optimizer steps, counted from 0.

    The run has three phases. Up to and including step ``tinit`` nothing is pruned; then, until
    step ``total_step - tfinal``, the budget falls from ``init_r`` to ``target_r`` triplets per
    adapter on average, with a new mask every ``deltaT`` steps; after that the last mask stays.

    Any sequence or set of names may be given; fields store it as a tuple, mappings as pairs.
    What a function is called with is in :mod:`adalora_jax.protocols`.

    Attributes:
      total_step: optimizer steps of the whole run, over which the budget schedule is laid out.
        Required.
      target_r: triplets per adapter at the end, on average over all adapters.
      init_r: triplets per adapter at the start; at least ``target_r``.
      tinit: last step of the warm-up, in which nothing is pruned.
      tfinal: steps at the end in which the mask no longer changes.
      deltaT: steps from one mask to the next. In between a pruned λ may grow back.
      beta1: decay of the smoothed sensitivity Ī, above 0 and below 1.
      beta2: decay of its uncertainty Ū, above 0 and below 1.
      orth_reg_weight: weight of the orthogonality penalty, see ``adalora_jax.orthogonality``.
      orth_reg_in_update: True adds the gradient of the orthogonality penalty inside the update of
        ``adalora_jax.adalora``, for a trainer that owns the loss. Then ``orthogonality`` refuses
        this config, since the penalty would count twice. False: add it to the loss yourself.
      rank_pattern: start from the ranks of an earlier run: ``{path: rank}``, or the booleans of
        ``adalora_jax.rank_pattern``, one per triplet. None: by ``init_r`` and ``rank_limits``.
      rank_limits: where the rank of some layers starts, its limits and alpha:
        ``{pattern: RankSpec}``; a dict of its fields or an ``init_r`` alone will do. A pattern is
        a regex for the whole path or its end at a separator, so a name is one. The first match
        counts.
      lora_alpha: increments are scaled by ``lora_alpha / init_r``, for the whole run; by 1 where
        it is not above 0. The property ``scaling`` has the factor.
      scale: the factor itself, whatever the rank. None: by ``lora_alpha``.
      lora_dropout: probability of dropout on the input of an adapter while training, below 1.
      target_modules: the layers to adapt. A list of names, each of which matches the paths that
        end with it at a separator; a string, which is a regex for the whole path;
        ``"all-linear"``, every linear layer (dense, einsum, recurrent gates; no convolution, no
        embedding); or a function ``(path, module) -> bool | RankSpec``. Required by ``adapt``.
      exclude_modules: layers that stay as they are, in the same forms.
      layers_to_transform: adapt only the layers with this index, or these indices, in the list of
        layers they belong to: 3 for ``h/3/mlp/up`` and for ``block_3/mlp/up``. None: all.
      layers_pattern: name or names of the list that ``layers_to_transform`` counts in; regexes.
        None: any list.
      modules_to_save: names of base parameters or modules that are trained along, in float32,
        such as a new classifier.
      init_lora_weights: False draws p, λ and q from the standard normal, so the adapted model does
        not start as the base model. PEFT's switch for tests.
      fan_in_fan_out: has no effect here, Flax kernels are always ``[in, out]``; kept for the
        files of PEFT, where it marks GPT-2's ``Conv1D``.
      budget_schedule: how the budget changes between ``tinit`` and the final mask: ``"cubic"``,
        the paper's, prunes most at the beginning; ``"linear"``; ``"grow"`` rises from one triplet
        per matrix, up to ``init_r`` (IncreLoRA); or a ``BudgetSchedule``. See
        ``adalora_jax.budget``.
      budget_unit: what the budget counts: ``"triplets"``; ``"parameters"`` or ``"flops"``, by
        which a triplet of a wide layer costs more than one of a narrow layer; or a
        ``BudgetCost``.
      score: what ranks the triplets, from the smoothed sensitivity Ī of ``|w g|`` and its
        uncertainty Ū: ``"sensitivity_uncertainty"``, ``Ī Ū``, the paper's;
        ``"smoothed_sensitivity"``, Ī; ``"sensitivity"``, ``|w g|`` of this step;
        ``"magnitude"``, ``|λ|``; ``"upper_confidence"``, ``Ī + Ū``;
        ``"sensitivity_over_uncertainty"``, ``Ī / Ū`` (IGU-LoRA); ``"signal_to_noise"``, ``|w|``
        over the deviation of its posterior; or a ``ScoreFunction``.
      score_over: ``"triplet"``: the score of λ plus the means of those of its vectors; ``"lam"``:
        that of λ alone.
      allocation: ``"global"``: all triplets compete for one budget; ``"per_adapter"``: every
        matrix has the same rank.
      init: initial values: ``"gaussian"``, λ = 0, p and q normal with deviation 0.02;
        ``"lambda_one"``, λ = 1 and p = 0; ``"orthonormal"``, λ = 0, p and q with orthonormal
        rows; or an ``InitFunction``.
      orthogonality: norm of the penalty: ``"frobenius"``, PEFT's ``‖M Mᵀ − I‖``; ``"squared"``,
        its square, the paper's.
      param_dtype: dtype of p, λ and q: float32, bfloat16, float16 or float64.
      sensitivity_at: takes w in ``|w g|`` after the update (``"updated"``, as PEFT does) or before
        it (``"current"``).
      lam_lr_multiplier: multiplies the update that the inner optimizer makes of λ.
      prox: what λ goes through after each update: None, nothing; ``"soft_threshold"``, the
        proximal step of an L1 penalty (SoRA); or a ``ProxFunction``.
      prox_weight: strength of ``prox``.
      forward_mode: True makes ``jax.jvp`` and ``jax.hessian`` work; training steps are slower.
      hold_mask: True holds a pruned λ at 0 until a later mask revives its triplet.
      revive: False holds it at 0 for the rest of the run.

    Args:
      task_type: accepted with any of PEFT's values, and not stored, as the next three are not.
      bias: accepted as ``"none"``: biases are not trained.
      inference_mode: accepted with either value.
      peft_type: accepted as ``"ADALORA"``.
      r: refused: AdaLoRA starts at ``init_r``.
      use_dora: refused: AdaLoRA has no DoRA form.
      loftq_config: refused: quantize the base instead.

    Raises:
      ValueError: for any value that cannot work, naming the argument, its value and a way out.
      TypeError: for a name that is not an argument. For PEFT's others use :meth:`from_peft`.

    >>> config = AdaLoraConfig(total_step=1000, tinit=100, tfinal=300, target_modules=["query"])
    >>> config.scaling
    0.6666666666666666
    >>> AdaLoraConfig(total_step=1000, init_r=4, target_r=8)
    Traceback (most recent call last):
        ...
    ValueError: init_r=4 is below target_r=8: training starts at init_r triplets per adapter and \
prunes to target_r, so init_r must be at least 8.
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
    rank_limits: Mapping[str, Limit] | Sequence[tuple[str, Limit]] | None = None
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
    score_over: ScoreOver = "triplet"
    allocation: Allocation = "global"
    init: Init | InitFunction = "gaussian"
    orthogonality: Norm = "frobenius"
    param_dtype: DTypeLike = "float32"
    sensitivity_at: SensitivityAt = "updated"
    lam_lr_multiplier: float = 1.0
    prox: Literal["soft_threshold"] | ProxFunction | None = None
    prox_weight: float = 0.0
    forward_mode: bool = False
    hold_mask: bool = False
    revive: bool = True
    task_type: InitVar[str | None] = None
    bias: InitVar[str] = "none"
    inference_mode: InitVar[bool] = False
    peft_type: InitVar[str] = "ADALORA"
    r: InitVar[int | None] = None
    use_dora: InitVar[bool] = False
    loftq_config: InitVar[Mapping[str, Any] | None] = None

    def __post_init__(self, *only_peft: Any) -> None:
        peft_keys.check_accepted(*only_peft)
        if self.total_step in (None, 0):
            raise ValueError(
                f"total_step={self.total_step!r}: the number of optimizer steps of the whole run "
                "is required, since the budget schedule is laid out over it."
            )
        for name in ("total_step", "target_r", "init_r", "deltaT"):
            self._check(name, checks.integer, minimum=1)
        for name in ("tinit", "tfinal"):
            self._check(name, checks.integer, minimum=0)
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit}, tfinal={self.tfinal} and total_step={self.total_step} leave "
                "no step for pruning: choose them so that tinit < total_step - tfinal."
            )
        if self.init_r < self.target_r:
            raise ValueError(
                f"init_r={self.init_r} is below target_r={self.target_r}: training starts at "
                "init_r triplets per adapter and prunes to target_r, so init_r must be at least "
                f"{self.target_r}."
            )
        for name in ("beta1", "beta2"):
            self._check(name, checks.number, "strictly between 0 and 1", lambda v: 0 < v < 1)
        self._check("lora_dropout", checks.number, "at least 0 and below 1", lambda v: 0 <= v < 1)
        self._check("lora_alpha", checks.number, "a finite number", math.isfinite)
        for name in ("orth_reg_weight", "lam_lr_multiplier", "prox_weight"):
            self._check(name, checks.number, "0 or more", lambda v: 0 <= v < math.inf)
        if self.scale is None:
            checks.scaling("lora_alpha", self.lora_alpha, self.init_r)
        else:
            least = f"above 0, or None, and at least {checks.MIN_NUMBER:.3g}"
            ok = lambda v: checks.MIN_NUMBER <= v < math.inf
            self._check("scale", checks.number, least, ok)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            self._check(name, checks.names)
        self._check("layers_to_transform", checks.indices)
        self._set("rank_pattern", checks.rank_pattern(self.rank_pattern))
        limits = rank_spec.parse(self.rank_limits, self.init_r)
        self._set("rank_limits", limits)
        self._check("param_dtype", checks.dtype_name)
        for name, allowed in _CHOICES.items():
            self._check(name, checks.choice, allowed, name in _OR_A_FUNCTION)
        if self.allocation == "per_adapter" and any(
            spec.min_r is not None or spec.max_r is not None for _, spec in limits or ()
        ):
            raise ValueError(
                "allocation='per_adapter' gives every adapter the same rank, so min_r and max_r in "
                "rank_limits have no meaning: leave them out, or allocate globally."
            )
        if self.budget_schedule == "grow" and not self.revive:
            raise ValueError(
                "revive=False with budget_schedule='grow': a rank can only rise by triplets that "
                "become active again, so leave revive=True."
            )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")

    def _check(self, name: str, check: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._set(name, check(name, getattr(self, name), *args, **kwargs))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def scaling(self) -> float:
        """The factor s of an increment: ``scale``, or else ``lora_alpha / init_r``.

        It is 1 where ``lora_alpha`` is not above 0. See :meth:`scale_of` for that of one layer.

        >>> AdaLoraConfig(total_step=9, lora_alpha=24).scaling
        2.0
        """
        if self.scale is not None:
            return self.scale
        return self.lora_alpha / self.init_r if self.lora_alpha > 0 else 1.0

    def scale_of(self, path: str) -> float:
        """Return the factor s of the adapter at ``path``.

        It is :attr:`scaling`, unless ``rank_limits`` gives the layer an alpha or, without a
        ``scale``, a rank: then ``alpha / init_r`` of these.

        >>> config = AdaLoraConfig(total_step=9, rank_limits={"query": RankSpec(alpha=24)})
        >>> config.scale_of("encoder/query"), config.scale_of("encoder/key") == config.scaling
        (2.0, True)
        """
        if self.scale is not None and rank_spec.find(self._limits, path).alpha is None:
            return self.scale
        spec = self.spec_of(path)
        return spec.alpha / spec.init_r if spec.alpha > 0 else 1.0

    def spec_of(self, path: str) -> LayerRank:
        """Return the rank of the layer at ``path``, every field filled in.

        A pattern of ``rank_limits`` is a regex for the whole path or for its end at a separator,
        so a plain name is one; the first that matches counts.

        >>> limits = {"query": 24, r".*/mlp/.*": {"max_r": 8}}
        >>> config = AdaLoraConfig(total_step=9, rank_limits=limits)
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
        """The step of the final mask: ``total_step - tfinal``, at the latest the last step."""
        return min(self.total_step - self.tfinal, self.total_step - 1)

    @property
    def _limits(self) -> tuple[tuple[str, RankSpec], ...]:
        return cast("Any", self.rank_limits or ())

    def replace(self, **changes: Any) -> AdaLoraConfig:
        """Return a copy with some fields changed, checked like a new one.

        The same as ``dataclasses.replace(config, **changes)``.

        >>> config = AdaLoraConfig(total_step=10, lora_alpha=24)
        >>> config.replace(init_r=8).scaling, config.replace(scale=1.5).replace(init_r=8).scaling
        (3.0, 1.5)
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, for checkpoints; :meth:`from_dict` reads them.

        A function, which JSON cannot hold, is represented by its name.

        >>> config = AdaLoraConfig(total_step=10, target_modules=["q"], rank_limits={"q": 4})
        >>> AdaLoraConfig.from_dict(config.to_dict()) == config
        True
        """
        return {name: _to_json(getattr(self, name)) for name in _DEFAULTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaLoraConfig:
        """Return the config that :meth:`to_dict` wrote.

        A function in it can be named but not called, see :meth:`missing_functions`.

        Raises:
          ValueError: a field is unknown here.

        >>> saved = AdaLoraConfig(total_step=10, score=min).to_dict()
        >>> AdaLoraConfig.from_dict(saved).missing_functions()
        {'score': 'builtins.min'}
        >>> AdaLoraConfig.from_dict(saved | {"score": min}).score
        <built-in function min>
        """
        if unknown := sorted(map(str, set(values) - set(_DEFAULTS))):
            raise ValueError(
                f"the config has fields that are unknown here: {', '.join(unknown)}. It was made "
                "by another version of adalora_jax, or by another library."
            )
        is_function = lambda value: isinstance(value, Mapping) and set(value) == {"function"}
        values = {
            name: MissingFunction(str(value["function"])) if is_function(value) else value
            for name, value in values.items()
        }
        return cls(**{"total_step": None, **values})

    def missing_functions(self) -> dict[str, str]:
        """Return ``{field: name}`` of the functions that :meth:`from_dict` could not restore."""
        values = {name: getattr(self, name) for name in _DEFAULTS}
        return {n: v.name for n, v in values.items() if isinstance(v, MissingFunction)}

    @classmethod
    def from_peft(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> AdaLoraConfig:
        """Read a PEFT AdaLoRA config: a mapping, an ``adapter_config.json``, or its folder.

        Keys about where the model came from are dropped. A ``UserWarning`` reports keys that are
        unknown here, and those that PEFT's AdaLoRA takes over from LoRA without using them; they
        are left out. The paths in ``rank_pattern`` become this library's: ``encoder/query`` for
        ``encoder.query.lora_E``.

        Args:
          source: what ``peft.AdaLoraConfig.to_dict()`` gives, or a path to the saved form.

        Raises:
          ValueError: the config is not AdaLoRA's, or asks for something that changes the
            computation and that AdaLoRA here does not do.

        >>> saved = {"peft_type": "ADALORA", "total_step": 10, "bias": "none", "r": 8}
        >>> AdaLoraConfig.from_peft(saved | {"target_modules": ["value", "query"]}).target_modules
        ('query', 'value')
        >>> AdaLoraConfig.from_peft(saved | {"bias": "all"})
        Traceback (most recent call last):
            ...
        ValueError: bias='all' of the PEFT config is not supported here: remove it if the adapter \
works without it.
        """
        fields = {*_DEFAULTS, "use_dora", "loftq_config"} - _OURS
        return cls(**{"total_step": None, **peft_keys.read(source, fields)})

    def to_peft(self) -> dict[str, Any]:
        """Return the keyword arguments of ``peft.AdaLoraConfig``, as plain JSON values.

        Without a ``task_type``, which has no counterpart here, PEFT leaves out the orthogonality
        term: add one there. The fields that PEFT does not have and that change the computation are
        refused unless they have the value that means PEFT's behaviour. ``orth_reg_in_update`` is
        left out: PEFT's model adds the penalty to its loss.

        >>> AdaLoraConfig(total_step=10, target_modules=["q"]).to_peft()["target_modules"]
        ['q']

        Raises:
          ValueError: a field is set to something that PEFT cannot do.
        """
        for name in (n for n in _DEFAULTS if n in _OURS - {"scale", "orth_reg_in_update"}):
            value, default = getattr(self, name), _DEFAULTS[name]
            if value != default:
                raise ValueError(
                    f"{name}={value!r} has no counterpart in PEFT: use {default!r} there, or keep "
                    "the config in this library's checkpoints."
                )
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            if callable(getattr(self, name)):
                raise ValueError(f"{name} is a function: give PEFT a list of suffixes or a regex.")
        layers = self.layers_to_transform is not None
        if isinstance(self.target_modules, str) and (layers or self.layers_pattern is not None):
            raise ValueError(
                f"target_modules={self.target_modules!r} is a regex, with which PEFT takes no "
                "layers_to_transform or layers_pattern: put the layers into the regex."
            )
        if self.layers_pattern is not None and not layers:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform in PEFT."
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
        # PEFT's own spelling of the options that are refused here.
        return result | {"use_dora": False, "loftq_config": {}, "bias": "none"}


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(AdaLoraConfig)}
# The fields PEFT does not have; the defaults are its behaviour.
_OURS = {
    "rank_limits",
    "scale",
    "budget_schedule",
    "budget_unit",
    "score",
    "score_over",
    "allocation",
    "init",
    "orthogonality",
    "param_dtype",
    "sensitivity_at",
    "lam_lr_multiplier",
    "prox",
    "prox_weight",
    "forward_mode",
    "hold_mask",
    "revive",
    "orth_reg_in_update",
}


_init = AdaLoraConfig.__init__


@functools.wraps(_init)
def _init_or_explain(self: AdaLoraConfig, *args: Any, **kwargs: Any) -> None:
    peft_keys.refuse_names(set(kwargs) - set(inspect.signature(_init).parameters))
    _init(self, *args, **kwargs)


# The generated method says "unexpected keyword argument" to the keys that PEFT's snippets have.
setattr(AdaLoraConfig, "__init__", _init_or_explain)  # noqa: B010


def _to_json(value: Any) -> Any:
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
