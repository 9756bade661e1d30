"""Every use of private parts of other packages, one function for each.

Each docstring says why the use is needed, what the other package would have to offer instead, and
the version with which it was last checked. The optional package Qwix is never imported here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from flax import core


def without_qwix(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with Qwix's interception disabled while it runs.

    Why: while a model that Qwix quantised runs, Qwix replaces JAX's products by its own. It would
    treat p and q as weights that are still to be quantised.
    Needs upstream: ``disable_interceptions`` among Qwix's public names.
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
    Checked with: qwix 0.1.8.

    >>> unquantized_class(int)
    """
    return vars(cls).get("_unquantized_type")


def delete_qwix_attributes(module: object) -> None:
    """Delete the attributes that Qwix sets on the modules of an NNX model.

    Why: they would remain on a model that is no longer quantised.
    Needs upstream: the same function as :func:`unquantized_class`.
    Checked with: qwix 0.1.8.
    """
    for name in {"qwix_path", "qwix_rngs", "disable_quant_stats_update"} & set(vars(module)):
        delattr(module, name)


def uses_super(method: Callable[..., Any]) -> bool:
    """Return whether a method's code refers to ``super()``; True if it has no Python code.

    Why: an adapter is added in the Flax layer's own method, so a subclass that never calls it
    ignores the adapter. The compiler gives a function that contains ``super()`` the free variable
    ``__class__``.
    Needs upstream: hooks around a Flax layer's product instead of around its call.
    Checked with: CPython 3.11 to 3.13, flax 0.12.8.

    >>> uses_super(lambda self: 1), uses_super(len)
    (False, True)
    """
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is None or "__class__" in code.co_freevars


def linen_method(context: Any) -> Callable[..., Any] | None:
    """Return the linen method that is intercepted; None if it delegates to its superclass.

    Why: a method is called again with other parameters, on a copy of the module. linen replaces the
    methods of a class by wrappers, and an interceptor receives the method without its wrapper.
    Needs upstream: the wrapped method in ``nn.module.InterceptorContext``.
    Checked with: flax 0.12.8.

    Args:
      context: as an interceptor of ``nn.intercept_methods`` receives it.
    """
    function, name = context.orig_method.func, context.method_name
    defining = [vars(cls)[name] for cls in type(context.module).__mro__ if name in vars(cls)]
    at = [getattr(method, "__wrapped__", None) for method in defining].index(function)
    return None if uses_super(function) and at + 1 < len(defining) else defining[at]


def linen_scope(scope: core.Scope, variables: dict[str, Any], rngs: Any) -> core.Scope:
    """Return a scope with the name, path and flags of ``scope`` and other contents.

    Why: a packed weight is dequantised for the duration of its layer's call alone, within a call of
    the model, where ``module.apply`` would start a new model with another path.
    Needs upstream: a public way to run one bound module with other parameters.
    Checked with: flax 0.12.8.
    """
    return core.Scope(variables, rngs, scope.name, path=scope.path, flags=scope.flags)


def set_class(module: object, cls: type) -> None:
    """Change the class of a linen or an NNX module, in place.

    Why: an adapted or packed layer must be an instance of its own class with the same attributes,
    and neither framework can copy a module to a subclass. ``object.__setattr__`` is used because
    linen modules are frozen and NNX modules would record ``__class__`` among their attributes.
    Needs upstream: a method that returns a module of another class with the same attributes.
    Checked with: flax 0.12.8.
    """
    object.__setattr__(module, "__class__", cls)
