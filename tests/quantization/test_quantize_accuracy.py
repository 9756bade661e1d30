"""Accuracy of the demo's Vision Transformer on a quantised base."""

import functools

import numpy as np
import pytest

from adalora_jax import quantization
from adalora_jax.demo import in_linen, in_nnx, train
from adalora_jax.demo.methods import adaptations, pretraining

STEPS = 200
SEEDS = range(5)
METHOD = 2  # AdaLoRA, among the methods of the demo


class OnLinen:
    """The demo's linen side, with its base quantised by a recipe."""

    def __init__(self, recipe):
        self.recipe = recipe

    def Learner(self, base, method, seed):
        if self.recipe is None:
            return in_linen.Learner(base, method, seed)
        return QuantisedLearner(base, method, seed, self.recipe)


class QuantisedLearner(in_linen.Learner):
    def __init__(self, base, method, seed, recipe):
        model, variables = quantization.quantize(
            in_linen.VisionTransformer(), recipe, base, np.zeros((1, 8, 8), np.float32)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_linen, "VisionTransformer", lambda: model)
            super().__init__(variables, method, seed)


class OnNnx:
    """The demo's NNX side, with its base quantised by a recipe."""

    def __init__(self, recipe):
        self.recipe = recipe

    def Learner(self, base, method, seed):
        if self.recipe is not None:
            base = quantization.quantize(base, self.recipe)
        return in_nnx.Learner(base, method, seed)


@functools.cache
def pretrained(framework, seed):
    side = {"linen": in_linen, "nnx": in_nnx}[framework]
    run = train.fit(side, side.create(seed), pretraining(STEPS), range(5), STEPS, seed)
    return run.learner.base


@functools.cache
def accuracy(framework, recipe):
    """Compute the mean test accuracy over the seeds, in points."""
    side = {"linen": OnLinen, "nnx": OnNnx}[framework](recipe)
    method = adaptations(STEPS)[METHOD]
    assert method.adaptive
    found = [
        train.fit(side, pretrained(framework, seed), method, range(5, 10), STEPS, seed).accuracy
        for seed in SEEDS
    ]
    return 100 * float(np.mean(found))


@pytest.mark.exhaustive  # each case trains for minutes, once per seed
@pytest.mark.parametrize(
    ("framework", "recipe"),
    [
        ("linen", "nf4"),
        ("linen", "int8"),
        ("linen", "int4"),
        ("nnx", "nf4"),
    ],
)
def test_quantised_base_costs_less_than_one_point_of_accuracy(framework, recipe):
    whole = accuracy(framework, None)
    found = accuracy(framework, recipe)
    print(f"{framework} {recipe}: {found:.2f} against {whole:.2f}")
    assert whole > 90
    assert found > whole - 1
