"""The hyper-parameters of AdaLoRA, and every refusal of one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from adalora_jax import checks, config_peft, rankspec
from adalora_jax.checks import MissingFunction
from adalora_jax.rankspec import RankSpec

_CHOICES = {
    "budget_schedule": ("cubic", "linear", "grow"),
    "score": (
        "sensitivity_uncertainty",
        "smoothed_sensitivity",
        "sensitivity",
        "magnitude",
        "upper_confidence",
        "sensitivity_over_uncertainty",
        "signal_to_noise",
    ),
    "score_over": ("triplet", "lam"),
    "allocation": ("global", "per_adapter"),
    "init": ("gaussian", "lambda_one", "orthonormal"),
    "orthogonality": ("frobenius", "squared"),
    "sensitivity_at": ("updated", "current"),
    "prox": (None, "soft_threshold"),
    "budget_unit": ("triplets", "parameters", "flops"),
}
_OR_A_FUNCTION = ("budget_schedule", "budget_unit", "score", "init", "prox")
_REFUSED = ("r", "use_dora", "loftq_config")  # PEFT's names that no AdaLoRA can give a meaning


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """Everything AdaLoRA needs to know; immutable, hashable, static under ``jax.jit``.

    Fields shared with Hugging Face PEFT keep its names and defaults, so that a PEFT user's
    keyword arguments paste in unchanged. Steps are optimizer steps, counted from 0.

    The run has three phases. Up to and including step ``tinit`` nothing is pruned; then, until
    step ``total_step - tfinal``, the budget falls from ``init_r`` to ``target_r`` triplets per
    adapter on average, with a new mask every ``deltaT`` steps; after that the last mask stays.

    Raises:
      ValueError: for any value that cannot work, naming the argument, its value and a way out.

    >>> config = AdaLoraConfig(total_step=1000, tinit=100, tfinal=300, target_modules=["query"])
    >>> config.scale
    0.6666666666666666
    >>> AdaLoraConfig(total_step=1000, init_r=4, target_r=8)
    Traceback (most recent call last):
        ...
    ValueError: init_r=4 is below target_r=8: training starts at init_r triplets per adapter and \
