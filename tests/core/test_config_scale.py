"""The scale of adapters: given, or derived from alpha and the rank."""

import numpy as np
import pytest
from support import problem

import adalora_jax as al

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)


def test_given_scale_does_not_depend_on_rank():
    given, derived = CONFIG.replace(scale=1.5), CONFIG
    assert (given.scaling, derived.scaling) == (1.5, 1.5)
    assert given != derived
    assert given.replace(init_r=6).scaling == 1.5
    assert given.replace(lora_alpha=1).scaling == 1.5
    assert derived.replace(init_r=6).scaling == 1.0
    assert given.replace(scale=None) == derived
    assert derived.replace(scale=derived.scaling, init_r=6).scaling == 1.5


def test_layer_alpha_overrides_config_scale():
    limits = {"query": al.RankSpec(init_r=8), "key": al.RankSpec(alpha=20)}
    config = CONFIG.replace(rank_overrides=limits)
    paths = ("a/query", "a/key", "a/up")
    assert [config.scale_of(path) for path in paths] == [6 / 8, 20 / 4, 6 / 4]
    assert [config.replace(scale=0.25).scale_of(path) for path in paths] == [0.25, 5.0, 0.25]


def test_scale_round_trips_through_dict():
    for config in (CONFIG, CONFIG.replace(scale=1.5)):
        back = al.AdaLoraConfig.from_dict(config.to_dict())
        assert back == config
        assert back.replace(init_r=6) == config.replace(init_r=6)
    # Configs saved before the option existed have no scale.
    old = {name: value for name, value in CONFIG.to_dict().items() if name != "scale"}
    assert al.AdaLoraConfig.from_dict(old) == CONFIG


def test_peft_config_expresses_scale_as_alpha():
    config = CONFIG.replace(scale=0.75)
    assert config.to_peft()["lora_alpha"] == 3
    assert "scale" not in config.to_peft()
    assert al.AdaLoraConfig.from_peft(config.to_peft()).scaling == config.scaling


@pytest.mark.parametrize("limits", [None, {"b": {"alpha": 3}}])
def test_exported_adapter_computes_with_given_scale(limits, tmp_path):
    config = CONFIG.replace(scale=0.75, rank_overrides=limits, init_lora_weights=False)
    shapes = {"a": (3, 4, ()), "b": (4, 3, ())}
    adapters = problem.adapters(config, shapes=shapes)
    al.huggingface.save_pretrained(tmp_path, adapters, config)
    loaded = al.huggingface.load_pretrained(tmp_path)
    for name, adapter in adapters.items():
        ours = al.delta_weight(adapter)
        theirs = al.delta_weight(loaded.adapters[name])
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
        if limits is None:
            problem.assert_same_bits(loaded.adapters[name]._replace(layout=None), adapter)
