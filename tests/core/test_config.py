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

import adalora_jax as adalora
from adalora_jax import AdaLoraConfig, RankSpec, inits
from adalora_jax._src.core.config import _CHOICES

GOOD = {"total_step": 100}


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
        {"inference_mode": False, "peft_type": None, "bias": None, "use_rslora": False},
        {"layer_replication": None, "trainable_token_indices": None, "use_rslora": None},
        {"layer_replication": [], "trainable_token_indices": []},
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
            {"alpha_pattern": {}, "auto_mapping": None},
            "`alpha_pattern, auto_mapping`: .*; remove them",
        ),
        ({"base_model_name_or_path": "gpt2"}, "`base_model_name_or_path`: "),
        ({"peft_version": "0.21"}, "`peft_version`: "),
        ({"target_parameters": None}, "`target_parameters`: "),
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


@pytest.mark.parametrize(
    "call",
    [
        lambda config: adalora.init_state({}, config),
        lambda config: adalora.budget(config, 1, 2),
        lambda config: adalora.init_adapter(jax.random.key(0), 4, 4, config),
        lambda config: adalora.orthogonality({}, config),
        lambda config: inits.eva_ranks({}, config),
    ],
    ids=["init_state", "budget", "init_adapter", "orthogonality", "eva_ranks"],
)
def test_config_of_another_type_raises(call):
    for config in (None, 3, {"total_step": 10}, AdaLoraConfig):
        with pytest.raises(TypeError, match=r"`config=.*`: is not an AdaLoraConfig; pass one"):
            call(config)


def test_sources_of_another_type_raise():
    for source in (None, 3, [1]):
        with pytest.raises(TypeError, match=r"`values=.*`: is not a mapping; pass the result of"):
            AdaLoraConfig.from_dict(source)
        with pytest.raises(TypeError, match=r"`source=.*`: is neither a mapping nor a path; pass"):
            AdaLoraConfig.from_peft(source)
