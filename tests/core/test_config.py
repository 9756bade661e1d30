"""The configuration: validation, errors that name a fix, hashing and serialisation."""

import dataclasses
import functools
import inspect
import itertools
import json
import pickle
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalora_jax import AdaLoraConfig, RankSpec
from adalora_jax._src.core.config import _CHOICES

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
    ({"lora_alpha": 5e-324}, "lora_alpha=5e-324", "raise lora_alpha"),
    ({"lora_alpha": 1e-38}, "lora_alpha=1e-38", "raise lora_alpha"),
    ({"scale": 1e-300}, "scale=1e-300", "at least 1.18e-38"),
    ({"rank_overrides": {"q": {"alpha": 5e-324}}}, "rank_overrides['q'].alpha=5e-324", "raise"),
    ({"rank_overrides": {"q": {"alpha": 10**400}}}, "rank_overrides['q']", "a finite number"),
    ({"rank_overrides": {"q": {"init_r": 2**31}}}, "init_r=2147483648", "at most 2147483647"),
    ({"rank_overrides": {"(": 3}}, "`rank_overrides`: '('", "not a regular expression"),
    ({"rank_overrides": {3: 3}}, "rank_overrides={3: 3}", "must map regexes"),
    ({"target_modules": "("}, "`target_modules`: '('", "not a regular expression"),
    ({"exclude_modules": "*a"}, "`exclude_modules`: '*a'", "not a regular expression"),
    ({"exclude_modules": "a{99999999999}"}, "`exclude_modules`: 'a{", "not a regular expression"),
    ({"layers_pattern": ["h", "["]}, "`layers_pattern`: '(?:[)'", "not a regular expression"),
    ({"layers_pattern": "(?i)h"}, "`layers_pattern`: '(?:(?i)h)'", "not a regular expression"),
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


def test_total_step_is_required():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'total_step'"):
        AdaLoraConfig()  # pyright: ignore[reportCallIssue]
    for read in (AdaLoraConfig.from_dict, AdaLoraConfig.from_peft):
        with pytest.raises(ValueError, match="optimizer steps of the whole run is required"):
            read({})


def test_every_field_is_documented():
    text = inspect.getdoc(AdaLoraConfig)
    attributes = text[text.index("Attributes:") : text.index("Args:")]
    for field in dataclasses.fields(AdaLoraConfig):
        assert re.search(rf"^  {field.name}: ", attributes, re.MULTILINE), field.name
    accepted = text[text.index("Args:") : text.index("Raises:")]
    names = set(inspect.signature(AdaLoraConfig).parameters) - {
        field.name for field in dataclasses.fields(AdaLoraConfig)
    }
    assert names == set(re.findall(r"^  (\w+): ", accepted, re.MULTILINE))


def test_every_choice_is_documented():
    text = inspect.getdoc(AdaLoraConfig)
    for choices in _CHOICES.values():
        assert all(f'"{choice}"' in text for choice in choices if choice is not None)


@pytest.mark.parametrize(
    "accepted",
    [
        {"task_type": "CAUSAL_LM"},
        {"task_type": None, "bias": "none"},
        {"inference_mode": True, "peft_type": "ADALORA", "task_type": "SEQ_CLS"},
    ],
)
def test_harmless_peft_arguments_are_accepted_and_not_stored(accepted):
    config = AdaLoraConfig(**GOOD, **accepted)
    assert config == AdaLoraConfig(**GOOD)
    assert hash(config) == hash(AdaLoraConfig(**GOOD))
    assert repr(config) == repr(AdaLoraConfig(**GOOD))
    assert config.to_dict() == AdaLoraConfig(**GOOD).to_dict()
    assert config.replace(init_r=20, **accepted) == config.replace(init_r=20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"revision": None}, "`revision`: .*; remove it"),
        (
            {"use_rslora": False, "auto_mapping": None},
            "`auto_mapping, use_rslora`: .*; remove them",
        ),
        ({"base_model_name_or_path": "gpt2"}, "`base_model_name_or_path`: "),
        ({"peft_version": "0.21"}, "`peft_version`: "),
        ({"layer_replication": None}, "`layer_replication`: "),
    ],
)
def test_other_peft_arguments_raise_and_suggest_from_peft(given, message):
    with pytest.raises(TypeError, match=rf"{message}.*AdaLoraConfig\.from_peft\(\{{"):
        AdaLoraConfig(**GOOD, **given)
    with pytest.raises(TypeError, match=message):
        AdaLoraConfig(**GOOD).replace(**given)
    assert AdaLoraConfig.from_peft(GOOD | given) == AdaLoraConfig(**GOOD)


def test_unknown_argument_raises():
    with pytest.raises(TypeError, match="delta_t"):
        AdaLoraConfig(total_step=10, delta_t=3)


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


def test_final_step_is_at_most_the_last_step():
    assert AdaLoraConfig(total_step=100, tfinal=30).final_step == 70
    assert AdaLoraConfig(total_step=100).final_step == 99
    assert AdaLoraConfig(total_step=1).final_step == 0


