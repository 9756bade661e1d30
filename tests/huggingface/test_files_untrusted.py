"""Contradictory and special files: each raises a ValueError that names the file."""

import os
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import adalora_jax as adalora
from adalora_jax import huggingface as peft
from adalora_jax._src import tensorfile
from huggingface.untrusted import CONFIG, KEY, TENSORS, file_of, write


def test_reading_without_safetensors_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"`safetensors`: is not installed; .*\[huggingface\]"
    ):
        peft.load_pretrained(write(tmp_path))


def test_declared_sizes_do_not_allocate_memory(tmp_path):
    data = file_of({"x": {"dtype": "F64", "shape": [2**37], "data_offsets": [0, 2**40]}}, bytes(8))
    stack = {
        f"base_model.model.l.{i}.{key}": np.ones(shape, np.float32)
        for i, rank in ((0, 1), (15, 3000))
        for key, shape in (("lora_A", (rank, 9)), ("lora_B", (9, rank)), ("lora_E", (rank, 1)))
    }
    pattern = {f"l.{i}.lora_E": [n < rank for n in range(3000)] for i, rank in ((0, 1), (15, 3000))}
    config = CONFIG | {"init_r": 3000, "rank_pattern": pattern}
    write(tmp_path / "stack", config, safetensors.numpy.save(stack))
    (tmp_path / "x.safetensors").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            tensorfile.TensorFile(tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"stack of 16 matrices, of which the file has 2"):
            peft.load_pretrained(tmp_path / "stack", names=[("l[{i}]", "l.{i}")])
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["..", "a/../../b", "a\\b", "a b", "a..b", ".a", "a.", "a\nb"])
def test_invalid_module_names_raise(name, tmp_path):
    tensors = {key.replace("a.query", name): value for key, value in TENSORS.items()}
    write(tmp_path, CONFIG, safetensors.numpy.save(tensors))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors"):
        peft.load_pretrained(tmp_path)


def test_special_files_are_not_opened(tmp_path):
    write(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        peft.load_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(ValueError, match=r"not a regular file|cannot be opened"):
        peft.load_pretrained(tmp_path)


def test_external_links_raise_except_into_hub_cache(tmp_path):
    write(tmp_path / "elsewhere")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(ValueError, match=r"link to .*, outside of its folder"):
        peft.load_pretrained(folder)
    # The cache of huggingface_hub: models--x/snapshots/<commit>/<file> -> ../../blobs/<hash>.
    snapshot, blobs = tmp_path / "models--x/snapshots/1a2b", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "elsewhere" / name).rename(blobs / name[:9])
        (snapshot / name).symlink_to(f"../../blobs/{name[:9]}")
    assert "a/query" in peft.load_pretrained(snapshot).adapters


def test_oversized_config_raises(tmp_path):
    write(tmp_path, b'{"a": "' + b"x" * (17 * 2**20) + b'"}')
    with pytest.raises(ValueError, match="bytes"):
        peft.load_pretrained(tmp_path)


DEEP: list = [True]
for _ in range(300):
    DEEP = [DEEP]
