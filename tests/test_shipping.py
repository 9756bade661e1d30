"""Evaluation, merging, compaction and export give the model that training selected."""

import copy
import pickle

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adalora_jax as adalora
from adalora_jax import checkpoint, huggingface, inits

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def adapted_of(model, x, targets=".*", **changes):
    """Return a linen model with random increments, its variables and its adapters."""
    options = {"total_step": 8, "init_r": 3, "target_r": 1, "init_lora_weights": False}
    config = adalora.AdaLoraConfig(**options | {"target_modules": targets} | changes)
    variables = model.init(KEY, x)
    adapted = adalora.linen.adapt(model, config)
    return adapted, variables, adapted.init(jax.random.key(1), variables, x)


def agree(ours, theirs):
    scale = float(jnp.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


class Standardised(nn.Conv):
    """Weight standardisation, as in BiT."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        if name != "kernel":
            return w
        axes = {"axis": (0, 1, 2), "keepdims": True}
        return (w - w.mean(**axes)) / (w.std(**axes) + 1e-5)


class Halved(nn.Dense):
    """A layer whose call does not reach that of its base class."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        return x @ self.param("kernel", init, (x.shape[-1], self.features)) / 2


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Tied(nn.Module):
    """A head that is the embedding: through ``attend``, by hand, or applied in a layer."""

    way: str

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6, name="embed")
        h = nn.Dense(6, name="proj")(embed(ids))
        if self.way == "attend":
            return embed.attend(h)
        if self.way == "by hand":
            return h @ embed.embedding.T
        head = nn.Dense(11, use_bias=False, name="head")
        return head.apply({"params": {"kernel": embed.embedding.T}}, h)


class Mapped(nn.Module):
    """A layer whose parameters pass through nn.map_variables."""

    @nn.compact
    def __call__(self, x):
        centre = lambda params: jax.tree.map(lambda w: w - w.mean(), params)
        mapped = nn.map_variables(
            nn.Dense, "params", trans_in_fn=centre, mutable=self.is_initializing()
        )
        return mapped(4, name="dense")(x)


