"""What an adapted NNX layer is: its adapter, its class, and how its weight is read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from adalora_jax import layers, tree
from adalora_jax.adapter import Adapter

# Where the class that Qwix gives a model's root keeps the class that it was.
UNQUANTIZED = "_unquantized_type"
# Values are made where they belong; Flax would need the mesh again to see to it, at every copy.
PLACED = {"eager_sharding": False}


class AdapterParam(nnx.LoRAParam):
    """p, lam or q of an adapter."""


class SavedParam(nnx.LoRAParam):
    """A base parameter named by ``modules_to_save``, which trains along with the adapters."""


class Adaptation(nnx.Module):
    """The adapter of one layer, as a child module of that layer.

    Attributes:
      p, lam, q: the factors, see :class:`adalora_jax.Adapter`.
      scale: s of the increment.
      dropout: of the layer's input on its way into the adapter, or None. It holds the rate, the
        random numbers and the mode; the mask is made where it is used.
      forward_mode: as in the config.
      kind: Adapter, or Observer where the layer's inputs are looked at.
    """

    kind: type[Adapter] = Adapter

    def __init__(
        self,
        adapter: Adapter,
        scale: float,
        dropout: nnx.Dropout | None = None,
        forward_mode: bool = False,
    ):
        self.p, self.lam, self.q = (AdapterParam(leaf, **PLACED) for leaf in adapter)
        self.scale = scale
        self.dropout = dropout
        self.forward_mode = forward_mode

    @property
    def adapter(self) -> Adapter:
        """The three factors as they are now."""
        return self.kind(self.p[...], self.lam[...], self.q[...])

    def add(self, layer: nnx.Module, output: jax.Array, x: Any, **call: Any) -> jax.Array:
        """The layer's output with the adapter's term added."""
        adapter = self.adapter
        equation = next((v for v in call.values() if isinstance(v, str)), None)
        spec = layers.known(layer_of(layer, equation), layer)
        shape = getattr(layer, spec.weight).shape
        layers.check_fit(spec, adapter, shape, type(layer).__name__)
        key, rate, dropout = None, 0.0, self.dropout
        if dropout is not None and not dropout.deterministic and spec.kind != "embed":
            key, rate = next_key(dropout), dropout.rate
        return output + layers.term(
            *(spec, layer, adapter, x, shape, self.scale, output.dtype),
            key=key,
            dropout_rate=rate,
            forward_mode=self.forward_mode,
            equation=equation,
            attend=call.get("attend", False),
            convolve=_convolve,
        )


def next_key(dropout: nnx.Dropout) -> jax.Array | None:
    """The key that this call of a dropout has; None for one without random numbers.

    >>> next_key(nnx.Dropout(0.1)) is None
    True
    """
    stream = dropout.rngs
    return None if stream is None else stream()


class Adapted(nnx.Module):
    """Adds the adapter's term to what the layer computes."""

    adalora: Adaptation

    def __call__(self, inputs, *args, **kwargs):
        output = super().__call__(inputs, *args, **kwargs)
        named = {str(name): value for name, value in (dict(enumerate(args)) | kwargs).items()}
        return _unintercepted(self.adalora.add)(self, output, inputs, **named)


class _AdaptedEmbed(Adapted):
    """An embedding, which is also used the other way round."""

    def attend(self, query, *args, **kwargs):
        output = super().attend(query, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return _unintercepted(self.adalora.add)(self, output, query, attend=True)


def _unintercepted(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as it is in a model that Qwix quantised, too.

    While such a model runs, Qwix puts its own in place of JAX's products. It would take p and q for
    weights that are still to be quantised.
    """
    qwix = sys.modules.get("qwix._src.interception")  # there is no such model without it
    return function if qwix is None else qwix.disable_interceptions(function)


_FLAX_LAYERS = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Embed,
    nnx.Conv,
    nnx.ConvTranspose,
)


def adapted_class(cls: type) -> type:
    """A subclass of ``cls`` whose adapter's term is added right to the Flax layer's output."""
    return extended_class(cls, _AdaptedEmbed if issubclass(cls, nnx.Embed) else Adapted, "AdaLora")


@functools.cache
def extended_class(cls: type, mixin: type, prefix: str) -> type:
    """A subclass of ``cls`` in which ``mixin`` stands right before the Flax layer's own class.

    In front of the Flax class in the method order, so that a subclass that does something to the
    layer's output does it to the extended one. One class for each, so that graph definitions of
    two models are equal.

    >>> [c.__name__ for c in extended_class(nnx.Linear, Adapted, "AdaLora").__mro__[:3]]
    ['AdaLoraLinear', 'Adapted', 'Linear']
    """

    def is_layer(base):
        # A layer that runs on a packed weight counts as the Flax layer that it is; and so does one
        # that Qwix gave a class of its own, which goes past what stands between it and its layer.
        own = vars(base)
        return base in _FLAX_LAYERS or "stands_for_its_layer" in own or UNQUANTIZED in own

    base = next((base for base in cls.__mro__ if is_layer(base)), cls)
    inner = type(f"{prefix}{base.__name__}", (mixin, base), {"__module__": __name__})
    if base is cls:
        return inner
    return type(f"{prefix}{cls.__name__}", (cls, inner), {"__module__": __name__})


def base_class(cls: type) -> type:
    """The class that an adapted layer's class was made from."""
    return next(base for base in cls.__mro__ if not issubclass(base, Adapted))


def modules(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """Every module of the model once, with its path, in the order of the graph."""
    return [
        ("/".join(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    ]


def layer_of(module: nnx.Module, equation: str | None = None) -> layers.Layer | None:
    """How a module's weight reads as matrices; None for one that cannot be adapted."""
    params = {n: v.ndim for n, v in vars(module).items() if is_weight(v)}
    return layers.layer_of(module, params, equation)


def is_weight(value: Any) -> bool:
    """True for a parameter, or what holds a weight in integers."""
    packed = isinstance(value, nnx.Variable) and tree.is_packed(value.get_raw_value())
    return packed or isinstance(value, nnx.Param) or by_qwix(value)


def by_qwix(value: Any) -> bool:
    """True for a weight as ``qwix.quantize_model`` leaves it: integers and scales in one object.

    >>> by_qwix(nnx.Param(1.0))
    False
    """
    return hasattr(value, "how") and hasattr(getattr(value, "array", None), "qvalue")


def stored(weight: Any) -> nnx.Variable:
    """The variable that says where a weight lies."""
    return weight.array.qvalue if by_qwix(weight) else weight


def pure(state: Any) -> Any:
    """A pytree with the values of its variables in their places; ``nnx.as_pure`` of newer Flax.

    >>> pure({"scale": nnx.Param(2.0)})
    {'scale': 2.0}
    """
    is_variable = lambda node: isinstance(node, nnx.Variable)
    value = lambda node: pure(node.get_raw_value()) if is_variable(node) else node
    return jax.tree.map(value, state, is_leaf=is_variable)


def own_axes(layer: layers.Layer) -> int:
    """How many axes a layer's weight has, without those that a lifted transform stacks on it.

    >>> own_axes(layers.Layer("dense", "kernel", (), (0,), (1,)))
    2
    """
    return len(layer.stack) + len(layer.ins) + len(layer.outs)


def _convolve(module: Any, x: jax.Array, kernel: jax.Array, features: int) -> jax.Array:
    """The convolution of ``module`` with another kernel and without bias."""
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
