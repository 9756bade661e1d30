"""Every use of private parts of other packages and of Python's code objects, in one function each.

Each docstring says why the use is needed, what the other package would have to offer instead, which
issue asks for that, and the version with which the use was last checked. Differences between the
supported versions of a package are handled here, too; their docstrings say when the function can be
deleted. The core uses this module, so it imports neither Flax nor the optional package Qwix.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from jax.extend import core

if TYPE_CHECKING:
    from flax.core import Scope
    from flax.linen.module import InterceptorContext


class QwixWeight(Protocol):
    """Weight of ``qwix.quantize_model``: integers and scales, and how they were quantised."""

    array: Any
    how: Any


class Variable(Protocol):
    """Variable of NNX: a value and metadata about it."""

    def get_metadata(self) -> Mapping[str, Any]: ...


def without_qwix(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with Qwix's interception disabled while it runs.

    Why: while a model that Qwix quantised runs, Qwix replaces JAX's products by its own. It would
    treat p and q as weights that are still to be quantised.
    Needs upstream: ``disable_interceptions`` among Qwix's public names.
    Upstream: no issue was found; export ``disable_interceptions`` from ``qwix``.
    Checked with: qwix 0.1.8.

    >>> without_qwix(len)("abc")
    3
    """
    qwix = sys.modules.get("qwix._src.interception")  # models that Qwix quantised import it
    return function if qwix is None else qwix.disable_interceptions(function)


def unquantized_class(cls: type) -> type | None:
    """Return the class from which Qwix made ``cls``; None if Qwix did not make it.

    Why: the class that Qwix makes for a model's root stands for the original one, and remains after
    the weights are dequantised.
    Needs upstream: a public function that undoes the change of class by ``qwix.quantize_model``.
    Upstream: no issue was found; add an inverse of ``quantize_model``, which returns a float model.
    Checked with: qwix 0.1.8.

    >>> unquantized_class(int)
    """
    return vars(cls).get("_unquantized_type")


def delete_qwix_attributes(module: object) -> None:
    """Delete the attributes that Qwix sets on the modules of an NNX model.

    Why: they would remain on a model that is no longer quantised.
    Needs upstream: the same function as :func:`unquantized_class`.
    Upstream: no issue was found; the request is that of :func:`unquantized_class`.
    Checked with: qwix 0.1.8.
    """
    for name in {"qwix_path", "qwix_rngs", "disable_quant_stats_update"} & set(vars(module)):
        delattr(module, name)


def is_qwix_weight(value: object) -> bool:
    """Return whether a value is a weight, integers and scales, of ``qwix.quantize_model``.

    Why: a quantised weight is recognised by its attributes, since its class is not exported.
    Needs upstream: the class of such weights among Qwix's public names.
    Upstream: no issue was found; export the class ``WithAux`` from ``qwix``.
    Checked with: qwix 0.1.8.

    >>> is_qwix_weight(1.0)
    False
    """
    return hasattr(value, "how") and hasattr(getattr(value, "array", None), "qvalue")


def qwix_settings(weight: QwixWeight) -> dict[str, Any]:
    """Return the arguments with which ``qwix.quantize`` made a weight of a quantised model.

    Why: a merged weight is quantised again in the format that it had.
    Needs upstream: the same class as :func:`is_qwix_weight`, with its attribute ``how``.
    Upstream: no issue was found; the request is that of :func:`is_qwix_weight`.
    Checked with: qwix 0.1.8.

    Args:
      weight: a value for which :func:`is_qwix_weight` is true.
    """
    names = ("qtype", "channelwise_axes", "tiled_axes", "calibration_method")
    return {name: getattr(weight.how, name) for name in names}


