"""Saves in which a file operation fails or is the last one, for test_files_atomic.

    python tests/huggingface/saving_run.py CASE FOLDER

Creates FOLDER/1, FOLDER/2, ... with the case's old adapter in each, and saves the new one over it
in a process that exits at its first, second, ... operation, until a save completes. For "new
weights" it also creates FOLDER/7.1 and so on: a second save is interrupted after the one that
exited at its seventh operation, if that left other files than earlier exits.
"""

import builtins
import contextlib
import io
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np

import adalora_jax as adalora
from adalora_jax import huggingface as peft

OPERATIONS = ("mkdir", "fsync", "replace", "rename", "unlink")
CONFIG = adalora.AdaLoraConfig(total_step=10, init_r=4, target_r=2, lora_alpha=6)
OTHER = CONFIG.replace(tinit=1)


def adapter(seed, rank=4):
    rng = np.random.default_rng(seed)
    shapes = (rank, 6), (rank,), (rank, 5)
    return adalora.Adapter(
        *(rng.normal(size=s).astype(np.float32) for s in shapes), scale=CONFIG.scaling
    )


def save(folder, seed, config=CONFIG, write=peft.save_pretrained):
    write(folder, {"query": adapter(seed), "head": {"kernel": adapter(seed).p}}, config)


def nothing(folder):
    """Create no folder."""


# Per case: the function that saves the old adapter, and the one that saves the new one.
CASES = {
    "first": (nothing, lambda folder: save(folder, 1)),
    "new weights": (lambda folder: save(folder, 0), lambda folder: save(folder, 1)),
    "new config alone": (lambda folder: save(folder, 0), lambda folder: save(folder, 0, OTHER)),
    "other kind": (
        lambda folder: save(folder, 0),
        lambda folder: save(folder, 1, OTHER, peft.save_as_lora),
    ),
}


def disk_full():
    """Fail as an operation does on a full disk."""
    raise OSError(28, "No space left on device")


@contextlib.contextmanager
def acting_at(number, action, onwards=False):
    """Call ``action`` before operation ``number``, counted from 1, or in the middle of a write.

    Args:
      onwards: Also before every later operation.

    Yields:
      The names of the operations so far.
    """
    seen = []

    def is_due(name):
        seen.append(name)
        return len(seen) == number or (onwards and len(seen) > number)

    class File(io.BufferedWriter):
        def write(self, data):
            if is_due("write"):
                super().write(data[: len(data) // 2])
                self.flush()
                action()
            return super().write(data)

    def replaced(name, real):
        def operation(*args, **kwargs):
            if is_due(name):
                action()
            return real(*args, **kwargs)

        return operation

    def opened(path, mode="r", *args, real=open, **kwargs):
        if "w" not in mode and "x" not in mode:
            return real(path, mode, *args, **kwargs)
        if is_due("open"):
            action()
        return File(io.FileIO(path, mode.replace("b", "")))

    with contextlib.ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(os, name, replaced(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        yield seen


def killed(new, old, folder, prefix=""):
    """Save over copies of ``old``, killed at each operation; return the unfinished copies."""
    for number in range(1, 99):
        copy = folder / f"{prefix}{number}"
        if old.exists():
            shutil.copytree(old, copy)
        child = os.fork()
        if not child:
            with acting_at(number, lambda: os._exit(9)):
                new(copy)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return [folder / f"{prefix}{n}" for n in range(1, number)]
    raise AssertionError("the save does not end")


def main(case, folder):
    old, new = CASES[case]
    folder = Path(folder)
    old(folder / "old")
    copies, listings = killed(new, folder / "old", folder), set()
    for copy in copies if case == "new weights" else []:
        names = tuple(sorted(re.sub("[0-9a-f]{16}", "*", path.name) for path in copy.iterdir()))
        if names not in listings:
            killed(new, copy, folder, f"{copy.name}.")
        listings.add(names)


if __name__ == "__main__":
    main(*sys.argv[1:])
