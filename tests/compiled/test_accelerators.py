"""Programs that XLA compiles for TPUs, on a machine without one."""

import os
import pathlib
import sys

import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

pytest.importorskip("libtpu", reason="needs XLA's compiler for TPUs: pip install '.[aot]'")

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import backends, compiled, peers
from benchmarks.networks import Shape

os.environ.update({k: v for k, v in backends.ENVIRONMENT.items() if k != "XLA_FLAGS"})
TPUS = ("v5e", "v6e")
SMALL = Shape(
    "llama", depth=2, width=128, hidden=256, heads=2, batch=4, length=16, dtype="bfloat16"
)


def counts(device, function, arguments):
    where = SingleDeviceSharding(backends.devices(device)[0])
    return backends.compiled(function, *backends.placed(arguments, where))[0]


@pytest.mark.parametrize("device", TPUS)
def test_update_does_not_grow_with_repeated_layers(device):
    """Twice as many adapters add the operations of AdamW and no others."""
    extra = []
    for adapters in (12, 24):
        inner, ours = (
            counts(device, *compiled.update(peer, adapters)) for peer in ("adamw", "adalora")
        )
        assert (inner.conditionals, ours.conditionals) == (0, 1)
        extra.append((ours.kernels - inner.kernels, ours.copies - inner.copies))
    assert extra[0] == extra[1]


@pytest.mark.parametrize(
    ("device", "peer", "scan"),
    [("v5e", "adalora", False), ("v6e", "adalora", True), ("v5e", "nf4-adalora", True)],
)
def test_training_step_compiles(device, peer, scan):
    method, arguments = peers.abstract(peer, SMALL.replace(scan=scan))
    found = counts(device, peers.jitted(method), arguments)
    assert found.conditionals == 1
    assert found.collectives == 0


@pytest.mark.parametrize(("device", "scan"), [("v5e", False), ("v6e", True)])
def test_training_step_compiles_on_a_mesh(device, scan):
    mesh = Mesh(np.array(backends.devices(device, 4)).reshape(2, 2), ("data", "model"))
    collectives = {}
    for peer in ("lora", "adalora"):
        method, arguments = peers.abstract(peer, SMALL.replace(scan=scan))
        placed = compiled.on_mesh(arguments, mesh)
        collectives[peer] = backends.compiled(peers.jitted(method), *placed)[0].collectives
    # The sums over devices of the finite check, of the penalty and of the scores are combined.
    assert collectives["lora"] < collectives["adalora"] <= collectives["lora"] + 8
