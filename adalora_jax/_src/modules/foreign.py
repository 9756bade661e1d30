"""Layouts of layers that are not Flax's: declared, known by their class's name, or inferred.

Other packages are not imported: a class is known by the first part of its module's name and by its
own name. A layer is adapted only if a trace shows that it computes the product that its layout
says, see :func:`problem_with`. The layout of any other module with one weight is inferred if the
trace proves exactly one, see :func:`inferred`.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax

from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import einsum, products

# The start of the problem with a call that raises an error.
RAISES = "its call raises "
# Words in the names of attributes that hold the size of a layer's input, and of its output.
_SIDES = (frozenset({"in", "input", "inputs"}), frozenset({"out", "output", "outputs"}))
Declarations: TypeAlias = Mapping[type | str, Layout | Callable[[Any], Layout]]


def declared(layers: Declarations | None) -> dict[type | str, Layout | Callable[[Any], Layout]]:
    """Return the layouts that a user declared for classes of layers, checked; empty for None.

    Raises:
      ValueError: a key is not a class or its qualified name, a value is neither a layout nor a
        function, or a layout is not one that can be declared.

    >>> declared({"zoo.layers.Proj": Layout("w", equation="...d,df->...f")})["zoo.layers.Proj"].outs
    (1,)
    """
    for cls, layout in dict(layers or {}).items():
        is_name = isinstance(cls, str) and "." in cls
        if not (isinstance(cls, type) or is_name) or not (
            isinstance(layout, Layout) or callable(layout)
        ):
            raise ValueError(
                f"`layers={{{cls!r}: {layout!r}}}`: must map a class to a Layout; pass "
                "{class: Layout(...)}, or the class's qualified name, and instead of the Layout a "
                "function of the module that returns one."
            )
        if isinstance(layout, Layout):
            _check(cls, layout)
    return dict(layers or {})


def layout_of(module: object, layers: Declarations | None) -> Layout | str | None:
    """Return the layout of a declared or known layer.

    Args:
      module: any linen or NNX module.
      layers: the declarations, from :func:`declared`. None: neither they nor the known layers are
        looked up.

    Returns:
      The layout, or the reason why this layer cannot be adapted; None for other modules.

    Raises:
      ValueError: a function in ``layers`` does not return a layout that can be declared.
    """
    if layers is None:
        return None
    cls = type(module)
    declaration = layers.get(cls, layers.get(_qualified(cls)))
    if declaration is None:
        known = (
            _KNOWN.get((c.__module__.partition(".")[0].lower(), c.__name__)) for c in cls.__mro__
        )
        rule = next(filter(None, known), None)
        return rule and rule(module)
    if isinstance(declaration, Layout):
        return declaration
    layout = declaration(module)
    if not isinstance(layout, Layout):
        raise ValueError(
            f"`layers={{{cls.__name__}: ...}}`: the function returned {layout!r:.80}; return a "
            "Layout, and select the layers to adapt with target_modules."
        )
    _check(cls, layout)
    return layout


def require_product(problem: str, module: object, path: str, layers: Declarations) -> str:
    """Return why a known layer is not its layout's product; raise the error of a declared one.

    Args:
      problem: the result of :func:`problem_with`.
      module: the layer.
      path: its path.
      layers: the declarations.

    Raises:
      ValueError: there is a problem with a layer whose class the user declared.
    """
    cls, layout = type(module), layout_of(module, layers)
    if not problem or not (cls in layers or _qualified(cls) in layers):
        return problem and f"its layout is {declaration_of(layout)}, but {problem}"
    raise ValueError(
        f"`layers={{{cls.__name__}: {declaration_of(layout)}}}`: {path!r} computes something else: "
        f"{problem}; declare the product that it computes, or leave the class out."
    )


def require_call(problem: str, cls: type) -> None:
    """Raise an error if a call of an adapted layer is not the product of its layout.

    Raises:
      ValueError: there is a problem; the message names the class.
    """
    if problem:
        raise ValueError(
            f"`layers`: with these arguments a {cls.__name__} does not compute the product of its "
            f"Layout: {problem}; call it as the layout says, or leave it out of target_modules."
        )


def check_names(layers: Declarations, modules: Iterable[object]) -> None:
    """Raise an error if a qualified name in ``layers`` is not that of a module's class.

    Raises:
      ValueError: the message lists the classes of the model.
    """
    names = sorted({_qualified(type(module)) for module in modules})
    for name in layers:
        if isinstance(name, str) and name not in names:
            raise ValueError(
                f"`layers={{{name!r}: ...}}`: no module of the model is of this class; name one of "
                f"{', '.join(names[:20])}."
            )


def declaration_of(layout: Layout | str | None) -> str:
    """Return a layout as a declaration in code.

    >>> declaration_of(Layout("w", ins=(1,), outs=(0,)))
    "Layout('w', ins=(1,), outs=(0,))"
    """
    if not isinstance(layout, Layout):
        return "unknown"
    if layout.equation:
        return f"Layout({layout.weight!r}, equation={layout.equation!r})"
    kind = ", kind='embed'" if layout.kind == "embed" else ""
    return f"Layout({layout.weight!r}, ins={layout.ins}, outs={layout.outs}{kind})"


def example(cls: type, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the declaration of a class with one weight of two or more axes; empty for others.

    Args:
      cls: the class of a layer.
      shapes: as in :func:`weight_of`.

    >>> from flax import nnx
    >>> example(nnx.Linear, {"w": (3, 4), "b": (4,)})
    "layers={Linear: Layout('w', equation='...a,ab->...b')}"
    """
    weight = weight_of(shapes)
    if not weight:
        return ""
    ws = string.ascii_lowercase[: len(shapes[weight])]
    layout = Layout(weight, equation=f"...{ws[0]},{ws}->...{ws[1:]}")
    return f"layers={{{cls.__name__}: {declaration_of(layout)}}}"


