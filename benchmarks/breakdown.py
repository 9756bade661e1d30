"""Time of a training step by kind of kernel, measured by XLA's profiler.

    python -m benchmarks.breakdown [--model bert ...] [--rounds 7]

The benchmark profiles the frozen model and this library's LoRA and AdaLoRA, on the models of
``training.py``. Every kernel has one of these kinds:

- large products: of weights with activations, and those of attention
- thin products: the rank is an axis of the result, or the axis that is summed over; the result of
  the latter is as large as the layer's output
- passes over activations: other kernels whose result has at least width × tokens elements
- small kernels: the others, mostly of the adapters: penalty, optimizer, averages, masks

Times are sums over all threads, divided by the number of cores: the time of a step if all cores are
busy. A thread that waits for another one inside of a product counts as busy. Takes four minutes on
two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import peers, results, training
from benchmarks.networks import Shape

PEERS = ("frozen", "lora", "adalora")
KINDS = (
    "large products",
    "thin products, rank in the result",
    "thin products, summed over the rank",
    "passes over activations",
    "small kernels",
)
_, *THIN, _, SMALL = KINDS
COLOURS = ("lightgrey", "salmon", "tab:red", "tab:blue", "tab:orange")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = \w+\[([\d,]*)\][^ ]* ([\w-]+)\((.*)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.-]+)")


def kinds(program: str, shape: Shape, rank: int) -> dict[str, str]:
    """Return ``{kernel: kind}``, parsed from the text of the compiled program."""
    inside: dict[str, list[tuple[str, tuple[int, ...], str, str]]] = {}
    body: list[Any] = []
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            inside[start[1]] = body = []
        elif found := _INSTRUCTION.match(line):
            name, sizes, operation, rest = found.groups()
            size = tuple(int(n) for n in sizes.split(",") if n)
            body.append((name, size, operation, rest))

    def products(name: str, operation: str, rest: str, sizes: Mapping[str, Any]) -> Iterator[Any]:
        """Yield, per product in an instruction, the shapes of its result and its operands."""
        if operation == "dot":
            operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
            yield [sizes[of] for of in (name, *operands)]
        for called in _CALLED.findall(rest):
            within = {name: size for name, size, *_ in inside[called]}
            for name, _, operation, rest in inside[called]:
                yield from products(name, operation, rest, within)

    large = shape.batch * shape.tokens * shape.width
    found = {}
    for body in inside.values():
        sizes = {name: size for name, size, *_ in body}
        for name, size, operation, rest in body:
            dots = list(products(name, operation, rest, sizes))
            if dots:
                thin = all(any(rank in size for size in dot) for dot in dots)
                tiny = all(math.prod(size) < large for dot in dots for size in dot)
                kind = 1 + all(rank not in result for result, *_ in dots) if thin else 0
                found[name] = KINDS[-1] if tiny and thin else KINDS[kind]
            else:
                found[name] = KINDS[-2] if math.prod(size) >= large else KINDS[-1]
    return found


def profile(step: peers.Step, steps: int = 2) -> dict[str, float]:
    """Return the milliseconds per step of each kernel, summed over all threads."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                jax.block_until_ready(step())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        times: dict[str, float] = {}
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    spent = event.duration_ns / 1e6 / steps
                    times[event.name] = times.get(event.name, 0.0) + spent
    return times


