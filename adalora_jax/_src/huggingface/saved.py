"""Parameters of ``modules_to_save``, converted between their Flax and PyTorch forms."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.tree_util import KeyPath

from adalora_jax._src.core import pytree
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.huggingface.matrices import as_jax
from adalora_jax._src.huggingface.names import NameMap

# Number of axes of each parameter of a Flax module, without stack axes.
_AXES = {"kernel": 2, "embedding": 2, "scale": 1, "bias": 1}
_EMBEDDINGS = {"wte", "wpe", "embed_tokens", "shared"}


def saved_to_torch(adapters: PyTree, names: NameMap) -> dict[str, np.ndarray]:
    """Return ``{"<module>.weight": array}`` of the parameters of ``modules_to_save``.

    These are all leaves of the tree that do not belong to an adapter.

    Raises:
      ValueError: a parameter's name and shape do not determine its PyTorch form, it is only a part
        of a PyTorch parameter, or two parameters get the same name.
    """
    result: dict[str, np.ndarray] = {}
    for path, leaf in _saved_leaves(adapters).items():
        array = np.asarray(jax.device_get(leaf))
        module, _, kind = path.rpartition("/")
        axes = _axes(module, kind, array.ndim, names)
        if axes is None or array.ndim < axes or not module:
            raise ValueError(
                f"`adapters[{path!r}]`: has shape {array.shape} and cannot be written for PyTorch, "
                f"since only parameters of layers named {', '.join(_AXES)} can, a kernel only with "
                "one input axis and one output axis; leave it out, or store its value in the base."
            )
        stack = array.shape[: array.ndim - axes]
        for index in np.ndindex(stack):
            try:
                (name, *parts), *more = names.to_hf(module, index)
            except ValueError as error:
                raise ValueError(f"`adapters[{path!r}]`: {error}") from None
            if more or parts != [(0, 1), (0, 1)]:
                raise ValueError(
                    f"`adapters[{path!r}]`: is only a part of {name!r} and cannot be saved alone; "
                    "leave it out."
                )
            value = array[index]
            if kind == "kernel":
                value = _kernel_to_torch(value, names.is_conv1d(name))
            key = _key(name, kind)
            if key in result:
                raise ValueError(
                    f"`names`: {path!r} and another parameter both become {key!r}; map them to "
                    "different names."
                )
            result[key] = value
    return result


def saved_from_torch(
    saved: Mapping[str, np.ndarray], names: NameMap, like: PyTree
) -> dict[str, PyTree]:
    """Invert :func:`saved_to_torch`, in the containers of ``like``.

    Without ``like`` return ``{module: {"kernel": ..., "bias": ...}}``: a weight with one axis is a
    scale, one with two axes is an embedding if the module's name indicates it and a kernel
    otherwise, and one with four axes is the kernel of a convolution.

    Raises:
      ValueError: a tensor has no matching parameter, a parameter of ``like`` has no tensor, or
        their shapes differ.
    """
    if like is None:
        return _by_their_names(saved, names)
    used: set[str] = set()

    def find(path: KeyPath, leaf: PyTree) -> jax.Array | None:
        if pytree.is_adapter(leaf):
            return None
        module, _, kind = pytree.path_name(path).rpartition("/")
        axes = _axes(module, kind, len(leaf.shape), names)
        stack = tuple(leaf.shape)[: len(leaf.shape) - (axes or 0)]
        arrays = []
        for index in np.ndindex(stack):
            name = names.to_hf(module, index)[0][0]
            key = _key(name, kind)
            if key not in saved or axes is None:
                raise ValueError(
                    f"`like[{pytree.path_name(path)!r}]`: has no tensor {key!r} in the file; "
                    "remove it from like to keep the base's value."
                )
            used.add(key)
            kernel = kind == "kernel"
            conv1d = names.is_conv1d(name)
            arrays.append(_kernel_from_torch(saved[key], conv1d) if kernel else saved[key])
        shapes = {(*stack, *array.shape) for array in arrays}
        if shapes != {tuple(leaf.shape)}:
            raise ValueError(
                f"`like[{pytree.path_name(path)!r}]`: has shape {tuple(leaf.shape)}, but "
                f"{', '.join(map(str, sorted(shapes)))} in the file; pass like of the saved model."
            )
        return as_jax(np.stack(arrays).reshape(leaf.shape))

    found = jax.tree_util.tree_map_with_path(find, like, is_leaf=pytree.is_adapter)
    if over := sorted(set(saved) - used):
        raise ValueError(
            f"`like`: has no parameter for {', '.join(map(repr, over[:3]))}; name their modules in "
            "modules_to_save of the config of like."
        )
    return {path: node for path, node in found.items() if node is not None}


def _by_their_names(saved: Mapping[str, np.ndarray], names: NameMap) -> dict[str, PyTree]:
    result: dict[str, dict[str, jax.Array]] = {}
    for key, array in saved.items():
        name, _, kind = key.rpartition(".")
        if kind == "weight":
            last = name.rpartition(".")[2]
            embeds = last in _EMBEDDINGS or last.endswith("embeddings")
            kind = "scale" if array.ndim == 1 else "embedding" if embeds else "kernel"
        elif kind != "bias":
            kind = ""
        if kind not in _AXES or (array.ndim != _AXES[kind] and (kind, array.ndim) != ("kernel", 4)):
            raise ValueError(
                f"`like=None`: {key!r} of shape {array.shape} is not a parameter of a known Flax "
                "layer; pass like=adapters of the model."
            )
        (place, part), *more = names.to_flax(name)
        if more or place.stack_index or part != (0, 1) or place.part != (0, 1):
            raise ValueError(
                f"`like=None`: {key!r} is only a part of {place.path!r}; pass like=adapters of the "
                "model."
            )
        if kind == "kernel":
            array = _kernel_from_torch(array, names.is_conv1d(name))
        module = result.setdefault(place.path, {})
        if kind in module:
            raise ValueError(
                f"`names`: {key!r} and another tensor both become {place.path!r}; map them to "
                "different names."
            )
        module[kind] = as_jax(array)
    return result


def _key(name: str, kind: str) -> str:
    return f"{name}.{'bias' if kind == 'bias' else 'weight'}"


def _saved_leaves(adapters: PyTree) -> dict[str, PyTree]:
    """Return the leaves of a tree that do not belong to an adapter, by path."""
    nodes = jax.tree_util.tree_flatten_with_path(adapters, is_leaf=pytree.is_adapter)[0]
    return {pytree.path_name(path): node for path, node in nodes if not pytree.is_adapter(node)}


def _axes(module: str, kind: str, ndim: int, names: NameMap) -> int | None:
    """Return the number of axes of a parameter without stack axes; None for an unknown parameter.

    A kernel of four or five axes is a convolution's, unless ``names`` maps it as a stack.
    """
    if kind != "kernel":
        return _AXES.get(kind)
    for stacked in range(ndim - 1):
        if ndim - stacked != 3 and names.match(module, (0,) * stacked):
            return ndim - stacked
    return _AXES[kind]


def _kernel_to_torch(kernel: np.ndarray, conv1d: bool) -> np.ndarray:
    """Transpose a kernel ``[*size, in, out]`` to ``[out, in, *size]``, unless it is a Conv1D's."""
    if conv1d:
        return kernel
    axes = kernel.ndim
    return kernel.transpose(axes - 1, axes - 2, *range(axes - 2))


def _kernel_from_torch(weight: np.ndarray, conv1d: bool) -> np.ndarray:
    return weight if conv1d else weight.transpose(*range(2, weight.ndim), 1, 0)
