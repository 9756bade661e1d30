"""Utilities of the benchmarks: interleaved timing, description of the machine, result files."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, float]:
    """Return the median milliseconds per call of each function."""
    return medians(in_rounds(functions, rounds, warm_up))


def in_rounds(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Return the milliseconds of each function's call in each round.

    Each round calls every function once, so that other load on the machine slows all of them.
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


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores, the device, and the JAX and Python versions."""
    names = [platform.processor() or platform.machine()]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0],
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table whose first row is the header."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join('---' for _ in rows[0])} |", *lines[1:]])


def judged(target: str, measured: float, limit: float) -> dict[str, Any]:
    """Return a target and whether it was reached: the measured value is at most the limit."""
    reached = round(measured, 2) <= limit
    return {"target": target, "measured": measured, "limit": limit, "reached": reached}


def judgements(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the results of :func:`judged`."""
    rows = [("target", "measured", "at most", "reached")]
    for row in found:
        numbers = (f"{row[column]:.2f}" for column in ("measured", "limit"))
        rows.append((row["target"], *numbers, "yes" if row["reached"] else "**no**"))
    return markdown(rows)


def place(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of the results, ``folder/name.json``; with the backend if it is not "cpu"."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = jax.default_backend()
    return folder / f"{name if kind == 'cpu' else f'{name}-{kind}'}.json"


def save(script: str | pathlib.Path, results: Any, text: str) -> None:
    """Write ``<script>.json`` and ``<script>.md`` next to the script, and print the text."""
    place = pathlib.Path(script)
    results = {"machine": machine(), **results}
    place.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
