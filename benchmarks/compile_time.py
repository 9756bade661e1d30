"""Time to trace and to compile a training step, by number of layers.

    python benchmarks/compile_time.py [--depth 6 24 96] [--repeats 3]

The model is BERT-small with 6 to 96 layers, unrolled and under ``nn.scan`` with recomputed
activations. The frozen model, this library's LoRA and AdaLoRA, and hand-written LoRA are measured
in turn, each with empty caches; the table shows medians of the repeats. Nothing is run, and no
array is allocated. The table is written to ``compile_time.md``, the numbers to
``compile_time.json`` and the figure to ``compile_time.png``, in this folder or ``--out``. Takes
half an hour on two cores.
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
from matplotlib.ticker import LogLocator

PEERS = ("frozen", "lora", "adalora", "autodiff")
FORMS = {"one by one": False, "scanned": True}
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


def total(times: dict[str, list[float]]) -> list[float]:
    return [sum(both) for both in zip(times["trace"], times["compile"])]


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        timing.judged(
            f"{r['depth']} layers {r['form']}: AdaLoRA / LoRA, both ours, tracing and compiling",
            timing.ratio(total(r["seconds"]["adalora"]), total(r["seconds"]["lora"])),
            1.2,
        )
        for r in results
        if {"adalora", "lora"} <= set(r["seconds"])
    ]


def table(results: list[dict[str, Any]]) -> str:
    names = list(results[0]["seconds"])
    rows = [("layers", "", *(f"{peers.TITLES[name]}: trace + compile, s" for name in names))]
    for result in results:
        cells = []
        for name in names:
            middle = timing.medians(result["seconds"][name])
            cells.append(f"{middle['trace']:.1f} + {middle['compile']:.1f}")
        rows.append((result["depth"], result["form"], *cells))
    return timing.markdown(rows)


def picture(results: list[dict[str, Any]]) -> Figure:
    """Draw seconds against layers: tracing on the left, compiling on the right."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    names = list(results[0]["seconds"])
    for axes, part in zip(figure.subplots(1, 2), ("trace", "compile")):
        for form, line in zip(FORMS, ("-", "--")):
            rows = [result for result in results if result["form"] == form]
            for name, colour in zip(names, ("black", "tab:cyan", "tab:blue", "darkgrey")):
                values = [timing.medians(row["seconds"][name])[part] for row in rows]
                label = f"{peers.TITLES[name]}, {form}"
                axes.plot(
                    [row["depth"] for row in rows],
                    *(values, line),
                    **{"color": colour, "marker": "o", "ms": 3, "label": label},
                )
        axes.set(xscale="log", yscale="log", xlabel="layers", ylabel=f"seconds to {part}")
        depths = sorted({row["depth"] for row in results})
        axes.set_xticks(depths, list(map(str, depths)), minor=False)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", nargs="+", type=int, default=[6, 24, 96])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    chosen = parser.parse_args(arguments)
    results = []
    for form, scan in FORMS.items():
        for depth in chosen.depth:
            found = measure(depth, scan, chosen.peers, chosen.repeats)
            results.append({"depth": depth, "form": form, "seconds": found})
            print(f"{depth} layers {form}", flush=True)
    found, about = targets(results), timing.machine()
    text = "\n\n".join(
        [
            table(results),
            f"**Targets**\n\n{timing.judgements(found)}",
            f"{about['processor']}, {about['cores']} cores, for {about['device']}, "
            f"JAX {about['jax']}.",
        ]
    )
    place = timing.place(chosen.out, "compile_time")
    timing.save(place, {"results": results, "targets": found}, text)
    picture(results).savefig(place.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
