"""Ranks, limits and alpha of some layers: which pattern applies, and invalid entries."""

import pytest

from adalora_jax import AdaLoraConfig

GOOD = {"total_step": 100}


def test_first_of_two_equal_rank_overrides_patterns_applies():
    config = AdaLoraConfig(**GOOD, rank_overrides=[("q", 9), ("q", {"min_r": 3})])
    assert config.spec_of("a/q") == (9, 0, 9, 8)


@pytest.mark.parametrize("pattern", ["(?i)Q", "q|k", "(q)", "layers/.*/q", r"layers\.0\.q"])
def test_rank_overrides_pattern_matches_path_suffix(pattern):
    config = AdaLoraConfig(**GOOD, rank_overrides={pattern: 9})
    assert config.spec_of("layers/0/q").init_r == 9
    assert config.spec_of("layers/0/qq").init_r == 12


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"query": {"min_r": 5}}, r"`rank_overrides\['query'\]`: min_r=5 is above init_r=4"),
        ({"query": {"min_r": 3, "max_r": 2}}, r"`min_r=3`: is above max_r=2"),
        ({"query": {"rank": 3}}, r"`: has the unknown fields 'rank'; use init_r, min_r,"),
        ({"query": 0}, r"`init_r=0`: must be an integer of at least 1"),
        (3, "must map regexes"),
        ({"query": {"alpha": float("nan")}}, "`alpha=nan`: must be a finite number"),
    ],
)
def test_invalid_rank_overrides_raise(limits, message):
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**GOOD, init_r=4, target_r=2, rank_overrides=limits)
