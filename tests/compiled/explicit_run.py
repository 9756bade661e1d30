"""Models on eight CPU devices with explicit axes, run by test_explicit_meshes.py in a subprocess.

Each case is computed without a mesh, and under meshes on which all, some or no axes are explicit.
The batch is sharded along data and the weights' last axes along model; ``put`` does nothing without
a mesh. Layers of NNX are called with an ``out_sharding`` that differs from what their adapter's
factors imply.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as adalora
from adalora_jax import bank, inits, quantization

CONFIG = adalora.AdaLoraConfig(
    total_step=4,
    init_r=4,
    target_r=2,
    tfinal=1,
    lora_dropout=0.3,
    init_lora_weights=False,
    target_modules=".*",
)
X = np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 16, (8, 4)).astype(np.int32)


def placer(mesh):
    """Return a function that puts arrays on a mesh; on None, the identity."""

    def put(tree, *spec):
        def one(leaf):
            if mesh is None or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return leaf
            where = spec or (None,) * (leaf.ndim - 1) + ("model",)
            fits = [
                name if name and size % mesh.shape[name] == 0 else None
                for name, size in zip(where, leaf.shape)
            ]
            return jax.device_put(leaf, NamedSharding(mesh, P(*fits)))

        return jax.tree.map(one, tree)

    return put


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.gelu(nn.Dense(12, name="up")(x))


def linen_layers(put):
    conv = nn.Conv(4, (3,), use_bias=False, feature_group_count=2)
    results = []
    for module, where in ((Mlp(), ()), (conv, (None,))):  # Flax's own conv needs whole weights
        variables = put(module.init(jax.random.key(0), X), *where)
        x = put(X, "data")
        adapted = adalora.linen.adapt(module, CONFIG)
        adapters = adapted.init(jax.random.key(1), variables, x)

        def loss(adapters, adapted=adapted, variables=variables, x=x):
            rngs = {"dropout": jax.random.key(2)}
            return jnp.sum(adapted.apply(variables, adapters, x, rngs=rngs) ** 2)

        results.append(jax.jit(jax.value_and_grad(loss))(adapters))
    return results


class Layer(nnx.Module):
    def __init__(self, kind, *sizes, **kwargs):
        self.layer = kind(*sizes, rngs=nnx.Rngs(0), **kwargs)


def _nnx_layer(put, kind, sizes, x, *spec, attend=False, recipe=None, **kwargs):
    model = Layer(kind, *sizes, **kwargs)
    graph, state = nnx.split(model)
    model = nnx.merge(graph, put(state))
    if recipe:
        model = quantization.quantize(model, recipe)
    model, x = adalora.nnx.adapt(model, CONFIG, rngs=nnx.Rngs(5)), put(x, "data")
    out = None if put(X, "data") is X else P(*spec)

    def loss(model, x):
        call = model.layer.attend if attend else model.layer
        return jnp.sum(call(x, out_sharding=out) ** 2)

    grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, adalora.nnx.AdapterParam))
    value, grads = nnx.jit(grad)(model, x)
    return value, nnx.to_pure_dict(grads)


def nnx_layers(put):
    return [
        _nnx_layer(put, nnx.Linear, (8, 12), X, "data", None, None, use_bias=False),
        _nnx_layer(put, nnx.Embed, (16, 12), IDS, "data", None, "model"),
        _nnx_layer(put, nnx.Embed, (16, 8), X, "data", None, None, attend=True),
        *(
            _nnx_layer(put, nnx.Conv, (8, 12, (3,)), X, "data", None, "model", use_bias=False, **kw)
            for kw in ({}, {"feature_group_count": 2})
        ),
    ]


def quantised_layers(put):
    x = np.tile(X, (1, 1, 8))
    return [
        _nnx_layer(put, nnx.Linear, (64, 64), x, "data", None, "model", recipe=recipe)
        for recipe in ("int8", "nf4")
    ]


def banks(put):
    model = Mlp()
    variables, x = put(model.init(jax.random.key(0), X)), put(X, "data")
    adapted = adalora.linen.adapt(model, CONFIG)
    made = bank.AdapterBank.from_dict(
        {str(i): adapted.init(jax.random.key(i), variables, x) for i in range(3)}
    )
    apply = bank.per_example(lambda adapters, x: adapted.apply(variables, adapters, x))
    names = ["0", None, "2", "1", "0", "0", None, "2"]
    split = jax.jit(made.select)(put(made.index(names), "data"))
    whole = made.select(names)
    return split, apply(split, x), jax.jit(apply)(whole, x), bank.truncate(made.select("1"), 2)


def training(put):
    model = Mlp()
    variables, x = put(model.init(jax.random.key(0), X)), put(X, "data")
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, x)
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            y = adapted.apply(variables, adapters, x)
            return jnp.mean(y**2) + adalora.orthogonality(adapters, CONFIG)

        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state = tx.init(adapters)
    for _ in range(2):
        adapters, state = step(adapters, state)
    adapters, state = adalora.finish(state, adapters)
    final = adalora.eval_params(state, adapters)
    merged = adalora.merge(variables, final)
    small, small_state = adalora.compact(adapters, state, tx)
    updates, _ = tx.update(small, small_state, small)
    return final, adalora.masks(state), merged, adalora.unmerge(merged, final), small, updates


def initial_values_and_merging(put):
    dense = nn.DenseGeneral((2, 6))
    variables, x = put(dense.init(jax.random.key(0), X)), put(X, "data")
    adapted = adalora.linen.adapt(dense, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, x)
    moments = inits.input_second_moments(adapted, variables, adapters, x)
    remaining, principal = inits.pissa_init(variables, adapters)
    packed = quantization.quantize(dense, "nf4", variables, x)[1]
    merged = quantization.merge(packed, adapters, to="float32")
    return moments, remaining, principal[""].lam, merged[0]


@functools.cache
def without_mesh(case):
    return case(placer(None))


def compare(ours, wanted):
    def one(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * (1 + np.abs(b).max(initial=0)))

    jax.tree.map(one, ours, wanted)


if __name__ == "__main__":
    assert jax.device_count() == 8
    for kinds, cases in {
        "EE": (
            *(linen_layers, nnx_layers, quantised_layers, banks, training),
            initial_values_and_merging,
        ),
        "EA": (linen_layers,),
        "AE": (training,),
        "AA": (linen_layers,),
    }.items():
        types = tuple({"E": AxisType.Explicit, "A": AxisType.Auto}[kind] for kind in kinds)
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
        for case in cases:
            print(kinds, case.__name__)
            with jax.set_mesh(mesh):
                ours = case(placer(mesh))
            compare(ours, without_mesh(case))
