"""Analysis of a traced model: weights used as stored, transformed, or outside of their layers.

An increment ``ΔW`` may be added to a stored weight only if the layer multiplies with that weight,
adds nothing that depends on it, and nothing else in the model reads it. A jaxpr shows this. While
the model is traced, each layer's call runs under a name (:func:`scope_name`) and its output passes
through a marker of that name; :func:`find_uses` follows every weight from the program's inputs to
those markers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

if TYPE_CHECKING:
    from adalora_jax._src.core.pytree import PyTree

_NAME = re.compile(r"adalora:(\d+):")
_PROBE = re.compile(r"adalora-probe:(\d+):")
_INPUTS = re.compile(r"adalora-input:(\d+):")
# Primitives that change neither the entries nor their positions.
PASSING = {
    "convert_element_type",
    "copy",
    "copy_p",
    "layout_constraint",
    "mesh_cast",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
}
# Primitives that move the entries.
_MOVING = {
    "broadcast_in_dim",
    "dynamic_slice",
    "expand_dims",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
}
_PADDING = {"concatenate", "pad"}
_PRODUCTS = {"conv_general_dilated", "dot_general", "gather"}
_SUMS = {"add", "add_any", "cumsum", "psum", "psum_invariant", "reduce_sum"}
_CONTRACTIONS = {*_PRODUCTS, "ragged_dot", "ragged_dot_general", "sort", "top_k"}

# Stages of a value: the weight itself, derived from it, or the layer's product with it.
_RAW, _CHANGED, _PRODUCT = "raw", "changed", "product"
# The stage of a marked layer input.
_INPUT = "input"


class Use(NamedTuple):
    """The use of one weight.

    Attributes:
      transformed: its layer multiplies with a value derived from it.
      output_transformed: its layer does more to the product than adding to it.
      read_outside: code outside of its layer reads it.
      untraced: the layer could not be traced, so the other three are unknown.
    """

    transformed: bool
    output_transformed: bool
    read_outside: bool
    untraced: bool = False


def scope_name(index: int) -> str:
    """Return the name under which the layer of a weight is traced.

    >>> scope_name(3)
    'adalora:3:'
    """
    return f"adalora:{index}:"


def probe_name(index: int) -> str:
    """Return the name of the marker on a layer's probe, see :func:`find_uses`.

    >>> probe_name(3)
    'adalora-probe:3:'
    """
    return f"adalora-probe:{index}:"


def mark_output(index: int, output: PyTree) -> PyTree:
    """Return a layer's output with the marker that ends the layer for :func:`find_uses`."""
    return _named(scope_name(index), output)


def mark_input(index: int, x: PyTree) -> PyTree:
    """Return a layer's input with a marker for :func:`find_uses`.

    Used for classes that are not Flax layers: their adapter sees the input itself, so a layer that
    multiplies its weight with any other value counts as ``output_transformed``.
    """
    return _named(f"adalora-input:{index}:", x)


def _named(name: str, tree: PyTree) -> PyTree:
    def is_float(leaf: PyTree) -> bool:
        return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)

    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name) if is_float(leaf) else leaf, tree)


def find_uses(
    jaxpr: core.Jaxpr, weights: Mapping[int, int], scaled: frozenset[int] = frozenset()
) -> dict[int, Use]:
    """Return how each weight of a traced program is used.

    Args:
      jaxpr: the traced program.
      weights: ``{position among the inputs: index of the weight}``. An input may also be a probe,
        which no layer computes with: it counts as transformed if its layer sees another value.
      scaled: indices of the weights that their layers multiply by a known constant.
    """
    walk = _Walk(scaled)
    tags = [
        frozenset({(weights[i], _RAW)}) if i in weights else frozenset()
        for i in range(len(jaxpr.invars))
    ]
    walk.run(jaxpr, tags, None)
    return {
        index: Use(
            index in walk.transformed,
            index in walk.output_transformed,
            index in walk.outside and index not in walk.transformed,
        )
        for index in weights.values()
    }


_Tags = frozenset[tuple[int, str]]
_NONE: _Tags = frozenset()


