"""The NNX front end inside usual training code."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.small_models import agree, draw, in_model, linear, nnx_config

import adalora_jax as adalora
from adalora_jax._src.modules.nnx_variables import pure
from modules.nnx_attention import Model, X, config, paths

Y = jnp.array([0, 1, 2, 2, 1, 0])


def test_adapted_model_starts_as_base_model_and_keeps_its_paths():
    model = Model(nnx.Rngs(0))
    model.eval()
    before = paths(model)
    adapted = adalora.nnx.adapt(model, config(), nnx.Rngs(1))
    chex.assert_trees_all_equal(adapted(X), model(X))
    assert isinstance(adapted, Model)
    assert isinstance(adapted.layers[0].up, nnx.Linear)
    assert isinstance(adapted.layers[0].attn.query, nnx.LinearGeneral)
    after = paths(adapted)
    assert {path: kind for path, kind in after.items() if path in before} == before
    new = {path: kind for path, kind in after.items() if path not in before}
    assert all(issubclass(kind, nnx.LoRAParam) for kind in new.values())
    assert len(new) == 3 * 6
    assert paths(model) == before, "the base model must stay as it was"


def test_two_adapted_models_have_equal_graph_definitions():
    graphs = [
        nnx.split(adalora.nnx.adapt(Model(nnx.Rngs(0)), config(), nnx.Rngs(seed)))[0]
        for seed in (1, 2)
    ]
    assert graphs[0] == graphs[1]


def test_optimizer_trains_adapters_and_saved_modules_in_one_trace():
    options = config(modules_to_save=["head"], lora_dropout=0.2)
    model = Model(nnx.Rngs(0))
    adapted = adalora.nnx.adapt(model, options, nnx.Rngs(1))
    tx = adalora.adalora(optax.adamw(1e-2), options)
    optimizer = nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)
    is_base = lambda path, leaf: type(leaf) is nnx.Param
    before = jax.tree.map(np.array, nnx.state(adapted, is_base))

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, optimizer):
        def loss(model):
            penalty = adalora.orthogonality(nnx.state(model, nnx.LoRAParam), options)
            logits = model(X)
            return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean() + penalty

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(adapted, optimizer)) for _ in range(20)]
    allocator = adalora.allocator_state(optimizer.opt_state)
    ranks = adalora.ranks(allocator)
    assert values[-1] < values[0]
    assert int(allocator.step) == 20
    found = adalora.adapters(adalora.nnx.adapters(adapted))
    assert list(ranks) == sorted(found)
    assert sum(ranks.values()) == 2 * 6
    for path, adapter in found.items():
        assert int((adapter.lam != 0).sum()) == ranks[path]
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, nnx.state(adapted, is_base)))
    assert not np.array_equal(adapted.head.kernel[...], model.head.kernel[...])


def test_functional_api_equals_nnx_optimizer():
    options = config()
    tx = adalora.adalora(optax.adamw(1e-2), options)

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

    adapted = adalora.nnx.adapt(Model(nnx.Rngs(0)), options, nnx.Rngs(1))
    adapted.eval()
    graph, trainable, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    optimizer = nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)

    @jax.jit
    def step(trainable, opt_state):
        grads = jax.grad(lambda params: loss(nnx.merge(graph, params, rest)))(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    @nnx.jit
    def nnx_step(model, optimizer):
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))

    opt_state = tx.init(trainable)
    for _ in range(12):
        trainable, opt_state = step(trainable, opt_state)
        nnx_step(adapted, optimizer)
    chex.assert_trees_all_close(pure(trainable), pure(nnx.state(adapted, nnx.LoRAParam)), atol=1e-4)
    masks = [adalora.allocator_state(s).masks for s in (opt_state, optimizer.opt_state)]
    assert adalora.rank_pattern(masks[0]) == adalora.rank_pattern(masks[1])


def test_adapter_dropout_follows_train_and_eval():
    options = config(lora_dropout=0.5, init_lora_weights=False)
    adapted = adalora.nnx.adapt(Model(nnx.Rngs(0)), options, nnx.Rngs(1))
    for module in adapted.layers:
        module.dropout.rate = 0.0
    adapted.eval()
    chex.assert_trees_all_equal(adapted(X), adapted(X))
    adapted.train()
    assert not np.allclose(adapted(X), adapted(X))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target_modules": ["querry"]}, r"'querry' matches no module.*layers/0/attn/query"),
        ({"target_modules": r".*querry"}, r"no layer is selected.*layers/0/attn/query"),
        ({"target_modules": ["attn"]}, "name the layers in it: layers/0/attn/"),
        (
            {"modules_to_save": ["haed"]},
            "'haed' matches no parameter or module; name one of the nearest: head",
        ),
    ],
)
def test_invalid_layer_selection_raises(bad, message):
    with pytest.raises(ValueError, match=message):
        adalora.nnx.adapt(Model(nnx.Rngs(0)), config(**bad))


def test_adapting_adapted_model_or_function_raises():
    adapted = adalora.nnx.adapt(Model(nnx.Rngs(0)), config())
    with pytest.raises(ValueError, match="the model is adapted already"):
        adalora.nnx.adapt(adapted, config())
    with pytest.raises(TypeError, match=r"adalora_jax\.linen\.adapt"):
        adalora.nnx.adapt(lambda x: x, config())


class Twice(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize("cls", [nnx.Linear, Twice])
@pytest.mark.parametrize("quantised", [False, True])
def test_adapted_nnx_model_can_be_pickled_and_copied(cls, quantised):
    base = in_model(linear(cls))
    if quantised:
        quantization = pytest.importorskip("adalora_jax.quantization")
        base = quantization.quantize(base, "int8")
    model, x = adalora.nnx.adapt(base, nnx_config(".*")), draw(2, 6)
    graph, state = nnx.split(model)
    copies = [
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        nnx.merge(*pickle.loads(pickle.dumps((graph, state)))),
    ]
    for other in copies:
        assert type(other.layers[0]) is type(model.layers[0])
        np.testing.assert_array_equal(other(x), model(x))


def test_adapted_nnx_model_can_be_tabulated():
    model = adalora.nnx.adapt(in_model(linear()), nnx_config(".*"))
    assert "Total Parameters: 81" in nnx.tabulate(model, draw(1, 6))


class TiedNnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.head = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
        self.head.kernel = self.first.kernel

    def __call__(self, x):
        return self.head(nnx.gelu(self.first(x)))


def test_tied_weight_must_be_adapted_in_all_of_its_layers():
    base, x = TiedNnx(nnx.Rngs(0)), draw(2, 6)
    with pytest.raises(ValueError, match="'head' shares its weight with 'first'"):
        adalora.nnx.adapt(base, nnx_config(["head"]))
    model = adalora.nnx.adapt(base, nnx_config(["head", "first"]))
    agree(adalora.merge(model)(x), model(x))


def test_invalid_random_numbers_raise():
    base, dropout = in_model(linear()), nnx_config(["layers.0"]).replace(lora_dropout=0.1)
    for rngs in (None, {}, nnx.Rngs(), nnx.Rngs(dropout=0)):
        with pytest.raises(ValueError, match="`rngs`: has no stream 'params'"):
            adalora.nnx.adapt(base, dropout, rngs)
    with pytest.raises(ValueError, match="`rngs`: has no stream 'dropout'"):
        adalora.nnx.adapt(base, dropout, nnx.Rngs(params=0))
    with pytest.raises(TypeError, match=r"`rngs=str`: is not an nnx.Rngs"):
        adalora.nnx.adapt(base, dropout, "x")
    assert nnx.eval_shape(lambda: adalora.nnx.adapt(base, dropout, nnx.Rngs(params=0, dropout=1)))
