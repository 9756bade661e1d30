"""Adapted NNX layers: their adapters and their classes."""

from __future__ import annotations

import contextvars
import copyreg
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
from flax import nnx

from adalora_jax._src import _compat
from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import explicit_sharding, spec_of_type
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import foreign, layers
from adalora_jax._src.modules.nnx_variables import (
    NO_EAGER_SHARDING,
    AdapterParam,
    is_weight,
)


class Adaptation(nnx.Module):
    """Child module of a layer that holds its adapter.

    Attributes:
      p: left singular vectors ``[*stack, r, out]``, see :class:`adalora_jax.Adapter`.
      lam: singular values ``[*stack, r]``.
      q: right singular vectors ``[*stack, r, in]``.
      scale: the factor s of the increment.
      layout: the layout of the layer's weight.
      dropout: dropout of the adapter's input, or None. Only its rate, random numbers and mode are
        used; the adapter computes the mask itself.
      forward_mode: as in the config.
      declared: whether the user declared the layout for the layer's class, or it is known by the
        class's name.
    """

    # Computes the adapter output, with the arguments of layers.adapter_output.
    # Private, because nnx.tabulate wraps public methods to print their inputs.
    _adapter_output: Callable[..., jax.Array] = staticmethod(layers.adapter_output)
    p: AdapterParam
    lam: AdapterParam
    q: AdapterParam

    def __init__(
        self,
        adapter: Adapter,
        dropout: nnx.Dropout | None = None,
        forward_mode: bool = False,
        declared: bool = False,
    ) -> None:
        self.replace(adapter)
        self.declared = declared
        self.dropout = dropout
        self.forward_mode = forward_mode

    def replace(self, adapter: Adapter, *, keep_metadata: bool = False) -> None:
        """Replace the adapter by another of any rank, in new variables.

        Scale and layout are also stored in the variables' metadata, because an ``nnx.State``
        contains only the variables.

        Args:
          adapter: the new adapter.
          keep_metadata: whether the new variables keep the other metadata of the old ones.
        """
        self.scale, self.layout = adapter.scale, adapter.layout
        known = NO_EAGER_SHARDING | {"scale": self.scale, "layout": self.layout}
        for name, value in zip(Adapter._fields, adapter):
            metadata = getattr(self, name).get_metadata() if keep_metadata else {}
            setattr(self, name, AdapterParam(value, **metadata | known))

    @property
    def adapter(self) -> Adapter:
        """Adapter with the current values of the three factors."""
        return Adapter(self.p[...], self.lam[...], self.q[...], self.scale, self.layout)

    def _add(self, layer: nnx.Module, output: jax.Array, x: jax.Array, **call: Any) -> jax.Array:
        """Return the layer's output plus the adapter output.

        Args:
          layer: the adapted layer.
          output: its own output.
          x: its input.
          **call: its other arguments by name or position, of which a string is the equation of an
            einsum; and ``attend``.

        Raises:
          ValueError: the adapter does not fit the layer's weight, or ``nnx.vmap`` stacks the weight
            along another axis than the first.
        """
        adapter = self.adapter
        equation = next((v for v in call.values() if isinstance(v, str)), None)
        found = self.layout if self.declared else layer_of(layer, equation)
        spec = layers.require_layer(found, layer)
        shape = getattr(layer, spec.weight).shape
        layers.check_fit(spec, adapter, shape, type(layer).__name__)
        if self.declared:
            _check_call(layer, spec, x, call)
        if any(_compat.mapped_axes(_weight_of(layer))):
            raise ValueError(
                f"`in_axes`: nnx.vmap stacks the weight of a {type(layer).__name__} along another "
                "axis than the first, along which an adapter is stacked; stack the model along "
                "axis 0."
            )
        key, rate, dropout = None, 0.0, self.dropout
        if dropout is not None and not dropout.deterministic and spec.kind != "embed":
            key, rate = next_key(dropout), dropout.rate
        term = self._adapter_output(
            *(spec, layer, adapter, x, shape, output.dtype),
            key=key,
            dropout_rate=rate,
            forward_mode=self.forward_mode,
            equation=equation,
            attend=call.get("attend", False),
            convolve=_convolve,
        )
        return layers.add_output(output, term)


