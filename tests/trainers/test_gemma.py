"""google-deepmind/gemma at a tiny size, with its modules and its trainer unmodified."""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import adalora_jax as adalora
from adalora_jax import huggingface as peft

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.usefixtures("_other_peoples_rules"),
    pytest.mark.filterwarnings("ignore"),  # from gemma and its imports
]
IDS = jnp.arange(14).reshape(2, 7) * 3 % 31 + 1
CONFIG = adalora.AdaLoraConfig(
    total_step=8, init_r=4, target_r=2, tinit=1, tfinal=2, target_modules="all-linear"
)
ATTENTION = {
    "shared keys": {"num_heads": 4, "num_kv_heads": 2},
    "one key": {"num_heads": 2, "num_kv_heads": 1},
    "all in one": {"num_heads": 2, "num_kv_heads": 2},
}
WEIGHTS = {
    "shared keys": {"attn/q_einsum", "attn/kv_einsum"},
    "one key": {"attn/q_einsum", "attn/kv_einsum"},
    "all in one": {"attn/qkv_einsum"},
}


@pytest.fixture
def _other_peoples_rules():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def gm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("gemma.gm", reason="needs gemma: pip install '.[gemma]'")
        assert isinstance(module.nn, types.ModuleType)  # it is imported on first access
    return module


def make(gm, attention="shared keys", layers=1, dtype=jnp.float32, **changes):
    """Build the model of Gemma 3 with other sizes."""
    local, everywhere = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
    sizes = {
        "num_embed": 32,
        "embed_dim": 16,
        "hidden_dim": 24,
        "head_dim": 8,
        "final_logit_softcap": None,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "use_qk_norm": True,
        "attention_types": [everywhere, local][:layers],
        "sliding_window_size": 4,
        "transpose_gating_einsum": True,
    }
    config = gm.nn.config.TransformerConfig(**sizes | ATTENTION[attention] | changes)
    return gm.nn.Transformer(config=config, dtype=dtype, tokens="batch.tokens")


def some(model, seed=0):
    """Draw parameters with which every layer matters."""
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), variables
    )


@pytest.mark.parametrize(
    ("attention", "transposed"), [("shared keys", True), ("one key", True), ("all in one", False)]
)
def test_every_layer_is_adapted_and_merges(gm, attention, transposed):
    model = make(gm, attention, transpose_gating_einsum=transposed)
    variables = some(model)
    plain = model.apply(variables, IDS)
    fresh = adalora.linen.adapt(model, CONFIG)
    adapters = fresh.init(jax.random.key(1), variables, IDS)
    weights = WEIGHTS[attention] | {"attn/attn_vec_einsum", "mlp/gating_einsum", "mlp/linear"}
    assert set(adapters) == {f"layer_0/{weight}" for weight in weights}
    same = fresh.apply(variables, adapters, IDS)
    assert isinstance(same, gm.nn.Output)
    np.testing.assert_array_equal(same.logits, plain.logits)
    away = {path: a._replace(lam=jnp.ones_like(a.lam)) for path, a in adapters.items()}
    moved = fresh.apply(variables, away, IDS)
    assert np.abs(moved.logits - plain.logits).max() > 1e-2
    merged = adalora.merge(variables, away)
    np.testing.assert_allclose(
        model.apply(merged, tokens=IDS).logits, moved.logits, rtol=1e-4, atol=1e-4
    )


def test_adapted_model_supports_gemma_calls(gm):
    """By keyword, for the last token only, and token by token with a cache."""
    model = make(gm, layers=2)
    variables = some(model)
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, tokens=IDS)
    adapters = {path: a._replace(lam=jnp.ones_like(a.lam)) for path, a in adapters.items()}
    whole = adapted.apply(variables, adapters, tokens=IDS).logits
    last = adapted.apply(variables, adapters, tokens=IDS, return_last_only=True).logits
    np.testing.assert_allclose(last, whole[:, -1], rtol=1e-4, atol=1e-5)
    cache = model.config.init_cache(batch_size=2, dtype=jnp.float32, cache_length=8)
    for t in range(IDS.shape[1]):
        seen = jnp.arange(8)[None, None] <= t
        output = adapted.apply(
            variables,
            adapters,
            tokens=IDS[:, t : t + 1],
            positions=jnp.full((2, 1), t),
            cache=cache,
            attention_mask=jnp.broadcast_to(seen, (2, 1, 8)),
        )
        cache = output.cache
        np.testing.assert_allclose(output.logits[:, 0], whole[:, t], rtol=1e-3, atol=1e-4)


