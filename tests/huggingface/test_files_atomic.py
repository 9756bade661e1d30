"""Saves that fail or are killed at any file operation: the old or the new adapter is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from adalora_jax import huggingface as peft
from adalora_jax._src.tensorfile import TensorFile
from huggingface.saving_run import CASES, OTHER, acting_at, disk_full, save

RUN = Path(__file__).with_name("saving_run.py")
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def loaded(folder):
    """Return a loaded adapter in a form for bitwise comparison; None if there is none."""
    try:
        read = peft.load_pretrained(folder)
    except FileNotFoundError:
        return None
    leaves = jax.tree.leaves_with_path((read.adapters, read.masks))
    return read.config, [(str(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    old, new = CASES[request.param]
    old(tmp_path / "before")
    new(tmp_path / "after")
    return request.param, loaded(tmp_path / "before"), loaded(tmp_path / "after")


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("action", "onwards"), [(disk_full, False), (disk_full, True), (interrupt, False)]
)
def test_failed_save_leaves_old_or_new_adapter(case, action, onwards, tmp_path):
    name, before, after = case
    outcomes = []
    for number in range(1, 99):
        folder = tmp_path / str(number)
        CASES[name][0](folder)
        failed = None
        with acting_at(number, action, onwards) as seen:
            try:
                CASES[name][1](folder)
            except (OSError, KeyboardInterrupt) as error:
                failed = error
        if len(seen) < number:
            break
        if isinstance(failed, OSError):
            assert f"`directory={str(folder)!r}`" in str(failed)
            assert "No space left on device" in str(failed)
        found = loaded(folder)
        assert found in ((before, after) if failed else (after,)), (number, seen)
        if failed:
            outcomes.append(found == after)
        if not onwards and folder.exists() and found == before:
            assert names(folder) == (FILES if before else set()), (number, seen)
        save(folder, 7)
        save(tmp_path / "seven", 7)
        assert loaded(folder) == loaded(tmp_path / "seven")
        assert names(folder) == FILES
    assert loaded(folder) == after
    assert outcomes == sorted(outcomes), "once the new adapter is read, it stays"
    assert {False, True} == set(outcomes)
    assert len(outcomes) > 9


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_save_leaves_old_or_new_adapter(case, tmp_path):
    name, before, after = case
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(RUN), name, str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    copies = [path for path in (tmp_path / "run").iterdir() if path.name != "old"]
    outcomes = [loaded(copy) for copy in copies]
    assert all(outcome in (before, after) for outcome in outcomes)
    assert {outcome == after for outcome in outcomes} == {False, True}
    assert len(copies) > (99 if name == "new weights" else 9)
    save(tmp_path / "seven", 7)
    for copy in copies:
        save(copy, 7)
        assert names(copy) == FILES
        assert loaded(copy) == loaded(tmp_path / "seven")


def test_save_during_load_raises(tmp_path, monkeypatch):
    save(tmp_path, 0)
    read = TensorFile.read

    def read_slowly(file, name):
        value = read(file, name)
        save(tmp_path, 1, OTHER)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(TensorFile, "read", read_slowly)
        with pytest.raises(ValueError, match="changed while it was read; read it again"):
            peft.load_pretrained(tmp_path)
    save(tmp_path / "again", 1, OTHER)
    assert loaded(tmp_path) == loaded(tmp_path / "again")


def test_edited_config_is_loaded(tmp_path):
    save(tmp_path, 0)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"tinit": 0', '"tinit": 3'))
    assert peft.load_pretrained(tmp_path).config.tinit == 3


def test_unwritable_directory_is_named_in_error(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"`directory='{place}'`: cannot be written: .*; name a"):
            save(place, 0)
