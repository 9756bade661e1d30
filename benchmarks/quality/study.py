"""Execution of the cells: compiled in parallel, run in sequence, and saved one by one."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.quality import methods, train
from benchmarks.quality.tasks import Task

FOREVER = 1e7  # seconds
_TRACING = threading.Lock()  # the GIL serialises tracing; in turn, the first cell is ready sooner


class Cell(NamedTuple):
    """Method on a task at a budget."""

    task: str
    method: str
    budget: int | str

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/{self.budget}"


def cells(tasks: Mapping[str, Task], names: Iterable[str] | None = None) -> list[Cell]:
    """Return the cells by priority: all methods at the first budget, then the other budgets."""
    groups = [methods.BASELINES, methods.IMPROVEMENTS, methods.ABLATIONS]
    chosen = {name for group in groups for name in group} if names is None else set(names)
    groups.append(methods.CANDIDATES)  # only run if asked for
    ordered = [name for group in groups for name in group if name in chosen]
    main = [
        Cell(name, method, task.budgets[0])
        for group in groups
        for name, task in tasks.items()
        for method in group
        if method in ordered
    ]
    others = [
        Cell(name, method, budget)
        for name, task in tasks.items()
        for budget in task.budgets[1:]
        for method in ordered
        if not methods.METHODS[method].only_main
    ]
    return main + others


def choose(validation: np.ndarray, sign: int) -> int:
    """Return the index of the learning rate with the best mean validation score over the seeds.

    Args:
      validation: ``[seeds, rates]``; a rate at which a run diverged is never the best.
      sign: 1 if higher scores are better, -1 if lower ones are.
    """
    means = sign * np.asarray(validation, float).mean(axis=0)
    return int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))


def record(outcome: train.Outcome, rates: Sequence[float], sign: int) -> dict[str, Any]:
    """Return the record of a cell, with the test scores at the chosen rate only."""
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


def joined(one: Mapping[str, Any], other: Mapping[str, Any], sign: int) -> dict[str, Any]:
    """Merge two records of one cell at different learning rates; keep the better one's scores."""
    found = dict(
        sorted(zip(one["rates"] + other["rates"], one["validation"] + other["validation"]))
    )
    best = max((one, other), key=lambda record: _goodness(found[record["rate"]], sign))
    return {
        **best,
        "rates": list(found),
        "validation": list(found.values()),
        "at an edge": best["rate"] in (min(found), max(found)),
    }


def _goodness(validation: float | None, sign: int) -> float:
    return -math.inf if validation is None else sign * validation