def loss_of(logits):
    """Compute the loss of the next token."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:])
    return losses.astype(jnp.float32).mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_prunes_to_budget_and_leaves_base_unchanged(gm, dtype, tmp_path):
    chex.clear_trace_counter()
    model = make(gm, layers=2, dtype=jnp.dtype(dtype))
    variables = some(model)
    before = jax.tree.map(np.array, variables)
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, IDS)
    matrices = sum(a.lam[..., 0].size for a in adapters.values())
    tx = adalora.adalora(optax.adam(2e-2), CONFIG)
    opt_state = tx.init(adapters)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @functools.partial(chex.assert_max_traces, n=1)
    def step(adapters, opt_state, variables):
        def loss(adapters):
            output = adapted.apply(variables, adapters, tokens=IDS)
            return loss_of(output.logits) + adalora.orthogonality(adapters, CONFIG)

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, value

    values = []
    for t in range(CONFIG.total_step):
        adapters, opt_state, value = step(adapters, opt_state, variables)
        values.append(float(value))
        state = adalora.allocator_state(opt_state)
        assert sum(adalora.ranks(state).values()) == int(adalora.budget(CONFIG, t, matrices))
    assert values[-1] < values[0]
    assert len(set(adalora.ranks(state).values())) > 1
    assert sum(int((a.lam != 0).sum()) for a in adapters.values()) == 2 * matrices
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))
    if dtype == "float32":
        merged = adalora.merge(variables, adapters)
        want = adapted.apply(variables, adapters, IDS).logits
        np.testing.assert_allclose(model.apply(merged, IDS).logits, want, rtol=1e-4, atol=1e-4)
    peft.save_pretrained(tmp_path, adapters, CONFIG, masks=state, names="gemma3")
    read = peft.load_pretrained(tmp_path, names="gemma3", like=adapters)
    for path, adapter in adapters.items():
        want = adalora.delta_weight(adapter)
        got = adalora.delta_weight(read.adapters[path])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def in_hugging_face(params, layers):
    """Convert parameters by hand to the names and layout of transformers' Gemma 3."""
    w = jax.tree.map(np.asarray, params)
    tensors = {
        "model.embed_tokens.weight": w["embedder"]["input_embedding"],
        "model.norm.weight": w["final_norm"]["scale"],
    }
    heads = lambda weight: weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])
    norms = {
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    for i in range(layers):
        layer, at = w[f"layer_{i}"], f"model.layers.{i}."
        attn, mlp = layer["attn"], layer["mlp"]
        mine = {
            "self_attn.q_proj": heads(attn["q_einsum"]["w"]),
            "self_attn.k_proj": heads(attn["kv_einsum"]["w"][0]),
            "self_attn.v_proj": heads(attn["kv_einsum"]["w"][1]),
            "self_attn.o_proj": attn["attn_vec_einsum"]["w"].reshape(-1, 16).T,
            "self_attn.q_norm": attn["_query_norm"]["scale"],
            "self_attn.k_norm": attn["_key_norm"]["scale"],
            "mlp.gate_proj": mlp["gating_einsum"][0],
            "mlp.up_proj": mlp["gating_einsum"][1],
            "mlp.down_proj": mlp["linear"].T,
            **{theirs: layer[ours]["scale"] for theirs, ours in norms.items()},
        }
        tensors |= {f"{at}{name}.weight": np.ascontiguousarray(v) for name, v in mine.items()}
    return tensors


def test_hugging_face_checkpoint_loads_as_base(gm, tmp_path):
    model = make(gm, layers=2)
    variables = some(model)
    save_file(in_hugging_face(variables["params"], 2), tmp_path / "model.safetensors")
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
    loaded = peft.load_base(tmp_path, model, shapes, IDS, names="gemma3")
    chex.assert_trees_all_equal(loaded, variables)


class Adapted(nn.Module):
    """A module for trainers of linen modules: ``params`` is trained, the base is not."""

    model: Any
    config: adalora.AdaLoraConfig
    tokens: Any

    @nn.compact
    def __call__(self, tokens):
        model = self.model.clone(parent=None)
        adapted = adalora.linen.adapt(model, self.config)
        key = lambda: self.make_rng("params")
        base = self.variable("base", "params", lambda: model.init(key(), tokens)["params"])
        base = {"params": base.value}

        def init():  # plain dicts, which the trainer's table of parameters can read
            fresh = adapted.init(key(), base, tokens)
            return {path: adapter._asdict() for path, adapter in fresh.items()}

        return adapted.apply(base, self.variable("params", "adapters", init).value, tokens)


def test_kauldron_trainer_prunes_to_budget_and_leaves_base_unchanged(gm, tmp_path):
    """Kauldron is the trainer of gemma's own examples."""
    from kauldron import kd, kontext

    Adapted.__annotations__["tokens"] = kontext.Key
    model = Adapted(make(gm), CONFIG, "batch.tokens")
    tokens = np.asarray(IDS)
    data = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:, None]}
    loss = kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.targets")
    trainer = kd.train.Trainer(
        seed=0,
        workdir=tmp_path,
        model=model,
        optimizer=adalora.adalora(optax.adam(1e-2), CONFIG),
        train_ds=kd.data.InMemoryPipeline(loader=lambda: data, batch_size=2),
        train_losses={"next": loss},
        num_train_steps=CONFIG.total_step - 1,  # the trainer makes one more
        checkpointer=kd.ckpts.NoopCheckpointer(),
    )
    first = trainer.init_state()
    base = jax.tree.map(np.array, first.collections["base"])
    state, _ = trainer.train()
    allocator = adalora.allocator_state(state.opt_state)
    assert int(allocator.step) == CONFIG.total_step
    ranks = adalora.ranks(allocator)
    assert sum(ranks.values()) == CONFIG.target_r * len(ranks)
    for path, adapter in adalora.adapters(state.params).items():
        assert int((adapter.lam != 0).sum()) == sum(
            rank for row, rank in ranks.items() if row.partition("[")[0] == path
        )
    chex.assert_trees_all_equal(base, jax.tree.map(np.array, state.collections["base"]))
