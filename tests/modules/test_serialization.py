"""Adapters and configs through ``flax.serialization``."""

import jax
import numpy as np
import pytest
from flax import serialization
from support import problem

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(total_step=6, init_r=3, target_r=2)


def test_adapters_are_restored_into_a_target():
    """The arrays are stored; the scale, the layout and the config are those of the target."""
    given = {"adapters": problem.adapters(CONFIG), "config": CONFIG}
    target = {"adapters": jax.tree.map(np.zeros_like, given["adapters"]), "config": CONFIG}
    restored = serialization.from_bytes(target, serialization.to_bytes(given))
    problem.assert_same_bits(restored["adapters"], given["adapters"])
    assert restored["config"] is CONFIG


def test_state_dict_of_other_keys_raises():
    adapter = problem.adapters(CONFIG)["key"]
    state = serialization.to_state_dict(adapter)
    assert sorted(state) == ["lam", "p", "q"]
    del state["lam"]
    with pytest.raises(ValueError, match=r"`state`: an adapter in it has \['p', 'q'\], but must"):
        serialization.from_state_dict(adapter, state)
