"""Several adapters of one model: switching, combining, and one per example of a batch."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.compiling import assert_same

import adalora_jax as adalora
from adalora_jax.bank import combine_adapters, truncate

CONFIG = adalora.AdaLoraConfig(
    total_step=9, init_r=4, target_r=2, init_lora_weights=False, target_modules=["up", "down"]
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.DenseGeneral((2, 3), name="up")(nn.LayerNorm()(x))
        return x + nn.DenseGeneral(6, axis=(-2, -1), name="down")(nn.gelu(y)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6, name="tokens")(ids)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(5, name="head")(blocks(name="blocks")(x, None)[0])


IDS = jax.random.randint(jax.random.key(0), (4, 7), 0, 11)
VARIABLES = Model().init(jax.random.key(1), IDS)
ADAPTED = adalora.linen.adapt(Model(), CONFIG)


def trained(seed, **changes):
    """Return adapters with increments of ordinary size, and their config."""
    config = CONFIG.replace(**changes)
    adapted = adalora.linen.adapt(Model(), config)
    adapters = adapted.init(jax.random.key(seed), VARIABLES, IDS)
    return jax.tree.map(lambda leaf: 0.3 * leaf, adapters), config


@pytest.fixture(scope="module")
def members():
    """Return adapters of different ranks, scales and layers, with their configs."""
    return {
        "french": trained(2),
        "german": trained(3, init_r=6, lora_alpha=30),
        "italian": trained(4, init_r=2, target_modules=["head", "tokens", "up"]),
    }


@pytest.fixture(scope="module")
def bank(members):
    bank = adalora.AdapterBank.from_dict({})
    for name, (adapters, _) in members.items():
        bank = bank.add(name, adapters)
    return bank


def alone(member, ids=IDS):
    adapters, config = member
    return adalora.linen.adapt(Model(), config).apply(VARIABLES, adapters, ids)


def test_selected_adapter_acts_as_it_does_alone(members, bank):
    assert bank.names == ("french", "german", "italian")
    for name, member in members.items():
        output = ADAPTED.apply(VARIABLES, bank.select(name), IDS)
        np.testing.assert_allclose(output, alone(member), rtol=2e-4, atol=2e-5)
        assert not np.allclose(output, Model().apply(VARIABLES, IDS), atol=1e-2)


def test_switching_and_disabling_do_not_recompile(members, bank):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(bank, which, ids):
        return ADAPTED.apply(VARIABLES, bank.select(which), ids)

    chex.clear_trace_counter()
    for name, member in members.items():
        output = step(bank, bank.index(name), IDS)
        np.testing.assert_allclose(output, alone(member), rtol=2e-4, atol=2e-5)
    disabled = step(bank, bank.index(None), IDS)
    assert_same(disabled, jax.jit(Model().apply)(VARIABLES, IDS))
    # Nor does another adapter of the same size under the same name.
    again = bank.add("italian", jax.tree.map(jnp.negative, members["italian"][0]))
    step(again, again.index("italian"), IDS)


def test_per_example_selects_an_adapter_for_each_example(members, bank):
    names = ["german", None, "italian", "german"]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def mixed(bank, which, ids):
        apply = adalora.per_example(lambda a, ids: ADAPTED.apply(VARIABLES, a, ids))
        return apply(bank.select(which), ids)

    chex.clear_trace_counter()
    output = mixed(bank, bank.index(names), IDS)
    everything = {**{n: alone(m) for n, m in members.items()}, None: Model().apply(VARIABLES, IDS)}
    for row, name in enumerate(names):
        np.testing.assert_allclose(output[row], everything[name][row], rtol=2e-4, atol=2e-5)
    other = mixed(bank, bank.index(["french"] * 4), IDS)
    np.testing.assert_allclose(other, everything["french"], rtol=2e-4, atol=2e-5)


def test_per_example_applies_base_kernels_to_whole_batch(bank):
    """The lowered program repeats no kernel per example."""
    apply = adalora.per_example(lambda a, ids: ADAPTED.apply(VARIABLES, a, ids))
    text = jax.jit(apply).lower(bank.select(["french"] * 4), IDS).as_text()
    dots = re.findall(r"stablehlo\.dot_general.*?: \((.*?)\) ->", text)
    # The kernel of `up`, [6, 2, 3], is multiplied by all 4 x 7 tokens.
    assert any("4x1x7x6x" in dot and "tensor<6x2x3xf32>" in dot for dot in dots), dots
    assert not any("4x6x2x3x" in dot for dot in dots)


def test_delete_keeps_other_adapters_unchanged(members, bank):
    less = bank.delete("german")
    assert less.names == ("french", "italian")
    for name in less.names:
        chex.assert_trees_all_equal(less.select(name), bank.select(name))
    message = "`name='german'`: the bank has no adapters of this name, only french, italian;"
    with pytest.raises(ValueError, match=message):
        less.select("german")
    with pytest.raises(ValueError, match="`name='greek'`"):
        bank.index(["french", "greek"])
    with pytest.raises(ValueError, match="`name='greek'`"):
        bank.delete("greek")
    again = less.add("german", members["german"][0])
    assert again.names == ("french", "italian", "german")
    chex.assert_trees_all_close(again.select("german"), bank.select("german"))


def test_combine_adapters_sums_weighted_increments(members):
    (french, _), german = members["french"], trained(5)[0]
    both = combine_adapters(french, german, weights=[0.7, -0.3])
    for path, adapter in both.items():
        want = 0.7 * adalora.delta_weight(french[path])
        want = want - 0.3 * adalora.delta_weight(german[path])
        got = adalora.delta_weight(adapter)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`weights`: has 1 entries for 2 sets"):
        combine_adapters(french, german, weights=[1.0])


@pytest.mark.parametrize(("ins", "outs", "rank"), [(9, 7, 5), (3, 8, 6), (8, 3, 6)])
def test_truncate_is_best_low_rank_approximation(ins, outs, rank):
    """The reference is NumPy's SVD of the dense increment, slice by slice."""
    adapter = adalora.init_adapter(jax.random.key(0), ins, outs, CONFIG, rank=rank, stack=(2,))
    small = truncate({"layers": adapter}, 2)["layers"]
    assert small.lam.shape == (2, 2)
    dense = np.asarray(adalora.delta_weight(adapter), np.float64)
    left, values, right = np.linalg.svd(dense)
    best = (left[:, :, :2] * values[:, None, :2]) @ right[:, :2]
    np.testing.assert_allclose(adalora.delta_weight(small), best, rtol=1e-4, atol=1e-4)
    for factor in (small.p, small.q):
        gram = factor @ factor.swapaxes(-1, -2)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), (2, 2, 2)), atol=1e-5)
    whole = truncate({"layers": adapter}, 50)["layers"]
    assert whole.lam.shape[-1] <= min(ins, outs, rank)
    np.testing.assert_allclose(adalora.delta_weight(whole), dense, rtol=1e-4, atol=1e-4)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapter)
    assert truncate(half, 2).p.dtype == jnp.bfloat16


