"""Values of the config's fields: normalised, or an error with the value and a way out."""

import re

import numpy as np
import pytest

from adalora_jax import AdaLoraConfig

GOOD = {"total_step": 100}

# Invalid arguments, the value as the message shows it, and the fix that it names.
REFUSED = [
    ({"total_step": 0}, "total_step=0", "number of optimizer steps"),
    ({"total_step": None}, "total_step=None", "number of optimizer steps"),
    ({"total_step": -5}, "total_step=-5", "integer of at least 1"),
    ({"total_step": 10.0}, "total_step=10.0", "integer of at least 1"),
    ({"total_step": True}, "total_step=True", "integer of at least 1"),
    ({"total_step": "10"}, "total_step='10'", "integer of at least 1"),
    ({"target_r": 0}, "target_r=0", "integer of at least 1"),
    ({"init_r": 12.5}, "init_r=12.5", "integer of at least 1"),
    ({"init_r": True}, "init_r=True", "integer of at least 1"),
    ({"deltaT": 0}, "deltaT=0", "integer of at least 1"),
    ({"tinit": -1}, "tinit=-1", "integer of at least 0"),
    ({"tfinal": -1}, "tfinal=-1", "integer of at least 0"),
    ({"tfinal": "3"}, "tfinal='3'", "integer of at least 0"),
    ({"init_r": 4, "target_r": 8}, "init_r=4", "an init_r of at least 8"),
    ({"tinit": 100}, "tinit=100", "tinit < total_step - tfinal"),
    ({"tfinal": 100}, "tfinal=100", "tinit < total_step - tfinal"),
    ({"tinit": 60, "tfinal": 40}, "tinit=60", "tinit < total_step - tfinal"),
    ({"beta1": 0}, "beta1=0", "strictly between 0 and 1"),
    ({"beta1": 1.0}, "beta1=1.0", "strictly between 0 and 1"),
    ({"beta2": -0.1}, "beta2=-0.1", "strictly between 0 and 1"),
    ({"beta2": float("nan")}, "beta2=nan", "strictly between 0 and 1"),
    ({"beta2": "0.5"}, "beta2='0.5'", "strictly between 0 and 1"),
    ({"beta1": True}, "beta1=True", "strictly between 0 and 1"),
    ({"orth_reg_weight": -0.5}, "orth_reg_weight=-0.5", "0 or more"),
    ({"orth_reg_weight": float("inf")}, "orth_reg_weight=inf", "0 or more"),
    ({"orth_reg_weight": None}, "orth_reg_weight=None", "0 or more"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0", "at least 0 and below 1"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1", "at least 0 and below 1"),
    ({"lora_dropout": False}, "lora_dropout=False", "at least 0 and below 1"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan", "a finite number"),
    ({"lora_alpha": "16"}, "lora_alpha='16'", "a finite number"),
    ({"use_dora": True}, "use_dora=True", "leave use_dora out"),
    ({"loftq_config": {"bits": 4}}, "loftq_config={'bits': 4}", "leave loftq_config out"),
    ({"r": 8}, "r=8", "set init_r"),
    ({"r": 0}, "r=0", "set init_r"),
    ({"budget_schedule": "cosine"}, "budget_schedule='cosine'", "'linear', 'grow', or a function"),
    ({"budget_unit": "bytes"}, "budget_unit='bytes'", "'parameters', 'flops', or a function"),
    (
        {"budget_schedule": "grow", "allow_regrowth": False},
        "allow_regrowth=False",
        "leave allow_regrowth=True",
    ),
    (
        {"score": "sensitivty"},
        "score='sensitivty'",
        "'sensitivity', 'magnitude', or a function",
    ),
    ({"score_reduction": "p"}, "score_reduction='p'", "'triplet', 'lam'"),
    ({"score_reduction": len}, "score_reduction=<built-in function len>", "'triplet', 'lam'"),
    ({"init": "zeros"}, "init='zeros'", "'gaussian', 'lambda_one', 'orthonormal'"),
    ({"scale": 0}, "scale=0", "above 0, or None"),
    ({"scale": float("inf")}, "scale=inf", "above 0, or None"),
    ({"scale": "2"}, "scale='2'", "above 0, or None"),
    ({"lambda_lr_scale": -1}, "lambda_lr_scale=-1", "0 or more"),
    ({"lambda_lr_scale": None}, "lambda_lr_scale=None", "0 or more"),
    ({"prox": "l1"}, "prox='l1'", "None, 'soft_threshold', or a function"),
    ({"prox_weight": -0.1}, "prox_weight=-0.1", "0 or more"),
    ({"allow_regrowth": "never"}, "allow_regrowth='never'", "True or False"),
    ({"orthogonality": "l2"}, "orthogonality='l2'", "'frobenius', 'squared'"),
    ({"sensitivity_timing": "both"}, "sensitivity_timing='both'", "'updated', 'current'"),
    ({"freeze_pruned": 1}, "freeze_pruned=1", "True or False"),
    ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'", "True or False"),
    ({"fan_in_fan_out": None}, "fan_in_fan_out=None", "True or False"),
    ({"param_dtype": "int8"}, "param_dtype='int8'", "float32, bfloat16"),
    ({"param_dtype": None}, "param_dtype=None", "float32, bfloat16"),
    ({"target_modules": 3}, "target_modules=3", "list of names or a string"),
    ({"target_modules": ["q", 3]}, "target_modules=['q', 3]", "list of names or a string"),
    ({"exclude_modules": [""]}, "exclude_modules=['']", "list of names or a string"),
    ({"modules_to_save": [None]}, "modules_to_save=[None]", "list of names or a string"),
    ({"layers_to_transform": [-1]}, "layers_to_transform=-1", "integer of at least 0"),
    ({"layers_to_transform": "all"}, "layers_to_transform='all'", "integer of at least 0"),
    ({"rank_pattern": 3}, "rank_pattern=3", "each adapter's path"),
    ({"rank_pattern": {"q": "8"}}, "rank_pattern={'q': '8'}", "each adapter's path"),
    ({"rank_pattern": {"q": [True, [True]]}}, "rank_pattern={'q': [True, [True]]}", "booleans"),
    ({"rank_pattern": {"q": -1}}, "rank_pattern['q']=-1", "integer of at least 0"),
    ({"rank_pattern": {"q": 2**31}}, "rank_pattern['q']=2147483648", "at most 2147483647"),
    *(
        ({name: value}, f"{name}={value}", "at most 2147483647")
        for name in ("total_step", "deltaT", "tinit", "tfinal", "init_r", "target_r")
        for value in (2**31, 2**40)
    ),
    ({"init_r": 10**5000}, "init_r=an integer of 16610 bits", "at most 2147483647"),
    *(
        ({name: value}, f"{name}={shown}", "must be")
        for name in (
            *("lora_alpha", "scale", "orth_reg_weight", "lambda_lr_scale"),
            "prox_weight",
        )
        for value, shown in ((10**400, "an integer of 1329 bits"), (1e39, "1e+39"))
    ),
    ({"beta1": 10**400}, "beta1=an integer of 1329 bits", "strictly between 0 and 1"),
    ({"lora_dropout": 10**400}, "lora_dropout=an integer of", "at least 0 and below 1"),
    ({"lora_alpha": 5e-324}, "lora_alpha=5e-324", "pass a larger lora_alpha"),
    ({"lora_alpha": 1e-38}, "lora_alpha=1e-38", "pass a larger lora_alpha"),
    ({"scale": 1e-300}, "scale=1e-300", "at least 1.18e-38"),
    ({"rank_overrides": {"q": {"alpha": 5e-324}}}, "rank_overrides['q'].alpha=5e-324", "larger"),
    ({"rank_overrides": {"q": {"alpha": 10**400}}}, "rank_overrides['q']", "a finite number"),
    ({"rank_overrides": {"q": {"init_r": 2**31}}}, "init_r=2147483648", "at most 2147483647"),
    ({"rank_overrides": {"(": 3}}, "`rank_overrides`: '('", "not a regular expression"),
    ({"rank_overrides": {3: 3}}, "rank_overrides={3: 3}", "must map regexes"),
    ({"target_modules": "("}, "`target_modules`: '('", "not a regular expression"),
    ({"exclude_modules": "*a"}, "`exclude_modules`: '*a'", "not a regular expression"),
    ({"exclude_modules": "a{99999999999}"}, "`exclude_modules`: 'a{", "not a regular expression"),
    ({"layers_pattern": ["h", "["]}, "`layers_pattern`: '(?:[)'", "not a regular expression"),
    ({"layers_pattern": "(?i)h"}, "`layers_pattern`: '(?:(?i)h)'", "not a regular expression"),
    ({"target_modules": {"a": 1}}, "target_modules={'a': 1}", "must be a list of names"),
    ({"modules_to_save": len}, "modules_to_save=<built-in function len>", "list of names"),
    ({"layers_pattern": len}, "layers_pattern=<built-in function len>", "list of names"),
    ({"orth_reg_in_update": 1}, "orth_reg_in_update=1", "True or False"),
    ({"warn_small_start": None}, "warn_small_start=None", "True or False"),
    ({"bias": "all"}, "bias='all'", "leave bias out"),
    ({"bias": "lora_only"}, "bias='lora_only'", "leave bias out"),
    ({"peft_type": "LORA"}, "peft_type='LORA'", "leave peft_type out"),
    ({"task_type": "CAUSAL"}, "task_type='CAUSAL'", "leave task_type out"),
    ({"inference_mode": "no"}, "inference_mode='no'", "True or False"),
]


@pytest.mark.parametrize(
    ("arguments", "shown", "way_out"), REFUSED, ids=[row[1] for row in REFUSED]
)
def test_invalid_argument_error_names_argument_value_and_fix(arguments, shown, way_out):
    with pytest.raises(ValueError, match=re.escape(shown)) as caught:
        AdaLoraConfig(**(GOOD | arguments))
    assert way_out in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"init_r": 8, "target_r": 8},
        {"tinit": 99},
        {"tinit": 0, "tfinal": 99},
        {"orth_reg_weight": 0},
        {"lora_dropout": 0},
        {"lora_alpha": -1},
        {"total_step": np.int64(7), "target_r": np.int32(2)},
        {"use_dora": False, "loftq_config": {}, "r": None},
        {"rank_pattern": {}},
        {"rank_pattern": {"q": 0}},
        {"total_step": 2**31 - 1, "init_r": 2**31 - 1, "deltaT": 2**31 - 1},
        {"lora_alpha": 1e38, "scale": 2.0**-126},
        {"exclude_modules": len, "layers_pattern": "a|(b)"},
    ],
    ids=str,
)
def test_boundary_values_are_accepted(arguments):
    config = AdaLoraConfig(**(GOOD | arguments))
    for name in ("total_step", "init_r", "target_r"):
        assert type(getattr(config, name)) is int


def test_set_of_names_is_stored_sorted():
    names = {"query", "value", "key", "output"}
    assert AdaLoraConfig(**GOOD, target_modules=names).target_modules == tuple(sorted(names))


def test_rank_pattern_of_stack_keeps_its_slices():
    pattern = {"q": [[True, False], [True, True]], "a": [True, False]}
    config = AdaLoraConfig(**GOOD, rank_pattern=pattern)
    assert config.rank_pattern == (("a", (True, False)), ("q", ((True, False), (True, True))))
    assert hash(config) == hash(config.replace(rank_pattern=dict(config.rank_pattern)))
    with pytest.raises(ValueError, match=r"`rank_pattern=.*`: must map each adapter's path"):
        AdaLoraConfig(**GOOD, rank_pattern={"q": [3, 0]})
