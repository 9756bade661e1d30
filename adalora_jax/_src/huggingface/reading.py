"""Conversion of a checkpoint's tensors to the parameters of a Flax model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from adalora_jax._src.core.layout import Layout
from adalora_jax._src.huggingface.names import NameMap
from adalora_jax._src.huggingface.weights import Weights
from adalora_jax._src.tensorfile import FLOATS

_BIASES = ("bias", "b")
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "shared",
)  # modules that a head may be tied to
HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|cls\.predictions\.decoder)\.weight")
_OLD = {".weight": ".gamma", ".bias": ".beta"}  # names in the first BERT checkpoints


class TensorSlice(NamedTuple):
    """Part k of n of a tensor's outputs, which is part i of m of a parameter's outputs."""

    key: str  # the tensor's name
    param_part: tuple[int, int]  # (i, m)
    tensor_part: tuple[int, int]  # (k, n)


class ParamReading(NamedTuple):
    """The source tensors of a parameter and the roles of its axes."""

    shape: tuple[int, ...]
    stack: tuple[int, ...]  # axes that index slices
    ins: tuple[int, ...] | None  # axes that a layer sums over; None if it is not a layer's weight
    outs: tuple[int, ...]  # the layer's output axes; all axes but the stack's if ins is None
    slices: dict[tuple[int, ...], list[TensorSlice]]  # by the index on the stack
    transposed: frozenset[str]  # the tensors that are [out, in]

    def value(self, index: tuple[int, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Return the slice at ``index``, with axes of length 1 for the stack.

        Args:
          index: the index on the stack axes.
          read: function that returns a tensor by its name.
        """
        parts = []
        for key, _, (part, count) in self.slices[index]:
            array = read(key)
            if self.ins is not None:
                array = _as_matrix(array, key in self.transposed)
            parts.append(array if count == 1 else np.split(array, count, axis=-1)[part])
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        order = (*(self.ins or ()), *self.outs)
        whole = whole.reshape([self.shape[axis] for axis in order])
        whole = whole.transpose(np.argsort(order))
        return np.expand_dims(whole, self.stack)


