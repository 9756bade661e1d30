"""The demo, end to end, on a smaller model and with few steps."""

import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import matplotlib.image
import numpy as np
import pytest
from flax import nnx

import adalora_jax as adalora
from adalora_jax.demo import data, methods, train
from adalora_jax.demo.__main__ import main

STEPS = 20
ADAPTERS = 6  # of one block
TARGET = ADAPTERS * methods.adaptations(STEPS)[0].config.target_r


class Fit(NamedTuple):
    """One call of ``train.fit``, with the values of the base before and after."""

    run: train.Run
    before: list[np.ndarray]
    after: list[np.ndarray]
    traces: int


class Demo(NamedTuple):
    """One run of the command: its output, its picture and its fits."""

    printed: str
    progress: str
    picture: np.ndarray
    fits: dict[str, Fit]  # by the first word of the method's title


def values(base):
    """Return copies of a base's arrays, in either framework."""
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(base) if is_nnx(base) else base)]


def is_nnx(base):
    return isinstance(base, nnx.Module)


@pytest.fixture(scope="module", params=["linen", "nnx"])
def framework(request):
    """Return a front end's module with a smaller model."""
    module = importlib.import_module(f"adalora_jax.demo.in_{request.param}")
    small = functools.partial(module.VisionTransformer, width=16, depth=1, heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "VisionTransformer", small)
        yield module


@pytest.fixture(scope="module")
def demo(framework, tmp_path_factory):
    traces, fits = [], {}

    def counted(logits, digits):
        traces.append(logits.shape)
        return methods.cross_entropy(logits, digits)

    def observed(module, base, method, digits, steps, seed, fit=train.fit):
        before, count = values(base), len(traces)
        run = fit(module, base, method, digits, steps, seed)
        name = re.match(r"[\w-]+", method.title)[0]
        fits[name] = Fit(run, before, values(base), len(traces) - count)
        return run

    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    name = framework.__name__.rpartition("_")[2]
    printed, progress = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framework, "cross_entropy", counted)
        patch.setattr(train, "fit", observed)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
            main(["--framework", name, "--steps", str(STEPS), "--out", str(folder)])
    picture = matplotlib.image.imread(folder / "ranks.png")
    return Demo(printed.getvalue(), progress.getvalue(), picture, fits)


def test_demo_draws_a_picture(demo):
    assert demo.picture.shape[0] > 200
    assert demo.picture.shape[1] > 400
    assert demo.picture.std() > 0.1


def test_demo_shows_progress(demo):
    for shown in ("loss=", "mean rank=2.00"):
        assert shown in demo.progress
    lines = re.split(r"[\r\n]+", demo.progress)
    assert max(map(len, lines)) <= 80


def test_demo_prints_accuracy_and_sizes(demo):
    rows = re.findall(r"^(.*?) +([\d.]+%) +([\d,]+) +([\d,]+)$", demo.printed, re.MULTILINE)
    runs = [demo.fits[name].run for name in ("frozen", "LoRA", "AdaLoRA", "full")]
    assert rows == [
        (run.method.title, f"{run.accuracy:.1%}", f"{run.trained:,}", f"{run.kept:,}")
        for run in runs
    ]
    assert all(0 <= run.accuracy <= 1 for run in runs)


def test_reported_sizes_match_the_model(demo):
    run = {name: fit.run for name, fit in demo.fits.items()}
    classifier, triplet = 16 * 10 + 10, 16 + 1 + 16
    assert run["frozen"].trained == run["frozen"].kept == classifier
    assert run["LoRA"].trained == classifier + TARGET * (triplet - 1)  # λ is fixed
    assert run["AdaLoRA"].kept == classifier + TARGET * triplet
    assert run["AdaLoRA"].trained == classifier + 4 * TARGET * triplet
    assert run["full"].trained == sum(value.size for value in demo.fits["full"].before)


def test_demo_prints_final_ranks(demo):
    header = r"^final ranks   query   key   value   out   up   down   sum$"
    row = r"^(blocks\D0) +(\d) +(\d) +(\d) +(\d) +(\d) +(\d) +(\d+)$"
    assert re.search(header, demo.printed, re.MULTILINE)
    ((block, *ranks, total),) = re.findall(row, demo.printed, re.MULTILINE)
    last = adalora.ranks(demo.fits["AdaLoRA"].run.history[-1].masks)
    modules = ("query", "key", "value", "out", "up", "down")
    assert [int(rank) for rank in ranks] == [last[f"{block}/{module}"] for module in modules]
    assert int(total) == TARGET


