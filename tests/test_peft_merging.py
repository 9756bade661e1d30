"""Increments added into a Hugging Face checkpoint, against NumPy; ``tests/parity`` has the same
against PEFT and transformers."""

import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adalora_jax as adalora
from adalora_jax import huggingface as peft

CONFIG = adalora.AdaLoraConfig(total_step=9, init_r=3, target_r=1, lora_alpha=6)
RNG = np.random.default_rng(0)
ADAPTERS = {
    path: adalora.Adapter(
        *(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in shapes), scale=CONFIG.scaling
    )
    for path, shapes in {
        "model/up": ((3, 6), (3,), (3, 5)),
        "model/down": ((3, 5), (3,), (3, 6)),
        "model/conv": ((3, 4), (3,), (3, 18)),
    }.items()
}
CONV = adalora.Layout("kernel", (0, 1, 2), (3,), kind="conv", shape=(3, 3, 2, 4))
ADAPTERS["model/conv"] = ADAPTERS["model/conv"]._replace(layout=CONV)
MASKS = {path: np.array([True, False, True]) for path in ADAPTERS}
OPTIONS = {"config": CONFIG, "masks": MASKS}
WEIGHTS = {
    "model.up.weight": RNG.normal(size=(6, 5)).astype(np.float32),
    "model.down.weight": RNG.normal(size=(5, 6)).astype(ml_dtypes.bfloat16),
    "model.conv.weight": RNG.normal(size=(4, 2, 3, 3)).astype(np.float16),
    "model.up.bias": RNG.normal(size=6).astype(np.float32),
    "model.steps": np.arange(3),
}
SHARDS = {"a.safetensors": ["model.up.weight", "model.steps"], "b.safetensors": []}
SHARDS["b.safetensors"] = [name for name in WEIGHTS if name not in SHARDS["a.safetensors"]]