IDS = jnp.array([[1, 2, 3]])
MERGED = {
    "square einsum": (nn.Einsum((8, 8), "bd,fd->bf"), draw(4, 8)),
    "transposed convolution": (
        nn.ConvTranspose(6, (3, 3), transpose_kernel=True),
        draw(1, 5, 5, 6),
    ),
    "general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), draw(2, 2, 3)),
    "attention": (nn.MultiHeadDotProductAttention(2), draw(2, 3, 4)),
    "recurrent": (nn.RNN(nn.OptimizedLSTMCell(5)), draw(2, 3, 4)),
    "extended": (Doubled(5), draw(2, 4)),
    "tied, attended": (Tied("attend"), IDS),
    "tied by hand": (Tied("by hand"), IDS),
    "tied, applied": (Tied("applied"), IDS),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_model_equals_adapted_model(name):
    model, x = MERGED[name]
    adapted, variables, adapters = adapted_of(model, x)
    output = adapted.apply(variables, adapters, x)
    assert not np.allclose(output, model.apply(variables, x), atol=1e-2)
    merged = adalora.merge(variables, adapters)
    agree(model.apply(merged, x), output)
    restored = adalora.unmerge(merged, adapters)
    agree(model.apply(restored, x), model.apply(variables, x))


TRANSFORMED = {
    "standardised": (Standardised(5, (3, 3)), draw(1, 6, 6, 3)),
    "normalised": (nn.Sequential([nn.WeightNorm(nn.Dense(6))]), draw(2, 4)),
    "more than a product": (Halved(6), draw(2, 4)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_layer_that_transforms_its_weight_is_adapted_but_not_merged(name):
    model, x = TRANSFORMED[name]
    adapted, variables, adapters = adapted_of(model, x)
    output = adapted.apply(variables, adapters, x)
    assert not np.allclose(output, model.apply(variables, x), atol=1e-2)
    (path,) = adapters
    for function in (adalora.merge, adalora.unmerge, inits.pissa_init):
        with pytest.raises(ValueError, match=rf"increment of '{path}' cannot be merged: its layer"):
            function(variables, adapters)
    # Without the note the merged model would be a different one.
    layout = adapters[path].layout
    unaware = adapters[path]._replace(layout=adalora.Layout(**vars(layout) | {"note": ""}))
    naive = model.apply(adalora.merge(variables, {path: unaware}), x)
    assert not np.allclose(naive, output, atol=1e-2)


@pytest.mark.parametrize(
    ("model", "x", "targets", "message"),
    [
        (Tied("by hand"), IDS, ["embed"], "'embed' cannot be adapted: its weight is also used"),
        (Tied("applied"), IDS, ["embed"], "'embed' cannot be adapted: its weight is also used"),
        (Tied("applied"), IDS, ["head"], "'head' matches no module"),
        (Mapped(), draw(2, 4), ["dense"], r"'dense' cannot be adapted.*nn\.map_variables"),
        (Mapped(), draw(2, 4), ".*", r"selects no layer.*'dense'.*nn\.map_variables"),
    ],
)
def test_layer_that_cannot_be_adapted_raises(model, x, targets, message):
    with pytest.raises(ValueError, match=message):
        adapted_of(model, x, targets)


@pytest.mark.parametrize("wrapper", ["SpectralNorm", "WeightNorm"])
def test_wrapper_that_normalises_adapters_is_named_in_error(wrapper):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(6, name="d")
            if wrapper == "SpectralNorm":
                return nn.SpectralNorm(dense)(x, update_stats=False)
            return nn.WeightNorm(dense, variable_filter=None)(x)

    with pytest.raises(ValueError, match=f"'d' cannot be adapted: it is inside of {wrapper}"):
        adapted_of(Model(), draw(2, 4), ["d"])


# NNX ------------------------------------------------------------------------------------------


class Scaled(nnx.Linear):
    """A layer whose call does not reach that of its base class."""

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...][None]


class Twice(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Rewriting(nnx.Linear):
    def __call__(self, x):
        kernel = self.kernel[...]
        self.kernel[...] = kernel / 2
        output = super().__call__(x)
        self.kernel[...] = kernel
        return output


class TiedNnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.head = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
        self.head.kernel = self.first.kernel

    def __call__(self, x):
        return self.head(nnx.gelu(self.first(x)))


def nnx_config(targets, **changes):
    options = {"total_step": 8, "init_r": 3, "target_r": 1, "init_lora_weights": False}
    return adalora.AdaLoraConfig(**options | {"target_modules": targets} | changes)


def in_model(layer):
    return nnx.Sequential(layer)


def linear(cls=nnx.Linear):
    return cls(6, 6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("targets", ["all-linear", ".*", ["layers.0"]])
def test_nnx_layer_without_super_call_raises(targets):
    with pytest.raises(ValueError, match=r"'layers/0'.*does not call super\(\)\.__call__.*layers="):
        adalora.nnx.adapt(in_model(linear(Scaled)), nnx_config(targets))


def test_declared_nnx_layer_is_adapted_and_merged():
    base, x = in_model(linear(Scaled)), draw(2, 6)
    layers = {Scaled: adalora.Layout("kernel")}
    model = adalora.nnx.adapt(base, nnx_config(["layers.0"]), layers=layers)
    assert not np.allclose(model(x), base(x), atol=1e-2)
    merged = adalora.merge(model)
    agree(merged(x), model(x))
    assert type(merged.layers[0]) is Scaled


def test_declared_linen_layer_is_adapted_and_merged():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (5, 3, 2))  # [out, in, in]
            return jnp.einsum("...ij,oij->...o", x, w)

    x = draw(4, 3, 2)
    variables = Turned().init(KEY, x)
    layers = {Turned: adalora.Layout("w", ins=(1, 2), outs=(0,))}
    adapted = adalora.linen.adapt(Turned(), nnx_config(".*"), layers=layers)
    adapters = adapted.init(KEY, variables, x)
    output = adapted.apply(variables, adapters, x)
    assert not np.allclose(output, Turned().apply(variables, x), atol=1e-2)
    agree(Turned().apply(adalora.merge(variables, adapters), x), output)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"Dense": adalora.Layout()}, "must be {class: Layout"),
        ({nn.Dense: adalora.Layout(kind="conv")}, "kind 'dense'"),
        ({nn.Dense: adalora.Layout(stack=(2,))}, "no stack axes"),
    ],
)
def test_invalid_layer_declaration_raises(layers, message):
    with pytest.raises(ValueError, match=message):
        adalora.linen.adapt(nn.Dense(3), nnx_config(".*"), layers=layers)


