"""The study of the prediction on a few steps: data, groups, rule of the outcome, and reports."""

import gzip
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import results as files
from benchmarks.quality import crossover, models, prepare, sizes, tasks
from benchmarks.quality import crossover_report as report

PREDICTED = {name: "ahead" if group.above else "level" for name, group in report.GROUPS.items()}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Write random images in the format of Fashion-MNIST, and let one small size be studied."""
    random = np.random.default_rng(0)
    for part, count in (("train", 7000), ("t10k", 500)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, header, array in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            with gzip.open(tmp_path / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + array.tobytes())
    monkeypatch.setattr(prepare, "FASHION_FILES", tmp_path)
    monkeypatch.setitem(sizes.SIZES, "fashion", {100: (20, (1,)), 200: (20, (1,))})
    return tmp_path


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Write synsets and quotations in the formats of the packages."""
    for kind, numbers in {"noun": (3, 13, 23), "verb": (34,), "adj": (0,), "adv": (2,)}.items():
        lines = ["  1 a line of the licence | not a gloss  "]
        for number in numbers:
            for index in range(10 if number == 3 else 60):
                gloss = f'gloss {index} of {number}; "as | here"'
                lines.append(f"{index:08d} {number:02d} n 01 word 0 000 | {gloss}  ")
        (tmp_path / f"data.{kind}").write_text("\n".join(lines), encoding="ascii")
    quotations = [f"Größe Nr. {index}\nändert sich.\n\t\t-- Öhm ({index})" for index in range(40)]
    (tmp_path / "zitate").write_text("\n%\n".join(quotations), encoding="utf-8")
    monkeypatch.setattr(prepare, "WORDNET_FILES", tmp_path)
    monkeypatch.setattr(prepare, "QUOTATIONS", tmp_path / "zitate")
    return tmp_path


@pytest.fixture
def small_bert(monkeypatch):
    """Replace MiniLM by a random encoder, whose tokens are bytes, and learn few of the glosses."""
    size = {"width": 8, "depth": 3, "heads": 2, "hidden": 8}

    def encoded(texts, tokens):
        ids = np.zeros((len(texts), tokens), np.int64)
        for row, text in zip(ids, texts):
            found = np.frombuffer(text.encode()[6:][:tokens], np.uint8)
            row[: len(found)] = found
        model = models.SentenceEncoder(**size, vocabulary=128, positions=tokens)
        return ids, dict(model.init(jax.random.key(0), jnp.asarray(ids[:1]))["params"])

    monkeypatch.setattr(prepare, "_minilm", encoded)
    monkeypatch.setattr(prepare, "MINILM", size)
    monkeypatch.setattr(prepare, "EACH", 50)
    for module in (prepare, sizes):
        monkeypatch.setattr(module, "WORDNET", {**size, "depth": 2})
    of_sizes = prepare._of_sizes
    few = {"validation": 20, "test": 30}
    monkeypatch.setattr(prepare, "_of_sizes", lambda name, _, *rest: of_sizes(name, few, *rest))
    monkeypatch.setitem(sizes.SIZES, "wordnet", {60: (20, (1,))})


def of_rule(**found):
    tests = {name: report.Test(0, 0, word) for name, word in (PREDICTED | found).items()}
    return report.outcome(tests, PREDICTED)


@pytest.mark.slow  # compiles four training runs
def test_command_runs_all_sizes_and_writes_page_and_figure(images, tmp_path):
    command = ["--quick", "--task", "fashion", "--seeds", "2", "--rates", "2", "--beyond", "0"]
    command += ["--method", "lora", "adalora", "--data", str(tmp_path), "--out", str(tmp_path)]
    found = crossover.main(command)
    assert set(found["cells"]) == {
        f"fashion-{size}/{method}/1" for size in (100, 200) for method in ("lora", "adalora")
    }
    assert all(cell["triplets"] == [24, 24] for cell in found["cells"].values())
    about = found["study"]["tasks"]["fashion-200"]
    assert about["bits wanted"] == round(200 * np.log2(5))
    assert about["steps"] == 10  # of a smoke test: its cells are not those of a complete run
    assert report.points(found)["fashion-200/1"].ratio == about["bits wanted"] / (2 * 1536)
    assert "| fashion, ratio above 1 |" in (tmp_path / "crossover.md").read_text("utf-8")
    assert (tmp_path / "crossover.png").stat().st_size > 10_000
    before = (tmp_path / "crossover.json").read_text("utf-8")
    assert crossover.main(command) == found  # no cell remains
    assert (tmp_path / "crossover.json").read_text("utf-8") == before

    file = tasks.read("fashion", tmp_path)
    assert about["loss of the base"] == pytest.approx(file["loss"], abs=1e-4)
    np.savez(tmp_path / "fashion.npz", **file | {"loss": file["loss"] + 1})
    with pytest.raises(ValueError, match="study with other tasks"):
        crossover.main(command)


