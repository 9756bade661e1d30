"""Time of a training step by rank, number of adapters, sequence length and batch size.

    python -m benchmarks.scaling [--rounds 5]

The model is two layers of BERT-small at rank 12, with adapters on all six linear layers of each and
16 sequences of 64 tokens; the benchmark varies one of these at a time. The steps of the frozen
model, this library's LoRA and AdaLoRA, and hand-written LoRA are interleaved. Takes about five
minutes on two cores.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import peers, results, timing, training
from benchmarks.networks import Shape

PEERS = ("frozen", "lora", "adalora", "autodiff")
COLOURS = dict(zip(PEERS, ("black", "tab:cyan", "tab:blue", "darkgrey")))
LAYERS = ("query", "value", "key", "out", "up", "down")  # adapted in this order
AXES = {
    "rank": (4, 12, 32, 64),
    "adapters per layer": (1, 2, 4, 6),
    "tokens per sequence": (32, 64, 128, 256),
    "sequences per batch": (4, 16, 64),
}


def at(axis: str, value: int, shape: Shape) -> tuple[Shape, int]:
    """Return the shape and the rank, with ``axis`` set to ``value``."""
    if axis == "rank":
        return shape, value
    changes = {
        "adapters per layer": {"targets": LAYERS[:value]},
        "tokens per sequence": {"length": value},
        "sequences per batch": {"batch": value},
    }
    return shape.replace(**changes[axis]), peers.RANK


def measure(axis: str, value: int, shape: Shape, rounds: int) -> dict[str, list[float]]:
    changed, rank = at(axis, value, shape)
    return timing.in_rounds({n: peers.build(n, changed, rank) for n in PEERS}, rounds)


def table(axis: str, measured: list[dict[str, Any]]) -> str:
    columns = (f"{peers.TITLES[name]}, milliseconds" for name in PEERS)
    rows = [(axis, *columns, "AdaLoRA / LoRA", "AdaLoRA / frozen model")]
    for result in measured:
        times = result["milliseconds"]
        ratios = (timing.ratio(times["adalora"], times[to]) for to in ("lora", "frozen"))
        cells = map(results.number, timing.medians(times).values())
        rows.append((result["value"], *cells, *(f"{ratio:.2f}" for ratio in ratios)))
    return results.markdown(rows)


def text(found: results.Results) -> str:
    measured, shape = found["results"], found["shape"]
    rounds = len(measured[0]["milliseconds"]["adalora"])
    over = [timing.ratio(r["milliseconds"]["adalora"], r["milliseconds"]["lora"]) for r in measured]
    axes = dict.fromkeys(result["axis"] for result in measured)
    tables = (table(axis, [row for row in measured if row["axis"] == axis]) for axis in axes)
    return "\n\n".join(
        [
            "# Time of a training step by size",
            f"The benchmark varies one size at a time: the rank (else {peers.RANK}), the number "
            f"of adapters per layer (else {len(LAYERS)}), the sequence length (else "
            f"{shape['length']} tokens) or the batch (else {shape['batch']} sequences). The model "
            f"is {shape['depth']} layers of BERT with width {shape['width']}. AdaLoRA makes a new "
            "mask at every step.",
            f"Milliseconds are medians of {rounds} interleaved rounds, and ratios are medians of "
            "the ratios within a round. A ratio below 1 to the frozen model, which does less "
            "work, shows the noise of these measurements.",
            f"AdaLoRA's step takes {min(over):.2f} to {max(over):.2f} times as long as LoRA's in "
            "this library, over all of these sizes.",
            *tables,
            results.ending("scaling", found),
        ]
    )


def picture(found: results.Results) -> Figure:
    """Draw one panel per axis."""
    measured = found["results"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    shown = dict.fromkeys(result["axis"] for result in measured)
    for axes, axis in zip(figure.subplots(2, -(-len(shown) // 2), squeeze=False).ravel(), shown):
        rows = [result for result in measured if result["axis"] == axis]
        values = [row["value"] for row in rows]
        for name in PEERS:
            ms = [timing.medians(row["milliseconds"])[name] for row in rows]
            axes.plot(values, ms, color=COLOURS[name], marker="o", ms=4, label=peers.TITLES[name])
        axes.set(xlabel=axis, ylabel="milliseconds per step", xticks=values)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(PEERS))
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--rounds", type=int, default=5, help="number of measured steps per method")
    option("--axis", nargs="+", choices=AXES, default=list(AXES), help="sizes to vary")
    option("--width", type=int, help="width of the model, instead of 384")
    option("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    shapes = training.CPU if jax.default_backend() == "cpu" else training.GPU
    shape = shapes["bert"].replace(depth=2)
    if chosen.width:
        heads = max(1, chosen.width // 64)
        shape = shape.replace(width=chosen.width, hidden=4 * chosen.width, heads=heads)
    measured = [
        {"axis": axis, "value": value, "milliseconds": measure(axis, value, shape, chosen.rounds)}
        for axis in chosen.axis
        for value in AXES[axis]
    ]
    complete = set(chosen.axis) == set(AXES) and not chosen.width
    found = {"shape": vars(shape), "results": measured}
    results.finish("scaling", found, text, picture, folder=chosen.out, complete=complete)


if __name__ == "__main__":
    main()
