"""Bit-exact conversion between adapters of a Flax model and increments of PyTorch modules.

One adapter may correspond to the increments of several modules: a stack of layers, keys and values
in one einsum, or queries, keys and values in one projection. Rows are only selected, concatenated
and zero-padded, so the round trip is bit-exact, unless adapters have different scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter, known_scale
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.huggingface.names import NameMap, ParamLocation

# Limit on the size of a zero-padded stack, relative to the size of its matrices in the file: a file
# of a few bytes must not allocate gigabytes.
_MAX_PADDING = 64
_SMALL = 2**22  # elements allowed in addition to that


class LowRankMatrix(NamedTuple):
    """The factors of one PyTorch module's increment ``scale · (pᵀ diag(lam) q)``, ``[out, in]``."""

    p: np.ndarray  # [r, out]: PEFT's B, transposed
    lam: np.ndarray  # [r]: PEFT's E
    q: np.ndarray  # [r, in]: PEFT's A
    mask: np.ndarray  # [r], bool: True where a triplet is active

    def active(self) -> LowRankMatrix:
        """Return the matrix with only its active triplets."""
        return LowRankMatrix(*(leaf[self.mask] for leaf in self))

    def outputs(self, part: tuple[int, int]) -> LowRankMatrix:
        """Return the increment of part k of n equal parts of the outputs."""
        return self._replace(p=np.split(self.p, part[1], axis=1)[part[0]])


def common_scale(adapters: PyTree, default: float) -> float:
    """Return the scale that all adapters share, or ``default`` if their scales differ."""
    scales = {known_scale(adapter, path) for path, adapter in pytree.adapters(adapters).items()}
    return scales.pop() if len(scales) == 1 else default


def to_matrices(
    adapters: PyTree, scale: float, pattern: Mapping[str, list] | None, names: NameMap
) -> tuple[dict[str, LowRankMatrix], dict[str, ParamLocation]]:
    """Return ``{module: matrix}``, pruned rows included, and ``{module: place in its adapter}``.

    All matrices share one scale: λ of an adapter with another scale is multiplied by the ratio.

    Args:
      adapters: any tree with adapters in it.
      scale: the common scale of the increments.
      pattern: ``{path: mask}`` as nested lists; None if all triplets are active.
      names: the map from paths to PyTorch modules.

    Raises:
      ValueError: the tree contains no adapter, a path has no PyTorch name, two adapters get the
        same name, outputs cannot be divided as ``names`` specifies, or a mask is missing or has
        another size.
    """
    found = pytree.require_adapters(adapters, "adapters", "pass {path: Adapter}")
    by_path = pattern or {}
    pieces: dict[str, dict[int, tuple[LowRankMatrix, tuple[int, int]]]] = {}
    owners: dict[str, ParamLocation] = {}
    for path, adapter in found.items():
        if pattern is not None and path not in by_path:
            raise ValueError(
                f"`masks`: has no mask for {path!r}, only for {', '.join(list(by_path)[:8])}; pass "
                "the masks of these adapters."
            )
        p, lam, q = (np.asarray(leaf) for leaf in jax.device_get(adapter))
        mask = np.array(by_path.get(path, np.ones(lam.shape)), bool)
        if mask.size != lam.size:
            raise ValueError(
                f"`masks[{path!r}]`: has shape {mask.shape}, but lam has {lam.shape}; pass masks "
                "and adapters of the same step, and after compact no masks."
            )
        mask = mask.reshape(lam.shape)
        q = _to_torch(q, kernel_size(adapter))
        if (ratio := known_scale(adapter, path) / scale) != 1:
            wide = np.promote_types(lam.dtype, np.float32)
            lam = (lam.astype(wide) * wide.type(ratio)).astype(lam.dtype)
        for index in np.ndindex(lam.shape[:-1]):
            whole = LowRankMatrix(p[index], lam[index], q[index], mask[index])
            for name, our_part, their_part in names.to_hf(path, index):
                taken = pieces.setdefault(name, {})
                if their_part[0] in taken:
                    raise ValueError(
                        f"`names`: {path!r} and {owners[name].path!r} both become {name!r}; map "
                        "them to different names."
                    )
                owners.setdefault(name, ParamLocation(path, index, our_part))
                taken[their_part[0]] = whole.outputs(_divides(whole, our_part, path)), their_part
    return {name: _side_by_side(name, parts) for name, parts in pieces.items()}, owners


