"""The selection of adapted layers, and the rank, limits and scale of each."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adalora_jax as adalora
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.targets import describe, resolve, select


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k = (nn.Dense(6, name=name)(x) for name in ("query", "key"))
        return nn.Dense(5, name="out")(q * k)


class Model(nn.Module):
    """Two layers with attention, a convolution, norms, and a head."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.LayerNorm(name=f"norm_{i}")(x + Attention(name=f"layers_{i}")(x))
        x = nn.Conv(5, (3,), name="conv")(x)
        return nn.Dense(2, name="head")(x)


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.query, self.key = (nnx.Linear(5, 6, rngs=rngs) for _ in range(2))
        self.out = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.query(x) * self.key(x))


class NnxModel(nnx.Module):
    """The same in NNX, with its layers in a list."""

    def __init__(self, rngs):
        self.layers = nnx.List([NnxAttention(rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.LayerNorm(5, rngs=rngs) for _ in range(2)])
        self.conv = nnx.Conv(5, 5, (3,), rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms):
            x = norm(x + layer(x))
        return self.head(self.conv(x))


X = jax.ShapeDtypeStruct((2, 4, 5), jnp.float32)


def config(**changes):
    return adalora.AdaLoraConfig(**{"total_step": 6, "init_r": 4, "target_r": 2} | changes)


def linen_shapes(config):
    variables = jax.eval_shape(Model().init, jax.random.key(0), X)
    adapted = adalora.linen.adapt(Model(), config)
    return jax.eval_shape(lambda key: adapted.init(key, variables, X), jax.random.key(0))


def nnx_shapes(config):
    adapted = nnx.eval_shape(lambda: adalora.nnx.adapt(NnxModel(nnx.Rngs(0)), config))
    return adalora.nnx.adapters(adapted)


QUERIES = {
    "linen": ["layers_0/query", "layers_1/query"],
    "nnx": ["layers/0/query", "layers/1/query"],
}
SHAPES = {"linen": linen_shapes, "nnx": nnx_shapes}
frameworks = pytest.mark.parametrize("framework", SHAPES)


@frameworks
@pytest.mark.parametrize(
    "wanted", [["query"], r".*query", r".*\.query", lambda path, module: path.endswith("query")]
)
def test_target_modules_accepts_names_regex_and_predicate(framework, wanted):
    assert list(SHAPES[framework](config(target_modules=wanted))) == QUERIES[framework]


@frameworks
def test_all_linear_selects_linear_layers_but_not_convolutions(framework):
    found = list(SHAPES[framework](config(target_modules="all-linear")))
    assert len(found) == 7
    assert "head" in found


@frameworks
def test_exclude_modules_and_layer_indices_narrow_the_selection(framework):
    chosen = config(target_modules="all-linear", exclude_modules=["out"], layers_to_transform=1)
    expected = [f"{QUERIES[framework][1].removesuffix('query')}{n}" for n in ("key", "query")]
    assert list(SHAPES[framework](chosen)) == expected
    chosen = chosen.replace(layers_to_transform=[0, 1], layers_pattern="layers")
    assert len(SHAPES[framework](chosen)) == 4


@frameworks
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["norm_0", "norms/0"], r"matches no module"),
        (["qeury"], r"'qeury' matches no module.*query"),
        (r".*norms?.\d", r"LayerNorm, which cannot be adapted \(kinds that can: Dense"),
        (["layers_0", "layers/0"], "matches no module"),
        (lambda path, module: False, "no layer is selected"),
        ("query", r"regular expression for the whole path, or a list of names, \['query'\], for"),
    ],
)
def test_invalid_target_modules_raises(framework, wanted, message):
    with pytest.raises(ValueError, match=message):
        SHAPES[framework](config(target_modules=wanted))