CONTRADICTIONS = {
    "a pattern nested beyond reason": CONFIG | {"rank_pattern": {"a.query.lora_E": DEEP}},
    "a rank that is not init_r": CONFIG | {"rank_pattern": None},
    "a pattern of another length": CONFIG | {"rank_pattern": {"a.query.lora_E": [True, True]}},
    "a pattern of another rank": CONFIG
    | {"rank_pattern": {"a.query.lora_E": [True, False, False]}},
    "a pattern of no module": CONFIG | {"rank_pattern": {"a.key.lora_E": [True, False, True]}},
    "another kind": CONFIG | {"peft_type": "IA3"},
    "plain LoRA": CONFIG | {"peft_type": "LORA", "rank_pattern": None},
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradictory_config_and_weights_raise(what, tmp_path):
    write(tmp_path, CONTRADICTIONS[what])
    with pytest.raises(ValueError, match=str(tmp_path)):
        peft.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("letter", "shape"),
    [
        ("A", (3, 4)),
        ("A", (2, 4, 1)),
        ("A", (8,)),
        ("B", (5, 3)),
        ("B", (10,)),
        ("E", (2,)),
        ("E", (2, 2)),
        ("E", None),
    ],
)
def test_mismatched_factors_raise(letter, shape, tmp_path):
    tensors = dict(TENSORS)
    if shape is None:
        del tensors[f"{KEY}.lora_{letter}"]
    else:
        tensors[f"{KEY}.lora_{letter}"] = np.ones(shape, np.float32)
    write(tmp_path, CONFIG, safetensors.numpy.save(tensors))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors`: 'a.query'"):
        peft.load_pretrained(tmp_path)


def test_untrusted_regexes_are_not_run(tmp_path):
    tensors = {
        f"base_model.model.{'a' * 40}!.lora_A.weight": np.ones((2, 4), np.float32),
        f"base_model.model.{'a' * 40}!.lora_B.weight": np.ones((5, 2), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "alpha_pattern": {"(a+)+": 4}}
    write(tmp_path, config, safetensors.numpy.save(tensors))
    with pytest.raises(ValueError, match="is a regex"):
        peft.load_pretrained(tmp_path)


def test_null_config_values_count_as_omitted(tmp_path):
    tensors = {
        f"{KEY}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{KEY}.lora_B.weight": np.ones((5, 2), np.float32),
    }
    config = dict.fromkeys(["lora_alpha", "alpha_pattern", "rank_pattern", "bias", "r"])
    write(tmp_path, config | {"peft_type": "LORA"}, safetensors.numpy.save(tensors))
    loaded = peft.load_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.adapters["a/query"].lam, [4.0, 4.0])


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "target_modules": ["query"]}
LORA_TENSORS = {
    f"{KEY}.lora_A.weight": np.ones((2, 4), np.float32),
    f"{KEY}.lora_B.weight": np.ones((5, 2), np.float32),
}


def test_unknown_lora_config_keys_are_reported(tmp_path):
    config = LORA | {"future_option": True, "another": 0.5, "off": False, "none": None}
    config |= {"empty": "", "nothing": [], "neither": {}, "count": 0}
    write(tmp_path, config, safetensors.numpy.save(LORA_TENSORS))
    with pytest.warns(
        UserWarning, match=r"the keys another, count, future_option are unknown and ignored; "
    ) as caught:
        peft.load_pretrained(tmp_path)
    assert caught[0].filename == __file__


def test_lora_config_keys_written_by_peft_are_known(tmp_path):
    """PEFT 0.21's keys at their defaults, and training-only keys at other values, do not warn."""
    config = dict.fromkeys(
        [
            *("alora_invocation_tokens", "arrow_config", "auto_mapping", "base_model_name_or_path"),
            *("corda_config", "eva_config", "exclude_modules", "layer_replication"),
            *("layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_config"),
            *("modules_to_save", "revision", "target_parameters", "task_type", "velora_config"),
            *("kasa_config", "monteclora_config", "trainable_token_indices"),
        ]
    )
    config |= {
        **{"ensure_weight_tying": False, "fan_in_fan_out": False, "inference_mode": True},
        **{"lora_bias": False, "use_bdlora": None, "use_dora": False, "use_qalora": False},
        **{"use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}},
        **{"init_lora_weights": True, "lora_dropout": 0.1, "megatron_core": "megatron.core"},
        **{"peft_version": "0.21.0", "qalora_group_size": 16, "eva_config": {"rho": 2.0}},
    }
    write(tmp_path, config | LORA, safetensors.numpy.save(LORA_TENSORS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "a/query" in peft.load_pretrained(tmp_path).adapters


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_lora_with_modified_base_raises(way, tmp_path):
    write(tmp_path, LORA | {"init_lora_weights": way}, safetensors.numpy.save(LORA_TENSORS))
    with pytest.raises(ValueError, match=f"init_lora_weights='{way}'.*convert"):
        peft.load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["", None])
def test_config_without_peft_type_raises(kind, tmp_path):
    config = {"base_model": "..."} if kind == "" else {"peft_type": kind, "r": 2}
    write(tmp_path, config)
    says = r"adapter_config.json.* has no peft_type.*not .*a PEFT adapter"
    with pytest.raises(ValueError, match=says):
        peft.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        adalora.AdaLoraConfig.from_peft(tmp_path)


def test_null_and_missing_total_step_raise_distinct_errors(tmp_path):
    write(tmp_path, CONFIG | {"total_step": None})
    with pytest.raises(ValueError, match="`total_step`: is null"):
        peft.load_pretrained(tmp_path)
    write(tmp_path, {key: value for key, value in CONFIG.items() if key != "total_step"})
    with pytest.raises(ValueError, match="`total_step`: is missing"):
        peft.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (f"{KEY}.lora_A.default.weight", "the adapter's name 'default'"),
        ("model.layers.0.query.lora_B.my-run.weight", "the adapter's name 'my-run'"),
        (f"{KEY}.lora_E.default", "the adapter's name 'default'"),
        ("base_model.model.head.modules_to_save.default.weight", "the adapter's name 'default'"),
        ("base_model.model.head.original_module.weight", "PEFT's wrappers"),
        (f"{KEY}.base_layer.weight", "PEFT's wrappers"),
    ],
)
@pytest.mark.parametrize("config", [CONFIG, LORA])
def test_raw_state_dicts_are_recognised(config, key, says, tmp_path):
    write(tmp_path, config, safetensors.numpy.save({key: np.ones((2, 4), np.float32)}))
    with pytest.raises(ValueError, match=f"raw state dict, with {says} .*save_pretrained"):
        peft.load_pretrained(tmp_path)


def test_missing_file_is_named_in_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        peft.load_pretrained(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        peft.load_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        peft.load_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"adapter_model.bin`: is a pickle"):
        peft.load_pretrained(tmp_path)


def test_float64_without_x64_raises(tmp_path):
    tensors = {name: value.astype(np.float64) for name, value in TENSORS.items()}
    write(tmp_path, CONFIG, safetensors.numpy.save(tensors))
    with pytest.raises(ValueError, match="jax_enable_x64"):
        peft.load_pretrained(tmp_path)


def test_loaded_config_lists_adapted_modules(tmp_path):
    loaded = peft.load_pretrained(write(tmp_path))
    assert isinstance(loaded.config, adalora.AdaLoraConfig)
    assert loaded.config.target_modules == ("a/query",)
    assert loaded.config.rank_pattern == (("a/query", (True, False, True)),)
    assert loaded.config.modules_to_save == ("head",)
