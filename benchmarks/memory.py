"""Memory of a training step: the state between steps, and the temporaries of one step.

    python benchmarks/memory.py

The benchmark covers the models and peers of ``training.py``. Between steps, memory holds the frozen
base and the training state: trainable parameters, AdamW's moments, and the allocator's averages.
The temporaries of a step are those that XLA reports for the compiled step; for eager PyTorch, the
profiler's peak of simultaneous allocations. No JAX program is run. The table is written to
``memory.md``, the numbers to ``memory.json`` and the figure to ``memory.png``, in this folder or
``--out``. Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
from typing import Any

import jax
import peers
import timing
import training
from matplotlib.figure import Figure
from networks import Shape

PEERS = ("frozen", "lora", "svd", "adalora", "autodiff", "qwix", "full")
TORCH = ("peft-lora", "peft-adalora")
COLUMNS = ("adapters", "training state", "temporaries", "peak")


def size(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not _is_key(leaf)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def of_jax(name: str, shape: Shape, dropout: float) -> dict[str, int]:
    peer, arguments = peers.abstract(name, shape, peers.RANK, dropout)
    program, _, _ = peers.compiled(peer, arguments)
    _, trainable, opt, *_ = arguments
    memory = program.memory_analysis()
    adapters = 0 if name in ("frozen", "full") else size(trainable)
    return {
        "adapters": adapters,
        "training state": 0 if name == "frozen" else size((trainable, opt)),
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def of_torch(name: str, shape: Shape, dropout: float, base: int) -> dict[str, int]:
    step = peers.build(name, shape, peers.RANK, dropout)
    import torch_peers

    found = torch_peers.memory(step)
    return {**found, "peak": base + found["training state"] + found["temporaries"]}


def measure(shape: Shape, dropout: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the bytes of each peer, and ``{peer: reason}`` of those that cannot run."""
    found, missing = {}, {}
    for name in PEERS:
        try:
            found[name] = of_jax(name, shape, dropout)
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed"
    base = size(peers.abstract("frozen", shape)[1][0])
    for name in TORCH:
        try:
            found[name] = of_torch(name, shape, dropout, base)
        except peers.Unsupported as why:
            missing[name] = str(why)
    return found, missing


def extra(found: dict[str, Any], of: str, to: str, column: str) -> float:
    """Return the bytes of ``of`` minus those of ``to``, divided by those of ``of``'s adapters."""
    return (found[of][column] - found[to][column]) / found[of]["adapters"]


def targets(title: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the state with that of LoRA in SVD form, and the peak memory with that of LoRA."""
    return [
        timing.judged(
            f"{title}: {column}, AdaLoRA's over that of {peers.TITLES[to]}, / adapters",
            extra(found, "adalora", to, column),
            2.0,
        )
        for column, to in (("training state", "svd"), ("peak", "lora"))
    ]


def table(found: dict[str, Any], missing: dict[str, str]) -> str:
    rows = [("", *(f"{column}, MB" for column in COLUMNS), "state over LoRA's / adapters")]
    for name, sizes in found.items():
        lora = {"adalora": "lora", "svd": "lora", "peft-adalora": "peft-lora"}.get(name)
        over = f"{extra(found, name, lora, 'training state'):.2f}" if lora in found else ""
        cells = (f"{sizes[column] / 1e6:.2f}" for column in COLUMNS)
        rows.append((peers.TITLES[name], *cells, over))
    rows += [(peers.TITLES[name], why, "", "", "", "") for name, why in missing.items()]
    return timing.markdown(rows)


def picture(results: list[dict[str, Any]]) -> Figure:
    """Draw one panel per model: state and temporaries of each peer, without the base."""
    figure = Figure(figsize=(13, 0.6 + 3.2 * -(-len(results) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(results) // 2), min(2, len(results)), squeeze=False).ravel()
    for axes, result in zip(panels, results):
        found = result["bytes"]
        names = list(found)[::-1]
        labels, start = [peers.TITLES[name] for name in names], [0.0] * len(names)
        for column, colour in (("training state", "tab:blue"), ("temporaries", "lightgrey")):
            widths = [found[name][column] / 1e6 for name in names]
            axes.barh(labels, widths, left=start, color=colour, label=column)
            start = [a + b for a, b in zip(start, widths)]
        axes.set_title(training.title(result, "\n"), fontsize=10)
        axes.set_xlabel("MB, the frozen base left out")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    return figure


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory for PyTorch
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences PyTorch's profiler
    shapes = training.CPU if jax.default_backend() == "cpu" else training.GPU
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=shapes, default=list(shapes))
    parser.add_argument("--depth", type=int, help="layers, instead of what the model has")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    chosen = parser.parse_args(arguments)
    results, found, parts = [], [], []
    for model in chosen.model:
        shape = shapes[model].replace(**{"depth": chosen.depth} if chosen.depth else {})
        dropout = max(training.DROPOUTS.get(model, (0.0,)))
        sizes, missing = measure(shape, dropout)
        about = {"model": model, "dropout": dropout, "shape": vars(shape)}
        results.append({**about, "bytes": sizes, "missing": missing})
        found += targets(model, sizes)
        parts.append(f"**{training.title(results[-1])}**\n\n{table(sizes, missing)}")
    about = timing.machine()
    parts += [
        f"**Targets**\n\n{timing.judgements(found)}",
        f"Of the compiled step for: {about['device']}, JAX {about['jax']}.",
    ]
    place = timing.place(chosen.out, "memory")
    timing.save(place, {"results": results, "targets": found}, "\n\n".join(parts))
    picture(results).savefig(place.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
