"""Layers, banks, quantisation and training on meshes with explicit axes equal one device."""

import pathlib
import subprocess
import sys

import pytest
from support.compiling import environment

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_explicit_and_mixed_meshes_give_the_results_of_one_device():
    done = subprocess.run(
        [sys.executable, str(HERE / "explicit_run.py")],
        env=environment(devices=8),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