def test_truncate_to_budget_keeps_largest_singular_values_of_all_matrices():
    """The reference is NumPy's SVD of every dense increment, with one threshold for all."""
    config = dataclasses.replace(CONFIG, lora_alpha=12)
    made = {
        "query": adalora.init_adapter(jax.random.key(1), 9, 7, CONFIG, rank=5),
        "layers": adalora.init_adapter(jax.random.key(2), 6, 8, config, rank=4, stack=(3,)),
        "weak": adalora.init_adapter(jax.random.key(3), 5, 5, CONFIG, rank=2),
    }
    made["weak"] = made["weak"]._replace(lam=1e-3 * made["weak"].lam)
    head = jnp.ones(3)
    small = truncate({**made, "head": {"bias": head}}, budget=9)
    dense = {path: np.asarray(adalora.delta_weight(a), np.float64) for path, a in made.items()}
    parts = {path: np.linalg.svd(matrix, full_matrices=False) for path, matrix in dense.items()}
    lowest = np.sort(np.concatenate([values.ravel() for _, values, _ in parts.values()]))[-9]
    assert "weak" not in small  # rank 0
    assert small["head"]["bias"] is head
    for path in ("query", "layers"):
        left, values, right = parts[path]
        best = (left * np.where(values >= lowest, values, 0)[..., None, :]) @ right
        np.testing.assert_allclose(adalora.delta_weight(small[path]), best, rtol=1e-4, atol=1e-4)
        assert small[path].lam.shape[-1] == (values >= lowest).sum(axis=-1).max()
    assert sum(int((small[path].lam != 0).sum()) for path in ("query", "layers")) == 9
    limited = truncate(made, 1, budget=3)
    assert [limited[path].lam.shape[-1] for path in limited] == [1] * len(limited)
    assert sum(int((a.lam != 0).sum()) for a in limited.values()) == 3


