"""The rank of some layers: where it starts and its limits, by pattern."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from adalora_jax.checks import integer


@dataclasses.dataclass(frozen=True)
class RankSpec:
    """The rank of some layers: where it starts, its limits, and alpha. None leaves the default.

    Raises:
      ValueError: a value that cannot work, with its name.

    >>> RankSpec(init_r=8, min_r=2)
    RankSpec(init_r=8, min_r=2, max_r=None, alpha=None)
    """

    init_r: Any = None  # triplets of each matrix at the start; the config's init_r
    min_r: Any = None  # pruning leaves each matrix at least so many; 0
    max_r: Any = None  # and, once it has begun, at most so many; init_r
    alpha: Any = None  # these increments are scaled by alpha / init_r; lora_alpha

    def __post_init__(self) -> None:
        for name, minimum in (("init_r", 1), ("min_r", 0), ("max_r", 0)):
            if getattr(self, name) is not None:
                number = integer(name, getattr(self, name), minimum=minimum)
                object.__setattr__(self, name, number)
        if self.alpha is not None and not _is_finite(self.alpha):
            raise ValueError(f"alpha={self.alpha!r} must be a finite number.")
        bounds = [(name, getattr(self, name)) for name in ("min_r", "max_r", "init_r")]
        bounds = [(name, value) for name, value in bounds if value is not None]
        for (low, least), (high, most) in itertools.pairwise(bounds):
            if least > most:
                raise ValueError(f"{low}={least} is above {high}={most}: lower it or raise {high}.")


def parse(value: Any, init_r: int) -> tuple[tuple[str, RankSpec], ...] | None:
    """``{pattern: RankSpec, its fields as a dict, or init_r}`` in a hashable form, in its order.

    Args:
      value: the mapping, or its pairs.
      init_r: of the layers whose pattern has none; the limits must not be above it.

    Raises:
      ValueError: naming the pattern and what is wrong with it.

    >>> parse({"query": 8}, init_r=12)
    (('query', RankSpec(init_r=8, min_r=None, max_r=None, alpha=None)),)
    """
    if value is None:
        return None
    try:
        pairs = [(re.compile(pattern).pattern, spec) for pattern, spec in dict(value).items()]
    except (TypeError, ValueError, re.error):
        raise ValueError(
            f"rank_limits={value!r} must map regexes or names of layers to a RankSpec, a dict of "
            "its fields, or init_r alone."
        ) from None
    return tuple((pattern, _as_spec(pattern, spec, init_r)) for pattern, spec in pairs)


def find(limits: Iterable[tuple[str, RankSpec]], path: str) -> RankSpec:
    """The first spec whose pattern matches the path, or its end at a separator.

    >>> find((("query", RankSpec(init_r=8)),), "layers/0/query").init_r
    8
    """
    return next((spec for pattern, spec in limits if matches(pattern, path)), RankSpec())


def matches(pattern: str, path: str) -> bool:
    """Whether a regex is that of the path, or of its end at a separator.

    >>> matches("query", "layers/0/query"), matches("query", "layers/0/subquery")
    (True, False)
    """
    forms = path.replace(".", "/"), path.replace("/", ".")
    return any(re.fullmatch(rf"(?:.*[/.])?(?:{pattern})", form) for form in forms)


def _as_spec(pattern: str, value: Any, init_r: int) -> RankSpec:
    try:
        if not isinstance(value, RankSpec):
            value = RankSpec(**value) if isinstance(value, Mapping) else RankSpec(init_r=value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rank_limits[{pattern!r}]={value!r}: {error}") from None
    for name in ("min_r", "max_r") if value.init_r is None else ():
        limit = getattr(value, name)
        if limit is not None and limit > init_r:
            raise ValueError(
                f"rank_limits[{pattern!r}]: {name}={limit} is above init_r={init_r}, the rank such "
                f"a layer starts with: lower it, or give the pattern an init_r of {limit} or more."
            )
    return value


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(value)
    except TypeError:
        return False
