"""Adapters for functions of a parameter pytree, without changes to their code.

The shortest way is ``fn(params with W + ΔW)``. It is exact for every use of a weight, but needs a
dense increment and a dense gradient per weight, and in bfloat16 the sum rounds most of a small
increment away. So ``apply`` runs the function's jaxpr with low-rank products where a weight's use
allows them, and with the sum at all other uses. The same walk through the jaxpr reads the axes of
the weights, which must be known in any case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import layers, sharding, targets
from adalora_jax._src.modules import params as parameters
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.functional_jaxpr import Trace, evaluate
from adalora_jax._src.modules.functional_layouts import Declared, candidates
from adalora_jax._src.modules.functional_params import Params, adapters_of, is_array, leaf_name


@dataclasses.dataclass(frozen=True)
class AdaptedFunction:
    """A function of a parameter pytree and the config by which it is adapted; see :func:`adapt`.

    Attributes:
      fn: the function, called as ``fn(params, *inputs)``.
      config: targets, ranks and scale of the adapters.
      candidates: the weights that could be adapted, by path, and the containers that they are in.
      rules: shardings of adapters that differ from those derived from the weights; None if none do.

    >>> import jax.numpy as jnp
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
    >>> config = AdaLoraConfig(total_step=10, target_modules=["w"])
    >>> adapt(lambda params, x: x @ params["w"], params, config, x).candidates["w"].shape
    (6, 4)
    """

    fn: Callable[..., PyTree]
    config: AdaLoraConfig
    candidates: Mapping[str, Candidate] = dataclasses.field(hash=False, compare=False, repr=False)
    rules: sharding.Rules | None = dataclasses.field(default=None, hash=False)

    def init(self, key: jax.Array, params: PyTree) -> dict[str, PyTree]:
        """Initialise the trainable parameters: adapters and the ``modules_to_save``.

        Args:
          key: a PRNG key.
          params: the function's parameters, with the shapes that :func:`adapt` got.

        Returns:
          A dict by path (``layers/0/query``) with an :class:`~adalora_jax.Adapter` per weight, and
          for each of ``modules_to_save`` its float arrays in at least float32: one array, or a dict
          ``{path in the module: array}``. If the parameters are on a mesh, or ``jax.set_mesh`` sets
          one, they are sharded as :meth:`specs` returns.

        Raises:
          TypeError: ``key`` is not a PRNG key.
          ValueError: ``modules_to_save`` names no parameter, or ``params`` has other weights than
            those that were adapted.

        >>> import jax, jax.numpy as jnp
        >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
        >>> config = AdaLoraConfig(total_step=10, target_modules=["w"])
        >>> adapted = adapt(lambda params, x: x @ params["w"], params, config, x)
        >>> adapter = adapted.init(jax.random.key(0), params)["w"]
        >>> adapter.p.shape, adapter.lam.shape, adapter.q.shape
        ((12, 4), (12,), (12, 6))
        """
        chosen = self._chosen(params)
        at = sharding.to_named_sharding(self._specs(params, chosen), params)
        fresh = targets.init_all(
            key, chosen, self.config, at and {path: at[path] for path in chosen}
        )
        saved = {}
        for root, node in self._saved(params).items():
            node = jax.tree.map(parameters.trainable_copy, node)
            move = at and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(node))
            saved[root] = (
                sharding.jit_with_shardings(lambda node: node, at[root], node) if move else node
            )
        return {**fresh, **saved}

    def specs(self, params: PyTree) -> dict[str, PyTree]:
        """Return the PartitionSpecs of the result of :meth:`init`, derived from the weights'.

        Args:
          params: as in :meth:`init`; arrays or ``jax.ShapeDtypeStruct`` with a NamedSharding.

        Returns:
          ``{path: Adapter of PartitionSpecs}``, and trees of them for ``modules_to_save``. For
          :func:`adalora_jax.sharding.shardings`.

        Raises:
          ValueError: as in :meth:`init`, or a sharding rule is not valid, see
            :func:`adalora_jax.sharding.derive_specs`.

        >>> import jax.numpy as jnp
        >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
        >>> config = AdaLoraConfig(total_step=10, target_modules=["w"])
        >>> adapt(lambda params, x: x @ params["w"], params, config, x).specs(params)["w"].p
        P(None, None)
        """
        chosen = self._chosen(params)
        specs, known = self._specs(params, chosen), targets.static_fields(chosen, self.config)
        return specs | {path: specs[path]._replace(**known[path]) for path in chosen}

    def apply(self, params: PyTree, adapters: Mapping[str, PyTree], *inputs: PyTree) -> PyTree:
        """Return ``fn(params, *inputs)`` with the increments added to the adapted weights.

        Each adapted weight acts as ``W + ΔW``
        (`AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_), as after :func:`merge`. The
        function is traced, so it must be one that ``jax.jit`` accepts, with all arrays in
        ``params`` and ``inputs`` as arguments and all other leaves as constants. Call ``apply``
        under ``jax.jit``; ``grad`` and ``vmap`` work as for ``fn``.

        Args:
          params: the parameters; not changed, and differentiated only on request.
          adapters: the result of :meth:`init`, trained or not. A mapping of p, lam and q in place
            of an :class:`~adalora_jax.Adapter` gets the scale of this config.
          *inputs: further arguments of ``fn``; they may have other shapes than in :func:`adapt`.

        Returns:
          The result of ``fn``.

        Raises:
          TypeError: ``adapters`` is not a mapping.
          ValueError: an adapter does not fit a weight of this function.

        >>> import jax, jax.numpy as jnp
        >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
        >>> config = AdaLoraConfig(total_step=10, target_modules=["w"])
        >>> adapted = adapt(lambda params, x: x @ params["w"], params, config, x)
        >>> adapters = adapted.init(jax.random.key(0), params)
        >>> trained = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
        >>> bool((adapted.apply(params, adapters, x) == x @ params["w"]).all())
        True
        >>> bool((adapted.apply(params, trained, x) == x @ params["w"]).any())
        False
        """
        tree = Params.of(params)
        leaves, held = tree.with_saved(adapters), {}
        for path, node in adapters_of(adapters).items():
            layer = self.candidates[path].layer if path in self.candidates else None
            if layer is None:
                raise ValueError(
                    f"`adapters[{path!r}]`: is not a weight that is read from the function, which "
                    f"are {', '.join(self._weights())}; pass the adapters of this function."
                )
            name = leaf_name(path, layer.weight, leaves)
            layers.check_fit(layer, node, leaves[name].shape, path)
            scale = self.config.scale_of(path) if node.scale is None else node.scale
            held[name] = node._replace(scale=scale, layout=layer)
        trace = Trace.of(self.fn, tree.rebuilt(leaves), inputs)
        positions = dict(zip(leaves, range(len(leaves))))
        outputs = evaluate(
            trace.closed,
            [*trace.arrays.values()],
            {[*trace.arrays].index(positions[name]): adapter for name, adapter in held.items()},
            self.config.forward_mode,
        )
        return trace.output(outputs)

    def describe(self, params: PyTree) -> str:
        """Return a table of the adapters that :meth:`init` makes; nothing is allocated.

        Args:
          params: as in :meth:`init`; shapes are enough.

        Returns:
          The table as text, see :func:`describe`.

        Raises:
          ValueError: as in :meth:`init`.

        >>> import jax.numpy as jnp
        >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
        >>> config = AdaLoraConfig(total_step=10, target_modules=["w"])
        >>> adapted = adapt(lambda params, x: x @ params["w"], params, config, x)
        >>> print(adapted.describe(params).splitlines()[-1])
        memory: adapters 528 bytes, importance 1.1 kB
        """
        chosen, saved = self._chosen(params), self._saved(params)
        shapes = dict.fromkeys(saved, ())  # of the parameters to list
        return targets.describe(chosen, self.config, self.candidates, shapes)

    def _weights(self) -> list[str]:
        return [path for path, c in self.candidates.items() if c.layer is not None]

    def _chosen(self, params: PyTree) -> dict[str, targets.Target]:
        """Return the selected weights, after a check of their shapes in ``params``."""
        chosen, leaves = targets.select(self.candidates, self.config), Params.of(params).leaves
        for path, target in chosen.items():
            name = leaf_name(path, target.layer.weight, leaves)
            shape = None if name is None else tuple(leaves[name].shape)
            if shape != target.shape:
                raise ValueError(
                    f"`params`: the weight {path!r} has the shape {shape}, but {target.shape} when "
                    "the function was adapted; pass the same parameters to adapt and to init."
                )
        return chosen

    def _saved(self, params: PyTree) -> dict[str, PyTree]:
        """Return the float arrays that ``modules_to_save`` names: one, or a dict by path, each."""
        leaves = {
            name: leaf
            for name, leaf in Params.of(params).leaves.items()
            if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        }
        roots = targets.saved_roots([*leaves], self.config)
        return {
            root: leaves[root]
            if root in leaves
            else {
                name.removeprefix(f"{root}/"): leaf
                for name, leaf in leaves.items()
                if name.startswith(f"{root}/")
            }
            for root in roots
        }

    def _specs(self, params: PyTree, chosen: Mapping[str, targets.Target]) -> dict[str, PyTree]:
        leaves = Params.of(params).leaves

        def spec(leaf: PyTree) -> jax.sharding.PartitionSpec:
            at = sharding.spec_of(sharding.sharding_of(leaf))
            return sharding.pad_spec(at, len(leaf.shape))

        weights = {}
        for path, target in chosen.items():
            leaf = leaves[leaf_name(path, target.layer.weight, leaves)]
            weights[path] = (target.layer, target.shape, sharding.sharding_of(leaf))
        saved = jax.tree.map(spec, self._saved(params))
        return {**sharding.derive_specs(weights, self.rules), **saved}


def adapt(
    fn: Callable[..., PyTree],
    params: PyTree,
    config: AdaLoraConfig,
    *inputs: PyTree,
    rules: sharding.Rules | None = None,
    layers: Declared | None = None,
) -> AdaptedFunction:
    """Add AdaLoRA adapters to a function of a parameter pytree without changing either.

    The function is traced, not run. Its products show the axes of each weight: a product sums over
    the inputs; the other axes are outputs, except those that index separate matrices, over which
    the function scans, maps or which it indexes. A weight is named by its path in ``params``, or by
    that of its module if it is the only weight in it: ``layers/0/query`` for the leaf
    ``layers/0/query/weight``.

    Args:
      fn: the function, called as ``fn(params, *inputs)``; it must be one that ``jax.jit`` accepts.
      params: its parameters, any pytree: dicts, lists, dataclasses, Equinox modules. Leaves that
        are not arrays are constants. Shapes (``jax.ShapeDtypeStruct``) are enough.
      config: targets, ranks and scale of the adapters.
      *inputs: examples of the other arguments; shapes are enough.
      rules: shardings of the adapters, if they are to differ from those that
        :meth:`AdaptedFunction.specs` derives, see :func:`adalora_jax.sharding.derive_specs`.
      layers: ``{pattern: Layout}`` of weights whose axes the function does not show, or that are to
        be read in another way. A pattern is a regex for the path of a leaf, or for its end at a
        separator; the first match counts. The name of the weight in a Layout is not used.

    Returns:
      An :class:`AdaptedFunction`, with the methods ``init`` and ``apply``.

    Raises:
      TypeError: ``fn`` is not callable, or ``config`` is not an ``AdaLoraConfig``.
      ValueError: the config selects nothing, a weight whose axes are not known, or has a
        ``lora_dropout``; ``layers`` is not ``{pattern: Layout}``, matches nothing, or has a Layout
        that is not of its weight; or two leaves have the same path.

    >>> import jax, jax.numpy as jnp
    >>> def fn(params, x):
    ...     return jnp.tanh(x @ params["query"]["w"] + params["query"]["b"])
    >>> params = {"query": {"w": jnp.ones((6, 4)), "b": jnp.zeros((1, 4))}}
    >>> x, config = jnp.ones((2, 6)), AdaLoraConfig(total_step=10, target_modules=["query"])
    >>> adapted = adapt(fn, params, config, x)
    >>> adapters = adapted.init(jax.random.key(1), params)
    >>> list(adapters), bool((adapted.apply(params, adapters, x) == fn(params, x)).all())
    (['query'], True)
    """
    if isinstance(fn, type) or not callable(fn):
        raise TypeError(
            f"`fn={getattr(fn, '__name__', type(fn).__name__)}`: is not a function; pass one that "
            "is called as fn(params, *inputs)."
        )
    check_config(config)
    if config.lora_dropout:
        raise ValueError(
            f"`lora_dropout={config.lora_dropout}`: cannot be applied in a function, which has no "
            "layers with inputs of their own and passes no random numbers; set lora_dropout=0.0."
        )
    adapted = AdaptedFunction(fn, config, candidates(fn, params, inputs, layers), rules)
    if not callable(config.target_modules):  # a function may need resolve first
        targets.select(adapted.candidates, config)
    return adapted


def describe(
    fn: Callable[..., PyTree],
    params: PyTree,
    config: AdaLoraConfig,
    *inputs: PyTree,
    layers: Declared | None = None,
) -> str:
    """Return a table of the weights that ``config`` selects: shapes, ranks, parameters, cost.

    Args:
      fn, params, config: as in :func:`adapt`.
      *inputs: as in :func:`adapt`.
      layers: as in :func:`adapt`.

    Returns:
      The table as text. Cost is the adapter's parameters relative to the weight's. The lines below
      the table list the memory needed in addition to the base, the ``modules_to_save``, and
      selected parameters that are not adapted.

    Raises:
      TypeError, ValueError: as in :func:`adapt`.

    >>> import jax.numpy as jnp
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
    >>> config = AdaLoraConfig(total_step=10, target_modules=["w"])
    >>> print(describe(lambda params, x: x @ params["w"], params, config, x))
    layer   kind    matrices   in   out   rank   parameters   kernel      cost
    w       dense          1    6     4     12          132       24   550.0 %
    total                  1                12          132       24   550.0 %
    memory: adapters 528 bytes, importance 1.1 kB
    """
    return adapt(fn, params, config, *inputs, layers=layers).describe(params)


def resolve(
    fn: Callable[..., PyTree],
    params: PyTree,
    config: AdaLoraConfig,
    *inputs: PyTree,
    layers: Declared | None = None,
) -> AdaLoraConfig:
    """Return ``config`` with a ``target_modules`` function replaced by the paths it selects.

    The function is called with each path and the node of ``params`` there, and may return a
    :class:`~adalora_jax.RankSpec` instead of True. The optimizer and merging see paths, not nodes,
    so RankSpecs must be resolved before the config is used.

    Args:
      fn, params, config: as in :func:`adapt`.
      *inputs: as in :func:`adapt`.
      layers: as in :func:`adapt`.

    Returns:
      A config with a regex as ``target_modules`` and each RankSpec in ``rank_overrides``;
      ``config`` itself if its ``target_modules`` is not a function.

    Raises:
      TypeError: as in :func:`adapt`.
      ValueError: as in :func:`adapt`, or the function selects no weight that can be adapted.

    >>> import adalora_jax, jax.numpy as jnp
    >>> def choose(path, node):
    ...     return adalora_jax.RankSpec(init_r=4) if path == "w" else False
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
    >>> config = AdaLoraConfig(total_step=10, target_r=2, target_modules=choose)
    >>> resolve(lambda params, x: x @ params["w"], params, config, x).spec_of("w").init_r
    4
    """
    adapted = adapt(fn, params, config, *inputs, layers=layers)
    return targets.resolve(adapted.candidates, config)
