"""One cell of the study as one program: every seed at every learning rate, start to end."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adalora_jax as adalora
from benchmarks.quality.methods import Method
from benchmarks.quality.tasks import Task

# Three a decade, of which a cell has so many that follow one another.
RATES = tuple(round(a * 10.0**e, 10) for e in range(-5, 1) for a in (1, 2, 5))
CHUNK = 100  # examples that are scored at once


class Outcome(NamedTuple):
    """Of each run; ``[seeds, rates]``."""

    validation: Any
    test: Any
    triplets: Any  # live in the end, in all matrices together
    parameters: Any  # in live triplets; or of the base, if that is trained


def rates(task: Task, method: Method, count: int) -> list[float]:
    """The learning rates of a cell."""
    start = RATES.index(1e-4) + task.rates[method.family] + method.shift
    return list(RATES[start : start + count])


def compiled(task: Task, method: Method, rank: int, count: int) -> Any:
    """The program of a cell, compiled; call it with :func:`arguments`."""

    def all_runs(base, splits, rates):
        seeds = len(splits.number)
        each = jax.tree.map(lambda rows: jnp.repeat(rows, count, axis=0), splits)
        one = lambda *run_of: run(task, method, rank, base, *run_of)
        outcome = jax.vmap(one)(each, jnp.tile(rates, seeds))
        return jax.tree.map(lambda values: values.reshape(seeds, count), outcome)

    return jax.jit(all_runs).lower(*arguments(task, method, count)).compile()


def arguments(task: Task, method: Method, count: int) -> tuple[Any, ...]:
    return task.base, task.splits, np.array(rates(task, method, count), np.float32)


def run(task: Task, method: Method, rank: int, base: Any, splits: Any, rate: jax.Array) -> Outcome:
    """One training run and its scores; ``splits`` of one seed."""
    config = method.adalora_config(rank, task.steps, task.targets, task.head)
    key = jax.random.fold_in(jax.random.key(7), splits.number)
    tx = optimizer(task, method, config, rate)
    if method.form == "full":
        trainable = base
        apply = lambda trainable, x: task.module.apply(trainable, x)
    else:
        adapted = adalora.linen.adapt(task.module, config)
        trainable = adapted.init(key, base, jnp.asarray(task.inputs[:1]))
        apply = lambda trainable, x: adapted.apply(base, trainable, x)

    def objective(trainable, rows):
        loss = task.loss(lambda x: apply(trainable, x), rows)
        if method.form == "svd" and config.orth_reg_weight:
            loss += adalora.orthogonality(trainable, config)
        return loss

    def step(carry, rows):
        trainable, state = carry
        updates, state = tx.update(jax.grad(objective)(trainable, rows), state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    (trainable, state), _ = jax.lax.scan(step, (trainable, tx.init(trainable)), splits.batches)

    rows = jnp.concatenate([splits.validation, splits.test])
    size_of = math.gcd(len(splits.validation), len(splits.test), CHUNK)
    one = lambda rows: task.score(lambda x: apply(trainable, x), rows)
    scores = jax.lax.map(one, rows.reshape(-1, size_of))
    first = len(splits.validation) // size_of
    triplets, parameters = size(method, trainable, state)
    return Outcome(scores[:first].mean(), scores[first:].mean(), triplets, parameters)


def optimizer(task: Task, method: Method, config: Any, rate: jax.Array) -> Any:
    """Adam, its rate up over a tenth of the steps and down to 0; wrapped where ranks are chosen.

    The head has a rate of its own, which is not tuned: it is the same for all methods.
    """
    warm = max(1, task.steps // 10)

    def adam(peak):
        up = lambda t: (t + 1) / warm
        down = lambda t: (task.steps - t) / (task.steps - warm)
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
    tx = optax.partition({**parts, "other": head}, adalora.labels)
    return adalora.adalora(tx, config) if method.allocates else tx


def size(method: Method, trainable: Any, state: Any) -> tuple[Any, Any]:
    """Live triplets, and the numbers in them; λ counts where it is trained."""
    if method.form == "full":
        return jnp.zeros(()), jnp.asarray(sum(leaf.size for leaf in jax.tree.leaves(trainable)))
    if method.form == "frozen":
        return jnp.zeros(()), jnp.zeros(())
    found = adalora.adapters(trainable)
    masks = adalora.allocator_state(state).masks if method.allocates else None
    live = {p: jnp.asarray(masks[p].sum() if masks else a.lam.size) for p, a in found.items()}
    each = {p: a.p.shape[-1] + a.q.shape[-1] + ("lam" in method.trained) for p, a in found.items()}
    return sum(live.values()), sum(live[path] * each[path] for path in found)