prunes to target_r, so init_r must be at least 8.
    """

    total_step: int = 0  # optimizer steps of the whole run; required
    target_r: int = 8  # average triplets per adapter after pruning
    init_r: int = 12  # triplets per adapter at the start
    tinit: int = 0  # last step of the warm-up, in which nothing is pruned
    tfinal: int = 0  # steps at the end in which the mask no longer changes
    deltaT: int = 1  # steps between two masks
    beta1: float = 0.85  # decay of the smoothed sensitivity
    beta2: float = 0.85  # decay of the uncertainty
    orth_reg_weight: float = 0.5  # weight of the orthogonality penalty
    rank_pattern: Any = None  # {path: rank or booleans}: start from an earlier run's ranks
    rank_limits: Any = None  # {pattern: RankSpec, its fields as a dict, or init_r}; first match
    lora_alpha: float = 8  # the increment is scaled by lora_alpha / init_r; <= 0 means init_r
    scale: Any = None  # or by this number, of each triplet, whatever the rank; None: as above
    lora_dropout: float = 0.0  # dropout on an adapter's input while training
    target_modules: Any = None  # suffixes, a regex, "all-linear", (path, module) -> bool | RankSpec
    exclude_modules: Any = None  # suffixes or regex of modules left alone
    layers_to_transform: Any = None  # only layers with this index, or these indices
    layers_pattern: Any = None  # names of the layer list that layers_to_transform counts in
    modules_to_save: Any = None  # suffixes of further base parameters that train along
    init_lora_weights: bool = True  # False draws p, lam and q from N(0, 1): no identity at step 0
    fan_in_fan_out: bool = False  # kept for PEFT files; Flax kernels are always [in, out]
    budget_schedule: str | Callable[..., Any] = "cubic"  # how many may live when, see budget
    budget_unit: str | Callable[..., Any] = "triplets"  # what is counted, see cost
    score: str | Callable[..., Any] = "sensitivity_uncertainty"  # what ranks the triplets
    score_over: Literal["triplet", "lam"] = "triplet"  # the whole triplet counts, or lam alone
    allocation: Literal["global", "per_adapter"] = "global"  # all compete, or equal ranks for each
    init: str | Callable[..., Any] = "gaussian"  # initial values, see init_adapter
    orthogonality: Literal["frobenius", "squared"] = "frobenius"  # PEFT's norm, or paper's Eq. 4
    param_dtype: Any = "float32"  # dtype of p, lam and q
    sensitivity_at: Literal["updated", "current"] = "updated"  # |w g| at w after or before update
    lam_lr_multiplier: float = 1.0  # of the inner optimizer's update of lam
    prox: str | Callable[..., Any] | None = None  # what lam goes through then, see adalora
    prox_weight: float = 0.0  # by how much
    orth_reg_in_update: bool = False  # the penalty's gradient is added inside the update
    forward_mode: bool = False  # True: jvp and hessian work, but training steps are slower
    hold_mask: bool = False  # True: a pruned lam stays 0 until a later mask revives it
    revive: bool = True  # False: no later mask does, and a pruned lam stays 0 for good
    use_dora: bool = False  # PEFT's name, refused: AdaLoRA has no DoRA form
    loftq_config: Any = None  # PEFT's name, refused: quantise the base instead
    r: int | None = None  # PEFT's name, refused: AdaLoRA starts at init_r
    scale_given: bool = dataclasses.field(init=False, repr=False, default=False)  # not derived

    def __post_init__(self) -> None:
        _refuse_foreign(self)
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
        self._set("scale_given", self.scale is not None)
        if self.scale_given:
            self._check("scale", checks.number, "above 0, or None", lambda v: 0 < v < math.inf)
        else:
            self._set("scale", self.lora_alpha / self.init_r if self.lora_alpha > 0 else 1.0)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            self._check(name, checks.names)
        self._check("layers_to_transform", checks.indices)
        self._set("rank_pattern", checks.rank_pattern(self.rank_pattern))
        self._set("rank_limits", rankspec.parse(self.rank_limits, self.init_r))
        self._check("param_dtype", checks.dtype_name)
        for name, allowed in _CHOICES.items():
            checks.choice(name, getattr(self, name), allowed, name in _OR_A_FUNCTION)
        if self.allocation == "per_adapter" and any(
            spec.min_r is not None or spec.max_r is not None for _, spec in self.rank_limits or ()
        ):
            raise ValueError(
                "allocation='per_adapter' gives every adapter the same rank, so min_r and max_r in "
                "rank_limits have no meaning: leave them out, or allocate globally."
            )
        if self.budget_schedule == "grow" and not self.revive:
            raise ValueError(
                "revive=False with budget_schedule='grow': a rank can only rise by triplets that "
                "come to life again, so leave revive=True."
            )
        flags = ("init_lora_weights", "fan_in_fan_out", "hold_mask", "revive", "forward_mode")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")

    def _check(self, name: str, check: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._set(name, check(name, getattr(self, name), *args, **kwargs))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def scale_of(self, path: str) -> float:
        """The factor s of the adapter at ``path``, ``alpha / init_r`` by what holds for it.

        With a ``scale`` given that is s, but where ``rank_limits`` gives the layer an alpha.

        >>> config = AdaLoraConfig(total_step=9, rank_limits={"query": RankSpec(alpha=24)})
        >>> config.scale_of("encoder/query"), config.scale_of("encoder/key") == config.scale
        (2.0, True)
        """
        if self.scale_given and rankspec.find(self.rank_limits or (), path).alpha is None:
            return self.scale
        spec = self.spec_of(path)
        return spec.alpha / spec.init_r if spec.alpha > 0 else 1.0

    def spec_of(self, path: str) -> RankSpec:
        """The rank of the layer at ``path``, every field filled in.

        A pattern of ``rank_limits`` is a regex for the whole path or for its end at a separator,
        so a plain name is one; the first that matches counts.

        >>> limits = {"query": 24, r".*/mlp/.*": {"max_r": 8}}
        >>> config = AdaLoraConfig(total_step=9, rank_limits=limits)
        >>> config.spec_of("layers/0/query")
        RankSpec(init_r=24, min_r=0, max_r=24, alpha=8)
        >>> config.spec_of("layers.0.mlp.up").max_r
        8
        """
        spec = rankspec.find(self.rank_limits or (), path)
        init_r = self.init_r if spec.init_r is None else spec.init_r
        return RankSpec(
            init_r=init_r,
            min_r=0 if spec.min_r is None else spec.min_r,
            max_r=init_r if spec.max_r is None else spec.max_r,
            alpha=self.lora_alpha if spec.alpha is None else spec.alpha,
        )

    @property
    def scaling(self) -> float:
        """The factor s of an increment, PEFT's word for it."""
        return self.scale

    @property
    def final_step(self) -> int:
        """The step of the final mask: ``total_step - tfinal``, at the latest the last step."""
        return min(self.total_step - self.tfinal, self.total_step - 1)

    def replace(self, **changes: Any) -> AdaLoraConfig:
        """A copy with some fields changed, checked like a new one.

        A scale that was not given follows ``lora_alpha`` and ``init_r``, which it would not with
        ``dataclasses.replace``.

        >>> config = AdaLoraConfig(total_step=10, lora_alpha=24)
        >>> config.replace(init_r=8).scale, config.replace(scale=1.5).replace(init_r=8).scale
        (3.0, 1.5)
        """
        scale = self.scale if self.scale_given else None
        return dataclasses.replace(self, **{"scale": scale, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, for checkpoints; :meth:`from_dict` reads them back.

        A function, which JSON cannot hold, is there by its name.

        >>> config = AdaLoraConfig(total_step=10, target_modules=["q"], rank_limits={"q": 4})
        >>> AdaLoraConfig.from_dict(config.to_dict()) == config
        True
        """
        result = {name: _to_json(getattr(self, name)) for name in _DEFAULTS}
        return result | {"scale": self.scale if self.scale_given else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaLoraConfig:
        """The config that :meth:`to_dict` wrote; a function in it can be named but not called.

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
        return cls(**values)

    def missing_functions(self) -> dict[str, str]:
        """``{field: name}`` of the functions that :meth:`from_dict` could not bring back."""
        values = {name: getattr(self, name) for name in _DEFAULTS}
        return {n: v.name for n, v in values.items() if isinstance(v, MissingFunction)}

    @classmethod
    def from_peft(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> AdaLoraConfig:
        """Reads a PEFT AdaLoRA config: a mapping, an ``adapter_config.json``, or its folder.

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
        return cls(**config_peft.read(source, fields))

    def to_peft(self) -> dict[str, Any]:
        """The keyword arguments of ``peft.AdaLoraConfig`` for this config, as plain JSON values.

        Without a ``task_type``, which has no counterpart here, PEFT leaves out the orthogonality
        term: add one there. The fields that PEFT does not have and that change the computation are
        refused unless they have the value that means PEFT's behaviour.

        >>> AdaLoraConfig(total_step=10, target_modules=["q"]).to_peft()["target_modules"]
        ['q']

        Raises:
          ValueError: a field is set to something that PEFT cannot do.
        """
        for name in (name for name in _DEFAULTS if name in _OURS and name != "scale"):
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
        if self.scale_given:
            result["lora_alpha"] = self.scale * self.init_r
        if self.rank_pattern is not None:
            result["rank_pattern"] = config_peft.written_pattern(self.rank_pattern)
        # PEFT's own spelling of the options that are refused here.
        return result | {"use_dora": False, "loftq_config": {}, "bias": "none"}


_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(AdaLoraConfig)
    if field.init and field.name not in _REFUSED
}
# The fields PEFT does not have and which change the computation; the defaults are its behaviour.
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
    "orth_reg_in_update",
    "forward_mode",
    "hold_mask",
    "revive",
}


def _refuse_foreign(config: AdaLoraConfig) -> None:
    if config.r is not None:
        raise ValueError(
            f"r={config.r!r} means nothing to AdaLoRA: set init_r, the rank at the start, and "
            "target_r, the average rank at the end."
        )
    if config.use_dora:
        raise ValueError(
            f"use_dora={config.use_dora!r}: AdaLoRA has no DoRA form; leave use_dora out."
        )
    if config.loftq_config:
        raise ValueError(
            f"loftq_config={config.loftq_config!r}: LoftQ needs its own initialisation, which the "
            "SVD form does not have; quantise the base model and leave loftq_config out."
        )
    config._set("use_dora", False)
    config._set("loftq_config", None)


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