def weight_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the one parameter of two or more axes of a module; empty if it is not one.

    A bias may have several axes, the first or the last of the weight's.

    Args:
      shapes: shapes of the module's parameters by path, those of its child modules included.

    >>> weight_of({"w": (5, 2, 3), "b": (2, 3)}), weight_of({"w": (3, 4), "v": (3, 4)})
    ('w', '')
    """
    large = {path: shape for path, shape in shapes.items() if len(shape) >= 2}

    def is_bias(shape: tuple[int, ...]) -> bool:
        n = len(shape)
        return any(len(w) > n and shape in (w[:n], w[-n:]) for w in large.values())

    weights = [path for path, shape in large.items() if not is_bias(shape)]
    return weights[0] if len(weights) == 1 and not any("/" in path for path in shapes) else ""


def inferred(
    shapes: Mapping[str, tuple[int, ...]], problem: Callable[[Layout], str]
) -> Layout | None:
    """Return the layout of a module that computes ``y = x W + b`` with its one weight.

    The sum is over the first axes of the weight or over its last ones.

    Args:
      shapes: as in :func:`weight_of`.
      problem: return why the module does not compute the product of a layout; empty if it does.

    Returns:
      The layout; None if the module does not have one weight, or computes the product of none or of
      several, such as with a weight of a single number.
    """
    weight = weight_of(shapes)
    axes = tuple(range(len(shapes[weight]))) if weight else ()
    splits = [(axes[:n], axes[n:]) for n in range(1, len(axes))]
    layouts = [Layout(weight, *pair) for one, two in splits for pair in ((one, two), (two, one))]
    found = [layout for layout in layouts if not problem(layout)]
    return found[0] if len(found) == 1 else None


def sizes_are_attributes(
    attributes: Mapping[str, object], ins: tuple[int, ...], outs: tuple[int, ...]
) -> bool:
    """Return whether a module's attributes tell the sizes of its input and of its output.

    An attribute with "in" or "out" in its name tells a whole size. Each axis of an input or an
    output without such an attribute must have the size of another attribute.

    Args:
      attributes: the module's attributes, of which numbers and tuples of numbers count.
      ins: sizes of the weight's axes that the module sums over.
      outs: sizes of its other axes.

    >>> sizes_are_attributes({"in_features": 6, "heads": 2, "head_dim": 4}, (6,), (2, 4))
    True
    >>> sizes_are_attributes({"in_features": 6, "out_features": 8}, (3,), (6, 8))  # stacked
    False
    """
    numbers: dict[str, tuple[int, ...]] = {}
    for name, value in attributes.items():
        entries = value if isinstance(value, (tuple, list)) else (value,)
        sizes = tuple(entry for entry in entries if type(entry) is int)  # True is a number, too
        numbers |= {name: sizes} if sizes and len(sizes) == len(entries) else {}
    unnamed: Counter[int] = Counter()
    for words, sizes in zip(_SIDES, (ins, outs)):
        named = [v for n, v in numbers.items() if not words.isdisjoint(n.lower().split("_"))]
        if named and all(math.prod(v) != math.prod(sizes) for v in named):
            return False
        unnamed.update(() if named else sizes)
    return not unnamed - Counter(i for v in numbers.values() for i in v)


def problem_with(
    layer: Layout,
    method: str,
    run: Callable[[Any, Any], PyTree],
    variables: PyTree,
    weight: int,
    arguments: Mapping[int, Any],
) -> str:
    """Return why a layer's call does not compute the product of its layout; empty if it does.

    The call is traced, not run.

    Args:
      layer: the layout.
      method: the name of the called method; ``"attend"`` of an embedding computes ``x Eᵀ``.
      run: ``(variables, arguments)``: call the layer.
      variables: arrays or shapes of the layer's variables.
      weight: position of the layer's weight among the leaves of ``variables``.
      arguments: arrays or shapes of the call's arguments, of which the first is the input.
    """
    try:
        closed, output = jax.make_jaxpr(run, return_shape=True)(variables, arguments)
    except Exception as error:  # another project's class may raise any error
        lines = str(error).strip().splitlines()
        return f"{RAISES}{type(error).__name__}: {' '.join(lines[:1]).rstrip('.')}"
    if not hasattr(output, "shape"):
        return f"its call returns a {type(output).__name__} instead of an array"
    x = len(jax.tree.leaves(variables))
    labels = einsum.labels_of_call(
        layer, jax.tree.leaves(arguments)[0].ndim, attend=method == "attend"
    )
    return products.problem_with(closed.jaxpr, weight, x, labels)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check(cls: type | str, layout: Layout) -> None:
    """Raise an error unless a layout is of a kind that can be declared.

    Raises:
      ValueError: it has a shape, or needs attributes of Flax's layers.
    """
    plain = layout.kind in ("dense", "embed") and not layout.stack
    if layout.shape is not None or not (plain or layout.equation):
        name = cls if isinstance(cls, str) else cls.__name__
        raise ValueError(
            f"`layers={{{name}: {layout!r}}}`: is not the Layout of a layer that can be declared; "
            "pass one with an equation, or of kind 'dense' (y = x W over the last axes of x) or "
            "'embed', without stack axes and shape."
        )


def _dense_general(module: PyTree) -> Layout | str:
    """Return the layout of MaxText's DenseGeneral, whose kernel is ``[*in, *out]``."""
    if module.quant is not None:
        return "MaxText quantises its product (build the model with quantization='')"
    own = (*module.in_features_shape, *module.out_features_shape)
    shape = tuple(module.kernel.shape)
    front, whole = len(shape) - len(own), len(module.in_features_shape)
    # The position of the layer axis, as far as the shape shows it.
    fits = [k for k in range(len(shape)) if (*shape[:k], *shape[k + 1 :]) == own]
    if front > 0 and (
        shape[front:] != own or fits[1:] or module.kernel.get_metadata("param_scan_axis", 0)
    ):
        return (
            f"its kernel {shape} is stacked along another axis than the first (build the model "
            "with param_scan_axis=0 or scan_layers=False)"
        )
    axes, ins, outs = tuple(module.axis), range(whole), range(whole, len(own))
    if axes == tuple(range(-whole, 0)):
        return Layout("kernel", tuple(ins), tuple(outs))
    if max(axes) >= 0:
        return f"its axis={axes} counts from the first axis of the input (count from the last)"
    xs = string.ascii_letters[: -min(axes)]
    summed = "".join(xs[axis] for axis in axes)
    new = string.ascii_letters[len(xs) : len(xs) + len(outs)]
    free = "".join(label for label in xs if label not in summed)
    return Layout("kernel", equation=f"...{xs},{summed}{new}->...{free}{new}")


