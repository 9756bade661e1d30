"""Memory of a training step: the state between steps, and the temporaries of one step.

    python -m benchmarks.memory

The benchmark covers the models and peers of ``training.py``. Between steps, memory holds the frozen
base and the training state: trainable parameters, AdamW's moments, and the allocator's averages.
The temporaries of a step are those that XLA reports for the compiled step; for eager PyTorch, the
profiler's peak of simultaneous allocations. No JAX program is run. Takes about three minutes on two
cores.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import peers, results, training
from benchmarks.networks import Shape, Unsupported

PEERS = ("frozen", "lora", "svd", "adalora", "autodiff", "qwix", "full")
TORCH = ("peft-lora", "peft-adalora")
COLUMNS = ("adapters", "training state", "temporaries", "peak")
BEYOND = ("training state", "peak")


def size(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not _is_key(leaf)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def of_jax(name: str, shape: Shape, dropout: float) -> dict[str, int]:
    peer, arguments = peers.abstract(name, shape, peers.RANK, dropout)
    program = peers.jitted(peer).lower(*arguments).compile()
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
    from benchmarks import torch_peers

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
        except Unsupported as why:
            missing[name] = str(why)
    return found, missing


def extra(found: dict[str, Any], of: str, to: str, column: str) -> float:
    """Return the bytes of ``of`` minus those of ``to``, divided by those of ``of``'s adapters."""
    return (found[of][column] - found[to][column]) / found[of]["adapters"]


def table(found: dict[str, Any], missing: dict[str, str]) -> str:
    beyond = [f"({column} - LoRA's) / adapters" for column in BEYOND]
    rows = [("method", *(f"{column}, MB" for column in COLUMNS), *beyond)]
    for name, sizes in found.items():
        lora = {"adalora": "lora", "svd": "lora", "peft-adalora": "peft-lora"}.get(name)
        cells = (results.number(sizes[column] / 1e6) for column in COLUMNS)
        more = (f"{extra(found, name, lora, c):.2f}" if lora in found else "" for c in BEYOND)
        rows.append((peers.TITLES[name], *cells, *more))
    for name, why in missing.items():
        rows.append((peers.TITLES[name], f"not measured: {why}", *[""] * (len(rows[0]) - 2)))
    return results.markdown(rows)


def text(found: results.Results) -> str:
    peaks = [[r["bytes"][n]["peak"] for n in ("adalora", "lora")] for r in found["results"]]
    more = [100 * (ours / lora - 1) for ours, lora in peaks]
    parts = [
        "# Memory of a training step",
        "The benchmark adds up the memory that a training step needs, for the models and methods "
        "of [the benchmark of training steps](training.md). The training state is stored between "
        "steps, next to the frozen base: the trained parameters, AdamW's moments, and in AdaLoRA "
        "the averages of the allocator. Temporaries exist during a step. The peak is all of "
        "these: base, training state, batch and temporaries. XLA reports the temporaries of the "
        "compiled step; for PyTorch they are the profiler's largest sum of live allocations.",
        "The last two columns subtract LoRA's memory from AdaLoRA's, in the same library, and "
        "divide by the size of the adapters. AdaLoRA's training state has two averages per "
        "parameter of the adapters more than LoRA's, hence 2.00; PEFT's stores three. AdaLoRA's "
        f"peak is {min(more):.1f} to {max(more):.1f} % above LoRA's in this library.",
        *(
            f"## {training.title(result)}\n\n{table(result['bytes'], result['missing'])}"
            for result in found["results"]
        ),
        results.ending("memory", found),
    ]
    return "\n\n".join(parts)


def picture(found: results.Results) -> Figure:
    """Draw one panel per model: state and temporaries of each peer, without the base."""
    measured = found["results"]
    figure = Figure(figsize=(13, 0.6 + 3.2 * -(-len(measured) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(measured) // 2), min(2, len(measured)), squeeze=False).ravel()
    for axes, result in zip(panels, measured):
        sizes = result["bytes"]
        names = list(sizes)[::-1]
        labels, start = [peers.TITLES[name] for name in names], [0.0] * len(names)
        for column, colour in (("training state", "tab:blue"), ("temporaries", "lightgrey")):
            widths = [sizes[name][column] / 1e6 for name in names]
            axes.barh(labels, widths, left=start, color=colour, label=column)
            start = [a + b for a, b in zip(start, widths)]
        axes.set_title(training.title(result, "\n"), fontsize=10)
        axes.set_xlabel("MB, without the frozen base")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(measured) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory for PyTorch
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences PyTorch's profiler
    shapes = training.CPU if jax.default_backend() == "cpu" else training.GPU
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--model", nargs="+", choices=shapes, default=list(shapes), help="models to measure")
    option("--depth", type=int, help="number of layers, instead of the model's own")
    option("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    measured = []
    for model in chosen.model:
        shape = shapes[model].replace(**{"depth": chosen.depth} if chosen.depth else {})
        dropout = max(training.DROPOUTS.get(model, (0.0,)))
        sizes, missing = measure(shape, dropout)
        about = {"model": model, "dropout": dropout, "shape": vars(shape)}
        measured.append({**about, "bytes": sizes, "missing": missing})
    complete = set(chosen.model) == set(shapes) and not chosen.depth
    found = {"results": measured}
    results.finish("memory", found, text, picture, folder=chosen.out, complete=complete)


if __name__ == "__main__":
    main()
