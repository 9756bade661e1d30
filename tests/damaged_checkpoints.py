"""A script that damages each file of a checkpoint in turn and restores it, for test_checkpoint.

    python tests/damaged_checkpoints.py CHECKPOINT SCRATCH

Prints a JSON list with an entry per attempt: the error's type and text, "same" if everything was
restored, or "different". It runs in a subprocess because orbax leaves coroutines behind when it
fails, about which Python warns at exit.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

from adalora_jax import checkpoint


def damages(content):
    """Yield the content truncated, with one byte changed, empty, and None for a missing file."""
    middle = len(content) // 2
    yield content[:middle]
    yield content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]
    yield b""
    yield None


def attempt(folder, whole):
    try:
        back = checkpoint.restore(folder)
    except Exception as error:
        return [type(error).__name__, str(error)]
    leaves = zip(jax.tree.leaves(back), whole)
    return "same" if all(np.array_equal(a, b) for a, b in leaves) else "different"


def main(saved, scratch):
    saved, copy = Path(saved), Path(scratch) / "copy"
    whole = jax.tree.leaves(jax.device_get(checkpoint.restore(saved)))
    outcomes = []
    for name in sorted(f.relative_to(saved) for f in saved.rglob("*") if f.is_file()):
        for damaged in damages((saved / name).read_bytes() or b"-"):
            shutil.copytree(saved, copy)
            if damaged is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(damaged)
            outcomes.append([str(name), attempt(copy, whole)])
            shutil.rmtree(copy)
    # A description whose shape differs from that of the saved array.
    about = json.loads((saved / "adalora/metadata").read_text())
    about["arrays"]["adapters/down/p"][0] = [4, 4]
    shutil.copytree(saved, copy)
    (copy / "adalora/metadata").write_text(json.dumps(about))
    outcomes.append(["another shape", attempt(copy, whole)])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
