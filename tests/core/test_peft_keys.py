"""``AdaLoraConfig.from_peft`` and ``to_peft`` on a config that PEFT saved; no torch needed.

``save_pretrained`` wrote that config after a run of ``tests/parity/pinned/make.py``.
"""

import json
import pathlib
import re

import pytest

from adalora_jax import AdaLoraConfig
from adalora_jax._src.core.peft_keys import _PEFT_UNSUPPORTED

FILE = pathlib.Path(__file__).parents[1] / "parity/pinned/adapter_config.json"
PLAIN = {"peft_type": "ADALORA", "total_step": 100}


@pytest.fixture
def saved():
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("source", [FILE, str(FILE), FILE.parent, str(FILE.parent)])
def test_saved_config_is_read_from_file_and_folder(source, saved):
    assert AdaLoraConfig.from_peft(source) == AdaLoraConfig.from_peft(saved)


def test_saved_config_keeps_every_value(saved):
    config = AdaLoraConfig.from_peft(saved)
    for name in (
        *("total_step", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
        *("orth_reg_weight", "lora_alpha", "lora_dropout", "init_lora_weights", "fan_in_fan_out"),
    ):
        assert getattr(config, name) == saved[name], name
    assert config.target_modules == ("down", "key", "out", "query", "up", "value")
    assert config.modules_to_save == ("head",)
    patterns = {path.removesuffix(".lora_E"): v for path, v in saved["rank_pattern"].items()}
    assert {path: list(keep) for path, keep in config.rank_pattern} == patterns
    # The patterns include a rank of 0.
    assert not any(patterns["query"])


def test_saved_config_round_trips_through_to_peft(saved):
    config = AdaLoraConfig.from_peft(saved)
    back = config.to_peft()
    assert json.loads(json.dumps(back)) == back
    assert AdaLoraConfig.from_peft(back) == config
    saved["target_modules"].sort()
    assert {key: saved[key] for key in back} == back | {"loftq_config": saved["loftq_config"]}


def test_order_of_saved_target_modules_does_not_matter():
    """PEFT writes a set in arbitrary order; a config is a static argument of jit."""
    configs = [
        AdaLoraConfig.from_peft(PLAIN | {"target_modules": names, "exclude_modules": names})
        for names in (["a", "b"], ["b", "a"], {"b", "a"}, ("b", "a"))
    ]
    assert len(set(configs)) == 1


@pytest.mark.parametrize(
    "key",
    [
        "encoder.layer.0.query.lora_E",
        "encoder.layer.0.query.lora_E.default",
        "base_model.model.encoder.layer.0.query.lora_E",
    ],
)
def test_rank_pattern_keys_convert_to_paths_and_back(key):
    config = AdaLoraConfig.from_peft(PLAIN | {"rank_pattern": {key: [True, False]}})
    assert config.rank_pattern == (("encoder/layer/0/query", (True, False)),)
    assert config.to_peft()["rank_pattern"] == {"encoder.layer.0.query.lora_E": [True, False]}


@pytest.mark.parametrize("pattern", [{"query": 4}, {"query.lora_E": 4}, {"query": [True]}, [4]])
def test_rank_pattern_of_plain_lora_raises(pattern):
    """PEFT's AdaLoRA ignores it in training, and cannot load the adapter it saved."""
    with pytest.raises(ValueError, match="`rank_pattern="):
        AdaLoraConfig.from_peft(PLAIN | {"rank_pattern": pattern})


def test_unknown_keys_warn_by_name_and_are_ignored():
    with pytest.warns(UserWarning, match="`source`: the keys future_knob, knob2 are unknown"):
        config = AdaLoraConfig.from_peft(PLAIN | {"knob2": 1, "future_knob": None})
    assert config == AdaLoraConfig(total_step=100)


def test_fields_without_counterpart_in_peft_warn_and_are_ignored():
    with pytest.warns(UserWarning, match="the keys budget_schedule are unknown"):
        config = AdaLoraConfig.from_peft(PLAIN | {"budget_schedule": "linear"})
    assert config.budget_schedule == "cubic"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", True),
        ("alpha_pattern", {"query": 4}),
        ("lora_bias", True),
        ("eva_config", {"rho": 2.0}),
        ("megatron_core", "other.core"),
        ("init_lora_weights", "gaussian"),
    ],
)
def test_options_without_effect_in_peft_warn_and_are_ignored(key, value):
    with pytest.warns(UserWarning, match=f"PEFT's AdaLoRA does not use {key}="):
        config = AdaLoraConfig.from_peft(PLAIN | {key: value})
    assert config == AdaLoraConfig(total_step=100)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("use_rslora", True, "PEFT's AdaLoRA ignores it .*; .* set scale"),
        ("bias", "all", "biases .* stay frozen here; .* modules_to_save"),
        ("bias", "lora_only", "biases .* stay frozen here; .* modules_to_save"),
        ("trainable_token_indices", [1], "rows of the embedding.*; .* modules_to_save"),
        ("trainable_token_indices", {"wte": [1]}, "rows of the embedding.*; .* modules_to_save"),
        ("layer_replication", [(0, 4), (2, 5)], "PEFT would repeat layers .*; .* Flax model"),
        ("peft_type", "LORA", "is not 'ADALORA'; leave"),
        ("task_type", "CAUSAL", "is not one of PEFT's, SEQ_CLS.*; leave"),
        ("inference_mode", "yes", "must be True or False; leave"),
    ],
)
def test_argument_of_constructor_is_refused_with_reason(key, value, reason):
    named = f"`{re.escape(f'{key}={value!r}')}`: .*{reason}"
    with pytest.raises(ValueError, match=named):
        AdaLoraConfig(total_step=100, **{key: value})
    with pytest.raises(ValueError, match=named):
        AdaLoraConfig(total_step=100).replace(**{key: value})