def mapped_axes(value: object) -> list[int]:
    """Return the axes along which the enclosing ``jax.vmap`` calls map a value.

    Why: an adapter is stacked along the first axis of its layer's weight, so a layer cannot be
    adapted if ``vmap`` stacks its weight along another one. A tracer keeps this axis in its
    attributes ``batch_dim``, ``val`` and ``primal``.
    Needs upstream: the mapped axes of a value among JAX's public functions.
    Upstream: no issue was found; add a function to ``jax.core`` that returns them for a tracer.
    Checked with: jax 0.10.2.

    >>> import jax
    >>> seen = []
    >>> x = jax.numpy.ones((2, 3))
    >>> _ = jax.vmap(lambda x: seen.extend(mapped_axes(x)), in_axes=1)(x)
    >>> seen
    [1]
    """
    axes = []
    while value is not None:
        if isinstance(axis := getattr(value, "batch_dim", None), int):
            axes.append(axis)
        value = getattr(value, "val", getattr(value, "primal", None))
    return axes


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of constants and of carried values among the inputs of a ``scan``.

    Why: only the parameters of the operation tell constants, carried and scanned inputs apart, and
    their names changed in jax 0.12.
    Needs upstream: the three groups of inputs of a ``scan`` among the functions of ``jax.extend``.
    Upstream: no issue was found; add a function to ``jax.extend.core`` that returns them.
    Checked with: jax 0.8.1, 0.9.2, 0.10.2 and 0.12.0.1.

    Args:
      params: the parameters of the operation in a jaxpr.

    >>> import jax
    >>> add = lambda carry, x, y: jax.lax.scan(lambda carry, x: (carry + x + y, None), carry, x)
    >>> scan_counts(jax.make_jaxpr(add)(1.0, jax.numpy.ones(3), 2.0).eqns[-1].params)
    (1, 1)
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def is_output_placed(params: Mapping[str, Any]) -> bool:
    """Return whether a ``ragged_dot_general`` asks for a sharding of its output.

    Why: before version 0.10.1, JAX's operation has no such parameter.
    Needed until: jax 0.10.1 is the oldest supported version.
    Checked with: jax 0.8.1, 0.9.2, 0.10.2 and 0.12.0.1.

    Args:
      params: the parameters of the operation in a jaxpr.

    >>> is_output_placed({"group_offset": None})
    False
    """
    return params.get("out_sharding") is not None


def one_operation(eqn: core.JaxprEqn, inputs: list[core.Var]) -> core.ClosedJaxpr:
    """Return a jaxpr that consists of one operation, with the given variables as its inputs.

    Why: ``jax.extend`` has no ``DebugInfo`` before jax 0.10, which requires one for every jaxpr.
    Needed until: jax 0.10 is the oldest supported version.
    Checked with: jax 0.8.1, 0.9.2, 0.10.2 and 0.12.0.1.

    >>> import jax
    >>> (eqn,) = jax.make_jaxpr(jax.numpy.sin)(1.0).eqns
    >>> [float(y) for y in core.jaxpr_as_fun(one_operation(eqn, eqn.invars))(0.0)]
    [0.0]
    """
    options: dict[str, Any] = {}
    if hasattr(core, "DebugInfo"):
        options["debug_info"] = core.DebugInfo("adalora", eqn.primitive.name, None, None)
    return core.ClosedJaxpr(core.Jaxpr((), inputs, eqn.outvars, [eqn], eqn.effects, **options), ())


def sharding_key(variable: Variable) -> str:
    """Return the key of the sharding among the metadata of a Variable.

    Why: flax 0.12.4 renamed ``sharding_names`` to ``out_sharding``.
    Needed until: flax 0.12.4 is the oldest supported version.
    Checked with: flax 0.12.3, 0.12.8 and 0.12.12.

    >>> from flax import nnx
    >>> sharding_key(nnx.Param(1.0))
    'out_sharding'
    """
    return "sharding_names" if "sharding_names" in variable.get_metadata() else "out_sharding"


def uses_super(method: Callable[..., Any]) -> bool:
    """Return whether a method's code refers to ``super()``; True if it has no Python code.

    Why: an adapter is added in the Flax layer's own method, so a subclass that never calls it
    ignores the adapter. The compiler gives a function that contains ``super()`` the free variable
    ``__class__``.
    Needs upstream: hooks around a Flax layer's product instead of around its call.
    Upstream: no issue was found; let every Flax layer with a weight call a given function on its
    input and output, inside of its own method.
    Checked with: CPython 3.11 to 3.13, flax 0.12.8.

    >>> uses_super(lambda self: 1), uses_super(len)
    (False, True)
    """
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is None or "__class__" in code.co_freevars