def run(
    tasks: Mapping[str, Task],
    wanted: Sequence[Cell],
    count: int,
    path: pathlib.Path,
    about: Mapping[str, Any],
    seconds: float = FOREVER,
    threads: int | None = None,
    near: int | None = None,
    beyond: int = 2,
    at_once: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Run the cells that are not in the file, and write the file after each of them.

    Then extend, twice, the cells whose best learning rate is the lowest or the highest tried.

    Args:
      tasks: ``{name: task}``.
      wanted: the cells, in the order in which to run them.
      count: the number of learning rates.
      path: the file of the results. If it exists, the study continues from it.
      about: the study, which must be the same as in the file, and the machine.
      seconds: the time after which no further cell is started.
      threads: the number of threads that compile; by default the number of cores.
      near: if given, the number of rates around the best rate of a related cell at the first
        budget: for other budgets that of the method, for ablations and options that of AdaLoRA or
        LoRA. Without the related cell, all ``count`` rates are run.
      beyond: the number of rates by which cells are extended.
      at_once: the number of runs of a cell in parallel; all of them if None.

    Returns:
      The contents of the file, and the keys of the cells that failed.

    Raises:
      ValueError: the file contains results of another study.
    """
    results = _resumed(path, about)
    known, machine = results["cells"], about["machine"]
    end = time.perf_counter() + seconds

    def first(cell):
        task, method = tasks[cell.task], methods.METHODS[cell.method]
        main = task.budgets[0]
        option = cell.budget == main and cell.method not in methods.BASELINES
        other = cell._replace(method=method.family if option else cell.method, budget=main)
        if near and other != cell and other.key in known:
            return train.around(known[other.key]["rate"], near)
        return train.rates(task, method, 1 if method.form == "frozen" else count)

    def more(cell):
        record = known[cell.key]
        if len(record["rates"]) > len(first(cell)) + beyond:
            return []  # extended twice
        return train.beyond(record["rates"], record["rate"], beyond)

    def keep(cell, found):
        before = known.get(cell.key)
        found |= {"device": machine["device"]}
        known[cell.key] = joined(before, found, tasks[cell.task].sign) if before else found
        results["machines"][machine["device"]] = machine
        _write(path, results)

    left = [cell for cell in wanted if cell.key not in known]
    print(f"{len(wanted)} cells, {len(wanted) - len(left)} of them done before.", file=sys.stderr)
    jobs = [(cell, first(cell)) for cell in left]
    failed = _in_turn(tasks, jobs, keep, end, threads, at_once)
    for _ in range(2 if time.perf_counter() < end else 0):
        done = [cell for cell in wanted if cell.key in known and cell.method != "frozen"]
        jobs = [(cell, rates) for cell in done if cell.key not in failed and (rates := more(cell))]
        failed += _in_turn(tasks, jobs, keep, end, threads, at_once)
    return results, failed


def _in_turn(
    tasks: Mapping[str, Task],
    jobs: Sequence[tuple[Cell, list[float]]],
    keep: Callable[[Cell, dict[str, Any]], None],
    end: float,
    threads: int | None,
    at_once: int | None,
) -> list[str]:
    """Run cells at these learning rates, pass each record to ``keep``, and return failed cells."""
    started = time.perf_counter()
    stop, failed = threading.Event(), []
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    programs = [
        pool.submit(_compile, tasks[cell.task], cell, len(rates), at_once, stop)
        for cell, rates in jobs
    ]
    try:
        for number, (cell, rates) in enumerate(jobs, 1):
            try:
                left = max(0.0, end - time.perf_counter())
                program, took = programs[number - 1].result(left)
                programs[number - 1] = None  # frees the program's memory
                found = _run(tasks[cell.task], rates, program, took)
            except TimeoutError:
                print(f"Time is up: stopped before {cell.key}.", file=sys.stderr)
                break
            except Exception as error:  # does not affect other cells; reported to the caller
                failed.append(cell.key)
                print(f"{cell.key} failed: {str(error)[:500]}", file=sys.stderr)
                continue
            keep(cell, found)
            spent = time.perf_counter() - started
            print(f"{spent:5.0f} s  {number}/{len(jobs)}  {_line(cell, found)}", file=sys.stderr)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return failed


def _compile(
    task: Task, cell: Cell, count: int, at_once: int | None, stop: threading.Event
) -> tuple[Any, Any]:
    """Return the compiled program, and the seconds to trace and to compile it."""
    with _TRACING:
        if stop.is_set():
            raise CancelledError
        start = time.perf_counter()
        lowered = train.lowered(task, methods.METHODS[cell.method], cell.budget, count, at_once)
        traced = time.perf_counter()
    program = lowered.compile()
    return program, {"trace": traced - start, "compile": time.perf_counter() - traced}


def _run(task: Task, rates: list[float], program: Any, took: dict[str, float]) -> dict[str, Any]:
    start = time.perf_counter()
    outcome = jax.device_get(program(*train.arguments(task, rates)))
    found = record(outcome, rates, task.sign)
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
    about = {"study": about["study"], "machines": {}, "cells": {}}
    fresh = json.loads(json.dumps(about))  # the types that a file returns
    if not path.exists():
        return fresh
    results = json.loads(path.read_text("utf-8"))
    before, now = results["study"], fresh["study"]
    # The file may contain other tasks than this run, but common tasks must be the same.
    tasks = [study.get("tasks", {}) for study in (before, now)]
    before, now = before | {"tasks": tasks[1] | tasks[0]}, now | {"tasks": tasks[0] | tasks[1]}
    if changed := [key for key in now if before[key] != now[key]]:
        raise ValueError(
            f"{path} is of a study with other {' and '.join(changed)}: give another --out, or "
            "remove the file."
        )
    return {**results, "study": now}


def _write(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Write the file atomically: if the run is killed, the previous file remains."""
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
    """Round to four digits, with None for runs that diverged."""
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]
