"""Several adapters of one model: selected by name, combined, or selected per example."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Int32, Shaped

from adalora_jax._src.core import checks, pytree
from adalora_jax._src.core.adapter import Adapter, known_scale
from adalora_jax._src.core.compaction import compact
from adalora_jax._src.core.explicit_axes import replicate, take
from adalora_jax._src.core.low_rank import accumulation_dtype, explicit_mesh, reshard, spec_of_type
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.selection import keep_best


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stacked", "others"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """Named sets of adapters for one model, stacked in arrays so that selection is indexing.

    Each adapter is padded with λ = 0 to the largest rank at its path. A set is zero at the paths
    where it has no adapter. Index 0 has no name and is zero everywhere: the base model. If a set
    has another scale than the first one at a path, its λ is multiplied by the ratio. A bank is
    immutable: :meth:`add` and :meth:`delete` return a new one.

    Attributes:
      stacked: ``{path: Adapter}`` with a leading axis of size ``1 + len(names)``.
      others: ``{path: parameters}`` of ``modules_to_save``, stacked in the same way; index 0 has
        those of the base model.
      names: names of the sets, in the order of the leading axis, from index 1; static.

    >>> import adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(
    ...     total_step=10, init_r=2, target_r=1, init_lora_weights=False
    ... )
    >>> french = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> german = {"value": adalora.init_adapter(jax.random.key(1), 6, 5, config, rank=3)}
    >>> bank = AdapterBank.from_dict({"french": french, "german": german})
    >>> adapters = bank.select("german")  # for adapted.apply(variables, adapters, x)
    >>> bool(adapters["query"].lam.any()), adapters["value"].p.shape
    (False, (3, 5))
    """

    stacked: dict[str, Adapter]
    others: dict[str, Any]
    names: tuple[str, ...]

    @classmethod
    def from_dict(
        cls, named: Mapping[str, PyTree], base: Mapping[str, PyTree] | None = None
    ) -> AdapterBank:
        """Return a bank of the sets in ``{name: adapters}``.

        Args:
          named: the sets by name, each as in :meth:`add`.
          base: parameters of the base model, as in :meth:`add`.

        Returns:
          A bank with the sets in the order of ``named``.

        Raises:
          TypeError: ``named`` is not a mapping, or as in :meth:`add`.
          ValueError: ``named`` is one set without a name, or as in :meth:`add`.

        >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
        >>> AdapterBank.from_dict({"french": {"query": adapter}}).names
        ('french',)
        """
        if not isinstance(named, Mapping):
            raise TypeError(
                f"`named={type(named).__name__}`: is not a mapping; pass a dict, "
                "{name: adapters}."
            )
        if any(map(pytree.is_adapter, named.values())):
            raise ValueError(
                "`named`: is one set of adapters, without its name; pass {name: adapters}."
            )
        bank = cls({}, {}, ())
        for name, adapters in named.items():
            bank = bank.add(name, adapters, base)
        return bank

    def add(
        self, name: str, adapters: PyTree, base: Mapping[str, PyTree] | None = None
    ) -> AdapterBank:
        """Return the bank with another set of adapters; it replaces a set of the same name.

        Args:
          name: name of the set.
          adapters: ``{path: Adapter}`` as :func:`adalora_jax.eval_params` or
            :func:`adalora_jax.compact` returned them, and the parameters of ``modules_to_save``.
          base: ``{path: parameters}`` of the base model at the paths of ``modules_to_save``, for
            the base model and for sets that did not train them. Needed once, with the first set
            that has them.

        Returns:
          A new bank. A new name comes last; a replaced set keeps its index.

        Raises:
          TypeError: ``base`` is not a mapping.
          ValueError: ``name`` is not a string or is empty; ``adapters`` contains no adapter or is
            not a dict by path; an adapter is for a weight of another shape than the bank's at its
            path, or its scale is unknown; or ``base`` lacks a path.

        >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
        >>> bank = AdapterBank.from_dict({"french": {"query": adapter}})
        >>> bank.add("german", {"query": adapter}).names
        ('french', 'german')
        """
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"`name={name!r}`: must be a string that is not empty; pass a name for this set."
            )
        if base is not None and not isinstance(base, Mapping):
            raise TypeError(
                f"`base={type(base).__name__}`: is not a mapping; pass a dict, "
                "{path: parameters}."
            )
        way_out = (
            f"pass {{path: Adapter}} for {name!r}, as adalora_jax.eval_params or "
            "adalora_jax.compact returned it"
        )
        found = pytree.require_adapters(adapters, "adapters", way_out)
        others = _others(adapters)
        if len(jax.tree.leaves(adapters)) != len(jax.tree.leaves((found, others))):
            raise ValueError(
                f"`adapters`: the {type(adapters).__name__} given for {name!r} is not one dict by "
                "path; pass the adapters as adapted.init and nnx.adapters return them."
            )
        for path, adapter in found.items():
            scale = known_scale(adapter, path)
            if path in self.stacked:
                first = self.stacked[path]
                _check_same_weight(name, path, adapter, jax.tree.map(lambda leaf: leaf[0], first))
                found[path] = adapter._replace(
                    lam=adapter.lam
                    * jnp.asarray(scale / known_scale(first, path), adapter.lam.dtype),
                    scale=first.scale,
                    layout=first.layout,
                )
        members = {other: self._member(other) for other in self.names} | {name: (found, others)}
        plain = jax.tree.map(lambda leaf: leaf[0], self.others)
        for path, node in others.items():
            if path not in plain:
                if base is None or path not in base:
                    raise ValueError(
                        f"`base`: {name!r} has parameters at {path!r}, which the base model and "
                        "the other sets need too; pass the base model's, "
                        f"base={{{path!r}: variables['params'][...]}}."
                    )

                def cast(
                    leaf: Shaped[Array, "*axes"], like: Shaped[Array, "..."]
                ) -> Shaped[Array, "*axes"]:
                    return jnp.asarray(leaf, like.dtype)

                plain[path] = jax.tree.map(cast, base[path], node)
        stacked = _stack([{}, *(adapters for adapters, _ in members.values())])
        sets = [plain, *(plain | other for _, other in members.values())]
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets) if plain else {}
        return AdapterBank(stacked, together, tuple(members))

    def _member(self, name: str) -> tuple[dict[str, Adapter], dict[str, PyTree]]:
        selected = self.select(name)
        return pytree.adapters(selected), _others(selected)

    def delete(self, name: str) -> AdapterBank:
        """Return the bank without one set of adapters.

        Args:
          name: name of the set.

        Returns:
          A new bank. The sets after the removed one have an index lower by 1.

        Raises:
          ValueError: the bank has no set of this name.

        >>> adapters = {"query": Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))}
        >>> AdapterBank.from_dict({"french": adapters, "german": adapters}).delete("french").names
        ('german',)
        """
        removed = int(self.index(name))

        def without(leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
            return jnp.delete(leaf, removed, axis=0)

        stacked, others = jax.tree.map(without, (self.stacked, self.others))
        return AdapterBank(stacked, others, tuple(n for n in self.names if n != name))

    def index(self, names: str | Sequence[str | None] | None) -> Int32[Array, "..."]:
        """Return the indices of names in the bank.

        Args:
          names: a name, or a sequence of names; None is the base model.

        Returns:
          An int32 scalar, or ``[len(names)]`` for a sequence.

        Raises:
          ValueError: the bank has no set of a name.

        >>> adapters = {"query": Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))}
        >>> bank = AdapterBank.from_dict({"french": adapters, "german": adapters})
        >>> bank.index(["german", None, "french"]).tolist()
        [2, 0, 1]
        """
        place: dict[str | None, int] = {n: i for i, n in enumerate((None, *self.names))}
        selected = [names] if names is None or isinstance(names, str) else list(names)
        for name in selected:
            if name not in place:
                raise ValueError(
                    f"`name={name!r}`: the bank has no adapters of this name, only "
                    f"{', '.join(self.names) or 'the base model'}; add them with "
                    f"bank.add({name!r}, ...)."
                )
        found = jnp.asarray([place[name] for name in selected], jnp.int32)
        return found[0] if names is None or isinstance(names, str) else found

    def select(
        self, which: str | list[str | None] | tuple[str | None, ...] | Int[Array, "..."] | None
    ) -> dict[str, PyTree]:
        """Return the adapters, and the parameters of ``modules_to_save``, of one or more sets.

        Args:
          which: a name, None for the base model, a list or tuple of these, or indices from
            :meth:`index`. Indices may be traced, so that a jitted function can select another set,
            or the base model, without compiling again.

        Returns:
          ``{path: Adapter}`` and ``{path: parameters}`` in one dict. For several sets the arrays
          have a leading axis, see :func:`per_example`.

        Raises:
          ValueError: the bank has no set of a name, or an index that is not traced is not an
            integer from 0 to the number of sets.

        >>> adapters = {"query": Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))}
        >>> bank = AdapterBank.from_dict({"french": adapters})
        >>> bank.select("french")["query"].lam.tolist(), bank.select(None)["query"].lam.tolist()
        ([1.0, 1.0], [0.0, 0.0])
        >>> bank.select(["french", None, "french"])["query"].p.shape
        (3, 2, 4)
        """
        if which is None or isinstance(which, (str, list, tuple)):
            which = self.index(which)
        elif not isinstance(which, Tracer):
            given, last = jax.device_get(which), len(self.names)
            kind = jnp.dtype(getattr(given, "dtype", type(given))).kind
            if kind not in "iu" or not jnp.all((given >= 0) & (given <= last)):
                raise ValueError(
                    f"`which={which!r}`: must be names, or indices from 0, the base model, to "
                    f"{last}; pass them as bank.index(names) returns them."
                )
        indices = jnp.asarray(which)
        return jax.tree.map(lambda leaf: take(leaf, indices, 0), self.stacked | self.others)


def combine_adapters(
    *adapters: Mapping[str, PyTree], weights: Sequence[ArrayLike] | Array | None = None
) -> dict[str, PyTree]:
    """Combine sets of adapters into one whose increments are weighted sums, ``ΔW = Σ_k w_k ΔW_k``.

    The sums are exact: triplets are concatenated, so ranks add up. The function is differentiable,
    so one set can train while others are frozen:
    ``adapted.apply(variables, combine_adapters(trained, frozen), x)``.

    Args:
      *adapters: sets ``{path: Adapter}``. If scales at a path differ, λ is multiplied by the ratio
        to the first one's.
      weights: a factor w_k per set, scalars, may be traced; 1 by default.

    Returns:
      ``{path: Adapter}`` with the paths of all sets. Other entries, such as those of a classifier
      in ``modules_to_save``, are those of the first set.

    Raises:
      ValueError: no set is given, or one without an adapter; the numbers of weights and sets
        differ; a weight is not a finite number; the adapters at a path are for weights of different
        shapes; or a scale is unknown.
      TypeError: a set is not a mapping, or ``weights`` is not a list.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
    >>> both = combine_adapters({"query": adapter}, {"query": adapter}, weights=[0.5, 2.0])
    >>> both["query"].lam
    Array([0.5, 0.5, 2. , 2. ], dtype=float32)
    """
    if not adapters:
        raise ValueError("`adapters`: none were given; pass at least one set, {path: Adapter}.")
    sets: list[dict[str, Adapter]] = []
    for number, member in enumerate(adapters):
        if not isinstance(member, Mapping):
            raise TypeError(
                f"`adapters[{number}]={type(member).__name__}`: is not a mapping; pass each set, "
                "{path: Adapter}, as an argument, and factors as weights=[...]."
            )
        sets.append(
            pytree.require_adapters(member, f"adapters[{number}]", "pass a set, {path: Adapter}")
        )
    if (
        isinstance(weights, str)
        or getattr(weights, "ndim", 1) == 0
        or not isinstance(weights, Iterable | None)
    ):
        raise TypeError(
            f"`weights={weights!r}`: is not a list of numbers; pass one number per set."
        )
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(
            f"`weights`: has {len(weights)} entries for {len(adapters)} sets of adapters; pass one "
            "number per set."
        )
    for number, weight in enumerate(weights):
        if not _is_factor(pytree.unwrap_variables(weight)):
            raise ValueError(
                f"`weights[{number}]={weight!r}`: is not a finite number; pass one number per set."
            )
    result = dict(adapters[0])
    parts: dict[str, list[Adapter]] = {}
    for number, (member, weight) in enumerate(zip(sets, weights)):
        for path, adapter in member.items():
            members = parts.setdefault(path, [])
            first = members[0] if members else adapter
            _check_same_weight(f"set {number}", path, adapter, first)
            factor = known_scale(adapter, path) / known_scale(first, path)
            by = jnp.asarray(weight, adapter.lam.dtype) * jnp.asarray(factor, adapter.lam.dtype)
            members.append(adapter._replace(lam=adapter.lam * by))
    for path, members in parts.items():
        p, lam, q = zip(*members)
        result[path] = members[0]._replace(
            p=jnp.concatenate(p, axis=-2),
            lam=jnp.concatenate(lam, axis=-1),
            q=jnp.concatenate(q, axis=-2),
        )
    return result


def _is_factor(weight: PyTree) -> bool:
    """Return whether a value is a scalar, traced or finite."""
    if not isinstance(weight, (int, float)) and getattr(weight, "ndim", None) != 0:
        return False
    return isinstance(weight, Tracer) or math.isfinite(weight)


def truncate(adapters: PyTree, rank: int | None = None, *, budget: int | None = None) -> PyTree:
    """Return the nearest adapters of lower ranks: ``ΔW`` with its largest singular values.

    With ``qᵀ = Q₁ R₁`` and ``pᵀ = Q₂ R₂`` the singular values of ``ΔW = Q₁ (R₁ Λ R₂ᵀ) Q₂ᵀ`` are
    those of the small matrix ``R₁ Λ R₂ᵀ``; the largest give the nearest matrix of a lower rank
    (`Eckart and Young, 1936 <https://doi.org/10.1007/BF02288367>`_). With ``budget``, the singular
    values of all matrices compete, each times its adapter's scale, and ranks may differ.

    Args:
      adapters: any tree with adapters in it; other leaves do not change.
      rank: maximum rank of each matrix; None for no maximum. The rank is lower if the adapter's
        rank or a dimension of its weight is.
      budget: maximum sum of the ranks of all matrices, where a slice of a stack is a matrix; None
        for no maximum. The shapes of the result depend on the values, so they cannot be traced.

    Returns:
      The containers of ``adapters``. P and Q have orthonormal rows, λ are the singular values of
      ``P Λ Q`` in descending order; scales do not change. With ``budget``, adapters of rank 0 are
      removed, and the slices of a stack are padded with λ = 0 to the largest rank among them.

    Raises:
      ValueError: ``rank`` or ``budget`` is not an integer of at least 1, both are None, the values
        are traced or not finite with a ``budget``, or there is no adapter.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
    >>> small = truncate({"query": adapter}, 1)["query"]  # both triplets point the same way
    >>> bool(jnp.allclose(small.q.T * small.lam @ small.p, 2.0)), small.p.shape
    (True, (1, 4))
    >>> larger = Adapter(2 * jnp.eye(2, 4), jnp.ones(2), jnp.eye(2, 3))
    >>> found = truncate({"query": adapter, "value": larger}, budget=2)
    >>> {path: small.p.shape for path, small in found.items()}
    {'query': (1, 4), 'value': (1, 4)}
    """
    if rank is None and budget is None:
        raise ValueError("`rank=None`: gives no limit, nor does `budget`; pass rank or budget.")
    rank = checks.integer("rank", checks.MAX_INT if rank is None else rank, minimum=1)
    found = pytree.require_adapters(
        adapters, "adapters", "pass {path: Adapter}, as adapted.init and nnx.adapters return it"
    )
    shorter = {path: _truncated(adapter, rank=rank) for path, adapter in found.items()}
    result = pytree.insert_adapters(adapters, shorter)
    if budget is None:
        return result
    budget = checks.integer("budget", budget, minimum=1)
    if pytree.is_stacked(adapters):
        raise ValueError(
            "`adapters`: are stacked by role, whose adapters may get different ranks; pass "
            "unstack(adapters)."
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(shorter)):
        raise ValueError(
            f"`budget={budget}`: the ranks depend on the values, which are traced; call truncate "
            "outside of jit, or pass rank alone."
        )
    sizes = {path: abs(known_scale(a, path)) * a.lam for path, a in shorter.items()}
    for path, values in sizes.items():
        if not jnp.all(jnp.isfinite(values)):
            raise ValueError(
                f"`adapters`: the singular values of {path} are not finite, so they cannot be "
                "compared; remove this adapter, or restore one from before it diverged."
            )
    return compact(result, keep_best(sizes, budget))


def per_example(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Map a function of ``(adapters, *inputs)`` over a batch with different adapters per example.

    Products with the base model's weights remain products with the whole batch; only those with the
    adapters are computed per example. ``function`` sees batches of one example, so operations over
    the batch, such as batch statistics, are over single examples.

    Args:
      function: takes adapters, and inputs with a leading batch axis; its outputs have that axis.

    Returns:
      A function of the same arguments, in which the adapters also have the batch axis, as
      ``AdapterBank.select`` returns them for several names.

    Raises:
      TypeError: ``function`` is not callable.

    >>> from adalora_jax import forward
    >>> adapter = Adapter(jnp.ones((3, 2, 4)), jnp.ones((3, 2)), jnp.ones((3, 2, 5)))
    >>> apply = per_example(lambda adapter, x: forward(adapter, x))
    >>> apply(adapter, jnp.ones((3, 7, 5))).shape
    (3, 7, 4)
    """

    if not callable(function):
        raise TypeError(
            f"`function={type(function).__name__}`: is not callable; pass a function of "
            "(adapters, *inputs)."
        )

    def one(adapters: PyTree, inputs: PyTree) -> PyTree:
        output = function(adapters, *jax.tree.map(lambda leaf: leaf[None], inputs))
        return jax.tree.map(lambda leaf: leaf[0], output)

    def mapped(adapters: PyTree, *inputs: PyTree) -> PyTree:
        first = next(iter(jax.tree.leaves(inputs)), None)
        return jax.vmap(one)(_with_batch_of(adapters, first), inputs)

    return mapped