def test_ranks_follow_budget_to_target(demo):
    run = demo.fits["AdaLoRA"].run
    active = [sum(adalora.ranks(progress.masks).values()) for progress in run.history]
    budgets = [int(progress.budget) for progress in run.history]
    expected = [int(adalora.budget(run.method.config, step, ADAPTERS)) for step in range(STEPS)]
    assert active == budgets == expected
    assert (active[0], active[-1]) == (4 * TARGET, TARGET)
    adapters = adalora.adapters(run.learner.trainable).values()
    assert sum(np.count_nonzero(adapter.lam) for adapter in adapters) <= TARGET


@pytest.mark.parametrize("name", ["frozen", "LoRA", "AdaLoRA", "full"])
def test_base_is_unchanged_and_loss_decreases(demo, name):
    fit = demo.fits[name]
    for before, after in zip(fit.before, fit.after, strict=True):
        np.testing.assert_array_equal(after, before)
    assert fit.run.history[-1].loss < fit.run.history[0].loss


@pytest.mark.parametrize(("name", "fixed"), [("frozen", {"lam": 1, "p": 0}), ("LoRA", {"lam": 1})])
def test_fixed_factors_are_unchanged(demo, name, fixed):
    for adapter in adalora.adapters(demo.fits[name].run.learner.trainable).values():
        for factor, value in fixed.items():
            np.testing.assert_array_equal(getattr(adapter, factor), value)
        assert (adapter.p != 0).any() == (name == "LoRA")


def test_each_method_compiles_once(demo):
    assert {name: fit.traces for name, fit in demo.fits.items()} == dict.fromkeys(demo.fits, 1)


@pytest.mark.slow
def test_minimum_number_of_steps_reaches_target(framework):
    method = methods.adaptations(10)[2]
    run = train.fit(framework, framework.create(0), method, range(5, 10), steps=10, seed=0)
    assert sum(adalora.ranks(run.history[-1].masks).values()) == TARGET


def test_batches_are_reproducible_and_exclude_test_images():
    train_images, test_images = data.load(range(5, 10), seed=3)
    first, second = (list(data.batches(train_images, 4, seed=1)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        assert a.pixels.dtype == np.float32
        assert np.abs(a.pixels).max() <= 1
    as_rows = lambda images: {image.tobytes() for image in images.pixels}
    assert not as_rows(train_images) & as_rows(test_images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "--steps: '9' is not an integer from 10"),
        (["--steps", "many"], "--steps: 'many' is not an integer"),
        (["--seed", "-1"], "--seed: '-1' is not an integer from 0"),
        (["--framework", "torch"], "--framework: invalid choice: 'torch'"),
        (["--out", __file__], "no picture can be written to"),
        (["--out", f"{__file__}/below"], "no picture can be written to"),
        (["--lr", "1"], "unrecognized arguments: --lr"),
    ],
)
def test_invalid_options_exit_with_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_package_is_named(tmp_path):
    code = (
        "import sys; sys.modules['tqdm'] = None; from adalora_jax.demo.__main__ import main; "
        f"main(['--out', {str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'tqdm is missing: install it with pip install "adalora-jax[demo]".\n'


def no_training(*args):
    raise AssertionError("the folder should have been refused before any training")


def test_unwritable_folder_fails_before_training(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train, "compare", no_training)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # a test may run as root
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "new" / "folder")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--out: no picture can be written to '{tmp_path}/new/folder': Permission denied" in said
    assert not list(tmp_path.iterdir())


def test_irreplaceable_picture_fails_before_training(tmp_path, capsys):
    (tmp_path / "ranks.png").mkdir()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "Is a directory" in capsys.readouterr().err


def test_interrupt_prints_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        assert not list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "compare", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "new")])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted: no picture was drawn\n"
    assert not list(tmp_path.iterdir())


def test_results_are_printed_if_saving_picture_fails(demo, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    runs = [fit.run for name, fit in demo.fits.items() if name != "pre-training"]
    monkeypatch.setattr(train, "compare", lambda *args: runs)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path)])
    assert stopped.value.code == (
        f"error: {tmp_path / 'ranks.png'} cannot be written: No space left on device"
    )
    assert "test accuracy" in capsys.readouterr().out
