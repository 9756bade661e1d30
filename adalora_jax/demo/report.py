"""What the demo prints and draws at the end."""

from __future__ import annotations

import pathlib

import adalora_jax as adalora
from adalora_jax import plot
from adalora_jax.compaction import table
from adalora_jax.demo.train import Run


def accuracy_table(runs: list[Run]) -> str:
    """One row a method: how well it reads test images of 5-9, and how much it trained for it."""
    rows = [("digits 5-9", "test accuracy", "parameters trained", "left at the end")]
    rows += [
        (run.method.title, f"{run.accuracy:.1%}", f"{run.trained:,}", f"{run.kept:,}")
        for run in runs
    ]
    return table(rows)


def rank_table(runs: list[Run]) -> str:
    """The ranks AdaLoRA arrived at, layer by layer."""
    learner = _adaptive(runs).learner
    return adalora.summary(learner.trainable, adalora.allocator_state(learner.opt_state))


def save_picture(runs: list[Run], path: pathlib.Path) -> None:
    """Draws the rank of every adapter over time."""
    history = _adaptive(runs).history
    figure = plot.rank_history(
        [adalora.ranks(progress.masks) for progress in history],
        budget=[int(progress.budget) for progress in history if progress.budget is not None],
    )
    figure.savefig(path)


def _adaptive(runs: list[Run]) -> Run:
    return next(run for run in runs if run.method.adaptive)
