"""Time to trace and to compile a training step, by number of layers.

    python -m benchmarks.compile_time [--depth 6 24 96] [--repeats 3]

The model is BERT-small with 6 to 96 layers, unrolled and under ``nn.scan`` with recomputed
activations. The frozen model, this library's LoRA and AdaLoRA, and hand-written LoRA are measured
in turn, each with empty caches; the table shows medians of the repeats. Nothing is run, and no
array is allocated. Takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks import peers, results, timing, training

PEERS = ("frozen", "lora", "adalora", "autodiff")
DEPTHS = [6, 24, 96]
FORMS = {"unrolled": False, "scanned": True}
LONG = 48  # unrolled models with at least so many layers are measured once


def seconds(name: str, depth: int, scan: bool) -> tuple[float, float]:
    """Return the seconds to trace and the seconds to compile the step of a peer."""
    shape = training.CPU["bert"].replace(depth=depth, scan=scan)
    peer, arguments = peers.abstract(name, shape)
    jax.clear_caches()
    _, tracing, compiling = peers.compiled(peer, arguments)
    return tracing, compiling


def measure(depth: int, scan: bool, names, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return ``{peer: {"trace": seconds, "compile": seconds}}``, one value per repeat."""
    found = {name: {"trace": [], "compile": []} for name in names}
    for _ in range(1 if depth >= LONG and not scan else repeats):
        for name in names:
            for part, value in zip(("trace", "compile"), seconds(name, depth, scan)):
                found[name][part].append(value)
    return found


def table(measured: list[dict[str, Any]], part: str) -> str:
    """Return the table of the seconds to ``"trace"`` or to ``"compile"``."""
    names = list(measured[0]["seconds"])
    rows = [("layers", "form", *(f"{peers.TITLES[name]}, seconds" for name in names))]
    for result in measured:
        middle = (timing.medians(result["seconds"][name])[part] for name in names)
        rows.append((result["depth"], result["form"], *map(results.number, middle)))
    return results.markdown(rows)


def ratios(measured: list[dict[str, Any]]) -> str:
    """Return the table of AdaLoRA's total time divided by LoRA's, if both were measured."""

    def total(times):
        return [sum(both) for both in zip(times["trace"], times["compile"])]

    rows = [("layers", "form", "AdaLoRA / LoRA")]
    for result in measured:
        seconds = result["seconds"]
        if {"adalora", "lora"} <= set(seconds):
            ratio = timing.ratio(total(seconds["adalora"]), total(seconds["lora"]))
            rows.append((result["depth"], result["form"], f"{ratio:.2f}"))
    return results.markdown(rows)


def text(found: results.Results) -> str:
    measured = found["results"]
    counts = {len(times["trace"]) for result in measured for times in result["seconds"].values()}
    repeats = "one run each" if counts == {1} else f"medians of {max(counts)} runs each"
    if counts != {1} and 1 in counts:
        repeats += f", and one run of unrolled models with {LONG} or more layers"
    return "\n\n".join(
        [
            "# Time to trace and to compile a training step",
            "The benchmark traces and compiles the training step of a small BERT with empty "
            "caches, once with its layers unrolled and once with one layer under `nn.scan`, whose "
            "activations are recomputed. It compiles the frozen model, LoRA and AdaLoRA in this "
            "library, and hand-written LoRA. Nothing is run. A program is compiled once per "
            f"training run. The numbers are {repeats}; they depend on other load on the machine, "
            "so differences of a few seconds mean little.",
            "With unrolled layers, each adapter adds its own operations to the program, so both "
            "times grow with the number of layers, and AdaLoRA's more than LoRA's. Under "
            "`nn.scan`, they hardly depend on the number of layers: scan the layers of a deep "
            "model.",
            f"## Tracing\n\n{table(measured, 'trace')}",
            f"## Compilation\n\n{table(measured, 'compile')}",
            f"## Both, of AdaLoRA relative to LoRA in this library\n\n{ratios(measured)}",
            results.ending("compile_time", found),
        ]
    )


def picture(found: results.Results) -> Figure:
    """Draw seconds against layers: tracing on the left, compiling on the right."""
    measured = found["results"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    names = list(measured[0]["seconds"])
    for axes, part in zip(figure.subplots(1, 2), ("trace", "compile")):
        for form, line in zip(FORMS, ("-", "--")):
            rows = [result for result in measured if result["form"] == form]
            for name, colour in zip(names, ("black", "tab:cyan", "tab:blue", "darkgrey")):
                values = [timing.medians(row["seconds"][name])[part] for row in rows]
                label = f"{peers.TITLES[name]}, {form}"
                axes.plot(
                    [row["depth"] for row in rows],
                    *(values, line),
                    **{"color": colour, "marker": "o", "ms": 3, "label": label},
                )
        axes.set(xscale="log", yscale="log", xlabel="layers", ylabel=f"seconds to {part}")
        depths = sorted({row["depth"] for row in measured})
        axes.set_xticks(depths, list(map(str, depths)), minor=False)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--depth", nargs="+", type=int, default=DEPTHS, help="numbers of layers")
    option("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="methods to compare")
    option("--repeats", type=int, default=3, help="number of times to compile each program")
    option("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    measured = []
    for form, scan in FORMS.items():
        for depth in chosen.depth:
            found = measure(depth, scan, chosen.peers, chosen.repeats)
            measured.append({"depth": depth, "form": form, "seconds": found})
            print(f"{depth} layers, {form}", file=sys.stderr, flush=True)
    complete = (chosen.depth, chosen.peers) == (DEPTHS, list(PEERS))
    found = {"results": measured}
    results.finish("compile_time", found, text, picture, folder=chosen.out, complete=complete)


if __name__ == "__main__":
    main()
