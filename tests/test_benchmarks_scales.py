"""The comparison of scales: its methods, its range of learning rates, its page and its figure."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import results as files
from benchmarks.quality import __main__ as quality
from benchmarks.quality import methods, prepare, scales, sizes, study, tasks, train

RATES = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
ABOUT = {"title": "a task", "examples": 300, "steps": 300, "base": 3.2}
MACHINE = {"processor": "a processor", "cores": 2, "device": "cpu"}


def bowl(best, depth=0.2):
    """Return the record of a cell whose validation is best at this rate, and diverges at 1."""
    scores = 3.2 - depth + 0.1 * np.abs(np.log10(np.array(RATES) / best))
    validation = np.tile(scores, (2, 1))
    validation[1, -1] = np.nan
    same = np.ones_like(validation)
    return study.record(train.Outcome(validation, validation + 0.05, same, same), RATES, sign=-1)


@pytest.fixture
def found():
    best = {"lora-at-2": 0.01, "lora-at-0.125": 0.1, "adalora-at-0.125": 0.2, "adalora-at-1": 0.05}
    return {
        "study": {"seeds": 2, "rates": 11, "python": "3.11", "tasks": {"topics-300": ABOUT}},
        "machines": {"cpu": MACHINE},
        "cells": {f"topics-300/{name}/1": bowl(rate) for name, rate in best.items()},
    }


def test_methods_differ_only_in_scale():
    assert list(methods.SCALES) == [
        f"{name}-at-{scale}" for name in ("lora", "adalora") for scale in ("0.125", "1", "2", "5")
    ]
    for key, method in methods.SCALES.items():
        name, _, scale = key.partition("-at-")
        config = method.adalora_config(1, 100, ["query"], ())
        base = methods.BASELINES[name].adalora_config(1, 100, ["query"], ())
        assert config.scaling == float(scale)
        assert config.replace(scale=1.0) == base.replace(scale=1.0)
        assert method.form == methods.BASELINES[name].form


def test_scales_are_not_methods_of_the_study(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--method", "lora-at-1"])
    assert "invalid choice: 'lora-at-1'" in capsys.readouterr().err
    task = tasks.Task(*[None] * len(tasks.Task._fields))._replace(budgets=(1,))
    assert not {cell.method for cell in study.cells({"a": task})} & set(methods.SCALES)


def test_all_methods_share_one_range_of_learning_rates():
    task = scales.ranged(tasks.Task(*[None] * len(tasks.Task._fields)))
    assert task.budgets == (1,)
    for method in methods.SCALES.values():
        assert train.rates(task, method, 11) == RATES


def test_page_states_scores_and_the_loss_at_a_shared_rate(found):
    page = scales.text(found)
    assert "| LoRA at scale 2 |" in page
    row = next(line for line in page.splitlines() if line.startswith("| AdaLoRA at scale 0.125"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [f"{3 + 0.1 * np.log10(0.2 / rate):.3f}" for rate in RATES[:8]] + [
        "**3.000**",
        "3.040",
        "—",
        "3.050 ± 0.000",
    ]
    assert (
        "best for LoRA at scale 2, 0.01, LoRA at scale 2 has 3.000 bits per character, and AdaLoRA "
        "at scale 0.125 has 3.130, 0.130 more. At its own best rate, 0.2, AdaLoRA at scale 0.125 "
        "has 3.000, the same." in page
    )
    assert "at most 0.000 for LoRA and 0.000 for AdaLoRA" in page
    found["cells"]["topics-300/adalora-at-0.125/1"]["validation"][4] = None  # at 0.01
    assert "AdaLoRA at scale 0.125 diverges. At its own" in scales.text(found)
    del found["cells"]["topics-300/lora-at-2/1"]
    assert "best for LoRA at scale 2" not in scales.text(found)


def test_diverged_runs_do_not_squash_the_figure(found):
    record = found["cells"]["topics-300/lora-at-0.125/1"]
    record["validation"][-2:] = [90.0, None]
    panels = scales.picture(found).axes
    low, high = panels[0].get_ylim()
    assert low < 3.0 < 3.2 < high < 3.4
    assert [axes.get_title() for axes in panels] == ["LoRA", "AdaLoRA"]
    assert "90.000" in scales.text(found)


@pytest.mark.slow  # trains the base, and compiles two training runs
def test_command_runs_cells_and_writes_page_and_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "topics", {300: (20, (1, 8))})
    prepare.prepare("topics", tmp_path, steps=2)
    command = ["--quick", "--seeds", "2", "--rates", "2", "--data", str(tmp_path)]
    command += ["--out", str(tmp_path), "--method", "lora-at-2", "adalora-at-0.125"]
    found = scales.main(command)
    assert set(found["cells"]) == {"topics-300/lora-at-2/1", "topics-300/adalora-at-0.125/1"}
    assert all(cell["rates"] == [0.0005, 0.001] for cell in found["cells"].values())
    assert "| AdaLoRA at scale 0.125 |" in (tmp_path / "scales.md").read_text("utf-8")
    assert (tmp_path / "scales.png").stat().st_size > 10_000
    assert scales.main(command) == found  # no cell remains


def test_page_is_rendered_from_stored_results():
    path = files.HERE / "scales.json"
    page = files.page(path, scales.text, scales.picture)
    assert page == path.with_suffix(".md").read_text("utf-8"), "run scales --render"