def test_nnx_layer_that_rewrites_its_weight_raises_when_called():
    model = adalora.nnx.adapt(in_model(linear(Rewriting)), nnx_config(".*"))
    with pytest.raises(ValueError, match="Rewriting changes its weight before it calls"):
        model(draw(2, 6))


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_nnx_wrapper_that_rewrites_its_layer_is_named_in_error(wrapper):
    model = wrapper(linear(), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=f"it is inside of {wrapper.__name__}, which rewrites"):
        adalora.nnx.adapt(model, nnx_config(".*"))


def test_tied_weight_must_be_adapted_in_all_of_its_layers():
    base, x = TiedNnx(nnx.Rngs(0)), draw(2, 6)
    with pytest.raises(ValueError, match="'head' shares its weight with 'first'"):
        adalora.nnx.adapt(base, nnx_config(["head"]))
    model = adalora.nnx.adapt(base, nnx_config(["head", "first"]))
    agree(adalora.merge(model)(x), model(x))


@pytest.mark.parametrize("cls", [nnx.Linear, Twice])
@pytest.mark.parametrize("quantised", [False, True])
def test_adapted_nnx_model_can_be_pickled_and_copied(cls, quantised):
    base = in_model(linear(cls))
    if quantised:
        quantization = pytest.importorskip("adalora_jax.quantization")
        base = quantization.quantize(base, "int8")
    model, x = adalora.nnx.adapt(base, nnx_config(".*")), draw(2, 6)
    graph, state = nnx.split(model)
    copies = [
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        nnx.merge(*pickle.loads(pickle.dumps((graph, state)))),
    ]
    for other in copies:
        assert type(other.layers[0]) is type(model.layers[0])
        np.testing.assert_array_equal(other(x), model(x))


def test_adapted_nnx_model_can_be_tabulated():
    model = adalora.nnx.adapt(in_model(linear()), nnx_config(".*"))
    assert "Total Parameters: 81" in nnx.tabulate(model, draw(1, 6))


# A run ---------------------------------------------------------------------------------------

CONFIG = adalora.AdaLoraConfig(
    total_step=20, init_r=4, target_r=1, deltaT=5, lora_alpha=8, target_modules=["a", "b"]
)


def fresh(config=CONFIG):
    return {f"l{i}": adalora.init_adapter(jax.random.key(i), 6, 5, config) for i in range(3)}


def gradients(params, step, finite=True):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    noise = noise if finite else [jnp.inf * leaf for leaf in noise]
    return treedef.unflatten(noise)


def run(tx, params, steps, bad=()):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        grads = gradients(params, step, step not in bad)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def active(params):
    return sum(int((a.lam != 0).sum()) for a in adalora.adapters(params).values())


def test_eval_params_are_pruned_where_params_between_masks_are_not():
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    params = {"model": fresh(), "head": jnp.ones(3)}
    params, state = run(tx, params, 19)
    allowed = sum(adalora.ranks(state).values())
    assert active(params) == 12 > allowed
    final = jax.jit(adalora.eval_params)(state, params)
    assert active(final) == allowed
    assert jax.tree.structure(final) == jax.tree.structure(params)
    np.testing.assert_array_equal(final["head"], params["head"])
    variables = {"params": {f"l{i}": {"kernel": draw(6, 5, seed=i)} for i in range(3)}}
    merged = adalora.merge(variables, final["model"])
    kept = {f"l{i}": {"kernel": draw(6, 5, seed=i)} for i in range(3)}
    for path, adapter in final["model"].items():
        mask = adalora.masks(state)[f"model/{path}"]
        assert adapter.scale == 2.0
        own = params["model"][path]
        delta = 2.0 * (own.q[mask].T * own.lam[mask][None]) @ own.p[mask]
        agree(merged["params"][path]["kernel"], kept[path]["kernel"] + delta)


def test_eval_params_raises_for_params_of_another_run():
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    _, state = run(tx, fresh(), 2)
    with pytest.raises(ValueError, match=r"masks for 'l2', of which params has no adapters"):
        adalora.eval_params(state, {path: fresh()[path] for path in ("l0", "l1")})
    with pytest.raises(ValueError, match="without an AllocatorState in it"):
        adalora.eval_params(optax.adam(1e-2).init(fresh()), fresh())


