"""The selection of the best triplets, under costs and within limits, against plain Python."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalora_jax._src.core.selection import (
    RankedScores,
    apply_threshold,
    find_threshold,
    keep_best,
    rank_scores,
)


def greedy(scores, turns, costs, budget):
    """Keep turn 0, then the best of turn 1 one by one, until one costs more than remains."""
    keep = turns == 0
    left = budget - costs[keep].sum()
    for i in sorted(np.flatnonzero(turns == 1), key=lambda i: (-scores[i], i)):
        if costs[i] > left:
            break
        keep[i], left = True, left - costs[i]
    return keep


@pytest.mark.parametrize("kinds", [3, 10**6])
@pytest.mark.parametrize("limited", [False, True])
def test_selection_under_costs_matches_greedy_reference(kinds, limited):
    """Three distinct scores give ties everywhere; a million give none."""

    def best(scores, turns, budget, costs):
        row = RankedScores(rank_scores(scores).keys, turns, costs)
        return apply_threshold(row, find_threshold(row, budget))

    ours = jax.jit(jax.vmap(best, in_axes=(None, None, 0, None)))
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = rng.integers(kinds, size=50).astype("float32")
        costs = rng.choice([3, 7, 1000], size=50).astype("int32")
        turns = rng.choice(3, size=50, p=[0.2, 0.6, 0.2]) if limited else np.ones(50, int)
        budgets = np.array([0, costs.sum(), *rng.integers(0, costs.sum() + 1, size=20)])
        found = ours(scores, jnp.asarray(turns) if limited else None, budgets, costs)
        for budget, keep in zip(budgets, found):
            np.testing.assert_array_equal(keep, greedy(scores, turns, costs, budget))


@pytest.mark.parametrize("kinds", [3, 10**6])
def test_leaves_of_different_costs_are_ranked_together(kinds):
    ours = jax.jit(
        jax.vmap(lambda s, b, c: keep_best(list(s), b, costs=list(c)), in_axes=(None, 0, None))
    )
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = rng.integers(kinds, size=(8, 5)).astype("float32")
        costs = rng.choice([3, 7, 1000], size=8).astype("int32")
        each = np.repeat(costs, 5)
        budgets = np.array([0, each.sum(), *rng.integers(0, each.sum() + 1, size=20)])
        found = np.concatenate(ours(jnp.asarray(scores), budgets, jnp.asarray(costs)), axis=-1)
        for budget, keep in zip(budgets, found):
            expected = greedy(scores.ravel(), np.ones(40, int), each, budget)
            np.testing.assert_array_equal(keep, expected)


@st.composite
def limited(draw):
    """Draw scores with many ties, limits for each leaf, and a count."""
    shapes = [(2, 3), (1, 4)]
    values = st.sampled_from([0.0, 1.0, 2.0, float("nan")])
    scores = [
        np.array(draw(st.lists(values, min_size=n * r, max_size=n * r)), np.float32).reshape(n, r)
        for n, r in shapes
    ]
    bounds = [draw(st.tuples(st.integers(0, 4), st.integers(0, 5))) for _ in shapes]
    return scores, [(min(b), max(b)) for b in bounds], draw(st.integers(0, 12))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(limited())
def test_keep_best_within_limits_matches_plain_python(problem):
    scores, limits, count = problem
    masks = keep_best([jnp.asarray(s) for s in scores], count, limits)
    # In plain Python: the minimum of every row first, then the best others, ties by position.
    first, rest, index = [], [], 0
    for leaf, (least, most) in zip(scores, limits):
        for row in np.nan_to_num(leaf, nan=-1):
            order = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))
            first += [index + i for i in order[:least]]
            rest += [
                (-row[i], index + i)
                for i in order[min(least, most) : most]
                if i not in order[:least]
            ]
            index += len(row)
    wanted = set(first) | {i for _, i in sorted(rest)[: max(0, count - len(first))]}
    kept = np.concatenate([np.asarray(mask).ravel() for mask in masks])
    assert set(np.flatnonzero(kept)) == wanted


def test_keep_best_within_limits_is_equal_under_jit_and_vmap():
    scores = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([9.0, 8.0])}
    limits = [(1, 2), (0, 1)]
    counts = jnp.arange(8)
    jitted = jax.jit(lambda count: keep_best(scores, count, limits))
    many = jax.vmap(lambda count: keep_best(scores, count, limits))(counts)
    for i, count in enumerate(counts):
        for name, mask in jitted(count).items():
            assert np.array_equal(mask, many[name][i])
    assert [int(sum(m[i].sum() for m in many.values())) for i in range(8)] == [
        2,
        2,
        2,
        3,
        4,
        5,
        5,
        5,
    ]
