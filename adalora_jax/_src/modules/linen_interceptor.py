"""The interceptor that adds adapter outputs while a linen model runs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter, known_scale
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import foreign, layers
from adalora_jax._src.modules.linen_layers import (
    METHODS,
    input_of,
    layer_of,
    layer_of_call,
    own_shape,
    problem_with_call,
)

_FLAGS = {"deterministic": True, "train": False, "training": False, "is_training": False}


class _CallFrame(NamedTuple):
    """A method call in progress."""

    name: tuple[Any, ...]  # path and method
    dropout_off: bool
    inner: set[Any]  # names of inner calls that have added their adapter output


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundAdapter:
    """An adapter in the parameters of a running model, with static settings of its output.

    The settings are part of the pytree's type, because ``nn.jit`` reuses traces of equal types.
    """

    adapter: Adapter
    dropout: float = dataclasses.field(metadata={"static": True})
    forward_mode: bool = dataclasses.field(metadata={"static": True})
    output: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, node: PyTree, config: AdaLoraConfig, path: str, output: Callable[..., jax.Array]
    ) -> BoundAdapter:
        if isinstance(node, Adapter):
            known_scale(node, path)
            adapter = node
        else:  # a mapping of p, lam and q, as in trainers with nested dicts
            adapter = pytree.adapters(node)[""]._replace(scale=config.scale_of(path))
        return cls(adapter, config.lora_dropout, config.forward_mode, output)


def key_of_weight(name: str) -> str:
    """Return the key of the adapter of one of several weights in a scope."""
    return f"{pytree.ADAPTER_KEY}_{name}"


def adapter_interceptor(
    sharing: set[tuple[str, ...]], declared: foreign.Declarations | None
) -> Callable:
    """Return an interceptor that adds the adapter outputs; make one per run of the model."""
    frames: list[_CallFrame] = []

    def intercept(call: Callable, args: tuple, kwargs: dict, context: InterceptorContext) -> PyTree:
        module = context.module
        off = _dropout_off(module, context.orig_method, args, kwargs)
        if off is None:
            off = bool(frames) and frames[-1].dropout_off
        frame = _CallFrame((module.path, context.method_name), off, set())
        frames.append(frame)
        try:
            output = call(*args, **kwargs)
        finally:
            frames.pop()
        # If a subclass's method calls the layer's own, only the inner call adds the output.
        held = _bound_adapter(context, args, kwargs, sharing, declared)
        if held is None or frame.name in frame.inner:
            return output
        for outer in frames:
            outer.inner.add(frame.name)
        return _add(held, context, args, kwargs, output, off, declared)

    return intercept


def _bound_adapter(
    context: InterceptorContext,
    args: tuple,
    kwargs: dict,
    sharing: set[tuple[str, ...]],
    declared: foreign.Declarations | None,
) -> BoundAdapter | None:
    """Return the adapter of the called layer; None if it has none."""
    module = context.module
    if context.method_name not in METHODS or module.scope is None:
        return None
    name = pytree.ADAPTER_KEY
    if module.path in sharing:
        layer = layer_of(module, input_of(args, kwargs)[1], declared)
        name = key_of_weight(layer.weight) if layer else name
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def _add(
    held: BoundAdapter,
    context: InterceptorContext,
    args: tuple,
    kwargs: dict,
    output: PyTree,
    dropout_off: bool,
    declared: foreign.Declarations | None,
) -> PyTree:
    """Return the output of a layer with its adapter output added."""
    module, (x, equation) = context.module, input_of(args, kwargs)
    layer = layer_of_call(module, context.method_name, args, kwargs, declared)
    if layer is None and declared is not None:
        foreign.require_call("its output is not y = x W + b of its one weight", type(module))
    layer = layers.require_layer(layer, module)
    shape = own_shape(module, layer)
    layers.check_fit(layer, held.adapter, shape, "/".join(module.path))
    if layer.kind == "weight":  # the module's output is its weight
        delta = layers.weight_increment(layer, held.adapter, shape)
        return output[0] + delta.astype(output[0].dtype), *output[1:]
    others = [v for v in jax.tree.leaves((args, kwargs)) if v is not x]
    if others and foreign.layout_of(module, declared):  # checked in init, for other values
        problem = problem_with_call(module, layer, context.method_name, args, kwargs)
        foreign.require_call(problem, type(module))
    dropping = held.dropout > 0 and not dropout_off and layer.kind != "embed"
    dropping = dropping and module.has_rng("dropout")
    term = held.output(
        *(layer, module, held.adapter, x, shape, output.dtype),
        key=module.make_rng("dropout") if dropping else None,
        dropout_rate=held.dropout,
        forward_mode=held.forward_mode,
        equation=equation,
        attend=context.method_name == "attend",
        convolve=_convolve,
    )
    return layers.add_output(output, term)


def _convolve(module: nn.Module, x: jax.Array, kernel: jax.Array) -> PyTree:
    """Apply the convolution of ``module`` with another kernel, without bias and groups."""
    # Use Flax's own class, since a subclass may do more than convolve.
    kind = nn.ConvTranspose if isinstance(module, nn.ConvTranspose) else nn.Conv
    names = {field.name for field in dataclasses.fields(kind)}
    names -= {"parent", "name", "feature_group_count"}
    fields = {name: getattr(module, name) for name in names}
    transposed = fields.get("transpose_kernel", False)
    features = kernel.shape[-2 if transposed else -1]
    same = kind(**fields | {"features": features, "use_bias": False}, parent=None)
    return same.apply({"params": {"kernel": kernel}}, x)


def _dropout_off(
    module: nn.Module, method: Callable[..., Any], args: tuple, kwargs: dict
) -> bool | None:
    """Return whether a call's arguments, or else the module's attributes, turn dropout off.

    None if neither specifies it.
    """
    bound = inspect.signature(method).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    for source in (bound.arguments, kwargs, vars(module)):
        for name, off in _FLAGS.items():
            if isinstance(source.get(name), bool):
                return source[name] is off
    return None


def strip_adapters(params: PyTree) -> PyTree:
    """Return the parameters without the adapters."""
    if not isinstance(params, Mapping):
        return params
    kept = {name: node for name, node in params.items() if not isinstance(node, BoundAdapter)}
    return {name: strip_adapters(node) for name, node in kept.items()}