@pytest.mark.parametrize(("alpha", "scale"), [(8, 2.0), (2.0, 0.5), (0, 1.0), (-3, 1.0)])
def test_scaling_is_alpha_over_init_r_or_one_if_alpha_is_not_positive(alpha, scale):
    assert AdaLoraConfig(total_step=10, lora_alpha=alpha, init_r=4, target_r=2).scaling == scale


# Hashing and serialisation --------------------------------------------------------------------

SPELLINGS = {
    "target_modules": (["query", "value"], ("query", "value")),
    "exclude_modules": (["head"], ("head",)),
    "modules_to_save": ("head", ["head"]),
    "layers_pattern": ("layers", ["layers"]),
    "layers_to_transform": ([1, 2], (1, 2), range(1, 3)),
    "rank_pattern": (
        {"b": 3, "a": [True, False]},
        {"a": (True, False), "b": 3},
        [("a", [True, False]), ("b", 3)],
    ),
    "param_dtype": ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")),
    "beta1": (0.5, np.float32(0.5)),
    "orth_reg_weight": (1, 1.0),
    "total_step": (100, np.int64(100)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_equivalent_values_give_equal_configs_and_hashes(name):
    configs = [AdaLoraConfig(**(GOOD | {name: value})) for value in SPELLINGS[name]]
    for first, second in itertools.combinations(configs, 2):
        assert first == second
        assert hash(first) == hash(second)
    default = AdaLoraConfig(total_step=101) if name == "total_step" else AdaLoraConfig(**GOOD)
    assert configs[0] != default


def test_set_of_names_is_stored_sorted():
    names = {"query", "value", "key", "output"}
    assert AdaLoraConfig(**GOOD, target_modules=names).target_modules == tuple(sorted(names))


def test_equal_configs_share_one_trace():
    traces = []

    @functools.partial(jax.jit, static_argnames="config")
    def scaled(x, config):
        traces.append(config)
        return x * config.scaling

    first, second, third = (
        AdaLoraConfig(**GOOD, target_modules=modules, lora_alpha=alpha)
        for modules, alpha in ((["q"], 24), (("q",), 24), (["q"], 36))
    )
    results = [float(scaled(1.0, config=config)) for config in (first, second, third)]
    assert results == [2.0, 2.0, 3.0]
    assert len(traces) == 2


def test_config_is_frozen():
    config = AdaLoraConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.init_r = 3


def test_replace_validates_and_leaves_original_unchanged():
    config = AdaLoraConfig(**GOOD, target_modules=["q"], rank_pattern={"q": 3})
    changed = config.replace(init_r=20)
    assert (changed.init_r, config.init_r) == (20, 12)
    assert changed.replace(init_r=12) == config
    with pytest.raises(ValueError, match="`init_r=2`: is below target_r=8"):
        config.replace(init_r=2)


def test_scale_is_stored_as_given():
    derived, given = AdaLoraConfig(**GOOD), AdaLoraConfig(**GOOD, scale=8 / 12)
    assert (derived.scale, given.scale) == (None, 8 / 12)
    assert derived.scaling == given.scaling
    assert derived != given
    # ``dataclasses.replace`` must work as well as the config's own method.
    for replace in (AdaLoraConfig.replace, dataclasses.replace):
        assert replace(derived, init_r=16).scaling == 0.5
        assert replace(derived, lora_alpha=24).scaling == 2.0
        assert replace(given, init_r=16, lora_alpha=24).scaling == 8 / 12
        assert replace(given, scale=None) == derived


FIELDS = {
    "target_r": st.integers(1, 4),
    "init_r": st.integers(4, 99) | st.just(np.int64(9)),
    "tinit": st.integers(0, 9),
    "tfinal": st.integers(0, 9),
    "deltaT": st.integers(1, 2**31 - 1),
    "beta1": st.floats(0.01, 0.99) | st.just(np.float32(0.3)),
    "orth_reg_weight": st.floats(0, 9) | st.integers(0, 3),
    "orth_reg_in_update": st.booleans(),
    "warn_small_start": st.booleans(),
    "lora_alpha": st.floats(-9, 9).filter(lambda v: v <= 0 or v > 1e-30) | st.just(np.float16(2)),
    "scale": st.none() | st.floats(0.01, 9) | st.integers(1, 9),
    "rank_pattern": st.none()
    | st.dictionaries(
        st.text("ab/'", min_size=1),
        st.integers(0, 9)
        | st.lists(st.booleans())
        | st.lists(st.lists(st.booleans(), min_size=1), min_size=1),
    ),
    "rank_overrides": st.none()
    | st.dictionaries(
        st.sampled_from(["q", r".*\d", "a/b", "it's"]),
        st.builds(
            RankSpec,
            init_r=st.none() | st.integers(4, 9),
            min_r=st.integers(0, 2),
            max_r=st.integers(2, 4),
            alpha=st.none() | st.floats(0.1, 9) | st.just(np.float32(2)),
        ),
    ),
    "target_modules": st.none()
    | st.sampled_from([r".*\.q", "all-linear", {"q", "k"}, np.str_("q"), [np.str_("q"), "v"]]),
    "exclude_modules": st.lists(st.text(min_size=1)),
    "layers_to_transform": st.none() | st.integers(0, 9) | st.sets(st.integers(0, 99)),
    "score": st.sampled_from(["magnitude", np.str_("sensitivity")]),
    "param_dtype": st.sampled_from([jnp.bfloat16, "float32", np.dtype("float16")]),
    "prox": st.sampled_from([None, "soft_threshold"]),
    "freeze_pruned": st.booleans(),
}


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.fixed_dictionaries({}, optional=FIELDS))
def test_config_round_trips_through_repr_json_pickle_and_replace(arguments):
    config = AdaLoraConfig(**(GOOD | {"target_r": 4} | arguments))
    names = {"AdaLoraConfig": AdaLoraConfig, "RankSpec": RankSpec}
    for back in (
        eval(repr(config), names),
        dataclasses.replace(config),
        AdaLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        pickle.loads(pickle.dumps(config)),
    ):
        assert back == config
        assert hash(back) == hash(config)
        assert repr(back) == repr(config)
        assert back.scaling == config.scaling


def test_first_of_two_equal_rank_overrides_patterns_applies():
    config = AdaLoraConfig(**GOOD, rank_overrides=[("q", 9), ("q", {"min_r": 3})])
    assert config.spec_of("a/q") == (9, 0, 9, 8)


@pytest.mark.parametrize("pattern", ["(?i)Q", "q|k", "(q)", "layers/.*/q", r"layers\.0\.q"])
def test_rank_overrides_pattern_matches_path_suffix(pattern):
    config = AdaLoraConfig(**GOOD, rank_overrides={pattern: 9})
    assert config.spec_of("layers/0/q").init_r == 9
    assert config.spec_of("layers/0/qq").init_r == 12


def test_rank_pattern_of_stack_keeps_its_slices():
    pattern = {"q": [[True, False], [True, True]], "a": [True, False]}
    config = AdaLoraConfig(**GOOD, rank_pattern=pattern)
    assert config.rank_pattern == (("a", (True, False)), ("q", ((True, False), (True, True))))
    assert hash(config) == hash(config.replace(rank_pattern=dict(config.rank_pattern)))
    with pytest.raises(ValueError, match=r"`rank_pattern=.*`: must map each adapter's path"):
        AdaLoraConfig(**GOOD, rank_pattern={"q": [3, 0]})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": {"value", "query"}, "exclude_modules": "head", "layers_to_transform": 3},
        {"layers_to_transform": range(2), "layers_pattern": "h", "modules_to_save": ["head"]},
        {"rank_pattern": {"b": 2, "a": [[True, False], [False, True]]}, "init_r": 9},
        {"rank_overrides": [("z", {"min_r": 1, "alpha": 2.5}), ("a", 4), (".*", 3)]},
        {"param_dtype": jnp.bfloat16, "freeze_pruned": True, "beta1": 0.5, "lora_alpha": -1},
        {"scale": 2, "lambda_lr_scale": 0.5, "init": "orthonormal", "allow_regrowth": False},
        {"budget_unit": "flops", "budget_schedule": "grow"},
        {"prox": "soft_threshold", "prox_weight": 0.1, "score": "sensitivity"},
        {"allocation": "per_adapter", "score": "magnitude", "budget_schedule": "linear"},
    ],
    ids=lambda changes: ",".join(changes) or "defaults",
)
def test_config_round_trips_through_json(changes):
    config = AdaLoraConfig(total_step=10, **changes)
    back = AdaLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    # The first matching pattern applies, so their order is part of the config.
    assert back.rank_overrides == config.rank_overrides


def test_config_functions_must_be_passed_to_from_dict():
    functions = {"score": max, "prox": min, "init": len, "budget_unit": sum}
    config = AdaLoraConfig(total_step=10, **functions, target_modules=lambda path, module: True)
    saved = json.loads(json.dumps(config.to_dict()))
    bare = AdaLoraConfig.from_dict(saved)
    assert sorted(bare.missing_functions()) == sorted([*functions, "target_modules"])
    assert bare.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=r"function builtins\.max was not saved .*config\.replace"):
        bare.score(1, 2)
    again = {**functions, "target_modules": config.target_modules}
    assert AdaLoraConfig.from_dict(saved | again) == bare.replace(**again) == config
    assert not config.missing_functions()


def test_unknown_field_of_another_version_raises():
    saved = AdaLoraConfig(total_step=10).to_dict()
    with pytest.raises(ValueError, match=r"unknown here \(temperature\), .*another version"):
        AdaLoraConfig.from_dict(saved | {"temperature": 1.0})
