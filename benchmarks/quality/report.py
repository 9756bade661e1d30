"""The tables and the picture of the study, from its results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality import methods
from benchmarks.quality.paired import holm, mean_and_deviation, sign_flip
from benchmarks.timing import markdown

LEVEL = 0.05
Cells = Mapping[str, Mapping[str, Any]]  # what the study recorded, by "task/method/rank"
# Of the picture; the rest would hide them.
LINES = {
    "lora": ("tab:blue", "o-"),
    "lora-x4": ("tab:blue", "o:"),
    "lora-plus": ("tab:cyan", "s-"),
    "svd-lora": ("tab:green", "^-"),
    "pruned-lora": ("tab:gray", "v-"),
    "adalora": ("tab:red", "D-"),
    "orthonormal-lam10": ("tab:purple", "D--"),
    "x4-lam10": ("tab:orange", "D:"),
}


def text(results: Mapping[str, Any]) -> str:
    """The whole report."""
    study = results["study"]
    parts = [_method(study)]
    for name, about in study["tasks"].items():
        found = {key: cell for key, cell in results["cells"].items() if key.startswith(f"{name}/")}
        if found:
            parts.append(f"**{about['title']}** ({about['measure']})")
            parts += _tables(name, about, found)
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
        f"tuned over {study['rates']} learning rates (of 1, 2, 5, 10 …), an ablation at least over "
        "those next to AdaLoRA's best; where the best was the first or the last of them, over two "
        "more beyond it, and once more (‡: it is the first or the last of all). The best is that "
        "with the best mean validation score over the same seeds, and the test scores are at that "
        "rate. Test examples chose nothing. A head, where there is one, trains along in all "
        "methods, at one rate, and is not counted. Budgets are the average rank in the end; in "
        "brackets, what is trained in LoRA then, in % of the base. The scale is 1 where nothing "
        "else is said. p: exact sign-flip test of the paired test scores, two-sided, corrected by "
        "Holm for the comparisons in its column."
    )


def _tables(name: str, about: Mapping[str, Any], cells: Cells) -> list[str]:
    ranks = sorted({int(key.rpartition("/")[2]) for key in cells})
    main = ranks[0]
    sign = about["sign"]
    found = []
    for rank in ranks:
        share = _share(cells.get(f"{name}/lora/{rank}"), about)
        names = [*methods.BASELINES, *(methods.IMPROVEMENTS if rank != main else ())]
        heading = f"Budget: rank {rank}{share}. Compared with LoRA:"
        found.append(_table(name, rank, names, "lora", cells, sign, heading))
    heading = f"What the paper's Tables 4 and 5 take away, at rank {main}. Compared with AdaLoRA:"
    ablations = ["adalora", *methods.ABLATIONS]
    found.append(_table(name, main, ablations, "adalora", cells, sign, heading))
    improved = ["lora", "adalora", *methods.IMPROVEMENTS]
    heading = f"What might make it better, at rank {main}. Compared with LoRA:"
    found.append(_table(name, main, improved, "lora", cells, sign, heading))
    return found


def _table(
    task: str,
    rank: int,
    names: Iterable[str],
    against: str,
    cells: Cells,
    sign: int,
    heading: str,
) -> str:
    """One row a method: its score, how far that is from another's, and by how much chance."""
    there = [name for name in names if f"{task}/{name}/{rank}" in cells]
    compared = compare(task, rank, there, against, cells)
    rows = [("", "test", "difference", "p", "learning rate", "trained parameters")]
    for name in there:
        cell = cells[f"{task}/{name}/{rank}"]
        mean, deviation = mean_and_deviation(cell["test of seeds"])
        rate = f"{cell['rate']:g}{' ‡' if cell['at an edge'] else ''}"
        rows.append(
            (
                methods.METHODS[name].title,
                f"{mean:.{_digits(sign)}f} ± {deviation:.{_digits(sign)}f}",
                _marked(*compared[name], sign) if name in compared else "",
                f"{compared[name][1]:.3f}" if name in compared else "",
                "" if name == "frozen" else rate,
                f"{cell['parameters']:,}",
            )
        )
    return f"{heading}\n\n{markdown(rows)}" if len(rows) > 2 else ""


def compare(
    task: str, rank: int, names: Iterable[str], against: str, cells: Cells
) -> dict[str, tuple[float, float]]:
    """The mean difference from another method's test scores, and its p-value, corrected."""
    other = cells.get(f"{task}/{against}/{rank}")
    if other is None:
        return {}
    raw, differences = {}, {}
    for name in names:
        if name != against:
            ours, theirs = cells[f"{task}/{name}/{rank}"]["test of seeds"], other["test of seeds"]
            differences[name] = sum(a - b for a, b in zip(ours, theirs)) / len(ours)
            raw[name] = sign_flip(ours, theirs)
    corrected = holm(raw)
    return {name: (differences[name], corrected[name]) for name in raw}


def verdict(results: Mapping[str, Any]) -> str:
    """One row an option, one column a task: the difference from LoRA at the smallest budget."""
    cells, tasks = results["cells"], results["study"]["tasks"]
    names = ["lora-plus", "svd-lora", "pruned-lora", "adalora", *methods.IMPROVEMENTS]
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    for task, about in tasks.items():
        rank = min(about["ranks"])
        there = [name for name in names if f"{task}/{name}/{rank}" in cells]
        columns[task] = compare(task, rank, there, "lora", cells)
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


def _digits(sign: int) -> int:
    return 1 if sign > 0 else 3  # % or bits


def _share(cell: Mapping[str, Any] | None, about: Mapping[str, Any]) -> str:
    return f" ({100 * cell['parameters'] / about['base']:.2g} %)" if cell else ""


def picture(results: Mapping[str, Any]) -> Any:
    """One panel a task: the test score against the budget. Needs Matplotlib."""
    from matplotlib.figure import Figure

    tasks = results["study"]["tasks"]
    figure = Figure(figsize=(5 * len(tasks), 4.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, about) in zip(panels, tasks.items()):
        for name, (colour, style) in LINES.items():
            points = _line(results["cells"], task, name, about)
            if points:
                share, mean, deviation = zip(*points)
                label = methods.METHODS[name].title
                axes.errorbar(
                    share, mean, deviation, fmt=style, color=colour, capsize=3, label=label
                )
        for name, style in (("full", "--"), ("frozen", ":")):
            cell = results["cells"].get(f"{task}/{name}/{min(about['ranks'])}")
            if cell:
                mean, _ = mean_and_deviation(cell["test of seeds"])
                axes.axhline(mean, color="black", lw=1, ls=style, label=methods.METHODS[name].title)
        shares = [share for share, *_ in _line(results["cells"], task, "lora", about)]
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{share:.2g}" for share in shares])
        axes.minorticks_off()
        axes.set_xlabel("numbers in the adapters, % of the base")
        axes.set_ylabel(about["measure"])
        axes.set_title(task)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        if about["sign"] < 0:
            axes.invert_yaxis()  # better is up in all of them
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _line(cells: Cells, task: str, name: str, about: Mapping[str, Any]) -> list[Sequence[float]]:
    """``(share, mean, standard deviation)`` at each budget."""
    found = []
    for rank in sorted(about["ranks"]):
        cell = cells.get(f"{task}/{name}/{rank}")
        if cell:
            share = 100 * cell["parameters"] / about["base"]
            found.append((share, *mean_and_deviation(cell["test of seeds"])))
    return found