def make_base(folder, sharded=False, weights=WEIGHTS):
    folder.mkdir(parents=True)
    if sharded:
        for file, names in SHARDS.items():
            save_file({n: weights[n] for n in names}, folder / file, {"format": "pt"})
        places = {name: file for file, names in SHARDS.items() for name in names}
        index = {"metadata": {"total_size": 1, "by": "test"}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt", "by": "test"})
    (folder / "config.json").write_text('{"model_type": "own"}')
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_text("words")
    for name in ("pytorch_model.bin", "flax_model.msgpack", ".hidden", "other.safetensors"):
        (folder / name).write_text("not to be copied")
    return folder


def read_all(folder):
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= load_file(path)
    return result


def expected(name):
    """``W + s pᵀ diag(λ) q`` over the live rows."""
    path = name.removesuffix(".weight").replace(".", "/")
    p, lam, q = (np.asarray(leaf)[[0, 2]] for leaf in ADAPTERS[path])
    delta = 2.0 * (p.T * lam) @ q
    if path == "model/conv":
        delta = delta.reshape(4, 3, 3, 2).transpose(0, 3, 1, 2)
    return (WEIGHTS[name].astype(np.float32) + delta).astype(WEIGHTS[name].dtype)


@pytest.mark.parametrize("sharded", [False, True])
def test_merged_checkpoint_is_the_base_with_the_increments(sharded, tmp_path):
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


def test_an_adapter_from_files_merges_alike(tmp_path):
    base = make_base(tmp_path / "base")
    peft.merge_pretrained(ADAPTERS, base, tmp_path / "direct", **OPTIONS)
    options = {"masks": MASKS}
    for name, write in {"adalora": peft.save_pretrained, "lora": peft.save_as_lora}.items():
        write(tmp_path / f"{name} files", ADAPTERS, CONFIG, **options)
        peft.merge_pretrained(tmp_path / f"{name} files", base, tmp_path / name)
        for key, value in read_all(tmp_path / "direct").items():
            other = read_all(tmp_path / name)[key].astype(np.float32)
            np.testing.assert_allclose(other, value.astype(np.float32), rtol=2e-2, atol=1e-2)


def test_what_was_saved_takes_the_place_of_the_bases(tmp_path):
    base = make_base(tmp_path / "base", sharded=True)
    bias, kernel = jnp.arange(6.0), jnp.arange(12.0).reshape(6, 2)
    trained = {"model/up": ADAPTERS["model/up"], "head": {"kernel": kernel}, "model/up/bias": bias}
    peft.merge_pretrained(trained, base, tmp_path / "out", config=CONFIG)
    merged = read_all(tmp_path / "out")
    np.testing.assert_array_equal(merged["model.up.bias"], bias)
    np.testing.assert_array_equal(merged["head.weight"], kernel.T)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["head.weight"] == "b.safetensors"


@pytest.mark.parametrize("prefix", ["", "outer.model."])
def test_a_checkpoint_of_the_bare_model_has_another_prefix(prefix, tmp_path):
    weights = {name.replace("model.", prefix): value for name, value in WEIGHTS.items()}
    base = make_base(tmp_path / "base", weights=weights)
    peft.merge_pretrained(ADAPTERS, base, tmp_path / "out", **OPTIONS)
    merged = read_all(tmp_path / "out")[f"{prefix}up.weight"]
    np.testing.assert_allclose(merged, expected("model.up.weight"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["names", "config", "model type"])
def test_a_square_conv1d_is_turned_by_what_says_so(how, tmp_path):
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


def refused(error, match, tmp_path, base, adapters=ADAPTERS, **options):
    with pytest.raises(error, match=match):
        peft.merge_pretrained(adapters, base, tmp_path / "out", **OPTIONS | options)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
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
    refused(ValueError, "both adapted and saved", tmp_path, base, twice)
    eight = WEIGHTS | {"model.up.weight": np.zeros((6, 5), np.int8)}
    base = make_base(tmp_path / "eight", weights=eight)
    refused(ValueError, "dtype I8: merge into a base that is not quantised", tmp_path, base)


def test_the_place_for_the_result_must_be_free(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        peft.merge_pretrained(ADAPTERS, base, tmp_path / "there", **OPTIONS)
    with pytest.raises(ValueError, match="lies in the base's folder"):
        peft.merge_pretrained(ADAPTERS, base, base / "merged", **OPTIONS)
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_an_interrupted_merge_leaves_nothing(tmp_path):
    base = make_base(tmp_path / "base", sharded=True)

    def interrupted(tensors):
        yield from tensors[:3]
        raise KeyboardInterrupt

    refused(KeyboardInterrupt, None, tmp_path, base, progress=interrupted)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../secret.safetensors", "no plain name"),
        ("/etc/secret.safetensors", "no plain name"),
        ("sub/../../secret.safetensors", "no plain name"),
        ("C:\\secret.safetensors", "no plain name"),
        ("link.safetensors", "leads out of its folder"),
        ("folder/a.safetensors", "leads out of its folder"),
        ("gone.safetensors", "does not exist"),
        ("pytorch_model.bin", "no safetensors file"),
        (7, "no safetensors file"),
        (None, "no safetensors file"),
    ],
)
def test_an_index_leads_nowhere_else(name, says, tmp_path):
    base = make_base(tmp_path / "base", sharded=True)
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    (base / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "elsewhere").mkdir()
    save_file(WEIGHTS, tmp_path / "elsewhere" / "a.safetensors")
    (base / "folder").symlink_to(tmp_path / "elsewhere")
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.up.bias"] = name
    index.write_text(json.dumps(content))
    refused((ValueError, FileNotFoundError), says, tmp_path, base)


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', "[", '{"weight_map": {"x": "a.safetensors"}}']
)
def test_an_index_that_does_not_describe_its_files_is_refused(text, tmp_path):
    base = make_base(tmp_path / "base", sharded=True)
    (base / "model.safetensors.index.json").write_text(text)
    refused(ValueError, r"index\.json", tmp_path, base)


def test_no_link_out_of_the_base_is_copied(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused(ValueError, "leads out of its folder", tmp_path, base)
    (base / "tokenizer.json").unlink()
    os.mkfifo(base / "pipe")
    refused(ValueError, "no regular file", tmp_path, base)
