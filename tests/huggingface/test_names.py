"""Name maps: both directions, their errors, and families without contradictions."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_jax._src.huggingface.names import IDENTITY, NameMap, ParamLocation, as_names, hf_names

FAMILIES = ["bert", "gpt2", "llama", "mistral", "gemma", "gemma2", "gemma3", "qwen2", "qwen3"]
FAMILIES += ["vit", "vit_v4"]
WHOLE = (0, 1)


def place_of(pair):
    """Return a concrete place for the Flax side of a pair, with 3 for every number."""
    flax = re.sub(r"\{[a-z]\}", "3", pair[0])
    flax = re.sub(r"\{\w+\}", "query", flax)
    found = re.fullmatch(r"([^\[:]+)(?:\[([\d,]+)\])?(?::(\d)/(\d))?", flax)
    index = tuple(map(int, found[2].split(","))) if found[2] else ()
    return found[1], index, (int(found[3]), int(found[4])) if found[3] else WHOLE


@pytest.mark.parametrize("prefix", [None, ""])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_pairs_map_flax_paths_to_hf_names(family, prefix):
    """No earlier pair shadows a later one with another name."""
    names = hf_names(family, prefix=prefix)
    for pair in names.pairs:
        path, index, part = place_of(pair)
        want = re.sub(r"\{\w+\}", lambda f: "3" if len(f[0]) == 3 else "query", pair[1])
        ways = names.to_hf(path, index)
        name, _, hf_part = want.partition(":")
        mine = next(way for way in ways if way[1] == part)
        assert mine[0] == name, pair
        assert mine[2] == (tuple(map(int, hf_part.split("/"))) if hf_part else WHOLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_names_round_trip_through_unstacked_flax_paths(family):
    names = hf_names(family)
    for _, hf in names.pairs:
        name = re.sub(r"\{\w+\}", lambda f: "3" if len(f[0]) == 3 else "query", hf.split(":")[0])
        for place, part in names.to_flax(name):
            assert place.stack_index == ()
            assert part == WHOLE
            assert names.to_hf(place.path)[0][0] == name


def test_stacked_and_unstacked_paths_are_distinct():
    llama = hf_names("llama")
    assert llama.to_hf("layers/attn/q_proj", (4,))[0][0] == "model.layers.4.self_attn.q_proj"
    with pytest.raises(ValueError, match=r"`names`: .* matches no pair, and the nearest names"):
        llama.to_hf("layers/attn/q_proj")
    with pytest.raises(ValueError, match="with 2 stack axes"):
        llama.to_hf("layers/attn/q_proj", (4, 1))


def test_root_and_prefix_are_configurable():
    names = hf_names("llama", root="decoder", prefix="language_model.model")
    assert names.to_hf("decoder/layers_0/mlp/up_proj")[0][0] == (
        "language_model.model.layers.0.mlp.up_proj"
    )
    assert hf_names("bert", prefix="").to_hf("encoder/layer/1/output/dense")[0][0] == (
        "encoder.layer.1.output.dense"
    )


def test_custom_maps_compare_and_hash_by_value():
    pairs = {"blocks_{i}/att/q": "model.layers.{i}.self_attn.q_proj", "head": "lm_head"}
    names = as_names(pairs)
    assert names == as_names(list(pairs.items())) == NameMap(pairs)
    assert len({names, NameMap(tuple(pairs.items()))}) == 1
    assert names.to_flax("model.layers.12.self_attn.q_proj") == [
        (ParamLocation("blocks_12/att/q"), WHOLE)
    ]
    assert as_names(None) is IDENTITY
    assert as_names("bert") is hf_names("bert")


parts = st.text("abc_019", min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(parts, min_size=1, max_size=6))
def test_identity_map_round_trips_every_path(path):
    path = "/".join(path)
    ((name, *_),) = IDENTITY.to_hf(path)
    assert IDENTITY.to_flax(name) == [(ParamLocation(path), WHOLE)]


@settings(deadline=None)
@given(st.integers(0, 99_999), st.integers(0, 9), parts)
def test_placeholders_round_trip_in_any_order(i, j, word):
    names = NameMap([("a_{i}/{word}[{j},1]", "x.{j}.y.{i}.{word}.k")])
    ((name, *_),) = names.to_hf(f"a_{i}/{word}", (j, 1))
    assert name == f"x.{j}.y.{i}.{word}.k"
    assert names.to_flax(name) == [(ParamLocation(f"a_{i}/{word}", (j, 1)), WHOLE)]
    with pytest.raises(ValueError, match="matches no pair"):
        names.to_hf(f"a_{i}/{word}", (j, 2))


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([("a/{i}", "b")], "same placeholders"),
        ([("a", "b.{i}")], "same placeholders"),
        ([("a[{i}]", "b[{i}]")], "only on the first"),
        ([("a[i]", "b")], "cannot be read"),
        ([("a{", "b")], "cannot be read"),
        ([("a:3/3", "b")], "cannot be read"),
        ([("", "b")], "cannot be read"),
        ([("a", "b", "c")], "must be pairs"),
        ([1], "must be pairs"),
        (5, "must be pairs"),
    ],
)
def test_invalid_map_raises(pairs, says):
    with pytest.raises(ValueError, match=says):
        as_names(pairs)


def test_error_lists_nearest_names():
    with pytest.raises(ValueError, match=r"layers/\{i\}/attn/q_proj.*names=\["):
        hf_names("llama").to_hf("layers/3/attn/q_porj")
    with pytest.raises(ValueError, match="one of bert, gpt2, llama"):
        hf_names("t5")


def test_map_without_pairs_names_none_as_nearest():
    with pytest.raises(ValueError, match="the nearest names that do are none; pass names="):
        NameMap(()).to_hf("query", ())
