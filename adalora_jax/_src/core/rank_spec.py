"""Initial rank, rank limits and alpha of the layers that match a pattern."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from adalora_jax._src.core import checks


@dataclasses.dataclass(frozen=True)
class RankSpec:
    """Initial rank, rank limits and alpha of some layers; None selects the default.

    Attributes:
      init_r: int ≥ 1 or None: triplets per matrix at the start. None: the ``init_r`` of the config.
      min_r: int ≥ 0 or None: every mask keeps at least this many triplets of each matrix. None: 0.
      max_r: int ≥ 0 or None: every mask keeps at most this many triplets of each matrix. None:
        ``init_r``.
      alpha: finite number or None: the increments of these layers are scaled by
        ``alpha / init_r``, or by 1 where it is not above 0. None: the scale or alpha of the config.

    Raises:
      ValueError: a value is invalid, or ``min_r ≤ max_r ≤ init_r`` does not hold for the values
        that are not None; the message has the names and values.

    >>> RankSpec(init_r=8, min_r=2)
    RankSpec(init_r=8, min_r=2, max_r=None, alpha=None)
    """

    init_r: int | None = None
    min_r: int | None = None
    max_r: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("init_r", 1), ("min_r", 0), ("max_r", 0)):
            if getattr(self, name) is not None:
                number = checks.integer(name, getattr(self, name), minimum=minimum)
                object.__setattr__(self, name, number)
        if self.alpha is not None:
            alpha = checks.number("alpha", self.alpha, "a finite number", math.isfinite)
            object.__setattr__(self, "alpha", alpha)
        bounds = [(name, getattr(self, name)) for name in ("min_r", "max_r", "init_r")]
        bounds = [(name, value) for name, value in bounds if value is not None]
        for (low, least), (high, most) in itertools.pairwise(bounds):
            if least > most:
                raise ValueError(
                    f"`{low}={least}`: is above {high}={most}; lower it or raise {high}."
                )


class LayerRank(NamedTuple):
    """Rank of one layer: a :class:`RankSpec` with the defaults filled in.

    Attributes:
      init_r: int: triplets per matrix at the start.
      min_r: int: the fewest triplets per matrix that a mask keeps.
      max_r: int: the most triplets per matrix that a mask keeps.
      alpha: float: numerator of the scale ``alpha / init_r``.
    """

    init_r: int
    min_r: int
    max_r: int
    alpha: float


def parse(
    value: Mapping[str, Any] | Iterable[tuple[str, Any]] | None, init_r: int
) -> tuple[tuple[str, RankSpec], ...] | None:
    """Return ``rank_overrides`` as pairs of pattern and :class:`RankSpec`, in the given order.

    Args:
      value: a mapping from pattern to a :class:`RankSpec`, a dict of its fields, or an ``init_r``;
        or the pairs of such a mapping; or None, which is returned.
      init_r: initial rank for the patterns that have none; their limits must not exceed it.

    Raises:
      ValueError: an entry is invalid; the message has the pattern and the reason.

    >>> parse({"query": 8}, init_r=12)
    (('query', RankSpec(init_r=8, min_r=None, max_r=None, alpha=None)),)
    """
    if value is None:
        return None
    try:
        entries = value.items() if isinstance(value, Mapping) else value
        pairs = [(str.__str__(cast("str", pattern)), spec) for pattern, spec in entries]
    except (TypeError, ValueError):
        raise ValueError(
            f"`rank_overrides={value!r}`: must map regexes or names of layers to a RankSpec, a "
            "dict of its fields, or init_r alone; pass a dict such as {'query': 8}."
        ) from None
    return tuple(
        (checks.regex("rank_overrides", pattern), _as_spec(pattern, spec, init_r))
        for pattern, spec in pairs
    )


def find(limits: Iterable[tuple[str, RankSpec]], path: str) -> RankSpec:
    """Return the first spec whose pattern :func:`matches` the path, or else ``RankSpec()``.

    >>> find((("query", RankSpec(init_r=8)),), "layers/0/query").init_r
    8
    """
    return next((spec for pattern, spec in limits if matches(pattern, path)), RankSpec())


def matches(pattern: str, path: str) -> bool:
    """Return whether a regex matches the whole path or its end at a separator, ``/`` or ``.``.

    >>> matches("query", "layers/0/query"), matches("query", "layers/0/subquery")
    (True, False)
    """
    compiled = re.compile(pattern)
    return any(
        compiled.fullmatch(form, start)
        for form in (path, path.replace(".", "/"), path.replace("/", "."))
        for start in (0, *(i for i, letter in enumerate(form, 1) if letter in "/."))
    )


def _as_spec(pattern: str, value: RankSpec | Mapping[str, Any] | int, init_r: int) -> RankSpec:
    fields = [field.name for field in dataclasses.fields(RankSpec)]
    if isinstance(value, Mapping) and (unknown := set(value) - set(fields)):
        raise ValueError(
            f"`rank_overrides[{pattern!r}]={checks.shown(value)}`: has the "
            f"unknown fields {', '.join(sorted(map(repr, unknown)))}; use {', '.join(fields)}."
        )
    try:
        if not isinstance(value, RankSpec):
            value = RankSpec(**value) if isinstance(value, Mapping) else RankSpec(init_r=value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`rank_overrides[{pattern!r}]={checks.shown(value)}`: {error}") from None
    for name in ("min_r", "max_r") if value.init_r is None else ():
        limit = getattr(value, name)
        if limit is not None and limit > init_r:
            raise ValueError(
                f"`rank_overrides[{pattern!r}]`: {name}={limit} is above init_r={init_r}, the rank "
                f"such a layer starts with; lower it, or give the pattern an init_r of {limit} or "
                "more."
            )
    if value.alpha is not None:
        checks.scaling(f"rank_overrides[{pattern!r}].alpha", value.alpha, value.init_r or init_r)
    return value