@pytest.mark.parametrize("interval", [1, 5, 25])
def test_finish_brings_run_with_skipped_step_to_budget(interval):
    config = CONFIG.replace(deltaT=interval)
    tx = optax.apply_if_finite(adalora.adalora(optax.adam(1e-2), config), 5)
    params, state = run(tx, fresh(config), config.total_step, bad=(2,))
    assert int(adalora.allocator_state(state).step) == 19
    params, state = adalora.finish(state, params)
    assert active(params) == sum(adalora.ranks(state).values()) == 3
    assert int(adalora.allocator_state(state).budget) == 3
    # finish is idempotent, and later updates are in the final phase.
    again, same = adalora.finish(state, params)
    jax.tree.map(np.testing.assert_array_equal, (again, same), (params, state))
    updates, state = jax.jit(tx.update)(gradients(params, 99), state, params)
    assert active(optax.apply_updates(params, updates)) == 3


def test_finish_makes_same_mask_as_last_step_would():
    """The averages alone decide it, without the last update."""
    config = CONFIG.replace(deltaT=7, score="smoothed_sensitivity")
    tx = adalora.adalora(optax.adam(1e-2), config)
    params, state = run(tx, fresh(config), 11)
    averages = adalora.allocator_state(state).sensitivity
    scores = np.concatenate([np.asarray(adalora.scores.triplet_mean(a)) for a in averages.values()])
    _, done = adalora.finish(state, params)
    mask = np.concatenate([np.asarray(m) for m in adalora.masks(done).values()])
    assert set(np.flatnonzero(mask)) == set(np.argsort(-scores)[:3])


def test_finish_requires_an_update_and_inputs_of_its_score():
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    with pytest.raises(ValueError, match="made no update"):
        adalora.finish(tx.init(fresh()), fresh())
    config = CONFIG.replace(score="sensitivity")
    tx = adalora.adalora(optax.adam(1e-2), config)
    params, state = run(tx, fresh(config), 3)
    with pytest.raises(ValueError, match="grads=None: score='sensitivity'"):
        adalora.finish(state, params)
    params, _ = adalora.finish(state, params, gradients(params, 2))
    assert active(params) == 3


def test_compacting_or_exporting_unfinished_run_warns(tmp_path):
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    params, state = run(tx, fresh(), 12)
    said = "made 12 updates, but the final mask comes with update 20.*finish"
    with pytest.warns(UserWarning, match=said):
        adalora.compact(params, state)
    for write in (huggingface.save_pretrained, huggingface.save_as_lora):
        with pytest.warns(UserWarning, match=said):
            write(tmp_path, params, CONFIG, masks=state)
    with pytest.raises(ValueError, match="Call finish"):
        adalora.compact(params, state, tx)
    params, state = adalora.finish(state, params)
    small, small_state = adalora.compact(params, state, tx)
    assert active(small) == 3
    tx.update(gradients(small, 0), small_state, small)


def test_config_with_other_scale_than_adapters_raises():
    adapted, _, adapters = adapted_of(nn.Dense(5), draw(2, 4), lora_alpha=12)
    other = adapted.config.replace(lora_alpha=24)
    with pytest.raises(ValueError, match=r"the adapter of '' has scale 4\.0.*gives it 8\.0"):
        adalora.adalora(optax.adam(1e-2), other).init(adapters)
    model = adalora.nnx.adapt(in_model(linear()), nnx_config(".*", lora_alpha=12))
    tx = adalora.adalora(optax.adam(1e-2), nnx_config(".*", lora_alpha=24))
    optimizer = lambda tx: nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    optimizer(adalora.adalora(optax.adam(1e-2), nnx_config(".*", lora_alpha=12)))
    with pytest.raises(ValueError, match="'layers/0' has scale"):
        optimizer(tx)


# Other transformations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax.MultiSteps(optax.adam(1e-2), 4).gradient_transformation(),
        lambda: optax.chain(optax.adamw(1e-2), optax.apply_every(2)),
    ],
)
def test_accumulation_inside_adalora_raises(inner):
    with pytest.raises(ValueError, match="accumulation inside of adalora would count"):
        adalora.adalora(inner(), CONFIG).init(fresh())


