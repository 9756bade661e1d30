"""Quantised base models: agreement with Qwix, training, and merging."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx, traverse_util

import adalora_jax as adalora
from adalora_jax._src.quantization import packed
from adalora_jax._src.quantization import quantize as quantization
from quantization.models import WIDTH, Model, NnxModel, X, config, linen, task

pytestmark = [
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),  # by Qwix
]
RECIPES = ("int8", "int4", "nf4")
ONE_SHORT = [pytest.param(r, marks=() if r == "nf4" else pytest.mark.slow) for r in RECIPES]


def integers(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.integer)]


# Agreement with Qwix --------------------------------------------------------------------------


class Kinds(nn.Module):
    """The layers that Qwix quantises."""

    @nn.compact
    def __call__(self, x, image):
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x)
        x = nn.DenseGeneral((4, 32), name="general")(x)
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="back")(x)
        x = nn.Einsum((WIDTH, 4, 32), "btd,dnh->btnh", name="einsum")(x)
        image = nn.Conv(8, (3, 3), name="conv")(image)
        return nn.Dense(128, name="dense")(x), image


QWIXS = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"}
# With several contracted axes Qwix splits the last and shares scales over the others, unlike us;
# without blocks there is no difference.
SEVERAL = ["out", "back"]


def both_ways(module, variables, qtype, *inputs):
    """Quantise the same model with Qwix itself and with us: ``((module, variables), ...)``."""
    block = None if qtype == "int8" else 32
    whole = {"weight_qtype": QWIXS[qtype]}
    rules = [
        # Qwix quantises a convolution's weight only if the input is quantised, too.
        qwix.QuantizationRule(module_path="conv", **whole, act_qtype=QWIXS[qtype]),
        qwix.QuantizationRule(module_path=f".*({'|'.join(SEVERAL)})", **whole),
        qwix.QuantizationRule(**whole, tile_size=block),
    ]
    theirs = qwix.quantize_model(module, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(theirs.init, jax.random.key(0), *inputs)
    params = qwix.quantize_params(variables["params"], abstract["params"])
    others = r".*(out|back|conv)"
    for recipe in (
        quantization.Recipe(qtype=qtype, block=block, exclude_modules=others),
        quantization.Recipe(qtype=qtype, block=None, target_modules=others),
    ):
        module, variables = quantization.quantize(module, recipe, variables, *inputs)
    return (theirs, {"params": params}), (module, variables)


@pytest.mark.parametrize("qtype", ONE_SHORT)
def test_integers_and_scales_match_qwix(qtype):
    image = jnp.ones((2, 8, 8, 4))
    variables = Kinds().init(jax.random.key(0), X, image)
    (_, theirs), (_, ours) = both_ways(Kinds(), variables, qtype, X, image)
    theirs = traverse_util.flatten_dict(theirs["params"], sep="/")
    ours = traverse_util.flatten_dict(ours["quantized"], sep="/")
    assert set(ours) == {path for path, leaf in theirs.items() if hasattr(leaf, "how")}
    assert {path.split("/")[0] for path in ours} == set(variables["params"])
    for path, weight in ours.items():
        want = theirs[path].array
        as_int = lambda values: np.asarray(values.astype(jnp.int32))
        np.testing.assert_array_equal(as_int(weight.array.qvalue), as_int(want.qvalue), path)
        np.testing.assert_array_equal(weight.scale, want.scale, path)
        np.testing.assert_allclose(weight.dequantize(), qwix.dequantize(want), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("qtype", RECIPES)
def test_outputs_match_qwix(qtype):
    """Qwix multiplies before scaling where it can, so these differ by rounding."""
    (theirs, params), (ours, variables) = both_ways(Model(), linen()[2], qtype, X)
    np.testing.assert_allclose(
        ours.apply(variables, X), theirs.apply(params, X), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("shape", "layer", "scales"),
    [
        ((256, 8), ("dense", (), (0,), (1,)), (4, 8)),
        ((96, 8), ("dense", (), (0,), (1,)), (2, 8)),  # 48 divides, 64 does not
        ((3, 256, 8), ("dense", (), (0,), (1,)), (3, 4, 8)),  # stacked
        ((4, 16, 8), ("general", (), (0, 1), (2,)), (1, 1, 8)),  # 4 x 16 form one block
        ((8, 16, 8), ("general", (), (0, 1), (2,)), (2, 1, 8)),  # two blocks
        ((4, 128, 8), ("general", (), (0, 1), (2,)), (4, 2, 8)),
        ((3, 3, 4, 8), ("conv", (), (0, 1, 2), (3,)), (1, 1, 1, 8)),
        ((3, 3, 32, 8), ("conv", (), (0, 1, 2), (3,)), (3, 3, 1, 8)),
    ],
)
def test_block_of_64_spans_the_last_inputs(shape, layer, scales):
    kind, *axes = layer
    stack, ins, outs = axes
    layer = adalora.Layout("kernel", ins, outs, stack, kind)
    weight = jax.random.normal(jax.random.key(0), shape)
    found = quantization.quantize_weight(weight, "nf4", layer)
    assert found.scale.shape == scales
    assert found.qvalue.size == weight.size / 2
    assert np.abs(found.dequantize() - weight).max() < 0.2 * np.abs(weight).max()


def test_odd_axis_is_packed_along_another_or_not_packed():
    layer = adalora.Layout()
    for shape, size in (((5, 4), 10), ((5, 3), 15)):
        weight = jax.random.normal(jax.random.key(0), shape)
        found = quantization.quantize_weight(weight, "int4", layer)
        assert found.qvalue.size == size
        assert found.shape == shape
        np.testing.assert_allclose(found.dequantize(), weight, atol=0.2)


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ONE_SHORT)
def test_linen_adapters_train_and_base_is_bitwise_unchanged(recipe):
    chex.clear_trace_counter()
    model, variables, _ = linen(recipe)
    options = config(modules_to_save=["head"], lora_dropout=0.2)
    adapted = adalora.linen.adapt(model, options)
    trainable = adapted.init(jax.random.key(2), variables, X)
    assert set(trainable["head"]) == {"kernel", "bias"}
    tx = adalora.adalora(optax.adamw(1e-2), options)
    before = jax.tree.map(np.array, variables)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(variables, trainable, opt, key):
        def loss(trainable):
            logits = adapted.apply(variables, trainable, X, rngs={"dropout": key})
            return task(logits) + adalora.orthogonality(trainable, options)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, opt = tx.update(grads, opt, trainable)
        return optax.apply_updates(trainable, updates), opt, value

    opt, values = tx.init(trainable), []
    for i in range(20):
        trainable, opt, value = step(variables, trainable, opt, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < values[0]
    assert sum(adalora.ranks(adalora.allocator_state(opt)).values()) == 2 * 6
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))
    # The saved part of such a run contains no integers of the base and nothing of its size.
    assert integers(variables)
    saved = jax.tree.leaves((trainable, opt))
    assert {leaf.dtype for leaf in integers(saved)} <= {np.dtype(np.int32)}  # counts
    assert all(leaf.size < WIDTH * WIDTH for leaf in saved)


def test_nnx_adapters_train_and_base_is_bitwise_unchanged():
    options = config()
    quantised = quantization.quantize(NnxModel(nnx.Rngs(0)), "nf4", X)
    adapted = adalora.nnx.adapt(quantised, options, nnx.Rngs(1))
    tx = adalora.adalora(optax.adamw(1e-2), options)
    optimizer = nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)
    is_base = lambda path, leaf: not isinstance(leaf, nnx.LoRAParam)
    before = jax.tree.map(np.array, nnx.state(adapted, is_base))

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, optimizer):
        loss = lambda model: task(model(X))
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(adapted, optimizer)) for _ in range(20)]
    assert values[-1] < values[0]
    assert sum(adalora.ranks(adalora.allocator_state(optimizer.opt_state)).values()) == 2 * 6
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, nnx.state(adapted, is_base)))
    assert integers(before)
    assert not integers(nnx.state(adapted, nnx.LoRAParam))
    assert isinstance(adapted.layers[0].up, nnx.Linear)


def test_abstract_variables_can_be_quantised_and_adapted():
    abstract = jax.eval_shape(Model().init, jax.random.key(0), X)
    variables = jax.eval_shape(lambda v: quantization.quantize(Model(), "nf4", v, X)[1], abstract)
    model, concrete, floats = linen("nf4")
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, concrete)
    options = config(target_modules="all-linear", modules_to_save=["head"])
    table = adalora.linen.describe(model, options, variables, X)
    assert table == adalora.linen.describe(Model(), options, floats, X)
    adapters = jax.eval_shape(
        adalora.linen.adapt(model, options).init, jax.random.key(0), variables, X
    )
    assert adapters["head"]["kernel"].dtype == jnp.float32


def test_bfloat16_base_stays_bfloat16():
    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), linen()[2])
    model, variables = quantization.quantize(Model(), "int8", floats, X)
    assert variables["quantized"]["head"]["kernel"].scale.dtype == jnp.bfloat16
    assert model.apply(variables, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    recipe = quantization.Recipe(qtype="int8", dtype="bfloat16")
    cast = quantization.quantize(Model(), recipe, linen()[2], X)[1]
    chex.assert_trees_all_equal(cast, variables)
    plain = quantization.quantize(NnxModel(nnx.Rngs(0)), recipe, X)
    assert plain.head.bias.dtype == plain.head.kernel.dtype == jnp.bfloat16


# Merging --------------------------------------------------------------------------------------


def trained(adapters):
    """Set λ so that increments are as large as after training."""
    lam = lambda a: jnp.linspace(0.5, 1.0, a.lam.size).reshape(a.lam.shape)
    return adapters | {p: a._replace(lam=lam(a)) for p, a in adalora.adapters(adapters).items()}


@pytest.mark.parametrize("recipe", ONE_SHORT)
def test_merging_to_float_dtype_preserves_adapted_function(recipe):
    model, variables, floats = linen(recipe)
    adapted = adalora.linen.adapt(model, config())
    adapters = trained(adapted.init(jax.random.key(2), variables, X))
    merged, errors = quantization.merge(variables, adapters, to="float32")
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, floats)
    want = adapted.apply(variables, adapters, X)
    np.testing.assert_allclose(Model().apply(merged, X), want, rtol=1e-4, atol=1e-4)
    assert set(errors) == set(adapters)
    assert max(error.weight for error in errors.values()) == 0
    lower, errors = quantization.merge(variables, adapters, to="bfloat16")
    assert lower["params"]["layers_0"]["down"]["kernel"].dtype == jnp.bfloat16
    assert all(1e-4 < error.weight < 2**-8 for error in errors.values())


@pytest.mark.parametrize("to", ["requantize", "int8"])
def test_merging_to_integers_reports_errors(to):
    model, variables, _ = linen("nf4")
    adapted = adalora.linen.adapt(model, config())
    adapters = trained(adapted.init(jax.random.key(2), variables, X))
    merged, errors = quantization.merge(variables, adapters, to=to)
    path = "layers_0/up"
    weight = merged["quantized"]["layers_0"]["up"]["kernel"]
    assert weight.qtype == ("nf4" if to == "requantize" else "int8")
    old = np.asarray(variables["quantized"]["layers_0"]["up"]["kernel"].dequantize())
    delta = np.asarray(adalora.delta_weight(adapters[path]))
    lost = np.linalg.norm(weight.dequantize() - (old + delta))
    np.testing.assert_allclose(errors[path].weight, lost / np.linalg.norm(old + delta), rtol=1e-3)
    np.testing.assert_allclose(errors[path].increment, lost / np.linalg.norm(delta), rtol=1e-3)
    assert errors[path].weight > 1e-3
    want, base = adapted.apply(variables, adapters, X), model.apply(variables, X)
    found = model.apply(merged, X)
    if to == "int8":
        assert np.abs(found - want).max() < 0.5 * np.abs(base - want).max()
    same = lambda tree: tree["quantized"]["layers_0"]["down"]
    chex.assert_trees_all_equal(same(merged), same(variables))


def test_nnx_model_merges_to_float_or_integers():
    base = quantization.quantize(NnxModel(nnx.Rngs(0)), "int4", X)
    adapted = adalora.nnx.adapt(base, config(modules_to_save=["head"]))
    adalora.nnx.set_adapters(adapted, trained(adalora.nnx.adapters(adapted)))
    want = adapted(X)
    merged, errors = quantization.merge(adapted, to="float32")
    assert type(merged.layers[0].up) is nnx.Linear
    assert type(merged.layers[0].attn.query) is nnx.LinearGeneral
    assert type(merged.layers[0].up.kernel) is nnx.Param
    np.testing.assert_allclose(merged(X), want, rtol=1e-4, atol=1e-4)
    assert list(errors) == sorted(adalora.adapters(adalora.nnx.adapters(adapted)))
    again, errors = quantization.merge(adapted)
    assert again.layers[0].up.kernel.get_raw_value().qtype == "int4"
    assert type(again.layers[0].up) is type(base.layers[0].up)
    assert all(error.weight > 1e-3 for error in errors.values())
    np.testing.assert_array_equal(adapted(X), want)


def test_unquantised_layers_merge_as_on_float_base():
    recipe = quantization.Recipe(qtype="int8", exclude_modules=["up"])
    variables = linen()[2]
    model, mixed = quantization.quantize(Model(), recipe, variables, X)
    assert "kernel" in mixed["params"]["layers_0"]["up"]
    adapted = adalora.linen.adapt(model, config(modules_to_save=["head"]))
    adapters = adapted.init(jax.random.key(2), mixed, X)
    adapters |= trained({path: adapters[path] for path in adapters if path != "head"})
    merged, errors = quantization.merge(mixed, adapters, to="float32")
    assert not any("up" in path for path in errors)
    want = adapted.apply(mixed, adapters, X)
    np.testing.assert_allclose(Model().apply(merged, X), want, rtol=1e-4, atol=1e-4)


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qtype": "int3"}, "`qtype='int3'`: must be one of"),
        ({"block": -1}, "`block=-1`: must be a positive integer"),
        ({"block": True}, "`block=True`: must be a positive integer"),
        ({"dtype": "foo"}, "`dtype='foo'`: must be a floating-point dtype"),
        ({"dtype": "int8"}, "`dtype='int8'`: must be a floating-point dtype"),
        ({"target_modules": ["querry"]}, "'querry' matches no module"),
    ],
)
def test_invalid_recipe_raises(change, message):
    with pytest.raises(ValueError, match=message):
        quantization.quantize(
            Model(), quantization.Recipe(**{"qtype": "nf4", **change}), linen()[2], X
        )


def test_quantising_twice_and_invalid_arguments_raise():
    model, variables, floats = linen()
    with pytest.raises(ValueError, match="is quantised already"):
        quantization.quantize(model, "int8", variables, X)
    base = quantization.quantize(NnxModel(nnx.Rngs(0)), "int8", X)
    with pytest.raises(ValueError, match="is quantised already"):
        quantization.quantize(base, "int8", X)
    with pytest.raises(TypeError, match="pass the model's variables"):
        quantization.quantize(Model(), "int8", X)
    with pytest.raises(TypeError, match="`variables`: are missing"):
        quantization.quantize(Model(), "int8")
    weight = variables["quantized"]["layers_0"]["up"]["kernel"]
    with pytest.raises(ValueError, match=r"`weights\['head/kernel'\]`: has shape \(64, 128\)"):
        packed.pack_linen(Model(), floats, {"head/kernel": weight})
