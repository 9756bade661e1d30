"""Adapters on NNX models that Qwix itself quantised."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

import adalora_jax as adalora
from adalora_jax import quantization, qwix_models
from adalora_jax._src.modules import nnx_variables
from adalora_jax._src.modules.nnx_variables import pure

pytestmark = [
    # Raised by Qwix.
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*iter_modules:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:'\.value' access:DeprecationWarning"),
]
X = jax.random.normal(jax.random.key(0), (4, 6, 16))
CONFIG = adalora.AdaLoraConfig(
    total_step=6, tfinal=2, init_r=4, target_r=2, lora_alpha=8, target_modules="all-linear"
)


class Einsum(nnx.Module):
    def __init__(self, einsum_str, shape, rngs):
        self.einsum_str = einsum_str
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) / 4)

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Block(nnx.Module):
    def __init__(self, rngs):
        # As many inputs as the rank, so that shapes do not distinguish q from a weight.
        self.q = Einsum("BTD,DNH->BTNH", (16, 4, 4), rngs)
        self.o = Einsum("BTNH,NHD->BTD", (4, 4, 16), rngs)
        self.up = nnx.Linear(16, 4, rngs=rngs)
        self.down = nnx.Linear(4, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.o(jnp.tanh(self.q(x)))
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=1))


def by_qwix(model, path=".*layers.*", qtype="nf4", **rule):
    rule = qwix.QuantizationRule(
        **{"module_path": path, "weight_qtype": qtype, "tile_size": 4, **rule}
    )
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), X)


def trained(model, seed=1):
    """Add noise to all adapters in place, so that λ and all else leave their initial values."""
    rng = np.random.default_rng(seed)
    noise = lambda leaf: (leaf + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
    adalora.nnx.set_adapters(model, jax.tree.map(noise, adalora.nnx.adapters(model)))
    return model


def in_floats(model):
    """Return the model with Qwix's weights dequantised."""
    model = nnx.clone(model)
    plain = Model(nnx.Rngs(0))
    for path, module in nnx_variables.modules(model):
        for name, value in vars(module).items():
            own = dict(nnx_variables.modules(plain))[path]
            if nnx_variables.is_qwix_weight(value):
                array = jax.tree.map(lambda leaf: jnp.asarray(leaf), pure(value.array))
                getattr(own, name)[...] = qwix.dequantize(array)
            elif isinstance(value, nnx.Param):
                getattr(own, name)[...] = value[...]
    return plain


@pytest.mark.parametrize("path", [".*layers.*", ".*", "layers/0/up"])
@pytest.mark.parametrize("qtype", ["nf4", "int8"])
def test_adapted_qwix_model_starts_as_base_and_adds_increment(path, qtype):
    base = by_qwix(Model(nnx.Rngs(0)), path, qtype)
    adapted = adalora.nnx.adapt(base, CONFIG, nnx.Rngs(1))
    assert len(adalora.nnx.adapters(adapted)) == 9
    chex.assert_trees_all_equal(adapted(X), base(X))
    before = jax.tree.map(jnp.copy, adalora.nnx.adapters(trained(adapted)))
    reference = adalora.nnx.with_adapters(
        adalora.nnx.adapt(in_floats(base), CONFIG), adalora.nnx.adapters(adapted)
    )
    np.testing.assert_allclose(adapted(X), reference(X), rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(adalora.nnx.adapters(adapted), before)

    loss = lambda model: (model(X) ** 2).mean()
    grads = lambda model: nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, pure(grads(adapted)), pure(grads(reference)))


def test_order_of_quantising_and_adapting_does_not_matter():
    last = adalora.nnx.adapt(by_qwix(Model(nnx.Rngs(0)), ".*"), CONFIG, nnx.Rngs(1))
    first = by_qwix(adalora.nnx.adapt(Model(nnx.Rngs(0)), CONFIG, nnx.Rngs(1)), ".*")
    chex.assert_trees_all_equal(adalora.nnx.adapters(first), adalora.nnx.adapters(last))
    chex.assert_trees_all_equal(trained(first)(X), trained(last)(X))


def test_quantised_activations_affect_only_the_base():
    base = by_qwix(Model(nnx.Rngs(0)), "head", "int8", act_qtype="int8", tile_size=None)
    plain = adalora.nnx.adapt(Model(nnx.Rngs(0)), CONFIG.replace(target_modules=["head"]))
    adapted = adalora.nnx.adapt(base, CONFIG.replace(target_modules=["head"]))
    chex.assert_trees_all_equal(adapted(X), base(X))
    term = trained(plain)(X) - Model(nnx.Rngs(0))(X)
    np.testing.assert_allclose(trained(adapted)(X) - base(X), term, rtol=1e-4, atol=1e-5)


def test_model_of_single_layer_is_adapted_and_merged():
    linear = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    adapted = adalora.nnx.adapt(by_qwix(linear, ".*"), CONFIG, nnx.Rngs(1))
    chex.assert_trees_all_equal(adapted(X), by_qwix(linear, ".*")(X))
    assert isinstance(adapted, nnx.Linear)
    want = trained(adapted)(X)
    assert np.abs(want - linear(X)).max() > 0.1
    merged, _ = quantization.merge(adapted, to="float32")
    assert type(merged) is nnx.Linear
    np.testing.assert_allclose(merged(X), want, rtol=1e-4, atol=1e-4)


