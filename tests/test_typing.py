"""Execution of the user script in ``tests/typing`` that type checkers read."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent / "typing" / "user_script.py"


def test_type_checked_user_script_runs():
    names = runpy.run_path(str(SCRIPT))
    assert names["linen_run"]() < 1e-5
    assert names["nnx_run"]() < 1e-5
