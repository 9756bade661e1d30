"""Round trips of adapters through PEFT's files, without PEFT: against the format, NumPy, and a run
that PEFT recorded. ``tests/parity`` has that run, and the same with PEFT and transformers."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import adalora_jax as adalora
from adalora_jax import huggingface as peft
from adalora_jax._src.core import evaluation

PINNED = Path(__file__).parents[1] / "parity/pinned"
CONFIG = adalora.AdaLoraConfig(
    total_step=10, init_r=4, target_r=2, lora_alpha=6, init_lora_weights=False
)
MASK = jnp.array([True, False, True, False])


def adapter(seed, ins=5, outs=6, stack=(), config=CONFIG, rank=None):
    """Draw a random adapter with NumPy, because JAX would compile for every new shape."""
    rng = np.random.default_rng(seed)
    rows = (*stack, config.init_r if rank is None else rank)
    shapes = (*rows, outs), rows, (*rows, ins)
    dtype = jnp.dtype(config.param_dtype)
    leaves = (jnp.asarray(rng.normal(size=s).astype(dtype)) for s in shapes)
    return adalora.Adapter(*leaves, scale=config.scaling)


def tensors(folder):
    return safetensors.numpy.load_file(Path(folder) / "adapter_model.safetensors")


def settings_of(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def assert_live_rows_equal(before, masks, after):
    """Check active rows and dtypes bit for bit; all other new rows must be zero and masked."""
    for path, old in before.items():
        new, mask = after.adapters[path], np.asarray(masks[path])
        for leaf in new:
            assert leaf.dtype == old.lam.dtype
        for index in np.ndindex(mask.shape[:-1]):
            kept = after.masks[path][index]
            for a, b in zip(old, new):
                a, b = np.asarray(a)[index][mask[index]], np.asarray(b)[index]
                assert a.tobytes() == b[kept].tobytes()
                assert not b[~kept].any()


def test_files_follow_peft_format(tmp_path):
    trained = {"encoder/query": adapter(0), "encoder/up": adapter(1, 5, 7)}
    masks = {"encoder/query": MASK, "encoder/up": jnp.ones(4, bool)}
    peft.save_pretrained(tmp_path, trained, CONFIG, masks=masks, base_model="org/model")
    written = tensors(tmp_path)
    prefix = "base_model.model.encoder.query.lora_"
    p, lam, q = (np.asarray(leaf)[[0, 2]] for leaf in trained["encoder/query"])
    np.testing.assert_array_equal(written[f"{prefix}A"], q)
    np.testing.assert_array_equal(written[f"{prefix}B"], p.T)
    np.testing.assert_array_equal(written[f"{prefix}E"], lam[:, None])
    assert len(written) == 6
    config = settings_of(tmp_path)
    assert config["peft_type"] == "ADALORA"
    assert config["rank_pattern"]["encoder.query.lora_E"] == [True, False, True, False]
    assert config["target_modules"] == ["encoder.query", "encoder.up"]
    assert config["base_model_name_or_path"] == "org/model"
    assert (config["init_r"], config["lora_alpha"], config["inference_mode"]) == (4, 6, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(dtype, tmp_path):
    config = CONFIG.replace(param_dtype=dtype)
    trained = {
        "query": adapter(0, config=config),
        "layers/up": adapter(1, 5, 7, (3,), config),
        "layers/kv": adapter(2, 5, 4, (3, 2), config),
    }
    rng = np.random.default_rng(0)
    masks = {path: jnp.asarray(rng.random(a.lam.shape) < 0.5) for path, a in trained.items()}
    masks["layers/up"] = masks["layers/up"].at[1].set(False)
    names = [
        ("query", "embed.query"),
        ("layers/up[{i}]", "layers.{i}.up"),
        ("layers/kv[{i},0]", "layers.{i}.key"),
        ("layers/kv[{i},1]", "layers.{i}.value"),
    ]
    peft.save_pretrained(tmp_path / "1", trained, config, masks=masks, names=names)
    read = peft.load_pretrained(tmp_path / "1", names=names)
    assert_live_rows_equal(trained, masks, read)
    assert read.config.param_dtype == dtype
    assert adalora.ranks(read.masks) == adalora.ranks(masks)
    # Saving again, now from compact adapters, must write the same bytes.
    options = {"names": peft.NameMap(names), "masks": read.masks}
    peft.save_pretrained(tmp_path / "2", read.adapters, read.config, **options)
    weights = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "12"]
    assert weights[0] == weights[1]


def test_compact_adapters_keep_rank_pattern_of_run(tmp_path):
    peft.save_pretrained(tmp_path / "1", {"query": adapter(0)}, CONFIG, masks={"query": MASK})
    read = peft.load_pretrained(tmp_path / "1")
    peft.save_pretrained(tmp_path / "2", read.adapters, read.config)
    assert settings_of(tmp_path / "1") == settings_of(tmp_path / "2")
    assert tensors(tmp_path / "2")["base_model.model.query.lora_E"].shape == (2, 1)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip_with_any_stack_and_masks(data, tmp_path_factory):
    stack = data.draw(st.sampled_from([(), (1,), (2,), (3,), (2, 2)]))
    rank, ins, outs = (data.draw(st.integers(1, 4)) for _ in range(3))
    config = adalora.AdaLoraConfig(total_step=9, init_r=rank, target_r=1, init_lora_weights=False)
    bits = data.draw(st.lists(st.booleans(), min_size=rank * 4, max_size=rank * 4))
    count = int(np.prod(stack, dtype=int)) * rank
    masks = {"a/b": np.array(bits[:count], bool).reshape(*stack, rank)}
    trained = {"a/b": adapter(1, ins, outs, stack, config)}
    index = ",".join("ij"[n].join("{}") for n in range(len(stack)))
    places = ".".join("ij"[n].join("{}") for n in range(len(stack)))
    names = [(f"a/b[{index}]", f"a.{places}.b")] if stack else None
    folder = tmp_path_factory.mktemp("any")
    peft.save_pretrained(folder, trained, config, masks=masks, names=names)
    read = peft.load_pretrained(folder, names=names)
    assert_live_rows_equal(trained, masks, read)
    peft.load_pretrained(folder, names=names, like=trained)


def test_masks_not_lam_values_select_saved_rows(tmp_path):
    revived = adapter(0)._replace(lam=jnp.ones(4))
    peft.save_pretrained(tmp_path, {"query": revived}, CONFIG, masks={"query": MASK})
    assert tensors(tmp_path)["base_model.model.query.lora_E"].shape == (2, 1)
    zero = adapter(0)._replace(lam=jnp.zeros(4))
    peft.save_pretrained(tmp_path, {"query": zero}, CONFIG, masks={"query": ~MASK})
    assert tensors(tmp_path)["base_model.model.query.lora_E"].shape == (2, 1)


def test_states_are_accepted_as_masks(tmp_path):
    trained = {"query": adapter(0)}
    state = adalora.init_state(trained, CONFIG)
    masks = jax.tree.map(lambda mask: MASK[None], state.allocator.masks)
    state = dataclasses.replace(state, allocator=state.allocator._replace(masks=masks))
    for number, masks in enumerate((state, state.allocator)):
        with pytest.warns(UserWarning, match="made 0 updates, but the final mask is made"):
            peft.save_pretrained(tmp_path / str(number), trained, CONFIG, masks=masks)
    peft.save_pretrained(tmp_path / "2", trained, CONFIG, masks={"query": MASK})
    ways = [(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(3)]
    assert ways[0] == ways[1] == ways[2]


def test_compact_and_masked_adapters_write_same_tensors(tmp_path):
    trained, masks = {"query": adapter(0)}, {"query": MASK}
    peft.save_pretrained(tmp_path / "masked", trained, CONFIG, masks=masks)
    peft.save_pretrained(tmp_path / "compact", adalora.compact(trained, masks), CONFIG)
    assert tensors(tmp_path / "masked").keys() == tensors(tmp_path / "compact").keys()
    for name, value in tensors(tmp_path / "masked").items():
        np.testing.assert_array_equal(tensors(tmp_path / "compact")[name], value)


def test_pinned_adapter_trained_by_peft_loads(tmp_path):
    """Weights come from the pinned run's last step, truncated as PEFT truncates them."""
    arrays = np.load(PINNED / "clipped.npz")
    config = json.loads((PINNED / "adapter_config.json").read_text())
    steps = int(json.loads(str(arrays["about"]))["case"]["config"]["total_step"])
    weights, expected = {}, {}
    for key, keep in config["rank_pattern"].items():
        name, keep = key.removesuffix(".lora_E"), np.array(keep)
        p, lam, q = (arrays[f"step{steps - 1}/adapters/{name}/{f}"] for f in ("p", "lam", "q"))
        weights[f"base_model.model.{name}.lora_A"] = q[keep]
        weights[f"base_model.model.{name}.lora_B"] = np.ascontiguousarray(p.T[:, keep])
        weights[f"base_model.model.{name}.lora_E"] = lam[keep][:, None]
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        expected[name] = (p.T[:, keep] * lam[keep]) @ q[keep] * scale
    safetensors.numpy.save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    read = peft.load_pretrained(tmp_path)
    assert min(adalora.ranks(read.masks).values()) == 0
    for name, delta in expected.items():
        got = adalora.delta_weight(read.adapters[name])
        np.testing.assert_allclose(got.T, delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0, -1])
