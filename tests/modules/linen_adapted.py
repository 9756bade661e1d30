"""A linen case as pure functions, for the checks."""

from __future__ import annotations

import jax
from flax import traverse_util

import adalora_jax as adalora
from modules.checks import CONFIG, AdaptedModel, random_inputs, random_like
from modules.linen_cases import Case, plain


def adapt_case(case: Case, dtype: str, config: adalora.AdaLoraConfig = CONFIG) -> AdaptedModel:
    """Return the adapted module of a case, with random parameters and inputs of a dtype."""
    config = config.replace(param_dtype=dtype, target_modules=case.targets)
    inputs = random_inputs(case.inputs, dtype)
    call = lambda *xs: case.module.init(jax.random.key(0), *xs, **case.call)
    variables = random_like(jax.eval_shape(call, *inputs), seed=9, dtype=dtype)
    adapted = adalora.linen.adapt(case.module, config)
    return AdaptedModel(
        init=lambda key: adapted.init(key, variables, *inputs, **case.call),
        apply=lambda base, adapters, *xs: adapted.apply(base, adapters, *xs, **case.call),
        base_apply=lambda base, *xs: case.module.apply(base, *xs, **case.call),
        base=variables,
        inputs=inputs,
        add=lambda base, deltas: _add(case, base, deltas),
        merge=lambda base, adapters: adalora.merge(base, adapters),
        unmerge=lambda base, adapters: adalora.unmerge(base, adapters),
        config=config,
    )


def _add(case: Case, variables, deltas):
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    for path, delta in deltas.items():
        names = [f"{path}/{name}".lstrip("/") for name in ("kernel", "embedding", "w")]
        (name,) = [name for name in names if name in flat]
        weight = flat[name]
        flat[name] = weight + case.layouts.get(path, plain)(delta, weight.shape)
    return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}
