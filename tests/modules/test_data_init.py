"""Initial values from the singular vectors of the model's weights and of its inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adalora_jax as al
from adalora_jax import inits
from adalora_jax._src.core import pytree

CONFIG = al.AdaLoraConfig(total_step=10, init_r=3, target_r=2, lora_alpha=6, target_modules=".*")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.DenseGeneral((2, 4), name="query")(jnp.tanh(x))
        return x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(h), None


class Model(nn.Module):
    """An embedding, a convolution, three stacked blocks and a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="embed")(tokens)
        x = nn.Conv(8, (3,), name="conv")(x)
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x = layers(name="layers")(x, None)[0]
        return {"logits": nn.Dense(5, name="head")(x), "ids": tokens}


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 8, (3,), rngs=rngs)
        self.query = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, tokens):
        x = self.conv(self.embed(tokens))
        return self.head(x + self.out(self.query(jnp.tanh(x))))


TOKENS = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)


@pytest.fixture(scope="module")
def linen():
    model = Model()
    variables = model.init(jax.random.key(1), TOKENS)
    adapted = al.linen.adapt(model, CONFIG)
    return model, adapted, variables, adapted.init(jax.random.key(2), variables, TOKENS)


def second_moment(x, axes=1):
    """Compute the second moments of the inputs ``x [..., *ins]`` in float64."""
    flat = np.asarray(x, np.float64).reshape(-1, np.prod(x.shape[x.ndim - axes :]))
    return flat.T @ flat


def patches(x):
    """Return the zero-padded windows of three that a convolution sees."""
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (0, 0)))
    return np.stack([padded[:, i : i + x.shape[1]] for i in range(3)], axis=-2)


def expected_moments(params):
    """Run the linen model by hand; return ``{path: second moments of the layer's inputs}``."""

    def dense(x, node, axes=1):
        return np.tensordot(x, node["kernel"], axes=axes) + np.asarray(node["bias"])

    x = np.asarray(params["embed"]["embedding"])[np.asarray(TOKENS)]
    moments = {"conv": second_moment(patches(x), 2)}
    x = dense(patches(x), params["conv"], 2)
    query, out = [], []
    for i in range(3):
        block = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["layers"])
        query.append(second_moment(np.tanh(x)))
        h = dense(np.tanh(x), block["query"])
        out.append(second_moment(h, 2))
        x = x + dense(h, block["out"], 2)
    stacks = {"layers/query": np.stack(query), "layers/out": np.stack(out)}
    return moments | stacks | {"head": second_moment(x)}


# The singular vectors of the inputs -----------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_input_moments_match_a_run_by_hand(linen, compiled):
    _, adapted, variables, adapters = linen
    run = lambda variables, tokens: inits.input_second_moments(adapted, variables, adapters, tokens)
    moments = (jax.jit(run) if compiled else run)(variables, TOKENS)
    expected = expected_moments(variables["params"])
    assert moments.keys() == expected.keys()  # not the embedding, whose inputs are ids
    for path, moment in moments.items():
        np.testing.assert_allclose(moment, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)


def test_input_moments_of_batches_add_up(linen):
    _, adapted, variables, adapters = linen
    run = lambda tokens: inits.input_second_moments(adapted, variables, adapters, tokens)
    parts = jax.tree.map(jnp.add, run(TOKENS[:1]), run(TOKENS[1:]))
    for path, moment in run(TOKENS).items():
        np.testing.assert_allclose(parts[path], moment, rtol=1e-4, atol=1e-4)


def test_nnx_input_moments_match_and_leave_model_unchanged():
    model = al.nnx.adapt(NnxModel(nnx.Rngs(0)), CONFIG, nnx.Rngs(1))
    before = nnx.state(model)
    moments = inits.input_second_moments(model, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    x = model.embed(TOKENS)
    np.testing.assert_allclose(moments["conv"], second_moment(patches(x), 2), rtol=1e-4, atol=1e-5)
    x = model.conv(x)
    h = model.query(jnp.tanh(x))
    want = {
        "query": second_moment(jnp.tanh(x)),
        "out": second_moment(h, 2),
        "head": second_moment(x + model.out(h)),
    }
    assert moments.keys() == {"conv", *want}
    for path in want:
        np.testing.assert_allclose(moments[path], want[path], rtol=1e-4, atol=1e-4)


def test_eva_init_sets_q_to_top_right_singular_vectors_of_inputs(linen):
    model, adapted, variables, adapters = linen
    moments = inits.input_second_moments(adapted, variables, adapters, TOKENS)
    along = inits.eva_init(adapters, moments)
    assert along.keys() == adapters.keys()
    for path, moment in expected_moments(variables["params"]).items():
        for index in np.ndindex(moment.shape[:-2]):
            q = np.asarray(along[path].q[index])
            np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-5)
            vectors = np.linalg.svd(moment[index])[2]
            np.testing.assert_allclose(abs(q @ vectors[:3].T), np.eye(3), atol=1e-3, err_msg=path)
        assert not np.any(along[path].lam)
        np.testing.assert_array_equal(along[path].p, adapters[path].p)
    np.testing.assert_array_equal(along["embed"].q, adapters["embed"].q)
    ours = adapted.apply(variables, along, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, ours, model.apply(variables, TOKENS))


