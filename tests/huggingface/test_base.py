"""Hugging Face base checkpoints loaded into Flax models, against the same models in NumPy.

``tests/parity`` has the same against transformers itself.
"""

import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from support import hf_numpy
from support.compiling import environment
from support.hf_flax import NNX_LLAMA, Bert, Llama, NnxLlama

import adalora_jax as adalora
from adalora_jax import huggingface as peft
from adalora_jax import quantization
from huggingface.checkpoints import IDS, SIZES, abstract, close, write

pytestmark = pytest.mark.usefixtures("flax_ranks")
LLAMA = peft.NameMap((*NNX_LLAMA, *peft.hf_names("llama").pairs))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("classes", "prefix"), [(0, ""), (0, "bert."), (3, "bert.")])
def test_bert_in_linen_matches_numpy(stacked, classes, prefix, tmp_path):
    """Checkpoints with a head have a name prefix that the Flax model does not have."""
    tensors = hf_numpy.bert_tensors(SIZES, prefix=prefix, classes=classes)
    write(tmp_path, tensors, shards=1 + stacked)
    model = Bert(SIZES, stacked, classes)
    variables = peft.load_base(tmp_path, model, abstract(model), names="bert")
    got = model.apply(variables, IDS)
    jax.tree.map(close, got, hf_numpy.bert(tensors, SIZES, IDS, prefix))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("head", ["own", "tied", "attends"])
def test_llama_in_linen_matches_numpy(stacked, head, tmp_path):
    tensors = hf_numpy.llama_tensors(SIZES, seed=1, head=head == "own")
    write(tmp_path, tensors, shards=3, config={"tie_word_embeddings": head != "own"})
    model = Llama(SIZES, stacked, attends=head == "attends")
    variables = peft.load_base(tmp_path, model, abstract(model), names="llama")
    close(model.apply(variables, IDS), hf_numpy.llama(tensors, SIZES, IDS))


@pytest.mark.parametrize("stacked", [False, True])
def test_llama_in_nnx_matches_numpy(stacked, tmp_path):
    """Keys and values share one einsum, gate and up share one projection."""
    tensors = hf_numpy.llama_tensors(SIZES, seed=2)
    write(tmp_path, tensors, shards=2)
    shapes = nnx.eval_shape(lambda: NnxLlama(SIZES, stacked))
    model = peft.load_base(tmp_path, shapes, names=LLAMA)
    close(model(IDS), hf_numpy.llama(tensors, SIZES, IDS))
    assert not isinstance(shapes.norm.scale.get_value(), jax.Array), "the model that was given"


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_file_dtypes_convert_exactly_to_model_dtypes(stored, dtype, tmp_path):
    tensors = hf_numpy.llama_tensors(SIZES, dtype=ml_dtypes.bfloat16)
    tensors = {name: value.astype(stored) for name, value in tensors.items()}  # no rounding
    write(tmp_path, tensors)
    model = Llama(SIZES)
    variables = peft.load_base(tmp_path, model, abstract(model), names="llama", dtype=dtype)
    kernel = variables["params"]["layers_1"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == (dtype or "float32")
    want = tensors["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(kernel.astype(np.float32), want)


def test_dtype_that_cannot_hold_weights_raises(tmp_path):
    write(tmp_path, {"up.weight": np.full((2, 3), 1e6, np.float32), "up.bias": np.ones(2, "f4")})
    model = nn.Sequential([nn.Dense(2)])

    def load(dtype):
        return peft.load_base(
            tmp_path,
            model,
            abstract(model, jnp.ones((1, 3))),
            names={"layers_0": "up"},
            dtype=dtype,
        )

    with pytest.raises(ValueError, match=r"`dtype=float16`: cannot represent.*'layers_0/kernel'"):
        load("float16")
    with pytest.raises(ValueError, match=r"`dtype=int8`: .* floating-point"):
        load("int8")


def test_loaded_base_is_adapted_pruned_and_merged(tmp_path):
    tensors = hf_numpy.llama_tensors(SIZES)
    base, out = write(tmp_path / "base", tensors, shards=2), tmp_path / "merged"
    model = Llama(SIZES, stacked=True)
    variables = peft.load_base(base, model, abstract(model), names="llama")
    config = adalora.AdaLoraConfig(
        total_step=6, tfinal=2, init_r=3, target_r=1, target_modules=["q_proj", "v_proj"]
    )
    adapted = adalora.linen.adapt(model, config)
    adapters = adapted.init(jax.random.key(0), variables, IDS)
    close(adapted.apply(variables, adapters, IDS), hf_numpy.llama(tensors, SIZES, IDS))
    tx = adalora.adalora(optax.adam(1e-2), config)

    @jax.jit
    def step(adapters, state):
        loss = lambda a: jnp.square(adapted.apply(variables, a, IDS)).mean()
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state = tx.init(adapters)
    for _ in range(config.total_step):
        adapters, state = step(adapters, state)
    masks = adalora.allocator_state(state)
    ranks = adalora.ranks(masks)
    assert sum(ranks.values()) == 2 * SIZES.layers
    peft.save_pretrained(tmp_path / "adapter", adapters, config, masks=masks, names="llama")
    peft.merge_pretrained(tmp_path / "adapter", base, out)
    merged = peft.load_base(out, model, abstract(model), names="llama")
    close(model.apply(merged, IDS), adapted.apply(variables, adapters, IDS), 1e-4)


def test_missing_head_may_keep_initial_values(tmp_path):
    tensors = hf_numpy.bert_tensors(SIZES)
    write(tmp_path, tensors)
    model = Bert(SIZES, classes=3)
    variables = model.init(jax.random.key(1), IDS)
    load = lambda **options: peft.load_base(tmp_path, model, variables, names="bert", **options)
    for allowed in (True, "classifier/.*", ["classifier/kernel", "classifier/bias"]):
        loaded = load(allow_missing=allowed)
        head = loaded["params"]["classifier"]
        assert head["kernel"] is variables["params"]["classifier"]["kernel"]
    with pytest.raises(ValueError, match=r"'classifier/bias' \(looked for 'classifier.bias'\)"):
        load()
    _, pooled = hf_numpy.bert(tensors, SIZES, IDS)
    close(model.apply(loaded, IDS), pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))


def test_all_mismatches_are_reported_in_one_error(tmp_path):
    tensors = hf_numpy.llama_tensors(SIZES)
    tensors.pop("model.layers.2.self_attn.o_proj.weight")
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up] = tensors[up][:-1]
    tensors["model.layers.0.mlp.up_proj.scale"] = np.ones(1, "f4")
    tensors["model.norm.weight"] = np.ones(SIZES.width, np.int8)
    write(tmp_path, tensors)
    for stacked in (False, True):
        model = Llama(SIZES, stacked)
        with pytest.raises(ValueError, match="the checkpoint has no tensor for") as error:
            peft.load_base(tmp_path, model, abstract(model), names="llama")
        said = str(error.value)
        where = "layers/self_attn" if stacked else "layers_2/self_attn"
        looked_for = "looked for 'model.layers.2.self_attn.o_proj.weight'"
        assert f"{where}/o_proj/kernel' ({looked_for})" in said
        assert f"does not fit '{up}' [23, 16] (16 inputs, 23 outputs)" in said
        assert "'model.norm.weight', for 'norm/scale', has dtype I8" in said
        assert "'model.layers.0.mlp.up_proj.scale'" in said
        assert len(said) < 3000


