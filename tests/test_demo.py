"""The demo, end to end, on a smaller model and with few steps."""

import functools
import importlib
import re
import subprocess
import sys

import jax
import matplotlib.image
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax.demo import data, methods, train
from adalora_jax.demo.__main__ import main

STEPS = 20
ADAPTERS = 6  # of one block


@pytest.fixture(params=["linen", "nnx"])
def framework(request, monkeypatch):
    module = importlib.import_module(f"adalora_jax.demo.in_{request.param}")
    small = functools.partial(module.VisionTransformer, width=16, depth=1, heads=2)
    monkeypatch.setattr(module, "VisionTransformer", small)
    return module


def method(start, steps=STEPS):
    return next(m for m in methods.adaptations(steps) if m.title.startswith(start))


def adapted(framework, start, steps=STEPS):
    """A base, a copy of its values, and what one method made of it."""
    base = framework.create(0)
    before = jax.tree.map(np.array, leaves(base))
    run = train.fit(framework, base, method(start, steps), range(5, 10), steps, seed=0)
    return base, before, run


def leaves(tree):
    return jax.tree.leaves(tree if isinstance(tree, dict) else train_state(tree))


def train_state(model):
    from flax import nnx

    return nnx.state(model)


def test_the_whole_demo(framework, tmp_path, capsys):
    name = framework.__name__.rpartition("_")[2]
    main(["--framework", name, "--steps", str(STEPS), "--out", str(tmp_path / "new" / "folder")])
    printed, progress = capsys.readouterr()

    picture = matplotlib.image.imread(tmp_path / "new" / "folder" / "ranks.png")
    assert picture.shape[0] > 200
    assert picture.shape[1] > 400
    assert picture.std() > 0.1
    rows = re.findall(r"^(.*?) +([\d.]+)% +([\d,]+) +([\d,]+)$", printed, re.MULTILINE)
    assert [title for title, *_ in rows] == [m.title for m in methods.adaptations(STEPS)]
    assert all(0 <= float(accuracy) <= 100 for _, accuracy, _, _ in rows)
    sizes = [int(kept.replace(",", "")) for *_, kept in rows]
    classifier, lora, adaptive, everything = sizes
    assert classifier < lora < everything
    assert adaptive - lora == ADAPTERS * method("AdaLoRA").config.target_r  # LoRA's λ is fixed
    live = re.findall(r"^blocks\D0/(\w+) +16 +16 +(\d) +6 +\d+$", printed, re.MULTILINE)
    assert sorted(module for module, _ in live) == ["down", "key", "out", "query", "up", "value"]
    assert sum(int(rank) for _, rank in live) == ADAPTERS * method("AdaLoRA").config.target_r
    for shown in ("loss=", "budget=", "mean rank="):
        assert shown in progress


def test_ranks_follow_the_budget_down_to_the_target(framework):
    _, _, run = adapted(framework, "AdaLoRA")
    config = run.method.config
    live = [sum(adalora.ranks(progress.masks).values()) for progress in run.history]
    budgets = [int(progress.budget) for progress in run.history]
    expected = [int(adalora.budget(config, step, ADAPTERS)) for step in range(STEPS)]
    assert live == budgets == expected
    assert (live[0], live[-1]) == (ADAPTERS * config.init_r, ADAPTERS * config.target_r)
    triplets = [np.count_nonzero(a.lam) for a in adalora.adapters(run.learner.trainable).values()]
    assert sum(triplets) <= ADAPTERS * config.target_r
    assert run.trained - run.kept == ADAPTERS * (config.init_r - config.target_r) * (16 + 1 + 16)


@pytest.mark.parametrize("start", ["frozen", "LoRA", "AdaLoRA", "full"])
def test_the_base_stays_as_it_was(framework, start):
    base, before, run = adapted(framework, start)
    for now, then in zip(leaves(base), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert run.history[-1].loss < run.history[0].loss


def test_fixed_factors_stay_as_they_were(framework):
    for start, fixed in (("frozen", {"lam": 1, "p": 0}), ("LoRA", {"lam": 1})):
        _, _, run = adapted(framework, start)
        for adapter in adalora.adapters(run.learner.trainable).values():
            for name, value in fixed.items():
                np.testing.assert_array_equal(getattr(adapter, name), value)
            assert (adapter.p != 0).any() == (start == "LoRA")


def test_one_compilation_for_the_whole_run(framework, monkeypatch):
    traces = []

    def counted(logits, digits):
        traces.append(logits.shape)
        return methods.cross_entropy(logits, digits)

    monkeypatch.setattr(framework, "cross_entropy", counted)
    adapted(framework, "AdaLoRA")
    assert traces == [(64, 10)]


def test_every_method_gets_the_same_batches():
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
        (["--out", __file__], "no folder can be made at"),
        (["--lr", "1"], "unrecognized arguments: --lr"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_lowest_number_of_steps_is_enough(framework):
    _, _, run = adapted(framework, "AdaLoRA", steps=10)
    live = sum(adalora.ranks(run.history[-1].masks).values())
    assert live == ADAPTERS * run.method.config.target_r


def test_a_missing_package_is_named(tmp_path):
    code = (
        "import sys; sys.modules['tqdm'] = None; from adalora_jax.demo.__main__ import main; "
        f"main(['--out', {str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'tqdm is missing: pip install "adalora-jax[demo]" brings it.\n'
