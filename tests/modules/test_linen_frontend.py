"""The linen front end inside usual training code."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from support.small_models import KEY, adapted_of, draw

import adalora_jax as adalora
from adalora_jax._src.core import evaluation


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(h)
        x = x + nn.Dropout(0.5, deterministic=not train)(h)
        h = nn.gelu(nn.Dense(24, name="up")(x))
        self.sow("intermediates", "hidden", h)
        return x + nn.Dense(8, name="down")(h)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = Block(name=f"layers_{i}")(x, train)
        return nn.Dense(3, name="head")(x.mean(axis=1))


@pytest.fixture(scope="module")
def model():
    module, x = Model(), jax.random.normal(jax.random.key(0), (6, 4, 8))
    return module, module.init(jax.random.key(1), x), x, jnp.array([0, 1, 2, 2, 1, 0])


def config(**changes):
    options = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 6, "lora_alpha": 16}
    return adalora.AdaLoraConfig(
        **{"total_step": 20, "target_modules": ["query", "value", "up"], **options, **changes}
    )


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_adapted_model_starts_as_base_model(model):
    module, variables, x, _ = model
    for init in ("gaussian", "lambda_one"):
        adapted = adalora.linen.adapt(module, config(init=init))
        adapters = adapted.init(jax.random.key(2), variables, x)
        chex.assert_trees_all_equal(
            adapted.apply(variables, adapters, x), module.apply(variables, x)
        )


def test_train_state_trains_adapters_and_saved_modules_in_one_trace(model):
    module, variables, x, y = model
    options = config(modules_to_save=["head"], lora_dropout=0.2)
    adapted = adalora.linen.adapt(module, options)
    trainable = adapted.init(jax.random.key(2), variables, x)
    assert set(trainable["head"]) == {"kernel", "bias"}
    before = jax.tree.map(np.array, variables)
    tx = adalora.adalora(optax.adamw(1e-2), options)
    state = TrainState.create(apply_fn=adapted.apply, params=trainable, tx=tx)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state, stats, key):
        def loss(params):
            logits, mutated = state.apply_fn(
                {**variables, **stats},
                params,
                x,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats", "intermediates"],
            )
            penalty = adalora.orthogonality(params, options)
            return cross_entropy(logits, y) + penalty, mutated

        (value, mutated), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        stats = {"batch_stats": mutated["batch_stats"]}
        return state.apply_gradients(grads=grads), stats, value

    stats = {"batch_stats": variables["batch_stats"]}
    values, structure = [], jax.tree.structure(state)
    for i in range(20):
        state, stats, value = step(state, stats, jax.random.key(i))
        values.append(float(value))
        assert jax.tree.structure(state) == structure
    allocator = adalora.allocator_state(state.opt_state)
    assert values[-1] < values[0]
    assert sum(adalora.ranks(allocator).values()) == 2 * 6
    for path, adapter in adalora.adapters(state.params).items():
        mask = np.asarray(allocator.masks[path])
        assert (np.asarray(adapter.lam)[~mask] == 0).all()
        assert (np.asarray(adapter.lam)[mask] != 0).all()
    assert not np.array_equal(state.params["head"]["kernel"], variables["params"]["head"]["kernel"])
    assert not np.array_equal(
        stats["batch_stats"]["layers_0"]["norm"]["mean"],
        variables["batch_stats"]["layers_0"]["norm"]["mean"],
    )
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))


def test_mutable_collections_do_not_contain_adapters(model):
    module, variables, x, _ = model
    adapted = adalora.linen.adapt(module, config())
    adapters = adapted.init(jax.random.key(2), variables, x)
    expected, changed = module.apply(variables, x, mutable=True)
    output, mutated = adapted.apply(variables, adapters, x, mutable=True)
    chex.assert_trees_all_equal(output, expected)
    chex.assert_trees_all_equal(mutated, changed)


def test_adapter_dropout_follows_flag_and_keeps_model_rng_unchanged(model):
    module, variables, x, _ = model
    adapted = adalora.linen.adapt(module, config(lora_dropout=0.5, init_lora_weights=False))
    adapters = adapted.init(jax.random.key(2), variables, x)

    def run(train, seed):
        return adapted.apply(
            variables,
            adapters,
            x,
            train,
            rngs={"dropout": jax.random.key(seed)},
            mutable=["batch_stats"],
        )[0]

    chex.assert_trees_all_equal(run(False, 0), run(False, 1))
    assert not np.allclose(run(True, 0), run(True, 1))
    # With a zero increment the adapters' dropout must not shift the model's random numbers.
    zero = evaluation.apply_masks(adapters, {p: jnp.zeros(4, bool) for p in adapters})
    key = {"dropout": jax.random.key(0)}
    ours = adapted.apply(variables, zero, x, True, rngs=key, mutable=["batch_stats"])[0]
    base = module.apply(variables, x, True, rngs=key, mutable=["batch_stats"])[0]
    chex.assert_trees_all_equal(ours, base)


def test_init_under_eval_shape_allocates_nothing(model):
    module, _, x, _ = model
    adapted = adalora.linen.adapt(module, config(modules_to_save=["head"]))
    abstract = jax.eval_shape(module.init, jax.random.key(1), x)
    shapes = jax.eval_shape(adapted.init, jax.random.key(2), abstract, x)
    assert shapes["layers_0/up"].p.shape == (4, 24)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target_modules": ["querry"]}, r"'querry' matches no module.*layers_0/attn/query"),
        ({"target_modules": r".*querry"}, r"no layer is selected.*layers_0/attn/query"),
        ({"target_modules": None}, "`target_modules=None`: no layer is selected; pass"),
        ({"target_modules": r".*/norm"}, r"BatchNorm, which cannot be adapted.*layers_\d/"),
        ({"target_modules": ["attn"]}, "name the layers in it: layers_0/attn/query"),
        (
            {"modules_to_save": ["haed"]},
            "'haed' matches no parameter or module; name one of the nearest: head",
        ),
        ({"exclude_modules": r".*"}, "exclude_modules='.*'`: no layer is selected"),
        ({"layers_to_transform": [7]}, r"layers_to_transform=\(7,\)`: no layer is selected"),
    ],
)
def test_invalid_layer_selection_raises(model, bad, message):
    module, variables, x, _ = model
    adapted = adalora.linen.adapt(module, config(**bad))
    with pytest.raises(ValueError, match=message):
        adapted.init(jax.random.key(2), variables, x)


def test_adapters_of_another_model_raise(model):
    module, variables, x, _ = model
    adapted = adalora.linen.adapt(module, config())
    adapters = adapted.init(jax.random.key(2), variables, x)
    with pytest.raises(ValueError, match=r"adapters\['encoder/up'\]`: is not a layer of Model"):
        adapted.apply(variables, {"encoder/up": adapters["layers_0/up"]}, x)
    with pytest.raises(ValueError, match=r"'layers_0/up'\]`: the adapter is for .* 8 x 8.*8 x 24"):
        adapted.apply(variables, {"layers_0/up": adapters["layers_0/attn/query"]}, x)
    with pytest.raises(TypeError, match=r"adalora_jax\.nnx\.adapt"):
        adalora.linen.adapt(lambda x: x, config())


def test_rank_pattern_sets_initial_ranks(model):
    module, variables, x, _ = model
    pattern = {"layers_0/up": [True, False, True, True], "layers_1/attn/query": 1}
    adapted = adalora.linen.adapt(module, config(rank_pattern=pattern))
    adapters = adapted.init(jax.random.key(2), variables, x)
    ranks = {path: adapter.lam.shape[-1] for path, adapter in adapters.items()}
    assert ranks["layers_0/up"] == 3
    assert ranks["layers_1/attn/query"] == 1
    assert ranks["layers_1/up"] == 4


def test_dropout_in_scan_without_split_rngs_warns():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, name="up")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return scan(name="blocks")(x, None)[0]

    with pytest.warns(
        UserWarning, match=r"^`lora_dropout=0.5`: does not apply to blocks/up, .*split_rngs"
    ):
        adapted_of(Model(), draw(2, 4), lora_dropout=0.5)


@pytest.mark.parametrize("call", ["init", "apply", "merge"])
def test_params_in_place_of_variables_raise(call):
    adapted, variables, adapters = adapted_of(nn.Dense(5), x := draw(2, 4))
    calls = {
        "init": lambda v: adapted.init(KEY, v, x),
        "apply": lambda v: adapted.apply(v, adapters, x),
        "merge": lambda v: adalora.merge(v, adapters),
    }
    with pytest.raises(ValueError, match="there is no 'params'"):
        calls[call](variables["params"])
    if call == "apply":
        with pytest.raises(ValueError, match="there is no 'params'"):
            adapted.apply(adapters, variables, x)


@pytest.mark.parametrize("key", [0, None, {"params": KEY}, jnp.ones(2)])
def test_init_with_what_is_no_key_raises(key):
    adapted = adalora.linen.adapt(nn.Dense(3), config(target_modules=".*"))
    variables = {"params": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    with pytest.raises(TypeError, match=r"`key=\w+`: is not a PRNG key; pass jax.random.key"):
        adapted.init(key, variables, draw(2, 4))
    legacy = jax.eval_shape(lambda k: adapted.init(k, variables, draw(2, 4)), jax.random.PRNGKey(0))
    assert legacy[""].p.shape == (4, 3)


def test_errors_about_variables_name_the_arguments_of_the_call():
    choose = config(target_modules=lambda path, module: True)
    adapted, x = adalora.linen.adapt(nn.Dense(3), choose), draw(2, 4)
    calls = {
        r"returns them\. The arguments are init\(key, variables": lambda v: adapted.init(KEY, v, x),
        r"returns them\. The arguments are apply\(variables, ": lambda v: adapted.apply(v, {}, x),
        r"returns them\.$": lambda v: adapted.describe(v, x),
        r"returns them\.\Z": lambda v: adalora.linen.resolve(nn.Dense(3), choose, v, x),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message):
            call(x)
        with pytest.raises(ValueError, match="there is no 'params', but nothing"):
            call({})
