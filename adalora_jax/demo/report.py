"""What the demo prints and draws at the end."""

from __future__ import annotations

import pathlib

import adalora_jax as adalora
from adalora_jax.demo.train import Run


def accuracy_table(runs: list[Run]) -> str:
    """One row a method: how well it reads test images of 5-9, and how much it trained for it."""
    rows = [("digits 5-9", "test accuracy", "parameters trained", "left at the end")]
    rows += [
        (run.method.title, f"{run.accuracy:.1%}", f"{run.trained:,}", f"{run.kept:,}")
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def rank_table(runs: list[Run]) -> str:
    """The ranks AdaLoRA arrived at, layer by layer."""
    learner = _adaptive(runs).learner
    return adalora.summary(learner.trainable, adalora.allocator_state(learner.opt_state))


def save_picture(runs: list[Run], path: pathlib.Path) -> None:
    """Draws the rank of every adapter over time."""
    history = _adaptive(runs).history
    figure = adalora.plot.rank_history(
        [adalora.ranks(progress.masks) for progress in history],
        budget=[int(progress.budget) for progress in history if progress.budget is not None],
    )
    figure.savefig(path)


def _adaptive(runs: list[Run]) -> Run:
    return next(run for run in runs if run.method.adaptive)