def _with_batch_of(adapters: PyTree, like: Shaped[Array, "..."] | None) -> PyTree:
    """Return adapters whose first axis is sharded like that of an array, on explicit axes."""
    if like is None or not jnp.ndim(like) or explicit_mesh(like) is None:
        return adapters
    batch = spec_of_type(like)[:1]
    return jax.tree.map(lambda leaf: reshard(leaf, like, batch + spec_of_type(leaf)[1:]), adapters)


def _stack(members: Sequence[Mapping[str, Adapter]]) -> dict[str, Adapter]:
    """Return ``{path: Adapter}`` stacked over the members; zero for a member without an adapter."""
    stacked = {}
    for path in sorted({path for member in members for path in member}):
        present = [member[path] for member in members if path in member]
        rank = max(adapter.lam.shape[-1] for adapter in present)
        empty = jax.tree.map(jnp.zeros_like, present[0])
        padded = [_padded(member.get(path, empty), rank) for member in members]
        leaves = zip(Adapter._fields, map(jnp.stack, zip(*padded)))
        stacked[path] = present[0]._replace(**dict(leaves))
    return stacked


def _others(adapters: PyTree) -> dict[str, PyTree]:
    """Return the entries that are not adapters."""
    if not isinstance(adapters, Mapping):
        return {}

    def is_other(node: PyTree) -> bool:
        return not pytree.adapters(node) and bool(jax.tree.leaves(node))

    return {path: node for path, node in adapters.items() if is_other(node)}


