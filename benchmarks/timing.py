"""Interleaved timing, in which other load on the machine slows all candidates alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def in_rounds(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Return the milliseconds of each function's call in each round.

    Each round calls every function once.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if number >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio ``of / to``."""
    return statistics.median(a / b for a, b in zip(of, to))
