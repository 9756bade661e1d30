"""Parameters of both kinds of models by path."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from adalora_jax._src.modules.params import parameters_of, replaced


def test_linen_and_nnx_parameters_have_the_same_paths():
    variables = {"params": {"up": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}}}
    of_linen = parameters_of(nn.Sequential([nn.Dense(2)]), variables)
    model = nnx.eval_shape(lambda: nnx.Dict(up=nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
    assert sorted(of_linen) == sorted(parameters_of(model, None)) == ["up/bias", "up/kernel"]
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables)
    assert all(isinstance(leaf, np.ndarray) for leaf in parameters_of(nn.Dense(2), boxed).values())


def test_model_of_another_kind_raises():
    model = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    for given in ((nn.Dense(2), None), (model, {"params": {}}), (len, {"params": {}})):
        with pytest.raises(TypeError, match=r"`model=\w+, variables=\w+`: must be an NNX module"):
            parameters_of(*given)


def test_replaced_keeps_other_leaves_and_empty_modules():
    params = {"up": {"kernel": 1, "bias": 2}, "norm": {}}
    assert replaced(params, {"up/kernel": 3}) == {"up": {"kernel": 3, "bias": 2}, "norm": {}}
    assert params["up"]["kernel"] == 1


def test_variables_without_params_raise():
    with pytest.raises(ValueError, match="`variables`: there is no 'params', but 'kernel'"):
        parameters_of(nn.Dense(3), {"kernel": np.ones((2, 3))})
