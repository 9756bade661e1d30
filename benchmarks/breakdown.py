"""Time of a training step by kind of kernel, measured by XLA's profiler.

    python benchmarks/breakdown.py [--model bert ...] [--rounds 7]

The benchmark profiles the frozen model and this library's LoRA and AdaLoRA, on the models of
``training.py``. Every kernel has one of these kinds:

- large products: of weights with activations, and those of attention
- thin products: the rank is an axis of the result, or the axis that is summed over; the result of
  the latter is as large as the layer's output
- passes over activations: other kernels whose result has at least width × tokens elements
- the rest: smaller kernels, mostly of the adapters: penalty, optimizer, averages, masks

Times are sums over all threads, divided by the number of cores: the time of a step if all cores are
busy. A thread that waits for another one inside of a product counts as busy. The table, numbers and
figure are written to ``--out``; without it, those of a complete run are written next to this file.
Takes four minutes on two cores.
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
import peers
import timing
import training
from matplotlib.figure import Figure
from networks import Shape

PEERS = ("frozen", "lora", "adalora")
KINDS = (
    "large products",
    "thin products, to the rank",
    "thin products, from the rank",
    "passes over activations",
    "the rest",
)
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
    rows = [("", *(f"{peers.TITLES[name]}: ms" for name in found), *("kernels" for _ in found))]
    for kind in KINDS:
        cells = [groups[kind] for groups in found.values()]
        rows.append((kind, *(f"{c['ms']:.1f}" for c in cells), *(c["kernels"] for c in cells)))
    totals = [sum(group["ms"] for group in groups.values()) for groups in found.values()]
    rows.append(("all", *(f"{total:.1f}" for total in totals), *("" for _ in found)))
    return timing.markdown(rows)


def picture(results: Mapping[str, Any]) -> Figure:
    """Draw one stacked bar of kinds per peer, grouped by model."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    places = [1.4 * len(PEERS) * i + j for i in range(len(results)) for j in range(len(PEERS))]
    bars = [groups for found in results.values() for groups in found.values()]
    names = [peers.TITLES[name] for found in results.values() for name in found]
    below = [0.0] * len(bars)
    for kind, colour in zip(KINDS, COLOURS):
        heights = [groups[kind]["ms"] for groups in bars]
        axes.bar(places, heights, bottom=below, label=kind, color=colour)
        below = [a + b for a, b in zip(below, heights)]
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    for first, model in zip(places[:: len(PEERS)], results):
        axes.annotate(model, (first + 1, 1.01), xycoords=("data", "axes fraction"), ha="center")
    axes.set_ylabel("milliseconds a step, threads / cores")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=training.CPU, default=list(training.CPU))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, help="layers, instead of what the model has")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    results, parts = {}, []
    for model in chosen.model:
        shape = training.CPU[model].replace(**{"depth": chosen.depth} if chosen.depth else {})
        results[model] = measure(shape, chosen.rounds)
        about = {"model": model, "dropout": 0.0, "shape": vars(shape)}
        parts.append(f"**{training.title(about)}**\n\n{table(results[model])}")
    machine = timing.machine()
    parts.append(
        f"Medians of {chosen.rounds} rounds in which all take turns. {machine['processor']}, "
        f"{machine['cores']} cores, {machine['device']}, JAX {machine['jax']}."
    )
    everything = set(chosen.model) == set(training.CPU) and not chosen.depth
    place = chosen.out or (pathlib.Path(__file__).parent if everything else None)
    if place is None:
        print("\n\n".join(parts))
        return
    place = timing.place(place, "breakdown")
    timing.save(place, {"models": results}, "\n\n".join(parts))
    picture(results).savefig(place.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