def _check_call(layer: nnx.Module, spec: Layout, x: jax.Array, call: dict[str, Any]) -> None:
    """Raise an error if a call of a declared layer is not the product of its layout.

    The computation may depend on the layer's mode, on the shape and dtype of the input, and on
    other arguments, so that the trace in ``adapt`` does not show it.

    Args:
      layer: the adapted layer.
      spec: the declared layout.
      x: the input of the call.
      call: its other arguments, as in :meth:`Adaptation._add`.

    Raises:
      ValueError: the weight has other axes, or the arguments change the computation.
    """
    weight, cls = getattr(layer, spec.weight), base_class(type(layer))
    if len(weight.shape) != spec.ndim:
        problem = f"its weight has {len(weight.shape)} axes, and is not in nnx.vmap or nnx.scan"
        return foreign.require_call(problem, cls)
    call = dict(call)
    method = "attend" if call.pop("attend", False) else "__call__"
    args = [call.pop(name) for name in sorted(filter(str.isdigit, call), key=int)]
    foreign.require_call(problem_with_call(layer, spec, method, (x, *args), call), cls)


def problem_with_call(
    module: nnx.Module,
    layer: Layout,
    method: str,
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, Any],
    lifted: int = 0,
) -> str:
    """Return why a call of a layer is not the product of its layout; empty if it is.

    Args:
      module: the layer, adapted or not.
      layer: the layout that is declared or known for its class.
      method: the called method.
      args: the arguments of the call, the input first; shapes are enough.
      kwargs: the others.
      lifted: number of axes of the layer's variables that a lifted transform adds.
    """
    graph, state = nnx.split(module)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    places = [i for i, (path, _) in enumerate(leaves) if pytree.leaf_name(path) == layer.weight]
    if len(places) != 1 or _compat.is_qwix_weight(getattr(module, layer.weight)):
        return f"its {layer.weight!r} is quantised"
    variables = [leaf for _, leaf in leaves]
    if lifted:
        variables = [jax.ShapeDtypeStruct(v.shape[lifted:], v.dtype) for v in variables]
    flat, tree = jax.tree.flatten((args, dict(kwargs)))
    given = {i: leaf for i, leaf in enumerate(flat) if hasattr(leaf, "shape")}

    def run(variables: list[jax.Array], given: Mapping[int, PyTree]) -> PyTree:
        copy = nnx.merge(graph, treedef.unflatten(variables))
        _compat.set_class(copy, base_class(type(copy)))
        args, kwargs = tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(flat)])
        return getattr(copy, method)(*args, **kwargs)

    return foreign.problem_with(layer, method, run, variables, places[0], given)


def next_key(dropout: nnx.Dropout) -> jax.Array | None:
    """Draw the PRNG key for one call of a dropout; return None if it has no random numbers.

    >>> next_key(nnx.Dropout(0.1)) is None
    True
    """
    stream = dropout.rngs
    return None if stream is None else stream()


class _Call:
    """Running call of a subclass of a Flax layer.

    Attributes:
      layer: the module.
      weight: the value of its weight at the start of the call.
      reached: whether the method of the Flax layer itself was called.
    """

    def __init__(self, layer: nnx.Module, weight: PyTree) -> None:
        self.layer, self.weight, self.reached = layer, weight, False


# Running calls, innermost last.
_CALLS: contextvars.ContextVar[tuple[_Call, ...]] = contextvars.ContextVar("calls", default=())


def weight_name(layer: nnx.Module) -> str:
    """Return the attribute name of an adapted layer's weight.

    Layers that share a weight share its adapter, whose layout has the name in the first layer.
    """
    name = cast("Any", layer).adalora.layout.weight
    return name if hasattr(layer, name) else layers.require_layer(layer_of(layer), layer).weight


