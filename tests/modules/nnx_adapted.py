"""An NNX case as pure functions, for the checks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adalora_jax as adalora
from modules.checks import CONFIG, AdaptedModel, random_inputs, random_like
from modules.linen_cases import plain
from modules.nnx_cases import Case


def _concrete(state):
    """Replace the shapes of ``nnx.eval_shape`` by zeros, and those of keys by a key."""

    def zeros(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))

    return jax.tree.map(zeros, state)


def adapt_case(case: Case, dtype: str, config: adalora.AdaLoraConfig = CONFIG) -> AdaptedModel:
    """Return the adapted module of a case, with random parameters and inputs of a dtype."""
    config = config.replace(param_dtype=dtype, target_modules=case.targets)
    inputs = random_inputs(case.inputs, dtype)
    model = nnx.eval_shape(lambda: case.make(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = random_like(params, seed=9, dtype=dtype), _concrete(rest)
    model = nnx.merge(graph, params, rest)
    adapted = nnx.eval_shape(lambda: adalora.nnx.adapt(model, config))
    graphs = nnx.split(adapted, adalora.nnx.AdapterParam, nnx.Param, ...)
    adapted_graph, own, _, others = graphs

    def put(base, adapters):
        joined = nnx.merge(adapted_graph, _concrete(own), base, _concrete(others), copy=True)
        adalora.nnx.set_adapters(joined, adapters)
        return joined

    def add(base, deltas):
        changed = nnx.merge(graph, base, rest, copy=True)
        modules = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(changed)}
        for path, delta in deltas.items():
            names = [n for n in ("kernel", "embedding", "w") if hasattr(modules[path], n)]
            weight = getattr(modules[path], names[0])
            weight[...] += case.layouts.get(path, plain)(delta, weight.shape)
        return nnx.state(changed, nnx.Param)

    def unmerge(base, adapters):
        merged = nnx.merge(graph, base, rest, copy=True)
        return nnx.state(adalora.unmerge(merged, put(params, adapters)), nnx.Param)

    return AdaptedModel(
        init=lambda key: adalora.nnx.adapters(adalora.nnx.adapt(model, config, key)),
        apply=lambda base, adapters, *xs: put(base, adapters)(*xs),
        base_apply=lambda base, *xs: nnx.merge(graph, base, rest, copy=True)(*xs),
        base=params,
        inputs=inputs,
        add=add,
        merge=lambda base, adapters: nnx.state(adalora.merge(put(base, adapters)), nnx.Param),
        unmerge=unmerge,
        config=config,
    )
