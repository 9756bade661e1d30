"""Tables and figure of the study, made from its results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.quality import methods
from benchmarks.quality.paired import holm, mean_and_deviation, sign_flip
from benchmarks.timing import markdown

LEVEL = 0.05
Cells = Mapping[str, Mapping[str, Any]]  # records of the study, by "task/method/budget"
# Methods in the figure; more of them would hide each other.
MARKS = {
    "full": ("black", "*"),
    "lora-x4": ("tab:blue", "o"),
    "lora-plus": ("tab:cyan", "s"),
    "svd-lora": ("tab:green", "^"),
    "pruned-lora": ("tab:gray", "v"),
    "adalora": ("tab:red", "D"),
    "orthonormal-lam10": ("tab:purple", "P"),
    "x4-lam10": ("tab:orange", "X"),
}


def text(results: Mapping[str, Any]) -> str:
    """Return the complete report as Markdown."""
    study = results["study"]
    parts = [_method(study)]
    for name, about in study["tasks"].items():
        found = {key: cell for key, cell in results["cells"].items() if key.startswith(f"{name}/")}
        if found:
            parts.append(f"**{about['title']}** ({about['measure']})")
            parts += _tables(name, about, found, study["rates"])
    parts.append("**Where AdaLoRA or LoRA with an option is ahead of LoRA**\n\n" + verdict(results))
    counts = Counter(cell["device"] for cell in results["cells"].values())
    machines = [_machine(machine, counts[name]) for name, machine in results["machines"].items()]
    parts.append(f"The standard library of Python {study['python']}. {'; '.join(machines)}.")
    return "\n\n".join(part for part in parts if part)


def _machine(machine: Mapping[str, Any], count: int) -> str:
    return (
        f"{count} cells: {machine['device']}, {machine['processor']}, {machine['cores']} cores, "
        f"JAX {machine['jax']}"
    )


def _method(study: Mapping[str, Any]) -> str:
    return (
        f"Mean ± standard deviation over {study['seeds']} seeds, each with training, validation "
        "and test examples, batches and adapters of its own, which all methods share. Each cell is "
        f"tuned over {study['rates']} learning rates (of 1, 2, 5, 10 …), or over those around the "
        "best of the same at rank 1, or of what it alters there (†); where the best "
        "was the first or the last of them, over two more beyond it, and once more (‡: it is the "
        "first or the last of all). The best is that with the best mean validation score over the "
        "same seeds, and the test scores are at that rate. Test examples chose nothing. A head, "
        "where there is one, trains along in all methods, at one rate, and is not counted. Budgets "
        "are the average rank in the end; in brackets, what is trained in LoRA then, in % of the "
        "base. The scale is 1 where nothing else is said. p: exact sign-flip test of the paired "
        "test scores, two-sided, corrected by Holm for the comparisons in its column."
    )


def _tables(name: str, about: Mapping[str, Any], cells: Cells, rates: int) -> list[str]:
    main = about["budgets"][0]
    sign = about["sign"]
    found = []
    for budget in _rising(about["budgets"]):
        lora = cells.get(f"{name}/lora/{budget}")
        share = f" ({_share(lora, about)})" if lora else ""
        names = [*methods.BASELINES, *(methods.IMPROVEMENTS if budget != main else ())]
        rank = "rank 1, in queries and values alone" if budget == "qv" else f"rank {budget}"
        heading = f"Budget: {rank}{share}. Compared with LoRA:"
        found.append(_table(name, budget, names, "lora", cells, sign, rates, heading))
    heading = f"What the paper's Tables 4 and 5 take away, at rank {main}. Compared with AdaLoRA:"
    ablations = ["adalora", *methods.ABLATIONS]
    found.append(_table(name, main, ablations, "adalora", cells, sign, rates, heading))
    improved = ["lora", "adalora", *methods.IMPROVEMENTS]
    heading = f"What might make it better, at rank {main}. Compared with LoRA:"
    found.append(_table(name, main, improved, "lora", cells, sign, rates, heading))
    return found


def _table(
    task: str,
    budget: int | str,
    names: Iterable[str],
    against: str,
    cells: Cells,
    sign: int,
    rates: int,
    heading: str,
) -> str:
    """Return a table with one row per method: score, difference from ``against``, and p-value."""
    there = [name for name in names if f"{task}/{name}/{budget}" in cells]
    compared = compare(task, budget, there, against, cells)
    rows = [("", "test", "difference", "p", "learning rate", "trained parameters")]
    for name in there:
        cell = cells[f"{task}/{name}/{budget}"]
        mean, deviation = mean_and_deviation(cell["test of seeds"])
        marks = ("†" if len(cell["rates"]) < rates else "") + ("‡" if cell["at an edge"] else "")
        rows.append(
            (
                methods.METHODS[name].title,
                f"{mean:.{_digits(sign)}f} ± {deviation:.{_digits(sign)}f}",
                _marked(*compared[name], sign) if name in compared else "",
                f"{compared[name][1]:.3f}" if name in compared else "",
                "" if name == "frozen" else f"{cell['rate']:g} {marks}".rstrip(),
                f"{cell['parameters']:,}",
            )
        )
    return f"{heading}\n\n{markdown(rows)}" if len(rows) > 2 else ""


def compare(
    task: str, budget: int | str, names: Iterable[str], against: str, cells: Cells
) -> dict[str, tuple[float, float]]:
    """Return ``{method: (mean difference of test scores from against's, corrected p-value)}``."""
    other = cells.get(f"{task}/{against}/{budget}")
    if other is None:
        return {}
    raw, differences = {}, {}
    for name in names:
        if name != against:
            ours, theirs = cells[f"{task}/{name}/{budget}"]["test of seeds"], other["test of seeds"]
            differences[name] = sum(a - b for a, b in zip(ours, theirs)) / len(ours)
            raw[name] = sign_flip(ours, theirs)
    corrected = holm(raw)
    return {name: (differences[name], corrected[name]) for name in raw}


def verdict(results: Mapping[str, Any]) -> str:
    """Return the table of differences from LoRA at the first budget: options × tasks."""
    cells, tasks = results["cells"], results["study"]["tasks"]
    names = ["lora-plus", "svd-lora", "pruned-lora", "adalora", *methods.IMPROVEMENTS]
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    for task, about in tasks.items():
        main = about["budgets"][0]
        there = [name for name in names if f"{task}/{name}/{main}" in cells]
        columns[task] = compare(task, main, there, "lora", cells)
    rows = [("", *(f"{name}: {about['measure']}" for name, about in tasks.items()))]
    for name in names:
        values = [
            _marked(*columns[task][name], about["sign"]) if name in columns[task] else ""
            for task, about in tasks.items()
        ]
        if any(values):
            rows.append((methods.METHODS[name].title, *values))
    return f"{markdown(rows)}\n\nBold: better than LoRA with p < {LEVEL}; *(worse)*: worse with it."


def _marked(difference: float, p: float, sign: int) -> str:
    text = f"{difference:+.{_digits(sign)}f}"
    if p >= LEVEL:
        return text
    return f"**{text}**" if sign * difference > 0 else f"{text} *(worse)*"


def _rising(budgets: Iterable[int | str]) -> list[int | str]:
    return sorted(budgets, key=lambda budget: 0 if budget == "qv" else int(budget))


def _digits(sign: int) -> int:
    return 1 if sign > 0 else 3  # % or bits


def _share(cell: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Return the trained parameters as a percentage of the base's."""
    return f"{100 * cell['parameters'] / about['base']:.2g} %"


def picture(results: Mapping[str, Any]) -> Any:
    """Draw one panel per task: differences from LoRA at each budget. Needs Matplotlib."""
    from matplotlib.figure import Figure

    tasks, cells = results["study"]["tasks"], results["cells"]
    figure = Figure(figsize=(4.2 * len(tasks), 4.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, about) in zip(panels, tasks.items()):
        budgets = [b for b in _rising(about["budgets"]) if f"{task}/lora/{b}" in cells]
        axes.axhline(0, color="tab:blue", lw=1, label=methods.METHODS["lora"].title)
        for index, (name, (colour, mark)) in enumerate(MARKS.items()):
            aside = 0.8 * (index / (len(MARKS) - 1) - 0.5)
            points = _differences(cells, task, name, budgets)
            places = [budgets.index(budget) + aside for budget in points]
            means, errors = zip(*points.values()) if points else ((), ())
            title = methods.METHODS[name].title
            axes.errorbar(places, means, errors, fmt=mark, color=colour, capsize=2, label=title)
        shares = [_share(cells[f"{task}/lora/{budget}"], about) for budget in budgets]
        axes.set_xticks(range(len(budgets)), shares)
        axes.set_xlim(-0.6, max(len(budgets), 1) - 0.4)
        axes.set_xlabel("trained in LoRA, of the base")
        axes.set_ylabel(about["measure"])
        axes.set_title(task)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        if about["sign"] < 0:
            axes.invert_yaxis()  # so that up is better in every panel
    figure.suptitle("Difference from LoRA at the same budget: mean ± standard error; up is better")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _differences(
    cells: Cells, task: str, name: str, budgets: Iterable[int | str]
) -> dict[int | str, tuple[float, float]]:
    """Return ``{budget: (mean difference of test scores from LoRA's, standard error)}``."""
    found = {}
    for budget in budgets:
        if cell := cells.get(f"{task}/{name}/{budget}"):
            lora = cells[f"{task}/lora/{budget}"]["test of seeds"]
            differences = [a - b for a, b in zip(cell["test of seeds"], lora)]
            mean, deviation = mean_and_deviation(differences)
            found[budget] = mean, deviation / math.sqrt(len(differences))
    return found
