"""All cells in turn: compiled side by side, run one by one, each kept as soon as it is there."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.quality import methods, train
from benchmarks.quality.tasks import Task

FOREVER = 1e7  # seconds
_TRACING = threading.Lock()  # Python does one at a time anyway, and the first is wanted first


class Cell(NamedTuple):
    """A method on a task at a budget."""

    task: str
    method: str
    rank: int

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/{self.rank}"


def cells(tasks: Mapping[str, Task], names: Iterable[str] | None = None) -> list[Cell]:
    """What there is to run, by what matters most: first every method at the smallest budget."""
    chosen = methods.METHODS if names is None else dict.fromkeys(names)
    groups = [methods.BASELINES, methods.IMPROVEMENTS, methods.ABLATIONS]
    ordered = [name for group in groups for name in group if name in chosen]
    main = [
        Cell(name, method, task.ranks[0])
        for group in groups
        for name, task in tasks.items()
        for method in group
        if method in ordered
    ]
    others = [
        Cell(name, method, rank)
        for name, task in tasks.items()
        for rank in task.ranks[1:]
        for method in ordered
        if not methods.METHODS[method].only_main
    ]
    return main + others


def choose(validation: np.ndarray, sign: int) -> int:
    """Which learning rate is best on average over the seeds, by validation alone.

    Args:
      validation: ``[seeds, rates]``. A rate with which a run diverged is never the best.
      sign: 1 if more is better, -1 if less is.
    """
    means = sign * np.asarray(validation, float).mean(axis=0)
    return int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))


def record(outcome: train.Outcome, rates: Sequence[float], sign: int) -> dict[str, Any]:
    """What is kept of a cell. Of the test scores, those at the chosen rate alone."""
    best = choose(outcome.validation, sign)
    return {
        "rates": list(rates),
        "validation": _rounded(outcome.validation.mean(axis=0)),
        "rate": rates[best],
        "at an edge": best in (0, len(rates) - 1),
        "validation of seeds": _rounded(outcome.validation[:, best]),
        "test of seeds": _rounded(outcome.test[:, best]),
        "triplets": _rounded(outcome.triplets[:, best]),
        "parameters": round(float(outcome.parameters[:, best].mean())),
    }


def run(
    tasks: Mapping[str, Task],
    wanted: Sequence[Cell],
    count: int,
    path: pathlib.Path,
    about: Mapping[str, Any],
    seconds: float = FOREVER,
    threads: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Runs the cells that are not in the file, and writes it after each of them.

    Args:
      tasks: by name.
      wanted: in the order in which they are run.
      count: of learning rates.
      path: the file. If it is there, it is gone on with.
      about: what else is in the file; it must be the same as before.
      seconds: after so many no further cell is begun.
      threads: that compile at a time.

    Returns:
      What is in the file then, and which cells failed.

    Raises:
      ValueError: the file has results of another study.
    """
    started = time.perf_counter()
    results = _resumed(path, about)
    left = [cell for cell in wanted if cell.key not in results["cells"]]
    print(f"{len(wanted)} cells, of which {len(wanted) - len(left)} are there.", file=sys.stderr)
    stop, failed = threading.Event(), []
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    programs = {c: pool.submit(_compile, tasks[c.task], c, count, stop) for c in left}
    try:
        for number, cell in enumerate(left, 1):
            spent = time.perf_counter() - started
            try:
                program, took = programs.pop(cell).result(max(0.0, seconds - spent))
                found = _run(tasks[cell.task], cell, count, program, took)
            except TimeoutError:
                print(f"Stopped after {seconds:g} s, before {cell.key}.", file=sys.stderr)
                break
            except Exception as error:  # the others can do without it; the caller is told
                failed.append(cell.key)
                print(f"{cell.key} failed: {str(error)[:500]}", file=sys.stderr)
                continue
            results["cells"][cell.key] = found
            _write(path, results)
            spent = time.perf_counter() - started
            print(f"{spent:5.0f} s  {number}/{len(left)}  {_line(cell, found)}", file=sys.stderr)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return results, failed


def _compile(task: Task, cell: Cell, count: int, stop: threading.Event) -> tuple[Any, Any]:
    """The program, and the seconds that it took."""
    with _TRACING:
        if stop.is_set():
            raise CancelledError
        start = time.perf_counter()
        lowered = train.lowered(task, methods.METHODS[cell.method], cell.rank, count)
        traced = time.perf_counter()
    program = lowered.compile()
    return program, {"trace": traced - start, "compile": time.perf_counter() - traced}


def _run(
    task: Task, cell: Cell, count: int, program: Any, took: dict[str, float]
) -> dict[str, Any]:
    method = methods.METHODS[cell.method]
    start = time.perf_counter()
    outcome = jax.device_get(program(*train.arguments(task, method, count)))
    found = record(outcome, train.rates(task, method, count), task.sign)
    seconds = {**took, "run": time.perf_counter() - start}
    return found | {"seconds": {name: round(value, 1) for name, value in seconds.items()}}


def _line(cell: Cell, found: Mapping[str, Any]) -> str:
    seconds = found["seconds"]
    edge = " (edge)" if found["at an edge"] else ""
    return (
        f"{cell.key}: test {np.mean(found['test of seeds']):.2f} at {found['rate']:g}{edge}, "
        + ", ".join(f"{name} {value:g} s" for name, value in seconds.items())
    )


def _resumed(path: pathlib.Path, about: Mapping[str, Any]) -> dict[str, Any]:
    fresh = json.loads(json.dumps({**about, "cells": {}}))  # as it comes out of a file
    if not path.exists():
        return fresh
    results = json.loads(path.read_text("utf-8"))
    before, now = results["study"], fresh["study"]
    if changed := [key for key in now if before[key] != now[key]]:
        raise ValueError(
            f"{path} is of a study with other {' and '.join(changed)}: give another --out, or "
            "remove the file."
        )
    return results


def _write(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """All of it or nothing: a run that is killed leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {key: value for key, value in results.items() if key != "cells"}
    cells = [
        f"  {json.dumps(key)}: {json.dumps(results['cells'][key])}"
        for key in sorted(results["cells"])
    ]
    text = json.dumps(rest, indent=1).removesuffix("\n}")
    text += ',\n "cells": {\n' + ",\n".join(cells) + "\n }\n}\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _rounded(values: np.ndarray) -> list[float | None]:
    """None for what diverged."""
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]
