"""Time of a training step by rank, number of adapters, sequence length and batch size.

    python benchmarks/scaling.py [--rounds 5]

The model is two layers of BERT-small at rank 12, with adapters on all six linear layers of each and
16 sequences of 64 tokens; the benchmark varies one of these at a time. The steps of the frozen
model, this library's LoRA and AdaLoRA, and hand-written LoRA are interleaved. The table is written
to ``scaling.md``, the numbers to ``scaling.json`` and the figure to ``scaling.png``, in this folder
or ``--out``. Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
import peers
import timing
import training
from matplotlib.figure import Figure
from networks import Shape

PEERS = ("frozen", "lora", "adalora", "autodiff")
COLOURS = dict(zip(PEERS, ("black", "tab:cyan", "tab:blue", "darkgrey")))
LAYERS = ("query", "value", "key", "out", "up", "down")  # adapted in this order
AXES = {
    "rank": (4, 12, 32, 64),
    "adapters a layer": (1, 2, 4, 6),
    "tokens a sequence": (32, 64, 128, 256),
    "sequences a batch": (4, 16, 64),
}


def at(axis: str, value: int, shape: Shape) -> tuple[Shape, int]:
    """Return the shape and the rank, with ``axis`` set to ``value``."""
    if axis == "rank":
        return shape, value
    changes = {
        "adapters a layer": {"targets": LAYERS[:value]},
        "tokens a sequence": {"length": value},
        "sequences a batch": {"batch": value},
    }
    return shape.replace(**changes[axis]), peers.RANK


def measure(axis: str, value: int, shape: Shape, rounds: int) -> dict[str, list[float]]:
    changed, rank = at(axis, value, shape)
    return timing.in_rounds({n: peers.build(n, changed, rank) for n in PEERS}, rounds)


def table(axis: str, results: list[dict[str, Any]]) -> str:
    rows = [
        (axis, *(f"{peers.TITLES[n]}, ms" for n in PEERS), "AdaLoRA / LoRA", "AdaLoRA / frozen")
    ]
    for result in results:
        times = result["milliseconds"]
        cells = (f"{ms:.1f}" for ms in timing.medians(times).values())
        ratios = (timing.ratio(times["adalora"], times[to]) for to in ("lora", "frozen"))
        rows.append((result["value"], *cells, *(f"{ratio:.2f}" for ratio in ratios)))
    return timing.markdown(rows)


def picture(results: list[dict[str, Any]]) -> Figure:
    """Draw one panel per axis."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    shown = dict.fromkeys(result["axis"] for result in results)
    for axes, axis in zip(figure.subplots(2, -(-len(shown) // 2), squeeze=False).ravel(), shown):
        rows = [result for result in results if result["axis"] == axis]
        values = [row["value"] for row in rows]
        for name in PEERS:
            ms = [timing.medians(row["milliseconds"])[name] for row in rows]
            axes.plot(values, ms, color=COLOURS[name], marker="o", ms=4, label=peers.TITLES[name])
        axes.set(xlabel=axis, ylabel="milliseconds a step", xticks=values)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(PEERS))
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--width", type=int, help="of the model, instead of 384")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    chosen = parser.parse_args(arguments)
    shapes = training.CPU if jax.default_backend() == "cpu" else training.GPU
    shape = shapes["bert"].replace(depth=2)
    if chosen.width:
        heads = max(1, chosen.width // 64)
        shape = shape.replace(width=chosen.width, hidden=4 * chosen.width, heads=heads)
    results = [
        {"axis": axis, "value": value, "milliseconds": measure(axis, value, shape, chosen.rounds)}
        for axis in chosen.axis
        for value in AXES[axis]
    ]
    about, along = timing.machine(), lambda axis: [r for r in results if r["axis"] == axis]
    parts = [
        *(table(axis, along(axis)) for axis in chosen.axis),
        f"Medians of {chosen.rounds} rounds in which all take turns. {about['processor']}, "
        f"{about['cores']} cores, {about['device']}, JAX {about['jax']}.",
    ]
    place = timing.place(chosen.out, "scaling")
    timing.save(place, {"shape": vars(shape), "results": results}, "\n\n".join(parts))
    picture(results).savefig(place.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