@frameworks
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude_modules": ["nope"]}, "`exclude_modules`: 'nope' matches no module; name one"),
        ({"exclude_modules": ["out", "nope"]}, "`exclude_modules`: 'nope' matches no module"),
        ({"exclude_modules": "out"}, r"`exclude_modules`: 'out' .* whole path, .*, \['out'\]"),
        (
            {"rank_overrides": {"nope": 4}},
            "`rank_overrides`: 'nope' matches no adapted layer; name one of the adapted layers: ",
        ),
        (
            {"rank_overrides": {"query": 4, "quer.": 3, "conv": 2}},
            "`rank_overrides`: 'conv' matches no",
        ),
        (
            {"exclude_modules": ["out"], "rank_overrides": {"out": 3}},
            "`rank_overrides`: 'out' matches no",
        ),
    ],
)
def test_unmatched_exclude_modules_or_rank_overrides_raises(framework, changes, message):
    with pytest.raises(ValueError, match=message):
        SHAPES[framework](config(target_modules="all-linear", **changes))


@frameworks
def test_exclude_modules_may_name_any_module(framework):
    name = {"linen": "norm_0", "nnx": "norms/0"}[framework]
    for exclude in ([name], [name, "out"], f"{name}|.*out", lambda path, module: False):
        chosen = config(target_modules="all-linear", exclude_modules=exclude)
        assert len(SHAPES[framework](chosen)) == (5 if "out" in str(exclude) else 7)


@frameworks
def test_modules_to_save_covering_all_targets_raises(framework):
    message = "modules_to_save already trains 'head' as a whole; name a layer in only one of"
    for wanted in (["head"], "head", r"he.*"):
        with pytest.raises(ValueError, match=message):
            SHAPES[framework](config(target_modules=wanted, modules_to_save=["head"]))
    found = SHAPES[framework](config(target_modules="all-linear", modules_to_save=["head"]))
    assert len([a for a in found.values() if isinstance(a, adalora.Adapter)]) == 6


@frameworks
def test_unknown_module_to_save_error_names_nearest_match(framework):
    with pytest.raises(
        ValueError, match=r"'nope' matches no .*; name one of the nearest: \w+.*, \w+"
    ):
        SHAPES[framework](config(target_modules="all-linear", modules_to_save=["nope"]))


@pytest.mark.parametrize("pattern", ["layers", "(layers)", "h|layers", "[a-z]+s"])
def test_layers_pattern_is_a_regex(pattern):
    chosen = config(target_modules="all-linear", layers_to_transform=1, layers_pattern=pattern)
    assert list(linen_shapes(chosen)) == [f"layers_1/{n}" for n in ("key", "out", "query")]
    assert len(nnx_shapes(chosen)) == 3


def test_all_linear_selects_gates_of_both_lstm_cells():
    class Recurrent(nn.Module):
        cell: type

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.RNN(self.cell(3, name="cell"))(x))

    found = []
    for cell in (nn.LSTMCell, nn.OptimizedLSTMCell):
        model, chosen = Recurrent(cell), config(target_modules="all-linear")
        variables = jax.eval_shape(model.init, jax.random.key(0), X)
        adapted = adalora.linen.adapt(model, chosen)
        found.append(jax.eval_shape(adapted.init, jax.random.key(0), variables, X))
    assert len(found[0]) == 9
    assert sorted(found[0]) == sorted(found[1])


DENSE = Layout()
SUBJECTS = {
    "a/query": Candidate(nn.Dense(4), DENSE, (6, 4)),
    "a/key": Candidate(nn.Dense(4), DENSE, (5, 4), cannot_adapt="its kernel is tied to 'b'"),
    "b/key": Candidate(nn.Dense(4), DENSE, (6, 4), note="it is normalized"),
    "b/value": Candidate(nn.Dense(4), DENSE, (3, 6, 4), cannot_adapt="it never runs"),
    "norm": Candidate(nn.LayerNorm()),
}


@pytest.mark.parametrize("wanted", [".*", "all-linear", lambda path, module: True])
def test_unsupported_layer_is_skipped_and_described(wanted):
    chosen = config(target_modules=wanted)
    found = select(SUBJECTS, chosen)
    assert {path: target.note for path, target in found.items()} == {
        "a/query": "",
        "b/key": "it is normalized",
    }
    *_, memory, first, second = describe(found, chosen, SUBJECTS).splitlines()
    assert memory.startswith("memory: ")
    assert first == "not adapted: a/key (5, 4): its kernel is tied to 'b'"
    assert second == "not adapted: b/value (3, 6, 4): it never runs"