def _padded(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter padded with zero triplets to ``rank``."""

    def pad(leaf: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, rank - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    return adapter._replace(p=pad(adapter.p, -2), lam=pad(adapter.lam, -1), q=pad(adapter.q, -2))


def _truncated(adapter: Adapter, rank: int) -> Adapter:
    if adapter.lam.ndim > 1:
        return jax.vmap(functools.partial(_truncated, rank=rank))(adapter)
    p, lam, q = (replicate(leaf).astype(accumulation_dtype(leaf.dtype)) for leaf in adapter)
    q, in_core = jnp.linalg.qr(q.T)
    p, out_core = jnp.linalg.qr(p.T)
    u, lam, v = jnp.linalg.svd((in_core * lam[None]) @ out_core.T, full_matrices=False)
    new = ((p @ v.T)[:, :rank].T, lam[:rank], (q @ u)[:, :rank].T)
    leaves = (reshard(leaf.astype(old.dtype), old) for leaf, old in zip(new, adapter))
    return adapter._replace(**dict(zip(Adapter._fields, leaves)))


def _check_same_weight(name: str, path: str, adapter: Adapter, first: Adapter) -> None:
    """Raise an error if an adapter is for another weight than the first one at its path.

    Stack, ``in`` and ``out`` must be equal, and the axes of the layouts, if both are known.
    """

    def shape(a: Adapter) -> tuple[int, ...]:
        return (*a.lam.shape[:-1], a.q.shape[-1], a.p.shape[-1])

    found, expected = shape(adapter), shape(first)
    if found != expected:
        raise ValueError(
            f"`adapters[{path!r}]`: {name!r} is for a weight of shape {list(found)}, but the "
            f"others are for {list(expected)}; use adapters of one model."
        )
    made_for, other = adapter.layout, first.layout
    if made_for is not None and other is not None and not made_for.same_axes(other):
        raise ValueError(
            f"`adapters[{path!r}]`: {name!r} is for a weight with the axes stack={made_for.stack}, "
            f"in={made_for.ins}, out={made_for.outs}, but the others are for stack={other.stack}, "
            f"in={other.ins}, out={other.outs}; use adapters of one model."
        )
