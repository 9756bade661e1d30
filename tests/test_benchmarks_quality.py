"""The quality study on a few steps: runs, rate selection, comparison, reports and resumption."""

import itertools
import json
import operator
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import adalora_jax as adalora
from adalora_jax import bank
from benchmarks import results as files
from benchmarks.quality import __main__ as command
from benchmarks.quality import methods, models, paired, prepare, report, study, tasks, train

QUICK = ["--quick", "--task", "digits", "--seeds", "2", "--rates", "2"]
QUICK += ["--beyond", "0", "--threads", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    prepare.prepare("digits", folder, steps=2)
    return folder


def run(folder, *arguments):
    return command.main([*QUICK, "--data", str(folder), "--out", str(folder), *arguments])


@pytest.mark.slow  # compiles two training runs
def test_study_uses_equal_budgets_writes_reports_and_resumes(folder, monkeypatch):
    results = run(folder, "--method", "lora", "adalora")
    cells = results["cells"]
    assert set(cells) == {"digits/lora/1", "digits/adalora/1"}
    assert all(cell["triplets"] == [24, 24] for cell in cells.values())
    # Both have 24 triplets of 64 + 64 numbers, and λ counts where it is trained.
    assert [cells[f"digits/{name}/1"]["parameters"] for name in ("lora", "adalora")] == [3072, 3096]
    assert "| AdaLoRA as in PEFT |" in (folder / "quality.md").read_text("utf-8")
    assert (folder / "quality.png").stat().st_size > 10_000
    assert json.loads((folder / "quality.json").read_text("utf-8")) == results

    begun = []

    def refuse(task, method, *_):
        begun.append(method.title)
        raise RuntimeError("not again")

    monkeypatch.setattr(train, "lowered", refuse)
    assert run(folder, "--method", "lora", "adalora") == results  # no cell remains
    assert not begun
    with pytest.raises(SystemExit, match="1 cells failed: digits/frozen/1"):
        run(folder, "--method", "lora", "frozen")  # one cell remains, and only it fails
    assert json.loads((folder / "quality.json").read_text("utf-8"))["cells"] == cells
    assert begun == ["frozen base"]
    with pytest.raises(ValueError, match="study with other seeds"):
        run(folder, "--method", "lora", "--seeds", "3")


@pytest.mark.slow
def test_study_stops_at_its_time_limit(folder, tmp_path, monkeypatch):
    found = {"digits": tasks.shortened(tasks.load("digits", folder, 1), 2)}
    monkeypatch.setattr(train, "lowered", lambda *_: jax.jit(lambda: 0).lower())
    path, about = tmp_path / "quality.json", {"study": {}, "machine": {}}
    results, failed = study.run(found, study.cells(found, ["lora"]), 1, path, about, seconds=-1)
    assert results["cells"] == {}
    assert not failed
    assert not path.exists()


def test_learning_rate_is_chosen_by_validation_alone():
    validation = np.array([[70.0, 80.0, 90.0], [70.0, 81.0, np.nan]])  # one diverged
    test = np.array([[99.0, 50.0, 60.0], [99.0, 51.0, 60.0]])
    same = np.ones((2, 3))
    found = study.record(train.Outcome(validation, test, same, same), [0.1, 0.2, 0.5], sign=1)
    assert (found["rate"], found["test of seeds"], found["at an edge"]) == (0.2, [50, 51], False)
    found = study.record(train.Outcome(validation, test, same, same), [0.1, 0.2, 0.5], sign=-1)
    assert (found["rate"], found["test of seeds"], found["at an edge"]) == (0.1, [99, 99], True)


def test_learning_rates_are_extended_where_best_is_largest(folder, tmp_path, monkeypatch):
    """Here a larger rate is better up to 0.5, except for LoRA, which is best at 0.01."""
    found = {"digits": tasks.shortened(tasks.load("digits", folder, 2), 2)}
    tried = []

    def outcome(rates, method):
        best = 0.01 if method == "LoRA" else 0.5
        tried.append((method, [round(float(rate), 4) for rate in rates]))
        score = np.tile(-np.abs(np.log(rates / best)), (2, 1))
        return train.Outcome(score, 100 + score, score, score)

    def lowered(task, method, rank, count, at_once):
        class Program:
            compile = lambda self: lambda base, splits, rates: outcome(rates, method.title)

        return Program()

    monkeypatch.setattr(train, "lowered", lowered)
    names = ["lora", "adalora", "score-magnitude"]
    about = {"study": {}, "machine": {"device": "here"}}
    cells = study.cells(found, names)
    arguments = (found, cells, 7, tmp_path / "quality.json", about, 100, 1)
    results, failed = study.run(*arguments)
    assert not failed
    first = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1]
    assert tried[:3] == [(methods.METHODS[name].title, first) for name in names]
    further = [methods.METHODS[name].title for name in names[1:]]
    assert tried[3:] == [(t, rates) for rates in ([0.2, 0.5], [1, 2]) for t in further]
    cell = results["cells"]["digits/adalora/1"]
    assert (cell["rate"], cell["at an edge"], cell["device"]) == (0.5, False, "here")
    assert cell["rates"] == [*first, 0.2, 0.5, 1, 2]
    assert cell["test of seeds"] == [100, 100]
    assert study.run(*arguments)[0]["cells"] == results["cells"]
    assert len(tried) == 7

    del results["cells"]["digits/score-magnitude/1"]
    study._write(arguments[3], results)
    cell = study.run(*arguments, near=3)[0]["cells"]["digits/score-magnitude/1"]
    assert cell["rates"] == [0.2, 0.5, 1]
    found = {"digits": found["digits"]._replace(budgets=(1, 2))}
    arguments = (found, study.cells(found, ["lora"]), *arguments[2:])
    cell = study.run(*arguments, near=3)[0]["cells"]["digits/lora/2"]
    assert cell["rates"] == [0.005, 0.01, 0.02]


