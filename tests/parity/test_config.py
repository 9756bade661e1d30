"""``from_peft`` and ``to_peft`` against PEFT's own config class."""

import json
import warnings

import pytest

from adalora_jax import AdaLoraConfig
from adalora_jax._src.core.peft_keys import _PEFT_IGNORED, _PEFT_UNSUPPORTED
from parity import peft_side
from parity.cases import Case

peft, torch = peft_side.peft, peft_side.torch
lora = peft.tuners.lora.config
pytestmark = pytest.mark.parity

FULL = {
    "total_step": 500,
    "init_r": 10,
    "target_r": 4,
    "tinit": 50,
    "tfinal": 100,
    "deltaT": 5,
    "beta1": 0.7,
    "beta2": 0.95,
    "orth_reg_weight": 0.1,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "target_modules": ["value", "query"],
    "exclude_modules": ["pooler"],
    "layers_to_transform": [0, 2],
    "layers_pattern": ["layer"],
    "modules_to_save": ["classifier"],
    "init_lora_weights": False,
    "fan_in_fan_out": True,
}
VARIANTS = [
    {"total_step": 10},
    {"total_step": 10, "target_modules": r".*\.(query|value)"},
    {"total_step": 10, "target_modules": ["q"], "layers_to_transform": 1, "task_type": "CAUSAL_LM"},
    FULL,
]


@pytest.mark.parametrize("arguments", VARIANTS, ids=["least", "regex", "one layer", "full"])
def test_peft_arguments_dict_and_file_give_same_config(arguments, tmp_path):
    """PEFT's keyword arguments work unchanged, and its dict and file mean the same."""
    theirs_ = peft.AdaLoraConfig(**arguments)
    config = AdaLoraConfig.from_peft(theirs_.to_dict())
    theirs_.save_pretrained(tmp_path)
    assert AdaLoraConfig.from_peft(tmp_path) == config
    pasted = dict(arguments)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(pasted.get(name), list):
            pasted[name] = set(pasted[name])
    assert AdaLoraConfig(**pasted) == config


@pytest.mark.parametrize("arguments", VARIANTS, ids=["least", "regex", "one layer", "full"])
def test_peft_config_round_trips(arguments):
    theirs_ = peft.AdaLoraConfig(**arguments)
    back = peft.AdaLoraConfig(**AdaLoraConfig.from_peft(theirs_.to_dict()).to_peft())
    back.task_type = theirs_.task_type  # has no counterpart here
    assert back.to_dict() == theirs_.to_dict()


def test_config_of_trained_model_round_trips_with_rank_pattern(tmp_path):
    case = Case("chain2", {"total_step": 20, "init_r": 6, "target_r": 2, "tfinal": 5})
    peft_model = peft_side.build(case)
    for _ in peft_side.train(case, peft_model):
        pass
    running = AdaLoraConfig.from_peft(peft_side.config_of(peft_model).to_dict())
    expected = {name: tuple(map(bool, mask)) for name, mask in peft_side.masks(peft_model).items()}
    assert dict(running.rank_pattern) == expected
    peft_model.save_pretrained(tmp_path)
    saved = AdaLoraConfig.from_peft(tmp_path)
    assert saved == running
    # PEFT must load its own weights with our config.
    written = json.dumps(saved.to_peft() | {"inference_mode": True})
    (tmp_path / "adapter_config.json").write_text(written)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        loaded = peft.PeftModel.from_pretrained(peft_side.base_model(case), tmp_path)
    for name, (_, lam, _) in peft_side.adapters(loaded).items():
        assert lam.size == sum(expected[name])


def test_every_key_of_peft_config_is_known():
    """The defaults do not warn, so this version of PEFT has no key that is unknown here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaLoraConfig.from_peft(peft.AdaLoraConfig(total_step=10).to_dict())


IGNORED = {
    "alora_invocation_tokens": [1, 2],
    "alpha_pattern": {"layer0": 64},
    "arrow_config": lora.ArrowConfig(),
    "corda_config": lora.CordaConfig(),
    "eva_config": lora.EvaConfig(),
    "kasa_config": lora.KasaConfig(),
    "lora_bias": True,
    "lora_ga_config": lora.LoraGAConfig(),
    "megatron_config": {"key": 1},
    "megatron_core": "other.core",
    "monteclora_config": lora.MontecloraConfig(),
    "qalora_group_size": 8,
    "use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["layer0"]),
    "use_qalora": True,
    "use_rslora": True,
    "velora_config": lora.VeloraConfig(),
    "init_lora_weights": "gaussian",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("key", [*_PEFT_IGNORED, "init_lora_weights"])
def test_ignored_options_have_no_effect_in_peft(key):
    case = Case("chain2", {"total_step": 8, "init_r": 4, "target_r": 2}, learning_rate=1e-2)
    changed = Case("chain2", case.config | {key: IGNORED[key]}, learning_rate=1e-2)
    losses = [[s.loss for s in peft_side.train(c, peft_side.build(c))] for c in (case, changed)]
    assert losses[0] == losses[1]

    source = peft_side.config_of(peft_side.build(changed)).to_dict()
    with pytest.warns(UserWarning, match=f"PEFT's AdaLoRA does not use .*{key}="):
        AdaLoraConfig.from_peft(source)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_rejected_bias_option_trains_biases_in_peft(bias):
    case = Case("chain2", {"total_step": 8, "bias": bias})
    peft_model = peft_side.build(case)
    trained = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert "base_model.model.layer0.base_layer.bias" in trained
    assert "bias" in _PEFT_UNSUPPORTED
    with pytest.raises(ValueError, match=f"bias='{bias}'"):
        AdaLoraConfig.from_peft(peft_side.config_of(peft_model).to_dict())


def test_scale_of_peft_ignores_rslora():
    case = Case("chain2", {"total_step": 8, "init_r": 16, "lora_alpha": 8, "use_rslora": True})
    layer = peft_side.build(case).base_model.model.layer0
    ours = AdaLoraConfig(total_step=8, init_r=16, lora_alpha=8).scaling
    assert layer.scaling["default"] / layer.ranknum["default"].item() == ours
