"""Several adapters of one model: under names, together, or one for each example of a batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adalora_jax import tree
from adalora_jax.adapter import Adapter
from adalora_jax.config import AdaLoraConfig
from adalora_jax.lowrank import wide
from adalora_jax.tree import PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stacked"], meta_fields=["names", "config"]
)
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """Adapters of one model under names, in arrays of one shape, so that to choose is to index.

    Each adapter is padded with λ = 0 to the largest rank at its path, and is zero at the paths
    where it has nothing. The first place belongs to no name and is zero everywhere: the base
    model. A bank is immutable; every method returns a new one.

    Attributes:
      stacked: ``{path: Adapter}`` with an axis of ``1 + len(names)`` in front.
      names: in the order of that axis; static.
      config: of the model that the adapters are used in, to whose scale they were brought; static.

    >>> import adalora_jax as adalora
    >>> config = AdaLoraConfig(total_step=10, init_r=2, target_r=1, init_lora_weights=False)
    >>> french = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> german = {"value": adalora.init_adapter(jax.random.key(1), 6, 5, config, rank=3)}
    >>> bank = AdapterBank.of({"french": french, "german": german}, config)
    >>> adapters = bank.select("german")  # for adapted.apply(variables, adapters, x)
    >>> bool(adapters["query"].lam.any()), adapters["value"].p.shape
    (False, (3, 5))
    """

    stacked: dict[str, Adapter]
    names: tuple[str, ...]
    config: AdaLoraConfig

    @classmethod
    def of(cls, named: Mapping[str, PyTree], config: AdaLoraConfig) -> AdapterBank:
        """A bank of ``{name: tree of adapters}``, all trained with the scales of ``config``.

        Raises:
          ValueError: as :meth:`load`.
        """
        bank = cls({}, (), config)
        for name, adapters in named.items():
            bank = bank.load(name, adapters)
        return bank

    def load(self, name: str, adapters: PyTree, config: AdaLoraConfig | None = None) -> AdapterBank:
        """The bank with one more set of adapters, or with another one under that name.

        Args:
          name: what it is to be called.
          adapters: a tree of adapters, masked or compacted if their training stopped on the way.
          config: that they were trained with, if its scales are not those of the bank.

        Raises:
          ValueError: the name is empty; there is no adapter, or something besides adapters; or one
            is for a weight of another shape than the bank's at its path.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r} must be a string that is not empty.")
        found = tree.adapters(adapters)
        if len(jax.tree.leaves(adapters)) != len(jax.tree.leaves(found)) or not found:
            raise ValueError(
                f"what is to be loaded as {name!r} must hold adapters and nothing else: use "
                "adalora_jax.adapters(tree), and put what modules_to_save trained into the base."
            )
        for path, adapter in found.items():
            there = self.stacked.get(path)
            first = there and jax.tree.map(lambda leaf: leaf[0], there)
            _refuse_other_weight(name, path, adapter, first)
        if config is not None:
            factor = lambda path: config.scale_of(path) / self.config.scale_of(path)
            found = {path: a._replace(lam=a.lam * factor(path)) for path, a in found.items()}
        members = {other: self.select(other) for other in self.names} | {name: found}
        return AdapterBank(_stack([{}, *members.values()]), tuple(members), self.config)

    def delete(self, name: str) -> AdapterBank:
        """The bank without one set of adapters.

        Raises:
          ValueError: there is none of that name.
        """
        gone = int(self.index(name))
        rest = {path: _without(adapter, gone) for path, adapter in self.stacked.items()}
        return AdapterBank(rest, tuple(n for n in self.names if n != name), self.config)

    def index(self, names: str | Sequence[str | None] | None) -> jax.Array:
        """Where names stand in the bank: an int32 scalar or array. None is the base model.

        Raises:
          ValueError: there is no such name.
        """
        place: dict[str | None, int] = {n: i for i, n in enumerate((None, *self.names))}
        wanted = [names] if names is None or isinstance(names, str) else list(names)
        for name in wanted:
            if name not in place:
                raise ValueError(
                    f"there are no adapters called {name!r} in the bank: it holds "
                    f"{', '.join(self.names) or 'none'}."
                )
        found = jnp.asarray([place[name] for name in wanted], jnp.int32)
        return found[0] if names is None or isinstance(names, str) else found

    def select(self, which: Any) -> dict[str, Adapter]:
        """``{path: Adapter}`` of one name, None or an index; of several, with an axis in front.

        An index, from :meth:`index`, may be traced: switching, and switching off, compile nothing
        anew. What is selected by several has an adapter for each, see :func:`per_example`.

        Raises:
          ValueError: there is no such name.
        """
        if which is None or isinstance(which, (str, list, tuple)):
            which = self.index(which)
        return jax.tree.map(lambda leaf: jnp.take(leaf, which, axis=0), self.stacked)


