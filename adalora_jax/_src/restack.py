"""Restoring a checkpoint of separate layers into stacked ones, and the reverse."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from adalora_jax._src.core import pytree
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.schedule import cost
from adalora_jax._src.core.text import shorten

# {new name: (saved names, index)}: a stack of the saved names in order, with None as the index; or
# the slice at an index of one saved name.
Moves: TypeAlias = Mapping[str, tuple[list[str], int | None]]


def moved_names(
    folder: pathlib.Path,
    saved: Mapping[str, Any],
    facts: Mapping[str, Any],
    stacks: Mapping[str, Sequence[str]],
) -> dict[str, tuple[list[str], int | None]]:
    """Return ``{new name: (saved names, index)}`` of all that ``stacks`` converts.

    A new stack is made of the saved names in order, with None as the index; a new layer is the
    slice at the index of one saved name. The names are those of the arrays, where the end of a
    name is the path of its parameter, and ``adapters/<path>`` for the facts of an adapter.

    Raises:
      ValueError: ``stacks`` is malformed or does not fit the checkpoint.
    """
    _check_stacks(stacks)
    values = {**saved, **{f"adapters/{path}": known for path, known in facts.items()}}
    params = {*(n.removeprefix("adapters/") for n in saved if n.startswith("adapters/")), *facts}
    path_of = {}
    for name in values if stacks else ():
        ends = (name[i + 1 :] for i, letter in enumerate(name) if letter == "/")
        path_of[name] = next((end for end in ends if end in params), "")

    def below(prefix: str) -> dict[str, str]:
        """Return the names, with their paths, of all values below a module."""
        return {n: path for n, path in path_of.items() if f"{path}/".startswith(f"{prefix}/")}

    moved: dict[str, tuple[list[str], int | None]] = {}
    for stacked, layers in stacks.items():

        def renamed(name: str, old: str, new: str) -> str:
            path = path_of[name]
            return f"{name.removesuffix(path)}{new}{path.removeprefix(old)}"

        each, whole = [below(layer) for layer in layers], below(stacked)
        new: dict[str, tuple[list[str], int | None]] = {}
        if all(each):
            for layer, names in zip(layers, each):
                for name in names:
                    new.setdefault(renamed(name, layer, stacked), ([], None))[0].append(name)
            odd = [
                names[0]
                for names, _ in new.values()
                if len(names) < len(layers) or any(values[n] != values[names[0]] for n in names)
            ]
            problem = "are not in every layer with one shape, dtype, scale and layout"
        else:
            for i, layer in enumerate(layers):
                new |= {renamed(name, stacked, layer): ([name], i) for name in whole}
            odd = [name for name in whole if not _is_stack(values[name], len(layers))]
            problem = f"have no first axis of {len(layers)} layers"
        if not new:
            odd = [stacked, *(layer for layer, names in zip(layers, each) if not names)]
            problem = "have no adapter or parameter in it"
        if odd:
            raise ValueError(
                f"`stacks[{stacked!r}]`: does not fit {folder}, since {shorten(odd)} {problem}; "
                "pass the paths of all layers of one stack, as restore(path).adapters has them."
            )
        moved |= new
    sources = [(name, index) for names, index in moved.values() for name in names]
    gone = {name for name, _ in sources}
    if len(set(sources)) < len(sources) or any(n in values and n not in gone for n in moved):
        raise ValueError(
            f"`stacks={stacks!r}`: gives an array two names, or two arrays one; name each module "
            "or adapter once."
        )
    return moved


def _is_stack(value: tuple[tuple[int, ...], str] | dict[str, Any], count: int) -> bool:
    """Return whether the spec of an array, or the facts of an adapter, are those of a stack."""
    if not isinstance(value, dict):
        return value[0][:1] == (count,)
    layout = value["layout"]
    if not layout or layout.shape is None:
        return True  # not known
    return layout.shape[0] == count and len(layout.shape) > layout.ndim


def _check_stacks(stacks: Mapping[str, Sequence[str]]) -> None:
    """Raise if ``stacks`` does not map each stack to a list of layers, each of them once."""
    lists = [*stacks.values()] if isinstance(stacks, Mapping) else [None]
    layers = [layer for each in lists if isinstance(each, (list, tuple)) for layer in each]

    def is_path(path: object) -> bool:
        return isinstance(path, str) and path.strip("/") == path != ""

    # The order of a set is random, and an iterator could be read only once.
    listed = all(isinstance(each, (list, tuple)) and each for each in lists)
    named = listed and all(map(is_path, [*stacks, *layers]))
    if not named or len(set(layers)) < len(layers):
        raise ValueError(
            f"`stacks={stacks!r}`: must map the path of each stack to the paths of its layers, "
            "each of them once; pass a dict such as {'layers': ['layer_0', 'layer_1']}."
        )


def regroup(
    values: Mapping[str, Any],
    moved: Moves,
    convert: Callable[[list[Any], int | None], Any],
) -> dict[str, Any]:
    """Return values by saved name under the new names; the values of a stack are converted."""
    gone = {name for names, _ in moved.values() for name in names}
    return {name: value for name, value in values.items() if name not in gone} | {
        new: convert([values[name] for name in names], index)
        for new, (names, index) in moved.items()
        if names[0] in values
    }


def _regrouped_shape(shape: tuple[int, ...], count: int, index: int | None) -> tuple[int, ...]:
    return (count, *shape) if index is None else shape[1:]


def regrouped_spec(specs: list[Any], index: int | None) -> tuple[tuple[int, ...], str]:
    """Return the shape and dtype of a new array."""
    shape, dtype = specs[0]
    return _regrouped_shape(shape, len(specs), index), dtype


def regrouped_facts(facts: list[Any], index: int | None) -> dict[str, Any]:
    """Return an adapter's facts; the shape in a layout is that of the whole, stacked weight."""
    layout = facts[0]["layout"]
    if layout and layout.shape is not None:
        shape = _regrouped_shape(layout.shape, len(facts), index)
        layout = dataclasses.replace(layout, shape=shape)
    return facts[0] | {"layout": layout}


