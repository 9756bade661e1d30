"""What the benchmarks share: interleaved timing, the machine in words, results as files."""

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
    """The median time of a call of each function in milliseconds."""
    return medians(in_rounds(functions, rounds, warm_up))


def in_rounds(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """The milliseconds of a call of each function, in each round.

    Each round calls every function once, so that what else the machine does slows all alike.
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
    """The median over the rounds of how many times as long one took as the other."""
    return statistics.median(a / b for a, b in zip(of, to))


def machine() -> dict[str, Any]:
    """The processor, how many of its cores there are, and the versions that matter."""
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
    """A table whose first row is its header."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join('---' for _ in rows[0])} |", *lines[1:]])


def judged(target: str, measured: float, limit: float) -> dict[str, Any]:
    """A target, and whether it was reached: what was measured is to be at most the limit."""
    reached = round(measured, 2) <= limit
    return {"target": target, "measured": measured, "limit": limit, "reached": reached}


def judgements(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of what :func:`judged` gave."""
    rows = [("target", "measured", "at most", "reached")]
    for row in found:
        numbers = (f"{row[column]:.2f}" for column in ("measured", "limit"))
        rows.append((row["target"], *numbers, "yes" if row["reached"] else "**no**"))
    return markdown(rows)


def place(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where results go: ``folder/name``, with the kind of device where that is no CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = jax.default_backend()
    return folder / f"{name if kind == 'cpu' else f'{name}-{kind}'}.json"


def save(script: str | pathlib.Path, results: Any, text: str) -> None:
    """Writes ``<script>.json`` and ``<script>.md`` beside the script, and prints the text."""
    place = pathlib.Path(script)
    results = {"machine": machine(), **results}
    place.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
