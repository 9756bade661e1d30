"""The script in ``tests/typing`` that type checkers read as a user's runs, too."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent / "typing" / "user_script.py"


def test_the_script_that_type_checkers_read_runs():
    names = runpy.run_path(str(SCRIPT))
    assert names["linen_run"]() < 1e-5
    assert names["nnx_run"]() < 1e-5
