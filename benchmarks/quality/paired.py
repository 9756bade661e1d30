"""Paired tests over a small number of seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

_EXACT = 16  # maximum number of pairs; all 2ⁿ sign changes are enumerated


def sign_flip(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided p-value of paired values by the exact sign-flip permutation test.

    Under the null hypothesis the sign of each difference is random. p is the share of all 2ⁿ
    choices of signs whose mean is at least as far from 0 as the observed mean. The smallest
    possible p is 2 / 2ⁿ, which requires that all differences have the same sign.

    Raises:
      ValueError: there are no pairs or too many, or a difference is not finite.

    >>> sign_flip([2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    0.0625
    """
    first, second = np.asarray(a, float), np.asarray(b, float)
    if first.shape != second.shape or first.ndim != 1 or not 0 < len(first) <= _EXACT:
        shapes = f"{first.shape} and {second.shape}"
        raise ValueError(f"there must be 1 to {_EXACT} pairs, not values of shapes {shapes}.")
    difference = first - second
    if not np.isfinite(difference.sum()):
        raise ValueError(f"all differences must be finite, not {difference.tolist()}.")
    signs = 1 - 2 * (np.arange(2 ** len(difference))[:, None] >> np.arange(len(difference)) & 1)
    means = np.abs(signs @ difference)
    return float(np.mean(means >= abs(difference.sum()) - 1e-9 * means.max()))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values, corrected for multiple comparisons by Holm's step-down method.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a sample."""
    mean = sum(values) / len(values)
    rest = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(rest / (len(values) - 1)) if len(values) > 1 else 0.0