def test_multisteps_as_inner_raises_with_hint():
    with pytest.raises(TypeError, match=r"optax\.MultiSteps\(adalora\(inner, config\), k\)"):
        adalora.adalora(optax.MultiSteps(optax.adam(1e-2), 4), CONFIG)


AROUND = {
    "a learning rate": lambda: optax.chain(
        adalora.adalora(optax.scale_by_adam(), CONFIG), optax.scale_by_learning_rate(1e-2)
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(
        adalora.adalora(optax.adam(1e-2), CONFIG), 1e-2
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_updates_changed_outside_adalora_are_counted(name):
    params, state = run(AROUND[name](), fresh(), 24)
    info = adalora.info(state)
    assert int(info.overridden) > 0
    assert int(info.metrics()["overridden"]) == int(info.overridden)
    assert active(params) > 3
    assert active(adalora.eval_params(state, params)) == 3


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 3)])
def test_unchanged_updates_are_not_counted(wrap):
    _, state = run(wrap(adalora.adalora(optax.adamw(1e-2), CONFIG)), fresh(), 24, bad=(3,))
    assert int(adalora.info(state).overridden) == 0


def test_eval_params_average_and_mask_with_schedule_free_inside_adalora():
    tx = adalora.adalora(optax.contrib.schedule_free_adamw(1e-2), CONFIG)
    params, state = run(tx, fresh(), 24)
    final = adalora.eval_params(state, params)
    average = optax.contrib.schedule_free_eval_params(state.inner, params)
    assert active(average) > active(final) == 3
    for path, mask in adalora.masks(state).items():
        np.testing.assert_array_equal(final[path].lam[mask], average[path].lam[mask])


def test_partition_may_exclude_whole_adapters_but_not_parts():
    params = fresh()
    named = lambda path, _: "frozen" if "l1" in jax.tree_util.keystr(path) else "train"
    labels = jax.tree_util.tree_map_with_path(named, params)
    tx = optax.partition(
        {"train": adalora.adalora(optax.adam(1e-2), CONFIG), "frozen": optax.set_to_zero()}, labels
    )
    trained, state = run(tx, params, 20)
    assert sorted(adalora.masks(state)) == ["l0", "l2"]
    jax.tree.map(np.testing.assert_array_equal, trained["l1"], params["l1"])
    assert active({path: trained[path] for path in ("l0", "l2")}) == 2
    assert active(adalora.eval_params(state, trained)) == active(trained)
    by_factor = jax.tree.map(lambda _: "rest", params)
    by_factor["l1"] = by_factor["l1"]._replace(p="fast")
    tx = optax.partition(
        {"fast": optax.adam(1e-2), "rest": adalora.adalora(optax.adam(1e-3), CONFIG)}, by_factor
    )
    with pytest.raises(ValueError, match="adapter of 'l1' comes without p: rank is allocated"):
        tx.init(params)


def test_adapters_added_or_removed_between_updates_raise():
    tx, params = adalora.adalora(optax.adam(1e-2), CONFIG), fresh()
    state = tx.init(params)
    for other in ({**params, "new": params["l0"]}, {"l0": params["l0"]}):
        with pytest.raises(ValueError, match=r"adapters differ from those that tx\.init saw"):
            tx.update(other, state, other)


def test_trees_without_masks_raise():
    params = fresh()
    for value in (params, {"l0": jnp.ones(4)}, {}):
        with pytest.raises(ValueError, match="without an AllocatorState in it, and not a dict of"):
            adalora.ranks(value)
    state = adalora.adalora(optax.adam(1e-2), CONFIG).init(params)
    assert adalora.ranks(state) == {"l0": 4, "l1": 4, "l2": 4}
    assert "total" in adalora.summary(params, state)


def test_penalty_in_update_matches_penalty_in_loss():
    inside = CONFIG.replace(orth_reg_in_update=True, orth_reg_weight=0.3)
    outside = CONFIG.replace(orth_reg_weight=0.3)
    params, results = fresh(), []
    for config in (inside, outside):
        tx = adalora.adalora(optax.adam(1e-2), config)
        state, now = tx.init(params), params
        for step in range(6):
            grads = gradients(now, step)
            if config is outside:
                extra = jax.grad(adalora.orthogonality)(now, config)
                grads = jax.tree.map(jnp.add, grads, extra)
            before = now
            updates, state = tx.update(grads, state, now)
            now = optax.apply_updates(now, updates)
        results.append(now)
        if config is inside:
            value = adalora.info(state).penalty
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    np.testing.assert_allclose(value, adalora.orthogonality(before, outside), rtol=1e-5)
    with pytest.raises(ValueError, match="in the loss it would count twice"):
        adalora.orthogonality(params, inside)