@pytest.mark.slow  # trains the base
def test_sizes_have_disjoint_and_different_splits(images, tmp_path):
    prepare.prepare("fashion", tmp_path, steps=2)
    found = sizes.load("fashion", tmp_path, 3)
    for size, task in found.items():
        assert task.splits.batches.shape == (3, 20, 32)
        for batches, validation, test, _ in zip(*task.splits):
            parts = [set(np.ravel(rows)) for rows in (batches, validation, test)]
            assert [len(part) for part in parts] == [size, 1000, 2000]
            assert len(set.union(*parts)) == size + 3000
    first, second = (task.splits.test[0].tolist() for task in found.values())
    assert first != second
    assert set(np.unique(found[100].labels)) == {0, 2, 3, 4, 6}
    assert found[100].inputs.shape[1:] == (8, 8)
    assert found[100].inputs.max() <= 1


def test_missing_data_set_raises_with_package_to_install(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        prepare._fashion_mnist(tmp_path / "none")
    monkeypatch.setattr(prepare, "WORDNET_FILES", tmp_path / "none")
    monkeypatch.setattr(prepare, "QUOTATIONS", tmp_path / "none")
    monkeypatch.setattr(prepare, "_pretrained", None)  # it raises before it trains a base
    packages = {"glosses": "wordnet-base", "wordnet": "wordnet-base", "german": "fortunes-de"}
    for name, package in packages.items():
        with pytest.raises(FileNotFoundError, match=f"apt-get install {package}$"):
            prepare.prepare(name, tmp_path)


def test_glosses_and_quotations_are_read_from_the_formats_of_their_packages(words):
    found = list(prepare._glosses("noun", "adv"))
    assert found[0] == (3, 'gloss 0 of 3; "as | here"')
    assert [number for number, _ in found] == [3] * 10 + [13] * 60 + [23] * 60 + [2] * 60
    files, texts = prepare._chosen_glosses(50)
    numbers, counts = np.unique(files, return_counts=True)
    assert dict(zip(numbers.tolist(), counts.tolist())) == {13: 50, 23: 50, 34: 50}
    assert all(f" of {file};" in text for file, text in zip(files, texts))
    assert len(set(texts)) == 150
    assert prepare._quotations()[3] == "Groesse Nr. 3\naendert sich."
    mixed = prepare._mixed(["a", "b", "a", "c"])
    assert sorted(mixed.split("\n\n")) == ["a", "b", "c"]


@pytest.mark.slow  # trains or runs a model
def test_other_texts_are_learned_from_the_base_of_topics(words, tmp_path, monkeypatch):
    model = models.Transformer(**models.TOPICS)
    base = model.init(jax.random.key(0), jnp.zeros((1, prepare.WINDOW), jnp.int32))
    few = "\n\n".join(f"a passage of {index} words" for index in range(7000))
    made = prepare._learned("topics", few, base, 1.0) | {"python": np.array("3.0.0")}
    np.savez(tmp_path / "topics.npz", **made)
    monkeypatch.setitem(prepare.TEXTS, "german", lambda: few.replace("words", "Worte"))
    prepare.prepare("german", tmp_path)
    topics = tasks.read("topics", tmp_path)
    found = tasks.read("german", tmp_path)
    for key in (*(key for key in topics if key.startswith("base/")), "loss", "python"):
        np.testing.assert_array_equal(found[key], topics[key])
    [(size, task)] = sizes.load("german", tmp_path, 2).items()
    text = "".join(map(chr, task.inputs[:4].ravel()))
    assert "passage" in text
    assert "Worte" in text
    assert task.name == f"german-{size}"
    assert 5 < found["wanted"] / prepare.WINDOW < 12  # bits per character of an untrained base


@pytest.mark.slow  # trains or runs a model
def test_last_layers_on_stored_states_equal_the_whole_encoder(words, small_bert, tmp_path):
    prepare.prepare("wordnet", tmp_path)
    file = tasks.read("wordnet", tmp_path)
    assert file["inputs"].dtype == np.float16
    assert file["inputs"].shape == (150, prepare.TOKENS["wordnet"], 8)
    assert file["wanted"] == pytest.approx(np.log2(3))
    [task] = sizes.load("wordnet", tmp_path, 3).values()
    for batches, validation, test, _ in zip(*task.splits):
        parts = [set(np.ravel(rows)) for rows in (batches, validation, test)]
        assert [len(part) for part in parts] == [60, 20, 30]
        assert len(set.union(*parts)) == 110
        assert np.bincount(task.labels[sorted(parts[0])]).tolist() == [20, 20, 20]

    ids, params = prepare._minilm(prepare._chosen_glosses(prepare.EACH)[1], 24)
    head = {"kernel": jax.random.normal(jax.random.key(1), (8, 3)), "bias": jnp.arange(3.0)}
    whole = models.SentenceEncoder(**prepare.MINILM, outputs=3, vocabulary=128, positions=24)
    wanted = whole.apply({"params": {**params, "head": head}}, jnp.asarray(ids))
    last = {"params": {**task.base["params"], "head": head}}
    found = task.module.apply(last, jnp.asarray(task.inputs))
    np.testing.assert_allclose(found, wanted, atol=2e-2)  # states and base have half precision
    assert (ids == 0).sum(axis=1).min() < (ids == 0).sum(axis=1).max()  # some are padded more
    np.testing.assert_array_equal((task.inputs == 0).all(axis=-1), ids == 0)


@pytest.mark.slow  # compiles two training runs
def test_command_runs_stored_states_and_the_frozen_base(words, small_bert, tmp_path):
    command = ["--quick", "--task", "wordnet", "--seeds", "2", "--rates", "2", "--beyond", "0"]
    command += ["--method", "frozen", "lora", "--data", str(tmp_path), "--out", str(tmp_path)]
    results = crossover.main(command)
    assert results["study"]["tasks"]["wordnet-60"]["loss of the base"] is None
    cells = results["cells"]
    assert set(cells) == {"wordnet-60/frozen/1", "wordnet-60/lora/1"}
    assert len(cells["wordnet-60/frozen/1"]["rates"]) == 1  # none is used
    page = (tmp_path / "crossover.md").read_text("utf-8")
    assert "| frozen base − LoRA |" in page
    assert "wordnet-60 at rank 1" not in page.split("LoRA: ")[0]


def test_table_shows_the_frozen_base_next_to_lora():
    about = {"sign": 1, "budgets": [1], "bits wanted": 40, "data": "wordnet", "examples": 60}
    about |= {"measure": "test accuracy, %", "title": "glosses", "passes": 4.0}
    scores = {"lora": [60.0, 62.0], "frozen": [50.0, 53.0]}
    cells = {
        f"wordnet-60/{name}/1": {"test of seeds": s, "parameters": 10, "at an edge": True}
        for name, s in scores.items()
    }
    results = {"study": {"tasks": {"wordnet-60": about}}, "cells": cells}
    table = "\n".join(report._table("wordnet", results))
    assert "| LoRA: test accuracy, % | frozen base − LoRA |" in table
    assert "| 61.0 ± 1.4 ‡ | -9.5 ± 0.5 |  |  |  |" in table  # one rate is no edge
    assert report.tests(results, "adalora", "lora") == {}  # in no group
    assert "frozen base" not in report._missing(results)


def test_outcome_follows_the_rule_of_the_prediction():
    below, above = "topics, ratio below 1", "fashion, ratio above 1"
    assert of_rule() == "confirmed"
    assert of_rule(**{above: "open"}) == "not decided"
    for word in ("level", "behind"):
        assert of_rule(**{above: word}) == "refuted"
    for word in ("ahead", "behind"):
        assert of_rule(**{below: word, above: "open"}) == "refuted"
    assert report.outcome({}, PREDICTED) == "not decided"


@pytest.mark.parametrize(
    ("task", "sign", "step", "found"),
    [
        ("fashion", 1, 1.5, "ahead"),
        ("fashion", 1, 0.5, "level"),
        ("fashion", 1, -1.5, "behind"),
        ("topics", -1, -0.02, "ahead"),  # fewer bits are better
        ("topics", -1, 0.005, "level"),
    ],
)
def test_groups_are_tested_by_margin_and_corrected_p(task, sign, step, found, monkeypatch):
    monkeypatch.setattr(report, "GROUPS", {"a": report.Group((f"{task}-1/1", f"{task}-2/1"), True)})
    about = {"sign": sign, "budgets": [1], "bits wanted": 40}
    cells = {}
    for size in (1, 2):
        scores = np.random.default_rng(size).normal(3, 1, 5)
        for method, change in (("lora", 0.0), ("adalora", step)):
            cell = {"test of seeds": (scores + change).tolist(), "parameters": 10}
            cells[f"{task}-{size}/{method}/1"] = cell
    results = {"study": {"tasks": {f"{task}-1": about, f"{task}-2": about}}, "cells": cells}
    test = report.tests(results, "adalora", "lora")["a"]
    assert test.found == found
    assert test.mean == pytest.approx(sign * step)
    assert test.p == pytest.approx(2 / 2**10)
    assert report.points(results)[f"{task}-1/1"].ratio == 2

    cells[f"{task}-1/adalora/1"]["test of seeds"][0] -= 100 * step  # one seed against it
    test = report.tests(results, "adalora", "lora")["a"]
    assert test.found == "open"
    del cells[f"{task}-1/adalora/1"]
    assert report.tests(results, "adalora", "lora") == {}


def of_candidates(**changes):
    """Return results at all points of the candidates; a positive change is an improvement."""
    results = {"study": {"tasks": {}}, "cells": {}}
    for group, sign in zip(report.CANDIDATE_GROUPS.values(), (-1, 1)):
        for point in group:
            task = point.removesuffix("/1")
            about = {"sign": sign, "budgets": [1], "bits wanted": 40}
            results["study"]["tasks"][task] = about
            scores = np.random.default_rng(len(task)).normal(3, 1, 5)
            names = {"lora": (0.0, 0.0), "adalora": (0.0, 0.0)} | changes
            for name, change in names.items():
                values = (scores + sign * change[sign > 0]).tolist()
                cell = {"test of seeds": values, "parameters": 10, "at an edge": False}
                results["cells"][f"{task}/{name.replace('_', '-')}/1"] = cell
    return results


def test_candidates_are_recommended_by_the_stated_rule():
    assert report.recommended(of_candidates()) is None
    assert report.recommended(of_candidates(truncated=(0.02, 0.5))) == "truncated"
    assert report.recommended(of_candidates(truncated=(0.02, -0.5))) == "truncated"  # level
    assert report.recommended(of_candidates(truncated=(0.02, -1.5))) is None
    assert report.recommended(of_candidates(truncated=(0.005, 1.5))) is None
    both = of_candidates(truncated=(0.02, 0.5), lambda_one=(0.03, 0.0))
    assert report.recommended(both) == "lambda-one"
    del both["cells"]["wordnet-1900/lambda-one/1"]  # one point is missing
    assert report.recommended(both) == "truncated"


def test_candidates_are_tested_over_the_points_that_were_run():
    assert report._candidates(of_candidates()) == []
    results = of_candidates(truncated=(0.02, -1.5), unrevived4=(0.005, 0.0))
    del results["cells"]["german-300/truncated/1"]
    del results["study"]["tasks"]["wordnet-1900"]
    _, rule, texts, classifiers = report._candidates(results)
    assert "the recommended default: **none**" in rule
    # 10 pairs give p = 2 / 2¹⁰. Holm multiplies it by 3 where another p is lower, else by 4.
    row = "| LoRA, truncated at the end | {} | {} | {} |"
    both = "+0.020 ± 0.000 | +0.020 ± 0.000"
    assert row.format("topics-300, glosses-300", both, "0.006 | ahead") in texts
    assert "| topics-300, glosses-300, german-300 | +0.005 ± 0.000 | +0.005 ± 0.000 |" in texts
    both = "-1.5 ± 0.0 | -1.5 ± 0.0"
    assert row.format("fashion-600, fashion-4000", both, "0.008 | behind") in classifiers


def test_stored_points_are_on_the_side_of_their_group():
    results = json.loads((files.HERE / "crossover.json").read_text("utf-8"))
    found = report.points(results)
    for group in report.GROUPS.values():
        run = [point for point in group.points if point in found]
        assert all((found[point].ratio > 1) == group.above for point in run)


def test_page_is_rendered_from_stored_results():
    path = files.HERE / "crossover.json"
    page = files.page(path, report.text, report.picture)
    assert page == path.with_suffix(".md").read_text("utf-8"), "run crossover --render"
