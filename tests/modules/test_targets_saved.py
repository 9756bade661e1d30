"""A linen head that ``modules_to_save`` trains: its dtypes, and operations that must keep it."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_models import HEAD, KEY, draw

import adalora_jax as adalora
from adalora_jax import checkpoint, huggingface


class WithHead(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="a", param_dtype=self.dtype)(x)
        return nn.Dense(3, name="head", param_dtype=self.dtype)(nn.tanh(x))


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

    def close(a):
        np.testing.assert_allclose(
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
