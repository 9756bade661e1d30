"""Adapters that PEFT trained and saved, loaded here; and bases merged here, for transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import adalora_jax as adalora
from adalora_jax import huggingface as files
from adalora_jax._src.core import evaluation
from parity import hf_models as hf
from parity import peft_side
from parity.cases import Case

peft, torch = peft_side.peft, peft_side.torch
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    # PEFT warns about its own files if a rank is 0.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape:UserWarning"),
]
TARGETS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "gemma": ["q_proj", "o_proj", "gate_proj"],
    "qwen2": ["v_proj", "up_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "vit": ["q_proj", "fc1"],
}
SCHEDULE = {"total_step": 12, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 4}
ENDS = {"before pruning": 1, "in the middle": 5, "finished": 12}


def trained(family, steps, *, modules_to_save=None, **changes):
    """Train a PEFT AdaLoRA model for some steps."""
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(
        target_modules=TARGETS[family],
        fan_in_fan_out=family == "gpt2",
        modules_to_save=modules_to_save,
        exclude_modules=["pooler.dense"] if family == "bert" else None,
        **SCHEDULE | changes,
    )
    model = peft.get_peft_model(hf.model(family), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for step in range(steps):
        if family == "vit":
            output = model(pixel_values=torch.randn(2, 3, 8, 8)).logits
        else:
            output = model(input_ids=torch.randint(hf.VOCABULARY, (2, 7))).logits
        (output - torch.randn_like(output)).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def their_deltas(model):
    """Return ``{module: increment [out, in]}`` of every adapted module, from PEFT itself."""
    result = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            delta = module.get_delta_weight("default").detach().float()
            turned = type(module.get_base_layer()).__name__ == "Conv1D"
            result[name] = (delta.T if turned else delta).numpy()
    return result


def reload(family, folder):
    return peft.PeftModel.from_pretrained(hf.model(family), folder).eval()


def assert_same_increments(read, expected):
    got = {
        path.replace("/", "."): np.asarray(
            adalora.delta_weight(evaluation.apply_masks({path: a}, {path: read.masks[path]})[path])
        ).T
        for path, a in read.adapters.items()
        if isinstance(a, adalora.Adapter)
    }
    assert set(got) == set(expected)
    for name, delta in expected.items():
        size = np.abs(delta).max()  # PEFT adds 1e-5 to the divisor of its scale
        np.testing.assert_allclose(got[name], delta, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("alpha", [8, 0, -3])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_increments_of_loaded_peft_files_match_those_of_peft_after_reload(
    family, end, alpha, tmp_path
):
    trained(family, ENDS[end], lora_alpha=alpha).save_pretrained(tmp_path)
    expected = their_deltas(reload(family, tmp_path))
    assert max(np.abs(delta).max() for delta in expected.values()) > 1e-4
    read = files.load_pretrained(tmp_path)
    assert_same_increments(read, expected)
    pruned = sum(mask.size for mask in read.masks.values()) < 4 * len(read.masks)
    assert pruned == (end != "before pruning")


@pytest.mark.parametrize("family", ["gemma", "qwen2", "qwen3", "vit"])
def test_other_families_round_trip_through_our_files(family, tmp_path):
    trained(family, 12).save_pretrained(tmp_path / "peft")
    read = files.load_pretrained(tmp_path / "peft", names=family)
    files.save_pretrained(tmp_path / "adalora", read.adapters, read.config, names=family)
    before, after = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("peft", "adalora")
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    configs = [
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("peft", "adalora")
    ]
    for key in (*SCHEDULE, "rank_pattern", "lora_alpha", "fan_in_fan_out"):
        assert configs[0][key] == configs[1][key], key
    expected = hf.logits(reload(family, tmp_path / "peft"))
    np.testing.assert_array_equal(hf.logits(reload(family, tmp_path / "adalora")), expected)


def test_rank_zero_is_loaded_and_saved(tmp_path):
    """Some modules lose all their triplets."""
    model = trained("vit", 12)
    assert 0 in [sum(v) for v in model.peft_config["default"].rank_pattern.values()]
    model.save_pretrained(tmp_path / "peft")
    read = files.load_pretrained(tmp_path / "peft", names="vit")
    files.save_pretrained(tmp_path / "adalora", read.adapters, read.config, names="vit")
    files.save_as_lora(tmp_path / "lora", read.adapters, read.config, names="vit")
    expected = hf.logits(reload("vit", tmp_path / "peft"))
    np.testing.assert_array_equal(hf.logits(reload("vit", tmp_path / "adalora")), expected)
    lora = reload("vit", tmp_path / "lora")
    np.testing.assert_allclose(hf.logits(lora), expected, rtol=1e-4, atol=1e-5)
    assert len(their_deltas(lora)) < len(their_deltas(model))


def test_fused_projection_of_peft_is_split_and_rejoined(tmp_path):
    """c_attn of GPT-2 becomes separate queries, keys and values; its rows act on all three."""
    trained("gpt2", 12).save_pretrained(tmp_path / "peft")
    names = [
        *((f"h_{{i}}/{n}", f"transformer.h.{{i}}.attn.c_attn:{k}/3") for k, n in enumerate("qkv")),
        ("h_{i}/up", "transformer.h.{i}.mlp.c_fc"),
    ]
    read = files.load_pretrained(tmp_path / "peft", names=names)
    assert read.adapters["h_0/q"].p.shape[1] == hf.WIDTH
    names = files.NameMap(names, conv1d=("c_attn", "c_fc"))
    files.save_pretrained(tmp_path / "adalora", read.adapters, read.config, names=names)
    expected, actual = (their_deltas(reload("gpt2", tmp_path / who)) for who in ("peft", "adalora"))
    for name, delta in expected.items():
        np.testing.assert_allclose(actual[name], delta, rtol=1e-4, atol=1e-6)
    # Our files have one block per part, so that they round-trip bit for bit.
    again = files.load_pretrained(tmp_path / "adalora", names=names)
    for path, adapter in read.adapters.items():
        for before, after in zip(adapter, again.adapters[path]):
            np.testing.assert_array_equal(before, after)


def test_classifier_trained_by_peft_loads(tmp_path):
    model = trained("bert", 12, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "peft")
    read = files.load_pretrained(tmp_path / "peft")
    weight = model.base_model.model.classifier.modules_to_save["default"].weight
    np.testing.assert_array_equal(read.adapters["classifier"]["kernel"], weight.detach().numpy().T)
    files.save_pretrained(tmp_path / "adalora", read.adapters, read.config)
    expected = hf.logits(reload("bert", tmp_path / "peft"))
    np.testing.assert_array_equal(hf.logits(reload("bert", tmp_path / "adalora")), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_plain_lora_loads_with_its_scales(rslora, tmp_path):
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query", "intermediate.dense"],
        rank_pattern={"layer.1.attention.self.query": 2},
        alpha_pattern={"intermediate.dense": 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(hf.model("bert"), config)
    model.save_pretrained(tmp_path)
    read = files.load_pretrained(tmp_path)
    assert_same_increments(read, their_deltas(model))


def test_pickle_raises_and_conversion_by_peft_loads(tmp_path):
    model = trained("bert", 5)
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(ValueError, match=r"adapter_model.bin`: is a pickle.*save_pretrained"):
        files.load_pretrained(tmp_path / "pickle")
    again = peft.PeftModel.from_pretrained(hf.model("bert"), tmp_path / "pickle")
    again.save_pretrained(tmp_path / "other")
    assert_same_increments(files.load_pretrained(tmp_path / "other"), their_deltas(again))


def test_adapter_of_custom_model_loads(tmp_path):
    """Outside transformers, the paths are the modules' names."""
    case = Case("block6", {"total_step": 30, "init_r": 6, "target_r": 2}, trained_head=True)
    model = peft_side.build(case)
    for _ in peft_side.train(case, model):
        pass
    model.save_pretrained(tmp_path)
    read = files.load_pretrained(tmp_path)
    assert_same_increments(read, their_deltas(reload_own(case, tmp_path)))


