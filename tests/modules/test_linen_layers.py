"""Every kind of linen layer: the adapted layer equals the layer with the dense increment."""

import jax
import pytest

from modules import checks
from modules.linen_adapted import adapt_case
from modules.linen_cases import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated"),
]

# One kind per category; the other kinds' float32 and training checks are slow tests.
QUICK = [
    "dense",
    "general-multi-axis",
    "self-attention",
    "einsum",
    "experts-einsum",
    "tied-head",
    "conv-2d-explicit-groups",
    "conv-transpose",
    "lstm-optimized",
    "shared-called-again",
]


@pytest.mark.parametrize("kind", CASES)
def test_adapted_layer_equals_dense_increment_in_float64(kind):
    with jax.enable_x64(True):
        checks.check_adapter(adapt_case(CASES[kind](), "float64"), rtol=1e-10, merge_rtol=1e-10)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES],
)
def test_adapted_layer_equals_dense_increment_in_float32_and_prunes(kind):
    found = adapt_case(CASES[kind](), "float32")
    checks.check_adapter(found, rtol=2e-5)
    checks.check_training(found)
