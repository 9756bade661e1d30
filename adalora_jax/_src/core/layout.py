"""Layouts: the axes of a weight that are stacked, that the layer sums over, and that it outputs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Array, Shaped

KINDS = ("dense", "general", "einsum", "embed", "conv", "weight", "unknown")
# The default axes. Axes that are these objects were not given, so an equation determines them.
_INS, _OUTS, _STACK = (0,), (1,), ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Roles of the axes of a layer's weight; hashable, so static under ``jax.jit``.

    A weight with any number of axes is read as a stack of matrices ``[in, out]``. Axes are numbered
    within the layer's own weight, without the leading axes that a lifted transform adds.

    Attributes:
      weight: str, default ``"kernel"``: name of the parameter in its module.
      ins: tuple of ints, default ``(0,)``: axes that the layer sums over, in order.
      outs: tuple of ints, default ``(1,)``: axes that appear in the layer's output, in order.
      stack: tuple of ints, default ``()``: axes that index separate matrices.
      kind: str, default ``"dense"``: the layer's computation. ``"dense"`` (``y = x W`` over the
        last axes of x), ``"general"`` (DenseGeneral), ``"einsum"``, ``"embed"`` (a look-up),
        ``"conv"``, ``"weight"`` (a module that returns its weight), or ``"unknown"`` (read from a
        file that does not specify it).
      shape: tuple of ints: shape of the whole weight, stacked axes included. None (default): not
        known.
      note: str: the reason why an increment cannot be added to this weight; empty (default) where
        it can.
      equation: str: the layer's einsum, such as ``"...d,df->...f"``, with the weight second. It
        determines ``ins``, ``outs`` and ``stack``, and makes the layout's kind ``"einsum"``. A
        label in both operands and in the output, such as that of experts, is a stack axis. Empty
        (default): not given.

    Raises:
      ValueError: ``kind`` is unknown; ``ins``, ``outs`` and ``stack`` do not name every axis
        once, or ``ins`` or ``outs`` is empty; ``equation`` does not determine the axes, or axes
        or a kind that contradict it are given; or ``weight`` is empty.

    >>> Layout("w", equation="ecd,edf->ecf").stack
    (0,)
    >>> Layout("kernel", ins=(0, 1), outs=(2,), kind="conv", shape=(3, 2, 4)).matrix((3, 2, 4))
    ((), 6, 4)
    """

    weight: str = "kernel"
    ins: tuple[int, ...] = _INS
    outs: tuple[int, ...] = _OUTS
    stack: tuple[int, ...] = _STACK
    kind: str = "dense"
    shape: tuple[int, ...] | None = None
    note: str = ""
    equation: str = ""

    def __post_init__(self) -> None:
        if not self.weight:
            raise ValueError(
                f"`weight={self.weight!r}`: is not the name of a parameter; name the one that the "
                "layer multiplies with."
            )
        if self.equation:
            self._set_axes()
        if self.kind not in KINDS:
            raise ValueError(
                f"`kind={self.kind!r}`: must be one of {', '.join(KINDS)}; pass one of these."
            )
        for name in ("ins", "outs", "stack"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        axes = sorted((*self.stack, *self.ins, *self.outs))
        if not self.ins or not self.outs or axes != list(range(len(axes))):
            raise ValueError(
                f"`ins={self.ins}`: together with outs={self.outs} and stack={self.stack} it must "
                "name every axis of the weight once; number the axes from 0, and name at least one "
                "in ins and one in outs."
            )
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))

    def _set_axes(self) -> None:
        """Set axes and kind to those of the equation."""
        if problem := equation_problem(self.equation):
            raise ValueError(
                f"`equation={self.equation!r}`: {problem}; write the product as one sum over axes "
                "of input and weight, such as '...d,df->...f', with the weight second."
            )
        defaults = {"stack": _STACK, "ins": _INS, "outs": _OUTS}
        for name, axes in zip(defaults, weight_axes(self.equation) or ()):
            given = getattr(self, name)
            if given is not defaults[name] and tuple(given) != axes:
                raise ValueError(
                    f"`{name}={given}`: contradicts equation={self.equation!r}, which has {axes}; "
                    f"leave {name} out."
                )
            object.__setattr__(self, name, axes)
        if self.kind not in ("dense", "einsum"):
            raise ValueError(
                f"`kind={self.kind!r}`: contradicts equation={self.equation!r}; leave kind out."
            )
        object.__setattr__(self, "kind", "einsum")

    @property
    def ndim(self) -> int:
        """Number of axes of the layer's own weight, without those of a lifted transform.

        >>> Layout(ins=(0, 1), outs=(2,), kind="conv").ndim
        3
        """
        return len(self.stack) + len(self.ins) + len(self.outs)

    def same_axes(self, other: Layout) -> bool:
        """Return whether both layouts have the same stack, input and output axes.

        Args:
          other: a layout of any kind.

        Returns:
          True if ``stack``, ``ins`` and ``outs`` are equal; the other fields do not count.

        >>> Layout("kernel").same_axes(Layout("w", kind="einsum"))
        True
        """

        def axes(layout: Layout) -> tuple[tuple[int, ...], ...]:
            return (layout.stack, layout.ins, layout.outs)

        return axes(self) == axes(other)

    def matrix(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """Return ``(stack, in, out)`` for a weight of this shape.

        Extra leading axes, those of lifted transforms, come first in ``stack``.

        Args:
          shape: shape of the weight.

        Returns:
          A tuple of the shape of the stack, which is ``()`` for a single matrix, and of the sizes
          ``in`` and ``out``, each the product of the sizes of its axes.

        >>> Layout().matrix((12, 64, 256))
        ((12,), 64, 256)
        """
        lifted, sizes = self._split(shape)

        def size(axes: tuple[int, ...]) -> int:
            return math.prod(sizes[axis] for axis in axes)

        return (*lifted, *(sizes[axis] for axis in self.stack)), size(self.ins), size(self.outs)

    def to_weight(
        self, delta: Shaped[Array, "... in out"], shape: Sequence[int]
    ) -> Shaped[Array, "..."]:
        """Return ``delta [*stack, in, out]`` with the axes of a weight of the given shape.

        Args:
          delta: ``[*stack, in, out]`` of any dtype, such as an increment.
          shape: shape of the weight.

        Returns:
          An array of shape ``shape`` and of the dtype of ``delta``.

        >>> import jax.numpy as jnp
        >>> layout = Layout(ins=(0, 1), outs=(2,), kind="conv")
        >>> layout.to_weight(jnp.zeros((6, 4)), (3, 2, 4)).shape
        (3, 2, 4)
        """
        lifted, sizes = self._split(shape)
        order = (*self.stack, *self.ins, *self.outs)
        delta = delta.reshape(*lifted, *(sizes[axis] for axis in order))
        inverse = [len(lifted) + order.index(axis) for axis in range(len(sizes))]
        return delta.transpose(*range(len(lifted)), *inverse)

    def to_matrix(self, weight: Shaped[Array, "..."]) -> Shaped[Array, "... in out"]:
        """Return a weight as ``[*stack, in, out]``, the inverse of :meth:`to_weight`.

        Args:
          weight: the layer's weight, of any dtype; axes of lifted transforms come first.

        Returns:
          ``[*stack, in, out]``, in the dtype of ``weight``.

        >>> import jax.numpy as jnp
        >>> Layout(ins=(0, 1), outs=(2,), kind="conv").to_matrix(jnp.zeros((3, 2, 4))).shape
        (6, 4)
        """
        stack, *sizes = self.matrix(weight.shape)
        lifted = weight.ndim - self.ndim
        order = [lifted + axis for axis in (*self.stack, *self.ins, *self.outs)]
        return weight.transpose(*range(lifted), *order).reshape(*stack, *sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values.

        Returns:
          ``{field: value}`` of all fields, with lists in place of tuples.

        >>> Layout.from_dict(Layout("w", shape=(2, 3)).to_dict()) == Layout("w", shape=(2, 3))
        True
        """

        def as_list(value: object) -> object:
            return list(value) if isinstance(value, tuple) else value

        return {name: as_list(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Layout:
        """Return the layout that :meth:`to_dict` wrote.

        Args:
          values: the result of :meth:`to_dict`, also after a passage through JSON.

        Returns:
          The layout, validated like a new one.

        Raises:
          ValueError: a field is missing, unknown, of another type or invalid.

        >>> Layout.from_dict(Layout("w", ins=(1,), outs=(0,)).to_dict()).ins
        (1,)
        """
        fields = {field.name for field in dataclasses.fields(cls)}

        def is_axes(value: object) -> bool:
            return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

        values = {"equation": "", **values}
        texts = ("weight", "kind", "note", "equation")
        well_formed = set(values) == fields and all(
            isinstance(value, str)
            if name in texts
            else is_axes(value) or (name == "shape" and value is None)
            for name, value in values.items()
        )
        if not well_formed:
            raise ValueError(
                f"`values={dict(values)!r:.200}`: was not written by Layout.to_dict; pass "
                "its result."
            )

        def as_tuple(value: object) -> object:
            return tuple(value) if isinstance(value, list) else value

        arguments: dict[str, Any] = {name: as_tuple(value) for name, value in values.items()}
        return cls(**arguments)

    def _split(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(shape[: len(shape) - self.ndim]), tuple(shape[len(shape) - self.ndim :])


def operands(equation: str) -> tuple[list[str], str]:
    """Return the labels of an equation's operands and of its output.

    >>> operands("...d, df -> ...f")
    (['...d', 'df'], '...f')
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    return inputs.split(","), output


def equation_problem(equation: str) -> str:
    """Return why an equation does not determine the matrices of its weight; empty if it does.

    >>> equation_problem("...d,df->...f"), equation_problem("bd,df->b")
    ('', "the label 'f' of the weight is neither in the input nor in the output")
    """
    inputs, ys = operands(equation)
    if len(inputs) != 2 or not all(inputs) or not ys:
        return "it is not of the form 'input,weight->output'"
    xs, ws = inputs
    if "..." in ws:
        return "the weight has '...'"
    if ("..." in xs) != ("..." in ys):
        return "'...' is in only one of input and output"
    _, ins, outs = _roles(xs, ws, ys)
    xs, ys = xs.replace("...", "", 1), ys.replace("...", "", 1)
    for name, labels in (("input", xs), ("weight", ws), ("output", ys)):
        if not all(label.isalpha() for label in labels):
            return f"the labels {labels!r} of the {name} are not letters"
        if repeated := [label for label, n in Counter(labels).items() if n > 1]:
            return f"the label {repeated[0]!r} is repeated in the {name}"
    for name, labels, other in (("input", xs, ws), ("weight", ws, xs)):
        if alone := [label for label in labels if label not in other + ys]:
            place = "weight" if name == "input" else "input"
            return (
                f"the label {alone[0]!r} of the {name} is neither in the {place} nor in the output"
            )
    if unknown := [label for label in ys if label not in xs + ws]:
        return f"the label {unknown[0]!r} of the output is in neither operand"
    if not ins:
        return "it sums over no label of the weight"
    return "" if outs else "no label of the output is the weight's alone"


def _roles(xs: str, ws: str, ys: str) -> tuple[str, str, str]:
    """Return the weight's stack, input and output labels.

    A label in all three operands is a stack label. So are equal leading labels of weight and
    output that are not in the input: such a weight holds one matrix for each of several outputs.

    >>> _roles("BSD", "CKDH", "CBSKH")
    ('C', 'D', 'KH')
    """
    stack = [a for a in ws if a in xs and a in ys]
    for w, y in zip(ws, ys):
        if w != y or w in xs:
            break
        stack.append(w)
    stack = "".join(a for a in ws if a in stack)
    ins = "".join(a for a in ws if a in xs and a not in ys)
    return stack, ins, "".join(a for a in ws if a not in stack and a not in ins)


def weight_axes(equation: str) -> tuple[tuple[int, ...], ...] | None:
    """Return the weight's stack, in and out axes; None if the equation is not a sum of x W.

    >>> weight_axes("ecd,edf->ecf")
    ((0,), (1,), (2,))
    """
    if equation_problem(equation):
        return None
    (xs, ws), ys = operands(equation)
    return tuple(tuple(ws.index(a) for a in role) for role in _roles(xs, ws, ys))
