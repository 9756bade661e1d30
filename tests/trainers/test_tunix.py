"""Tunix's ``PeftTrainer`` on Tunix's own models, with our adapters and optimizer.

Tunix is unmodified. Some families train once, each with other options, and several tests examine
each run.
"""

import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from safetensors.numpy import save_file

import adalora_jax as adalora
from adalora_jax import huggingface as peft
from adalora_jax import quantization, qwix_models
from adalora_jax._src.core import pytree
from trainers import experts
from trainers import tunix_models as tunix
from trainers.tunix_models import peft_trainer

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.usefixtures("as_tunix_is"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Tunix, of JAX, Flax and Optax
]
HERE = pathlib.Path(__file__).parent
CONFIG = adalora.AdaLoraConfig(
    total_step=6,
    tinit=1,
    tfinal=2,
    init_r=4,
    target_r=2,
    lora_alpha=8,
    target_modules="all-linear",
)
# The weights that checkpoints of Hugging Face contain for every layer.
BLOCKS = r"layers/\d+/(attn|mlp)/.*"
# Gemma 3 has keys and values in one weight; Gemma 4 scales a weight before it uses it.
RUNS = {
    "llama3": ({}, {}),
    "gemma3": ({"target_modules": BLOCKS}, {"gradient_accumulation_steps": 2}),
    "gemma4": ({"modules_to_save": ["final_norm"]}, {"gradient_accumulation_steps": 3}),
}


