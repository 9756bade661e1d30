"""Stacked adapters on a mesh: members of a role are sharded alike, and nothing more is moved."""

import pathlib
import subprocess
import sys

import pytest
from support.compiling import environment

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_stacked_run_has_the_shardings_and_collectives_of_separate_adapters(axis_type):
    done = subprocess.run(
        [sys.executable, str(HERE / "stacked_run.py"), axis_type],
        env=environment(devices=4),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