def test_adapters_train_and_base_is_bitwise_unchanged():
    adapted = adalora.nnx.adapt(by_qwix(Model(nnx.Rngs(0))), CONFIG, nnx.Rngs(1))
    tx = adalora.adalora(optax.adamw(1e-2), CONFIG)
    optimizer = nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)
    is_base = lambda path, leaf: not isinstance(leaf, nnx.LoRAParam)
    before = jax.tree.map(np.array, nnx.state(adapted, is_base))

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, optimizer):
        loss = lambda model: ((model(X) - 1) ** 2).mean()
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(adapted, optimizer)) for _ in range(CONFIG.total_step)]
    assert values[-1] < values[0]
    assert sum(adalora.ranks(adalora.allocator_state(optimizer.opt_state)).values()) == 2 * 9
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, nnx.state(adapted, is_base)))


def test_merging_returns_float_or_qwix_model():
    config = CONFIG.replace(target_modules=".*(q|up|head)")
    base = by_qwix(Model(nnx.Rngs(0)))
    adapted = trained(adalora.nnx.adapt(base, config))
    want = adapted(X)
    merged, errors = quantization.merge(adapted, to="float32")
    np.testing.assert_allclose(merged(X), want, rtol=1e-4, atol=1e-4)
    assert type(merged) is Model
    parts = lambda model: {p: {*vars(m)} for p, m in nnx_variables.modules(model)}
    assert parts(merged) == parts(Model(nnx.Rngs(0)))
    assert set(errors) == {f"layers/{i}/{name}" for i in (0, 1) for name in ("q", "up")}
    again, errors = quantization.merge(adapted)
    assert type(again) is type(base)
    assert (
        again.layers[0].up.kernel.array.qvalue.dtype == base.layers[0].up.kernel.array.qvalue.dtype
    )
    assert all(0 < error.weight < 0.2 for error in errors.values())
    same = lambda model: pure(model.layers[1].down.kernel.array)
    chex.assert_trees_all_equal(same(again), same(base))
    assert np.abs(again(X) - want).max() < 0.5 * np.abs(base(X) - want).max()
    np.testing.assert_array_equal(adapted(X), want)


class Grouped(nnx.Module):
    """Keys and values in one weight, as in Gemma, and a layer with several axes in and out."""

    def __init__(self, rngs):
        self.q = Einsum("BTD,NDH->BTNH", (4, 16, 4), rngs)
        self.kv = Einsum("BSD,CKDH->CBSKH", (2, 4, 16, 4), rngs)
        self.o = nnx.LinearGeneral((4, 4), (2, 8), axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        k, v = self.kv(x)
        return self.o(self.q(x) * k + v)


@pytest.mark.parametrize("make", [Model, Grouped])
def test_as_lora_matches_qwix_lora(make):
    config = CONFIG.replace(rank_overrides=[("q", adalora.RankSpec(init_r=3))])
    adapted = trained(adalora.nnx.adapt(make(nnx.Rngs(0)), config))
    adapters = adalora.nnx.adapters(adapted)
    masks = {path: jnp.arange(a.lam.shape[-1]) % 2 == 0 for path, a in adapters.items()}
    masks = {p: jnp.broadcast_to(mask, adapters[p].lam.shape) for p, mask in masks.items()}
    small = adalora.nnx.with_adapters(adapted, adalora.compact(adapters, masks))
    lora = qwix_models.as_lora(small)
    assert type(lora) is make
    chex.assert_trees_all_equal(lora(X), make(nnx.Rngs(0))(X))
    ranks = {
        path: value.shape[0]
        for path, module in nnx_variables.modules(lora)
        for name, value in vars(module).items()
        if str(name).endswith("_lora_b")
    }
    assert set(ranks) == set(adapters)
    rules = [qwix.LoraRule(module_path=path, rank=r, alpha=r) for path, r in ranks.items()]
    by = qwix.apply_lora_to_model(lora, qwix.LoraProvider(rules), X, rngs=nnx.Rngs(0))
    want = small(X)
    assert np.abs(want - lora(X)).max() > 0.1
    np.testing.assert_allclose(by(X), want, rtol=1e-4, atol=1e-4)


def test_layers_without_qwix_lora_raise():
    experts = nnx.Sequential(nnx.Einsum("ecd,edf->ecf", (4, 16, 5), rngs=nnx.Rngs(0)))
    embed = nnx.Sequential(nnx.Embed(7, 5, rngs=nnx.Rngs(0)))
    for model in (experts, embed):
        adapted = adalora.nnx.adapt(model, CONFIG.replace(target_modules=".*"))
        with pytest.raises(ValueError, match=r"has no equivalent LoRA in Qwix.*merge them"):
            qwix_models.as_lora(adapted)


def test_unsupported_operations_raise():
    base = by_qwix(Model(nnx.Rngs(0)))
    adapted = adalora.nnx.adapt(base, CONFIG)
    with pytest.raises(ValueError, match=r"is quantised and cannot.*quantization\.merge"):
        adalora.merge(adapted)
    with pytest.raises(ValueError, match=r"`to='int4'`: Qwix quantised this model"):
        quantization.merge(adapted, to="int4")
    with pytest.raises(ValueError, match=r"is quantised already"):
        quantization.quantize(base, "int8")
    with pytest.raises(ValueError, match=r"modules_to_save`: 'layers/0/up/kernel.*cannot train"):
        adalora.nnx.adapt(base, CONFIG.replace(modules_to_save=["layers.0.up"]))