def test_adapter_without_gradient_is_reported():
    tx, params = adalora.adalora(optax.adam(1e-2), CONFIG), fresh()
    state = tx.init(params)
    for step in range(3):
        grads = gradients(params, step)
        grads["l1"] = jax.tree.map(jnp.zeros_like, grads["l1"])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    info = adalora.info(state)
    assert {path: bool(value) for path, value in info.inactive.items()} == {
        "l0": False,
        "l1": True,
        "l2": False,
    }
    assert int(info.metrics()["inactive"]) == 1


# A trained head -------------------------------------------------------------------------------


class WithHead(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="a", param_dtype=self.dtype)(x)
        return nn.Dense(3, name="head", param_dtype=self.dtype)(nn.tanh(x))


class NnxWithHead(nnx.Module):
    def __init__(self, rngs, dtype="float32"):
        self.a = nnx.Linear(6, 6, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(6, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.a(x)))


HEAD = adalora.AdaLoraConfig(
    total_step=12, init_r=4, target_r=2, deltaT=4, target_modules=["a"], modules_to_save=["head"]
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def linen_run(request):
    model, x = WithHead(request.param), draw(8, 6).astype(request.param)
    variables = model.init(KEY, x)
    adapted = adalora.linen.adapt(model, HEAD)
    params = adapted.init(jax.random.key(1), variables, x)
    tx = adalora.adalora(optax.adam(1e-3), HEAD)
    state, first = tx.init(params), params

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((adapted.apply(variables, p, x).astype(jnp.float32) - 1) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(12):
        params, state = step(params, state)
    return model, variables, adapted, tx, first, params, state, x


def test_head_trains_in_float32_and_computes_in_base_dtype(linen_run):
    model, variables, adapted, _, first, params, _, x = linen_run
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["head"])} == {"float32"}
    start, base = adapted.apply(variables, first, x), model.apply(variables, x)
    assert start.dtype == base.dtype
    np.testing.assert_array_equal(start, base)
    moved = np.mean(np.asarray(first["head"]["kernel"] != params["head"]["kernel"]))
    assert moved > 0.9