def test_scale_follows_live_rank_when_alpha_is_not_positive(alpha, tmp_path):
    peft.save_pretrained(tmp_path, {"query": adapter(0)}, CONFIG, masks={"query": MASK})
    config = settings_of(tmp_path) | {"lora_alpha": alpha}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read = peft.load_pretrained(tmp_path)
    p, lam, q = (np.asarray(leaf)[np.asarray(MASK)] for leaf in adapter(0))
    got = adalora.delta_weight(read.adapters["query"])
    np.testing.assert_allclose(got, q.T @ (p * lam[:, None]) * 2 / 4, rtol=1e-5)
    # Saving again must write a positive alpha that gives the same scale.
    peft.save_pretrained(tmp_path / "again", read.adapters, read.config)
    assert settings_of(tmp_path / "again")["lora_alpha"] > 0
    again = peft.load_pretrained(tmp_path / "again")
    same = adalora.delta_weight(again.adapters["query"])
    np.testing.assert_array_equal(same, got)


def test_training_only_options_are_dropped_and_rank_overrides_kept(tmp_path):
    config = CONFIG.replace(
        budget_schedule="linear",
        score=lambda inputs: inputs,
        allocation="per_adapter",
        freeze_pruned=True,
        target_modules=lambda path, module: True,
        rank_overrides={"query": {"init_r": 8, "alpha": 2}, "up": {"alpha": 12}},
    )
    trained = {"query": adapter(0, rank=8, config=config), "up": adapter(1), "down": adapter(2)}
    peft.save_pretrained(tmp_path, trained, config)
    saved = settings_of(tmp_path)
    assert saved["init_r"] == 8, "the largest, since PEFT has one for all"
    assert saved["rank_pattern"]["up.lora_E"] == [True] * 4 + [False] * 4
    read = peft.load_pretrained(tmp_path)
    for path, before in trained.items():
        want = adalora.delta_weight(before)
        got = adalora.delta_weight(read.adapters[path])
        np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(read.adapters["down"].lam, trained["down"].lam)


