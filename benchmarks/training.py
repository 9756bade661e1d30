"""Time of a training step in this library and in its alternatives.

    python benchmarks/training.py [--model bert ...] [--peers frozen lora ...] [--rounds 7]

Every method has the same model, weights, batch, precision and AdamW, and adapts all linear layers
of all blocks at rank 12. Their steps are interleaved:

- the frozen model: forward, and backward to the activations; the lower bound of all adapters
- ours: LoRA (λ fixed at 1, no penalty, no allocator), the same with λ trained ("SVD form"), and
  complete AdaLoRA, with new scores and a new mask at every step
- hand-written LoRA: ``y + x A B`` in the same linen model, differentiated by JAX's autodiff
- Qwix's LoRA, Flax's ``nnx.LoRA``, and full fine-tuning
- PEFT's LoRA and AdaLoRA on the model of transformers with that shape, eager and with
  ``torch.compile``

Methods that compute the same function must have the same losses. A ratio is the median over the
rounds. On a GPU everything is bfloat16, and the results are named ``training-gpu``. The table,
numbers and figure are written to ``--out``; without it, those of a complete run are written next to
this file. Takes up to 15 minutes on two cores. Needs ``pip install ".[quant,plot,parity]"``; peers
whose packages are missing are skipped.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import peers
import timing
from matplotlib.figure import Figure
from networks import Shape

TEXT = {"width": 384, "hidden": 1536, "heads": 6, "depth": 6}
CPU = {
    "bert": Shape("bert", **TEXT, batch=16, length=64),
    "vit": Shape("vit", depth=12, width=192, hidden=768, heads=3, batch=4, image=224, patch=16),
    "gpt": Shape("gpt", **TEXT, batch=8, length=128, scan=True),
    "llama": Shape("llama", depth=2, width=1024, hidden=2816, heads=16, batch=2, length=256),
}
LARGE = {"width": 4096, "hidden": 11008, "heads": 32, "vocabulary": 32000}
GPU = {
    **{name: shape.replace(dtype="bfloat16") for name, shape in CPU.items()},
    "llama": Shape("llama", depth=2, **LARGE, batch=2, length=1024, dtype="bfloat16"),
}
DROPOUTS = {"bert": (0.1, 0.0)}  # none in the other models
BERT_ONLY = ("svd", "nnx-lora", "peft-lora-compiled", "peft-adalora-compiled")  # to save time
# Targets: the time of the first peer is at most ``limit`` times that of the second.
ANYWHERE = (
    ("adalora", "lora", 1.03),
    ("nnx-adalora", "nnx-lora", 1.03),
    ("adalora", "frozen", 1.15),
)
ON_CPU = {
    "bert": (
        ("nnx-adalora", "flax-lora", 0.6),
        ("adalora", "qwix", 0.6),
        ("nnx-adalora", "qwix-nnx", 0.6),
    ),
    "any": (("adalora", "peft-adalora", 1.0), ("adalora", "peft-adalora-compiled", 1.0)),
}
ON_GPU = {
    "bert": (("adalora", "peft-adalora", 1 / 3),),
    "llama": (("adalora", "peft-adalora", 1 / 1.3),),
}
SAME = {"lora", "autodiff", "qwix", "nnx-lora", "flax-lora", "qwix-nnx"}  # all compute LoRA


def measure(shape: Shape, names, dropout: float, rounds: int, threads: int = 1) -> dict[str, Any]:
    """Return each peer's milliseconds per round and first losses, and the unsupported peers."""
    steps, losses, missing = {}, {}, {}
    peers.first(shape, peers.RANK)  # computed once, before the threads need it

    def prepare(name):
        start = time.perf_counter()
        try:
            steps[name] = peers.build(name, shape, peers.RANK, dropout)
        except peers.Unsupported as why:
            missing[name] = str(why)
            return
        losses[name] = [float(steps[name]()) for _ in range(3)]
        seconds = time.perf_counter() - start
        print(f"{shape.kind}, {name}: ready in {seconds:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(prepare, [name for name in names if name not in peers.TORCH]))
    for name in names:
        if name in peers.TORCH:
            prepare(name)
    steps = {name: steps[name] for name in names if name in steps}
    compare(losses, shape.dtype, dropout)
    times = timing.in_rounds(steps, rounds, warm_up=1)
    return {"milliseconds": times, "first losses": losses, "missing": missing}


def compare(losses: dict[str, list[float]], dtype: str, dropout: float) -> None:
    """Check that peers that compute the same function have the same losses.

    Raises:
      RuntimeError: the losses differ. With dropout, the first losses must agree, because the
        initial adapters add 0; the later ones only within 10 %, because random masks differ.
    """
    found = {name: values for name, values in losses.items() if name in SAME}
    exact = 1e-4 if dtype == "float32" else 2e-2
    tolerance = np.array([exact, *[max(exact, 0.1 if dropout else 0)] * 2])
    values = np.array(list(found.values())).reshape(-1, 3)
    if (np.abs(values - values[:1]) > tolerance * np.abs(values[:1])).any():
        raise RuntimeError(f"peers that should have the same losses have {found}.")


def targets(model: str, dropout: float, times: dict[str, list[float]], device: str):
    """Return the targets of a model and whether these times reach them."""
    asked = list(ANYWHERE)
    for where, ratios in (ON_CPU if device == "cpu" else ON_GPU).items():
        asked += ratios if where in (model, "any") else ()
    if device == "cpu" and model == "bert" and dropout:
        asked.append(("adalora", "autodiff", 0.5))
    return [
        timing.judged(
            f"{model}, dropout {dropout:g}: {peers.TITLES[of]} / {peers.TITLES[to]}",
            timing.ratio(times[of], times[to]),
            limit,
        )
        for of, to, limit in asked
        if of in times and to in times
    ]


def table(result: dict[str, Any]) -> str:
    times = result["milliseconds"]
    columns = [name for name in ("frozen", "adalora") if name in times]
    rows = [("", "ms a step", *(f"/ {peers.TITLES[name]}" for name in columns))]
    for name, ms in timing.medians(times).items():
        ratios = (f"{timing.ratio(times[name], times[column]):.2f}" for column in columns)
        rows.append((peers.TITLES[name], f"{ms:.1f}" if ms < 100 else f"{ms:.0f}", *ratios))
    rows += [
        (peers.TITLES[name], why, *("" for _ in columns)) for name, why in result["missing"].items()
    ]
    return timing.markdown(rows)


def picture(results: list[dict[str, Any]]) -> Figure:
    """Draw one panel per model, with one bar per peer."""
    rows = -(-len(results) // 2)
    figure = Figure(figsize=(13, 0.6 + 4.0 * rows), layout="constrained")
    panels = figure.subplots(rows, min(2, len(results)), squeeze=False).ravel()
    for axes, result in zip(panels, results):
        times = timing.medians(result["milliseconds"])
        names = sorted(times, key=times.__getitem__, reverse=True)
        colours = [_colour(name) for name in names]
        bars = axes.barh([peers.TITLES[n] for n in names], [times[n] for n in names], color=colours)
        axes.bar_label(bars, [f"{times[n]:.3g}" for n in names], padding=3, fontsize=9)
        axes.set_title(title(result, "\n"), fontsize=10)
        axes.set_xlabel("milliseconds a training step")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        if "frozen" in times:
            axes.axvline(times["frozen"], color="black", lw=1, ls=":")
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    figure.supxlabel("blue: this library, grey: others in JAX, red: in PyTorch", fontsize=10)
    return figure


def _colour(name: str) -> str:
    if peers.TITLES[name].startswith("ours"):
        return "tab:blue"
    return "tab:red" if name in peers.TORCH else "black" if name == "frozen" else "darkgrey"


def title(result: dict[str, Any], end: str = " ") -> str:
    shape = Shape(**result["shape"])
    layers = "layer" if shape.depth == 1 else "layers"
    how = ", layers scanned and recomputed" if shape.scan else ""
    return (
        f"{result['model']}{how}, dropout {result['dropout']:g}:{end}{shape.depth} {layers} of "
        f"width {shape.width}, {shape.batch} × {shape.tokens} tokens, {shape.dtype}"
    )


def main(arguments: list[str] | None = None) -> None:
    # JAX must leave GPU memory to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.default_backend()
    shapes = CPU if device == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=shapes, default=list(shapes))
    parser.add_argument("--peers", nargs="+", choices=peers.TITLES)
    parser.add_argument("--dropout", nargs="+", type=float)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="so many compile at a time")
    parser.add_argument("--depth", type=int, help="layers, instead of what the model has")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)

    results, found = [], []
    for model in chosen.model:
        shape = shapes[model].replace(**{"depth": chosen.depth} if chosen.depth else {})
        default = [n for n in peers.TITLES if model == "bert" or n not in BERT_ONLY]
        for dropout in chosen.dropout or DROPOUTS.get(model, (0.0,)):
            result = measure(shape, chosen.peers or default, dropout, chosen.rounds, chosen.threads)
            about = {"model": model, "dropout": dropout, "shape": vars(shape)}
            results.append({**about, **result})
            found += targets(model, dropout, result["milliseconds"], device)
            print(f"{title(results[-1])}\n\n{table(result)}\n", flush=True)
    about = timing.machine()
    text = "\n\n".join(
        [
            *(f"**{title(result)}**\n\n{table(result)}" for result in results),
            f"**Targets**\n\n{timing.judgements(found)}",
            f"Medians of {chosen.rounds} rounds in which all take turns. {about['processor']}, "
            f"{about['cores']} cores, {about['device']}, JAX {about['jax']}.",
        ]
    )
    everything = set(chosen.model) == set(shapes) and not (
        chosen.peers or chosen.dropout or chosen.depth
    )
    place = chosen.out or (pathlib.Path(__file__).parent if everything else None)
    if place is None:
        print(timing.judgements(found))
        return
    place = timing.place(place, "training")
    timing.save(place, {"results": results, "targets": found}, text)
    picture(results).savefig(place.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
