"""Results of pruning: ranks, tables, compacted adapters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax._src.core import evaluation
from adalora_jax._src.core.compaction import surviving_rows

CONFIG = adalora.AdaLoraConfig(total_step=10, init_r=4, target_r=2, init_lora_weights=False)


def adapter(seed, ins, outs, stack=()):
    return adalora.init_adapter(jax.random.key(seed), ins, outs, CONFIG, stack=stack)


@pytest.fixture
def pruned():
    adapters = {"a/query": adapter(0, 5, 6), "a/up": adapter(1, 5, 7, (2,)), "b": adapter(2, 3, 3)}
    masks = {
        "a/query": jnp.array([False, True, False, True]),
        "a/up": jnp.array([[True, False, False, False], [False, True, True, True]]),
        "b": jnp.zeros(4, bool),
    }
    return adapters, masks


def test_ranks_count_mask_entries_per_slice(pruned):
    _, masks = pruned
    assert adalora.ranks(masks) == {"a/query": 2, "a/up[0]": 1, "a/up[1]": 3, "b": 0}
    assert adalora.rank_pattern(masks)["a/query"] == [False, True, False, True]


def test_compact_adapters_equal_masked_adapters(pruned):
    adapters, masks = pruned
    small = adalora.compact(adapters, masks)
    assert set(small) == {"a/query", "a/up"}, "rank 0 vanishes"
    chex.assert_shape(list(small["a/query"]), [(2, 6), (2,), (2, 5)])
    chex.assert_shape(list(small["a/up"]), [(2, 3, 7), (2, 3), (2, 3, 5)])
    masked = evaluation.apply_masks(adapters, masks)
    for path, compacted in small.items():
        want = adalora.delta_weight(masked[path])
        got = adalora.delta_weight(compacted)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_surviving_rows_are_masks_of_compact_adapters(pruned):
    adapters, masks = pruned
    small = adalora.compact(adapters, masks)
    active = {p: surviving_rows(np.asarray(m))[1] for p, m in masks.items()}
    active = {path: mask for path, mask in active.items() if mask.shape[-1]}
    assert {path: mask.shape for path, mask in active.items()} == {
        path: a.lam.shape for path, a in small.items()
    }
    want = {path: rank for path, rank in adalora.ranks(masks).items() if path != "b"}
    assert adalora.ranks(active) == want
    again = adalora.compact(jax.tree.map(lambda leaf: leaf + 1, small), active)
    chex.assert_trees_all_equal(again["a/up"].lam == 0, jnp.asarray(~active["a/up"]))


def test_compact_uses_mask_and_not_value_of_lam(pruned):
    adapters, masks = pruned
    revived = jax.tree.map(lambda leaf: leaf + 1, adapters)
    assert adalora.compact(revived, masks)["a/query"].lam.shape == (2,)
    zero = {**adapters, "b": adapters["b"]._replace(lam=jnp.zeros(4))}
    active = {**masks, "b": jnp.ones(4, bool)}
    assert adalora.compact(zero, active)["b"].lam.shape == (4,)


def test_summary_counts_active_parameters(pruned):
    adapters, masks = pruned
    rows = adalora.summary(adapters, masks).splitlines()
    assert rows[1].split() == ["a/query", "5", "6", "2", "4", "24"]
    assert rows[3].split() == ["a/up[1]", "5", "7", "3", "4", "39"]
    assert rows[-1].split() == ["total", "6", "16", "76"]


def test_compact_without_mask_of_an_adapter_raises(pruned):
    adapters, masks = pruned
    masks.pop("b")
    with pytest.raises(
        ValueError, match="`opt_state`: has no mask for 'b', only for a/query, a/up"
    ):
        adalora.compact(adapters, masks)


def test_summary_with_masks_of_other_adapters_raises():
    full, short = (adalora.Adapter(jnp.ones((r, 6)), jnp.ones(r), jnp.ones((r, 5))) for r in (4, 3))
    masks = {"a": jnp.ones(4, bool), "z": jnp.ones(4, bool)}
    for adapters in ({"a": full}, {"a": full, "z": short}):
        with pytest.raises(ValueError, match="`state`: has masks for 'z', of which there are no"):
            adalora.summary(adapters, masks)
    with pytest.raises(ValueError, match="`state`: has no mask for 'y', only for a, z; pass the"):
        adalora.summary(dict.fromkeys("ayz", full), masks)
