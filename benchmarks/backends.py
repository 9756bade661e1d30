"""Compile for a CPU, an H100 or a TPU on a machine without one, and count what the program runs.

XLA's compilers need a description of the device, not the device. That for TPUs comes with
``pip install "jax[tpu]"``, that for NVIDIA's GPUs with ``pip install "jax[cuda12]"`` (3 GB).
"""

from __future__ import annotations

import functools
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from benchmarks.networks import Unsupported

# No metadata server is asked for the host, and no kernel is timed to choose the fastest.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_force_host_platform_device_count=8",
}
TITLES = {"cpu": "CPU", "h100": "H100", "v5e": "TPU v5e", "v6e": "TPU v6e"}
# The properties of an H100 SXM that the compiler reads.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "copy-start"}


class Counts(NamedTuple):
    """What a compiled program contains; the body of a loop counts once.

    Attributes:
      kernels: fusions, products and other operations that every run executes.
      copies: copies of arrays that every run executes.
      branch_kernels: kernels and copies in the branches of conditionals.
      conditionals: conditionals, also in branches.
      collectives: operations between devices, also in branches.
      temporaries: bytes of temporary arrays on one device.
    """

    kernels: int
    copies: int
    branch_kernels: int
    conditionals: int
    collectives: int
    temporaries: int


@functools.cache
def devices(name: str, count: int = 1) -> list[Any]:
    """Return devices, or descriptions of devices, to compile for.

    Raises:
      Unsupported: the compiler is not installed, or another process uses it.
    """
    if name == "cpu":
        return jax.devices("cpu")[:count]
    try:
        if name == "h100":
            found = topologies.get_topology_desc(
                platform="cuda", target_config=_H100, topology=f"1x1x{count}"
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:2x2")
    except Exception as error:  # each plug-in has its own
        raise Unsupported(f"the compiler for {TITLES[name]} does not start: {error}") from error
    return list(found.devices)[:count]


def placed(tree: Any, sharding: Any) -> Any:
    """Return the shapes of a tree with a sharding, or with a tree of shardings."""

    def one(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: one(leaf, sharding), tree)
    return jax.tree.map(one, tree, sharding)


def compiled(function: Any, *arguments: Any) -> tuple[Counts, float]:
    """Return the counts of a function's program, and the CPU seconds to trace and compile it.

    Those of all threads are counted, and hardly depend on the load of the machine.
    """
    jax.clear_caches()
    start = time.process_time()
    program = function.lower(*arguments).compile()
    seconds = time.process_time() - start
    return counts(program.as_text(), program.memory_analysis().temp_size_in_bytes), seconds


def counts(text: str, temporaries: int = 0) -> Counts:
    """Count the operations of an optimized program from its text."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif operation := re.match(r"\s+(?:ROOT )?%?\S+ = .*? ([a-z][\w-]*)\(", line):
            computations[name].append((operation[1], line))
    found = dict.fromkeys(Counts._fields, 0)

    def visit(name: str, branch: bool) -> None:
        for operation, line in computations[name]:
            if operation in _FREE or operation.endswith("-done"):
                continue
            called = re.findall(r"(?:to_apply|body|condition)=%?([\w.-]+)", line)
            if operation in ("call", "while"):
                for inner in called:
                    visit(inner, branch)
            elif operation == "conditional":
                found["conditionals"] += 1
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                one = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
                for inner in branches[1].split(",") if branches else one:
                    visit(inner.strip().lstrip("%"), True)
            elif branch:
                found["branch_kernels"] += 1
            else:
                found["copies" if operation == "copy" else "kernels"] += 1
            found["collectives"] += operation.removesuffix("-start") in COLLECTIVES

    visit(entry, False)
    return Counts(**{**found, "temporaries": temporaries})