def test_lora_export_folds_scale_into_b_and_sets_alpha_to_rank(tmp_path):
    trained = {"a/query": adapter(0), "a/up": adapter(1), "b": adapter(2)}
    masks = {"a/query": MASK, "a/up": jnp.ones(4, bool), "b": jnp.zeros(4, bool)}
    peft.save_as_lora(tmp_path, trained, CONFIG, masks=masks)
    saved, written = settings_of(tmp_path), tensors(tmp_path)
    assert saved["target_modules"] == ["a.query", "a.up"], "rank 0 is left out"
    assert (saved["r"], saved["lora_alpha"]) == (4, 4)
    assert saved["rank_pattern"] == saved["alpha_pattern"] == {"a.query": 2}
    for path, name in (("a/query", "a.query"), ("a/up", "a.up")):
        a, b = (written[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        masked = trained[path]._replace(lam=jnp.where(masks[path], trained[path].lam, 0))
        np.testing.assert_allclose((b @ a).T, adalora.delta_weight(masked), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no active triplet"):
        peft.save_as_lora(tmp_path, {"b": trained["b"]}, CONFIG, masks=masks)


def test_module_does_not_take_rank_of_its_name_suffix(tmp_path):
    """PEFT takes the first key of a pattern that is a suffix of a name."""
    masks = {"query": MASK, "a/query": jnp.ones(4, bool), "b/a/query": jnp.arange(4) < 1}
    trained = {path: adapter(n) for n, path in enumerate(masks)}
    peft.save_as_lora(tmp_path, trained, CONFIG, masks=masks)
    saved = settings_of(tmp_path)
    for path, mask in masks.items():
        name = path.replace("/", ".")
        for pattern in (saved["rank_pattern"], saved["alpha_pattern"]):
            first = next((k for k in pattern if f".{name}".endswith(f".{k}")), None)
            assert pattern.get(first, 4) == mask.sum()


def test_overflowing_lora_products_raise(tmp_path):
    config = CONFIG.replace(param_dtype="float16")
    huge = jax.tree.map(lambda leaf: leaf + 3e4, adapter(0, config=config))
    with pytest.raises(ValueError, match="not finite in float16"):
        peft.save_as_lora(tmp_path, {"query": huge}, config)


def test_fused_qkv_round_trip(tmp_path):
    trained = {f"h/{i}/{n}": adapter(i + ord(n)) for i in range(2) for n in "qkv"}
    masks = {path: jnp.asarray(np.arange(4) != n % 4) for n, path in enumerate(trained)}
    names = [(f"h/{{i}}/{n}", f"h.{{i}}.c_attn:{k}/3") for k, n in enumerate("qkv")]
    peft.save_pretrained(tmp_path, trained, CONFIG, masks=masks, names=names)
    written = tensors(tmp_path)
    assert settings_of(tmp_path)["init_r"] == 12
    b = written["base_model.model.h.1.c_attn.lora_B"]
    assert b.shape == (18, 9)
    assert not b[:6, 3:].any()
    assert not b[6:12, :3].any()
    read = peft.load_pretrained(tmp_path, names=names)
    assert_live_rows_equal(trained, masks, read)
    want = adalora.delta_weight(evaluation.apply_masks(trained, masks)["h/0/k"])
    got = adalora.delta_weight(read.adapters["h/0/k"])
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_adapter_split_into_two_modules_is_rejoined(tmp_path):
    """Both halves have the adapter's q and λ, so its number of rows does not change."""
    names = [("mlp/gates:0/2", "mlp.gate_proj"), ("mlp/gates:1/2", "mlp.up_proj")]
    trained = {"mlp/gates": adapter(0, 5, 8)}
    peft.save_pretrained(tmp_path, trained, CONFIG, masks={"mlp/gates": MASK}, names=names)
    assert tensors(tmp_path)["base_model.model.mlp.up_proj.lora_B"].shape == (4, 2)
    assert_live_rows_equal(
        trained, {"mlp/gates": MASK}, peft.load_pretrained(tmp_path, names=names)
    )


def test_like_adds_layers_of_rank_zero_and_checks_shapes(tmp_path):
    trained = {"layers/up": adapter(1, 5, 7, (3,))}
    names = [("layers/up[{i}]", "layers.{i}.up")]
    peft.save_as_lora(
        tmp_path,
        trained,
        CONFIG,
        masks={"layers/up": jnp.arange(12).reshape(3, 4) > 7},
        names=names,
    )
    # Two of three layers have rank 0 and are not in the file.
    read = peft.load_pretrained(tmp_path, names=names, like=trained)
    assert adalora.ranks(read.masks) == {"layers/up[0]": 0, "layers/up[1]": 0, "layers/up[2]": 4}
    abstract = jax.eval_shape(lambda: trained)
    assert peft.load_pretrained(tmp_path, names=names, like=abstract).masks.keys() == trained.keys()
    with pytest.raises(ValueError, match=r"'layers.2.up' is for 5 inputs and 7 outputs"):
        peft.load_pretrained(tmp_path, names=names, like={"layers/up": adapter(1, 5, 6, (3,))})
    with pytest.raises(ValueError, match=r"`like`: has no adapter for 'layers.2.up'"):
        peft.load_pretrained(tmp_path, names=names, like={"layers/up": adapter(1, 5, 7, (2,))})


@pytest.mark.parametrize("write", [peft.save_pretrained, peft.save_as_lora])
def test_adapted_embedding_raises(write, tmp_path):
    """PEFT's LoRA stores embeddings under other names, and would ignore these with a warning."""
    table = adapter(1)._replace(layout=adalora.Layout("embedding", kind="embed"))
    with pytest.raises(ValueError, match=r"'wte' adapts an embedding.*merge_pretrained"):
        write(tmp_path, {"query": adapter(0), "wte": table}, CONFIG)
    assert not list(tmp_path.iterdir())


def refused(match, tmp_path, trained=None, **options):
    with pytest.raises(ValueError, match=match):
        peft.save_pretrained(tmp_path, trained or {"query": adapter(0)}, CONFIG, **options)
    assert not list(tmp_path.iterdir())


class Hub(types.ModuleType):
    """A stand-in for ``huggingface_hub`` whose only repository is a folder."""

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.calls = folder, []

    def snapshot_download(self, repo_id, **options):
        self.calls.append((repo_id, options))
        if isinstance(self.folder, Exception):
            raise self.folder
        return str(self.folder)


FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a stand-in with an adapter, in an empty working directory."""
    folder = tmp_path / "cache/models--owner--name/snapshots/1a2b"
    peft.save_pretrained(folder, {"query": adapter(0)}, CONFIG)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    module = Hub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_hub_id_is_downloaded_without_other_files(hub):
    loaded = peft.load_pretrained("owner/name")
    assert list(loaded.adapters) == ["query"]
    peft.load_pretrained("owner/name-2.1_x", revision="v1")
    assert hub.calls == [
        ("owner/name", {"revision": None, "allow_patterns": FILES}),
        ("owner/name-2.1_x", {"revision": "v1", "allow_patterns": FILES}),
    ]


def test_merge_pretrained_takes_a_hub_id(hub):
    Path("base").mkdir()
    safetensors.numpy.save_file(
        {"query.weight": np.zeros((6, 5), np.float32)}, "base/model.safetensors"
    )
    peft.merge_pretrained("owner/name", "base", "merged")
    peft.merge_pretrained(hub.folder, "base", "merged-from-folder")
    merged = [
        safetensors.numpy.load_file(f"{folder}/model.safetensors")["query.weight"]
        for folder in ("merged", "merged-from-folder")
    ]
    np.testing.assert_array_equal(*merged)
    assert merged[0].any()
    assert [name for name, _ in hub.calls] == ["owner/name"]


def test_local_folder_is_read_in_place_of_a_hub_id(hub):
    peft.save_pretrained("owner/name", {"key": adapter(0)}, CONFIG)
    assert list(peft.load_pretrained("owner/name", revision="v1").adapters) == ["key"]
    Path("owner/file").write_text("")
    with pytest.raises(FileNotFoundError, match="`owner/file`: is not a folder; pass the folder"):
        peft.load_pretrained("owner/file")
    assert not hub.calls


@pytest.mark.parametrize(
    "path",
    [
        *("name", "a/b/c", "./name", "../name", "/name", "/owner/name", "owner/", "~/name", ""),
        *("owner/na me", "owner/name\n", "https://huggingface.co/owner/name", Path("owner/name")),
    ],
)
def test_paths_that_are_no_hub_ids_are_not_looked_up(path, hub):
    with pytest.raises((FileNotFoundError, ValueError)):
        peft.load_pretrained(path)
    assert not hub.calls


def test_hub_id_without_huggingface_hub_names_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"not a folder; .* pip install huggingface_hub"):
        peft.load_pretrained("owner/name")
    with pytest.raises(FileNotFoundError, match="huggingface_hub"):
        peft.merge_pretrained("owner/name", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("error", [OSError("404 Client Error"), ValueError("Repo id must")])
def test_failed_download_is_reported_with_its_cause(error, hub):
    hub.folder = error
    message = f"`owner/name`: is not a folder, and could not be downloaded .*: {error}; pass"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        peft.load_pretrained("owner/name")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("missing", [FILES, FILES[:1], FILES[1:]])
def test_repository_without_adapter_is_reported(missing, hub):
    for name in missing:
        (hub.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"Hub without {' and '.join(missing)}; pass"):
        peft.load_pretrained("owner/name")


def test_files_from_the_hub_are_validated(hub):
    (hub.folder / FILES[1]).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=FILES[1]):
        peft.load_pretrained("owner/name")


def test_invalid_save_arguments_raise_with_hints(tmp_path):
    refused(r"'query' matches no pair, .*nearest.*names=\[", tmp_path, names=[("key", "key")])
    refused("`path='a.b/query'`: has a dot", tmp_path, {"a.b/query": adapter(0)})
    refused("with 1 stack axes matches no pair", tmp_path, {"query": adapter(0, stack=(2,))})
    refused(
        "both become 'c'",
        tmp_path,
        {"a": adapter(0), "b": adapter(1)},
        names=[("a", "c"), ("b", "c")],
    )
    refused("`masks`: has no mask for 'query'", tmp_path, masks={"key": MASK})
    refused(r"`masks\['query'\]`: has shape \(3,\)", tmp_path, masks={"query": MASK[:3]})
    refused("`names='berd'`: must be one of bert, gpt2", tmp_path, names="berd")
    refused("task_type='CLS'", tmp_path, task_type="CLS")
    refused("no adapter", tmp_path, {"head": {"kernel": jnp.ones((2, 2))}})
    refused(
        "not 4 equal parts",
        tmp_path,
        names=[("query:0/4", "a"), ("query:1/4", "b"), ("query:2/4", "c"), ("query:3/4", "d")],
    )


def test_unsupported_dtype_leaves_old_adapter(tmp_path):
    peft.save_pretrained(tmp_path, {"query": adapter(0)}, CONFIG)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = adapter(1)._replace(lam=jnp.ones(4, jnp.int32))
    with pytest.raises(ValueError, match="int32"):
        peft.save_pretrained(tmp_path, {"query": broken}, CONFIG)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_empty_directory_raises():
    adapters = {"query": adapter(0)}
    for call in (
        lambda: peft.load_pretrained(""),
        lambda: peft.save_pretrained("", adapters, CONFIG),
    ):
        with pytest.raises(ValueError, match="`directory=''`: is empty"):
            call()


@pytest.mark.parametrize("write", [peft.save_pretrained, peft.save_as_lora])
def test_config_of_another_type_raises(write, tmp_path):
    adapters = {"query": adapter(0)}
    for arguments in ((adapters, None), (adapters, 3), (CONFIG, adapters)):
        with pytest.raises(TypeError, match=r"`config=.*`: is not an AdaLoraConfig; pass one\."):
            write(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())