def test_describe_lists_only_selected_unsupported_layers():
    for changes in ({"target_modules": r".*(query|value)"}, {"exclude_modules": ["a/key"]}):
        chosen = config(**{"target_modules": ".*"} | changes)
        text = describe(select(SUBJECTS, chosen), chosen, SUBJECTS)
        assert "b/value" in text
        assert "a/key" not in text


@pytest.mark.parametrize("wanted", [["key"], ["query", "a/key"]])
def test_naming_an_unsupported_layer_raises(wanted):
    message = "`target_modules`: 'a/key' cannot be adapted, because its kernel is tied to 'b'"
    with pytest.raises(ValueError, match=message):
        select(SUBJECTS, config(target_modules=wanted))


def test_error_gives_reasons_if_all_selected_layers_are_unsupported():
    message = "'a/key': its kernel is tied to 'b'; 'b/value': it never runs"
    with pytest.raises(ValueError, match=message):
        select(SUBJECTS, config(target_modules=r"a/key|b/value|norm"))


def test_resolved_overrides_equal_rank_overrides_pattern():
    choose = lambda path, module: adalora.RankSpec(init_r=3) if path == "a/query" else False
    chosen = config(target_modules=choose, rank_overrides={"a/query": 6})
    assert select(SUBJECTS, resolve(SUBJECTS, chosen))["a/query"].rank == 3


def test_resolved_rank_applies_to_path_with_dots():
    subjects = {"x.y/query": SUBJECTS["a/query"]}
    chosen = config(target_modules=lambda path, module: adalora.RankSpec(init_r=3))
    assert select(subjects, resolve(subjects, chosen))["x.y/query"].rank == 3


@pytest.mark.parametrize(
    ("keep", "rank"),
    [([], 0), ([True, False], 1), (2, 2), ([[], []], 0), ([[True, True], [True, False]], 2)],
)
def test_boolean_rank_pattern_sets_rank_to_its_true_count(keep, rank):
    chosen = config(target_modules=["query"], rank_pattern={"a/query": keep})
    assert select(SUBJECTS, chosen)["a/query"].rank == rank


@pytest.mark.parametrize(
    ("framework", "name", "message"),
    [
        ("linen", "norm_0", r"'norm_0' is a LayerNorm, which cannot be adapted \(kinds that can"),
        (
            "linen",
            "layers_1",
            "Attention, which cannot be adapted.*name the layers in it: layers_1",
        ),
        ("nnx", "norms/1", "'norms/1' is a LayerNorm, which cannot be adapted"),
        ("nnx", "layers.0", "NnxAttention, which cannot be adapted.*name the layers in it"),
    ],
)
def test_naming_a_module_of_unsupported_type_raises(framework, name, message):
    with pytest.raises(ValueError, match=message):
        SHAPES[framework](config(target_modules=["query", name]))


