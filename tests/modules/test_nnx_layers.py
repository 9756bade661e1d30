"""Every kind of NNX layer: the adapted layer equals the layer with the dense increment; one that
changes its weight raises an error."""

import jax
import pytest
from flax import nnx
from support.small_models import draw, in_model, linear, nnx_config

import adalora_jax as adalora
from modules import checks
from modules.nnx_adapted import adapt_case
from modules.nnx_cases import CASES

# One kind per category; the other kinds' float32 and training checks are slow tests.
QUICK = [
    "linear",
    "attention",
    "custom-einsum",
    "tied-head",
    "conv-2d-explicit-groups",
    "lstm",
    "tied-weights",
    "containers",
]


@pytest.mark.parametrize("kind", CASES)
def test_adapted_layer_equals_dense_increment_in_float64(kind):
    with jax.enable_x64(True):
        checks.check_adapter(adapt_case(CASES[kind], "float64"), rtol=1e-10, merge_rtol=1e-10)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES],
)
def test_adapted_layer_equals_dense_increment_in_float32_and_prunes(kind):
    found = adapt_case(CASES[kind], "float32")
    checks.check_adapter(found, rtol=2e-5)
    checks.check_training(found)


class Rewriting(nnx.Linear):
    def __call__(self, x):
        kernel = self.kernel[...]
        self.kernel[...] = kernel / 2
        output = super().__call__(x)
        self.kernel[...] = kernel
        return output


def test_nnx_layer_that_rewrites_its_weight_raises_when_called():
    model = adalora.nnx.adapt(in_model(linear(Rewriting)), nnx_config(".*"))
    with pytest.raises(ValueError, match="Rewriting changes its weight before it calls"):
        model(draw(2, 6))
