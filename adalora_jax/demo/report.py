"""Tables and picture of the demo's results."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import adalora_jax as adalora
from adalora_jax.demo.train import Run


def accuracy_table(runs: list[Run]) -> str:
    """Return a table with accuracy on test images of 5-9 and parameter counts per method."""
    header = ("digits 5-9", "test accuracy", "trained parameters", "after pruning")
    rows = [
        (run.method.title, f"{run.accuracy:.1%}", f"{run.trained:,}", f"{run.kept:,}")
        for run in runs
    ]
    return _table([header, *rows])


def rank_table(runs: list[Run]) -> str:
    """Return a table of AdaLoRA's final ranks: one row per block, one column per weight."""
    run = _adaptive(runs)
    ranks = _in_order(adalora.ranks(run.history[-1].masks), run)
    blocks: dict[str, list[int]] = {}
    for path, rank in ranks.items():
        blocks.setdefault(path.rpartition("/")[0], []).append(rank)
    header = ("final ranks", *_modules(run), "sum")
    return _table([header, *((block, *row, sum(row)) for block, row in blocks.items())])


def save_picture(runs: list[Run], path: pathlib.Path) -> None:
    """Write a figure of the rank of every adapter over time to ``path``."""
    run = _adaptive(runs)
    config: Any = run.method.config  # None only of methods without adapters
    history = run.history
    figure = adalora.plot.rank_history(
        [_in_order(adalora.ranks(progress.masks), run) for progress in history],
        budget=[int(progress.budget) for progress in history if progress.budget is not None],
        highest=config.init_r,
        title="Rank of each adapted weight of a Vision Transformer during training: "
        f"{config.init_r} → {config.target_r} on average",
    )
    curves = figure.axes[0]
    phases = {"warm-up": config.tinit, "pruning": config.final_step, "fixed": config.total_step}
    start = 0
    for name, end in phases.items():
        curves.axvline(end, color="gray", lw=1, ls=":")
        curves.text((start + end) / 2, 6, name, fontsize=10, ha="center", color="dimgray")
        start = end
    figure.suptitle("AdaLoRA moves rank to where training needs it", fontsize=15, weight="bold")
    figure.savefig(path, dpi=150)


def _modules(run: Run) -> list[str]:
    """Return the names of the adapted weights of a block, in the order in which they are used."""
    config: Any = run.method.config
    return list(config.target_modules)


def _in_order(ranks: Mapping[str, int], run: Run) -> dict[str, int]:
    """Sort ``{path: rank}`` by block, and within a block as :func:`_modules`."""
    order = _modules(run)

    def key(path: str) -> tuple[str, int]:
        block, _, module = path.rpartition("/")
        return block, order.index(module)

    return {path: ranks[path] for path in sorted(ranks, key=key)}


def _table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as aligned text, with the first column aligned left and the others right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = (
        "   ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))])
        for first, *rest in cells
    )
    return "\n".join(lines)


def _adaptive(runs: list[Run]) -> Run:
    return next(run for run in runs if run.method.adaptive)