def test_tasks_may_be_added_to_study_but_not_changed(tmp_path):
    about = lambda **steps: {"study": {"seeds": 2, "tasks": steps}}
    path = tmp_path / "quality.json"
    study._write(path, study._resumed(path, about(digits=200)))
    study._write(path, study._resumed(path, about(prose=100)))
    assert study._resumed(path, about(digits=200))["study"]["tasks"] == {
        "digits": 200,
        "prose": 100,
    }
    with pytest.raises(ValueError, match="study with other tasks: give another --out"):
        study._resumed(path, about(digits=100))
    with pytest.raises(ValueError, match="study with other seeds"):
        study._resumed(path, {"study": {"seeds": 3, "tasks": {}}})


def test_two_records_of_cell_are_joined():
    one = {"rates": [0.1, 0.2], "validation": [3.0, 2.0], "rate": 0.2, "test of seeds": [5]}
    other = {"rates": [0.5, 1], "validation": [None, 2.5], "rate": 1, "test of seeds": [6]}
    less = study.joined(one, other, -1)
    assert (less["rate"], less["at an edge"], less["test of seeds"]) == (0.2, False, [5])
    assert less["validation"] == [3.0, 2.0, None, 2.5]
    one["rate"] = 0.1
    assert study.joined(one, other, 1)["at an edge"]


@pytest.mark.parametrize("seed", range(4))
def test_paired_test_enumerates_all_signs(seed):
    random = np.random.default_rng(seed)
    a, b = random.normal(0.5, 1.0, 7), random.normal(0.0, 1.0, 7)
    means = [np.mean(signs * (a - b)) for signs in itertools.product([1, -1], repeat=7)]
    by_hand = np.mean(np.abs(means) >= abs(np.mean(a - b)) - 1e-12)
    assert paired.sign_flip(a, b) == pytest.approx(by_hand)
    scipys = stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=200)
    assert paired.sign_flip(a, b) == pytest.approx(scipys.pvalue)
    assert paired.sign_flip(a, a) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, None])
def test_sign_flip_of_values_that_are_not_finite_raises(value):
    with pytest.raises(ValueError, match="all differences must be finite"):
        paired.sign_flip([1.0, value], [0.0, 0.0])


@pytest.mark.parametrize(("a", "b"), [([1, 2, 3], [0]), ([], []), ([0] * 17, [1] * 17)])
def test_sign_flip_of_values_without_pairs_raises(a, b):
    with pytest.raises(ValueError, match="1 to 16 pairs"):
        paired.sign_flip(a, b)


def test_holm_correction_matches_its_definition():
    p = np.array([0.03, 0.001, 0.2, 0.012])
    corrected = paired.holm(dict(enumerate(p)))
    for level in np.linspace(0.001, 1, 500):  # reject the smallest while p ≤ level / (m − k)
        ordered = np.argsort(p)
        fails = [p[i] > level / (len(p) - k) for k, i in enumerate(ordered)]
        rejected = ordered[: fails.index(True) if any(fails) else len(p)]
        assert set(rejected) == {i for i, value in corrected.items() if value <= level + 1e-12}


def test_splits_are_disjoint(folder):
    task = tasks.load("digits", folder, 3)
    for train_rows, validation, test, _ in zip(*task.splits):
        parts = [set(np.ravel(rows)) for rows in (train_rows, validation, test)]
        assert [len(part) for part in parts] == [50, 200, 600]
        assert len(set.union(*parts)) == 850
    blocks = prepare._in_blocks(500, {"train": 60, "validation": 100, "test": 200}, seed=1)
    assert len(set(np.concatenate(list(blocks.values())))) == 360


def test_every_method_is_a_valid_library_config():
    for name, method in methods.METHODS.items():
        config = method.adalora_config(2, 100, ["query"], ["head"])
        assert config.target_r == 2, name
        assert config.init_r == 2 * method.start
        assert config.scaling == method.config.get("scale", 1)
    assert not set(methods.BASELINES) & (set(methods.ABLATIONS) | set(methods.IMPROVEMENTS))


def test_candidates_are_only_run_if_asked_for():
    found = {"digits": tasks._PLANS["digits"]}
    assert not {cell.method for cell in study.cells(found)} & set(methods.CANDIDATES)
    assert study.cells(found, ["truncated"]) == [("digits", "truncated", 1)]