def _weight_of(layer: nnx.Module) -> PyTree:
    variable = getattr(layer, weight_name(layer))
    return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


class Adapted(nnx.Module):
    """Mixin that adds the adapter output to the layer's output."""

    adalora: Adaptation

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        self._check_reached()
        output = super().__call__(*args, **kwargs)
        if not args:  # the input is given by its name
            args = (kwargs.pop(next(iter(inspect.signature(super().__call__).parameters))),)
        inputs, *others = args
        named = {str(name): value for name, value in (dict(enumerate(others)) | kwargs).items()}
        return _compat.without_qwix(self.adalora._add)(self, output, inputs, **named)

    def _check_reached(self) -> None:
        """Record that the call reaches the Flax layer.

        Raises:
          ValueError: the weight was replaced since the start of the call.
        """
        for call in _CALLS.get()[-1:]:
            if call.layer is self:
                call.reached = True
                if call.weight is not _weight_of(self):
                    raise ValueError(
                        f"`target_modules`: {type(self).__name__} changes its weight before it "
                        "calls the layer it extends, so no sum of weights equals the "
                        "adapted layer; leave it out of target_modules."
                    )


class _AdaptedEmbed(Adapted):
    """Mixin for embeddings, which also compute ``attend``, ``x Eᵀ``."""

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        self._check_reached()
        output = super().attend(query, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return _compat.without_qwix(self.adalora._add)(self, output, query, attend=True)


class _Checked(nnx.Module):
    """Mixin before a subclass of a Flax layer; raises if a call does not use the adapter."""

    def __call__(self, *args: Any, **kwargs: Any) -> PyTree:
        return self._checked("__call__", args, kwargs)

    def _checked(self, method: str, args: tuple, kwargs: dict) -> PyTree:
        call = _Call(self, _weight_of(self))
        token = _CALLS.set((*_CALLS.get(), call))
        try:
            output = getattr(super(), method)(*args, **kwargs)
        finally:
            _CALLS.reset(token)
        if not call.reached:
            raise ValueError(
                f"`target_modules`: the {method} of {base_class(type(self)).__name__} does not "
                "reach that of the Flax layer it extends, so its adapter would add nothing; "
                f"{DECLARE}, or leave it out of target_modules."
            )
        return output


class _CheckedEmbed(_Checked):
    def attend(self, *args: Any, **kwargs: Any) -> PyTree:
        return self._checked("attend", args, kwargs)


DECLARE = "if it computes y = x W + b, declare it with adapt(..., layers={cls: Layout(...)})"
FLAX_LAYERS = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Embed,
    nnx.Conv,
    nnx.ConvTranspose,
)


def adapted_class(cls: type, declared: bool = False, kind: str = "") -> type:
    """Return a subclass of ``cls`` that adds the adapter output to the Flax layer's output.

    Args:
      cls: the class of the layer.
      declared: whether the user declared it as a layer. The adapter output is then added to the
        output of ``cls`` itself.
      kind: the kind of the layer's layout. Of a declared ``"embed"``, ``attend`` is adapted, too.
    """
    is_table = issubclass(cls, nnx.Embed) or (kind == "embed" and hasattr(cls, "attend"))
    mixin = _AdaptedEmbed if is_table else Adapted
    return extended_class(cls, mixin, "AdaLora", declared)


class _Extended(type(nnx.Module)):
    """Metaclass of the generated classes, which are pickled by the arguments that made them."""

    made_of: tuple[Any, ...]


copyreg.pickle(_Extended, lambda cls: (_part_of, cls.made_of))


def _part_of(part: str, *arguments: Any) -> type:
    cls = extended_class(*arguments)
    return cls if part == "whole" else next(b for b in cls.__bases__ if isinstance(b, _Extended))


