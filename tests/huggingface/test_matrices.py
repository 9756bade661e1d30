"""Round trips of Flax adapters through PEFT's files: multi-axis layers, stacks, NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

import adalora_jax as adalora
from adalora_jax import huggingface as peft
from adalora_jax._src.huggingface import matrices as peft_matrices
from huggingface.checkpoints import Einsum

CONFIG = adalora.AdaLoraConfig(
    total_step=10, init_r=4, target_r=2, lora_alpha=6, init_lora_weights=False
)


def tensors(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


class Kinds(nn.Module):
    """Every layer whose weight has another form in PyTorch."""

    @nn.compact
    def __call__(self, x, image):
        y = nn.DenseGeneral((2, 3), kernel_init=nn.initializers.zeros, name="heads")(x)
        y = nn.DenseGeneral(7, axis=(-2, -1), kernel_init=nn.initializers.zeros, name="out")(y)
        q = Einsum((2, 5, 3), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = Einsum((2, 1, 5, 3), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        z = Einsum((2, 3, 5), name="attn_vec_einsum")("BTNH,NHD->BTD", q + k + v)
        c = nn.Conv(4, (3, 2), kernel_init=nn.initializers.zeros, name="conv")(image)
        return y.sum() + z.sum() + c.sum()


@pytest.mark.parametrize("writer", [peft.save_pretrained, peft.save_as_lora])
def test_multi_axis_weights_are_reshaped_as_checkpoint_converters_do(writer, tmp_path):
    """Merged weights (of a zero base), converted to PyTorch's form by hand, are the reference."""
    model = Kinds()
    inputs = jnp.ones((1, 2, 5)), jnp.ones((1, 4, 4, 2))
    variables = model.init(jax.random.key(0), *inputs)
    config = CONFIG.replace(target_modules=r".*(heads|out|einsum|conv)")
    adapted = adalora.linen.adapt(model, config)
    trained = adapted.init(jax.random.key(1), variables, *inputs)
    merged = adalora.merge(variables, trained)["params"]
    w = {name: np.asarray(merged[name].get("w", merged[name].get("kernel"))) for name in merged}
    expected = {
        "heads": w["heads"].reshape(5, 6).T,
        "out": w["out"].reshape(6, 7).T,
        "q_proj": w["q_einsum"].transpose(0, 2, 1).reshape(6, 5),
        "k_proj": w["kv_einsum"][0].transpose(0, 2, 1).reshape(3, 5),
        "v_proj": w["kv_einsum"][1].transpose(0, 2, 1).reshape(3, 5),
        "o_proj": w["attn_vec_einsum"].reshape(6, 5).T,
        "conv": w["conv"].transpose(3, 2, 0, 1).reshape(4, -1),
    }
    names = [
        *((name, name) for name in ("heads", "out", "conv")),
        ("q_einsum", "q_proj"),
        ("kv_einsum[0]", "k_proj"),
        ("kv_einsum[1]", "v_proj"),
        ("attn_vec_einsum", "o_proj"),
    ]
    writer(tmp_path, trained, config, names=names)
    written, lora = tensors(tmp_path), writer is peft.save_as_lora
    for name, want in expected.items():
        a, b = (written[f"base_model.model.{name}.lora_{x}{'.weight' * lora}"] for x in "AB")
        if lora and name == "conv":
            assert a.shape == (4, 2, 3, 2)
            assert b.shape == (4, 4, 1, 1)
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        e = 1 if lora else written[f"base_model.model.{name}.lora_E"][:, 0] * config.scaling
        np.testing.assert_allclose((b * e) @ a, want, rtol=1e-4, atol=1e-5, err_msg=name)
    # The tensor shapes of LoRA identify a convolution; AdaLoRA's do not.
    read = peft.load_pretrained(tmp_path, names=names, like=None if lora else trained)
    again = adalora.merge(variables, read.adapters)["params"] if not lora else None
    if again:
        jax.tree.map(np.testing.assert_array_equal, again, merged)
    else:
        got = adalora.delta_weight(read.adapters["conv"])
        np.testing.assert_allclose(got, w["conv"].reshape(-1, 4), rtol=1e-4, atol=1e-5)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.DenseGeneral((2, 3), name="query")(x)
        return x + nn.DenseGeneral(6, axis=(-2, -1), name="out")(jnp.tanh(y))


