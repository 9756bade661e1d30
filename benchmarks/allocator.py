"""Time per call of the allocator alone: with new averages, a new mask, or neither.

    python -m benchmarks.allocator [--case bert ...] [--rounds 15]

The benchmark calls ``allocate``, with its state donated, on the adapters of a BERT-small (36), of a
model with 7 billion parameters (224) and of 10,000 experts (as two stacks). It measures steps that
update the averages, steps that also make a new mask, and steps after the final mask. The same
rounds measure:

- the lower bound: the memory traffic of 4 reads and 2 writes of all adapters, in one array
- PEFT's ``update_and_allocate`` on as many adapters of the same sizes, if PEFT is installed

It also measures the seconds to trace and to compile, and the bytes of the state. Takes a few
minutes on two cores. PEFT needs ``pip install ".[parity]"``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import adalora_jax as adalora
from benchmarks import results, timing
from benchmarks.networks import Unsupported

RANK = 12
EVERY = 10  # steps between two masks
LAST = 10_000
CONFIG = adalora.AdaLoraConfig(
    total_step=2 * LAST, tfinal=LAST, init_r=RANK, target_r=8, deltaT=EVERY
)
# {kind of step: number of such a step}
MOMENTS = {"averages": 1, "averages and mask": EVERY, "after the final mask": LAST + 1}


class Case(NamedTuple):
    """Sizes of adapters: ``(inputs, outputs, number of adapters, number of arrays)``."""

    title: str
    adapters: tuple[tuple[int, int, int, int], ...]

    @property
    def count(self) -> int:
        return sum(count for _, _, count, _ in self.adapters)


def _model(layers: int, width: int, hidden: int, square: int, up: int, down: int):
    sizes = ((width, width, square), (width, hidden, up), (hidden, width, down))
    return tuple((a, b, layers * count, layers * count) for a, b, count in sizes)


CASES = {
    "bert": Case("BERT-small", _model(6, 384, 1536, 4, 1, 1)),
    "7b": Case("7 billion parameters", _model(32, 4096, 11008, 4, 2, 1)),
    "experts": Case("10,000 experts", ((128, 256, 5000, 1), (256, 128, 5000, 1))),
}


class Ours:
    """Compiled ``allocate`` and its state."""

    def __init__(self, case: Case):
        adapters, self.grads = (random_adapters(case, seed) for seed in range(2))
        self.state = adalora.init_state(adapters, CONFIG)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
        self.kept = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.allocator))
        jax.clear_caches()
        start = time.perf_counter()
        self.allocate = jax.jit(adalora.allocate, donate_argnums=0)
        lowered = self.allocate.lower(self.state, self.grads, jnp.int32(0))
        self.tracing = time.perf_counter() - start
        lowered.compile()
        self.compiling = time.perf_counter() - start - self.tracing

    def at(self, step: int) -> Callable[[], Any]:
        """Return a function that repeats the allocator's work at a step."""
        number = jnp.int32(step)
        if step > LAST:  # the final mask is made first
            self.state, _ = self.allocate(self.state, self.grads, jnp.int32(LAST))

        def call():
            self.state, masks = self.allocate(self.state, self.grads, number)
            return masks

        return call