def extended_class(cls: type, mixin: type, prefix: str, outside: bool = False) -> type:
    """Return a subclass of ``cls`` with ``mixin`` directly before the Flax layer's class.

    "Before" is in the method resolution order: if a subclass processes the Flax layer's output, it
    processes the extended output. The class is cached per arguments, so that graph definitions of
    two models are equal.

    Args:
      cls: the class of the layer.
      mixin: the class with the methods to add.
      prefix: the prefix of the new class's name.
      outside: whether the mixin comes before ``cls`` itself.

    >>> [c.__name__ for c in extended_class(nnx.Linear, Adapted, "AdaLora").__mro__[:3]]
    ['AdaLoraLinear', 'Adapted', 'Linear']
    """
    return _extended(cls, mixin, prefix, outside)


@functools.cache
def _extended(cls: type, mixin: type, prefix: str, outside: bool) -> type:
    base = cls if outside else layer_class(cls) or cls
    arguments = (cls, mixin, prefix, outside)

    def make(part: str, name: str, bases: tuple[type, ...]) -> type:
        return types.new_class(
            f"{prefix}{name}",
            bases,
            {"metaclass": _Extended},
            lambda body: body.update(__module__=__name__, made_of=(part, *arguments)),
        )

    if base is cls:
        return make("whole", cls.__name__, (mixin, cls))
    inner = make("inner", base.__name__, (mixin, base))
    if not issubclass(mixin, Adapted):
        return make("whole", cls.__name__, (cls, inner))
    checked = _CheckedEmbed if issubclass(cls, nnx.Embed) else _Checked
    return make("whole", cls.__name__, (checked, cls, inner))


def layer_class(cls: type) -> type | None:
    """Return the Flax layer among the bases of a class, or its equivalent; None if there is none.

    Equivalents are the classes for packed weights and those that Qwix creates. The latter bypass
    the classes between them and the Flax layer.
    """

    def is_layer(base: type) -> bool | type | None:
        equivalent = "stands_for_its_layer" in vars(base) or _compat.unquantized_class(base)
        return base in FLAX_LAYERS or equivalent

    return next((base for base in cls.__mro__ if is_layer(base)), None)


def base_class(cls: type) -> type:
    """Return the class that an adapted layer's class was made from."""
    made = (Adapted, _Checked)
    return next(base for base in cls.__mro__ if not issubclass(base, made))


def layer_of(
    module: nnx.Module,
    equation: str | None = None,
    declared: foreign.Declarations | None = None,
) -> Layout | None:
    """Return the layout of a module's weight; None if the module cannot be adapted.

    Args:
      module: any module.
      equation: the equation of an einsum, if it is an argument of the call.
      declared: the layouts that the user declared. None: only Flax's layers have a layout.
    """
    found = foreign.layout_of(module, declared)
    if found is not None:
        return found if isinstance(found, Layout) else None
    params = {n: v.ndim for n, v in vars(module).items() if is_weight(v)}
    return layers.layer_of(module, params, equation)


def _convolve(module: nnx.Conv | nnx.ConvTranspose, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Apply the convolution of ``module`` with another kernel, without bias and groups."""
    names = ("strides", "padding", "kernel_dilation", "dtype", "param_dtype", "precision")
    names += ("promote_dtype", "preferred_element_type")
    if isinstance(module, nnx.ConvTranspose):
        kind, names = nnx.ConvTranspose, (*names, "transpose_kernel")
        ins, outs = (-1, -2) if module.transpose_kernel else (-2, -1)
    else:
        kind, ins, outs = nnx.Conv, -2, -1
        names = (*names, "input_dilation", "conv_general_dilated")
    same = kind(
        *(kernel.shape[ins], kernel.shape[outs], module.kernel_size),
        **{name: getattr(module, name) for name in names},
        use_bias=False,
        kernel_init=lambda key, shape, dtype: kernel,
        rngs=nnx.Rngs(0),
    )
    spatial = len(kernel.shape) - 1
    at = explicit_sharding(x, (*spec_of_type(x)[: x.ndim - spatial], *[None] * spatial))
    return same(x, out_sharding=at) if at and isinstance(same, nnx.Conv) else same(x)