@pytest.fixture
def as_tunix_is():
    """Allow rank promotion, because Tunix's code broadcasts."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Cache compilations: every trainer jits its own function, often to the same program."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def fine_tune(base, model_inputs, batches, total_step):
    config = adalora.AdaLoraConfig(
        total_step=total_step,
        tinit=total_step // 10,
        tfinal=3 * total_step // 10,
        init_r=4,
        target_r=2,
        scale=1.0,
        target_modules="all-linear",
        orth_reg_in_update=True,
    )
    model = adalora.nnx.adapt(base, config, rngs=nnx.Rngs(0))
    trainer = peft_trainer.PeftTrainer(
        model,
        adalora.adalora(optax.adamw(1e-2), config),
        peft_trainer.TrainingConfig(eval_every_n_steps=total_step, max_steps=total_step),
    )
    trainer.with_gen_model_input_fn(model_inputs).train(batches)
    model = adalora.nnx.eval_model(model, trainer.optimizer)
    compacted = adalora.compact(adalora.nnx.adapters(model), trainer.optimizer.opt_state)
    return adalora.nnx.with_adapters(model, compacted)  # without the pruned triplets


def export(params, model, base_folder, folder):
    params.save_lora_merged_model_as_safetensors(  # of tunix.models.qwen3.params, for instance
        local_model_path=base_folder,
        output_dir=folder,
        lora_model=qwix_models.as_lora(model),
        rank=1,
        alpha=1.0,
    )


def test_snippets_of_the_guide_train_within_budget_and_export(tmp_path):
    """``docs/how-to/trainers.md`` shows the two functions."""
    base = save_base(tunix.build("qwen3"), tmp_path / "base")
    model = fine_tune(tunix.build("qwen3"), tunix.model_inputs, tunix.batches(10), 10)
    adapters = pytree.adapters(adalora.nnx.adapters(model))
    found = adalora.nnx.adapters(adalora.nnx.adapt(tunix.build("qwen3"), CONFIG))
    assert sum(a.lam.size for a in adapters.values()) == 2 * len(pytree.adapters(found))
    params = importlib.import_module("tunix.models.qwen3.params")
    blocks = {path: a for path, a in adapters.items() if re.fullmatch(BLOCKS, path)}
    small = adalora.nnx.with_adapters(model, blocks)
    export(params, small, str(base), str(tmp_path / "merged"))
    close(tunix.logits(load("qwen3", tmp_path / "merged")), tunix.logits(small))


def train(family, base=None, **options):
    changes, settings = RUNS.get(family, ({}, {}))
    base = tunix.build(family) if base is None else base
    return tunix.train(base, CONFIG.replace(**changes), **settings, **options)


@functools.cache
def run_of(family):
    return train(family, evaluate=True)


def each_run(families=tuple(RUNS)):
    return pytest.mark.parametrize("family", families)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def disturbed(model, seed=0):
    """Add noise to all adapters in place, so that λ and all else leave their initial values."""
    rng = np.random.default_rng(seed)
    noise = lambda leaf: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
    adalora.nnx.set_adapters(model, jax.tree.map(noise, adalora.nnx.adapters(model)))
    return model


@pytest.mark.parametrize("family", tunix.models)
def test_every_family_starts_as_its_base_and_merges(family):
    base = tunix.build(family)
    adapted = adalora.nnx.adapt(base, CONFIG, nnx.Rngs(1))
    assert isinstance(adapted, type(base))
    start = tunix.logits(base)
    np.testing.assert_array_equal(tunix.logits(adapted), start)
    found = tunix.logits(disturbed(adapted))
    assert np.abs(found - start).max() > 0.1
    close(tunix.logits(adalora.merge(adapted)), found)


# Training -------------------------------------------------------------------------------------


@each_run()
def test_ranks_shrink_to_budget(family):
    run = run_of(family)
    adapters = adalora.adapters(adalora.nnx.adapters(run.model))  # without modules_to_save
    state = run.allocator
    matrices = sum(a.lam[..., 0].size for a in adapters.values())
    assert (run.watch.active[0], sum(adalora.ranks(state).values())) == (4 * matrices, 2 * matrices)
    assert run.watch.active == sorted(run.watch.active, reverse=True)
    assert len({*adalora.ranks(state).values()}) > 1, "some layers are worth more than others"
    masks = pytree.leaves_with_path(state.masks)
    assert set(masks) == set(adapters)
    for path, adapter in adapters.items():
        np.testing.assert_array_equal(adapter.lam != 0, masks[path], err_msg=path)


@each_run()
def test_base_is_bitwise_unchanged_and_eval_loss_falls(family):
    run, base = run_of(family), tunix.build(family)
    found, original = tunix.base_bits(run.model), tunix.base_bits(base)
    saved = {"final_norm/scale/value"} if family == "gemma4" else set()
    assert set(original) - set(found) == saved
    for path, value in found.items():
        np.testing.assert_array_equal(value, original[path], err_msg=path)
    if saved:
        assert np.any(run.model.final_norm.scale[...] != original["final_norm/scale/value"])
    metrics = run.trainer.metrics_logger
    losses = metrics.get_metric_history("", "loss", "eval")
    assert losses[-1] < losses[0]


@each_run()
def test_applied_updates_count_as_steps(family):
    run = run_of(family)
    every = RUNS[family][1].get("gradient_accumulation_steps", 1)
    assert run.trainer.train_steps == CONFIG.total_step
    assert run.trainer.iter_steps == CONFIG.total_step * every
    assert run.watch.steps == [i // every for i in range(CONFIG.total_step * every)]
    assert int(run.allocator.step) == CONFIG.total_step


@each_run()
def test_training_and_evaluation_compile_once_each(family):
    assert run_of(family).loss.traces == 2


@each_run(["llama3", "gemma4"])
def test_resumed_run_is_bit_identical(family, tmp_path):
    stopped = train(family, folder=tmp_path, steps=3)
    assert stopped.trainer.train_steps == 3
    resumed = train(family, folder=tmp_path)
    every = RUNS[family][1].get("gradient_accumulation_steps", 1)
    assert resumed.watch.steps == [i // every for i in range(3 * every, 6 * every)]
    whole = run_of(family)
    assert [leaf.dtype for leaf in resumed.end] == [leaf.dtype for leaf in whole.end]
    for ours, theirs in zip(resumed.end, whole.end, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    averages = jax.tree.leaves(resumed.allocator.sensitivity)
    assert any(np.any(leaf) for leaf in averages)


def test_mesh_run_matches_single_device_and_shards_averages_like_params():
    """The mesh is of 4 x 2 virtual devices, with Tunix's sharding of its models."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]),
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "tunix_mesh_run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (alone, spread), places = json.loads(done.stdout.splitlines()[-1])
    assert alone["masks"] == spread["masks"]
    assert sum(map(sum, spread["masks"].values())) == 2 * len(spread["masks"])
    for path, adapter in alone["adapters"].items():
        for ours, theirs in zip(spread["adapters"][path], adapter):
            np.testing.assert_allclose(ours, theirs, atol=3e-5, err_msg=path)
    own = places.pop("parameter")
    assert own == {"p": [None, "tp"], "q": [None, "fsdp"]}
    assert places["moments"] == own
    by_role = {name: [None, *spec] for name, spec in own.items()}
    assert places["sensitivity"] == places["uncertainty"] == by_role


# A quantised base -----------------------------------------------------------------------------


def by_qwix(model, qtype):
    """Quantise the base by Qwix's interception, as in Tunix's own QLoRA."""
    rule = qwix.QuantizationRule(module_path=BLOCKS, weight_qtype=qtype, tile_size=8)
    inputs = tunix.model_inputs(tunix.batches(1)[0])
    arguments = inputs["input_tokens"], inputs["positions"], None, inputs["attention_mask"]
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), *arguments)


