"""Cells of the study as compiled programs: all seeds at all learning rates, start to end."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import adalora_jax as adalora
from adalora_jax import bank
from benchmarks.quality.methods import Method
from benchmarks.quality.tasks import Splits, Task

# Three per decade; a cell runs a consecutive range of them.
RATES = tuple(round(a * 10.0**e, 10) for e in range(-5, 1) for a in (1, 2, 5))
CHUNK = 100  # maximum number of examples scored at a time
OBSERVED = 4  # number of batches whose variance is measured


class Outcome(NamedTuple):
    """Results of all runs, arrays ``[seeds, rates]``."""

    validation: Any
    test: Any
    triplets: Any  # number of active triplets at the end, over all matrices
    parameters: Any  # number in active triplets; of the base in full fine-tuning


def rates(task: Task, method: Method, count: int) -> list[float]:
    """Return the learning rates of a cell."""
    start = RATES.index(1e-4) + task.rates[method.family] + method.shift
    return list(RATES[start : start + count])


def around(rate: float, count: int) -> list[float]:
    """Return ``count`` learning rates with this one in the middle.

    >>> around(0.05, 3)
    [0.02, 0.05, 0.1]
    """
    start = RATES.index(rate) - count // 2
    return list(RATES[start : start + count])


def beyond(tried: list[float], best: float, count: int) -> list[float]:
    """Return ``count`` further rates if the best is the first or the last of those tried.

    >>> beyond([0.02, 0.05, 0.1], 0.1, 2), beyond([0.02, 0.05, 0.1], 0.05, 2)
    ([0.2, 0.5], [])
    """
    first, last = RATES.index(tried[0]), RATES.index(tried[-1])
    if best == tried[-1]:
        return list(RATES[last + 1 : last + 1 + count])
    return list(RATES[max(0, first - count) : first]) if best == tried[0] else []


def lowered(
    task: Task, method: Method, budget: int | str, count: int, at_once: int | None = None
) -> Any:
    """Return the lowered program of a cell; compile it and call it with :func:`arguments`.

    Args:
      task: the task.
      method: the method.
      budget: one of the task's budgets.
      count: the number of learning rates.
      at_once: the number of runs in parallel, rounded down to a divisor of the number of runs; all
        if None. On a CPU a small number is faster, because the data fit into the cache.
    """

    def program(base, splits, rates):
        seeds = len(splits.number)
        total = seeds * count
        size = next(n for n in range(min(at_once or total, total), 0, -1) if total % n == 0)
        each = jax.tree.map(lambda rows: jnp.repeat(rows, count, axis=0), splits)
        groups = jax.tree.map(
            lambda rows: rows.reshape(-1, size, *rows.shape[1:]), (each, jnp.tile(rates, seeds))
        )
        outcome = jax.lax.map(lambda group: all_runs(task, method, budget, base, *group), groups)
        return jax.tree.map(lambda values: values.reshape(seeds, count), outcome)

    return jax.jit(program).lower(*arguments(task, rates(task, method, count)))


def arguments(task: Task, rates: list[float]) -> tuple[Any, ...]:
    return task.base, task.splits, np.array(rates, np.float32)


def all_runs(
    task: Task, method: Method, budget: int | str, base: Any, splits: Splits, rates: jax.Array
) -> Outcome:
    """Train and score all runs; ``splits`` and ``rates`` have a leading axis of runs.

    ``vmap`` over the runs is inside of the loops, because a loop under ``vmap`` traces more slowly.
    """
    rank, targets = task.adapted(budget)
    config = method.adalora_config(rank, task.steps, targets, task.head)
    adapted = adalora.linen.adapt(task.module, config)

    def start(number, rows):
        if method.form == "full":
            trainable = base
        else:
            key = jax.random.fold_in(jax.random.key(7), number)
            trainable = adapted.init(key, base, jnp.asarray(task.inputs[:1]))
        if method.allotted == "at the start":
            seen = jnp.asarray(task.inputs)[rows]
            moments = adalora.inits.input_second_moments(adapted, base, trainable, seen)
            trainable = by_variance(trainable, moments, rank)
        return trainable, optimizer(task, method, config, jnp.zeros(())).init(trainable)

    def model(trainable, x) -> Any:
        if method.form == "full":
            return task.module.apply(trainable, x)
        return adapted.apply(base, trainable, x)

    def objective(trainable, rows):
        loss = task.loss(lambda x: model(trainable, x), rows)
        if method.form == "svd" and config.orth_reg_weight:
            loss += adalora.orthogonality(trainable, config)
        return loss

    def step(trainable, state, rows, rate):
        tx = optimizer(task, method, config, rate)
        updates, state = tx.update(jax.grad(objective)(trainable, rows), state, trainable)
        return optax.apply_updates(trainable, updates), state

    def score(trainable, rows):
        return task.score(lambda x: model(trainable, x), rows)

    def steps(carry, rows):
        trainable, state = carry
        return jax.vmap(step)(trainable, state, rows, rates), None

    # All runs of full fine-tuning start from one base, which ``vmap`` copies for each.
    observed = splits.batches[:, :OBSERVED].reshape(len(rates), -1)
    first = jax.vmap(start)(splits.number, observed)
    (trainable, state), _ = jax.lax.scan(steps, first, jnp.swapaxes(splits.batches, 0, 1))
    if method.allotted == "at the end":
        trainable = jax.vmap(lambda trained: truncated(trained, rank))(trainable)
    rows = jnp.concatenate([splits.validation, splits.test], axis=1)
    size = math.gcd(splits.validation.shape[1], splits.test.shape[1], CHUNK)
    chunks = rows.reshape(len(rates), -1, size).swapaxes(0, 1)
    scores = jax.lax.map(lambda rows: jax.vmap(score)(trainable, rows), chunks)
    ends = splits.validation.shape[1] // size
    triplets, parameters = jax.vmap(lambda *run: active(method, *run))(trainable, state)
    validation, test = scores[:ends].mean(axis=0), scores[ends:].mean(axis=0)
    return Outcome(validation, test, triplets, parameters)


def optimizer(task: Task, method: Method, config: Any, rate: jax.Array) -> Any:
    """Return Adam with a linear warm-up over 10 % of the steps and a linear decay to 0.

    It is wrapped in ``adalora`` if the method allocates ranks. The head has a separate learning
    rate, which is not tuned: it is the same for all methods.
    """
    warm = max(1, task.steps // 10)

    def adam(peak):
        def up(t):
            return (t + 1) / warm

        def down(t):
            return (task.steps - t) / (task.steps - warm)

        return optax.adam(lambda t: peak * jnp.minimum(1.0, jnp.minimum(up(t), down(t))))

    still, head = optax.set_to_zero(), adam(task.head_rate)
    if method.form == "full":
        return optax.partition(
            {"head": head, "base": adam(rate)},
            lambda variables: jax.tree_util.tree_map_with_path(
                lambda path, _: "head" if task.head and path[1].key in task.head else "base",
                variables,
            ),
        )
    parts = {"p": adam(rate * method.p_rate), "q": adam(rate), "lam": adam(rate)}
    parts = {name: part if name in method.trained else still for name, part in parts.items()}
    tx = optax.partition({**parts, "other": head}, adalora.param_labels)
    return adalora.adalora(tx, config) if method.allocates else tx


def by_variance(trainable: Any, moments: Any, rank: int) -> Any:
    """Return new adapters whose ranks, ``rank`` on average, follow the variance of their inputs.

    A row of q is the i-th right-singular vector of the inputs, and λ is 1 for the triplets with the
    largest shares of the variance of their matrix's inputs, over all matrices (EVA, Paischer et al.
    2024). The other triplets have λ = 0, so that no gradient reaches them.

    Args:
      trainable: a tree of adapters and other leaves, with p = 0.
      moments: ``Σ xᵀx`` of the inputs x by the adapter's path, ``[*stack, in, in]``.
      rank: mean number of triplets per matrix.
    """
    shares = {}
    for path, adapter in adalora.adapters(trainable).items():
        variances = jnp.linalg.eigvalsh(moments[path])[..., ::-1]
        share = variances / variances.sum(axis=-1, keepdims=True)
        shares[path] = share[..., : adapter.lam.shape[-1]]
    kept, new = largest(shares, rank), adalora.inits.eva_init(trainable, moments)
    return new | {path: new[path]._replace(lam=kept[path]) for path in kept}


def truncated(trainable: Any, rank: int) -> Any:
    """Return the adapters with the largest singular values of all, ``rank`` per matrix on average.

    The adapters are those of ``adalora.bank.truncate(trainable, budget=...)`` at a scale of 1, with
    λ = 0 in place of the removed triplets, so that the shapes do not depend on the values.
    """
    whole = bank.truncate(trainable, 2**30)  # one limit for all matrices follows
    kept = largest({path: a.lam for path, a in adalora.adapters(whole).items()}, rank)
    return whole | {path: whole[path]._replace(lam=kept[path] * whole[path].lam) for path in kept}


def largest(values: dict[str, jax.Array], rank: int) -> dict[str, jax.Array]:
    """Return 1 for the largest values of all arrays together, and 0 for the others.

    Args:
      values: arrays ``[*stack, r]``.
      rank: number of values to choose per matrix of the stacks, on average.

    >>> largest({"a": jnp.array([3.0, 2.0]), "b": jnp.array([1.0, 0.0])}, 1)
    {'a': Array([1., 1.], dtype=float32), 'b': Array([0., 0.], dtype=float32)}
    """
    flat, as_before = ravel_pytree(values)
    count = rank * sum(value.size // value.shape[-1] for value in values.values())
    return as_before(jnp.zeros_like(flat).at[jax.lax.top_k(flat, count)[1]].set(1))


def active(method: Method, trainable: Any, state: Any) -> tuple[Any, Any]:
    """Return the numbers of active triplets and of their parameters; λ counts if it is trained."""
    if method.form == "full":
        return jnp.zeros(()), jnp.asarray(sum(leaf.size for leaf in jax.tree.leaves(trainable)))
    if method.form == "frozen":
        return jnp.zeros(()), jnp.zeros(())
    found = adalora.adapters(trainable)
    kept = {path: adapter.lam != 0 for path, adapter in found.items()}
    kept = adalora.allocator_state(state).masks if method.allocates else kept
    count = {path: kept[path].sum() for path in found}
    each = {p: a.p.shape[-1] + a.q.shape[-1] + ("lam" in method.trained) for p, a in found.items()}
    return sum(count.values()), sum(count[path] * each[path] for path in found)
