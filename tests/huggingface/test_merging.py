"""Increments merged into a Hugging Face checkpoint, against NumPy; ``tests/parity`` has the same
against PEFT and transformers."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import huggingface as peft
from huggingface.bases import (
    ADAPTERS,
    CONFIG,
    MASKS,
    OPTIONS,
    SHARDS,
    WEIGHTS,
    expected,
    make_base,
    read_all,
    refused,
)
from huggingface.saving_run import acting_at, disk_full

RNG = np.random.default_rng(1)


@pytest.mark.parametrize("sharded", [False, True])
def test_merged_checkpoint_is_base_plus_increments(sharded, tmp_path):
    base = make_base(tmp_path / "base", sharded)
    steps = []

    def progress(tensors):
        assert len(tensors) == len(WEIGHTS)
        for name in tensors:
            yield name
            steps.append(name)

    peft.merge_pretrained(ADAPTERS, base, tmp_path / "out", progress=progress, **OPTIONS)
    merged = read_all(tmp_path / "out")
    assert merged.keys() == WEIGHTS.keys() == set(steps)
    for name, weight in WEIGHTS.items():
        assert merged[name].dtype == weight.dtype
        if name in ("model.up.bias", "model.steps"):
            assert merged[name].tobytes() == weight.tobytes()
        else:
            want = expected(name).astype(np.float32)
            got = merged[name].astype(np.float32)
            np.testing.assert_allclose(got, want, rtol=2**-7 if want.itemsize < 4 else 1e-3)
            assert not np.array_equal(got, weight.astype(np.float32))
    files = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    weights = {*SHARDS, "model.safetensors.index.json"} if sharded else {"model.safetensors"}
    assert files == weights | {"config.json", "sub/vocab.txt"}
    if sharded:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {n: f for f, names in SHARDS.items() for n in names}
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in WEIGHTS.values())
        assert index["metadata"]["by"] == "test"


def test_adapter_files_merge_like_adapters_in_memory(tmp_path):
    base = make_base(tmp_path / "base")
    peft.merge_pretrained(ADAPTERS, base, tmp_path / "direct", **OPTIONS)
    options = {"masks": MASKS}
    for name, write in {"adalora": peft.save_pretrained, "lora": peft.save_as_lora}.items():
        write(tmp_path / f"{name} files", ADAPTERS, CONFIG, **options)
        peft.merge_pretrained(tmp_path / f"{name} files", base, tmp_path / name)
        for key, value in read_all(tmp_path / "direct").items():
            other = read_all(tmp_path / name)[key].astype(np.float32)
            np.testing.assert_allclose(other, value.astype(np.float32), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("how", ["names", "config", "model type"])
def test_square_conv1d_is_transposed_by_names_config_or_model_type(how, tmp_path):
    weight = np.zeros((4, 4), np.float32)
    adapter = adalora.Adapter(*(jnp.asarray(RNG.normal(size=s)) for s in ((3, 4), 3, (3, 4))))
    base = make_base(tmp_path / "base", weights={"h.0.attn.c_proj.weight": weight})
    config, names = CONFIG, None
    if how == "names":
        names = peft.hf_names("gpt2", prefix="")
    elif how == "config":
        config = CONFIG.replace(fan_in_fan_out=True)
    else:
        (base / "config.json").write_text('{"model_type": "gpt2"}')
    options = {"config": config, "names": names}
    peft.merge_pretrained({"h/0/attn/c_proj": adapter}, base, tmp_path / "out", **options)
    merged = read_all(tmp_path / "out")["h.0.attn.c_proj.weight"]
    np.testing.assert_allclose(merged, adalora.delta_weight(adapter), rtol=1e-4)


def test_mismatched_adapters_raise_and_write_nothing(tmp_path):
    base = make_base(tmp_path / "base")
    wrong = {"model/up": ADAPTERS["model/conv"]}
    refused(ValueError, r"'model.up' is for 18 inputs and 4 outputs", tmp_path, base, wrong)
    elsewhere = {"model/op": ADAPTERS["model/up"]}
    none = {"masks": None}
    refused(ValueError, r"no weight for 'model.op'.*model.up", tmp_path, base, elsewhere, **none)
    refused(FileNotFoundError, "nowhere", tmp_path, tmp_path / "nowhere")
    huge = {"model/conv": ADAPTERS["model/conv"]._replace(lam=jnp.full(3, 1e6))}
    refused(ValueError, "not finite in float16", tmp_path, base, huge)
    twice = {"model/up": ADAPTERS["model/up"], "model/up/kernel": jnp.ones((5, 6))}
    refused(ValueError, "both an adapter and a saved value", tmp_path, base, twice)
    eight = WEIGHTS | {"model.up.weight": np.zeros((6, 5), np.int8)}
    base = make_base(tmp_path / "eight", weights=eight)
    refused(ValueError, "dtype I8, .*pass a base with floating-point weights", tmp_path, base)


def test_output_directory_must_be_empty_and_outside_base(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        peft.merge_pretrained(ADAPTERS, base, tmp_path / "there", **OPTIONS)
    for base_directory, out_directory in (("", tmp_path / "out"), (base, "")):
        with pytest.raises(ValueError, match="_directory=''`: is empty"):
            peft.merge_pretrained(ADAPTERS, base_directory, out_directory, **OPTIONS)
    with pytest.raises(ValueError, match="is inside the base's folder"):
        peft.merge_pretrained(ADAPTERS, base, base / "merged", **OPTIONS)
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_interrupted_merge_leaves_nothing(tmp_path):
    base = make_base(tmp_path / "base", sharded=True)

    def interrupted(tensors):
        yield from tensors[:3]
        raise KeyboardInterrupt

    refused(KeyboardInterrupt, None, tmp_path, base, progress=interrupted)


def test_external_links_and_special_files_in_base_raise(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused(ValueError, "outside of its folder", tmp_path, base)
    (base / "tokenizer.json").unlink()
    os.mkfifo(base / "pipe")
    refused(ValueError, "not a regular file", tmp_path, base)


@pytest.mark.parametrize("is_killed", [False, True])
def test_failed_or_killed_merge_leaves_nothing_or_everything(is_killed, tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", sharded=True)
    before = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    for number in range(1, 99):
        out = tmp_path / f"[{number}]"
        with monkeypatch.context() as patch, acting_at(number, disk_full) as seen:
            if is_killed:
                patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
            failed = None
            try:
                peft.merge_pretrained(ADAPTERS, base, out, **OPTIONS)
            except OSError as error:
                failed = str(error)
        if len(seen) < number:
            break
        if failed:
            assert f"`out_directory={str(out)!r}`: cannot be written: No space left" in failed
        if not is_killed:
            assert not list(tmp_path.glob(".*"))
        if out.exists():
            assert read_all(out).keys() == WEIGHTS.keys()
        else:
            peft.merge_pretrained(ADAPTERS, base, out, **OPTIONS)
            assert not list(tmp_path.glob(".*")), "leftovers of the one before are removed"
        assert (out / "config.json").exists()
    assert number > 9
    assert before == {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}


def test_increment_that_layer_does_not_add_raises(tmp_path):
    layout = adalora.Layout("kernel", shape=(5, 6), note="its layer normalises the weight")
    adapters = {"model/up": ADAPTERS["model/up"]._replace(layout=layout)}
    base = make_base(tmp_path / "base")
    with pytest.raises(ValueError, match="'model/up' cannot be merged: its layer normalises"):
        peft.merge_pretrained(adapters, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    peft.save_pretrained(tmp_path / "adapter", adapters, CONFIG)
    peft.merge_pretrained(tmp_path / "adapter", base, tmp_path / "out")


@pytest.mark.parametrize("config", [3, {}, ADAPTERS])
def test_config_of_another_type_raises(config, tmp_path):
    with pytest.raises(TypeError, match=r"`config=.*`: is not an AdaLoraConfig; pass one\."):
        peft.merge_pretrained(ADAPTERS, tmp_path, tmp_path / "out", config=config)
