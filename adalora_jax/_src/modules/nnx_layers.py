"""Adapted NNX layers: their adapters, their classes, and the analysis of their weights."""

from __future__ import annotations

import contextvars
import copyreg
import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import accumulation_dtype
from adalora_jax._src.modules import layers, usage

# Attribute of the class that Qwix sets on a model's root; its value is the original class.
UNQUANTIZED = "_unquantized_type"
# Arrays are already placed; disable Flax's eager sharding, which needs a mesh on every copy.
NO_EAGER_SHARDING = {"eager_sharding": False}


class AdapterParam(nnx.LoRAParam):
    """Trainable variable with ``p``, ``lam`` or ``q`` of an :class:`~adalora_jax.Adapter`.

    Attributes:
      scale: metadata; float, the factor s of the adapter.
      layout: metadata; the :class:`~adalora_jax.Layout` of the adapted weight.
    """


class SavedParam(nnx.LoRAParam):
    """Trainable copy of a base parameter that ``modules_to_save`` names, in at least float32.

    Attributes:
      root: metadata; path of the outermost module or parameter that ``modules_to_save`` names.
      base_dtype: metadata; dtype of the base parameter, which the model computes with.
    """

    @classmethod
    def of(cls, variable: nnx.Variable, root: str) -> SavedParam:
        """Return a trainable copy of a parameter in at least float32.

        Args:
          variable: the base parameter.
          root: path of the outermost module or parameter that ``modules_to_save`` names and that
            contains ``variable``.
        """
        value = variable.get_value()
        known = {"root": root, "base_dtype": value.dtype}
        metadata = variable.get_metadata() | NO_EAGER_SHARDING | known
        return cls(jnp.array(value, accumulation_dtype(value.dtype)), **metadata)

    def get_value(self, **index: Any) -> Any:
        """Return the trained value, or, with an index, the indexed value in the base's dtype.

        Layers read ``self.kernel[...]`` and compute in the base's dtype. Flax's optimizers,
        averages and copies read without an index, in full precision.
        """
        value = super().get_value(**index)
        return self._computed(value) if index else value

    def __jax_array__(self) -> jax.Array:
        return self._computed(self.get_value())

    @property
    def value(self) -> Any:
        return self._computed(super().value)

    @value.setter
    def value(self, value: Any) -> None:
        self.set_value(value)

    def _computed(self, value: Any) -> Any:
        dtype = self.get_metadata().get("base_dtype")
        return value.astype(dtype) if dtype is not None and hasattr(value, "astype") else value

    def released(self) -> nnx.Param:
        """Return the trained values as a plain parameter of the base's dtype."""
        metadata = self.get_metadata()
        dtype = metadata.pop("base_dtype")
        del metadata["root"]
        return nnx.Param(self.get_raw_value().astype(dtype), **metadata)


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
      declared: whether the user declared the layout for the layer's class.
      adapter_output: function that computes what is added to the layer's output, with the
        arguments of :func:`layers.adapter_output`.
    """

    adapter_output: Callable[..., jax.Array] = staticmethod(layers.adapter_output)
    p: AdapterParam
    lam: AdapterParam
    q: AdapterParam

    def __init__(
        self,
        adapter: Adapter,
        dropout: nnx.Dropout | None = None,
        forward_mode: bool = False,
        declared: bool = False,
    ):
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

    def _add(self, layer: nnx.Module, output: jax.Array, x: Any, **call: Any) -> jax.Array:
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
        if any(layers.mapped_axes(_weight_of(layer))):
            raise ValueError(
                f"nnx.vmap stacks the weight of a {type(layer).__name__} along another axis than "
                "the first, and an adapter is stacked along the first: make the stack with axis 0."
            )
        key, rate, dropout = None, 0.0, self.dropout
        if dropout is not None and not dropout.deterministic and spec.kind != "embed":
            key, rate = next_key(dropout), dropout.rate
        return output + self.adapter_output(
            *(spec, layer, adapter, x, shape, output.dtype),
            key=key,
            dropout_rate=rate,
            forward_mode=self.forward_mode,
            equation=equation,
            attend=call.get("attend", False),
            convolve=_convolve,
        )


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

    def __init__(self, layer: nnx.Module, weight: Any):
        self.layer, self.weight, self.reached = layer, weight, False


# Running calls, innermost last.
_CALLS: contextvars.ContextVar[tuple[_Call, ...]] = contextvars.ContextVar("calls", default=())


def weight_name(layer: Any) -> str:
    """Return the attribute name of an adapted layer's weight.

    Layers that share a weight share its adapter, whose layout has the name in the first layer.
    """
    name = layer.adalora.layout.weight
    return name if hasattr(layer, name) else layers.require_layer(layer_of(layer), layer).weight


def _weight_of(layer: Any) -> Any:
    variable = getattr(layer, weight_name(layer))
    return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


class Adapted(nnx.Module):
    """Mixin that adds the adapter output to the layer's output."""

    adalora: Adaptation

    def __call__(self, inputs, *args, **kwargs):
        self._check_reached()
        output = super().__call__(inputs, *args, **kwargs)
        named = {str(name): value for name, value in (dict(enumerate(args)) | kwargs).items()}
        return _unintercepted(self.adalora._add)(self, output, inputs, **named)

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
                        f"{type(self).__name__} changes its weight before it calls the layer it "
                        "extends, so no sum of weights computes what the adapted layer does: "
                        "leave it out of target_modules."
                    )