# Qwix 0.1.8 cannot run Tunix's Qwen, which calls jnp.astype on its weights.
QUANTISED = {
    "nf4": ("qwen3", lambda model: quantization.quantize(model, "nf4")),
    "int8-by-qwix": ("gemma", lambda model: by_qwix(model, "int8")),
    "nf4-by-qwix": ("gemma3", lambda model: by_qwix(model, "nf4")),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_adapters_train_and_merge_on_quantised_base(how):
    family, quantise = QUANTISED[how]
    base = quantise(tunix.build(family))
    before, start = tunix.base_bits(base), tunix.logits(base)
    assert any(value.dtype.name in ("uint8", "int8", "uint4") for value in before.values())
    fresh = adalora.nnx.adapt(base, CONFIG, nnx.Rngs(1))
    np.testing.assert_array_equal(tunix.logits(fresh), start)

    run = train(family, base)
    ranks, adapters = adalora.ranks(run.allocator), adalora.nnx.adapters(run.model)
    assert len(adapters) >= 2 * 6
    assert sum(ranks.values()) == 2 * len(ranks)
    assert run.loss.traces == 1
    after = tunix.base_bits(run.model)
    assert set(after) == set(before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)

    found = tunix.logits(run.model)
    assert np.abs(found - start).max() > 1e-3
    merged, errors = quantization.merge(run.model, to="float32")
    assert type(merged) is type(tunix.build(family))
    assert len(errors) >= len(adapters) - 1
    close(tunix.logits(merged), found)


# Export ---------------------------------------------------------------------------------------


@each_run()
def test_merged_model_loads_into_new_tunix_model(family):
    run = run_of(family)
    merged = adalora.merge(run.model)
    found = tunix.logits(run.model)
    assert np.abs(found - tunix.logits(tunix.build(family))).max() > 1e-3
    close(tunix.logits(merged), found)
    fresh = nnx.clone(tunix.build(family, seed=3))
    assert type(merged) is type(fresh)
    assert {p for p, _ in nnx.to_flat_state(nnx.state(merged))} == {
        p for p, _ in nnx.to_flat_state(nnx.state(fresh))
    }
    nnx.update(fresh, nnx.state(merged))
    np.testing.assert_array_equal(tunix.logits(fresh), tunix.logits(merged))
    close(tunix.logits(run.small()), found)


def save_base(model, folder):
    folder.mkdir()
    save_file(tunix.to_hugging_face(model), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def load(family, folder):
    """Load with Tunix's own reader of Hugging Face checkpoints."""
    name = "params_safetensors" if family == "gemma3" else "params"
    reader = importlib.import_module(f"tunix.models.{family}.{name}")
    # The other mode places tensors on a mesh; this one needs none.
    return reader.create_model_from_safe_tensors(
        str(folder), tunix.config_of(family), dtype=jnp.float32, mode="original"
    )


def test_merged_hugging_face_checkpoint_gives_tunix_adapted_model(tmp_path):
    run = run_of("llama3")
    base = save_base(tunix.build("llama3"), tmp_path / "base")
    adapters, state = adalora.nnx.adapters(run.model), run.allocator
    options = {"masks": state.masks, "names": "llama"}
    peft.save_as_lora(tmp_path / "lora", adapters, CONFIG, **options)
    peft.merge_pretrained(tmp_path / "lora", base, tmp_path / "merged")
    close(tunix.logits(load("llama3", base)), tunix.logits(tunix.build("llama3")))
    close(tunix.logits(load("llama3", tmp_path / "merged")), tunix.logits(run.model))


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_tunix_lora_export_saves_adapted_model(family, tmp_path):
    base = save_base(tunix.build(family), tmp_path / "base")
    if family in RUNS:
        small = run_of(family).small()
    else:
        config = CONFIG.replace(target_modules=BLOCKS)
        small = disturbed(adalora.nnx.adapt(tunix.build(family), config))
    writer = importlib.import_module(f"tunix.models.{family}.params")
    writer.save_lora_merged_model_as_safetensors(
        local_model_path=str(base),
        output_dir=str(tmp_path / "merged"),
        lora_model=qwix_models.as_lora(small),
        rank=1,
        alpha=1.0,
    )
    found = tunix.logits(small)
    assert np.abs(found - tunix.logits(tunix.build(family))).max() > 1e-3
    close(tunix.logits(load(family, tmp_path / "merged")), found)


# A family with a mixture of experts, its module, and the patterns of its experts' weights.
MIXTURES = {
    "qwen3": ({"num_experts": 4, "num_experts_per_tok": 2}, "mlp", "(gate|up|down)_proj"),
    "gemma4": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "enable_moe": True,
            "expert_dim": 12,
            "moe_dense_hidden_dim": 24,
        },
        "moe",
        "(gating_einsum|linear)",
    ),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixture_of_experts_raises_with_way_out(family):
    options, module, _ = MIXTURES[family]
    config = CONFIG.replace(target_modules=[f"layers/0/{module}"])
    message = f"'layers/0/{module}' cannot be adapted, .*functional.adapt\\("
    with pytest.raises(ValueError, match=message):
        adalora.nnx.adapt(tunix.build(family, **options), config)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_trained_by_functional_adapt_each_with_its_ranks(family):
    options, module, weights = MIXTURES[family]
    graph, params = nnx.split(tunix.build(family, **options))

    def fn(params, inputs):
        return tunix.forward(nnx.merge(graph, params), inputs)

    def loss(found, inputs):
        tokens = inputs["input_tokens"][:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(found[:, :-1], tokens).mean()

    config = CONFIG.replace(target_modules=rf"layers/\d+/{module}/{weights}")
    inputs = [tunix.model_inputs(batch) for batch in tunix.batches(config.total_step)]
    experts.train_and_check(fn, params, config, inputs, loss, options["num_experts"])
