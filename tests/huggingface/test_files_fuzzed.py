"""Fuzzed files: any content is loaded or raises a ValueError that names the file.

The reference for damaged files is the package ``safetensors``: it must accept every file that is
accepted here, with the same contents. The marker ``slow`` runs the same tests on more cases.
"""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huggingface.untrusted import CONFIG, KEY, TENSORS, VALID, attempt, file_of, judge, write

FEW = settings(
    max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
MANY = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def spot(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# Edits that change, remove, insert or truncate bytes of a valid file.
edits = st.lists(
    st.tuples(
        st.integers(0, len(VALID)),
        st.sampled_from(["set", "cut", "insert", "end"]),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes) -> bytes:
    for at, what, new in changes:
        keep = {"set": at + len(new), "cut": at + len(new), "insert": at, "end": len(data)}[what]
        data = data[:at] + (new if what in ("set", "insert") else b"") + data[keep:]
    return data


numbers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64, -(2**63), 10**30, 1.5, True, None, "4"]),
)
values = st.recursive(
    st.one_of(numbers, st.text(max_size=8), st.floats(), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
names = st.one_of(
    st.sampled_from(
        [
            *TENSORS,
            "base_model.model.../../etc/passwd.lora_A",
            "base_model.model.a/b.lora_A",
            "../../../x",
            "__metadata__",
            f"{KEY}.lora_A.weight",
            f"{KEY}.lora_embedding_A",
            "base_model.model..lora_E",
            "\ud800",
            "x" * 2000,
        ]
    ),
    st.text(max_size=12),
)
dtypes = st.one_of(st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "F4", "U8", "X9"]), values)
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "dtype": dtypes,
            "shape": st.one_of(st.lists(numbers, max_size=4), values),
            "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), values),
        }
    ),
)
headers = st.one_of(st.dictionaries(names, entries, max_size=4), values)


@st.composite
def consistent_files(draw):
    """Draw files whose headers match their data but have unusual names, shapes and dtypes."""
    header, offset = {}, 0
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(["F32", "BF16", "F16", "F64", "I8"]))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        size = {"F32": 4, "F64": 8, "I8": 1}.get(dtype, 2) * int(np.prod(shape, dtype=int))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return file_of(header, bytes(offset))


other_numbers = st.tuples(st.integers(len(VALID) - 60, len(VALID) - 9), st.binary(max_size=9))
files = st.one_of(
    other_numbers.map(lambda change: edited(VALID, [(change[0], "set", change[1])])),
    edits.map(lambda changes: edited(VALID, changes)),
    st.builds(file_of, headers, st.binary(max_size=64)),
    consistent_files(),
    st.binary(max_size=64),
)
CONFIG_KEYS = [
    *("peft_type", "total_step", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1"),
    *("lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "rank_pattern"),
    *("use_dora", "loftq_config", "bias", "alpha_pattern", "use_rslora", "r", "orth_reg_weight"),
    *("layer_replication", "target_parameters", "auto_mapping", "revision", "surprise"),
]
patterns = st.dictionaries(
    st.one_of(names, st.sampled_from(["a.query.lora_E", "b.lora_E", "(a+)+$", "a.query"])),
    st.one_of(st.lists(st.one_of(st.booleans(), values), max_size=5), values),
    max_size=3,
)
configs = st.builds(
    lambda changes, gone: {k: v for k, v in (CONFIG | changes).items() if k not in gone},
    st.dictionaries(st.sampled_from(CONFIG_KEYS), st.one_of(values, patterns), max_size=3),
    st.lists(st.sampled_from(list(CONFIG)), max_size=2),
)


def check_file(data, spot):
    judge(data, spot / "any.safetensors")
    attempt(write(spot / "weights", weights=data))


def check_config(config, lora, spot):
    if lora:
        config = {"rank_pattern": {}, **config, "peft_type": "LORA"}
        tensors = {f"{KEY}.lora_A.weight": np.ones((2, 4), np.float32)}
        tensors[f"{KEY}.lora_B.weight"] = np.ones((5, 2), np.float32)
        attempt(write(spot / "config", config, safetensors.numpy.save(tensors)))
    else:
        attempt(write(spot / "config", config))


def check_text(text, spot):
    attempt(write(spot / "text", text))


@FEW
@given(data=files)
def test_fuzzed_weights_load_or_raise(data, spot):
    check_file(data, spot)


@FEW
@given(config=configs, lora=st.booleans())
def test_fuzzed_configs_load_or_raise(config, lora, spot):
    check_config(config, lora, spot)


texts = st.one_of(
    st.binary(max_size=40),
    edits.map(lambda changes: edited(json.dumps(CONFIG).encode(), changes)),
    st.integers(1, 200_000).map(lambda depth: b'{"a": ' + b"[" * depth),
    st.sampled_from(
        [b'{"r": 1, "r": 2}', b'{"r": NaN}', b'{"r": 1e999}', b"9" * 5000, b"\xff\xfe"]
    ),
)


@FEW
@given(text=texts)
def test_fuzzed_config_texts_load_or_raise(text, spot):
    check_text(text, spot)


@pytest.mark.slow
@MANY
@given(data=files)
def test_thousands_of_fuzzed_weights_load_or_raise(data, spot):
    check_file(data, spot)


@pytest.mark.slow
@MANY
@given(config=configs, lora=st.booleans())
def test_thousands_of_fuzzed_configs_load_or_raise(config, lora, spot):
    check_config(config, lora, spot)


@pytest.mark.slow
@MANY
@given(text=texts)
def test_thousands_of_fuzzed_config_texts_load_or_raise(text, spot):
    check_text(text, spot)


def test_valid_file_loads(tmp_path):
    """Without this test, those above could pass on errors alone."""
    assert set(judge(VALID, tmp_path / "x.safetensors")) == set(TENSORS)
    loaded = attempt(write(tmp_path / "valid"))
    assert loaded.adapters["a/query"].p.shape == (2, 5)
    assert str(loaded.adapters["a/query"].p.dtype) == "bfloat16"
    assert loaded.adapters["head"]["kernel"].shape == (4, 3)