def measure(shape: Shape, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds per step and number of kernels, per peer and kind; interleaved."""
    steps = {name: peers.build(name, shape) for name in PEERS}
    kind, found = {}, {}
    for name, step in steps.items():
        jax.block_until_ready([step() for _ in range(2)])
        program = step.jitted.lower(step.frozen, *step.state, step.batch).compile().as_text()
        kind[name] = kinds(program, shape, peers.RANK)
        found[name] = {group: {"ms": [], "kernels": 0} for group in KINDS}
    for _ in range(rounds):
        for name, step in steps.items():
            times = profile(step)
            for group, cell in found[name].items():
                ran = [ms for kernel, ms in times.items() if kind[name].get(kernel) == group]
                cell["ms"].append(sum(ran) / (os.cpu_count() or 1))
                cell["kernels"] = len(ran)
    for groups in found.values():
        for cell in groups.values():
            cell["ms"] = statistics.median(cell["ms"])
    return found


def table(found: Mapping[str, Any]) -> str:
    titles = [peers.TITLES[name] for name in found]
    columns = [f"{title}, {unit}" for unit in ("milliseconds", "kernels") for title in titles]
    rows = [("kind of kernel", *columns)]
    for kind in KINDS:
        cells = [groups[kind] for groups in found.values()]
        times = (results.number(cell["ms"]) for cell in cells)
        rows.append((kind, *times, *(f"{cell['kernels']:,}" for cell in cells)))

    def total(groups, of):
        return sum(group[of] for group in groups.values())

    times = (results.number(total(groups, "ms")) for groups in found.values())
    counts = (f"{total(groups, 'kernels'):,}" for groups in found.values())
    rows.append(("all", *times, *counts))
    return results.markdown(rows)


def shares(models: Mapping[str, Any]) -> str:
    """Return the table of the shares of thin products and allocation in AdaLoRA's step."""
    rows = [
        (
            *("model", "thin products", "thin products, % of AdaLoRA's step"),
            "penalty, averages and masks, % of AdaLoRA's step",
        )
    ]
    for model, found in models.items():
        groups = found["adalora"]
        total = sum(group["ms"] for group in groups.values())
        thin = 100 * sum(groups[kind]["ms"] for kind in THIN) / total
        allocation = 100 * (groups[SMALL]["ms"] - found["lora"][SMALL]["ms"]) / total
        count = sum(groups[kind]["kernels"] for kind in THIN)
        rows.append((training.NAMES[model], count, f"{thin:.0f}", f"{allocation:.1f}"))
    return results.markdown(rows)


def text(found: results.Results) -> str:
    parts = [
        "# Time of a training step by kind of kernel",
        "The benchmark profiles a training step of the frozen model, and of LoRA and AdaLoRA in "
        "this library, on the models of [the benchmark of training steps](training.md). AdaLoRA "
        "makes a new mask at every step. Each kernel of the compiled program has one of five "
        "kinds. Large products are those of weights and activations, and those of attention. Thin "
        f"products have an axis of the rank ({peers.RANK}), in the result or summed over. Passes "
        "over activations are other kernels with a result as large as the activations. Small "
        "kernels are all others, mostly of the adapters.",
        f"Times are medians of {found['rounds']} interleaved rounds. They are sums over all "
        "threads, divided by the number of cores, and so the time of a step in which no core "
        "waits; a real step takes longer. Models under `nn.scan` have fewer "
        "kernels, which run once per layer.",
        "Most of an adapter's cost is thin products. Small kernels take longer in AdaLoRA than in "
        "LoRA because of the penalty, the averages and the masks.",
        shares(found["models"]),
        *(
            f"## {_title(found, model)}\n\n{table(groups)}"
            for model, groups in found["models"].items()
        ),
        results.ending("breakdown", found),
    ]
    return "\n\n".join(parts)


def _title(found: results.Results, model: str) -> str:
    return training.title({"model": model, "dropout": 0.0, "shape": found["shapes"][model]})


def picture(found: results.Results) -> Figure:
    """Draw one stacked bar of kinds per peer, grouped by model."""
    models = found["models"]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    places = [1.4 * len(PEERS) * i + j for i in range(len(models)) for j in range(len(PEERS))]
    bars = [groups for found in models.values() for groups in found.values()]
    names = [peers.TITLES[name].removeprefix("adalora_jax: ") for name in PEERS] * len(models)
    below = [0.0] * len(bars)
    for kind, colour in zip(KINDS, COLOURS):
        heights = [groups[kind]["ms"] for groups in bars]
        axes.bar(places, heights, bottom=below, label=kind, color=colour)
        below = [a + b for a, b in zip(below, heights)]
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    for first, model in zip(places[:: len(PEERS)], models):
        where = {"xycoords": ("data", "axes fraction"), "ha": "center"}
        axes.annotate(training.NAMES[model], (first + 1, 1.01), **where)
    axes.set_ylabel("milliseconds per step: sum over threads / cores", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option, every = parser.add_argument, list(training.CPU)
    option("--model", nargs="+", choices=every, default=every, help="models to measure")
    option("--rounds", type=int, default=7, help="number of profiles per method")
    option("--depth", type=int, help="number of layers, instead of the model's own")
    option("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    changes = {"depth": chosen.depth} if chosen.depth else {}
    shapes = {model: training.CPU[model].replace(**changes) for model in chosen.model}
    found = {
        "rounds": chosen.rounds,
        "shapes": {model: vars(shape) for model, shape in shapes.items()},
        "models": {model: measure(shape, chosen.rounds) for model, shape in shapes.items()},
    }
    complete = set(shapes) == set(training.CPU) and not changes
    results.finish("breakdown", found, text, picture, folder=chosen.out, complete=complete)


if __name__ == "__main__":
    main()
