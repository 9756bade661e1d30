"""Multi-process training in which one process is killed: the result has the same bits."""

import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from support.compiling import environment

import adalora_jax as adalora
from adalora_jax import checkpoint
from compiled.multiprocess_run import CONFIG

HERE = pathlib.Path(__file__).parent


def start(count, folder, result, *kill_at):
    """Start processes that connect to each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "multiprocess_run.py"), str(port), str(count)]
    return [
        subprocess.Popen(
            [*command, str(index), str(folder), str(result), *map(str, kill_at)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes):
    """Wait for the processes and return the step that each of them started from."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    for process, text in zip(processes, said):
        assert process.returncode == 0, text[-3000:]
    return [int(text.rpartition("from ")[2].split()[0]) for text in said]


def check(count, tmp_path):
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    jobs = start(count, undisturbed, tmp_path / "undisturbed.npz")
    *others, victim = start(count, broken, tmp_path / "broken.npz", 5)
    try:
        assert victim.wait(timeout=300) == -signal.SIGKILL, victim.communicate()[0][-3000:]
    finally:  # a job's launcher stops its other processes
        for process in others:
            process.kill()
        for process in (victim, *others):
            process.communicate()
    assert not (tmp_path / "broken.npz").exists()
    assert finish(jobs) == [0] * count
    (since,) = set(finish(start(count, broken, tmp_path / "broken.npz")))
    assert since in (2, 4)

    with np.load(tmp_path / "undisturbed.npz") as one, np.load(tmp_path / "broken.npz") as other:
        assert one.files == other.files
        whole = [one[name] for name in one.files]
        assert all(one[name].tobytes() == other[name].tobytes() for name in one.files)

    # Restored on one device of one process, the checkpoint has the same values.
    tx = adalora.adalora(optax.adamw(0.02), CONFIG)
    saved = checkpoint.restore(broken / str(CONFIG.total_step), tx, config=CONFIG)
    leaves = jax.tree.leaves((saved.adapters, saved.opt_state))
    assert len(leaves) == len(whole)
    assert all(np.asarray(a).tobytes() == b.tobytes() for a, b in zip(leaves, whole))
    active = sum(int(mask.sum()) for mask in jax.tree.leaves(saved.allocator.masks))
    assert active == CONFIG.target_r * 5
    assert len({int(mask.sum()) for mask in saved.allocator.masks["layers"]}) > 1


@pytest.mark.slow
def test_two_processes_resume_bit_exactly_after_one_is_killed(tmp_path):
    check(2, tmp_path)


@pytest.mark.slow
def test_four_processes_resume_bit_exactly_after_one_is_killed(tmp_path):
    check(4, tmp_path)