def test_linen_head_is_kept_by_all_operations(linen_run, tmp_path):
    model, variables, adapted, tx, _, params, state, x = linen_run
    params = adalora.eval_params(state, params)
    output = adapted.apply(variables, params, x)
    close = lambda a: np.testing.assert_allclose(
        a.astype("float32"), output.astype("float32"), rtol=2e-2, atol=2e-2
    )
    small = adalora.compact(params, state)
    assert sorted(small) == sorted(params)
    close(adapted.apply(variables, small, x))
    merged = adalora.merge(variables, small)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, variables)
    close(model.apply(merged, x))
    base = {"head": variables["params"]["head"]}
    bank = adalora.AdapterBank.of({"one": small, "two": params}, base)
    for name in ("one", "two"):
        close(adapted.apply(variables, bank.select(name), x))
    np.testing.assert_array_equal(
        adapted.apply(variables, bank.select(None), x), model.apply(variables, x)
    )
    checkpoint.save(tmp_path / "run", params, state, HEAD)
    for restored in (
        checkpoint.restore(tmp_path / "run", tx),
        checkpoint.restore(tmp_path / "run"),
    ):
        assert jax.tree.structure(restored.adapters) == jax.tree.structure(params)
        close(model.apply(adalora.merge(variables, restored.adapters), x))
    huggingface.save_pretrained(tmp_path / "files", params, HEAD, masks=state)
    loaded = huggingface.load_pretrained(tmp_path / "files", like=params)
    close(adapted.apply(variables, loaded.adapters, x))
    close(model.apply(adalora.merge(variables, loaded.adapters), x))
    stored = flax.serialization.to_bytes(params)
    again = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, params), stored)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    close(adapted.apply(variables, again, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nnx_head_is_kept_by_all_operations(dtype, tmp_path):
    base, x = NnxWithHead(nnx.Rngs(0), dtype), draw(8, 6).astype(dtype)
    model = adalora.nnx.adapt(base, HEAD, nnx.Rngs(1))
    np.testing.assert_array_equal(model(x), base(x))
    assert model(x).dtype == base(x).dtype
    tx = adalora.adalora(optax.adam(1e-3), HEAD)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x).astype(jnp.float32) - 1) ** 2)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    for _ in range(11):
        step(model, optimizer)
    model, optimizer = adalora.finish(optimizer, model)
    final = adalora.nnx.eval_model(model, optimizer)
    output = final(x)
    close = lambda a: np.testing.assert_allclose(
        a.astype("float32"), output.astype("float32"), rtol=2e-2, atol=2e-2
    )
    adapters = adalora.nnx.adapters(final)
    assert sorted(adapters) == ["a", "head"]
    assert adapters["head"]["kernel"].dtype == jnp.float32
    assert not np.array_equal(adapters["head"]["kernel"], base.head.kernel[...])
    small, small_optimizer = adalora.compact(model, optimizer)
    close(small(x))
    step(small, small_optimizer)
    close(adalora.compact(model, optimizer.opt_state)(x))
    merged = adalora.merge(final)
    close(merged(x))
    assert jax.tree.map(jnp.shape, nnx.state(merged)) == jax.tree.map(jnp.shape, nnx.state(base))
    assert merged.head.kernel.dtype == base.head.kernel.dtype
    other = adalora.nnx.adapt(base, HEAD, nnx.Rngs(2))
    adalora.nnx.set_adapters(other, adapters)
    np.testing.assert_array_equal(other(x), output)
    np.testing.assert_array_equal(adalora.nnx.with_adapters(other, adapters)(x), output)
    checkpoint.save(tmp_path / "run", adapters, optimizer.opt_state, HEAD)
    restored = checkpoint.restore(tmp_path / "run").adapters
    assert jax.tree.structure(restored) == jax.tree.structure(adapters)
    adalora.nnx.set_adapters(other, restored)
    np.testing.assert_array_equal(other(x), output)
    huggingface.save_as_lora(tmp_path / "lora", adapters, HEAD, masks=optimizer.opt_state)
    loaded = huggingface.load_pretrained(tmp_path / "lora", like=adapters)
    close(adalora.nnx.with_adapters(other, loaded.adapters)(x))


# Layouts --------------------------------------------------------------------------------------


def test_layout_and_scale_are_kept_by_copies_and_transforms():
    adapted, variables, adapters = adapted_of(nn.Einsum((8, 8), "bd,fd->bf"), draw(4, 8))
    (adapter,) = adapters.values()
    assert (adapter.layout.ins, adapter.layout.outs) == ((1,), (0,))
    assert adapter.layout.shape == (8, 8)
    for other in (
        jax.tree.map(lambda leaf: 2 * leaf, adapter),
        jax.jit(lambda a: a)(adapter),
        pickle.loads(pickle.dumps(adapter)),
        copy.deepcopy(adapter),
        adapter._replace(lam=0 * adapter.lam),
    ):
        assert (other.scale, other.layout) == (adapter.scale, adapter.layout)
    mapping, x = {"": adapter._asdict()}, draw(4, 8)
    with pytest.raises(ValueError, match="the scale of '' is not known"):
        adalora.merge(variables, mapping)
    outputs = adapted.apply(variables, mapping, x)  # the adapted model's config has the scale
    np.testing.assert_array_equal(outputs, adapted.apply(variables, adapters, x))


def test_merging_adapters_from_file_without_layout_requires_like(tmp_path):
    model, x = nn.Einsum((8, 8), "bd,fd->bf"), draw(4, 8)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="flat")(nn.Einsum((8, 8), "bd,fd->bf", name="square")(x))

    adapted, variables, adapters = adapted_of(Model(), x)
    output = adapted.apply(variables, adapters, x)
    huggingface.save_pretrained(tmp_path, adapters, adapted.config)
    alone = huggingface.load_pretrained(tmp_path).adapters
    agree(adapted.apply(variables, alone, x), output)
    with pytest.raises(ValueError, match=r"'square'.*does not specify the axes.*like="):
        adalora.merge(variables, alone)
    known = huggingface.load_pretrained(tmp_path, like=adapters).adapters
    agree(Model().apply(adalora.merge(variables, known), x), output)
    del model


