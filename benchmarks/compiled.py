"""Operations of the compiled update and of compiled training steps, for a CPU, an H100 and TPUs.

    python -m benchmarks.compiled [--device h100 v5e ...] [--case update ...] [--peers lora ...]

XLA's own compilers for these devices run on a machine without them, so this needs no accelerator,
and its numbers, except the seconds, do not depend on the machine. Compiled are

- the optimizer's update alone, AdamW's and ``adalora(AdamW)``'s, for 36 and 224 adapters, separate
  ones and stacked by role
- the whole training step of the frozen model, of Qwix's LoRA, and of LoRA and AdaLoRA in this
  library, for BERT and for a Llama in bfloat16, unrolled and scanned, over an NF4 base and on a
  mesh of 2 x 2 devices, whose first axis shards the batch and whose second shards the outputs of
  the kernels

Results of devices, cases and peers that are not named remain, as do those of compilers that are not
installed. All of it takes two hours on two cores. Needs ``pip install ".[quant,plot,aot]"`` for the
TPUs, and also ``pip install "jax[cuda12]"`` for the H100.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as adalora
from benchmarks import backends, peers, results, training
from benchmarks.networks import Shape, Unsupported

UPDATES = ("adamw", "adamw-stacked", "adalora", "adalora-stacked")
METHODS = ("frozen", "qwix", "lora", "adalora")
UNROLLED = (*METHODS, "adalora-stacked")
NF4 = ("nf4-lora", "nf4-adalora")
BERT = training.CPU["bert"]
LLAMA = training.CPU["llama"].replace(dtype="bfloat16")
ROLES = {
    **dict.fromkeys(("query", "key", "value", "out"), (384, 384)),
    "up": (384, 1536),
    "down": (1536, 384),
}


class Case(NamedTuple):
    """A program that is compiled for every device.

    Attributes:
      title: what the table calls it.
      peers: the methods that are compared.
      shape: the model; the number of adapters for the update alone.
      mesh: whether it runs on 2 x 2 devices instead of one.
    """

    title: str
    peers: tuple[str, ...]
    shape: Shape | int
    mesh: bool = False


CASES = {
    "update-36": Case("update of 36 adapters", UPDATES, 36),
    "update-224": Case("update of 224 adapters", UPDATES, 224),
    "bert-6": Case("BERT, 6 layers", UNROLLED, BERT),
    "bert-24": Case("BERT, 24 layers", UNROLLED, BERT.replace(depth=24)),
    "bert-scan-24": Case("BERT, 24 layers, scanned", METHODS, BERT.replace(depth=24, scan=True)),
    "bert-scan-96": Case("BERT, 96 layers, scanned", METHODS, BERT.replace(depth=96, scan=True)),
    "llama-6": Case("Llama, 6 layers, bfloat16", (*METHODS, *NF4), LLAMA.replace(depth=6)),
    "llama-scan-24": Case(
        "Llama, 24 layers, scanned, bfloat16", (*METHODS, *NF4), LLAMA.replace(depth=24, scan=True)
    ),
    "mesh-6": Case("BERT, 6 layers, 2 x 2 devices", ("lora", "adalora"), BERT, mesh=True),
    "mesh-scan-24": Case(
        "BERT, 24 layers, scanned, 2 x 2 devices",
        ("lora", "adalora"),
        BERT.replace(depth=24, scan=True),
        mesh=True,
    ),
}
TITLES = {"adamw": "AdamW", "adamw-stacked": "AdamW, stacked by role", **peers.TITLES}


def adapters(count: int) -> dict[str, adalora.Adapter]:
    """Return adapters of rank 12 for as many weights, in six shapes."""
    names = list(ROLES)
    found = {}
    for index in range(count):
        name = names[index % len(names)]
        inputs, outputs = ROLES[name]
        found[f"layer_{index // len(names)}/{name}"] = adalora.Adapter(
            jnp.zeros((peers.RANK, outputs)), jnp.ones(peers.RANK), jnp.zeros((peers.RANK, inputs))
        )
    return found


def update(peer: str, count: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the jitted update of an optimizer, and the shapes of its arguments."""
    config = adalora.AdaLoraConfig(
        total_step=100_000, init_r=peers.RANK, target_r=8, init="lambda_one"
    )
    method, _, stacked = peer.partition("-")
    tx = peers.ADAMW if method == "adamw" else adalora.adalora(peers.ADAMW, config)
    params = jax.eval_shape(lambda: adapters(count))
    params = jax.eval_shape(adalora.stack, params) if stacked else params

    def apply(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(apply, donate_argnums=(0, 1)), (params, jax.eval_shape(tx.init, params), params)


def on_mesh(arguments: tuple[Any, ...], mesh: Mesh) -> tuple[Any, ...]:
    """Return the shapes of a step's arguments with shardings.

    The outputs of kernels, p, and its averages and moments are sharded along the mesh's second
    axis, the batch along its first.
    """
    *state, batch = arguments

    def sharding(path, leaf):
        sharded = leaf.ndim > 1 and re.search(
            r"(\.p|\['kernel'\]|\[0\])$", jax.tree_util.keystr(path)
        )
        spec = P(*[None] * (leaf.ndim - 1), "model") if sharded else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(sharding, tuple(state))
    return *placed, backends.placed(batch, NamedSharding(mesh, P("data")))


def measure(case: Case, peer: str, device: str) -> dict[str, Any]:
    """Compile a program for a device, and return its counts.

    Raises:
      Unsupported: the compiler is not installed.
    """
    found = backends.devices(device, 4 if case.mesh else 1)
    if isinstance(case.shape, int):
        function, arguments = update(peer, case.shape)
    else:
        method, arguments = peers.abstract(peer, case.shape)
        function = peers.jitted(method)
    if case.mesh:
        arguments = on_mesh(arguments, Mesh(np.array(found).reshape(2, 2), ("data", "model")))
    else:
        arguments = backends.placed(arguments, SingleDeviceSharding(found[0]))
    counts, seconds = backends.compiled(function, *arguments)
    return {**counts._asdict(), "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of one device."""
    head = ("program", "method", "kernels", "copies", "conditionals", "kernels in branches")
    lines: list[tuple[Any, ...]] = [
        (*head, "collectives", "temporaries, kB", "trace and compile, CPU seconds")
    ]
    for row in rows:
        numbers = (f"{row[key]:,}" for key in ("kernels", "copies", "conditionals"))
        lines.append(
            (
                CASES[row["case"]].title,
                TITLES[row["peer"]],
                *numbers,
                f"{row['branch_kernels']:,}",
                f"{row['collectives']:,}",
                results.number(row["temporaries"] / 1e3),
                results.number(row["seconds"]),
            )
        )
    return results.markdown(lines)


def text(found: results.Results) -> str:
    by_device = {
        name: [row for row in found["results"] if row["device"] == name] for name in backends.TITLES
    }
    parts = [
        "# Operations of compiled programs",
        "XLA's compilers for a CPU, an H100 and two TPUs compiled these programs on a machine "
        "without them. Kernels and copies are those that every run executes; the body of a loop "
        "counts once. Those in the branches of conditionals, of which a run executes one each, are "
        "counted apart. Nothing was run, so all numbers but the seconds are independent of the "
        "machine; the seconds are those of all threads. The update is AdamW's, alone and inside of "
        "`adalora`; all other programs are whole training steps with AdamW and adapters of rank 12 "
        "on all linear layers. The prefetches of a TPU between its memories are not counted as "
        "copies.",
    ]
    for name, rows in by_device.items():
        if rows:
            parts.append(f"## {backends.TITLES[name]}\n\n{table(rows)}")
    return "\n\n".join([*parts, results.ending("compiled", found)])


def merged(path: pathlib.Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a file, if it exists, and the new ones, which replace rows of the same."""
    rows = json.loads(path.read_text("utf-8"))["results"] if path.exists() else []
    known = {(row["device"], row["case"], row["peer"]): row for row in (*rows, *new)}
    order = [
        (device, name, peer)
        for device in backends.TITLES
        for name, case in CASES.items()
        for peer in case.peers
    ]
    return [known[key] for key in order if key in known]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--device", nargs="+", choices=backends.TITLES, default=list(backends.TITLES))
    option("--case", nargs="+", choices=CASES, default=list(CASES), help="programs to compile")
    option("--peers", nargs="+", choices=TITLES, default=list(TITLES), help="methods to compare")
    option("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    os.environ.update(backends.ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # an installed plug-in would look for its device
    rows = []
    for device in chosen.device:
        for name in chosen.case:
            for peer in CASES[name].peers:
                if peer not in chosen.peers:
                    continue
                try:
                    row = measure(CASES[name], peer, device)
                except Unsupported as why:
                    print(f"{device}, {name}, {peer}: {why}", file=sys.stderr, flush=True)
                    continue
                rows.append({"device": device, "case": name, "peer": peer, **row})
                print(rows[-1], file=sys.stderr, flush=True)
    path = (chosen.out or results.HERE) / "compiled.json"
    results.finish("compiled", {"results": merged(path, rows)}, text, folder=chosen.out)


if __name__ == "__main__":
    main()