class TiedOtherwise(nnx.Module):
    """One weight, used as an embedding and by an einsum."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 4, rngs=rngs)
        self.head = nnx.Einsum("td,vd->tv", (11, 4), rngs=rngs)
        self.head.kernel = self.embed.embedding


def test_weight_shared_by_different_layer_kinds_raises():
    make = lambda: TiedOtherwise(nnx.Rngs(0))
    chosen = config(target_modules=["embed", "head"])
    with pytest.raises(ValueError, match=r"'embed' and 'head' share a weight.*exclude_modules"):
        adalora.nnx.describe(nnx.eval_shape(make), chosen)
    with pytest.raises(ValueError, match=r"'embed' shares its weight with 'head'"):
        adalora.nnx.adapt(make(), chosen.replace(exclude_modules=["head"]))


@frameworks
def test_rank_overrides_set_ranks_by_pattern(framework):
    limits = {"query": 6, r".*key": {"init_r": 3, "alpha": 3}, "head": adalora.RankSpec(min_r=1)}
    chosen = config(target_modules="all-linear", rank_overrides=limits)
    ranks = {path: a.lam.shape[0] for path, a in SHAPES[framework](chosen).items()}
    expected = {"query": 6, "key": 3, "out": 4, "head": 4}
    assert ranks == {path: expected[path.rpartition("/")[2]] for path in ranks}


@frameworks
def test_predicate_with_rank_specs_requires_resolve(framework):
    def choose(path, module):
        if type(module).__name__ not in ("Dense", "Linear"):
            return False
        return adalora.RankSpec(init_r=3, alpha=9) if path.endswith("query") else "out" in path

    chosen = config(target_modules=choose)
    with pytest.raises(ValueError, match=r"resolve\(model, config"):
        SHAPES[framework](chosen)
    if framework == "linen":
        variables = jax.eval_shape(Model().init, jax.random.key(0), X)
        resolved = adalora.linen.resolve(Model(), chosen, variables, X)
    else:
        resolved = adalora.nnx.resolve(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), chosen)
    found = SHAPES[framework](resolved)
    ranks = {path: a.lam.shape[0] for path, a in found.items()}
    assert ranks == {path: 3 if path.endswith("query") else 4 for path in found}
    assert len(found) == 4
    assert [resolved.scale_of(p) for p in found] == [3 if p.endswith("query") else 2 for p in found]


@frameworks
def test_rank_overrides_alpha_scales_the_increment(framework):
    limits = {"query": {"alpha": 12, "init_r": 6}}
    chosen = config(target_modules="all-linear", rank_overrides=limits, init_lora_weights=False)
    assert chosen.scale_of(QUERIES[framework][0]) == 2
    x = jax.random.normal(jax.random.key(3), X.shape)
    if framework == "linen":
        adapted = adalora.linen.adapt(Model(), chosen)
        variables = jax.jit(Model().init)(jax.random.key(0), x)
        adapters = adapted.init(jax.random.key(1), variables, x)
        outputs = jax.jit(adapted.apply)(variables, adapters, x)
        merged = jax.jit(Model().apply)(adalora.merge(variables, adapters), x)
    else:
        adapted = nnx.jit(lambda: adalora.nnx.adapt(NnxModel(nnx.Rngs(0)), chosen))()
        run = nnx.jit(lambda model: model(x))
        outputs, merged = run(adapted), run(adalora.merge(adapted))
    np.testing.assert_allclose(outputs, merged, rtol=2e-3, atol=2e-3)


@frameworks
def test_describe_counts_parameters_of_abstract_model(framework):
    chosen = config(target_modules="all-linear", rank_overrides={"head": 6})
    if framework == "linen":
        variables = jax.eval_shape(Model().init, jax.random.key(0), X)
        text = adalora.linen.describe(Model(), chosen, variables, X)
    else:
        text = adalora.nnx.describe(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), chosen)
    count = sum(leaf.size for leaf in jax.tree.leaves(SHAPES[framework](chosen)))
    *rows, total, memory = [line.split() for line in text.splitlines()[1:]]
    assert len(rows) == 7
    assert rows[0] == ["head", "dense", "1", "5", "2", "6", "48", "10", "480.0", "%"]
    assert total[:4] == ["total", "7", "30", str(count)]
    assert memory[:2] == ["memory:", "adapters"]


def test_training_respects_rank_overrides_and_meets_budget_exactly():
    limits = {"query": {"min_r": 3}, r"layers_0/key": {"max_r": 1}}
    chosen = config(target_modules="all-linear", rank_overrides=limits)
    adapters = {
        path: adalora.Adapter(*(jnp.ones(leaf.shape) for leaf in a))
        for path, a in linen_shapes(chosen).items()
    }
    tx = adalora.adalora(optax.sgd(0.1), chosen)

    @jax.jit
    def run(adapters):
        def step(carry, key):
            adapters, opt = carry
            grads = jax.tree.map(
                lambda leaf: jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape),
                adapters,
            )
            # With zero gradients the query would lose all triplets without its min_r.
            grads = {
                p: jax.tree.map(lambda g: 0 * g, a) if "query" in p else a for p, a in grads.items()
            }
            updates, opt = tx.update(grads, opt, adapters)
            return (optax.apply_updates(adapters, updates), opt), None

        return jax.lax.scan(
            step, (adapters, tx.init(adapters)), jax.random.split(jax.random.key(0), 6)
        )

    (_, opt), _ = run(adapters)
    ranks = adalora.ranks(adalora.allocator_state(opt))
    assert sum(ranks.values()) == 2 * len(ranks)
    assert (ranks["layers_0/query"], ranks["layers_1/query"]) == (3, 3)
    assert ranks["layers_0/key"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["query", "head"], "modules_to_save": ["head"]},
            "'head' selects no layer, because modules_to_save already trains 'head' as a whole",
        ),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0, 7]},
            r"no layer that target_modules selects has the index 7; pass some of the .* \[0, 1\]",
        ),
    ],
)
@pytest.mark.parametrize("shapes", [linen_shapes, nnx_shapes])
def test_setting_without_effect_raises(shapes, changes, message):
    with pytest.raises(ValueError, match=message):
        shapes(config(**changes))


def test_exclude_modules_naming_a_container_raises():
    with pytest.raises(ValueError, match="'layers_1', which contains layers but is not a layer"):
        linen_shapes(config(target_modules="all-linear", exclude_modules=["layers_1"]))
    chosen = config(target_modules="all-linear", exclude_modules=".*layers_1/.*")
    assert not any("layers_1" in path for path in linen_shapes(chosen))


class WithTable(nn.Module):
    """A parameter outside any layer of a known kind, a layer and a head."""

    @nn.compact
    def __call__(self, x):
        table = self.param("positions", nn.initializers.zeros, (1, 4, 3))
        return nn.Dense(2, name="head")(nn.Dense(3, name="up")(x) + table[:, : x.shape[1]])


class NnxWithTable(nnx.Module):
    def __init__(self, rngs):
        self.positions = nnx.Param(jnp.zeros((1, 4, 3)))
        self.up, self.head = nnx.Linear(5, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.up(x) + self.positions[:, : x.shape[1]])


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_describe_lists_saved_modules_and_parameters_outside_layers(framework):
    chosen = config(target_modules=["up"], modules_to_save=["head"])
    if framework == "linen":
        x = jnp.ones((1, 4, 5))
        variables = jax.eval_shape(WithTable().init, jax.random.key(0), x)
        text = adalora.linen.describe(WithTable(), chosen, variables, x)
    else:
        text = adalora.nnx.describe(nnx.eval_shape(lambda: NnxWithTable(nnx.Rngs(0))), chosen)
    *_, trained, left_out = text.splitlines()
    assert trained == "also trained: head"
    assert left_out.startswith("in no layer of a known kind: positions (1, 4, 3). To adapt one")


class Experts(nn.Module):
    """A mixture whose weights are parameters of its own, next to a layer of a known kind."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.ones, (3, 5, 4))
        router = self.param("router", nn.initializers.ones, (5, 3))
        gates = jax.nn.softmax(x @ router)
        return nn.Dense(5, name="out")(jnp.einsum("td,edf,te->tf", x, table, gates))


