"""Sharded adapters: the state follows them, and shardings do not change."""

import pathlib
import subprocess
import sys

import pytest
from support.compiling import environment

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("axis_type", ["Explicit", pytest.param("Auto", marks=pytest.mark.slow)])
def test_sharded_run_matches_unsharded_and_keeps_shardings(axis_type):
    """Both kinds of mesh are covered, with adapters that are sharded in different ways."""
    done = subprocess.run(
        [sys.executable, str(HERE / "sharded_run.py"), axis_type],
        env=environment(devices=4),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
