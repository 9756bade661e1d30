"""What the commands of the studies share: options, the files of the tasks, and the result files."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks import results
from benchmarks.quality import study

HERE = pathlib.Path(__file__).parent


def parser(
    program: str, document: str | None, methods: Iterable[str], *, seeds: int, rates: int
) -> argparse.ArgumentParser:
    """Return a parser with the common options.

    Args:
      program: the module that is run.
      document: its docstring, whose first line is the description.
      methods: the values of ``--method``.
      seeds: the default number of seeds.
      rates: the default number of learning rates.
    """
    found = argparse.ArgumentParser(
        prog=f"python -m {program}", description=str(document).partition("\n")[0]
    )
    option = found.add_argument
    option("--method", nargs="+", choices=tuple(methods), help="run only these methods")
    option("--seeds", type=int, default=seeds, help="number of seeds")
    option("--rates", type=int, default=rates, help="number of learning rates per cell")
    option("--quick", action="store_true", help="run a few steps only, as a smoke test")
    option("--budget-seconds", type=float, default=study.FOREVER, help="start no cell after that")
    option("--threads", type=int, help="number of cells to compile in parallel; default: cores")
    option("--prepare", action="store_true", help="only make the files of the tasks")
    option("--render", action="store_true", help="only write page and picture of the results")
    option("--data", type=pathlib.Path, default=HERE / ".data", help="folder of the tasks' files")
    option("--out", type=pathlib.Path, default=HERE.parent, help="folder for the results")
    return found


def prepare(names: Iterable[str], chosen: argparse.Namespace) -> None:
    """Make the files of these tasks that do not exist."""
    for name in names:
        if not (chosen.data / f"{name}.npz").exists():
            from benchmarks.quality import prepare  # imports packages that training does not need

            prepare.prepare(name, chosen.data, 5 if chosen.quick else None)


def finish(
    path: pathlib.Path, text: results.Text, picture: results.Picture, failed: Iterable[str] = ()
) -> dict[str, Any]:
    """Write the page and the picture of a file of results, and return its contents.

    If no cell was completed, there is no file, and the contents are empty. If cells failed, exit
    with their keys.
    """
    contents = {}
    if path.exists():
        try:
            results.render(path, text, picture)
        except ModuleNotFoundError as error:
            print(f"{error.name} is missing: draw the picture later, by --render.", file=sys.stderr)
        print(f"The page is {path.with_suffix('.md')}.", file=sys.stderr)
        contents = json.loads(path.read_text("utf-8"))
    if failed := list(failed):
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")
    return contents