class _Walk:
    """A single pass over a program that tracks the stages of all weights."""

    def __init__(self, scaled: frozenset[int]) -> None:
        self.scaled = scaled
        self.transformed: set[int] = set()
        self.output_transformed: set[int] = set()
        self.outside: set[int] = set()
        self.marked: set[int] = set()

    def run(self, jaxpr: core.Jaxpr, given: Sequence[_Tags], scope: int | None) -> list[_Tags]:
        """Return the tags of a jaxpr's outputs, given those of its inputs."""
        tags: dict[Any, _Tags] = dict(zip(jaxpr.invars, given))

        def read(v: core.Var | core.Literal) -> _Tags:
            return _NONE if isinstance(v, core.Literal) else tags.get(v, _NONE)

        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            marks = eqn.primitive.name == "name" and _INPUTS.fullmatch(eqn.params["name"])
            if any(inputs) or marks:
                names = _NAME.findall(str(eqn.source_info.name_stack))
                inner = int(names[-1]) if names else scope
                outputs = self.equation(eqn, inputs, inner)
                tags.update((v, t) for v, t in zip(eqn.outvars, outputs) if t)
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, inputs: list[_Tags], scope: int | None) -> list[_Tags]:
        primitive, count = eqn.primitive.name, len(eqn.outvars)
        if primitive == "scan":
            return self.run(eqn.params["jaxpr"].jaxpr, inputs, scope)
        if primitive == "cond":
            branches = [self.run(b.jaxpr, inputs[1:], scope) for b in eqn.params["branches"]]
            return [frozenset().union(*tags) for tags in zip(*branches)]
        if primitive == "while":
            skip = eqn.params["cond_nconsts"]
            return self.run(eqn.params["body_jaxpr"].jaxpr, inputs[skip:], scope)[-count:]
        if (called := called_jaxpr(eqn)) is not None:
            return self.run(called, inputs, scope)
        if primitive == "name" and (mark := _NAME.fullmatch(eqn.params["name"])):
            index = int(mark[1])  # the layer ends here, so stop tracking its weight
            return [frozenset((i, s) for i, s in inputs[0] if i != index)]
        if primitive == "name" and (mark := _INPUTS.fullmatch(eqn.params["name"])):
            self.marked.add(int(mark[1]))
            return [inputs[0] | {(int(mark[1]), _INPUT)}]
        if primitive == "name" and (probe := _PROBE.fullmatch(eqn.params["name"])):
            if (int(probe[1]), _RAW) not in inputs[0]:
                self.transformed.add(int(probe[1]))
            return [_NONE]
        result: set[tuple[int, str]] = set()
        for index in {i for tags in inputs for i, _ in tags}:
            stages = [{s for i, s in tags if i == index} for tags in inputs]
            if stage := self.stage(eqn, stages, index, scope == index):
                result.add((index, stage))
        return [frozenset(result)] * count

    def stage(
        self, eqn: core.JaxprEqn, inputs: list[set[str]], index: int, inside: bool
    ) -> str | None:
        """Return the stage of an operation's result for one weight, and record the weight's use."""
        primitive, given = eqn.primitive.name, inputs
        inputs = [stages - {_INPUT} for stages in given]
        seen = set().union(*inputs)
        if not seen:
            return _INPUT if primitive in PASSING | _MOVING | _PADDING else None
        if primitive in PASSING or (primitive in _MOVING and inside and seen != {_CHANGED}):
            return next(stage for stage in (_PRODUCT, _CHANGED, _RAW) if stage in seen)
        times_constant = primitive in ("mul", "div") and any(
            not stages and _size(v) == 1 for stages, v in zip(inputs, eqn.invars)
        )
        if inside and index in self.scaled and times_constant:
            return next(iter(seen))
        if not inside:
            if _RAW in seen:
                self.outside.add(index)
            if _PRODUCT in seen:  # the product left its layer without passing the marker
                self.output_transformed.add(index)
            return None if primitive in _CONTRACTIONS or seen == {_PRODUCT} else _CHANGED
        if primitive in _PRODUCTS and sum(map(bool, inputs)) == 1 and seen != {_PRODUCT}:
            if _CHANGED in seen:
                self.transformed.add(index)
            if index in self.marked and not any(stages == {_INPUT} for stages in given):
                self.output_transformed.add(index)
            return _PRODUCT
        if seen == {_PRODUCT}:
            first = bool(inputs[0]) and primitive == "sub"
            if primitive not in _SUMS and not first:
                self.output_transformed.add(index)
            return _PRODUCT
        if primitive in _CONTRACTIONS:  # both operands depend on the weight
            self.transformed.add(index)
            return _PRODUCT
        return _CHANGED


def _size(variable: core.Var | core.Literal) -> int:
    return getattr(variable.aval, "size", 1)


def is_float(variable: core.Var | core.Literal) -> bool:
    """Return whether a variable of a jaxpr is a float of at least 16 bits.

    A conversion of a weight to any other dtype is a quantisation.
    """
    aval: Any = variable.aval
    return jnp.issubdtype(aval.dtype, jnp.floating) and jnp.finfo(aval.dtype).bits >= 16


def called_jaxpr(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """Return the jaxpr that a call-like operation runs on its inputs; None for other operations."""
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns") and len(jaxpr.invars) == len(eqn.invars):
            return jaxpr
    return None
