"""Adapters for ``flax.linen`` models, without changes to their code.

While the model runs, an interceptor adds each adapter output to the output of its layer. The
adapters are joined into the model's ``params``, next to the weights they adapt, so that
``nn.scan``, ``nn.vmap`` and ``nn.remat`` slice and stack them like any other parameter.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from flax.core import unfreeze
from flax.core.scope import CollectionFilter
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import NamedSharding, PartitionSpec

from adalora_jax._src.core import pytree
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import layers, sharding, targets
from adalora_jax._src.modules import params as parameters
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.foreign import Declarations, declared
from adalora_jax._src.modules.linen_interceptor import (
    BoundAdapter,
    adapter_interceptor,
    key_of_weight,
    strip_adapters,
)
from adalora_jax._src.modules.linen_layers import (
    candidates,
    check_variables,
    in_base_dtype,
    join_quantized,
    split_quantized,
    unboxed,
)


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """A linen module and the config by which it is adapted; see :func:`adapt`.

    Attributes:
      module: the model, an unbound linen module.
      config: targets, ranks and scale of the adapters.
      rules: shardings of adapters that differ from those derived from the base; None if none do.
      layers: layouts of layers that are not Flax's, see :func:`adapt`. None: only Flax's layers
        are adapted.

    >>> import flax.linen as nn
    >>> adapted = adapt(nn.Dense(4), AdaLoraConfig(total_step=10, target_modules=".*"))
    >>> adapted.module.features, adapted.config.init_r
    (4, 12)
    """

    module: nn.Module
    config: AdaLoraConfig
    rules: sharding.Rules | None = dataclasses.field(default=None, hash=False)
    layers: Declarations | None = dataclasses.field(default=None, hash=False)
    # Computes the adapter output, with the arguments of layers.adapter_output.
    _adapter_output: Callable[..., jax.Array] = dataclasses.field(
        default_factory=lambda: layers.adapter_output, repr=False
    )

    def init(
        self, key: jax.Array, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any
    ) -> dict[str, PyTree]:
        """Initialise the trainable parameters: adapters and the ``modules_to_save``.

        The model is traced, not run, to find its layers; this needs no memory. Under
        ``jax.eval_shape`` nothing is allocated at all.

        Args:
          key: a PRNG key.
          variables: the model's variables, as ``module.init`` returns them; arrays or
            ``jax.ShapeDtypeStruct``.
          *args: arguments of the model.
          **kwargs: arguments of the model; ``method`` as in ``module.apply``.

        Returns:
          A dict by path (``layers/attn/query``) with an :class:`~adalora_jax.Adapter` per layer,
          and for each of ``modules_to_save`` a copy of its parameters in at least float32. If the
          base is on a mesh, or ``jax.set_mesh`` sets one, they are sharded as :meth:`specs`
          returns.

        Raises:
          TypeError: ``key`` is not a PRNG key, or ``variables`` is not a mapping.
          ValueError: ``variables`` has no ``params``, the config selects nothing or a module
            that cannot be adapted, or a layer does not compute what ``layers`` declares.

        Warns:
          UserWarning: ``lora_dropout`` is above 0, but a layer gets no random numbers for it.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model, x = nn.Dense(4), jnp.ones((2, 6))
        >>> variables = model.init(jax.random.key(0), x)
        >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
        >>> adapter = adapted.init(jax.random.key(1), variables, x)[""]
        >>> adapter.p.shape, adapter.lam.shape, adapter.q.shape
        ((12, 4), (12,), (12, 6))
        """
        check_variables(variables, "init(key, variables, *inputs)")
        found = self._candidates(variables, *args, **kwargs)
        chosen = targets.select(found, self.config)
        without = [path for path in chosen if not found[path].dropout]
        if self.config.lora_dropout and without:
            warnings.warn(
                f"`lora_dropout={self.config.lora_dropout}`: does not apply to "
                f"{', '.join(without[:5])}, since a lifted transform passes on no 'dropout' random "
                "numbers; give nn.scan or nn.vmap split_rngs={'dropout': True}.",
                stacklevel=2,
            )
        at = sharding.to_named_sharding(self._specs(variables, chosen), placement(variables))
        fresh = targets.init_all(
            key, chosen, self.config, at and {path: at[path] for path in chosen}
        )
        params, saved = unboxed(variables), {}
        for root in self._saved_roots(params):
            node = pytree.get_path(params, root.split("/"))
            node = jax.tree.map(parameters.trainable_copy, node, is_leaf=pytree.is_packed)
            move = at and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(node))
            saved[root] = (
                sharding.jit_with_shardings(lambda node: node, at[root], node) if move else node
            )
        return {**fresh, **saved}

    def specs(
        self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any
    ) -> dict[str, PyTree]:
        """Return the PartitionSpecs of the result of :meth:`init`, derived from the base's.

        A weight's sharding is that of its array, a NamedSharding, or else that of its metadata:
        ``nn.with_partitioning``, or ``nn.with_logical_partitioning`` with custom rules or those
        of ``nn.logical_axis_rules``. For :func:`adalora_jax.sharding.shardings`.

        Args:
          variables: as in :meth:`init`; shapes are enough.
          *args: arguments of the model; shapes are enough.
          **kwargs: as in :meth:`init`.

        Returns:
          ``{path: Adapter of PartitionSpecs}``, and trees of them for ``modules_to_save``.

        Raises:
          TypeError: ``variables`` is not a mapping.
          ValueError: as in :meth:`init`, or a sharding rule is not valid, see
            :func:`adalora_jax.sharding.derive_specs`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> split = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        >>> model, x = nn.Dense(4, kernel_init=split), jnp.ones((2, 6))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
        >>> adapted.specs(variables, x)[""].p
        P(None, 'model')
        """
        chosen = self._targets(variables, *args, **kwargs)
        specs, known = self._specs(variables, chosen), targets.static_fields(chosen, self.config)
        return specs | {path: specs[path]._replace(**known[path]) for path in chosen}

    def _specs(
        self, variables: Mapping[str, PyTree], chosen: Mapping[str, targets.Target]
    ) -> dict[str, PyTree]:
        places, saved = placement(variables), {}

        def at(path: str, t: targets.Target) -> NamedSharding | PartitionSpec | None:
            return pytree.get_path(places, pytree.weight_path(places, path, t.layer.weight))

        weights = {p: (t.layer, t.shape, at(p, t)) for p, t in chosen.items()}

        def spec(leaf: PyTree, at: NamedSharding | PartitionSpec | None) -> PartitionSpec:
            return sharding.pad_spec(sharding.spec_of(at), len(leaf.shape))

        for root in self._saved_roots(places):
            nodes = (
                pytree.get_path(node, root.split("/")) for node in (unboxed(variables), places)
            )
            saved[root] = jax.tree.map(spec, *nodes, is_leaf=pytree.is_packed)
        return {**sharding.derive_specs(weights, self.rules), **saved}

    def _saved_roots(self, params: Mapping[str, PyTree]) -> list[str]:
        flat = traverse_util.flatten_dict(params, sep="/")
        return targets.saved_roots(list(flat), self.config)

    def apply(
        self,
        variables: Mapping[str, PyTree],
        adapters: Mapping[str, PyTree],
        *args: PyTree,
        mutable: CollectionFilter = False,
        **kwargs: Any,
    ) -> PyTree:
        """Apply the model with its adapters; jit, grad and vmap work as for ``module.apply``.

        Each adapted layer computes with ``W + ΔW``
        (`AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_). Dropout of an adapter's input
        needs a ``dropout`` rng. It is off if the layer, or the innermost call around it that has
        such an argument, has ``deterministic=True`` or ``train=False``.

        Args:
          variables: the model's variables; not changed, and differentiated only on request.
          adapters: the result of :meth:`init`, trained or not. A mapping of p, lam and q in place
            of an :class:`~adalora_jax.Adapter` gets the scale of this config.
          *args: arguments of the model.
          mutable: as in ``module.apply``; the mutated variables never contain adapters.
          **kwargs: arguments of the model and of ``module.apply`` (``rngs``, ``method`` ...).

        Returns:
          The result of ``module.apply``.

        Raises:
          TypeError: ``variables`` or ``adapters`` is not a mapping.
          ValueError: ``variables`` has no ``params``, or an adapter does not fit a layer of this
            model.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model, x = nn.Dense(4), jnp.ones((2, 6))
        >>> variables = model.init(jax.random.key(0), x)
        >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
        >>> adapters = adapted.init(jax.random.key(1), variables, x)
        >>> trained = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
        >>> y = adapted.apply(variables, trained, x)
        >>> y.shape, bool((y == model.apply(variables, x)).any())
        ((2, 4), False)
        """
        joined, sharing = self._join(variables, adapters)
        with nn.intercept_methods(adapter_interceptor(sharing, self.layers)):
            result = self.module.apply(joined, *args, mutable=mutable, **kwargs)
        if mutable is False:
            return result
        output, mutated = result
        if "params" in mutated:
            mutated = split_quantized({**mutated, "params": strip_adapters(mutated["params"])})
        return output, mutated

    def bind(self, variables: Mapping[str, PyTree]) -> BoundModule:
        """Return a module whose only parameters are the adapters, for existing training loops.

        Args:
          variables: the model's variables. Under ``jit`` they become constants of the program, so
            pass a large base to :meth:`apply` instead.

        Returns:
          A :class:`BoundModule`, with ``init`` and ``apply`` as in linen modules.

        Raises:
          TypeError: ``variables`` is not a mapping.
          ValueError: ``variables`` has no ``params``.

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

    def describe(self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any) -> str:
        """Return a table of the adapters that :meth:`init` makes; nothing is allocated.

        Args:
          variables: as in :meth:`init`; shapes are enough.
          *args: arguments of the model; shapes are enough.
          **kwargs: as in :meth:`init`.

        Returns:
          The table as text, see :func:`describe`.

        Raises:
          TypeError: ``variables`` is not a mapping.
          ValueError: ``variables`` has no ``params``, or the config selects nothing or a module
            that cannot be adapted.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model, x = nn.Dense(4), jnp.ones((2, 6))
        >>> variables = model.init(jax.random.key(0), x)
        >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
        >>> print(adapted.describe(variables, x).splitlines()[-1])
        memory: adapters 528 bytes, importance 1.1 kB
        """
        found = self._candidates(variables, *args, **kwargs)
        params = jax.tree_util.tree_flatten_with_path(unboxed(variables))[0]
        shapes = {pytree.path_name(path): tuple(leaf.shape) for path, leaf in params}
        return targets.describe(targets.select(found, self.config), self.config, found, shapes)

    def _targets(
        self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any
    ) -> dict[str, targets.Target]:
        return targets.select(self._candidates(variables, *args, **kwargs), self.config)

    def _candidates(
        self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any
    ) -> dict[str, Candidate]:
        """Return all modules that the model calls, by path, see :func:`linen_layers.candidates`."""
        check_variables(variables)
        return candidates(self.module, variables, args, kwargs, self.layers)

    def _join(
        self, variables: Mapping[str, PyTree], adapters: Mapping[str, PyTree]
    ) -> tuple[dict[str, PyTree], set[tuple[str, ...]]]:
        """Return variables with adapters and saved modules in ``params``, and shared scopes.

        The second value is the set of paths of scopes in which several modules have weights, whose
        adapters are stored under the names of the weights.
        """
        check_variables(variables, "apply(variables, adapters, *inputs)")
        if not isinstance(adapters, Mapping):
            raise TypeError(
                f"`adapters={type(adapters).__name__}`: is not a mapping; pass the dict that init "
                "returned. The arguments are apply(variables, adapters, *inputs)."
            )
        variables = join_quantized(variables)
        params = unfreeze(variables["params"])
        sharing: set[tuple[str, ...]] = set()
        for path, node in adapters.items():
            parts = path.split("/") if path else []
            existing = pytree.get_path(params, parts)
            if existing is None:
                raise ValueError(
                    f"`adapters[{path!r}]`: is not a layer of {type(self.module).__name__}, "
                    f"whose parameters are {', '.join(sorted(params))}; pass the adapters of this "
                    "model."
                )
            if not pytree.is_adapter(node):
                pytree.get_path(params, parts[:-1])[parts[-1]] = in_base_dtype(node, existing, path)
                continue
            held = BoundAdapter.of(node, self.config, path, self._adapter_output)
            if isinstance(existing, dict):
                existing[pytree.ADAPTER_KEY] = held
            else:  # the path is that of a weight, in a scope with several
                pytree.get_path(params, parts[:-1])[key_of_weight(parts[-1])] = held
                sharing.add(tuple(parts[:-1]))
        return {**variables, "params": params}, sharing


@dataclasses.dataclass(frozen=True)
class BoundModule:
    """An adapted module with its base, used like a linen module; see :meth:`AdaptedModule.bind`.

    Attributes:
      adapted: the module and its config.
      variables: the variables of the base.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(4), jnp.ones((2, 6))
    >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
    >>> bound = BoundModule(adapted, model.init(jax.random.key(0), x))
    >>> bound.apply(bound.init(jax.random.key(1), x), x).shape
    (2, 4)
    """

    adapted: AdaptedModule
    variables: Mapping[str, Any] = dataclasses.field(hash=False)

    def init(
        self, rngs: jax.Array | Mapping[str, jax.Array], *args: PyTree, **kwargs: Any
    ) -> dict[str, PyTree]:
        """Return ``{"params": adapters}`` and the base's other collections.

        Args:
          rngs: a PRNG key, or a dict of keys with one for ``params``, as for linen modules.
          *args: arguments of the model.
          **kwargs: as in :meth:`AdaptedModule.init`.

        Returns:
          Variables, with ``{path: Adapter}`` and the ``modules_to_save`` as ``params``.

        Raises:
          TypeError, ValueError: as in :meth:`AdaptedModule.init`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model, x = nn.Dense(4), jnp.ones((2, 6))
        >>> variables = model.init(jax.random.key(0), x)
        >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
        >>> params = adapted.bind(variables).init(jax.random.key(1), x)["params"]
        >>> params[""].lam.shape
        (12,)
        """
        key = rngs["params"] if isinstance(rngs, Mapping) else rngs
        fresh = self.adapted.init(key, self.variables, *args, **kwargs)
        return {**self.variables, "params": fresh}

    def apply(self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any) -> PyTree:
        """Return the output of the adapted model.

        Args:
          variables: the result of :meth:`init`, with adapters as ``params``; other collections,
            such as ``batch_stats``, replace the base's.
          *args: arguments of the model.
          **kwargs: as in :meth:`AdaptedModule.apply`.

        Returns:
          The result of :meth:`AdaptedModule.apply`.

        Raises:
          ValueError: ``variables`` has no ``params``, or as in :meth:`AdaptedModule.apply`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model, x = nn.Dense(4), jnp.ones((2, 6))
        >>> variables = model.init(jax.random.key(0), x)
        >>> adapted = adapt(model, AdaLoraConfig(total_step=10, target_modules=".*"))
        >>> bound = adapted.bind(variables)
        >>> adapters = adapted.init(jax.random.key(1), variables, x)
        >>> bool((bound.apply({"params": adapters}, x) == model.apply(variables, x)).all())
        True
        """
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ValueError(
                "`variables`: there is no 'params'; pass {'params': adapters}, as init returned "
                "them."
            )
        base = {**self.variables, **variables, "params": self.variables["params"]}
        return self.adapted.apply(base, variables["params"], *args, **kwargs)


def adapt(
    model: nn.Module,
    config: AdaLoraConfig,
    *,
    rules: sharding.Rules | None = None,
    layers: Declarations | None = None,
) -> AdaptedModule:
    """Add AdaLoRA adapters to a linen model without changing its code, class or parameters.

    The adapted layers are selected in :meth:`AdaptedModule.init`, when their shapes are known. An
    increment has an effect only in calls of its layer: code that reads a module's weight and
    computes with it (``x @ embed.embedding.T`` instead of ``embed.attend(x)``) uses the base.

    Args:
      model: any linen module, unbound.
      config: targets, ranks and scale of the adapters.
      rules: shardings of the adapters, if they are to differ from those that
        :meth:`AdaptedModule.specs` derives: ``{pattern: Adapter of PartitionSpecs}`` or a
        function, see :func:`adalora_jax.sharding.derive_specs`.
      layers: ``{class: Layout}`` of layers that are not Flax's, in addition to those that are known
        (see the reference of layers). A key is a class or its qualified name,
        ``"package.module.Class"``; a value is a :class:`~adalora_jax.Layout` or a function that
        returns the Layout of the module it is given. Each layer must compute the product that its
        Layout says, plus terms without the weight: an equation such as ``"...d,df->...f"``,
        ``y = x W + b`` over the last axes of x, or a look-up of rows of W (``kind="embed"``). A
        trace checks it in :meth:`AdaptedModule.init`. A layer without a declaration is adapted if
        it has one weight, its input is its only argument, and the trace shows that it computes
        ``y = x W + b``.

    Returns:
      An :class:`AdaptedModule`, with the methods ``init`` and ``apply``.

    Raises:
      TypeError: ``model`` is not a linen module, or ``config`` is not an ``AdaLoraConfig``.
      ValueError: ``layers`` does not map classes to Layouts, or a Layout has a shape, or without
        an equation stack axes or another kind than ``"dense"`` or ``"embed"``.

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
            f"`model={type(model).__name__}`: is not a flax.linen module; adalora_jax.nnx.adapt "
            "takes NNX modules."
        )
    check_config(config)
    return AdaptedModule(model, config, rules, declared(layers))


def describe(
    model: nn.Module,
    config: AdaLoraConfig,
    variables: Mapping[str, PyTree],
    *args: PyTree,
    layers: Declarations | None = None,
    **kwargs: Any,
) -> str:
    """Return a table of the layers that ``config`` selects: shapes, ranks, parameters, cost.

    Args:
      model, config: as in :func:`adapt`.
      variables: as in :meth:`AdaptedModule.init`; shapes are enough.
      *args: arguments of the model; shapes are enough.
      layers: as in :func:`adapt`.
      **kwargs: as in :meth:`AdaptedModule.init`.

    Returns:
      The table as text. Cost is the adapter's parameters relative to the weight's. The lines below
      the table list the memory needed in addition to the base, the ``modules_to_save``, and
      selected modules and other matrices that are not adapted.

    Raises:
      TypeError: as in :func:`adapt`.
      ValueError: the config selects nothing, or a module that cannot be adapted.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(4), jnp.ones((2, 6))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> print(describe(model, AdaLoraConfig(total_step=10, target_modules=".*"), variables, x))
    layer   kind    matrices   in   out   rank   parameters   kernel      cost
            dense          1    6     4     12          132       24   550.0 %
    total                  1                12          132       24   550.0 %
    memory: adapters 528 bytes, importance 1.1 kB
    """
    return adapt(model, config, layers=layers).describe(variables, *args, **kwargs)


def resolve(
    model: nn.Module,
    config: AdaLoraConfig,
    variables: Mapping[str, PyTree],
    *args: PyTree,
    layers: Declarations | None = None,
    **kwargs: Any,
) -> AdaLoraConfig:
    """Return ``config`` with a ``target_modules`` function replaced by the paths it selects.

    The function may return a :class:`~adalora_jax.RankSpec` instead of True. The optimizer and
    merging see paths, not modules, so RankSpecs must be resolved before the config is used.

    Args:
      model, config: as in :func:`adapt`.
      variables: as in :meth:`AdaptedModule.init`; shapes are enough.
      *args: arguments of the model; shapes are enough.
      layers: as in :func:`adapt`.
      **kwargs: as in :meth:`AdaptedModule.init`.

    Returns:
      A config with a regex as ``target_modules`` and each RankSpec in ``rank_overrides``;
      ``config`` itself if its ``target_modules`` is not a function.

    Raises:
      TypeError: as in :func:`adapt`, or ``variables`` is not a mapping.
      ValueError: ``variables`` has no ``params``, or the function selects no layer that can be
        adapted.

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
    adapted = adapt(model, config, layers=layers)
    return targets.resolve(adapted._candidates(variables, *args, **kwargs), config)


def placement(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return the sharding of each parameter: its array's, or its metadata's, or None."""

    def place(node: PyTree) -> NamedSharding | PartitionSpec | None:
        if not isinstance(node, nn.Partitioned):
            return sharding.sharding_of(node)
        spec = node.get_partition_spec()
        if isinstance(node, nn.LogicallyPartitioned):
            spec = logical_to_mesh_axes(tuple(spec), node.rules)
        if spec is not None and node.mesh is not None:
            spec = NamedSharding(node.mesh, spec)
        return sharding.sharding_of(node.value, spec)

    def is_leaf(node: object) -> bool:
        return not isinstance(node, Mapping)

    return jax.tree.map(place, unfreeze(join_quantized(variables)["params"]), is_leaf=is_leaf)
