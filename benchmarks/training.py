"""Time of a training step in this library and in its alternatives.

    python -m benchmarks.training [--model bert ...] [--peers frozen lora ...] [--rounds 7]

Every method has the same model, weights, batch, precision and AdamW, and adapts all linear layers
of all blocks at rank 12. Their steps are interleaved:

- the frozen model: forward, and backward to the activations; the lower bound of all adapters
- this library: LoRA (λ fixed at 1, no penalty, no allocator), the same with λ trained, and complete
  AdaLoRA, with new scores and a new mask at every step
- hand-written LoRA: ``y + x A B`` in the same linen model, differentiated by JAX's autodiff
- Qwix's LoRA, Flax's ``nnx.LoRA``, and full fine-tuning
- PEFT's LoRA and AdaLoRA on the model of transformers with that shape, eager and with
  ``torch.compile``

Methods that compute the same function must have the same losses. A ratio is the median over the
rounds. On a GPU everything is bfloat16, and the results are named ``training-gpu``. Takes up to 15
minutes on two cores. Needs ``pip install ".[quant,plot,parity]"``; peers whose packages are missing
are skipped.
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
from matplotlib.figure import Figure

from benchmarks import peers, results, timing
from benchmarks.networks import Shape, Unsupported

NAMES = {"bert": "BERT", "vit": "ViT", "gpt": "GPT", "llama": "Llama"}
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
SAME = {"lora", "autodiff", "qwix", "nnx-lora", "flax-lora", "qwix-nnx"}  # all compute LoRA


def measure(shape: Shape, names, dropout: float, rounds: int, threads: int = 1) -> dict[str, Any]:
    """Return each peer's milliseconds per round and first losses, and the unsupported peers."""
    steps, losses, missing = {}, {}, {}
    peers.first(shape, peers.RANK)  # computed once, before the threads need it

    def prepare(name):
        start = time.perf_counter()
        try:
            steps[name] = peers.build(name, shape, peers.RANK, dropout)
        except Unsupported as why:
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


def table(result: dict[str, Any]) -> str:
    times = result["milliseconds"]
    columns = [name for name in ("frozen", "adalora") if name in times]
    ratios = [f"ratio to {peers.TITLES[name]}" for name in columns]
    rows = [("method", "milliseconds per step", *ratios)]
    for name, ms in timing.medians(times).items():
        ratios = (f"{timing.ratio(times[name], times[column]):.2f}" for column in columns)
        rows.append((peers.TITLES[name], results.number(ms), *ratios))
    for name, why in result["missing"].items():
        rows.append((peers.TITLES[name], f"not measured: {why}", *("" for _ in columns)))
    return results.markdown(rows)


def findings(measured: list[dict[str, Any]]) -> str:
    """Return how AdaLoRA's time compares with that of other methods, over all models."""
    others = {
        "frozen": "the frozen model",
        "lora": "LoRA in this library",
        "autodiff": "hand-written LoRA",
        "qwix": "Qwix's LoRA",
        "peft-adalora": "PEFT's AdaLoRA",
        "peft-adalora-compiled": "PEFT's AdaLoRA with `torch.compile` (BERT only)",
    }
    lines = []
    for name, whose in others.items():
        every = [result["milliseconds"] for result in measured]
        found = [timing.ratio(t["adalora"], t[name]) for t in every if {name, "adalora"} <= set(t)]
        if found:
            lines.append(f"- {min(found):.2f} to {max(found):.2f} times as long as {whose}")
    if not lines:
        return ""
    return "\n".join(["A step of AdaLoRA in this library takes", "", *lines])


