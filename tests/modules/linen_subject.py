"""A linen cell as the pure functions that ``proof`` checks."""

from __future__ import annotations

import jax
import numpy as np
from flax import traverse_util

import adalora_jax as adalora
from modules.linen_cells import Cell, plain
from modules.proof import CONFIG, Subject, random_like


def subject(cell: Cell, dtype: str, config: adalora.AdaLoraConfig = CONFIG) -> Subject:
    """Return the cell's module with random parameters and inputs of a dtype."""
    config = config.replace(param_dtype=dtype, target_modules=cell.targets)
    inputs = tuple(
        value
        if isinstance(value, np.ndarray)
        else random_like(np.zeros(value, dtype), seed=i, std=1)
        for i, value in enumerate(cell.inputs)
    )
    call = lambda *xs: cell.module.init(jax.random.key(0), *xs, **cell.call)
    variables = random_like(jax.eval_shape(call, *inputs), seed=9, dtype=dtype)
    adapted = adalora.linen.adapt(cell.module, config)
    return Subject(
        init=lambda key: adapted.init(key, variables, *inputs, **cell.call),
        apply=lambda base, adapters, *xs: adapted.apply(base, adapters, *xs, **cell.call),
        base_apply=lambda base, *xs: cell.module.apply(base, *xs, **cell.call),
        base=variables,
        inputs=inputs,
        add=lambda base, deltas: _add(cell, base, deltas),
        merge=lambda base, adapters: adalora.merge(base, adapters),
        unmerge=lambda base, adapters: adalora.unmerge(base, adapters),
        config=config,
    )


def _add(cell: Cell, variables, deltas):
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    for path, delta in deltas.items():
        names = [f"{path}/{name}".lstrip("/") for name in ("kernel", "embedding", "w")]
        (name,) = [name for name in names if name in flat]
        weight = flat[name]
        flat[name] = weight + cell.layouts.get(path, plain)(delta, weight.shape)
    return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}
