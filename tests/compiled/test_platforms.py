"""Programs for GPU and TPU, lowered on a machine without either."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.compiling import assert_same

import adalora_jax as adalora

PLATFORMS = ("cpu", "cuda", "tpu")
CONFIG = adalora.AdaLoraConfig(
    total_step=4, init_r=4, target_r=2, tfinal=1, target_modules=".*(up|down)"
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(16, name="up")(x))
        return nn.Dense(4, name="down")(x)


def structs(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def lowered(function, *args):
    """Export one program for all platforms and return its results on this one."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*structs(args))
    assert exported.platforms == PLATFORMS
    # The program has no custom kernels but XLA's own, on any platform.
    calls = re.findall(r"custom_call @(\w+)", exported.mlir_module())
    assert set(calls) <= {"Sharding"}
    return exported.call(*args)


@pytest.fixture(scope="module")
def problem():
    model, x = Model(), jnp.linspace(-1, 1, 64).reshape(8, 8)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    adapted = adalora.linen.adapt(model, CONFIG)
    return adapted, variables, adapted.init(jax.random.key(1), variables, x), x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_exports_to_all_platforms(dtype):
    config = CONFIG.replace(param_dtype=dtype, init_lora_weights=False)
    adapter = adalora.init_adapter(jax.random.key(0), 6, 5, config)
    x, kernel, bias = (jnp.ones(shape, dtype) for shape in ((3, 6), (6, 5), (5,)))
    forward = adalora.forward
    for function in (forward, jax.grad(lambda *args: forward(*args).sum().astype(float))):
        ours = lowered(function, adapter, x, kernel, bias)
        wanted = jax.jit(function)(adapter, x, kernel, bias)
        jax.tree.map(assert_same, ours, wanted)


def test_allocate_exports_to_all_platforms(problem):
    adapters = problem[2]
    state = adalora.init_state(adapters, CONFIG)
    grads = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), adapters)
    ours = lowered(adalora.allocate, state, grads, jnp.int32(CONFIG.final_step))
    wanted = adalora.allocate(state, grads, CONFIG.final_step)
    jax.tree.map(assert_same, ours, wanted)
    assert sum(int(mask.sum()) for mask in ours[1].values()) == 2 * CONFIG.target_r


def train_step(adapted, tx):
    def step(variables, adapters, opt_state, x, y):
        def loss(adapters):
            logits = adapted.apply(variables, adapters, x)
            return jnp.mean((logits - y) ** 2) + adalora.orthogonality(adapters, CONFIG)

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, value

    return step


def test_train_step_exports_to_all_platforms(problem):
    adapted, variables, adapters, x = problem
    tx = adalora.adalora(optax.adamw(1e-2), CONFIG)
    args = variables, adapters, tx.init(adapters), x, x[:, :4]
    ours = lowered(train_step(adapted, tx), *args)
    wanted = jax.jit(train_step(adapted, tx))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, wanted)


def test_train_step_lowers_for_abstract_tpu_mesh(problem):
    adapted, variables, adapters, x = problem
    tx = adalora.adalora(optax.adamw(1e-2), CONFIG)
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = lambda leaf: P("data", "model") if leaf.ndim == 2 else P()
    place = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
    base = jax.tree.map(lambda leaf: NamedSharding(mesh, split(leaf)), variables)
    specs = adapted.specs(jax.tree.map(place, variables, base), x)
    assert specs["up"].p == P(None, "model")
    state = adapters, jax.eval_shape(tx.init, adapters)
    shardings = functools.partial(adalora.sharding.shardings, mesh=mesh)
    placed = shardings(state[0], specs), shardings(state[1], specs, tx=tx)
    batch = NamedSharding(mesh, P("data"))
    step = jax.jit(
        train_step(adapted, tx),
        in_shardings=(base, *placed, batch, batch),
        out_shardings=(*placed, NamedSharding(mesh, P())),
    )
    traced = step.trace(*structs((variables, *state, x, x[:, :4])))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "8 : i32" in text
    assert '"model"' in text
