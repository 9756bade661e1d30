"""Comparison with results of PEFT that are recorded in ``pinned``; PEFT is not needed."""

import json
import pathlib

import jax
import numpy as np
import pytest

from adalora_jax import AdaLoraConfig
from parity import adalora_side
from parity.cases import MODELS, Case, Inputs

FILES = sorted(pathlib.Path(__file__).with_name("pinned").glob("*.npz"))


def test_three_pinned_runs_exist():
    assert len(FILES) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_training_matches_pinned_peft_run(path):
    file = dict(np.load(path))
    about = json.loads(str(file["about"]))
    case = Case(**about["case"])
    config = AdaLoraConfig.from_peft(about["peft_config"])
    model = MODELS[case.model]
    weights = {
        layer: {key: file[f"weights/{layer}/{key}"] for key in ("kernel", "bias")}
        for layer in model.layers
    }

    def pinned(when, kind):
        return {
            layer: tuple(file[f"{when}/{kind}/{layer}/{field}"] for field in ("p", "lam", "q"))
            for layer in model.adapted
        }

    given = Inputs(weights, file["x"], file["y"])
    steps = len(given.x)
    # The default matmul precision of an accelerator would be lower.
    with jax.default_matmul_precision("highest"):
        run = adalora_side.train(
            case,
            config,
            pinned("initial", "adapters"),
            given,
            scale=adalora_side.peft_scale(config),
        )
        for step, own in enumerate(run):
            where = f"at step {step}"
            assert own.budget == file["budget"][step], where
            masks = np.concatenate([own.masks[layer] for layer in model.adapted])
            np.testing.assert_array_equal(masks, file["masks"][step], err_msg=where)
            lam = np.concatenate([own.adapters[layer][1] for layer in model.adapted])
            np.testing.assert_array_equal(lam == 0, file["lam"][step] == 0, err_msg=where)
            np.testing.assert_allclose(lam, file["lam"][step], atol=1e-4, err_msg=where)
            np.testing.assert_allclose(own.loss, file["loss"][step], rtol=1e-3, err_msg=where)
            if step in (steps // 2, steps - 1):
                for layer, leaves in pinned(f"step{step}", "adapters").items():
                    for actual, expected in zip(own.adapters[layer], leaves):
                        np.testing.assert_allclose(actual, expected, atol=1e-3, err_msg=where)
            if step == steps // 2:
                for kind in ("sensitivity", "uncertainty"):
                    for layer, leaves in pinned(f"step{step}", kind).items():
                        for actual, expected in zip(getattr(own, kind)[layer], leaves):
                            np.testing.assert_allclose(
                                actual, expected, atol=1e-2 * np.abs(expected).max(), err_msg=where
                            )
    assert masks.sum() == file["budget"][-1] == config.target_r * len(model.adapted)
    assert masks.sum() < masks.size
