"""Tables and figure of the demo's results."""

from __future__ import annotations

import pathlib

import adalora_jax as adalora
from adalora_jax.demo.train import Run


def accuracy_table(runs: list[Run]) -> str:
    """Return a table with accuracy on test images of 5-9 and parameter counts per method."""
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
    """Return a table of AdaLoRA's final ranks per layer."""
    learner = _adaptive(runs).learner
    return adalora.summary(learner.trainable, adalora.allocator_state(learner.opt_state))


def save_picture(runs: list[Run], path: pathlib.Path) -> None:
    """Write a figure of the rank of every adapter over time to ``path``."""
    history = _adaptive(runs).history
    figure = adalora.plot.rank_history(
        [adalora.ranks(progress.masks) for progress in history],
        budget=[int(progress.budget) for progress in history if progress.budget is not None],
    )
    figure.savefig(path)


def _adaptive(runs: list[Run]) -> Run:
    return next(run for run in runs if run.method.adaptive)
