"""GPTQ's packed tensors, compared with the format's definition in NumPy and with GPTQModel."""

import json
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import adalora_jax as adalora
from adalora_jax import quantization
from adalora_jax._src.modules import linen_layers
from adalora_jax._src.modules.nnx_variables import pure
from adalora_jax._src.quantization import gptq

PINNED = np.load(Path(__file__).parent / "gptq_tensors" / "packed.npz")
CASES = [
    f"{bits}-{sym}-{order}"
    for bits in (4, 8)
    for sym in ("sym", "asym")
    for order in ("act", "plain")
]
CONFIG = adalora.AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules="all-linear")


def tensors(case, version="gptq"):
    """Return the four tensors of a pinned case, as in a checkpoint of this format."""
    zeros = "qzeros" if version == "gptq" else "qzeros_v2"
    named = {"qweight": "qweight", "qzeros": zeros, "scales": "scales", "g_idx": "g_idx"}
    return {name: PINNED[f"{case}/{key}"] for name, key in named.items()}


def field(words, bits, index):
    """Unpack number ``index`` of a list of words, bit by bit, as the format defines it."""
    value = 0
    for bit in range(bits):
        position = index * bits + bit
        word = int(words[position // 32]) % 2**32
        value += ((word >> (position % 32)) & 1) << bit
    return value


def by_definition(bits, qweight, qzeros, scales, g_idx):
    """Compute ``scales · (weight − zero)`` element by element, for unmodified zero points."""
    dense = np.zeros((len(g_idx), scales.shape[1]))
    for i, group in enumerate(g_idx):
        for o in range(scales.shape[1]):
            zero = field(qzeros[group], bits, o)
            dense[i, o] = float(scales[group, o]) * (field(qweight[:, o], bits, i) - zero)
    return dense


def minus_one(words, bits):
    """Convert zero points to v1: subtract one from each field of the words, with borrows."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return (
        np.array([(int(w) - ones) % 2**32 for w in words.ravel()], np.uint32)
        .view(np.int32)
        .reshape(words.shape)
    )


def made_up(bits, ins, outs, groups, seed):
    """Draw random packed tensors, with zero points at both ends of their range."""
    draw = np.random.default_rng(seed)
    words = lambda *shape: draw.integers(-(2**31), 2**31, shape).astype(np.int32)
    qzeros = words(groups, outs * bits // 32)
    qzeros[0, 0], qzeros[-1, -1] = 0, -1  # all fields 0, all fields at the maximum
    return {
        "qweight": words(ins * bits // 32, outs),
        "qzeros": qzeros,
        "scales": draw.normal(size=(groups, outs)).astype(np.float16),
        "g_idx": draw.permutation(np.arange(ins) % groups).astype(np.int32),
    }


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["act", "plain"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_elements_match_format_definition(bits, order, version):
    given = made_up(bits, ins=32, outs=8, groups=4, seed=bits)
    if order == "plain":
        given["g_idx"] = np.sort(given["g_idx"])
    want = by_definition(bits, **given)
    stored = dict(given)
    if version == "gptq":
        stored["qzeros"] = minus_one(given["qzeros"], bits)
    weight = gptq.from_tensors(**stored, checkpoint_format=version)
    assert weight.shape == (32, 8)
    assert (weight.groups is None) == (order == "plain")
    np.testing.assert_allclose(weight.dequantize(), want, rtol=1e-6)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("case", CASES)
def test_dequantized_tensors_match_gptqmodel(case, version):
    weight = gptq.from_tensors(**tensors(case, version), checkpoint_format=version)
    assert weight.bits == int(case[0])
    want = PINNED[f"{case}/dense"]  # computed in float16
    np.testing.assert_allclose(weight.dequantize(), want, rtol=2e-3, atol=1e-6)
    assert np.abs(want).max() > 0.1


def test_pinned_zero_points_borrow_from_neighbouring_fields():
    """Otherwise the tests above could not distinguish adding to a word and to its fields."""
    zeros = PINNED["4-asym-plain/qzeros_v2"].view(np.uint32).ravel()
    fields = {(int(word) >> shift) & 15 for word in zeros for shift in range(0, 32, 4)}
    assert {0, 15} <= fields


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 4), name="query")(x)
        x = nn.gelu(nn.DenseGeneral(64, axis=(-2, -1), use_bias=False, name="out")(x))
        return nn.Dense(16, name="head")(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(64, (4, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((4, 4), 64, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.head = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.out(self.query(x))))


X = jax.random.normal(jax.random.key(0), (3, 64))
LAYERS = {"model.q_proj": "4-asym-act", "model.lm_head": "4-sym-plain"}
NAMES = {"query": "model.q_proj", "head": "model.lm_head"}


@pytest.fixture
def checkpoint(tmp_path):
    """Write two shards of two layers in 4 bits, in Hugging Face's format."""
    for number, (name, case) in enumerate(LAYERS.items()):
        parts = {**tensors(case), "bias": PINNED[f"{case}/bias"]}
        file = tmp_path / f"model-0000{number + 1}-of-00002.safetensors"
        save_file({f"{name}.{key}": np.ascontiguousarray(v) for key, v in parts.items()}, file)
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def dense_params(params):
    """Return the float model's parameters with the checkpoint's dense weights, from the file."""
    params = jax.tree.map(lambda leaf: leaf, params)
    for path, name in NAMES.items():
        for key, source in (("kernel", "dense"), ("bias", "bias")):
            value = PINNED[f"{LAYERS[name]}/{source}"].astype(np.float32)
            params[path][key] = jnp.asarray(value).reshape(params[path][key].shape)
    return params


def test_linen_model_loads_checkpoint_and_has_correct_gradients(checkpoint):
    model = Model()
    variables = model.init(jax.random.key(1), X)
    loaded, packed = quantization.load_gptq(checkpoint, model, variables, names=NAMES)
    want = dense_params(variables["params"])
    chex.assert_trees_all_close(
        loaded.apply(packed, X), model.apply({"params": want}, X), atol=2e-3
    )
    adapted = adalora.linen.adapt(loaded, CONFIG)
    adapters = adapted.init(jax.random.key(2), packed, X)
    assert list(adapters) == ["head", "out", "query"]
    before = jax.tree.map(np.array, packed)

    def loss(params, adapters, x):
        return jnp.sum(adapted.apply({**packed, "params": params}, adapters, x) ** 2)

    ours = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(packed["params"], adapters, X)
    reference = adalora.linen.adapt(model, CONFIG)
    dense = {"params": linen_layers.join_quantized(packed)["params"]}
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if hasattr(leaf, "dequantize") else leaf,
        dense,
        is_leaf=lambda leaf: hasattr(leaf, "dequantize"),
    )
    theirs = jax.jit(
        jax.grad(lambda a, x: jnp.sum(reference.apply(dense, a, x) ** 2), argnums=(0, 1))
    )(adapters, X)
    chex.assert_trees_all_close(ours[1:], theirs, rtol=1e-5, atol=1e-5)
    assert all(np.any(a.lam) for a in ours[1].values())
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, packed))


