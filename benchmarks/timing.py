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
    """The median time of a call of each function in milliseconds.

    Each round calls every function once, so that what else the machine does slows all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if number >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


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


def save(script: str, results: Any, text: str) -> None:
    """Writes ``<script>.json`` and ``<script>.md`` beside the script, and prints the text."""
    place = pathlib.Path(script)
    results = {"machine": machine(), **results}
    place.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