def test_eva_init_with_moments_of_another_model_raises():
    adapters = {"query": al.Adapter(jnp.ones((1, 4)), jnp.ones(1), jnp.ones((1, 3)))}
    with pytest.raises(ValueError, match=r"`moments\['key'\]`: no adapter has this path"):
        inits.eva_init(adapters, {"key": jnp.eye(3)})


def test_eva_ranks_follow_variance_within_initial_budget(linen):
    _, adapted, variables, adapters = linen
    moments = inits.input_second_moments(adapted, variables, adapters, TOKENS)
    config = inits.eva_ranks(moments, CONFIG)
    ranks = dict(config.rank_pattern)
    number = {path: int(np.prod(moment.shape[:-2])) for path, moment in moments.items()}
    assert sum(ranks[path] * number[path] for path in ranks) == 3 * sum(number.values())
    assert 1 <= min(ranks.values()) < max(ranks.values()) <= 6
    assert config.scaling == CONFIG.scaling
    # By hand: the largest components that fit, for stacks by the mean over their layers.
    shares = {}
    for path, moment in expected_moments(variables["params"]).items():
        values = np.sort(np.linalg.eigvalsh(moment), axis=-1)[..., ::-1]
        share = values / values.sum(axis=-1, keepdims=True)
        shares[path] = share.reshape(-1, share.shape[-1]).mean(axis=0)
    want, left = dict.fromkeys(shares, 1), 2 * sum(number.values())
    for _, path in sorted((-v, path) for path, row in shares.items() for v in row[1:6]):
        if number[path] <= left:
            want[path], left = want[path] + 1, left - number[path]
    assert ranks == want
    # The adapters start with these ranks; the embedding's is unchanged.
    fresh = al.linen.adapt(Model(), config).init(jax.random.key(2), variables, TOKENS)
    rows = {path: adapter.lam.shape[-1] for path, adapter in fresh.items()}
    assert rows == ranks | {"embed": 3}
    along = inits.eva_init(fresh, moments)
    assert al.init_state(along, config).allocator.budget == 3 * sum(number.values()) + 3


def test_eva_ranks_stay_within_limits():
    moments = {"a": jnp.diag(jnp.array([5.0, 4, 3, 2, 1])), "b": jnp.diag(jnp.array([1.0, 0, 0]))}
    ranks = lambda config, **most: dict(inits.eva_ranks(moments, config, **most).rank_pattern)
    assert ranks(CONFIG) == {"a": 5, "b": 1}
    assert ranks(CONFIG, max_rank=3) == {"a": 3, "b": 3}
    limited = CONFIG.replace(rank_overrides={"a": {"max_r": 2}})
    assert ranks(limited) == {"a": 2, "b": 3}
    with pytest.raises(ValueError, match="`max_rank=0`: must be at least 1"):
        ranks(CONFIG, max_rank=0)


# The singular vectors of the weights ----------------------------------------------------------


def read(weight, stack, ins):
    """Reshape a kernel to ``[*stack, in, out]``, in float64."""
    shape = (*weight.shape[:stack], np.prod(weight.shape[stack : stack + ins]), -1)
    return np.asarray(weight, np.float64).reshape(shape)


@pytest.mark.parametrize("changes", [{}, {"scale": 0.25}, {"rank_overrides": {"query": 5}}])
def test_pissa_init_splits_kernel_into_top_components_and_remainder(linen, changes):
    model, _, variables, _ = linen
    config = CONFIG.replace(**changes)
    adapted = al.linen.adapt(model, config)
    adapters = adapted.init(jax.random.key(2), variables, TOKENS)
    corrected, adapters = inits.pissa_init(variables, adapters)
    want = model.apply(variables, TOKENS)["logits"]
    y = adapted.apply(corrected, adapters, TOKENS)["logits"]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert abs(model.apply(corrected, TOKENS)["logits"] - want).max() > 0.01
    for path, stack, ins in (("conv", 0, 2), ("layers/query", 1, 1), ("layers/out", 1, 2)):
        get = lambda tree, path=path: pytree.get_path(tree["params"], path.split("/"))["kernel"]
        old, new = (read(get(tree), stack, ins) for tree in (variables, corrected))
        adapter, rank = adapters[path], adapters[path].lam.shape[-1]
        for index in np.ndindex(old.shape[:-2]):
            u, sigma, vt = np.linalg.svd(old[index])
            lam, p, q = (np.asarray(leaf[index]) for leaf in (adapter.lam, adapter.p, adapter.q))
            np.testing.assert_allclose(config.scale_of(path) * lam, sigma[:rank], rtol=1e-4)
            np.testing.assert_allclose(abs(p @ vt[:rank].T), np.eye(rank), atol=1e-3)
            np.testing.assert_allclose(abs(q @ u[:, :rank]), np.eye(rank), atol=1e-3)
            rest = np.linalg.svd(new[index])[1]
            np.testing.assert_allclose(rest[: len(sigma) - rank], sigma[rank:], atol=1e-5)