def test_training_one_adapter_leaves_others_unchanged(members, bank):
    frozen = bank.select("german")
    adapters, state = members["french"][0], None
    tx = adalora.adalora(optax.adam(0.02), CONFIG)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            logits = ADAPTED.apply(VARIABLES, combine_adapters(adapters, frozen), IDS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, IDS % 5).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(9):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1
    together = bank.add("french", adapters)
    chex.assert_trees_all_equal(together.select("german"), frozen)
    assert sum(adalora.ranks(adalora.allocator_state(state)).values()) == 2 * 4


@pytest.mark.parametrize("which", [4, -1, True, 1.0, np.array([0, 4])])
def test_selecting_invalid_indices_raises(bank, which):
    with pytest.raises(ValueError, match=r"`which=.* indices from 0, the base model, to 3"):
        bank.select(which)


SET = {"up": adalora.Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))}


def test_combining_nothing_raises():
    with pytest.raises(ValueError, match="`adapters`: none were given"):
        combine_adapters()


@pytest.mark.parametrize("other", [3, None, "x", CONFIG, [SET, SET], [0.5, 0.5], SET["up"]])
def test_combining_what_is_no_mapping_raises(other):
    with pytest.raises(TypeError, match=r"`adapters\[1\]=\w+`: is not a mapping; pass each set"):
        combine_adapters(SET, other)


@pytest.mark.parametrize("other", [{}, VARIABLES])
def test_combining_a_mapping_without_adapters_raises(other):
    with pytest.raises(ValueError, match=r"`adapters\[1\]`: no adapter was found"):
        combine_adapters(SET, other)


@pytest.mark.parametrize("weights", ["22", 3])
def test_weights_that_are_no_list_raise(weights):
    with pytest.raises(TypeError, match=r"`weights=.*`: is not a list of numbers"):
        combine_adapters(SET, SET, weights=weights)


@pytest.mark.parametrize("weight", [np.nan, jnp.inf, np.ones(2), None, "2"])
def test_weight_that_is_no_finite_number_raises(weight):
    with pytest.raises(ValueError, match=r"`weights\[1\]=.*`: is not a finite number"):
        combine_adapters(SET, SET, weights=[1, weight])


def test_weights_may_be_traced_or_arrays():
    combine = lambda weights: combine_adapters(SET, SET, weights=weights)["up"].lam
    for weights in ([1, 2.0], [np.float32(1), jnp.asarray(2, jnp.bfloat16)], jnp.array([1.0, 2])):
        np.testing.assert_array_equal(combine(weights), [1, 1, 2, 2])
    assert jax.eval_shape(combine, jnp.ones(2)).shape == (4,)


