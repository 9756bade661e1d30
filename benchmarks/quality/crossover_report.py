"""Page and figure of ``crossover``, made from its results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.quality import methods
from benchmarks.quality.paired import holm, mean_and_deviation, sign_flip
from benchmarks.quality.report import LEVEL, Cells, digits, unit
from benchmarks.results import described, markdown, number

MARGINS = {1: 1.0, -1: 0.01}  # {sign of the measure: differences below it count as level}
BITS = 2  # per parameter
TITLES = {
    "frozen": "frozen base",
    "svd-lora": "SVD-LoRA",
    "adalora": "AdaLoRA",
    "full": "full fine-tuning",
}
ONCE = ("frozen", "full")  # methods without ranks, with one cell per size
MARKS = {"adalora": ("tab:red", "D"), "svd-lora": ("tab:green", "^"), "full": ("black", "*")}


class Group(NamedTuple):
    """Points of one task that are tested together."""

    points: tuple[str, ...]  # "task/rank"
    above: bool  # whether the ratio of bits wanted to bits held is above 1


# As PREDICTION.md states them.
GROUPS = {
    "fashion, ratio below 1": Group(("fashion-100/1", "fashion-600/1", "fashion-4000/8"), False),
    "fashion, ratio above 1": Group(("fashion-4000/1", "fashion-16000/1"), True),
    "topics, ratio below 1": Group(("topics-20/8", "topics-60/8"), False),
    "topics, ratio above 1, rank 1": Group(("topics-60/1", "topics-300/1", "topics-1000/1"), True),
    "topics, ratio above 1, rank 8": Group(("topics-300/8", "topics-1000/8"), True),
}
CANDIDATE_GROUPS = {
    "language models": ("topics-300/1", "glosses-300/1", "german-300/1"),
    "classifiers": ("fashion-600/1", "fashion-4000/1", "wordnet-1900/1"),
}


class Point(NamedTuple):
    """One size of training set at one rank."""

    task: str
    rank: int
    ratio: float  # of bits wanted to bits held
    about: Mapping[str, Any]


class Test(NamedTuple):
    """Comparison of two methods over a group of points; a positive mean is better."""

    mean: float
    p: float
    found: str  # "ahead", "behind", "level" or "open"


def text(results: Mapping[str, Any]) -> str:
    """Return the complete page as Markdown."""
    study = results["study"]
    allocation = tests(results, "adalora", "lora")
    capacity = tests(results, "lora", "full")
    predicted = {name: "ahead" if group.above else "level" for name, group in GROUPS.items()}
    limited = {name: "behind" if group.above else "level" for name, group in GROUPS.items()}
    parts = [
        "# AdaLoRA and LoRA at several amounts of training data",
        _method(study),
        "## Does AdaLoRA get ahead where the data exceed LoRA's capacity?",
        f"The prediction is **{outcome(allocation, predicted)}**.",
        _groups(results, allocation, predicted, "AdaLoRA − LoRA"),
        "## Is LoRA's capacity the limit there?",
        f"The second prediction is **{outcome(capacity, limited)}**.",
        _groups(results, capacity, limited, "LoRA − full fine-tuning"),
    ]
    parts += _candidates(results)
    for data in dict.fromkeys(about["data"] for about in study["tasks"].values()):
        parts += _table(data, results)
    if missing := _missing(results):
        parts.append(f"## Not run\n\n{missing}")
    machines = (f"- {described(machine)}" for machine in results["machines"].values())
    parts.append("## Machine\n\n" + "\n".join(machines))
    parts.append(
        f"The texts are those of Python {study['python']}. Run "
        "`python -m benchmarks.quality.crossover` to repeat the runs; the numbers are in the JSON "
        "file of the same name."
    )
    return "\n\n".join(parts)


def _method(study: Mapping[str, Any]) -> str:
    return (
        "Adapters store about 2 bits per parameter. The training data want a number of bits: the "
        "number of labels × log2 of the number of classes, or the number of characters × the bits "
        "per character of the frozen base. The prediction is that AdaLoRA is ahead of LoRA where "
        "the ratio of bits wanted to bits held is above 1, and level below. It was written before "
        "the runs, with the groups, margins and tests of this page, in "
        "`benchmarks/quality/PREDICTION.md`.\n\n"
        f"- **Seeds**: {study['seeds']} per point. The points of a group have different splits, "
        "so their seeds are independent. A seed's examples, batches and initial adapters are the "
        "same for all methods.\n"
        f"- **Learning rate**: tuned for each method at each point over {study['rates']} rates "
        "(three per decade) by the mean validation score. If the best rate was the lowest or the "
        "highest, two more were tried beyond it, up to twice. ‡: the best is still the lowest or "
        "highest.\n"
        "- **Difference**: the mean over seeds of the difference on test examples, with its "
        "standard error. A positive difference is better: more accuracy, or fewer bits.\n"
        "- **p**: that of an exact two-sided sign-flip test of all paired differences of a group, "
        f"corrected by Holm for the {len(GROUPS)} groups, with p = 1 for a group that was not run. "
        "Single points are not tested: the smallest possible p of "
        f"{study['seeds']} pairs is {2 / 2 ** study['seeds']:g}.\n"
        "- **Found**: level if the difference is below "
        f"{MARGINS[1]:g} percentage point or {MARGINS[-1]:g} bits per character; otherwise ahead "
        f"or behind with p < {LEVEL}, and open without.\n"
        "- **Passes**: over the training examples. The capacity is that of LoRA's parameters. The "
        "classifiers of fashion and wordnet are trained along in all methods and are not counted.\n"
        "- **Tasks outside of the groups**: glosses, german and wordnet were added after the runs "
        "of the prediction, and are not part of its tests."
    )


def points(results: Mapping[str, Any]) -> dict[str, Point]:
    """Return ``{"task/rank": point}`` for all points at which LoRA was run, by rank and ratio."""
    found = {}
    for task, about in results["study"]["tasks"].items():
        for rank in about["budgets"]:
            if lora := results["cells"].get(f"{task}/lora/{rank}"):
                ratio = about["bits wanted"] / (BITS * lora["parameters"])
                found[f"{task}/{rank}"] = Point(task, rank, ratio, about)
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[1].ratio)))


def differences(results: Mapping[str, Any], point: Point, method: str, other: str) -> list[float]:
    """Return a method's difference from another for each seed; a positive one is better.

    It is empty if one of the methods was not run there.
    """
    ours, theirs = (_cell(results["cells"], point, name) for name in (method, other))
    if not ours or not theirs:
        return []
    pairs = zip(ours["test of seeds"], theirs["test of seeds"])
    return [point.about["sign"] * (a - b) for a, b in pairs]


def _cell(cells: Cells, point: Point, method: str) -> Mapping[str, Any] | None:
    rank = point.about["budgets"][0] if method in ONCE else point.rank
    return cells.get(f"{point.task}/{method}/{rank}")


def tests(results: Mapping[str, Any], method: str, other: str) -> dict[str, Test]:
    """Return the test of each group of which all points were run."""
    there = points(results)
    pairs, margins = {}, {}
    for name, group in GROUPS.items():
        each = [
            differences(results, there[p], method, other) if p in there else [] for p in group[0]
        ]
        if all(each):
            pairs[name] = [value for values in each for value in values]
            margins[name] = MARGINS[there[group.points[0]].about["sign"]]
    return _tests(pairs, margins, GROUPS)


def _tests(
    pairs: Mapping[str, list[float]], margins: Mapping[str, float], family: Iterable[str]
) -> dict[str, Test]:
    """Return the tests of these differences, with p corrected for a family of tests by Holm."""
    # A test without differences counts in the correction: its result must not change the others'.
    raw = {name: sign_flip(values, [0.0] * len(values)) for name, values in pairs.items()}
    p = holm({name: raw.get(name, 1.0) for name in family})
    found = {}
    for name, values in pairs.items():
        mean = sum(values) / len(values)
        word = "ahead" if mean > 0 else "behind"
        word = word if p[name] < LEVEL else "open"
        found[name] = Test(mean, p[name], word if abs(mean) >= margins[name] else "level")
    return found


def outcome(found: Mapping[str, Test], predicted: Mapping[str, str]) -> str:
    """Return "confirmed", "refuted" or "not decided", by the rule of PREDICTION.md."""
    if any(test.found not in (predicted[name], "open") for name, test in found.items()):
        return "refuted"
    return (
        "confirmed" if [t.found for t in found.values()] == [*predicted.values()] else "not decided"
    )


def candidate_tests(results: Mapping[str, Any], group: Iterable[Point]) -> dict[str, Test]:
    """Return the test of each candidate against AdaLoRA over the points at which both were run."""
    pairs, margins = {}, {}
    for point in group:
        for name in methods.CANDIDATES:
            if values := differences(results, point, name, "adalora"):
                pairs[name] = pairs.get(name, []) + values
                margins[name] = MARGINS[point.about["sign"]]
    return _tests(pairs, margins, methods.CANDIDATES)


def recommended(results: Mapping[str, Any]) -> str | None:
    """Return the candidate that becomes the default by the rule of PREDICTION.md; None if none."""
    there = points(results)
    wanted = [name for group in CANDIDATE_GROUPS.values() for name in group]
    if not there.keys() >= set(wanted):
        return None
    texts, classifiers = (
        candidate_tests(results, [there[name] for name in group])
        for group in CANDIDATE_GROUPS.values()
    )
    fit = [
        name
        for name in methods.CANDIDATES
        if all(differences(results, there[point], name, "adalora") for point in wanted)
        and texts[name].found == "ahead"
        and classifiers[name].found != "behind"
    ]
    return max(fit, key=lambda name: texts[name].mean, default=None)


def _candidates(results: Mapping[str, Any]) -> list[str]:
    """Return the section of the candidates, with one table per group; empty if none was run."""
    there, tables = points(results), []
    for title, group in CANDIDATE_GROUPS.items():
        members = [there[point] for point in group if point in there]
        rows = [("candidate", "points", "− AdaLoRA", "− LoRA", "p", "found")]
        for name, test in candidate_tests(results, members).items():
            run = [point for point in members if differences(results, point, name, "adalora")]
            places = digits(run[0].about["sign"])
            shown = (
                _shown([v for p in run for v in differences(results, p, name, other)], places)
                for other in ("adalora", "lora")
            )
            names = (p.task + _edge(_cell(results["cells"], p, name)) for p in run)
            tested = _probability(test.p), test.found
            rows.append((methods.METHODS[name].title, ", ".join(names), *shown, *tested))
        if len(rows) > 1:
            names = ", ".join(point.partition("/")[0] for point in group)
            measure = unit(members[0].about["sign"])
            tables.append(f"{title.capitalize()} ({names}), in {measure}:\n\n{markdown(rows)}")
    best = recommended(results)
    rule = (
        "A candidate that is ahead of AdaLoRA on the language models and not behind on the "
        "classifiers, and was run at all of these points, becomes the recommended default: "
        f"**{methods.METHODS[best].title if best else 'none'}**. Differences are means ± standard "
        "errors over the points that were run and their seeds, at rank 1. p is that of the "
        f"difference from AdaLoRA, corrected for the {len(methods.CANDIDATES)} candidates."
    )
    return ["## Candidates for a default", rule, *tables] if tables else []


def _groups(
    results: Mapping[str, Any],
    found: Mapping[str, Test],
    predicted: Mapping[str, str],
    difference: str,
) -> str:
    there = points(results)
    rows = [("group", "points: examples, rank, ratio", "predicted", difference, "p", "found")]
    for name, group in GROUPS.items():
        members = [there[point] for point in group.points if point in there]
        shown = "; ".join(f"{m.about['examples']:,}, {m.rank}, {number(m.ratio)}" for m in members)
        if test := found.get(name):
            sign = members[0].about["sign"]
            mean = f"{test.mean:+z.{digits(sign)}f} {unit(sign)}"
            rows.append((name, shown, predicted[name], mean, _probability(test.p), test.found))
        else:
            rows.append((name, shown, predicted[name], "", "", "not run"))
    return markdown(rows)


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _table(data: str, results: Mapping[str, Any]) -> list[str]:
    """Return the heading and the table of a data set, with one row per point."""
    here = [point for point in points(results).values() if point.about["data"] == data]
    if not here:
        return []
    about = here[0].about
    sign, places = about["sign"], digits(about["sign"])
    titles = [f"{title} − LoRA" for title in TITLES.values()]
    header = ("rank", "examples", "passes", "bits wanted", "ratio", f"LoRA: {about['measure']}")
    rows = [(*header, *titles)]
    for point in here:
        lora = _cell(results["cells"], point, "lora")
        mean, deviation = mean_and_deviation(lora["test of seeds"])
        row = [
            point.rank,
            f"{point.about['examples']:,}",
            number(point.about["passes"]),
            f"{point.about['bits wanted']:,}",
            number(point.ratio),
            f"{mean:.{places}f} ± {deviation:.{places}f}{_edge(lora)}",
        ]
        for name in TITLES:
            values = differences(results, point, name, "lora")
            edge = "" if name == "frozen" else _edge(_cell(results["cells"], point, name))
            row.append(_shown(values, places) + edge)
        rows.append(tuple(row))
    return [
        f"## {data.capitalize()}: {about['title']}",
        f"Scores of LoRA are means ± standard deviations; differences, in {unit(sign)}, are means "
        f"± standard errors.\n\n{markdown(rows)}",
    ]


def _missing(results: Mapping[str, Any]) -> str:
    """Return a list of the points that were not run, by method."""
    lines = []
    for method, title in {"lora": "LoRA", **TITLES}.items():
        absent = [
            f"{task} at rank {rank}"
            for task, about in results["study"]["tasks"].items()
            for rank in (about["budgets"][:1] if method in ONCE else about["budgets"])
            if f"{task}/{method}/{rank}" not in results["cells"]
        ]
        if absent:
            lines.append(f"- {title}: {', '.join(absent)}")
    return "\n".join(lines)


def _shown(values: list[float], places: int) -> str:
    if not values:
        return ""
    mean, error = _mean_and_error(values)
    return f"{mean:+z.{places}f} ± {error:.{places}f}"


def _edge(cell: Mapping[str, Any] | None) -> str:
    return " ‡" if cell and cell["at an edge"] else ""


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean, deviation = mean_and_deviation(values)
    return mean, deviation / math.sqrt(len(values))


def picture(results: Mapping[str, Any]) -> Any:
    """Draw the differences from LoRA over the ratio, a column per data set of the groups.

    Needs Matplotlib.
    """
    from matplotlib.figure import Figure

    there = points(results)
    grouped = [there[name] for group in GROUPS.values() for name in group.points if name in there]
    compared = [point for point in grouped if differences(results, point, "adalora", "lora")]
    data = list(dict.fromkeys(point.about["data"] for point in compared))
    columns = max(1, len(data))  # one is empty if no data set of the groups was run
    figure = Figure(figsize=(max(7.5, 5.2 * columns), 7.2), layout="constrained")
    rows = figure.subplots(2, columns, squeeze=False, sharex="col")
    for column, name in enumerate(data):
        here = [point for point in there.values() if point.about["data"] == name]
        sign = here[0].about["sign"]
        for axes, shown in zip(rows[:, column], (("svd-lora", "adalora"), ("full",))):
            axes.axhline(0, color="tab:blue", lw=1, label="LoRA")
            axes.axvline(1, color="gray", lw=1, ls=":")
            if "adalora" in shown:
                axes.axhspan(-MARGINS[sign], MARGINS[sign], color="tab:blue", alpha=0.08, lw=0)
            for method in shown:
                _draw(axes, results, here, method)
            axes.set_xscale("log")
            axes.set_ylabel(f"better by, {unit(sign)}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        rows[0, column].set_title(f"{name}: {here[0].about['measure']}", fontsize=11)
        rows[1, column].set_xlabel("bits wanted by the training data / bits held by LoRA")
    figure.suptitle("Difference from LoRA: mean ± standard error over seeds; up is better")
    labelled: dict[str, Any] = {}
    for axes in rows.flat:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles))
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=2, frameon=False
    )
    return figure


def _draw(axes: Any, results: Mapping[str, Any], here: list[Point], method: str) -> None:
    """Draw a method at all points; markers of ranks above 1 are hollow."""
    colour, mark = MARKS[method]
    aside = 1.06 if method == "svd-lora" else 1.0  # so that error bars do not cover each other
    for rank in sorted({point.rank for point in here}):
        found = {
            p.ratio * aside: differences(results, p, method, "lora") for p in here if p.rank == rank
        }
        found = {ratio: _mean_and_error(values) for ratio, values in found.items() if values}
        if not found:
            continue
        means, errors = zip(*found.values())
        axes.errorbar(
            list(found),
            means,
            errors,
            fmt=mark + ("-" if rank == 1 else "--"),
            color=colour,
            markerfacecolor=colour if rank == 1 else "white",
            capsize=2,
            lw=1,
            label=f"{TITLES[method]}, against LoRA at rank {rank}",
        )
