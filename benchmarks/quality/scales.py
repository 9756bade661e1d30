"""LoRA and AdaLoRA at several scales, each at the same range of learning rates.

    python -m benchmarks.quality.scales [--method lora-at-1 ...] [--seeds 3] [--rates 11]

Shows what a comparison of methods at one shared learning rate finds if their scales differ. The
task is ``topics`` of ``crossover`` with 300 examples at rank 1. The results are written after each
cell, and an interrupted run continues from them. The numbers are written to ``scales.json``, the
page to ``scales.md`` and the figure to ``scales.png``, in ``benchmarks`` or ``--out``; ``--render``
only makes the latter two from the first. Takes about half an hour on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import results
from benchmarks.quality import methods, options, sizes, study, tasks, train
from benchmarks.quality.paired import mean_and_deviation
from benchmarks.results import described, markdown, number

TASK, EXAMPLES, RANK = "topics", 300, 1
LOWEST = 0.0005  # the first learning rate
SHARED, OTHER = "lora-at-2", "adalora-at-0.125"  # as in PEFT's method comparison
PEFT = "https://github.com/huggingface/peft/tree/main/method_comparison"
COLOURS = {0.125: "tab:purple", 1: "tab:blue", 2: "tab:green", 5: "tab:orange"}

Lines = dict[str, Mapping[str, Any]]  # {method: record of its cell}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    known = methods.SCALES
    parser = options.parser("benchmarks.quality.scales", __doc__, known, seeds=3, rates=11)
    chosen = parser.parse_args(arguments)
    path = chosen.out / "scales.json"
    if chosen.render:
        return options.finish(path, text, picture)
    options.prepare([TASK], chosen)
    if chosen.prepare:
        return {}
    task = ranged(sizes.load(TASK, chosen.data, chosen.seeds)[EXAMPLES])
    task = tasks.shortened(task, 10) if chosen.quick else task
    about = sizes.about(task, TASK, EXAMPLES, chosen.data)
    about["base"] = round(frozen(task), 3)
    stated = {
        "study": {
            "seeds": chosen.seeds,
            "rates": chosen.rates,
            "python": tasks.python_of([TASK], chosen.data),
            "tasks": {task.name: about},
        },
        "machine": results.machine(),
    }
    cells = [study.Cell(task.name, method, RANK) for method in chosen.method or known]
    limits = {"seconds": chosen.budget_seconds, "threads": chosen.threads}
    _, failed = study.run(
        *({task.name: task}, cells, chosen.rates, path, stated), **limits, beyond=0, at_once=1
    )
    return options.finish(path, text, picture, failed)


def ranged(task: tasks.Task) -> tasks.Task:
    """Return the task at this rank, with the same first learning rate for all methods."""
    first = train.RATES.index(LOWEST) - train.RATES.index(1e-4)
    rates = {method.family: first - method.shift for method in methods.SCALES.values()}
    return task._replace(budgets=(RANK,), rates=rates)


def frozen(task: tasks.Task) -> float:
    """Return the mean validation score of the frozen base over the seeds."""
    apply = jax.jit(lambda x: task.module.apply(task.base, x))
    return float(np.mean([task.score(apply, rows) for rows in task.splits.validation]))


def lines(results: Mapping[str, Any]) -> Lines:
    """Return the records by method, in the order of ``methods.SCALES``."""
    (task,) = results["study"]["tasks"]
    found = {name: results["cells"].get(f"{task}/{name}/{RANK}") for name in methods.SCALES}
    return {name: record for name, record in found.items() if record}


def text(results: Mapping[str, Any]) -> str:
    """Return the complete page as Markdown."""
    study, found = results["study"], lines(results)
    (about,) = study["tasks"].values()
    parts = [
        "# LoRA and AdaLoRA at several scales and learning rates",
        f"[PEFT's method comparison]({PEFT}) trains AdaLoRA at scale 0.125 and LoRA at scale 2 "
        "with one learning rate, and reports 37.3 % and 47.8 %. This page repeats the comparison "
        "in small, over a range of learning rates.",
        f"- **Task**: {about['title']}, from {about['examples']:,} passages in {about['steps']} "
        f"steps, at rank {RANK}. AdaLoRA starts at twice the rank.\n"
        f"- **Score**: the mean bits per character of validation passages over {study['seeds']} "
        f"seeds; fewer are better. The frozen base has {about['base']:.3f}. Bold: the best "
        "learning rate of a row, with ‡ if it is the lowest or highest of the range. A dash: the "
        "score is not finite.\n"
        "- **Test**: bits per character of test passages at the best learning rate of the row, "
        "mean ± standard deviation over seeds.",
        "## Score by learning rate",
        _table(found),
        *filter(None, (_loss(found), _spread(found))),
        "## Machine",
        "\n".join(f"- {described(machine)}" for machine in results["machines"].values()),
        f"The texts are those of Python {study['python']}. Run "
        "`python -m benchmarks.quality.scales` to repeat the runs; the numbers are in the JSON "
        "file of the same name.",
    ]
    return "\n\n".join(parts)


def _table(found: Lines) -> str:
    rates = sorted({rate for record in found.values() for rate in record["rates"]})
    rows = [("method", *(f"{rate:g}" for rate in rates), "test")]
    for name, record in found.items():
        scores = scores_of(record)
        cells = [_score(scores.get(rate)) for rate in rates]
        best = rates.index(record["rate"])
        cells[best] = f"**{cells[best]}**" + (" ‡" if record["at an edge"] else "")
        mean, deviation = mean_and_deviation(record["test of seeds"])
        rows.append((methods.METHODS[name].title, *cells, f"{mean:.3f} ± {deviation:.3f}"))
    return markdown(rows)


def scores_of(record: Mapping[str, Any]) -> dict[float, float | None]:
    """Return ``{learning rate: mean validation score}``, None where a run diverged."""
    return dict(zip(record["rates"], record["validation"]))


def _score(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.3f}" if value < 100 else number(value)


def _loss(found: Lines) -> str:
    """Return what a comparison at one shared learning rate finds, and one at tuned rates."""
    if SHARED not in found or OTHER not in found:
        return ""
    ours, theirs = scores_of(found[OTHER]), scores_of(found[SHARED])
    rate, own = found[SHARED]["rate"], found[OTHER]["rate"]
    best, tuned, shared = theirs[rate], ours[own], ours.get(rate)
    if best is None or tuned is None:
        return ""
    there = (
        f"At the learning rate that is best for LoRA at scale 2, {rate:g}, LoRA at scale 2 has "
        f"{best:.3f} bits per character, and AdaLoRA at scale 0.125 "
        f"{'diverges' if shared is None else f'has {_compared(shared, best)}'}."
    )
    if own == rate:
        return f"{there} This rate is the best for both."
    return f"{there} At its own best rate, {own:g}, AdaLoRA at scale 0.125 has " + (
        f"{_compared(tuned, best)}."
    )


def _compared(score: float, other: float) -> str:
    difference = round(round(score, 3) - round(other, 3), 3)
    words = f"{abs(difference):.3f} {'more' if difference > 0 else 'less'}"
    return f"{_score(score)}, {words if difference else 'the same'}"


def _spread(found: Lines) -> str:
    """Return how much the scale matters to each method if its learning rate is tuned."""
    parts = []
    for family, title in (("lora", "LoRA"), ("adalora", "AdaLoRA")):
        best = [
            scores_of(record)[record["rate"]]
            for name, record in found.items()
            if methods.METHODS[name].family == family
        ]
        best = [score for score in best if score is not None]
        if len(best) > 1:
            parts.append(f"{max(best) - min(best):.3f} for {title}")
    if not parts:
        return ""
    return f"With tuned rates, the scales of a method differ by at most {' and '.join(parts)}."


def picture(results: Mapping[str, Any]) -> Any:
    """Draw the scores over the learning rate, a panel per method. Needs Matplotlib."""
    from matplotlib.figure import Figure

    found = lines(results)
    (about,) = results["study"]["tasks"].values()
    base = about["base"]
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (family, title) in zip(panels, (("lora", "LoRA"), ("adalora", "AdaLoRA"))):
        axes.axhline(base, color="gray", lw=1, ls="--", label="frozen base")
        if SHARED in found:
            rate = found[SHARED]["rate"]
            axes.axvline(rate, color="gray", lw=1, ls=":", label="best rate of LoRA at scale 2")
        for name, record in found.items():
            if methods.METHODS[name].family != family:
                continue
            scale = methods.METHODS[name].config["scale"]
            scores = {
                rate: float("nan") if score is None else score
                for rate, score in scores_of(record).items()
            }
            colour = COLOURS[scale]
            axes.plot(*zip(*scores.items()), "o-", ms=3.5, color=colour, label=f"scale {scale:g}")
            best = record["rate"]
            axes.plot(best, scores[best], "*", ms=13, color=colour, mec="white")
        axes.set_xscale("log")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("learning rate")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("bits per character of validation passages")
    # Scores far above the frozen base, of runs that diverge, are outside of the picture.
    seen = [v for record in found.values() for v in record["validation"] if v is not None]
    low = min(seen, default=base)
    span = abs(base - low) or 1.0
    panels[0].set_ylim(low - 0.1 * span, max(low, base) + 0.4 * span)
    figure.suptitle("Score over the learning rate: mean over seeds; lower is better; ★: best")
    labelled: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles))
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=6, frameon=False
    )
    return figure


if __name__ == "__main__":
    main()