def test_concrete_and_abstract_nnx_models_load_checkpoint(checkpoint):
    abstract = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    loaded = quantization.load_gptq(checkpoint, abstract, names=NAMES.get)
    assert loaded.query.kernel.shape == (64, 4, 4)
    model = NnxModel(nnx.Rngs(0))
    filled = quantization.load_gptq(checkpoint, model, names=NAMES)
    assert isinstance(filled.query, nnx.LinearGeneral)
    params = {"query": {}, "head": {}, "out": {"kernel": model.out.kernel[...]}}
    for path in NAMES:
        params[path] = {n: getattr(model, path).__dict__[n][...] for n in ("kernel", "bias")}
    variables = {"params": dense_params(params)}
    chex.assert_trees_all_close(filled(X), Model().apply(variables, X), atol=2e-3)
    adapted = adalora.nnx.adapt(filled, CONFIG)
    grads = pure(nnx.jit(nnx.grad(lambda model: jnp.sum(model(X) ** 2)))(adapted))
    assert np.any(grads["query"]["adalora"]["lam"])
    assert "kernel" not in grads["query"]


def test_default_name_is_the_path_with_dots(checkpoint):
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, name="lm_head")(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="model")(x)

    variables = Outer().init(jax.random.key(0), X)
    _, packed = quantization.load_gptq(checkpoint, Outer(), variables)
    assert packed["quantized"]["model"]["lm_head"]["kernel"].bits == 4
    np.testing.assert_array_equal(
        packed["params"]["model"]["lm_head"]["bias"],
        PINNED["4-sym-plain/bias"].astype(np.float32),
    )


