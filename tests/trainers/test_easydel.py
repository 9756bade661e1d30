"""EasyDeL's ``SFTTrainer`` on a tiny model, with our adapters and optimizer.

EasyDeL is unmodified: it trains the LoRA parameters of a model that has some, and takes the
optimizer from its arguments.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adalora_jax as adalora
from adalora_jax._src.core import pytree
from adalora_jax._src.modules.nnx_variables import pure

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),  # EasyDeL's and its dependencies', about each other
]

REASON = "needs EasyDeL: pip install '.[easydel]'"
with warnings.catch_warnings(action="ignore"):
    datasets = pytest.importorskip("datasets", reason=REASON)
    easydel = pytest.importorskip("easydel", reason=REASON)

CONFIG = adalora.AdaLoraConfig(
    total_step=8,
    tinit=1,
    tfinal=2,
    init_r=4,
    target_r=2,
    scale=4.0,
    target_modules="all-linear",
    orth_reg_in_update=True,
)
BATCH, LENGTH, VOCABULARY = 2, 16, 64
TOKENS = np.tile(np.arange(3, 11), (BATCH * CONFIG.total_step, LENGTH // 8))


def fine_tune(base, config, tokenizer, dataset, **options):
    class Arguments(easydel.SFTConfig):
        def get_optimizer_and_scheduler(self, steps=None):
            inner, schedule = super().get_optimizer_and_scheduler(steps)
            return adalora.adalora(inner, config), schedule

    arguments = Arguments(
        max_training_steps=config.total_step,
        save_optimizer_state=False,
        merge_lora_before_save=False,
        **options,
    )
    trainer = easydel.SFTTrainer(
        arguments=arguments,
        model=adalora.nnx.adapt(base, config, rngs=nnx.Rngs(0)),
        processing_class=tokenizer,
        train_dataset=dataset,
    )
    state = trainer.train().state
    adapters = adalora.eval_params(state.opt_state, adalora.nnx.adapters(state.model))
    return adalora.nnx.with_adapters(state.model, adapters), state


def save_merged(model, tokens, folder):
    with model.config.mesh:
        merged = adalora.merge(model, inputs=(tokens,))
        merged.save_pretrained(folder)
    return merged


class Tokenizer:
    """The attributes that EasyDeL reads for data that are tokens already."""

    pad_token, pad_token_id = "<pad>", 0
    eos_token, eos_token_id = "</s>", 2
    padding_side = name_or_path = "left"


class Run(NamedTuple):
    base: Any
    model: Any
    state: Any


def build() -> Any:
    sizes = easydel.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=False,
        attn_mechanism="vanilla",
        sharding_axis_dims=(1, 1, 1, 1, 1),
    )
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    return easydel.LlamaForCausalLM(config=sizes, rngs=nnx.Rngs(0), **types)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    dataset = datasets.Dataset.from_dict(
        {"input_ids": TOKENS.tolist(), "attention_mask": np.ones_like(TOKENS).tolist()}
    )
    with jax.numpy_rank_promotion("allow"):  # EasyDeL's code broadcasts
        trained = fine_tune(
            build(),
            CONFIG,
            Tokenizer(),
            dataset,
            num_train_epochs=1,
            total_batch_size=BATCH,
            max_length=LENGTH,
            learning_rate=1e-2,
            save_directory=str(tmp_path_factory.mktemp("easydel")),
            use_wandb=False,
            progress_bar_type="json",
        )
        return Run(build(), *trained)  # EasyDeL donates the arrays of the model that it trains


def test_ranks_shrink_to_budget(run):
    allocator = adalora.allocator_state(run.state.opt_state)
    ranks = adalora.ranks(allocator)
    assert int(allocator.step) == int(run.state.step) == CONFIG.total_step
    assert len(ranks) == 2 * 7 + 1  # of two layers, and of the head
    assert sum(ranks.values()) == 2 * len(ranks)
    masks = pytree.leaves_with_path(allocator.masks)
    for path, adapter in adalora.nnx.adapters(run.model).items():
        np.testing.assert_array_equal(adapter.lam != 0, masks[path], err_msg=path)


def test_base_is_bitwise_unchanged(run):
    is_base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before, after = nnx.state(run.base, nnx.Param), nnx.state(run.model, is_base)
    assert jax.tree.leaves(before)
    jax.tree.map(np.testing.assert_array_equal, pure(before), pure(after))


def test_loss_falls_and_merged_model_is_saved_and_loaded(run, tmp_path):
    tokens = jnp.asarray(TOKENS[:1])

    def loss(model):
        logits = jax.nn.log_softmax(model(tokens).logits[:, :-1])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    with run.base.config.mesh, jax.numpy_rank_promotion("allow"):
        assert loss(run.model) < loss(run.base) - 0.1
        merged = save_merged(run.model, tokens, str(tmp_path))
        assert not nnx.state(merged, nnx.LoRAParam)
        loaded = type(merged).from_pretrained(
            str(tmp_path), dtype=jnp.float32, param_dtype=jnp.float32
        )
        found, *same = (model(tokens).logits for model in (run.model, merged, loaded))
    for logits in same:
        np.testing.assert_allclose(logits, found, rtol=1e-4, atol=1e-4)