def _several_weights(way_out: str) -> str:
    """Return why a module that computes several products cannot be adapted."""
    return (
        "it has several weights with an activation between them, so no term that is added to its "
        f"output equals an increment of all ({way_out})"
    )


_AS_FUNCTION = (
    "adapt the model as a function: graph, params = nnx.split(model), and "
    "functional.adapt(lambda params, x: nnx.merge(graph, params)(x), params, config, x)"
)


def _always(layout: Layout | str) -> Callable[[Any], Layout | str]:
    return lambda module: layout


# {(package, class): the layout of an instance, or why it cannot be adapted}
_KNOWN: Mapping[tuple[str, str], Callable[[Any], Layout | str]] = MappingProxyType(
    {
        ("maxtext", "DenseGeneral"): _dense_general,
        ("maxtext", "DeepSeekV4GroupedLinear"): _always(
            Layout("kernel", equation="...gd,gdf->...gf")
        ),
        ("easydel", "ParallelLinear"): _always(Layout("kernel")),
        ("easydel", "ParallelLinearQuantized"): _always(
            "EasyDeL quantises its weight (adapt the model before it is quantised)"
        ),
        ("easydel", "ParallelMoELinear"): _always(
            "it multiplies each token with the weight of one expert"
        ),
        ("bonsai", "ShardedLinear"): _always(Layout("kernel")),
        ("transformers", "FlaxConv1D"): _always(Layout("kernel", ins=(1,), outs=(0,))),
        ("openpi", "FeedForward"): _always(
            _several_weights("compute each product in a module of its own, such as openpi's Einsum")
        ),
        ("tunix", "MoELayer"): _always(_several_weights(_AS_FUNCTION)),
        ("tunix", "MoERagged"): _always(_several_weights(_AS_FUNCTION)),
        ("maxtext", "RoutedMoE"): _always(_several_weights(_AS_FUNCTION)),
    }
)