def test_bank_of_sets_without_names_or_invalid_base_raises():
    with pytest.raises(ValueError, match="`named`: is one set of adapters, without its name"):
        adalora.AdapterBank.from_dict(SET)
    with pytest.raises(TypeError, match="`base=int`: is not a mapping"):
        adalora.AdapterBank.from_dict({"x": SET}, 3)
    with pytest.raises(TypeError, match="`function=NoneType`: is not callable"):
        adalora.per_example(None)


@pytest.mark.parametrize("tree", [None, VARIABLES, nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
def test_truncating_what_has_no_adapters_raises(tree):
    with pytest.raises(ValueError, match="`adapters`: no adapter was found"):
        truncate(tree, 1)


@pytest.mark.parametrize("rank", [0, True, 1.5])
def test_truncating_to_an_invalid_rank_raises(rank):
    with pytest.raises(ValueError, match=r"`rank=.*`: must be an integer of at least 1"):
        truncate(SET, rank)


def test_truncating_to_an_invalid_budget_raises():
    with pytest.raises(ValueError, match=r"`rank=None`: gives no limit.*; pass rank or budget"):
        truncate(SET)
    with pytest.raises(ValueError, match=r"`budget=0`: must be an integer of at least 1"):
        truncate(SET, budget=0)
    with pytest.raises(ValueError, match=r"`budget=2`: .* traced; call truncate outside of jit"):
        jax.jit(lambda adapters: truncate(adapters, budget=2))(SET)
    with pytest.raises(ValueError, match=r"`adapters`: are stacked by role.*pass unstack"):
        truncate(adalora.stack(SET), budget=2)


def test_loading_invalid_adapters_raises(bank):
    good, _ = trained(7)
    with pytest.raises(ValueError, match="`name=''`: must be a string"):
        bank.add("", good)
    with pytest.raises(ValueError, match=r"'more' has parameters at 'head'.*pass the base model's"):
        bank.add("more", {**good, "head": {"kernel": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"no adapter was found in the dict; .* for 'none'"):
        bank.add("none", {})
    other = {"blocks/up": jax.tree.map(lambda leaf: leaf[:1], good["blocks/up"])}
    message = r"`adapters\['blocks/up'\]`: 'other' is for .* shape \[1, 6, 6\].*\[2, 6"
    with pytest.raises(ValueError, match=message):
        bank.add("other", other)
    flat = {"blocks/up": jax.tree.map(lambda leaf: leaf[0], good["blocks/up"])}
    with pytest.raises(ValueError, match=r"for a weight of shape \[6, 6\].*\[2, 6, 6\]"):
        bank.add("flat", flat)


def test_bank_works_with_nnx_model():
    config = CONFIG.replace(target_modules="all-linear")
    base = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 5, rngs=nnx.Rngs(1)))
    models = {n: adalora.nnx.adapt(base, config, rngs=i) for i, n in enumerate(["a", "b"])}
    bank = adalora.AdapterBank.from_dict({n: adalora.nnx.adapters(m) for n, m in models.items()})
    x = jax.random.normal(jax.random.key(3), (3, 2, 6))
    apply = lambda adapters, x: adalora.nnx.with_adapters(models["a"], adapters)(x)
    for name, model in models.items():
        np.testing.assert_allclose(apply(bank.select(name), x), model(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(apply(bank.select(None), x), base(x))
    output = jax.jit(adalora.per_example(apply))(bank.select(["b", "a", None]), x)
    want = [models["b"](x[0]), models["a"](x[1]), base(x[2])]
    np.testing.assert_allclose(output, jnp.stack(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_truncation_to_a_budget_of_values_that_are_not_finite_raises(value):
    fine = adalora.Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
    diverged = fine._replace(lam=jnp.array([1.0, value]))
    with pytest.raises(ValueError, match="singular values of down are not finite"):
        truncate({"up": fine, "down": diverged}, budget=1)
