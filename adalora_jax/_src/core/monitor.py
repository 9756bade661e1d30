"""The allocator's decisions and scores, as arrays that a jitted step can return."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.allocator import allocator_state, role_scores
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.regularizer import penalty
from adalora_jax._src.core.roles import ByRole
from adalora_jax._src.core.scores import needed_inputs


class AllocatorInfo(NamedTuple):
    """The allocator's masks after an update, and the scores by which it ranks triplets.

    A pytree of arrays, small compared with the adapters (5 bytes per triplet). Its dicts are keyed
    by path, whichever containers the optimizer's state has. :mod:`adalora_jax.plot` draws a run
    from a list of them.

    Attributes:
      step: int32 scalar: number of updates so far.
      budget: int32 scalar: the budget, in ``config.budget_unit``.
      active: int32 scalar: number of active triplets.
      masks: ``{path: [..., r] booleans}``: True for an active triplet.
      scores: ``{path: [..., r] float32}``: the scores of the triplets.
      overridden: int32 scalar: the largest number of pruned λ found that were not 0 although an
        update had set them to 0. A value above 0 means that something changes the updates after
        ``adalora(...)``, such as a scale or ``schedule_free`` around it. None if unknown.
      inactive: ``{path: [...] booleans}``: True for a matrix whose smoothed sensitivities are all
        0: the loss does not depend on its layer, which therefore got no gradient. None if unknown.
      penalty: scalar in at least float32: the orthogonality penalty. None if :func:`info` got no
        ``params`` and the update does not include the penalty.

    >>> masks = {"query": jnp.array([True, False])}
    >>> scores = {"query": jnp.array([4.0, 2.0])}
    >>> state = AllocatorInfo(jnp.int32(7), jnp.int32(1), jnp.int32(1), masks, scores)
    >>> int(state.active), state.overridden is None
    (1, True)
    """

    step: Int32[Array, ""]
    budget: Int32[Array, ""]
    active: Int32[Array, ""]
    masks: dict[str, Bool[Array, "*stack r"]]
    scores: dict[str, Float[Array, "*stack r"]]
    overridden: Int32[Array, ""] | None = None
    inactive: dict[str, Bool[Array, "*stack"]] | None = None
    penalty: Float[Array, ""] | None = None

    def metrics(self, prefix: str = "", *, each: bool = False) -> dict[str, Shaped[Array, ""]]:
        """Return the numbers as ``{name: scalar}``, for TensorBoard and other metric writers.

        ============================================  ===========================================
        ``budget``, ``active``                        the budget in the config's unit, and the
                                                      number of active triplets
        ``rank_min``, ``rank_mean``, ``rank_max``     over all matrices
        ``score_mean``, ``score_max``                 over all triplets
        ``score_threshold``                           the lowest score of an active triplet;
                                                      infinite if none is active
        ``overridden``, ``inactive``                  the number of pruned λ that were not 0, and
                                                      of matrices without a gradient: both should
                                                      be 0
        ``penalty``                                   the orthogonality penalty, if it is known
        ``rank/<path>``, ``score/<path>``             with ``each``: per matrix, the rank and the
                                                      sum of the scores of its triplets
        ============================================  ===========================================

        Args:
          prefix: a string in front of every name, such as ``"adalora/"``.
          each: True adds the values per matrix; a slice of a stack is ``path[0]``.

        Returns:
          A dict of scalar arrays.

        >>> masks = {"query": jnp.array([True, True]), "up": jnp.array([True, False])}
        >>> scores = {"query": jnp.array([4.0, 2.0]), "up": jnp.array([3.0, 1.0])}
        >>> info = AllocatorInfo(*map(jnp.int32, (7, 3, 3)), masks, scores)
        >>> for name, value in info.metrics(each=True).items():
        ...     print(name, value)
        budget 3
        active 3
        rank_min 1
        rank_mean 1.5
        rank_max 2
        score_mean 2.5
        score_max 4.0
        score_threshold 2.0
        rank/query 2
        rank/up 1
        score/query 6.0
        score/up 4.0
        """
        ranks = _rows({path: mask.sum(axis=-1) for path, mask in self.masks.items()})
        sums = _rows({path: score.sum(axis=-1) for path, score in self.scores.items()})

        def flat(arrays: Mapping[str, Shaped[Array, "..."]]) -> Shaped[Array, " n"]:
            return jnp.concatenate([array.ravel() for array in arrays.values()])

        rank, score = jnp.stack(list(ranks.values())), flat(self.scores)
        result = {
            "budget": self.budget,
            "active": self.active,
            "rank_min": rank.min(),
            "rank_mean": rank.mean(),
            "rank_max": rank.max(),
            "score_mean": score.mean(),
            "score_max": score.max() if score.size else jnp.float32(-jnp.inf),
            "score_threshold": jnp.where(flat(self.masks), score, jnp.inf).min(initial=jnp.inf),
        }
        if self.overridden is not None:
            result["overridden"] = self.overridden
        if self.inactive is not None:
            result["inactive"] = flat(self.inactive).sum()
        if self.penalty is not None:
            result["penalty"] = self.penalty
        if each:
            result |= {f"rank/{path}": value for path, value in ranks.items()}
            result |= {f"score/{path}": value for path, value in sums.items()}
        return {prefix + name: value for name, value in result.items()}


def info(
    opt_state: PyTree,
    params: PyTree | None = None,
    grads: PyTree | None = None,
) -> AllocatorInfo:
    """Return the allocator's masks, budget and scores, inside or outside of a jitted step.

    Call it on the new state, after ``tx.update``. It computes the scores again from the moving
    averages, which is cheap compared with the update of the averages. It copies nothing to the
    host, so every step may return
    ``metrics = {"loss": loss, **info(opt_state).metrics("adalora/")}``.

    Right after a new mask, the active triplets are those with the ``budget`` highest ``scores``
    (within ``rank_overrides``); in another ``budget_unit``, the highest within the budget; with
    ``allow_regrowth=False``, the highest of those that were active before. Between two masks the
    scores change while the mask does not. From the final mask on, the averages do not
    change, nor do the scores computed from them.

    Args:
      opt_state: a pytree that contains one :class:`AllocatorState`: the state of an optax
        optimizer, an ``nnx.Optimizer``, an :class:`AdaLoraState`, or the allocator's state.
      params: the adapters, in any tree. Needed by scores that depend on weights: ``"magnitude"``,
        ``"sensitivity"`` and functions. Pass those after the update, in
        which a newly pruned λ is already 0; with ``sensitivity_timing="current"``, those before it.
      grads: the gradients that ``tx.update`` got. Needed by ``"sensitivity"`` and functions.

    Returns:
      An :class:`AllocatorInfo`. Its arrays share no buffers with ``opt_state``, which the next step
      may donate.

    Raises:
      ValueError: ``opt_state`` contains no allocator state or more than one, or the score needs
        ``params`` or ``grads``.

    >>> import optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> @jax.jit
    ... def step(adapters, opt_state):
    ...     grads = jax.tree.map(jnp.ones_like, adapters)
    ...     updates, opt_state = tx.update(grads, opt_state, adapters)
    ...     return optax.apply_updates(adapters, updates), opt_state, info(opt_state)
    >>> opt_state = tx.init(adapters)
    >>> for _ in range(4):
    ...     adapters, opt_state, seen = step(adapters, opt_state)
    >>> int(seen.step), int(seen.budget), int(seen.active)
    (4, 2, 2)
    """
    state = allocator_state(opt_state)
    config = state.config
    given = {"params": params, "grads": grads}
    if missing := [name for name in needed_inputs(config) if given[name] is None]:
        raise ValueError(
            f"`{', '.join(f'{name}=None' for name in missing)}`: score={config.score!r} depends on "
            "weights or gradients, which the allocator does not store; pass "
            f"{' and '.join(f'{name}={name}' for name in missing)} to info."
        )
    roles = state.masks.roles
    scores = role_scores(state, *map(pytree.trained_adapters, given.values()))

    def without_gradient(averages: Adapter) -> Bool[Array, "*stack 1"]:
        return ((_total(averages) == 0) & (state.step > 0))[..., None]

    idle = ByRole(
        {name: without_gradient(a) for name, a in state.sensitivity.stacked.items()}, roles
    )
    inactive = {path: value[..., 0] for path, value in idle.items()}
    active = sum((m.sum() for m in jax.tree.leaves(state.masks)), start=jnp.zeros((), jnp.int32))
    # Copies, because the next step may donate the state's buffers.
    step, budget, masks = jax.tree.map(jnp.copy, (state.step, state.budget, dict(state.masks)))
    value = jnp.copy(state.penalty) if config.orth_reg_in_update else None
    if value is None and params is not None:
        value = penalty(params, config)
    return AllocatorInfo(
        *(step, budget, active, masks, dict(ByRole(scores, roles))),
        *(jnp.copy(state.overridden), inactive, value),
    )


def _total(adapter: Adapter) -> Float[Array, "*stack"]:
    """Return the sum of absolute values per matrix, which is 0 only if all entries are 0."""

    def axes(leaf: Shaped[Array, "..."]) -> tuple[int, ...]:
        return tuple(range(adapter.lam.ndim - 1, leaf.ndim))

    p, lam, q = (jnp.sum(jnp.abs(leaf), axis=axes(leaf)) for leaf in adapter)
    return p + lam + q


def _rows(values: Mapping[str, Shaped[Array, "*stack"]]) -> dict[str, Shaped[Array, ""]]:
    """Return ``{row name: scalar}`` with one entry per matrix; slices of a stack are separate."""
    return {
        pytree.row_name(path, index): value[index]
        for path, value in values.items()
        for index in itertools.product(*map(range, value.shape))
    }