def test_pissa_init_preserves_nnx_model_with_shared_weights():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 6, rngs=rngs)
            self.second = nnx.Linear(6, 6, rngs=rngs)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    for base, x in ((NnxModel(nnx.Rngs(0)), TOKENS), (Tied(nnx.Rngs(0)), jnp.ones((2, 6)))):
        adapted = al.nnx.adapt(base, CONFIG, nnx.Rngs(1))
        model = inits.pissa_init(adapted)
        np.testing.assert_allclose(model(x), base(x), rtol=1e-4, atol=1e-5)
        bare = al.nnx.with_adapters(model, {})
        assert abs(bare(x) - base(x)).max() > 1e-3
        for path, adapter in al.nnx.adapters(model).items():
            assert np.all(adapter.lam > 0), path
            np.testing.assert_array_equal(al.nnx.adapters(adapted)[path].lam, 0 * adapter.lam)


def test_pissa_init_keeps_lam_zero_beyond_rank_of_weight():
    model, x = nn.Dense(2), jnp.ones((3, 5))
    variables = model.init(jax.random.key(0), x)
    adapted = al.linen.adapt(model, CONFIG.replace(init_r=4))
    fresh = adapted.init(jax.random.key(1), variables, x)
    corrected, adapters = inits.pissa_init(variables, fresh)
    assert (np.asarray(adapters[""].lam) != 0).tolist() == [True, True, False, False]
    np.testing.assert_array_equal(adapters[""].q[2:], fresh[""].q[2:])
    np.testing.assert_allclose(corrected["params"]["kernel"], jnp.zeros((5, 2)), atol=1e-6)


def test_pissa_init_of_quantized_weight_raises():
    quantization = pytest.importorskip("adalora_jax.quantization")
    model, x = nn.Dense(64), jnp.ones((2, 64))
    module, variables = quantization.quantize(model, "int8", model.init(jax.random.key(0), x), x)
    adapted = al.linen.adapt(module, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, x)
    with pytest.raises(ValueError, match="is quantised, so no increment can be subtracted from it"):
        inits.pissa_init(variables, adapters)
    base = quantization.quantize(nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0))), "int8", x)
    with pytest.raises(ValueError, match="is quantised, so no increment can be subtracted from it"):
        inits.pissa_init(al.nnx.adapt(base, CONFIG))
    # Its input moments can be computed as for any other weight.
    moments = inits.input_second_moments(adapted, variables, adapters, x)
    np.testing.assert_allclose(moments[""], x.T @ x, rtol=1e-5)


def test_eva_of_invalid_moments_raises():
    adapters = {"up": al.Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))}
    wrong = {"are empty": {}, "not finite": {"up": jnp.full((3, 3), jnp.nan)}}
    wrong |= {"shape .3.,": {"up": jnp.ones(3)}, "shape .2, 3.": {"up": jnp.ones((2, 3))}}
    for message, moments in wrong.items():
        for function in (inits.eva_init, lambda _, moments: inits.eva_ranks(moments, CONFIG)):
            with pytest.raises(ValueError, match=f"`moments.*{message}"):
                function(adapters, moments)
    with pytest.raises(ValueError, match=r"has shape \[4, 4\], but must have \[3, 3\]"):
        inits.eva_init(adapters, {"up": jnp.eye(4)})
    with pytest.raises(TypeError, match="`moments=int`: is not a mapping"):
        inits.eva_init(adapters, 3)
    shapes = jax.eval_shape(inits.eva_init, adapters, {"up": jnp.eye(3)})
    assert shapes["up"].q.shape == (2, 3)


def test_initial_values_of_unadapted_model_raise():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`variables`: the model has no adapters"):
        inits.pissa_init(model)
    with pytest.raises(ValueError, match="`model`: the model has no adapters"):
        inits.input_second_moments(model, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="`model=Dense`: is not an adapted model"):
        inits.input_second_moments(nn.Dense(4), {}, {}, jnp.ones((2, 3)))