_FACTS = ("dtype", "ndim", "shape", "size")  # of an array, whatever its entries


def attributes_read(function: object, *, is_method: bool) -> set[str]:
    """Return the names of attributes that a function's code reads from objects other than ``self``.

    Nested functions are included, and so are all string constants of code that calls ``getattr``.
    Excluded are attributes of which only the shape, size or dtype is read.

    Why: code outside of a layer may multiply with the layer's weight, where an increment that is
    not yet merged is missing. Only the code shows which attributes it reads, and the source text is
    not always available.
    Needs upstream: a record of the modules whose methods read an ``nnx.Variable`` in a trace.
    Upstream: no issue was found; pass the reading module to a hook of ``nnx.Variable.get_value``.
    Checked with: CPython 3.11 to 3.13, flax 0.12.8.

    Args:
      function: a function without decorators; anything else has no code and reads nothing.
      is_method: whether the first argument is ``self``.

    >>> sorted(attributes_read(lambda self, x: x.kernel @ self.bias, is_method=True))
    ['kernel']
    >>> sorted(attributes_read(lambda self: self.up.kernel.shape, is_method=True))
    ['shape']
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return set()
    return _read_by(code, code.co_varnames[0] if is_method and code.co_argcount else None)


def _read_by(code: types.CodeType, self_name: str | None) -> set[str]:
    names: set[str] = set()
    of_self = False
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for step, following in itertools.pairwise(steps):
        reads_fact = following.opname == "LOAD_ATTR" and following.argval in _FACTS
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not (of_self or reads_fact):
            names.add(step.argval)
        loads = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        of_self = loads and loaded[-1] == self_name  # one instruction may load two variables
    if "getattr" in code.co_names:
        names |= {constant for constant in code.co_consts if isinstance(constant, str)}
    for inner in filter(inspect.iscode, code.co_consts):
        names |= _read_by(inner, self_name)
    return names


def linen_method(context: InterceptorContext) -> Callable[..., Any] | None:
    """Return the linen method that is intercepted; None if it delegates to its superclass.

    Why: a method is called again with other parameters, on a copy of the module. linen replaces the
    methods of a class by wrappers, and an interceptor receives the method without its wrapper.
    Needs upstream: the wrapped method in ``nn.module.InterceptorContext``.
    Upstream: no issue was found; add the method with its wrapper to ``InterceptorContext``.
    Checked with: flax 0.12.8.

    Args:
      context: as an interceptor of ``nn.intercept_methods`` receives it.
    """
    function = cast("functools.partial[Any]", context.orig_method).func
    name = context.method_name
    defining = [vars(cls)[name] for cls in type(context.module).__mro__ if name in vars(cls)]
    at = [getattr(method, "__wrapped__", None) for method in defining].index(function)
    return None if uses_super(function) and at + 1 < len(defining) else defining[at]


def linen_scope(scope: Scope, variables: dict[str, Any], rngs: dict[str, Any] | None) -> Scope:
    """Return a scope with the name, path and flags of ``scope`` and other contents.

    Why: a packed weight is dequantised for the duration of its layer's call alone, within a call of
    the model, where ``module.apply`` would start a new model with another path.
    Needs upstream: a public way to run one bound module with other parameters.
    Upstream: no issue was found; let ``apply`` run a bound module at its path with other variables.
    Checked with: flax 0.12.8.
    """
    return type(scope)(variables, rngs, scope.name, path=scope.path, flags=scope.flags)


def set_class(module: object, cls: type) -> None:
    """Change the class of a linen or an NNX module, in place.

    Why: an adapted or packed layer must be an instance of its own class with the same attributes,
    and neither framework can copy a module to a subclass. ``object.__setattr__`` is used because
    linen modules are frozen and NNX modules would record ``__class__`` among their attributes.
    Needs upstream: a method that returns a module of another class with the same attributes.
    Upstream: https://github.com/google/flax/issues/3585 asks how to swap layers for ones with LoRA
    in linen, https://github.com/google/flax/issues/4666 for interceptors of NNX modules, with which
    an adapted layer could keep its class.
    Checked with: flax 0.12.8.
    """
    object.__setattr__(module, "__class__", cls)