def add_adapters(*adapters: Mapping[str, Any], weights: Sequence[Any] | None = None) -> Any:
    """Adapters whose increments are the weighted sums of those given: exact, of the summed rank.

    Differentiable, so that one set can train while others stay as they are:
    ``adapted.apply(variables, add_adapters(trained, frozen), x)``. What is not an adapter, such as
    a classifier that trains along, is that of the first one.

    Args:
      *adapters: ``{path: Adapter}``, all for the same scale.
      weights: a factor for each; 1 by default.

    Raises:
      ValueError: the number of weights is another, or the adapters at a path are for different
        weights.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
    >>> both = add_adapters({"query": adapter}, {"query": adapter}, weights=[0.5, 2.0])
    >>> both["query"].lam
    Array([0.5, 0.5, 2. , 2. ], dtype=float32)
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} sets of adapters: one each.")
    result = dict(adapters[0])
    parts: dict[str, list[Adapter]] = {}
    for number, (member, weight) in enumerate(zip(adapters, weights)):
        for path, adapter in tree.adapters(member).items():
            there = parts.setdefault(path, [])
            _refuse_other_weight(f"set {number}", path, adapter, there[0] if there else None)
            there.append(adapter._replace(lam=adapter.lam * jnp.asarray(weight, adapter.lam.dtype)))
    for path, members in parts.items():
        p, lam, q = zip(*members)
        result[path] = Adapter(
            jnp.concatenate(p, axis=-2), jnp.concatenate(lam, axis=-1), jnp.concatenate(q, axis=-2)
        )
    return result


def truncate(adapters: PyTree, rank: int) -> PyTree:
    """The nearest adapters of at most this rank: ``ΔW`` by its largest singular values.

    With ``qᵀ = Q₁ R₁`` and ``pᵀ = Q₂ R₂`` the singular values of ``ΔW = Q₁ (R₁ Λ R₂ᵀ) Q₂ᵀ`` are
    those of the small matrix in the middle (Eckart and Young, 1936). P and Q come out orthonormal.

    Args:
      adapters: any tree with adapters in it; the rest of it stays as it is.
      rank: of the result, which is smaller where an adapter's weight or rank is.

    Raises:
      ValueError: ``rank`` is below 1.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
    >>> small = truncate({"query": adapter}, 1)["query"]  # both triplets point the same way
    >>> bool(jnp.allclose(small.q.T * small.lam @ small.p, 2.0)), small.p.shape
    (True, (1, 4))
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    shorter = tree.each(functools.partial(_truncated, rank=rank), tree.canonical(adapters))
    return tree.insert(adapters, shorter)


def per_example(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``(adapters, *inputs)`` for a batch whose examples have adapters of their own.

    The base model's products stay products with the whole batch; only those with the adapters are
    one an example. What the function does over a batch, such as batch statistics, it does over
    single examples here.

    Args:
      function: takes adapters and inputs with a batch axis in front.

    Returns:
      A function that takes the same, but adapters with that batch axis, as ``bank.select`` gives
      them for several names.

    >>> from adalora_jax.adapter import increment
    >>> adapter = Adapter(jnp.ones((3, 2, 4)), jnp.ones((3, 2)), jnp.ones((3, 2, 5)))
    >>> apply = per_example(lambda adapter, x: increment(adapter, x, scale=1.0))
    >>> apply(adapter, jnp.ones((3, 7, 5))).shape
    (3, 7, 4)
    """

    def one(adapters: PyTree, inputs: PyTree) -> Any:
        output = function(adapters, *jax.tree.map(lambda leaf: leaf[None], inputs))
        return jax.tree.map(lambda leaf: leaf[0], output)

    return lambda adapters, *inputs: jax.vmap(one)(adapters, inputs)


def _stack(members: Sequence[Mapping[str, Adapter]]) -> dict[str, Adapter]:
    """``{path: Adapter}`` with one place for each member, zero where it has no adapter."""
    stacked = {}
    for path in sorted({path for member in members for path in member}):
        there = [member[path] for member in members if path in member]
        rank = max(adapter.lam.shape[-1] for adapter in there)
        empty = jax.tree.map(jnp.zeros_like, there[0])
        padded = [_padded(member.get(path, empty), rank) for member in members]
        stacked[path] = Adapter(*(jnp.stack(leaves) for leaves in zip(*padded)))
    return stacked


def _padded(adapter: Adapter, rank: int) -> Adapter:
    """With zeros as further triplets."""

    def pad(leaf: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, rank - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    return Adapter(pad(adapter.p, -2), pad(adapter.lam, -1), pad(adapter.q, -2))


def _without(adapter: Adapter, index: int) -> Adapter:
    return Adapter(*(jnp.delete(leaf, index, axis=0) for leaf in adapter))


def _truncated(adapter: Adapter, rank: int) -> Adapter:
    if adapter.lam.ndim > 1:
        return jax.vmap(functools.partial(_truncated, rank=rank))(adapter)
    p, lam, q = (leaf.astype(wide(leaf.dtype)) for leaf in adapter)
    q, in_core = jnp.linalg.qr(q.T)
    p, out_core = jnp.linalg.qr(p.T)
    left, lam, right = jnp.linalg.svd((in_core * lam[None]) @ out_core.T, full_matrices=False)
    result = Adapter((p @ right.T)[:, :rank].T, lam[:rank], (q @ left)[:, :rank].T)
    return Adapter(*(new.astype(old.dtype) for new, old in zip(result, adapter)))


def _refuse_other_weight(name: str, path: str, adapter: Adapter, first: Adapter | None) -> None:
    """Refuses an adapter for a weight of another shape than that of the first one at its path."""
    shape = lambda a: (*a.lam.shape[:-1], a.q.shape[-1], a.p.shape[-1])
    have, want = shape(adapter), shape(first or adapter)
    if have != want:
        raise ValueError(
            f"{name!r} has an adapter at {path!r} for a weight of shape {list(have)}, where the "
            f"others are for {list(want)}: they belong to different models."
        )
