"""Training on meshes of up to 8 virtual devices equals one device, with equal masks everywhere."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from support.compiling import environment

HERE = pathlib.Path(__file__).parent
TRIPLETS = 4 * (4 * 8 + 1)  # init_r of four stacks of eight and of one single layer
SOME = ["data:1:1", "tensor:1:2", "both:2:4"]
ALL = [
    "data:1:1",
    *(f"{layout}:{n}:1" for layout in ("data", "fsdp", "stack") for n in (2, 4, 8)),
    *(f"tensor:1:{n}" for n in (2, 4, 8)),
    *("both:2:2", "both:4:2", "both:2:4"),
]


def run(layouts, *flags):
    """Return ``{layout: results}`` of runs in one process."""
    command = [sys.executable, str(HERE / "mesh_run.py"), *layouts, *flags]
    done = subprocess.run(
        command, env=environment(devices=8), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(runs):
    alone = runs.pop("data:1:1")
    active = [sum(np.sum(mask) for mask in masks.values()) for masks in alone["masks"]]
    assert (active[0], active[-1]) == (TRIPLETS, TRIPLETS // 2)
    assert len(set(active)) >= 3
    for name, result in runs.items():
        assert result["masks"] == alone["masks"], name
        for path, adapter in alone["adapters"].items():
            for ours, theirs in zip(result["adapters"][path], adapter):
                np.testing.assert_allclose(ours, theirs, atol=3e-5, err_msg=f"{name} {path}")
        assert result["astray"] == [], name
        assert result["elsewhere"] == [], name
        assert result["traces"] == 1, name
        assert (result["split"] > 0) == (not name.startswith("data")), name


def check_collectives(runs, most):
    """Check that there are at most ``most`` collectives, each of at most one number per triplet."""
    for name, result in runs.items():
        sizes = [size for _, size in result["collectives"]]
        assert len(sizes) <= most, f"{name}: {result['collectives']}"
        assert max(sizes, default=0) <= TRIPLETS, f"{name}: {result['collectives']}"
        assert bool(sizes) == (result["split"] > 0), name


@pytest.mark.slow
def test_meshes_of_two_and_eight_devices_train_as_one_device():
    """Meshes of four devices are in test_sharded_run.py."""
    runs = run(SOME, "--collectives")
    check_collectives(runs, most=4)
    check(runs)


@pytest.mark.slow
def test_every_layout_on_every_mesh_trains_as_one_device():
    runs = run(ALL, "--collectives")
    check_collectives(runs, most=4)
    check(runs)