def test_list_of_names_loads_a_stack_of_layers(tmp_path):
    cases = ["4-asym-act", "4-sym-plain"]
    flat = {
        f"h.{i}.mlp.{key}": np.ascontiguousarray(value)
        for i, case in enumerate(cases)
        for key, value in tensors(case, "gptq_v2").items()
    }
    save_file(flat, tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "checkpoint_format": "gptq_v2"}')

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def layer(module, x, _):
                return module(x) @ jnp.eye(16, 64), None

            scan = nn.scan(
                layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return scan(nn.Dense(16, use_bias=False, name="mlp"), x, None)[0]

    variables = Stack().init(jax.random.key(0), X)
    names = {"mlp": ["h.0.mlp", "h.1.mlp"]}
    model, packed = quantization.load_gptq(tmp_path, Stack(), variables, names=names)
    dense = np.stack([PINNED[f"{case}/dense"] for case in cases]).astype(np.float32)
    want = Stack().apply({"params": {"mlp": {"kernel": jnp.asarray(dense)}}}, X)
    chex.assert_trees_all_close(model.apply(packed, X), want, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": np.ones((3, 16), np.float16)}, "do not fit each other"),
        ({"qweight": np.ones((8, 16), np.int64)}, "must be int32, not int64"),
        ({"qzeros": np.ones((2, 1), np.int32)}, "packed in 2 bits, but only 4 and 8 can be read"),
        ({"g_idx": np.full(64, 2, np.int32)}, "must give each of 64 inputs one of 2 groups"),
        ({"checkpoint_format": "marlin"}, "`checkpoint_format='marlin'`: must be one of"),
    ],
)
def test_invalid_tensors_raise(change, message):
    with pytest.raises(ValueError, match=message):
        gptq.from_tensors(**{**tensors("4-sym-act"), **change})


def test_mismatched_checkpoint_raises(checkpoint, tmp_path_factory):
    model = Model()
    variables = model.init(jax.random.key(1), X)
    load = lambda **kwargs: quantization.load_gptq(checkpoint, model, variables, **kwargs)
    message = r"no layer .*model\.lm_head.* matches a layer of the model .*head/bias"
    with pytest.raises(ValueError, match=message):
        load()
    with pytest.raises(ValueError, match=r"'model\.v_proj' for 'query', which is not a GPTQ layer"):
        load(names={"query": "model.v_proj"})
    with pytest.raises(ValueError, match=r"'out' has a kernel of shape \(4, 4, 64\).*64 x 16"):
        load(names={"out": "model.q_proj"})
    with pytest.raises(TypeError, match="linen module with its variables"):
        quantization.load_gptq(checkpoint, model)
    with pytest.raises(ValueError, match="`directory=''`: is empty"):
        quantization.load_gptq("", model, variables)
    with pytest.raises(ValueError, match="`/nope`: is not a folder"):
        quantization.load_gptq("/nope", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="0 safetensors files and no qweight"):
        quantization.load_gptq(tmp_path_factory.mktemp("empty"), model, variables)
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ValueError, match="quant_method='awq', not 'gptq'"):
        load()
