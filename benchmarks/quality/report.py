"""Tables and figure of the study, made from its results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.quality import methods
from benchmarks.quality.paired import holm, mean_and_deviation, sign_flip
from benchmarks.results import described, markdown

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
    parts = ["# Accuracy of AdaLoRA, LoRA and full fine-tuning", _method(study)]
    parts += [f"## Results\n\n{_findings(results)}", verdict(results)]
    for name, about in study["tasks"].items():
        found = {key: cell for key, cell in results["cells"].items() if key.startswith(f"{name}/")}
        if found:
            parts.append(f"## {about['title']}")
            parts += _tables(name, about, found, study["rates"])
    counts = Counter(cell["device"] for cell in results["cells"].values())
    machines = (
        f"- {counts[name]} cells: {described(machine)}"
        for name, machine in results["machines"].items()
    )
    parts.append("## Machines\n\n" + "\n".join(machines))
    parts.append(
        f"The tasks were made from the standard library of Python {study['python']}. Run "
        "`python -m benchmarks.quality` to repeat the study; the numbers are in the JSON file of "
        "the same name."
    )
    return "\n\n".join(part for part in parts if part)


def _method(study: Mapping[str, Any]) -> str:
    return (
        f"The study trains every method on {len(study['tasks'])} tasks with {study['seeds']} "
        "seeds. A seed has its own training, validation and test examples, batches and initial "
        "adapters, which all methods share. Scores are means ± standard deviations over the seeds, "
        "on test examples. No test example was used for selection.\n\n"
        "- **Budget**: the average rank at the end of training. The percentage is the number of "
        "parameters that LoRA trains, relative to the base. Methods that prune start at twice the "
        "rank, unless their name says otherwise.\n"
        f"- **Learning rate**: each method is tuned over {study['rates']} rates (three per "
        "decade) by its mean validation score over the seeds. †: only rates near the best of the "
        "same method, or of unmodified AdaLoRA or LoRA, at rank 1 were tried. If the best "
        "rate was the lowest or the highest, two more were tried beyond it, up to twice. ‡: the "
        "best is still the lowest or highest, so the method may improve at others.\n"
        "- **Trained parameters**: those of the adapters' active triplets. A head is trained along "
        "in all methods, at the same rate, and is not counted.\n"
        "- **Difference and p**: the mean over the seeds of the difference from the method named "
        "above the table, and the p-value of an exact two-sided sign-flip test of these "
        "differences, corrected by Holm for all comparisons of the table. Bold: better with p < "
        f"{LEVEL}; *(worse)*: worse with p < {LEVEL}. Scores of one seed rise and fall together, "
        "so a difference can be significant although the standard deviations are larger.\n"
        "- The scale of the adapters is 1 unless the method's name says otherwise; λ × 10 is the "
        "learning rate of λ."
    )


def _findings(results: Mapping[str, Any]) -> str:
    """Return how AdaLoRA compares with LoRA on each task, at the first budget."""
    lines = []
    for task, about in results["study"]["tasks"].items():
        budget = about["budgets"][0]
        there = [
            name for name in methods.BASELINES if f"{task}/{name}/{budget}" in results["cells"]
        ]
        found = compare(task, budget, there, "lora", results["cells"])
        if "adalora" in found:
            difference, p = found["adalora"]
            ahead = about["sign"] * difference > 0
            word = "better than" if ahead else "worse than"
            word = word if p < LEVEL else "not significantly different from"
            shown = f"{difference:+z.{digits(about['sign'])}f} {unit(about['sign'])}"
            lines.append(f"- {task}: AdaLoRA is {word} LoRA ({shown}, p = {p:.3f})")
    return "\n".join(lines)


def _tables(name: str, about: Mapping[str, Any], cells: Cells, rates: int) -> list[str]:
    main = about["budgets"][0]
    found = []
    for budget in _rising(about["budgets"]):
        lora = cells.get(f"{name}/lora/{budget}")
        share = f" ({_share(lora, about)})" if lora else ""
        names = [*methods.BASELINES, *(methods.IMPROVEMENTS if budget != main else ())]
        rank = "rank 1, in queries and values only" if budget == "qv" else f"rank {budget}"
        heading = f"Budget: {rank}{share}. Compared with LoRA:"
        found.append(_table(name, budget, names, "lora", cells, about, rates, heading))
    heading = f"Ablations of the paper's Tables 4 and 5, at rank {main}. Compared with AdaLoRA:"
    ablations = ["adalora", *methods.ABLATIONS]
    found.append(_table(name, main, ablations, "adalora", cells, about, rates, heading))
    improved = ["lora", "adalora", *methods.IMPROVEMENTS]
    heading = f"Options of AdaLoRA and LoRA, at rank {main}. Compared with LoRA:"
    found.append(_table(name, main, improved, "lora", cells, about, rates, heading))
    return found


def _table(
    task: str,
    budget: int | str,
    names: Iterable[str],
    against: str,
    cells: Cells,
    about: Mapping[str, Any],
    rates: int,
    heading: str,
) -> str:
    """Return a table with one row per method: score, difference from ``against``, and p-value."""
    there = [name for name in names if f"{task}/{name}/{budget}" in cells]
    compared = compare(task, budget, there, against, cells)
    sign = about["sign"]
    difference = f"difference, {unit(sign)}"
    rows = [("method", about["measure"], difference, "p", "learning rate", "trained parameters")]
    for name in there:
        cell = cells[f"{task}/{name}/{budget}"]
        mean, deviation = mean_and_deviation(cell["test of seeds"])
        marks = ("†" if len(cell["rates"]) < rates else "") + ("‡" if cell["at an edge"] else "")
        rows.append(
            (
                methods.METHODS[name].title,
                f"{mean:.{digits(sign)}f} ± {deviation:.{digits(sign)}f}",
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
    rows = [("method", *(f"{name}, {unit(about['sign'])}" for name, about in tasks.items()))]
    for name in names:
        values = [
            _marked(*columns[task][name], about["sign"]) if name in columns[task] else ""
            for task, about in tasks.items()
        ]
        if any(values):
            rows.append((methods.METHODS[name].title, *values))
    return (
        "Differences from LoRA at the first budget of each task, with p-values corrected for all "
        f"methods of this table:\n\n{markdown(rows)}\n\nA higher accuracy is better; fewer "
        "bits per character are better."
    )


def _marked(difference: float, p: float, sign: int) -> str:
    text = f"{difference:+z.{digits(sign)}f}"
    if p >= LEVEL:
        return text
    return f"**{text}**" if sign * difference > 0 else f"{text} *(worse)*"


def _rising(budgets: Iterable[int | str]) -> list[int | str]:
    return sorted(budgets, key=lambda budget: 0 if budget == "qv" else int(budget))


def digits(sign: int) -> int:
    return 1 if sign > 0 else 3  # % or bits


def unit(sign: int) -> str:
    return "percentage points" if sign > 0 else "bits per character"


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
        axes.set_xlabel("parameters trained by LoRA, relative to the base")
        axes.set_ylabel(f"difference, {unit(about['sign'])}")
        axes.set_title(f"{task}: {about['measure']}", fontsize=11)
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
