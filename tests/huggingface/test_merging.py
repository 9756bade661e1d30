"""Increments merged into a Hugging Face checkpoint, against NumPy; ``tests/parity`` has the same
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
from huggingface.saving_run import acting_at

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
    """Compute ``W + s pᵀ diag(λ) q`` over the live rows."""
    path = name.removesuffix(".weight").replace(".", "/")
    p, lam, q = (np.asarray(leaf)[[0, 2]] for leaf in ADAPTERS[path])
    delta = 2.0 * (p.T * lam) @ q
    if path == "model/conv":
        delta = delta.reshape(4, 3, 3, 2).transpose(0, 3, 1, 2)
    return (WEIGHTS[name].astype(np.float32) + delta).astype(WEIGHTS[name].dtype)


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


def test_saved_parameters_replace_those_of_base(tmp_path):
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
def test_checkpoint_may_have_another_name_prefix(prefix, tmp_path):
    weights = {name.replace("model.", prefix): value for name, value in WEIGHTS.items()}
    base = make_base(tmp_path / "base", weights=weights)
    peft.merge_pretrained(ADAPTERS, base, tmp_path / "out", **OPTIONS)
    merged = read_all(tmp_path / "out")[f"{prefix}up.weight"]
    np.testing.assert_allclose(merged, expected("model.up.weight"), rtol=1e-4, atol=1e-5)


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


def refused(error, match, tmp_path, base, adapters=ADAPTERS, **options):
    with pytest.raises(error, match=match):
        peft.merge_pretrained(adapters, base, tmp_path / "out", **OPTIONS | options)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))


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
    with pytest.raises(ValueError, match="is inside the base's folder"):
        peft.merge_pretrained(ADAPTERS, base, base / "merged", **OPTIONS)
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_interrupted_merge_leaves_nothing(tmp_path):
    base = make_base(tmp_path / "base", sharded=True)

    def interrupted(tensors):
        yield from tensors[:3]
        raise KeyboardInterrupt

    refused(KeyboardInterrupt, None, tmp_path, base, progress=interrupted)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../secret.safetensors", "not the name"),
        ("/etc/secret.safetensors", "not the name"),
        ("sub/../../secret.safetensors", "not the name"),
        ("C:\\secret.safetensors", "not the name"),
        ("link.safetensors", "outside of its folder"),
        ("folder/a.safetensors", "outside of its folder"),
        ("gone.safetensors", "does not exist"),
        ("pytorch_model.bin", "not a safetensors file"),
        (7, "not a safetensors file"),
        (None, "not a safetensors file"),
    ],
)
def test_index_with_invalid_file_name_raises(name, says, tmp_path):
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
def test_index_that_does_not_describe_its_files_raises(text, tmp_path):
    base = make_base(tmp_path / "base", sharded=True)
    (base / "model.safetensors.index.json").write_text(text)
    refused(ValueError, r"index\.json", tmp_path, base)


def test_external_links_and_special_files_in_base_raise(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused(ValueError, "outside of its folder", tmp_path, base)
    (base / "tokenizer.json").unlink()
    os.mkfifo(base / "pipe")
    refused(ValueError, "not a regular file", tmp_path, base)


TIED = {"model_type": "llama", "tie_word_embeddings": True}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SQUARE = RNG.normal(size=(6, 6)).astype(np.float32)
TABLE, OTHER = (RNG.normal(size=(11, 6)).astype(np.float32) for _ in range(2))
A, B = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 6), (11, 2)))


def tied_base(folder, config=TIED, **tensors):
    folder.mkdir()
    query = {"model.layers.0.self_attn.q_proj.weight": SQUARE}
    tensors = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(query | (tensors or {EMBED: TABLE}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora(folder, **tensors):
    """Write a LoRA adapter of q_proj with saved tensors, whose names have ``__`` for dots."""
    folder.mkdir()
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{query}.lora_A.weight": A, f"{query}.lora_B.weight": np.ones((6, 2), np.float32)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q"]}))
    saved = {f"base_model.model.{n.replace('__', '.')}": v for n, v in tensors.items()}
    save_file(weights | saved, folder / "adapter_model.safetensors")
    return folder


def merged(tmp_path, adapter, base, **options):
    """Merge; return the embedding, the head and the config of the result."""
    peft.merge_pretrained(adapter, base, tmp_path / "out", **options)
    tensors = read_all(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    return tensors.get(EMBED), tensors.get(HEAD), config


def test_trained_head_of_tied_base_is_untied(tmp_path):
    base = tied_base(tmp_path / "base")
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", lm_head__weight=OTHER), base)
    np.testing.assert_array_equal(embed, TABLE)
    np.testing.assert_array_equal(head, OTHER)
    assert config == TIED | {"tie_word_embeddings": False}


def test_trained_embedding_of_tied_base_leaves_head_unchanged(tmp_path):
    base = tied_base(tmp_path / "base")
    adapter = lora(tmp_path / "lora", model__embed_tokens__weight=OTHER)
    embed, head, config = merged(tmp_path, adapter, base)
    np.testing.assert_array_equal(embed, OTHER)
    np.testing.assert_array_equal(head, TABLE)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("stored", [False, True])
def test_tied_option_updates_head_with_embedding(stored, tmp_path):
    tensors = {EMBED: TABLE} | ({HEAD: TABLE} if stored else {})
    base = tied_base(tmp_path / "base", **tensors)
    adapter = lora(tmp_path / "lora", model__embed_tokens__weight=OTHER)
    embed, head, config = merged(tmp_path, adapter, base, tied=True)
    np.testing.assert_array_equal(embed, OTHER)
    if stored:
        np.testing.assert_array_equal(head, OTHER)
    else:
        assert head is None
    assert config == TIED


def test_head_equal_to_embedding_stays_tied(tmp_path):
    both = {"model__embed_tokens__weight": OTHER, "lm_head__weight": OTHER.copy()}
    base = tied_base(tmp_path / "base")
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", **both), base)
    np.testing.assert_array_equal(embed, OTHER)
    np.testing.assert_array_equal(head, OTHER)
    assert config == TIED
    peft.merge_pretrained(lora(tmp_path / "plain"), base, tmp_path / "plain out")
    assert json.loads((tmp_path / "plain out" / "config.json").read_text()) == TIED


def test_increment_of_tied_head_is_added_to_copy_of_embedding(tmp_path):
    base = tied_base(tmp_path / "base")
    adapter = lora(tmp_path / "lora", lm_head__lora_A__weight=A, lm_head__lora_B__weight=B)
    embed, head, config = merged(tmp_path, adapter, base)
    np.testing.assert_array_equal(embed, TABLE)
    np.testing.assert_allclose(head, TABLE + B @ A, rtol=1e-5, atol=1e-6)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("what", ["embedding", "head"])
def test_tied_base_that_stores_both_tensors_is_untied(what, tmp_path):
    base = tied_base(tmp_path / "base", **{EMBED: TABLE, HEAD: TABLE})
    name = "model__embed_tokens__weight" if what == "embedding" else "lm_head__weight"
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", **{name: OTHER}), base)
    np.testing.assert_array_equal(embed, OTHER if what == "embedding" else TABLE)
    np.testing.assert_array_equal(head, OTHER if what == "head" else TABLE)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("inner", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("outer", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("trained", ["embedding", "head"])
def test_nested_configs_and_names_are_untied(embedding, head, inner, outer, trained, tmp_path):
    config = {"architectures": ["XForConditionalGeneration"], "text_config": {"r": 1, **inner}}
    base = tied_base(tmp_path / "base", config | outer, **{embedding: TABLE})
    name = (embedding if trained == "embedding" else head).replace(".", "__")
    peft.merge_pretrained(lora(tmp_path / "lora", **{name: OTHER}), base, tmp_path / "out")
    tensors = read_all(tmp_path / "out")
    np.testing.assert_array_equal(tensors[embedding], OTHER if trained == "embedding" else TABLE)
    np.testing.assert_array_equal(tensors[head], OTHER if trained == "head" else TABLE)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is False
    assert written["text_config"]["r"] == 1


def test_head_with_unknown_name_is_recognised_by_shape(tmp_path):
    config = {"model_type": "whisper", "tie_word_embeddings": True}
    base = tied_base(tmp_path / "base", config)
    *_, config = merged(tmp_path, lora(tmp_path / "lora", proj_out__weight=OTHER), base)
    assert config["tie_word_embeddings"] is False


def test_untied_base_and_encoder_keep_config(tmp_path):
    apart = {"tie_word_embeddings": False}
    base = tied_base(tmp_path / "base", apart, **{EMBED: TABLE, HEAD: OTHER})
    saved = {"model__embed_tokens__weight": OTHER, "lm_head__weight": TABLE}
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", **saved), base)
    np.testing.assert_array_equal(embed, OTHER)
    np.testing.assert_array_equal(head, TABLE)
    assert config == apart
    encoder = tied_base(tmp_path / "encoder", {"architectures": ["BertModel"]})
    adapter = lora(tmp_path / "other", model__embed_tokens__weight=OTHER)
    peft.merge_pretrained(adapter, encoder, tmp_path / "encoded")
    assert HEAD not in read_all(tmp_path / "encoded")


def test_ambiguous_tied_head_raises(tmp_path):
    differing = tied_base(tmp_path / "differing", **{EMBED: TABLE, HEAD: OTHER})
    saved = lora(tmp_path / "saved", model__embed_tokens__weight=SQUARE[:1].repeat(11, 0))
    refused(ValueError, "version of transformers decides", tmp_path, differing, saved)
    seq2seq = tied_base(tmp_path / "seq2seq", TIED | {"is_encoder_decoder": True})
    refused(ValueError, "the name of the head is not known.*tied=True", tmp_path, seq2seq, saved)
    several = tied_base(tmp_path / "several", **{EMBED: TABLE, "shared.weight": TABLE})
    refused(ValueError, "ties .*shared.weight.*store the head", tmp_path, several, saved)
    bare = tied_base(tmp_path / "bare", TIED, **{"embed_tokens.weight": TABLE})
    (bare / "model.safetensors").unlink()
    save_file({"embed_tokens.weight": TABLE, **WEIGHTS}, bare / "model.safetensors")
    head = {"lm_head": {"kernel": jnp.asarray(OTHER.T)}, "model/up": ADAPTERS["model/up"]}
    options = {"masks": None}
    refused(ValueError, "which has no prefix", tmp_path, bare, head, **options)
    base = tied_base(tmp_path / "base", **{EMBED: TABLE, **WEIGHTS})
    embed = {"model/embed_tokens": {"embedding": jnp.asarray(OTHER)}, "model/up": head["model/up"]}
    refused(ValueError, "`tied=None`: .*tied=True.*tied=False", tmp_path, base, embed, **options)
    for tied in (True, False):
        out = tmp_path / str(tied)
        peft.merge_pretrained(embed, base, out, config=CONFIG, tied=tied)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        assert (HEAD in read_all(out)) is not tied
    peft.merge_pretrained(embed | {"lm_head": head["lm_head"]}, base, tmp_path / "d", config=CONFIG)
    np.testing.assert_array_equal(read_all(tmp_path / "d")[HEAD], OTHER)


def disk_full():
    raise OSError(28, "No space left on device")


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