class Mixtures(nn.Module):
    count: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.count):
            x = Experts(name=f"layers_{i}")(x)
        return x


@pytest.mark.parametrize("count", [1, 12])
def test_describe_names_every_parameter_outside_layers_once_per_role(count):
    x, model = jnp.ones((2, 5)), Mixtures(count)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    text = adalora.linen.describe(model, config(target_modules=".*"), variables, x)
    of = {1: "layers_0/{} {}", 12: "layers_*/{} {} x 12"}[count].format
    named = ", ".join(sorted([of("router", "(5, 3)"), of("table", "(3, 5, 4)")]))
    assert text.splitlines()[-1].startswith(f"in no layer of a known kind: {named}. To adapt one")


class Gated(nn.Module):
    """An einsum layer with a second matrix, of fewer axes than the weight that is adapted."""

    einsum_str: str = "td,kdf->ktf"

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, (2, 5, 4))
        return jnp.einsum(self.einsum_str, x, weight) @ self.param("mix", nn.zeros, (4, 5))


def test_describe_names_second_matrix_of_adapted_module():
    x, model = jnp.ones((2, 5)), nn.Sequential([Gated()])
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    text = adalora.linen.describe(model, config(target_modules=".*"), variables, x)
    assert "in no layer of a known kind: layers_0/mix (4, 5). To adapt" in text


def test_describe_leaves_out_flax_own_adapters():
    layer = nnx.LoRALinear(6, 4, lora_rank=2, rngs=nnx.Rngs(0))
    text = adalora.nnx.describe(nnx.Sequential(layer), config(target_modules=".*"))
    assert text.splitlines()[-1].startswith("memory:")