class ParamSource(NamedTuple):
    """A checkpoint and the map between its names and the model's."""

    weights: Weights
    names: NameMap

    def reading(self, path: str, shape: Sequence[int], layer: Layout | None) -> ParamReading | str:
        """Return the reading of a parameter, or the name of a missing tensor.

        Args:
          path: path of the parameter.
          shape: its shape, stacked axes included.
          layer: its layout; None if that is not known.

        Returns:
          The :class:`ParamReading`, or the missing tensor's name, which is empty if ``names`` does
          not map the path.

        Raises:
          ValueError: the tensors exist, but their shapes or dtypes do not fit.
        """
        expected = ""
        for stack in _stacks(len(shape), layer):
            slices: dict[tuple[int, ...], list[TensorSlice]] = {}
            for index in np.ndindex(*(shape[axis] for axis in stack)):
                pieces, looked_for = self._pieces(path, index)
                if not pieces:
                    expected = looked_for if slices else expected or looked_for
                    break
                slices[index] = pieces
            else:
                return self._reading(path, tuple(shape), layer, stack, slices)
        return expected

    def _pieces(self, path: str, index: tuple[int, ...]) -> tuple[list[TensorSlice], str]:
        """Return the pieces of a slice; if a tensor is missing, no pieces and its expected name."""
        module, _, last = path.rpartition("/")
        end = ".bias" if last in _BIASES else ".weight"
        ways = [
            [(f"{name}{end}", param_part, tensor_part) for name, param_part, tensor_part in way]
            for of, ends in ((module, (end, _OLD[end])), (path, ("", end)))
            if (way := self.names.match(of, index))
            for end in ends
        ]

        def exactly(key: str) -> str | None:
            return key if key in self.weights.specs else None

        for find in (exactly, self.weights.find, self._tied):
            for way in ways:
                pieces = [
                    TensorSlice(find(key) or "", param_part, tensor_part)
                    for key, param_part, tensor_part in way
                ]
                if all(piece.key for piece in pieces):
                    return pieces, ""
        return [], ways[0][0][0] if ways else ""

    def _tied(self, key: str) -> str | None:
        """Return the embedding that is stored in place of the weight ``key`` of a tied head."""
        config = self.weights.config or {"tie_word_embeddings": False}
        ties = config.get("tie_word_embeddings", True)  # True is the default in transformers

        def last(name: str) -> str:
            return name.removesuffix(".weight").rpartition(".")[2]

        same = [name for name in self.weights.specs if last(name) in EMBEDDINGS]
        return same[0] if ties and len(same) == 1 and HEAD.fullmatch(key) else None

    def _reading(
        self,
        path: str,
        shape: tuple[int, ...],
        layer: Layout | None,
        stack: tuple[int, ...],
        slices: dict[tuple[int, ...], list[TensorSlice]],
    ) -> ParamReading:
        keys = {piece.key for pieces in slices.values() for piece in pieces}
        for key in sorted(keys):
            if self.weights.specs[key].dtype not in FLOATS:
                raise ValueError(
                    f"`directory`: {key!r}, for {path!r}, has dtype "
                    f"{self.weights.specs[key].dtype}, but only {', '.join(FLOATS)} can be "
                    "computed with; convert or dequantise it first."
                )
        matrix_axes = tuple(axis for axis in range(len(shape)) if axis not in stack)
        if layer is None and path.rpartition("/")[2] != "kernel":
            for pieces in slices.values():
                self._check_plain(path, shape, matrix_axes, pieces)
            return ParamReading(shape, stack, None, matrix_axes, slices, frozenset())
        if layer is None:
            ways = [(matrix_axes[:n], matrix_axes[n:]) for n in range(len(matrix_axes) + 1)]
        else:
            lifted = len(shape) - len(layer.stack) - len(layer.ins) - len(layer.outs)
            ways = [tuple(tuple(lifted + a for a in axes) for axes in (layer.ins, layer.outs))]
        transposed = frozenset(key for key in keys if self._is_transposed(key, layer))

        def size(axes: tuple[int, ...]) -> int:
            return math.prod(shape[axis] for axis in axes)

        for pieces in slices.values():
            sizes = [self._sizes(piece, piece.key in transposed) for piece in pieces]
            ins, outs = sizes[0][0], sum(outs for _, outs in sizes)
            same = all(other == ins for other, _ in sizes)
            ways = [way for way in ways if same and (size(way[0]), size(way[1])) == (ins, outs)]
            if not ways:
                raise ValueError(self._misfit(path, shape, pieces, f"{ins} inputs, {outs} outputs"))
        ins, outs = ways[0]
        return ParamReading(shape, stack, ins, outs, slices, transposed)

    def _is_transposed(self, key: str, layer: Layout | None) -> bool:
        """Return whether a weight is ``[out, in]``: True except for embeddings and Conv1D."""
        module = key.removesuffix(".weight")
        conv1d = self.names.is_conv1d(module) or bool(self.weights.conv1d([module]))
        return not conv1d and (layer is None or layer.kind != "embed")

    def _sizes(self, piece: TensorSlice, transposed: bool) -> tuple[int, int]:
        """Return the numbers of inputs and outputs of a piece."""
        first, *rest = self.weights.specs[piece.key].shape or (1,)
        ins, outs = (math.prod(rest), first) if transposed else (first, math.prod(rest))
        if outs % piece.tensor_part[1]:
            raise ValueError(
                f"`names`: {piece.key!r} has {outs} outputs, which are not "
                f"{piece.tensor_part[1]} equal parts; change the parts."
            )
        return ins, outs // piece.tensor_part[1]

    def _check_plain(
        self,
        path: str,
        shape: tuple[int, ...],
        matrix_axes: tuple[int, ...],
        pieces: list[TensorSlice],
    ) -> None:
        """Raise unless the tensors hold the parameter's numbers in the parameter's order."""
        shapes = [self.weights.specs[piece.key].shape for piece in pieces]
        divided = any(piece.tensor_part[1] > 1 for piece in pieces) or len(pieces) > 1
        if all(len(shape) <= 1 for shape in shapes):
            numbers = sum(math.prod(s) // piece.tensor_part[1] for s, piece in zip(shapes, pieces))
            if numbers != math.prod(shape[axis] for axis in matrix_axes):
                raise ValueError(self._misfit(path, shape, pieces, f"{numbers} numbers"))
            return

        def short(sizes: Iterable[int]) -> list[int]:
            return [size for size in sizes if size != 1]

        module, _, end = pieces[0].key.rpartition(".")
        last = module.rpartition(".")[2]
        embeds = "embed" in f"{last}/{path.rpartition('/')[2]}" or last in (*EMBEDDINGS, "wpe")
        if end == "weight" and len(short(shapes[0])) > 1 and not embeds:
            raise ValueError(
                f"`equations`: the input axes of {path!r} {list(shape)} are not known, and "
                f"{pieces[0].key!r} {list(shapes[0])} may have to be transposed; pass the inputs "
                f"of the linen model as *args, or equations={{{path!r}: ...}}."
            )
        if divided or short(shapes[0]) != short(shape[axis] for axis in matrix_axes):
            raise ValueError(self._misfit(path, shape, pieces, "numbers in this order"))

    def _misfit(
        self, path: str, shape: tuple[int, ...], pieces: list[TensorSlice], what: str
    ) -> str:
        tensors = " and ".join(
            f"{piece.key!r} {list(self.weights.specs[piece.key].shape)}" for piece in pieces
        )
        return (
            f"`model`: {path!r} of shape {list(shape)} does not fit {tensors} ({what}); make the "
            "model in this checkpoint's sizes, or map other names with names=."
        )


def _stacks(axes: int, layer: Layout | None) -> list[tuple[int, ...]]:
    """Return the candidates for the stack axes: the layer's, or any number of leading axes."""
    if layer is None:
        return [tuple(range(count)) for count in range(axes + 1)]
    lifted = axes - len(layer.stack) - len(layer.ins) - len(layer.outs)
    return [(*range(lifted), *(lifted + axis for axis in layer.stack))]


def _as_matrix(array: np.ndarray, transposed: bool) -> np.ndarray:
    """Return a weight as ``[in, out]``; inputs of a convolution are ordered ``[*kernel, in]``.

    >>> _as_matrix(np.zeros((4, 3, 5, 5)), True).shape
    (75, 4)
    """
    if not transposed:
        return array.reshape(len(array), -1)
    return array.transpose(*range(2, array.ndim), 1, 0).reshape(-1, len(array))
