"""A head that ``modules_to_save`` trains in NNX, as variables that all operations must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.small_models import HEAD, draw

import adalora_jax as adalora
from adalora_jax import checkpoint, huggingface


class NnxWithHead(nnx.Module):
    def __init__(self, rngs, dtype="float32"):
        self.a = nnx.Linear(6, 6, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(6, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.a(x)))


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

    def close(a):
        np.testing.assert_allclose(
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