def test_scale_of_rslora_can_be_set():
    """The message about use_rslora recommends it."""
    config = AdaLoraConfig(total_step=100, init_r=16, lora_alpha=8, scale=8 / 16**0.5)
    assert config.scaling == 2
    assert config.to_peft()["lora_alpha"] == 32


HARMLESS = {
    "peft_type": ["ADALORA", None],
    "task_type": ["CAUSAL_LM", None],
    "inference_mode": [True, False],
    "bias": ["none", None],
    "use_rslora": [False, None],
    "layer_replication": [[], None],
    "trainable_token_indices": [[], {}, None],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in HARMLESS.items() for value in values]
)
def test_harmless_value_is_accepted_by_constructor_and_from_peft(key, value):
    plain = AdaLoraConfig(total_step=100)
    assert AdaLoraConfig(total_step=100, **{key: value}) == plain
    assert AdaLoraConfig.from_peft({"total_step": 100, key: value}) == plain


def test_to_peft_writes_harmless_values():
    written = AdaLoraConfig(total_step=100).to_peft()
    for key in set(HARMLESS) - {"task_type", "inference_mode"}:  # save_pretrained writes these two
        assert written[key] in HARMLESS[key], key
    assert AdaLoraConfig(**written) == AdaLoraConfig(total_step=100)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("ensure_weight_tying", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("target_parameters", ["experts.weight"]),
        ("trainable_token_indices", [1, 2]),
        ("use_dora", True),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "loftq"),
        ("total_step", None),
        ("init_r", 4),  # below target_r = 8
        ("tfinal", 100),
    ],
)
def test_unsupported_peft_option_raises_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        AdaLoraConfig.from_peft(PLAIN | {key: value})


@pytest.mark.parametrize("key", _PEFT_UNSUPPORTED)
def test_unsupported_option_of_peft_config_is_refused_with_reason(key):
    _, problem, instead = _PEFT_UNSUPPORTED[key]
    message = f"`{key}='used'`: {problem}; {instead}, or merge a trained adapter with PEFT."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AdaLoraConfig.from_peft(PLAIN | {key: "used"})


@pytest.mark.parametrize(
    ("field", "others"),
    [
        ("budget_schedule", {"budget_schedule": "linear"}),
        ("score", {"score": "magnitude"}),
        ("freeze_pruned", {"freeze_pruned": True}),
        ("allow_regrowth", {"allow_regrowth": False}),
        ("prox", {"prox": "soft_threshold"}),
        ("budget_unit", {"budget_unit": "parameters"}),
        ("lambda_lr_scale", {"lambda_lr_scale": 2.0}),
        ("target_modules", {"target_modules": lambda path, module: True}),
        ("target_modules", {"target_modules": ".*query", "layers_to_transform": 3}),
        ("layers_pattern", {"target_modules": ["query"], "layers_pattern": ["layers"]}),
        ("rank_pattern", {"rank_pattern": {"query": 4}}),
        ("param_dtype", {"param_dtype": "bfloat16"}),
    ],
)
def test_to_peft_raises_for_fields_peft_lacks(field, others):
    with pytest.raises(ValueError, match=field):
        AdaLoraConfig(total_step=100, **others).to_peft()


def test_to_peft_omits_orth_reg_in_update():
    """The option does not change the numbers: PEFT's model adds the penalty to its loss."""
    config = AdaLoraConfig(total_step=100, target_modules=["query"])
    assert config.replace(orth_reg_in_update=True).to_peft() == config.to_peft()


def test_to_peft_omits_warn_small_start():
    config = AdaLoraConfig(total_step=100, target_modules=["query"])
    assert config.replace(warn_small_start=False).to_peft() == config.to_peft()


def test_to_peft_writes_rank_zero_as_booleans():
    config = AdaLoraConfig(total_step=100, init_r=2, target_r=1, rank_pattern={"query": []})
    assert config.to_peft()["rank_pattern"] == {"query.lora_E": [False, False]}