@pytest.mark.slow  # compiles a training run
@pytest.mark.parametrize("name", methods.CANDIDATES)
def test_candidate_ends_within_the_budget(folder, name):
    task, method = tasks.shortened(tasks.load("digits", folder, 2), 4), methods.METHODS[name]
    program = train.lowered(task, method, 1, 2).compile()
    outcome = program(*train.arguments(task, train.rates(task, method, 2)))
    assert np.all(outcome.triplets == np.full((2, 2), 24))
    assert np.all(outcome.parameters == 24 * (128 + ("lam" in method.trained)))


def test_truncation_of_static_shape_equals_that_of_the_library():
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def adapter(*stack, size):
        shapes = (*stack, 4, size), (*stack, 4), (*stack, 4, 6)
        return adalora.Adapter(*(jax.random.normal(next(keys), shape) for shape in shapes))

    trained = {"a": adapter(2, size=5), "b": adapter(size=7), "head": {"bias": jnp.ones(3)}}
    found = jax.jit(lambda trained: train.truncated(trained, 2))(trained)
    expected = bank.truncate(trained, budget=6)
    assert sum((found[path].lam != 0).sum() for path in "ab") == 6
    for path in "ab":
        ours, theirs = (adalora.delta_weight(each[path]) for each in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.all(found["head"]["bias"] == 1)


def test_ranks_by_variance_follow_the_singular_values_of_the_inputs():
    module = models.Transformer(width=8, depth=2, heads=2, hidden=12, outputs=3)
    images = jax.random.normal(jax.random.key(0), (6, 8, 8))
    base = module.init(jax.random.key(1), images)
    config = methods.METHODS["by-variance"].adalora_config(2, 10, tasks.OURS, ["head"])
    adapted = adalora.linen.adapt(module, config)
    start = adapted.init(jax.random.key(2), base, images)
    moments = adalora.inits.input_second_moments(adapted, base, start, images)
    new = train.by_variance(start, moments, 2)

    inputs = []  # of the first layer, then of the second

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            inputs.append((f"blocks/{context.module.name}", np.asarray(args[0])))
        return call(*args, **kwargs)

    params = base["params"]
    x = nn.Dense(8).apply({"params": params["embed"]}, models.patches(images)) + params["position"]
    with nn.intercept_methods(record):
        for layer in (0, 1):
            own = jax.tree.map(operator.itemgetter(layer), params["blocks"])
            x, _ = models.Block(2, 12, False).apply({"params": own}, x)

    kept, dropped = [], []
    for number, (path, rows) in enumerate(inputs):
        layer = number // 6
        _, sizes, vectors = np.linalg.svd(rows.reshape(-1, rows.shape[-1]))
        shares = (sizes**2 / np.sum(sizes**2))[:4]
        lam, q = new[path].lam[layer], np.asarray(new[path].q[layer])
        np.testing.assert_allclose(np.abs(np.sum(q * vectors[:4], axis=1)), 1, atol=1e-3)
        kept += shares[lam == 1].tolist()
        dropped += shares[lam == 0].tolist()
        assert not new[path].p.any()
    assert (len(kept), len(dropped)) == (24, 24)
    assert min(kept) >= max(dropped) - 1e-6  # equal inputs have equal shares


def test_only_significant_differences_are_marked():
    scores = {"lora": range(10), "x4": [2 + n for n in range(10)], "adalora": [*range(9), 100]}
    cells = {f"digits/{name}/1": {"test of seeds": list(s)} for name, s in scores.items()}
    about = {"measure": "accuracy", "sign": 1, "budgets": [1]}
    results = {"cells": cells, "study": {"tasks": {"digits": about}}}
    better = report.verdict(results)
    assert "| AdaLoRA, scale × 4 | **+2.0** |" in better
    assert "| AdaLoRA as in PEFT | +9.1 |" in better  # because of one seed
    about["sign"] = -1
    assert "| AdaLoRA, scale × 4 | +2.000 *(worse)* |" in report.verdict(results)


def test_page_is_rendered_from_stored_results():
    path = files.HERE / "quality.json"
    page = files.page(path, report.text, report.picture)
    assert page == path.with_suffix(".md").read_text("utf-8"), "run benchmarks.quality --render"


def test_report_uses_paired_differences_and_rising_budgets(folder):
    scores = {"lora/qv": [1, 2, 3], "lora/1": [4, 5, 6], "x4/1": [4, 6, 8]}
    cells = {f"digits/{key}": {"test of seeds": values} for key, values in scores.items()}
    assert report._rising([1, "qv", 4, 2]) == ["qv", 1, 2, 4]
    found = report._differences(cells, "digits", "x4", ["qv", 1])
    assert found == {1: (1.0, pytest.approx(1 / 3**0.5))}
    task = tasks.load("digits", folder, 1)
    assert task.adapted("qv") == (1, ("query", "value"))
    assert task.adapted(2) == (2, task.targets)