class _AdaptedEmbed(Adapted):
    """Mixin for embeddings, which also compute ``attend``, ``x Eᵀ``."""

    def attend(self, query, *args, **kwargs):
        self._check_reached()
        output = super().attend(query, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return _unintercepted(self.adalora._add)(self, output, query, attend=True)


class _Checked(nnx.Module):
    """Mixin before a subclass of a Flax layer; raises if a call does not use the adapter."""

    def __call__(self, *args, **kwargs):
        return self._checked("__call__", args, kwargs)

    def _checked(self, method: str, args: Any, kwargs: Any) -> Any:
        call = _Call(self, _weight_of(self))
        token = _CALLS.set((*_CALLS.get(), call))
        try:
            output = getattr(super(), method)(*args, **kwargs)
        finally:
            _CALLS.reset(token)
        if not call.reached:
            raise ValueError(
                f"the {method} of {base_class(type(self)).__name__} does not reach that of the "
                f"Flax layer it extends, so its adapter would add nothing: {_DECLARE}."
            )
        return output


class _CheckedEmbed(_Checked):
    def attend(self, *args, **kwargs):
        return self._checked("attend", args, kwargs)


_DECLARE = (
    "if it computes y = x W + b, declare it with adapt(..., layers={cls: Layout(...)}), or leave "
    "it out of target_modules"
)


def _unintercepted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the interception by Qwix disabled while it runs.

    While a model that Qwix quantised runs, Qwix replaces JAX's products by its own. It would treat
    p and q as weights that are still to be quantised.
    """
    qwix = sys.modules.get("qwix._src.interception")  # models that Qwix quantised import it
    return function if qwix is None else qwix.disable_interceptions(function)


FLAX_LAYERS = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Embed,
    nnx.Conv,
    nnx.ConvTranspose,
)


def adapted_class(cls: type, declared: bool = False) -> type:
    """Return a subclass of ``cls`` that adds the adapter output to the Flax layer's output.

    Args:
      cls: the class of the layer.
      declared: whether the user declared it as a layer. The adapter output is then added to the
        output of ``cls`` itself.
    """
    mixin = _AdaptedEmbed if issubclass(cls, nnx.Embed) else Adapted
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
    base = cls if outside else _layer_class(cls) or cls
    arguments = (cls, mixin, prefix, outside)
    make = lambda part, name, bases: types.new_class(
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


def _layer_class(cls: type) -> type | None:
    """Return the Flax layer among the bases of a class, or its equivalent; None if there is none.

    Equivalents are the classes for packed weights and those that Qwix creates. The latter bypass
    the classes between them and the Flax layer.
    """

    def is_layer(base):
        own = vars(base)
        return base in FLAX_LAYERS or "stands_for_its_layer" in own or UNQUANTIZED in own

    return next((base for base in cls.__mro__ if is_layer(base)), None)


def unreached(cls: type) -> str:
    """Return why calls of a layer's class do not reach its Flax layer; empty if they do.

    >>> unreached(nnx.Linear)
    ''
    """
    base = _layer_class(cls)
    for own in cls.__mro__ if base else ():
        if own is base:
            break
        for name in ("__call__", "attend"):
            code = getattr(inspect.unwrap(vars(own).get(name, len)), "__code__", None)
            if code is not None and "__class__" not in code.co_freevars:
                return (
                    f"its {name} does not call super().{name}, so its adapter would add nothing: "
                    f"{_DECLARE}"
                )
    return ""


def use_of(module: nnx.Module, layer: Layout) -> usage.Use | None:
    """Return how a layer uses its weight, according to a trace of the layer alone.

    Unmodified Flax layers need no trace, because they multiply with the stored weight.

    Args:
      module: the layer.
      layer: the layout of its weight.

    Returns:
      The use. It is ``unseen`` if the layer cannot be called with one input. None for unmodified
      Flax layers, for quantised weights, and if the shape of an input is not known.
    """
    weight, shape = getattr(module, layer.weight), tuple(getattr(module, layer.weight).shape)
    size = layers.input_shape(layer, module, shape)
    if size is None or is_qwix_weight(weight) or _is_plain(module, weight):
        return None
    graph, state = nnx.split(module)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    places = [i for i, (path, _) in enumerate(leaves) if pytree.leaf_name(path) == layer.weight]
    if len(places) != 1:  # packed integers consist of several arrays
        return None
    lifted = len(shape) - layer.ndim
    structs = [jax.ShapeDtypeStruct(leaf.shape[lifted:], leaf.dtype) for _, leaf in leaves]
    foreign = _layer_class(type(module)) is None

    def run(leaves, x):
        copy = nnx.merge(graph, treedef.unflatten(leaves))
        copy.__class__ = extended_class(type(copy), _Marked, "Marked")
        output = copy(usage.mark_input(0, x) if foreign else x)
        return [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]

    x = jax.ShapeDtypeStruct(size, jnp.int32 if layer.kind == "embed" else jnp.float32)
    try:
        closed = jax.make_jaxpr(run)(structs, x)
    except Exception:  # a custom class may raise any error for one input
        return usage.Use(False, False, False, unseen=True)
    scaled = frozenset({0} if layers.weight_scale(layer, module) != 1 else ())
    return usage.find_uses(closed.jaxpr, {places[0]: 0}, scaled)[0]


class _Marked(nnx.Module):
    """Mixin that runs a layer under the scope name by which :mod:`usage` finds it in a jaxpr."""

    def __call__(self, *args, **kwargs):
        with jax.named_scope(usage.scope_name(0)):
            output = super().__call__(*args, **kwargs)
        return usage.mark_output(0, output)


def _is_plain(module: nnx.Module, weight: Any) -> bool:
    """Return whether a layer is an unmodified Flax layer, with Flax's functions and variables."""
    cls = type(module)
    reading = ("get_value", "__getitem__", "__jax_array__")
    if any(getattr(type(weight), n, None) is not getattr(nnx.Variable, n, None) for n in reading):
        return False
    if cls not in FLAX_LAYERS:
        return False
    dtypes = ("dtype", "param_dtype", "preferred_element_type")  # dtypes are callable, too
    given = {
        name: (getattr(module, name, parameter.default), parameter.default)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not parameter.empty
        and name not in dtypes
        and not name.endswith("_init")
    }
    changed = [
        name
        for name, (value, default) in given.items()
        if (callable(value) or callable(default)) and value is not default
    ]
    return not changed and "on_get_value" not in weight.get_metadata()


def rewritten(model: nnx.Module) -> dict[str, str]:
    """Return ``{path: reason}`` of the modules in wrappers that rewrite their weights."""
    wrappers = (nnx.WeightNorm, nnx.SpectralNorm)
    found = {p: type(m).__name__ for p, m in modules(model) if isinstance(m, wrappers)}
    inside = lambda path, wrapper: not wrapper or path.startswith(f"{wrapper}/")
    return {
        path: f"it is inside of {name}, which rewrites its weight at every call"
        for path, _ in modules(model)
        for wrapper, name in found.items()
        if inside(path, wrapper)
    }


def readers(model: nnx.Module) -> dict[tuple[int, str], str]:
    """Return ``{(id of a module, attribute): class}`` where the class may read that attribute.

    Such code may multiply with a layer's weight outside of the layer. The analysis of a class
    finds the names that it reads, not the modules, so each name is recorded for every module that
    can be reached from an instance of the class.
    """
    found: dict[tuple[int, str], str] = {}
    for path, module in modules(model):
        names = _attributes_read(type(module))
        for inner, other in modules(module) if names else ():
            if inner and pytree.ADAPTER_KEY not in path.split("/"):
                found.update({(id(other), name): type(module).__name__ for name in names})
    return found


@functools.cache
def _attributes_read(cls: type) -> frozenset[str]:
    """Return the names of attributes that a class's methods read from objects other than ``self``.

    Constructors and the methods of Flax's and this package's classes are excluded.
    """
    names: set[str] = set()
    for own in cls.__mro__:
        if own.__module__.partition(".")[0] in ("flax", "adalora_jax", "builtins"):
            continue
        for name, method in vars(own).items():
            code = getattr(_function(method), "__code__", None)
            if name != "__init__" and code is not None:
                is_method = code.co_argcount and not isinstance(method, (staticmethod, classmethod))
                names |= _read_by(code, code.co_varnames[0] if is_method else None)
    return frozenset(names)


def _read_by(code: types.CodeType, self_name: str | None) -> set[str]:
    """Return the attributes that a function reads from objects other than ``self``.

    Nested functions are included, and so are all string constants of code that calls ``getattr``.
    """
    names: set[str] = set()
    of_self = False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not of_self:
            names.add(step.argval)
        if step.opname != "EXTENDED_ARG":
            loads = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
            loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            of_self = loads and loaded[-1] == self_name  # one instruction may load two variables
    if "getattr" in code.co_names:
        names |= {constant for constant in code.co_consts if isinstance(constant, str)}
    for inner in filter(inspect.iscode, code.co_consts):
        names |= _read_by(inner, self_name)
    return names


def _function(method: Any) -> Any:
    """Return the function in a method or a property, without its decorators."""
    method = getattr(method, "fget", None) or getattr(method, "__func__", method)
    return inspect.unwrap(method) if callable(method) else method


def base_class(cls: type) -> type:
    """Return the class that an adapted layer's class was made from."""
    made = (Adapted, _Checked)
    return next(base for base in cls.__mro__ if not issubclass(base, made))


def modules(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """Return each module of the model once, as ``(path, module)``, in graph order."""
    return [
        ("/".join(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    ]


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Return ``{path: variable}`` of the model's parameters, without adapters.

    >>> list(parameters(nnx.Linear(6, 4, rngs=nnx.Rngs(0))))
    ['bias', 'kernel']
    """
    return {
        "/".join(map(str, path)): variable
        for path, variable in nnx.iter_graph(model)
        if is_weight(variable) and not isinstance(variable, AdapterParam)
    }


def with_parameters(model: nnx.Module, new: Mapping[str, Any]) -> Any:
    """Return a copy of ``model`` with new values for the parameters at some paths.

    >>> model = with_parameters(
    ...     nnx.Linear(6, 4, rngs=nnx.Rngs(0)), {"bias": jax.numpy.ones(4)}
    ... )
    >>> model.bias[0]
    Array(1., dtype=float32)
    """
    copy = nnx.clone(model)
    for path, variable in parameters(copy).items():
        if path in new:
            variable.set_value(new[path])
    return copy


def layer_of(
    module: nnx.Module, equation: str | None = None, declared: Layout | None = None
) -> Layout | None:
    """Return the layout of a module's weight; None if the module cannot be adapted.

    Args:
      module: any module.
      equation: the equation of an einsum, if it is an argument of the call.
      declared: the layout that the user declared for the module's class.
    """
    if declared is not None:
        return declared
    params = {n: v.ndim for n, v in vars(module).items() if is_weight(v)}
    return layers.layer_of(module, params, equation)


def is_weight(value: Any) -> bool:
    """Return whether a value is a parameter, or a weight that is stored as integers."""
    packed = isinstance(value, nnx.Variable) and pytree.is_packed(value.get_raw_value())
    return packed or isinstance(value, nnx.Param) or is_qwix_weight(value)


def is_qwix_weight(value: Any) -> bool:
    """Return whether a value is a weight, integers and scales, of ``qwix.quantize_model``.

    >>> is_qwix_weight(nnx.Param(1.0))
    False
    """
    return hasattr(value, "how") and hasattr(getattr(value, "array", None), "qvalue")


def sharded_variable(weight: Any) -> nnx.Variable:
    """Return the variable with a weight's sharding and metadata: for Qwix's, its integers."""
    return weight.array.qvalue if is_qwix_weight(weight) else weight


def pure(state: Any) -> Any:
    """Return a pytree with every variable replaced by its value, like newer Flax's ``nnx.as_pure``.

    >>> pure({"scale": nnx.Param(2.0)})
    {'scale': 2.0}
    """
    is_variable = lambda node: isinstance(node, nnx.Variable)
    value = lambda node: pure(node.get_raw_value()) if is_variable(node) else node
    return jax.tree.map(value, state, is_leaf=is_variable)


def _convolve(module: Any, x: jax.Array, kernel: jax.Array, features: int) -> jax.Array:
    """Apply the convolution of ``module`` with another kernel and without bias."""
    names = ("strides", "padding", "kernel_dilation", "dtype", "param_dtype", "precision")
    names += ("promote_dtype", "preferred_element_type")
    if isinstance(module, nnx.ConvTranspose):
        kind, names = nnx.ConvTranspose, (*names, "transpose_kernel")
    else:
        kind = nnx.Conv
        names = (*names, "input_dilation", "feature_group_count", "conv_general_dilated")
    same = kind(
        *(module.in_features, features, module.kernel_size),
        **{name: getattr(module, name) for name in names},
        use_bias=False,
        kernel_init=lambda key, shape, dtype: kernel,
        rngs=nnx.Rngs(0),
    )
    return same(x)
