"""Time per call of the allocator alone: with new averages, a new mask, or neither.

    python benchmarks/allocator.py [--case bert ...] [--rounds 15]

The benchmark calls ``allocate``, with its state donated, on the adapters of a BERT-small (36), of a
model with 7 billion parameters (224) and of 10,000 experts (as two stacks). It measures steps that
update the averages, steps that also make a new mask, and steps after the final mask. The same
rounds measure:

- the lower bound: the memory traffic of 4 reads and 2 writes of all adapters, in one array
- PEFT's ``update_and_allocate`` on as many adapters of the same sizes, if PEFT is installed

It also measures the seconds to trace and to compile, and the bytes of the state. A ratio is the
median over the rounds. The table, numbers and figure are written to ``--out``; without it, those of
a complete run are written next to this file. Takes a few minutes on two cores. PEFT needs
``pip install ".[parity]"``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import peers
import timing
from matplotlib.figure import Figure

import adalora_jax as adalora

RANK = 12
EVERY = 10  # steps between two masks
LAST = 10_000
CONFIG = adalora.AdaLoraConfig(
    total_step=2 * LAST, tfinal=LAST, init_r=RANK, target_r=8, deltaT=EVERY
)
# {kind of step: number of such a step}
MOMENTS = {"averages": 1, "averages and mask": EVERY, "after the end": LAST + 1}


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
      peers.Unsupported: PEFT is not installed.
    """

    def __init__(self, case: Case):
        try:
            import peft
            import torch
        except ModuleNotFoundError as error:
            raise peers.Unsupported(f"{error.name} is not installed") from error
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
    except peers.Unsupported as why:
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


def targets(results: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    over_floor, under_peft = (2.0, 1 / 5) if device == "cpu" else (1.5, 1 / 50)
    found = []
    for result in results:
        for moment, times in result["milliseconds"].items():
            title = f"{result['case']}, {moment}: ours / "
            if moment != "after the end":
                ratio = timing.ratio(times["ours"], times["floor"])
                found.append(timing.judged(f"{title}floor", ratio, over_floor))
            if "peft" in times:
                ratio = timing.ratio(times["ours"], times["peft"])
                found.append(timing.judged(f"{title}PEFT", ratio, under_peft))
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = [("adapters", "", "ours, ms", "floor, ms", "PEFT, ms", "ours / floor", "PEFT / ours")]
    for result in results:
        for moment, times in result["milliseconds"].items():
            middle = {name: f"{value:.3g}" for name, value in timing.medians(times).items()}
            over = f"{timing.ratio(times['ours'], times['floor']):.2f}"
            peft = f"{timing.ratio(times['peft'], times['ours']):.0f}" if "peft" in times else ""
            about = f"{result['adapters']:,}: {result['case']}"
            cells = (middle["ours"], middle["floor"], middle.get("peft", ""), over, peft)
            rows.append((about, moment, *cells))
    kept = [("adapters", "MB of adapters", "of the state", "seconds to trace", "to compile")]
    for result in results:
        sizes = (f"{result[name] / 1e6:.1f}" for name in ("adapter bytes", "state bytes"))
        seconds = (f"{result[f'seconds to {verb}']:.2f}" for verb in ("trace", "compile"))
        kept.append((f"{result['adapters']:,}: {result['case']}", *sizes, *seconds))
    return f"{timing.markdown(rows)}\n\n{timing.markdown(kept)}"


def picture(results: Sequence[dict[str, Any]]) -> Figure:
    """Draw one panel per case: the time of each kind of step, on a logarithmic axis."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    looks = {"floor": ("floor", "black"), "ours": ("ours", "tab:blue"), "peft": ("PEFT", "tab:red")}
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results):
        moments = list(result["milliseconds"])
        for row, (name, (label, colour)) in enumerate(looks.items()):
            if name not in result["milliseconds"][moments[0]]:
                continue
            times = [timing.medians(result["milliseconds"][moment])[name] for moment in moments]
            places = [place + 0.27 * (row - 1) for place in range(len(moments))]
            bars = axes.bar(places, times, width=0.25, color=colour, label=label)
            axes.bar_label(bars, [f"{time:.3g}" for time in times], fontsize=8)
        axes.set_xticks(range(len(moments)), moments, fontsize=9)
        axes.set(yscale="log", ylabel="milliseconds")
        axes.set_title(f"{result['adapters']:,} adapters: {result['case']}", fontsize=10)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory for PyTorch
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    results = [measure(CASES[name], chosen.rounds) for name in chosen.case]
    found, about = targets(results, jax.default_backend()), timing.machine()
    text = "\n\n".join(
        [
            table(results),
            f"**Targets**\n\n{timing.judgements(found)}",
            f"Medians of {chosen.rounds} rounds in which all take turns. {about['processor']}, "
            f"{about['cores']} cores, {about['device']}, JAX {about['jax']}.",
        ]
    )
    complete = set(chosen.case) == set(CASES) and not any("missing" in r for r in results)
    folder = chosen.out or (pathlib.Path(__file__).parent if complete else None)
    if folder is None:
        print(text)
        return
    place = timing.place(folder, "allocator")
    timing.save(place, {"results": results, "targets": found}, text)
    picture(results).savefig(place.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
