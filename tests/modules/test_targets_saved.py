"""A head that ``modules_to_save`` trains: its dtypes, and all operations that must keep it."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.small_models import KEY, draw

import adalora_jax as adalora
from adalora_jax import checkpoint, huggingface


class WithHead(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="a", param_dtype=self.dtype)(x)
        return nn.Dense(3, name="head", param_dtype=self.dtype)(nn.tanh(x))


class NnxWithHead(nnx.Module):
    def __init__(self, rngs, dtype="float32"):
        self.a = nnx.Linear(6, 6, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(6, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.a(x)))


HEAD = adalora.AdaLoraConfig(
    total_step=12, init_r=4, target_r=2, deltaT=4, target_modules=["a"], modules_to_save=["head"]
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def linen_run(request):
    model, x = WithHead(request.param), draw(8, 6).astype(request.param)
    variables = model.init(KEY, x)
    adapted = adalora.linen.adapt(model, HEAD)
    params = adapted.init(jax.random.key(1), variables, x)
    tx = adalora.adalora(optax.adam(1e-3), HEAD)
    state, first = tx.init(params), params

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((adapted.apply(variables, p, x).astype(jnp.float32) - 1) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(12):
        params, state = step(params, state)
    return model, variables, adapted, tx, first, params, state, x


def test_head_trains_in_float32_and_computes_in_base_dtype(linen_run):
    model, variables, adapted, _, first, params, _, x = linen_run
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["head"])} == {"float32"}
    start, base = adapted.apply(variables, first, x), model.apply(variables, x)
    assert start.dtype == base.dtype
    np.testing.assert_array_equal(start, base)
    moved = np.mean(np.asarray(first["head"]["kernel"] != params["head"]["kernel"]))
    assert moved > 0.9


def test_linen_head_is_kept_by_all_operations(linen_run, tmp_path):
    model, variables, adapted, tx, _, params, state, x = linen_run
    params = adalora.eval_params(state, params)
    output = adapted.apply(variables, params, x)
    close = lambda a: np.testing.assert_allclose(
        a.astype("float32"), output.astype("float32"), rtol=2e-2, atol=2e-2
    )
    small = adalora.compact(params, state)
    assert sorted(small) == sorted(params)
    close(adapted.apply(variables, small, x))
    merged = adalora.merge(variables, small)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, variables)
    close(model.apply(merged, x))
    base = {"head": variables["params"]["head"]}
    bank = adalora.AdapterBank.from_dict({"one": small, "two": params}, base)
    for name in ("one", "two"):
        close(adapted.apply(variables, bank.select(name), x))
    np.testing.assert_array_equal(
        adapted.apply(variables, bank.select(None), x), model.apply(variables, x)
    )
    checkpoint.save(tmp_path / "run", params, state, HEAD)
    for restored in (
        checkpoint.restore(tmp_path / "run", tx),
        checkpoint.restore(tmp_path / "run"),
    ):
        assert jax.tree.structure(restored.adapters) == jax.tree.structure(params)
        close(model.apply(adalora.merge(variables, restored.adapters), x))
    huggingface.save_pretrained(tmp_path / "files", params, HEAD, masks=state)
    loaded = huggingface.load_pretrained(tmp_path / "files", like=params)
    close(adapted.apply(variables, loaded.adapters, x))
    close(model.apply(adalora.merge(variables, loaded.adapters), x))
    stored = flax.serialization.to_bytes(params)
    again = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, params), stored)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    close(adapted.apply(variables, again, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nnx_head_is_kept_by_all_operations(dtype, tmp_path):
    base, x = NnxWithHead(nnx.Rngs(0), dtype), draw(8, 6).astype(dtype)
    model = adalora.nnx.adapt(base, HEAD, nnx.Rngs(1))
    np.testing.assert_array_equal(model(x), base(x))
    assert model(x).dtype == base(x).dtype
    tx = adalora.adalora(optax.adam(1e-3), HEAD)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x).astype(jnp.float32) - 1) ** 2)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    for _ in range(11):
        step(model, optimizer)
    model, optimizer = adalora.finish(optimizer, model)
    final = adalora.nnx.eval_model(model, optimizer)
    output = final(x)
    close = lambda a: np.testing.assert_allclose(
        a.astype("float32"), output.astype("float32"), rtol=2e-2, atol=2e-2
    )
    adapters = adalora.nnx.adapters(final)
    assert sorted(adapters) == ["a", "head"]
    assert adapters["head"]["kernel"].dtype == jnp.float32
    assert not np.array_equal(adapters["head"]["kernel"], base.head.kernel[...])
    small, small_optimizer = adalora.compact(model, optimizer)
    close(small(x))
    step(small, small_optimizer)
    close(adalora.compact(model, optimizer.opt_state)(x))
    merged = adalora.merge(final)
    close(merged(x))
    assert jax.tree.map(jnp.shape, nnx.state(merged)) == jax.tree.map(jnp.shape, nnx.state(base))
    assert merged.head.kernel.dtype == base.head.kernel.dtype
    other = adalora.nnx.adapt(base, HEAD, nnx.Rngs(2))
    adalora.nnx.set_adapters(other, adapters)
    np.testing.assert_array_equal(other(x), output)
    np.testing.assert_array_equal(adalora.nnx.with_adapters(other, adapters)(x), output)
    checkpoint.save(tmp_path / "run", adapters, optimizer.opt_state, HEAD)
    restored = checkpoint.restore(tmp_path / "run").adapters
    assert jax.tree.structure(restored) == jax.tree.structure(adapters)
    adalora.nnx.set_adapters(other, restored)
    np.testing.assert_array_equal(other(x), output)
    huggingface.save_as_lora(tmp_path / "lora", adapters, HEAD, masks=optimizer.opt_state)
    loaded = huggingface.load_pretrained(tmp_path / "lora", like=adapters)
    close(adalora.nnx.with_adapters(other, loaded.adapters)(x))
