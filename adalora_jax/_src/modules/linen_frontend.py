"""Adapters for ``flax.linen`` models, whose code stays as it is.

While the model runs, an interceptor adds each adapter's term to the output of its layer. For
that the adapters are joined into the model's ``params``, next to the weights they adapt, so that
``nn.scan``, ``nn.vmap`` and ``nn.remat`` slice and stack them like any other parameter.
"""

from __future__ import annotations

import dataclasses
import inspect
import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import unfreeze
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import NamedSharding

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter, known_scale
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.layout import Layout, declared
from adalora_jax._src.core.low_rank import wide
from adalora_jax._src.modules import layers, sharding, targets
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.linen_layers import (
    METHODS,
    apart,
    candidates,
    check_variables,
    in_base_dtype,
    input_of,
    layer_of,
    own_shape,
    unboxed,
    whole,
)

_FLAGS = {"deterministic": True, "train": False, "training": False, "is_training": False}


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """A linen module and the config by which it is adapted; see :func:`adapt`.

    Attributes:
      module: the model, unbound.
      config: targets, ranks and scale.
      rules: shardings of adapters, where they are not derived from the base's.
      layers: layouts of layers that are not Flax's, by class.
    """

    module: nn.Module
    config: AdaLoraConfig
    rules: sharding.Rules | None = dataclasses.field(default=None, hash=False)
    layers: Mapping[type, Layout] | None = dataclasses.field(default=None, hash=False)

    def init(
        self, key: jax.Array, variables: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Fresh trainable parameters: ``{path: Adapter}`` and the ``modules_to_save``.

        The model is traced, not run, to see which layers there are; that needs no memory. Under
        ``jax.eval_shape`` nothing is allocated at all.

        Args:
          key: a PRNG key.
          variables: of the model, as ``module.init`` gave them; arrays or their shapes.
          *args, **kwargs: what the model is called with; ``method`` as in ``apply``.

        Returns:
          A dict by path, ``layers/attn/query``: an :class:`~adalora_jax.Adapter` each, and for
          each of ``modules_to_save`` a copy of its parameters. On the mesh that the base is on, or
          else that of ``jax.set_mesh``, they lie as :meth:`specs` says.

        Raises:
          ValueError: the config selects nothing, or something that cannot be adapted.

        Warns:
          UserWarning: ``lora_dropout`` is above 0, but a layer gets no random numbers for it.
        """
        found = self.candidates(variables, *args, **kwargs)
        chosen = targets.select(found, self.config)
        without = [path for path in chosen if not found[path].dropout]
        if self.config.lora_dropout and without:
            warnings.warn(
                f"lora_dropout={self.config.lora_dropout}: the adapters of {', '.join(without[:5])}"
                " have no dropout, since a lifted transform around them passes on no 'dropout' "
                "random numbers: give nn.scan or nn.vmap split_rngs={'dropout': True}.",
                stacklevel=2,
            )
        at = sharding.on_mesh(self._specs(variables, chosen), placement(variables))
        fresh = targets.init_all(
            key, chosen, self.config, at and {path: at[path] for path in chosen}
        )
        params, saved = unboxed(variables), {}
        for root in self._saved_roots(params):
            node = pytree.at(params, root.split("/"))
            node = jax.tree.map(_trainable_copy, node, is_leaf=pytree.is_packed)
            move = at and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(node))
            saved[root] = sharding.placed(lambda node: node, at[root], node) if move else node
        return {**fresh, **saved}

    def specs(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The PartitionSpecs of what :meth:`init` makes, derived from where the base lies.

        A weight lies as its array's NamedSharding says, or else as its metadata does:
        ``nn.with_partitioning``, or ``nn.with_logical_partitioning`` with rules of its own or those
        of ``nn.logical_axis_rules``. For :func:`adalora_jax.shardings`.

        Args:
          variables, *args, **kwargs: as in :meth:`init`; shapes are enough.

        Returns:
          ``{path: Adapter of PartitionSpecs}``, and trees of them for ``modules_to_save``.
        """
        chosen = self._targets(variables, *args, **kwargs)
        specs, known = self._specs(variables, chosen), targets.facts(chosen, self.config)
        return specs | {path: specs[path]._replace(**known[path]) for path in chosen}

    def _specs(self, variables, chosen):
        where, saved = placement(variables), {}
        at = lambda path, t: pytree.at(where, pytree.weight_path(where, path, t.layer.weight))
        weights = {p: (t.layer, t.shape, at(p, t)) for p, t in chosen.items()}
        spec = lambda leaf, at: sharding.full(sharding.spec_of(at), len(leaf.shape))
        for root in self._saved_roots(where):
            nodes = (pytree.at(node, root.split("/")) for node in (unboxed(variables), where))
            saved[root] = jax.tree.map(spec, *nodes, is_leaf=pytree.is_packed)
        return {**sharding.derive(weights, self.rules), **saved}

    def _saved_roots(self, params):
        flat = traverse_util.flatten_dict(params, sep="/")
        return targets.saved_roots(list(flat), self.config)

    def apply(
        self,
        variables: Mapping[str, Any],
        adapters: Mapping[str, Any],
        *args: Any,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """``module.apply`` with the adapters' terms added; jit, grad and vmap as usual.

        An adapter's own dropout is active where the model's is: in a call that has a ``dropout``
        rng and no ``deterministic=True`` or ``train=False`` around the layer.

        Args:
          variables: of the model; not changed, and not differentiated unless asked for.
          adapters: as :meth:`init` gave them, trained or not. A mapping of p, lam and q in the
            place of an :class:`Adapter` gets the scale of this config.
          *args: of the model.
          mutable: as in ``module.apply``; what comes back never contains adapters.
          **kwargs: of the model and of ``module.apply`` (``rngs``, ``method`` ...).

        Returns:
          What ``module.apply`` returns.

        Raises:
          ValueError: an adapter belongs to no layer of this model, or to one of another shape.
        """
        joined, sharing = self._join(variables, adapters)
        with nn.intercept_methods(_adding(sharing, self.layers)):
            result = self.module.apply(joined, *args, mutable=mutable, **kwargs)
        if mutable is False:
            return result
        output, mutated = result
        if "params" in mutated:
            mutated = apart({**mutated, "params": _strip(mutated["params"])})
        return output, mutated

    def bind(self, variables: Mapping[str, Any]) -> BoundModule:
        """Return a module of which the adapters are the parameters, for loops that know no others.

        Args:
          variables: of the model. Under ``jit`` they become constants of the program, so pass a
            large base to :meth:`apply` instead.

        >>> import jax.numpy as jnp
        >>> model, x = nn.Dense(4), jnp.ones((2, 6))
        >>> config = AdaLoraConfig(total_step=10, target_modules=".*")
        >>> bound = adapt(model, config).bind(model.init(jax.random.key(0), x))
        >>> params = bound.init(jax.random.key(1), x)["params"]
        >>> list(params), bound.apply({"params": params}, x).shape
        ([''], (2, 4))
        """
        check_variables(variables)
        return BoundModule(self, variables)

    def describe(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> str:
        """The table of what :meth:`init` would make, before anything is allocated."""
        found = self.candidates(variables, *args, **kwargs)
        params = jax.tree_util.tree_flatten_with_path(unboxed(variables))[0]
        shapes = {pytree.path_name(path): tuple(leaf.shape) for path, leaf in params}
        return targets.describe(targets.select(found, self.config), self.config, found, shapes)

    def _targets(self, variables, *args, **kwargs) -> dict[str, targets.Target]:
        return targets.select(self.candidates(variables, *args, **kwargs), self.config)

    def candidates(
        self, variables: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Candidate]:
        """Return all modules that the model calls, by path, see :func:`linen_layers.candidates`."""
        check_variables(variables)
        return candidates(self.module, variables, args, kwargs, self.layers)

    def _join(self, variables, adapters):
        """The variables with each adapter, and each saved module, in its place in ``params``.

        And the paths of the modules that share their scope, and so its adapters, with others.
        """
        check_variables(variables)
        if not isinstance(adapters, Mapping):
            raise TypeError(
                f"adapters is a {type(adapters).__name__}: it must be the dict that init returned; "
                "arguments are (variables, adapters, *inputs)."
            )
        variables = whole(variables)
        params = unfreeze(variables["params"])
        sharing: set[tuple[str, ...]] = set()
        for path, node in adapters.items():
            parts = path.split("/") if path else []
            there = pytree.at(params, parts)
            if there is None:
                raise ValueError(
                    f"adapters[{path!r}] belongs to no layer of {type(self.module).__name__}, "
                    f"whose parameters are {', '.join(sorted(params))}: it was made for another "
                    "model."
                )
            if not pytree.is_adapter(node):
                pytree.at(params, parts[:-1])[parts[-1]] = in_base_dtype(node, there, path)
                continue
            held = _Held.of(node, self.config, path)
            if isinstance(there, dict):
                there[pytree.HOLDER] = held
            else:  # the weight itself, of a scope with several
                pytree.at(params, parts[:-1])[_of_weight(parts[-1])] = held
                sharing.add(tuple(parts[:-1]))
        return {**variables, "params": params}, sharing


@dataclasses.dataclass(frozen=True)
class BoundModule:
    """An adapted module with its base, called as a linen module is; see :meth:`AdaptedModule.bind`.

    Attributes:
      adapted: the module and its config.
      variables: of the base.
    """

    adapted: AdaptedModule
    variables: Mapping[str, Any] = dataclasses.field(hash=False)

    def init(
        self, rngs: jax.Array | Mapping[str, jax.Array], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return ``{"params": adapters}`` and the base's other collections.

        Args:
          rngs: a PRNG key, or a dict of them with one for ``params``, as linen modules take.
          *args, **kwargs: as in :meth:`AdaptedModule.init`.
        """
        key = rngs["params"] if isinstance(rngs, Mapping) else rngs
        fresh = self.adapted.init(key, self.variables, *args, **kwargs)
        return {**self.variables, "params": fresh}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the adapted model computes.

        Args:
          variables: as :meth:`init` gave them: adapters as ``params``; other collections, such as
            ``batch_stats``, take the place of the base's.
          *args, **kwargs: as in :meth:`AdaptedModule.apply`.
        """
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ValueError("variables: pass {'params': adapters}, as init returned them.")
        base = {**self.variables, **variables, "params": self.variables["params"]}
        return self.adapted.apply(base, variables["params"], *args, **kwargs)


def adapt(
    model: nn.Module,
    config: AdaLoraConfig,
    *,
    rules: sharding.Rules | None = None,
    layers: Mapping[type, Layout] | None = None,
) -> AdaptedModule:
    """Gives a linen model AdaLoRA adapters without changing its code, class or parameters.

    Which layers are adapted is decided in :meth:`AdaptedModule.init`, when their shapes are known.
    A layer's increment counts where the layer is called; code that takes the weight out of a module
    and computes with it (``x @ embed.embedding.T`` instead of ``embed.attend(x)``) sees the base.

    Args:
      model: any linen module, unbound.
      config: the targets, ranks and scale.
      rules: where adapters are to lie on a mesh, if not as :meth:`AdaptedModule.specs` derives it:
        ``{pattern: Adapter of PartitionSpecs}`` or a function, see
        :func:`adalora_jax.sharding.derive`.
      layers: ``{class: Layout}`` of layers that are not Flax's: each must compute
        ``y = x W + b`` over the last axes of x with the weight that its layout names.

    Raises:
      TypeError: ``model`` is no linen module, or ``config`` no :class:`AdaLoraConfig`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(4, name="query"), jnp.ones((2, 6))
    >>> variables = model.init(jax.random.key(0), x)
    >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
    >>> adapters = adapted.init(jax.random.key(1), variables, x)
    >>> bool((adapted.apply(variables, adapters, x) == model.apply(variables, x)).all())
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not a flax.linen module; adalora_jax.nnx.adapt "
            "takes NNX modules."
        )
    if not isinstance(config, AdaLoraConfig):
        raise TypeError(f"config={reprlib.repr(config)} must be an AdaLoraConfig.")
    return AdaptedModule(model, config, rules, declared(layers))


def describe(
    model: nn.Module, config: AdaLoraConfig, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> str:
    """The table of what would be adapted: layers, shapes, ranks, parameters.

    Args:
      model, config: as in :func:`adapt`.
      variables, *args, **kwargs: as in :meth:`AdaptedModule.init`; shapes are enough.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(4), jnp.ones((2, 6))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> print(describe(model, AdaLoraConfig(total_step=10, target_modules=".*"), variables, x))
    layer   kind    matrices   in   out   rank   parameters   kernel      cost
            dense          1    6     4     12          132       24   550.0 %
    total                  1                12          132       24   550.0 %
    memory: adapters 528 bytes, importance 1.1 kB
    """
    return adapt(model, config).describe(variables, *args, **kwargs)


def resolve(
    model: nn.Module, config: AdaLoraConfig, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> AdaLoraConfig:
    """``config`` with a function as ``target_modules`` replaced by what it chose in ``model``.

    A function may give a :class:`~adalora_jax.RankSpec` where it would say True. The optimizer
    and merging see paths, not modules, so those must be in the config before it is used.

    Args:
      model, config: as in :func:`adapt`.
      variables, *args, **kwargs: as in :meth:`AdaptedModule.init`; shapes are enough.

    >>> import adalora_jax, flax.linen as nn, jax, jax.numpy as jnp
    >>> def choose(path, module):
    ...     return adalora_jax.RankSpec(init_r=4) if isinstance(module, nn.Dense) else False
    >>> model, x = nn.Sequential([nn.Dense(4)]), jnp.ones((2, 6))
    >>> variables = model.init(jax.random.key(0), x)
    >>> config = AdaLoraConfig(total_step=10, target_r=2, target_modules=choose)
    >>> config = resolve(model, config, variables, x)
    >>> adapt(model, config).init(jax.random.key(1), variables, x)["layers_0"].lam.shape
    (4,)
    """
    adapt(model, config)  # its refusals
    return targets.resolve(candidates(model, variables, args, kwargs), config)


def placement(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Where each parameter lies: a NamedSharding, or what the metadata says, or None."""

    def where(node):
        if not isinstance(node, nn.Partitioned):
            return sharding.sharding_of(node)
        spec = node.get_partition_spec()
        if isinstance(node, nn.LogicallyPartitioned):
            spec = logical_to_mesh_axes(tuple(spec), node.rules)
        if spec is not None and node.mesh is not None:
            spec = NamedSharding(node.mesh, spec)
        return sharding.sharding_of(node.value, spec)

    is_leaf = lambda node: not isinstance(node, Mapping)
    return jax.tree.map(where, unfreeze(whole(variables)["params"]), is_leaf=is_leaf)


class _Frame(NamedTuple):
    """A method call that is under way."""

    name: tuple[Any, ...]  # path and method
    dropout_off: bool
    inner: set[Any]  # names of the calls within that have added their term


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Held:
    """An adapter among the parameters of a model that runs, with what else its term depends on.

    That is part of its type, for what ``nn.jit`` has traced is used again where types are equal.
    """

    adapter: Adapter
    dropout: float = dataclasses.field(metadata={"static": True})
    forward_mode: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, node: Any, config: AdaLoraConfig, path: str) -> _Held:
        if isinstance(node, Adapter):
            known_scale(node, path)
            adapter = node
        else:  # p, lam and q, as trainers of nested dicts hold them
            adapter = pytree.adapters(node)[""]._replace(scale=config.scale_of(path))
        return cls(adapter, config.lora_dropout, config.forward_mode)


def _of_weight(name: str) -> str:
    """The holder of an adapter of one of several weights in a scope."""
    return f"{pytree.HOLDER}_{name}"


def _adding(sharing: set[tuple[str, ...]], declared: Mapping[type, Layout] | None) -> Callable:
    """The interceptor that adds the adapters' terms; one for each run of the model."""
    frames: list[_Frame] = []

    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        off = _dropout_off(module, context.orig_method, args, kwargs)
        if off is None:
            off = bool(frames) and frames[-1].dropout_off
        frame = _Frame((module.path, context.method_name), off, set())
        frames.append(frame)
        try:
            output = call(*args, **kwargs)
        finally:
            frames.pop()
        # Where a subclass's method calls the layer's own, the term belongs to the inner call.
        held = _held(context, args, kwargs, sharing, declared)
        if held is None or frame.name in frame.inner:
            return output
        for outer in frames:
            outer.inner.add(frame.name)
        return _add(held, context, args, kwargs, output, off, declared)

    return intercept


def _held(
    context: Any,
    args: tuple,
    kwargs: dict,
    sharing: set[tuple[str, ...]],
    declared: Mapping[type, Layout] | None,
) -> _Held | None:
    """The adapter of the layer that was called, if it was one that has an adapter."""
    module = context.module
    if context.method_name not in METHODS or module.scope is None:
        return None
    name = pytree.HOLDER
    if module.path in sharing:
        layer = layer_of(module, input_of(args, kwargs)[1], declared)
        name = _of_weight(layer.weight) if layer else name
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def _add(held, context, args, kwargs, output, dropout_off, declared):
    """The output of a layer with its adapter's term added."""
    module, (x, equation) = context.module, input_of(args, kwargs)
    layer = layers.known(layer_of(module, equation, declared), module)
    shape = own_shape(module, layer)
    layers.check_fit(layer, held.adapter, shape, "/".join(module.path))
    if layer.kind == "weight":  # the module's output is its weight
        delta = layers.weight_increment(layer, held.adapter, shape)
        return output[0] + delta.astype(output[0].dtype), *output[1:]
    dropping = held.dropout > 0 and not dropout_off and layer.kind != "embed"
    dropping = dropping and module.has_rng("dropout")
    return output + layers.term(
        *(layer, module, held.adapter, x, shape, output.dtype),
        key=module.make_rng("dropout") if dropping else None,
        dropout_rate=held.dropout,
        forward_mode=held.forward_mode,
        equation=equation,
        attend=context.method_name == "attend",
        convolve=_convolve,
    )


def _convolve(module: Any, x: jax.Array, kernel: jax.Array, features: int) -> Any:
    """The convolution of ``module`` with another kernel and without bias."""
    # Flax's own class: a subclass may do more than convolve.
    kind = nn.ConvTranspose if isinstance(module, nn.ConvTranspose) else nn.Conv
    names = {field.name for field in dataclasses.fields(kind)} - {"parent", "name"}
    fields = {name: getattr(module, name) for name in names}
    same = kind(**fields | {"features": features, "use_bias": False}, parent=None)
    return same.apply({"params": {"kernel": kernel}}, x)


def _dropout_off(module, method, args, kwargs) -> bool | None:
    """What a call says about dropout, by its arguments or else by the module's attribute."""
    bound = inspect.signature(method).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    for said in (bound.arguments, kwargs, vars(module)):
        for name, off in _FLAGS.items():
            if isinstance(said.get(name), bool):
                return said[name] is off
    return None


def _trainable_copy(leaf: Any) -> Any:
    """Return a copy in at least float32: smaller steps than a bfloat16 holds would be lost."""
    if pytree.is_packed(leaf):
        leaf = leaf.dequantize()
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
    dtype = wide(leaf.dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return jnp.array(leaf, dtype)


def _strip(params: Any) -> Any:
    """Without adapters."""
    if not isinstance(params, Mapping):
        return params
    kept = {name: node for name, node in params.items() if not isinstance(node, _Held)}
    return {name: _strip(node) for name, node in kept.items()}