def test_dropout_in_scan_without_split_rngs_warns():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, name="up")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return scan(name="blocks")(x, None)[0]

    with pytest.warns(UserWarning, match=r"blocks/up have no dropout.*split_rngs"):
        adapted_of(Model(), draw(2, 4), lora_dropout=0.5)


@pytest.mark.parametrize("call", ["init", "apply", "merge"])
def test_params_in_place_of_variables_raise(call):
    adapted, variables, adapters = adapted_of(nn.Dense(5), x := draw(2, 4))
    calls = {
        "init": lambda v: adapted.init(KEY, v, x),
        "apply": lambda v: adapted.apply(v, adapters, x),
        "merge": lambda v: adalora.merge(v, adapters),
    }
    with pytest.raises(ValueError, match="variables has no 'params'"):
        calls[call](variables["params"])
    if call == "apply":
        with pytest.raises(ValueError, match="variables has no 'params'"):
            adapted.apply(adapters, variables, x)


def test_finish_after_final_mask_needs_no_gradients():
    config = adalora.AdaLoraConfig(
        total_step=3, init_r=4, target_r=2, score=lambda evidence: evidence.sensitivity.lam
    )
    adapters = {"up": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    tx = adalora.adalora(optax.adam(1e-2), config)
    state, grads = tx.init(adapters), jax.tree.map(jnp.ones_like, adapters)
    for step in range(3):
        if step == 2:
            with pytest.raises(ValueError, match="grads=None"):
                adalora.finish(state, adapters)
        updates, state = tx.update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    final, _ = adalora.finish(state, adapters)
    assert int((final["up"].lam != 0).sum()) <= 2


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_stack_along_axis_other_than_first_raises(axis):
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
            return nn.vmap(nn.Dense, **stack)(4, use_bias=False, name="layers")(x)

    config = adalora.AdaLoraConfig(total_step=3, init_r=4, target_r=2, target_modules=["layers"])
    x = jnp.ones((4, 3, 4))
    variables = Stacked().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"'layers' cannot be adapted: nn\.vmap stacks its weight"):
        adalora.linen.adapt(Stacked(), config).init(jax.random.key(1), variables, x)


def test_swapped_arguments_raise_with_hints():
    config = adalora.AdaLoraConfig(total_step=3, init_r=4, target_r=2)
    adapters = {"up": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    tx = adalora.adalora(optax.adam(1e-2), config)
    state = tx.init(adapters)
    with pytest.raises(TypeError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(adapters, adapters, state)
    with pytest.raises(TypeError, match=r"orthogonality\(adapters, config\)"):
        adalora.orthogonality(config, adapters)
    with pytest.raises(TypeError, match="named is a list"):
        adalora.AdapterBank.of([adapters])
    with pytest.raises(ValueError, match=r"arguments are \(opt_state, params\)"):
        adalora.eval_params(adapters, state)
    with pytest.raises(ValueError, match="no adapter was found in the Linear"):
        adalora.summary(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), state)


@pytest.mark.parametrize(
    "inner",
    [
        optax.sm3(1e-2),
        optax.partition(
            {"up": optax.adam(1e-2), "other": optax.sgd(1e-2)},
            lambda params: {path: path if path == "up" else "other" for path in params},
        ),
    ],
    ids=["sm3", "labels-by-a-function"],
)
def test_compacting_unsupported_optimizer_state_raises_with_hint(inner):
    config = adalora.AdaLoraConfig(total_step=3, init_r=4, target_r=2)
    adapters = {p: adalora.init_adapter(jax.random.key(0), 6, 5, config) for p in ("up", "down")}
    tx = adalora.adalora(inner, config)
    state = tx.init(adapters)
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, adapters)
        updates, state = tx.update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    with pytest.raises(ValueError, match=r"opt_state: .*compact\(params, opt_state\)"):
        adalora.compact(adapters, state, tx)
    assert {a.lam.size for a in adalora.compact(adapters, state).values()} != {4}


class Named(nn.Module):
    name_of_layer: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name=self.name_of_layer)(x)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a/b", "there is a '/' in its name"), ("adalora", "has a module called 'adalora'")],
)
def test_ambiguous_module_names_raise(name, message):
    config = adalora.AdaLoraConfig(total_step=3, target_modules="all-linear")
    model, x = Named(name), jnp.ones((2, 6))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        adalora.linen.adapt(model, config).init(jax.random.key(1), variables, x)