def text(found: results.Results) -> str:
    measured = found["results"]
    rounds = len(next(iter(measured[0]["milliseconds"].values())))
    parts = [
        "# Time of a training step",
        "The benchmark measures the time of one training step of four models, each with random "
        "weights and data, under every method of fine-tuning. All methods share weights, batch, "
        "precision and AdamW, and adapt all linear layers of all blocks at rank "
        f"{peers.RANK}. AdaLoRA computes new scores and a new mask at every step here; in ordinary "
        "use, masks can be less frequent. The frozen model is a forward and a backward pass "
        "without adapters, and so a lower bound for all of them. Hand-written LoRA is `y + x A B`, "
        "differentiated by JAX.",
        f"Milliseconds are medians of {rounds} interleaved rounds, in each of which every method "
        "takes one step. A ratio above 1 is slower than the method in the column's header. Ratios "
        "are medians of the ratios within a round, so that other load on the machine affects them "
        "little; they may therefore differ from the quotients of the milliseconds.",
        findings(measured),
        *(f"## {title(result)}\n\n{table(result)}" for result in measured),
        results.ending("training", found),
    ]
    return "\n\n".join(part for part in parts if part)


def picture(found: results.Results) -> Figure:
    """Draw one panel per model, with one bar per peer."""
    measured = found["results"]
    rows = -(-len(measured) // 2)
    figure = Figure(figsize=(13, 0.6 + 4.0 * rows), layout="constrained")
    panels = figure.subplots(rows, min(2, len(measured)), squeeze=False).ravel()
    for axes, result in zip(panels, measured):
        times = timing.medians(result["milliseconds"])
        names = sorted(times, key=times.__getitem__, reverse=True)
        colours = [_colour(name) for name in names]
        bars = axes.barh([peers.TITLES[n] for n in names], [times[n] for n in names], color=colours)
        labels = axes.bar_label(bars, [results.number(times[n]) for n in names], padding=3)
        for label in labels:  # legible where the line of the frozen model crosses it
            label.set(fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.set_title(title(result, "\n"), fontsize=10)
        axes.set_xlabel("milliseconds per training step")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        if "frozen" in times:
            axes.axvline(times["frozen"], color="black", lw=1, ls=":")
    for axes in panels[len(measured) :]:
        axes.set_axis_off()
    figure.supxlabel(
        "blue: this library; grey: other methods in JAX; red: PyTorch; dotted line: frozen model",
        fontsize=10,
    )
    return figure


def _colour(name: str) -> str:
    if peers.TITLES[name].startswith("adalora_jax"):
        return "tab:blue"
    return "tab:red" if name in peers.TORCH else "black" if name == "frozen" else "darkgrey"


def title(result: dict[str, Any], end: str = " ") -> str:
    shape = Shape(**result["shape"])
    layers = "layer" if shape.depth == 1 else "layers"
    how = ", layers scanned and recomputed" if shape.scan else ""
    return (
        f"{NAMES[result['model']]}{how}, dropout {result['dropout']:g}:{end}{shape.depth} {layers} "
        f"of width {shape.width}, batch of {shape.batch} × {shape.tokens} tokens, {shape.dtype}"
    )


def main(arguments: list[str] | None = None) -> None:
    # JAX must leave GPU memory to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shapes = CPU if jax.default_backend() == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--model", nargs="+", choices=shapes, default=list(shapes), help="models to measure")
    option("--peers", nargs="+", choices=peers.TITLES, help="methods to compare")
    option("--dropout", nargs="+", type=float, help="dropout rates of the adapters")
    option("--rounds", type=int, default=7, help="number of measured steps per method")
    option("--threads", type=int, default=1, help="number of steps to compile in parallel")
    option("--depth", type=int, help="number of layers, instead of the model's own")
    option("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)

    measured = []
    for model in chosen.model:
        shape = shapes[model].replace(**{"depth": chosen.depth} if chosen.depth else {})
        default = [n for n in peers.TITLES if model == "bert" or n not in BERT_ONLY]
        for dropout in chosen.dropout or DROPOUTS.get(model, (0.0,)):
            result = measure(shape, chosen.peers or default, dropout, chosen.rounds, chosen.threads)
            about = {"model": model, "dropout": dropout, "shape": vars(shape)}
            measured.append({**about, **result})
            print(f"{title(measured[-1])}\n\n{table(result)}\n", file=sys.stderr, flush=True)
    every = set(chosen.model) == set(shapes)
    complete = every and not (chosen.peers or chosen.dropout or chosen.depth)
    found = {"results": measured}
    results.finish("training", found, text, picture, folder=chosen.out, complete=complete)


if __name__ == "__main__":
    main()