def from_matrices(
    matrices: Mapping[str, LowRankMatrix],
    names: NameMap,
    like: PyTree,
    kernels: Mapping[str, tuple[int, ...]],
    scale: float,
) -> tuple[dict[str, Adapter], dict[str, np.ndarray]]:
    """Convert the increments of PyTorch modules to ``{path: Adapter}`` and ``{path: mask}``.

    The matrices of a stack are padded to the largest rank among them with zero rows whose mask is
    False. A matrix missing from a stack has rank 0.

    Args:
      matrices: the increments by module name.
      names: the map from module names to paths.
      like: a tree of adapters with the expected paths, stacks and sizes (their ranks are ignored);
        None to derive these from the names.
      kernels: kernel sizes of convolutions, by path, where the file contains them.
      scale: the scale of the increments.

    Raises:
      ValueError: a name has no path, or sizes do not fit.
    """
    known = {} if like is None else pytree.adapters(like)
    places = _places(matrices, names) if like is None else _places_like(matrices, names, known)
    adapters, masks = {}, {}
    for path, (stack, by_index) in places.items():
        joined = {index: _joined(path, parts) for index, parts in by_index.items()}
        matrix = _stacked(path, stack, joined) if stack else joined[()]
        ins, outs = matrix.q.shape[-1], matrix.p.shape[-1]
        layout = known[path].layout if path in known else _layout(kernels.get(path), ins, outs)
        size = kernel_size(known[path]) if path in known else kernels.get(path)
        q = _from_torch(matrix.q, size)
        adapters[path] = Adapter(
            *map(as_jax, (matrix.p, matrix.lam, q)), scale=scale, layout=layout
        )
        masks[path] = matrix.mask
    return adapters, masks


_Parts = dict[tuple[int, int], LowRankMatrix]  # by part k of n of the adapter's outputs
_Places = dict[str, tuple[tuple[int, ...], dict[tuple[int, ...], _Parts]]]


def _places(matrices: Mapping[str, LowRankMatrix], names: NameMap) -> _Places:
    """Group the matrices by adapter, as the names determine it."""
    found: dict[str, dict[tuple[int, ...], _Parts]] = {}
    for name, matrix in matrices.items():
        for place, their_part in names.to_flax(name):
            parts = found.setdefault(place.path, {}).setdefault(place.stack_index, {})
            if place.part in parts:
                raise ValueError(
                    f"`names`: {name!r} and another module both become {place.path!r} (stack index "
                    f"{place.stack_index}, part {place.part}); map them to different names."
                )
            parts[place.part] = _rows_of(matrix, their_part, name)
    places: _Places = {}
    for path, by_index in found.items():
        if len({len(index) for index in by_index}) > 1:
            raise ValueError(
                f"`names`: {path!r} would have different numbers of stack axes; map its modules "
                "with the same number of indices."
            )
        stack = tuple(max(axis) + 1 for axis in zip(*by_index))
        if math.prod(stack) > 2 * len(by_index) + 8:
            raise ValueError(
                f"`like=None`: {path!r} would be a stack of {math.prod(stack)} matrices, of which "
                f"the file has {len(by_index)}; pass like=adapters of the model if that is right."
            )
        places[path] = stack, by_index
    return places