def regrouped_array(arrays: list[jax.Array], index: int | None) -> jax.Array:
    """Return the stack of the arrays, or the slice of the only one."""
    return jnp.stack(arrays) if index is None else arrays[0][index]


def moved_keys(nested: Mapping[str, list[str]], moved: Moves) -> dict[str, list[str]]:
    """Return ``nested`` with the keys of the converted leaves, split below a layer as before."""
    result = dict(nested)
    for name, ((old, *_), _) in moved.items():
        rest, keys = name.split("/"), []
        for key in reversed(nested.get(old.removeprefix("adapters/"), [])):
            keys.insert(0, "/".join(rest[-1 - key.count("/") :]))
            rest = rest[: -1 - key.count("/")]
        first = "/".join([*rest, *keys[:1]])
        result[name] = [key for key in (first, *keys[1:]) if key]
    return result


def check_ranks(
    saved: AdaLoraConfig,
    config: AdaLoraConfig,
    adapters: PyTree,
    moved: Moves,
) -> None:
    """Raise if a path of one form has other ranks, scale or cost than that of the other form."""
    for path, adapter in pytree.adapters(adapters).items():
        sizes = adapter.q.shape[-1], adapter.p.shape[-1]

        def rules(
            config: AdaLoraConfig, path: str, sizes: tuple[int, int] = sizes
        ) -> tuple[Any, ...]:
            return config.spec_of(path), config.scale_of(path), cost(config, path, *sizes)

        for name in moved.get(f"adapters/{path}", ((), None))[0]:
            before = name.removeprefix("adapters/")
            old, new = rules(saved, before), rules(config, path)
            if old != new:
                raise ValueError(
                    f"`stacks`: {before!r} was saved with (ranks, scale, cost) = {old}, but the "
                    f"config gives {new} to {path!r}; pass an optimizer whose config gives both "
                    "the same, or start a new run."
                )