def test_empty_directory_raises():
    with pytest.raises(ValueError, match="`directory=''`: is empty"):
        peft.load_base("", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_wrong_checkpoint_raises_and_heads_are_not_tied_by_guess(tmp_path):
    write(tmp_path / "bert", hf_numpy.bert_tensors(SIZES))
    model = Llama(SIZES)
    with pytest.raises(ValueError, match=r"names has no entry for it.*and 24 more; map .*names="):
        peft.load_base(tmp_path / "bert", model, abstract(model), names={"norm": "norm"})
    for config in (None, {"tie_word_embeddings": False}):
        write(tmp_path / "llama", hf_numpy.llama_tensors(SIZES, head=False), config=config)
        with pytest.raises(ValueError, match=r"looked for 'lm_head\.weight'"):
            peft.load_base(tmp_path / "llama", model, abstract(model), names="llama")
    names = [("lm_head", "model.embed_tokens"), *peft.hf_names("llama").pairs]
    variables = peft.load_base(tmp_path / "llama", model, abstract(model), names=names)
    embedding = variables["params"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(variables["params"]["lm_head"]["kernel"], embedding.T)
    with pytest.raises(TypeError, match="linen module with its variables"):
        peft.load_base(tmp_path / "llama", model, names="llama")
    with pytest.raises(FileNotFoundError, match="pickled weights are not opened"):
        peft.load_base(tmp_path, model, abstract(model))


def test_shapes_made_under_mesh_load_onto_it(tmp_path):
    write(tmp_path, {"up.weight": np.ones((4, 8), np.float32)})

    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.ones, (None, "data"))
            self.up = nnx.Linear(8, 4, use_bias=False, kernel_init=init, rngs=rngs)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        shapes = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
        loaded = peft.load_base(tmp_path, shapes)
    where = loaded.up.kernel[...].sharding
    assert where.mesh == mesh
    assert where.spec == jax.sharding.PartitionSpec(None, "data")


@pytest.mark.parametrize("what", ["meshes", "memory"])
def test_loading_on_eight_devices_and_within_memory(what, tmp_path):
    """The script ``loading_run.py`` documents its checks."""
    here = pathlib.Path(__file__).parent
    command = [sys.executable, str(here / "loading_run.py"), what, str(tmp_path)]
    done = subprocess.run(
        command, env=environment(devices=8), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_unpacked_tensors_of_gptq_checkpoint_load(tmp_path):
    """``load_gptq`` reads the packed layers; all other tensors load as from any checkpoint."""
    rng = np.random.default_rng(0)
    packed = {
        "up.qweight": rng.integers(-(2**31), 2**31, (2, 8)).astype(np.int32),
        "up.qzeros": rng.integers(-(2**31), 2**31, (1, 1)).astype(np.int32),
        "up.scales": np.full((1, 8), 0.01, np.float16),
        "up.g_idx": np.zeros(16, np.int32),
    }
    floats = hf_numpy.draw({"up.bias": (8,), "head.weight": (3, 8), "head.bias": (3,)}, 0)
    write(tmp_path, packed | floats, config={"quantization_config": {"quant_method": "gptq"}})

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Dense(8, name="up")(x))

    x = jnp.ones((2, 16))
    shapes = abstract(Model(), x)
    with pytest.raises(ValueError, match=r"(?s)'up/kernel'.*qweight.*quantization\.load_gptq"):
        peft.load_base(tmp_path, Model(), shapes)
    variables = peft.load_base(
        *(tmp_path, Model(), shapes),
        allow_missing="up/kernel",
        allow_unused=r"up\.(qweight|qzeros|scales|g_idx)",
    )
    model, variables = quantization.load_gptq(tmp_path, Model(), variables)
    kernel = variables["quantized"]["up"]["kernel"].dequantize()
    h = np.ones((2, 16)) @ np.asarray(kernel) + floats["up.bias"]
    close(model.apply(variables, x), h @ floats["head.weight"].T + floats["head.bias"])