def _places_like(
    matrices: Mapping[str, LowRankMatrix], names: NameMap, like: Mapping[str, Adapter]
) -> _Places:
    """Group the matrices by adapter of ``like``; check that all of them are used and fit."""
    places: _Places = {}
    used: set[str] = set()
    for path, adapter in like.items():
        stack, ins, outs = adapter.lam.shape[:-1], adapter.q.shape[-1], adapter.p.shape[-1]
        by_index: dict[tuple[int, ...], _Parts] = {}
        for index in np.ndindex(stack):
            for name, our_part, their_part in names.to_hf(path, index):
                used.add(name)
                if name in matrices:
                    matrix = _rows_of(matrices[name], their_part, name)
                else:
                    matrix = _empty(ins, outs // our_part[1])
                if (matrix.q.shape[1], matrix.p.shape[1] * our_part[1]) != (ins, outs):
                    raise ValueError(
                        f"`like`: {name!r} is for {matrix.q.shape[1]} inputs and "
                        f"{matrix.p.shape[1]} outputs, but {path!r}, of which it is part "
                        f"{our_part[0]} of {our_part[1]}, has {ins} and {outs}; pass the adapters "
                        "of this model."
                    )
                by_index.setdefault(index, {})[our_part] = matrix
        places[path] = stack, by_index
    if over := sorted(set(matrices) - used):
        raise ValueError(
            f"`like`: has no adapter for {', '.join(map(repr, over[:3]))}"
            f"{' ...' if over[3:] else ''}; adapt the model with the file's config, or pass the "
            "names= that belong to this model."
        )
    return places


def _side_by_side(
    name: str, parts: Mapping[int, tuple[LowRankMatrix, tuple[int, int]]]
) -> LowRankMatrix:
    """Combine the increments of parts of a module's outputs: all rows, zero outside their part."""
    (first, (_, count)), *_ = parts.values()
    if count == 1:
        return first
    out = first.p.shape[1]
    rows = []
    for k, (matrix, _) in sorted(parts.items()):
        if matrix.p.shape[1] != out or matrix.q.shape[1] != first.q.shape[1]:
            raise ValueError(
                f"`names`: the parts of {name!r} have different sizes; map layers of equal sizes "
                "to it."
            )
        p = np.zeros((matrix.p.shape[0], count * out), matrix.p.dtype)
        p[:, k * out : (k + 1) * out] = matrix.p
        rows.append(matrix._replace(p=p))
    return _concatenated(rows)


def _rows_of(matrix: LowRankMatrix, part: tuple[int, int], name: str) -> LowRankMatrix:
    """Invert :func:`_side_by_side`: return part k of n of the outputs, with its rows.

    A row that is zero everywhere belongs to the same part as the row before it.
    """
    if part[1] == 1:
        return matrix
    count = _divides(matrix, part, name)[1]
    acts = np.stack([(p != 0).any(axis=1) for p in np.split(matrix.p, count, axis=1)], axis=1)
    for row in range(len(acts)):
        if not acts[row].any():
            acts[row] = acts[row - 1] if row else np.arange(count) == 0
    rows = acts[:, part[0]]
    return LowRankMatrix(*(leaf[rows] for leaf in matrix.outputs(part)))


def _joined(path: str, parts: _Parts) -> LowRankMatrix:
    """Return the matrix whose outputs are the concatenated outputs of the parts.

    If all parts share q, λ and the mask, it has the same number of rows as each part, which
    restores a matrix that was split; otherwise it has the rows of all parts, each zero outside its
    part.
    """
    count = next(iter(parts))[1]
    if any(part[1] != count for part in parts):
        raise ValueError(
            f"`names`: {path!r} is divided into different numbers of parts; divide it into the "
            "same number in every pair."
        )
    if count == 1:
        return next(iter(parts.values()))
    first = next(iter(parts.values()))
    empty = _empty(first.q.shape[1], first.p.shape[1])
    ordered = [parts.get((k, count), empty) for k in range(count)]
    same = all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for matrix in ordered
        for a, b in zip(matrix[1:], first[1:])
    )
    if same and all(matrix.p.shape == first.p.shape for matrix in ordered):
        return first._replace(p=np.concatenate([matrix.p for matrix in ordered], axis=1))
    return _side_by_side(path, {k: (matrix, (k, count)) for k, matrix in enumerate(ordered)})