def random_adapters(case: Case, seed: int) -> dict[str, adalora.Adapter]:
    found, key = {}, jax.random.key(seed)
    for inputs, outputs, count, arrays in case.adapters:
        stack = () if arrays == count else (count // arrays,)
        for _ in range(arrays):
            name = f"layer_{len(found):04d}"
            shapes = ((*stack, RANK, outputs), (*stack, RANK), (*stack, RANK, inputs))
            keys = jax.random.split(jax.random.fold_in(key, len(found)), 3)
            found[name] = adalora.Adapter(
                *(jax.random.normal(k, shape) for k, shape in zip(keys, shapes))
            )
    return found


class Floor:
    """Lower bound: the memory traffic that the allocator needs at least."""

    def __init__(self, size: int):
        self.array = jnp.zeros(3 * size // 4)
        self.move = jax.jit(lambda array: array + 1, donate_argnums=0)

    def __call__(self) -> jax.Array:
        self.array = self.move(self.array)
        return self.array


class Peft:
    """PEFT's allocator, on layers whose weights take no memory.

    Raises:
      Unsupported: PEFT is not installed.
    """

    def __init__(self, case: Case):
        try:
            import peft
            import torch
        except ModuleNotFoundError as error:
            raise Unsupported(f"{error.name} is not installed") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        layers = []
        for inputs, outputs, count, _ in case.adapters:
            for _ in range(count):
                layer = torch.nn.Linear(1, 1, bias=False)
                weight = torch.zeros(1, 1, device=device).expand(outputs, inputs)
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                layer.in_features, layer.out_features = inputs, outputs
                layers.append(layer)
        settings = peft.AdaLoraConfig(
            target_modules=r"\d+",
            total_step=CONFIG.total_step,
            tfinal=CONFIG.tfinal,
            init_r=RANK,
            target_r=CONFIG.target_r,
            deltaT=EVERY,
        )
        self.model = peft.get_peft_model(torch.nn.Sequential(*layers), settings).base_model
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
                parameter.grad = torch.randn_like(parameter)

    def at(self, step: int) -> Callable[[], Any]:
        if step > LAST:
            self.model.update_and_allocate(LAST)

        def call():
            self.model.update_and_allocate(step)
            self.wait()

        return call


def measure(case: Case, rounds: int) -> dict[str, Any]:
    ours, theirs, missing, times = Ours(case), None, {}, {}
    floor = Floor(ours.bytes)
    try:
        theirs = Peft(case)
    except Unsupported as why:
        missing = {"missing": str(why)}
    for moment, step in MOMENTS.items():
        together = {"ours": ours.at(step), "floor": floor}
        if theirs is not None:
            together["peft"] = theirs.at(step)
        times[moment] = timing.in_rounds(together, rounds)
        print(f"{case.title}, {moment}: done", file=sys.stderr, flush=True)
    return {
        "case": case.title,
        "adapters": case.count,
        "milliseconds": times,
        "adapter bytes": ours.bytes,
        "state bytes": ours.kept,
        "seconds to trace": ours.tracing,
        "seconds to compile": ours.compiling,
        **missing,
    }


def table(measured: list[dict[str, Any]]) -> str:
    rows = [
        (
            *("model", "adapters", "kind of step", "adalora_jax, milliseconds"),
            *("lower bound, milliseconds", "PEFT, milliseconds"),
            *("adalora_jax / lower bound", "PEFT / adalora_jax"),
        )
    ]
    for result in measured:
        for moment, times in result["milliseconds"].items():
            middle = {name: results.number(ms) for name, ms in timing.medians(times).items()}
            over = results.factor(timing.ratio(times["ours"], times["floor"]))
            peft = (
                results.factor(timing.ratio(times["peft"], times["ours"]))
                if "peft" in times
                else ""
            )
            cells = (middle["ours"], middle["floor"], middle.get("peft", ""), over, peft)
            rows.append((result["case"], f"{result['adapters']:,}", moment, *cells))
    return results.markdown(rows)


def costs(measured: list[dict[str, Any]]) -> str:
    """Return the table of memory and of the time before the first step."""
    rows = [("model", "adapters, MB", "allocator's state, MB", "to trace, s", "to compile, s")]
    for result in measured:
        sizes = (results.number(result[name] / 1e6) for name in ("adapter bytes", "state bytes"))
        seconds = (results.number(result[f"seconds to {verb}"]) for verb in ("trace", "compile"))
        rows.append((result["case"], *sizes, *seconds))
    return results.markdown(rows)


def text(found: results.Results) -> str:
    measured = found["results"]
    rounds = len(next(iter(measured[0]["milliseconds"].values()))["ours"])
    return "\n\n".join(
        [
            "# Time of the allocator",
            "The benchmark measures one call of the allocator alone, without a model. It has three "
            "kinds of steps: those that update the averages of the sensitivity and the "
            f"uncertainty, those that also make a new mask (every {EVERY} steps here), and those "
            "after the final mask, which only apply it. The lower bound is the "
            "time to read all adapters four times and write them twice, in one array. PEFT is its "
            "`update_and_allocate`, on as many adapters of the same sizes in PyTorch.",
            f"Milliseconds are medians of {rounds} interleaved rounds, and ratios are medians of "
            "the ratios within a round. In the last column, a number above 1 means that PEFT is "
            "slower.",
            table(measured),
            "PEFT computes the scores of each adapter in separate operations, so its time grows "
            "with their number; adapters that are stacked in one array are updated together here. "
            "The state of separate adapters of one role is one array, which is updated one triplet "
            "after the other where they are large. After the final mask only the check for finite "
            "gradients remains, which PEFT does not have.",
            "The allocator's state is stored between steps. Tracing and compiling happen once.",
            costs(measured),
            results.ending("allocator", found),
        ]
    )


def picture(found: results.Results) -> Figure:
    """Draw one panel per case: the time of each kind of step, on a logarithmic axis."""
    measured = found["results"]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    looks = {"floor": ("lower bound", "black"), "ours": ("adalora_jax", "tab:blue")}
    looks |= {"peft": ("PEFT", "tab:red")}
    for axes, result in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured):
        moments = list(result["milliseconds"])
        for row, (name, (label, colour)) in enumerate(looks.items()):
            if name not in result["milliseconds"][moments[0]]:
                continue
            times = [timing.medians(result["milliseconds"][moment])[name] for moment in moments]
            places = [place + 0.27 * (row - 1) for place in range(len(moments))]
            bars = axes.bar(places, times, width=0.25, color=colour, label=label)
            axes.bar_label(bars, [results.number(time) for time in times], fontsize=8)
        labels = [moment.replace(" and", "\nand").replace(" the", "\nthe") for moment in moments]
        axes.set_xticks(range(len(moments)), labels, fontsize=9)
        axes.set(yscale="log", ylabel="milliseconds per call")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_title(f"{result['case']}: {result['adapters']:,} adapters", fontsize=10)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory for PyTorch
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--case", nargs="+", choices=CASES, default=list(CASES), help="models to measure")
    option("--rounds", type=int, default=15, help="number of measured calls of each kind")
    option("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    measured = [measure(CASES[name], chosen.rounds) for name in chosen.case]
    complete = set(chosen.case) == set(CASES) and not any("missing" in r for r in measured)
    found = {"results": measured}
    results.finish("allocator", found, text, picture, folder=chosen.out, complete=complete)


if __name__ == "__main__":
    main()