def reload_own(case, folder):
    return peft.PeftModel.from_pretrained(peft_side.base_model(case), folder)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["adalora", "lora"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "vit"])
def test_merged_base_matches_merge_of_peft(family, kind, sharded, tmp_path):
    model = trained(family, 12, modules_to_save=["classifier"] if family == "bert" else None)
    model.save_pretrained(tmp_path / "adapter")
    if kind == "lora":
        read = files.load_pretrained(tmp_path / "adapter")
        names = files.NameMap([("{path}", "{path}")], conv1d=("c_attn", "c_fc"))
        files.save_as_lora(tmp_path / "adapter", read.adapters, read.config, names=names)
    size = "4KB" if sharded else "1GB"
    hf.model(family).save_pretrained(tmp_path / "base", max_shard_size=size)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == sharded
    seen = []
    files.merge_pretrained(
        tmp_path / "adapter",
        tmp_path / "base",
        tmp_path / "merged",
        progress=lambda tensors: (seen.append(name) or name for name in tensors),
    )
    merged = type(hf.model(family)).from_pretrained(tmp_path / "merged").eval()
    assert len(seen) >= len(merged.state_dict()) - 1  # a tied weight is stored once
    expected = reload(family, tmp_path / "adapter").merge_and_unload().state_dict()
    actual = merged.state_dict()
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(actual[name], tensor, rtol=1e-5, atol=2e-6, err_msg=name)
    assert (
        max(
            (actual[name] - tensor).abs().max()
            for name, tensor in hf.model(family).state_dict().items()
        )
        > 1e-3
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_base_keeps_dtype_and_is_rounded_once(dtype, tmp_path):
    family, layout = hf.LAYOUTS["llama, stacked"]
    config = adalora.AdaLoraConfig(total_step=9, init_r=4, target_r=2, init_lora_weights=False)
    adapters, masks = hf.adapters(layout, hf.model(family), config)
    hf.model(family).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    files.merge_pretrained(
        adapters, tmp_path / "base", tmp_path / "out", config=config, masks=masks, names=family
    )
    load = type(hf.model(family)).from_pretrained
    base, merged = (load(tmp_path / name, dtype="auto").state_dict() for name in ("base", "out"))
    expected = dict(base)
    for name, part, delta in hf.deltas(layout, evaluation.apply_masks(adapters, masks), config):
        assert part == slice(None)
        key = f"{name}.weight"
        expected[key] = (base[key].float() + torch.tensor(delta)).to(base[key].dtype)
    for name, tensor in expected.items():
        assert merged[name].dtype == getattr(torch, dtype)
        # Sums in another order may rarely be rounded differently.
        differing = merged[name] != tensor
        assert differing.float().mean() < 0.01, name
        np.testing.assert_allclose(merged[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)


def test_module_does_not_take_rank_of_its_name_suffix_in_peft(tmp_path):
    """PEFT takes the first key of a pattern that is a suffix of a name."""

    class Nested(torch.nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.query = torch.nn.Linear(4, 4)
            self.a = Nested(depth - 1) if depth else None

        def forward(self, x):
            return self.query(x) if self.a is None else self.a(self.query(x))

    config = adalora.AdaLoraConfig(total_step=9, init_r=4, target_r=2)
    rng = np.random.default_rng(0)
    masks = {"query": np.arange(4) < 2, "a/query": np.arange(4) < 4, "a/a/query": np.arange(4) < 1}
    trained = {
        path: adalora.Adapter(*(np.float32(rng.normal(size=s)) for s in ((4, 4), (4,), (4, 4))))
        for path in masks
    }
    files.save_as_lora(tmp_path, trained, config, masks=masks)
    read = files.load_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Nested(2), tmp_path)
    assert_same_increments(read, their_deltas(loaded))
    ranks = {
        n: m.r["default"] for n, m in loaded.base_model.model.named_modules() if hasattr(m, "r")
    }
    assert ranks == {"query": 2, "a.query": 4, "a.a.query": 1}