class Layers(nn.Module):
    """Three layers under a scan, and a head."""

    @nn.compact
    def __call__(self, x):
        step = nn.scan(
            lambda module, carry, _: (module(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = step(Head(name="layers"), x, None)
        return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(x))


@pytest.fixture(scope="module")
def run():
    """Train and prune a model of stacked layers with head axes."""
    config = adalora.AdaLoraConfig(
        total_step=8,
        init_r=3,
        target_r=1,
        tfinal=3,
        target_modules=["query", "out"],
        modules_to_save=["head", "norm"],
    )
    x = jax.random.normal(jax.random.key(0), (4, 6))
    model = Layers()
    variables = model.init(jax.random.key(1), x)
    adapted = adalora.linen.adapt(model, config)
    trained = adapted.init(jax.random.key(2), variables, x)
    tx = adalora.adalora(optax.adam(0.05), config)
    state = tx.init(trained)

    @jax.jit
    def step(trained, state):
        loss = lambda a: jnp.square(adapted.apply(variables, a, x) - 1).mean()
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(config.total_step):
        trained, state = step(trained, state)
    return config, model, variables, trained, adalora.allocator_state(state), x


NAMES = [
    ("layers/{part}[{i}]", "blocks.{i}.{part}"),
    ("head", "head"),
    ("norm", "norm"),
]


def test_trained_model_is_unchanged_by_save_and_load(run, tmp_path):
    config, model, variables, trained, state, x = run
    assert len(set(adalora.ranks(state).values())) > 1, "the layers should differ in rank"
    expected = adalora.linen.adapt(model, config).apply(variables, trained, x)
    peft.save_pretrained(tmp_path, trained, config, masks=state, names=NAMES)
    written = tensors(tmp_path)
    assert written["base_model.model.blocks.2.query.lora_A"].shape[1] == 6
    assert written["base_model.model.head.weight"].shape == (2, 6)
    assert written["base_model.model.norm.weight"].shape == (6,)
    for like in (None, trained):
        read = peft.load_pretrained(tmp_path, names=NAMES, like=like)
        adapted = adalora.linen.adapt(model, read.config)
        fresh = adapted.init(jax.random.key(3), variables, x)
        # Adapters made from the loaded config must have the loaded shapes.
        shapes = lambda tree: jax.tree.map(jnp.shape, jax.tree.leaves(tree))
        assert shapes(fresh) == shapes(read.adapters)
        if like:  # the file alone does not determine a weight's axes
            assert jax.tree.structure(fresh) == jax.tree.structure(read.adapters)
        np.testing.assert_allclose(
            adapted.apply(variables, read.adapters, x), expected, rtol=1e-5, atol=1e-6
        )


def test_nnx_adapters_round_trip(tmp_path):
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 5, rngs=nnx.Rngs(1)))
    config = CONFIG.replace(target_modules="all-linear")
    adapted = adalora.nnx.adapt(model, config)
    peft.save_pretrained(tmp_path, adalora.nnx.adapters(adapted), config)
    assert tensors(tmp_path)["base_model.model.layers.1.lora_B"].shape == (5, 4)
    read = peft.load_pretrained(tmp_path)
    other = adalora.nnx.adapt(model, read.config, nnx.Rngs(7))
    adalora.nnx.set_adapters(other, read.adapters)
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(other(x), adapted(x))


def test_padding_of_stacked_ranks_is_bounded():
    """Padding would bring all other layers to the rank of the highest."""
    shapes = lambda rank: ((rank, 9), (rank,), (rank, 9))
    matrices = {
        f"l.{i}": peft_matrices.LowRankMatrix(
            *(np.ones(shape, np.float32) for shape in shapes(rank)), np.ones(rank, bool)
        )
        for i, rank in enumerate([4000] + [1] * 299)
    }
    names = peft.NameMap([("l[{i}]", "l.{i}")])
    with pytest.raises(ValueError, match="its ranks are too different"):
        peft_matrices.from_matrices(matrices, names, None, {}, 1.0)


def test_adapters_of_equinox_weights_have_the_factors_of_their_pytorch_modules(tmp_path):
    def fn(params, x):
        x = jax.lax.conv_general_dilated(x, params["conv"]["weight"], (1, 1), "SAME")
        return x.mean((2, 3)) @ params["linear"]["weight"].T

    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params = {
        "conv": {"weight": draw(0, 7, 5, 3, 2)},  # [out, in, *window]
        "linear": {"weight": draw(1, 4, 7)},  # [out, in]
    }
    config = adalora.AdaLoraConfig(
        total_step=8, init_r=3, target_r=1, target_modules=".*", init_lora_weights=False
    )
    adapted = adalora.functional.adapt(fn, params, config, draw(2, 1, 5, 4, 4))
    adapters = adapted.init(jax.random.key(3), params)
    peft.save_pretrained(tmp_path, adapters, config)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    merged = adalora.functional.merge(params, adapters)
    for name, node in params.items():
        a, b, e = (
            next(t for key, t in tensors.items() if f"{name}.lora_{letter}" in key)
            for letter in "ABE"
        )
        increment = adapters[name].scale * (b * e[:, 0]) @ a
        found = (merged[name]["weight"] - node["weight"]).reshape(increment.shape)
        np.testing.assert_allclose(found, increment, rtol=1e-3, atol=1e-4)
    loaded = peft.load_pretrained(tmp_path, like=adapters)
    for path, adapter in adapters.items():
        np.testing.assert_array_equal(adapter.q, loaded.adapters[path].q)