def _stacked(
    path: str, stack: tuple[int, ...], found: Mapping[tuple[int, ...], LowRankMatrix]
) -> LowRankMatrix:
    """Stack the matrices into one array per factor, each zero-padded to the largest rank."""
    some = list(found.values())
    ins, outs = some[0].q.shape[1], some[0].p.shape[1]
    if any((m.q.shape[1], m.p.shape[1]) != (ins, outs) for m in some):
        raise ValueError(
            f"`names`: the matrices of the stack {path!r} have different sizes; map them to "
            "separate paths."
        )
    rank = max(len(m.lam) for m in some)
    width = ins + outs + 1
    needed, stored = math.prod(stack) * rank * width, sum(len(m.lam) for m in some) * width
    if needed > _MAX_PADDING * stored + _SMALL:
        raise ValueError(
            f"`names`: the stack {path!r} would need {needed} numbers, of which the file has "
            f"{stored}, because its ranks are too different for one array; map its matrices to "
            "separate paths."
        )

    def dtype(i: int) -> np.dtype:
        return _common([m[i].dtype for m in some if len(m.lam)] or [some[0][i].dtype])

    result = LowRankMatrix(
        np.zeros((*stack, rank, outs), dtype(0)),
        np.zeros((*stack, rank), dtype(1)),
        np.zeros((*stack, rank, ins), dtype(2)),
        np.zeros((*stack, rank), bool),
    )
    for index, matrix in found.items():
        for whole, leaf in zip(result, matrix):
            whole[(*index, slice(len(leaf)))] = leaf
    return result


def _concatenated(rows: Sequence[LowRankMatrix]) -> LowRankMatrix:
    rows = [matrix for matrix in rows if len(matrix.lam)] or list(rows[:1])
    dtypes = [_common([m[i].dtype for m in rows]) for i in range(4)]
    return LowRankMatrix(*(np.concatenate(c).astype(d) for c, d in zip(zip(*rows), dtypes)))


def _common(dtypes: Sequence[np.dtype]) -> np.dtype:
    """Return one dtype that represents the values of all dtypes exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _empty(ins: int, outs: int) -> LowRankMatrix:
    def none(*shape: int) -> np.ndarray:
        return np.zeros((0, *shape), np.float32)

    return LowRankMatrix(none(outs), none(), none(ins), np.zeros(0, bool))


def _divides(matrix: LowRankMatrix, part: tuple[int, int], name: str) -> tuple[int, int]:
    if matrix.p.shape[1] % part[1]:
        raise ValueError(
            f"`names`: {name!r} has {matrix.p.shape[1]} outputs, which are not {part[1]} equal "
            "parts; change the parts."
        )
    return part


def kernel_size(adapter: Adapter) -> tuple[int, ...] | None:
    """Return the kernel size of a convolution's adapter; None for other layers."""
    layout = adapter.layout
    if layout is None or layout.kind != "conv" or layout.shape is None:
        return None
    own = layout.shape[len(layout.shape) - layout.ndim :]
    return tuple(own[axis] for axis in layout.ins[:-1])


def _layout(size: tuple[int, ...] | None, ins: int, outs: int) -> Layout:
    """Return the layout of a weight of which only the PyTorch module's sizes are known."""
    if size is None:
        return Layout(kind="unknown")
    axes = len(size)
    shape = (*size, ins // math.prod(size), outs)
    return Layout("kernel", tuple(range(axes + 1)), (axes + 1,), kind="conv", shape=shape)


def _to_torch(q: np.ndarray, size: tuple[int, ...] | None) -> np.ndarray:
    """Reorder a convolution's inputs ``[*kernel, in]`` to PyTorch's ``[in, *kernel]``."""
    if not size:
        return q
    q = q.reshape(*q.shape[:-1], *size, -1)
    return np.moveaxis(q, -1, -1 - len(size)).reshape(*q.shape[: -1 - len(size)], -1)


def _from_torch(q: np.ndarray, size: tuple[int, ...] | None) -> np.ndarray:
    if not size:
        return q
    ins = q.shape[-1] // math.prod(size)
    q = q.reshape(*q.shape[:-1], ins, *size)
    return np.moveaxis(q, -1 - len(size), -1).reshape(*q.shape[: -1 - len(size)], -1)


def as_jax(array: np.ndarray) -> jax.Array:
    """Convert an array to JAX without changing its dtype.

    Raises:
      ValueError: JAX would round the array, because 64-bit types are disabled.
    """
    if array.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "`jax_enable_x64=False`: makes JAX round the file's float64 numbers to float32; call "
            "jax.config.update('jax_enable_x64', True) first."
        )
    return jnp.asarray(array)
