"""Tunix's ``GRPOLearner`` with our adapters, whose weights it sends to the rollout model.

Tunix is unmodified. The trained and the rollout model are on two meshes, otherwise Tunix uses one
model for both and nothing is sent.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

import adalora_jax as adalora
from adalora_jax._src.core import pytree
from trainers import tunix_models as tunix

grpo_learner = pytest.importorskip("tunix.rl.grpo.grpo_learner", reason=tunix.REASON)
rl_cluster = pytest.importorskip("tunix.rl.rl_cluster", reason=tunix.REASON)
base_rollout = pytest.importorskip("tunix.rl.rollout.base_rollout", reason=tunix.REASON)
vanilla_rollout = pytest.importorskip("tunix.rl.rollout.vanilla_rollout", reason=tunix.REASON)

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Tunix, of JAX, Flax and Optax
]
CONFIG = adalora.AdaLoraConfig(
    total_step=10,
    tinit=1,
    tfinal=3,
    init_r=4,
    target_r=2,
    scale=16.0,
    target_modules="all-linear",
    orth_reg_in_update=True,
)


def reinforce(base, config, tokenizer, reward, prompts, meshes, rollout, engine="vanilla"):
    model = adalora.nnx.adapt(base, config, rngs=nnx.Rngs(0))
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=base,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=meshes,
            rollout_engine=engine,
            rollout_config=rollout,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=adalora.adalora(optax.adamw(2e-2), config),
                eval_every_n_steps=config.total_step,
                max_steps=config.total_step,
            ),
        ),
    )
    algorithm = grpo_learner.GRPOConfig(num_generations=4)
    grpo_learner.GRPOLearner(cluster, algorithm, reward_fns=reward).train(prompts)
    return cluster


class MergedRollout(vanilla_rollout.VanillaRollout):
    """A rollout by a plain model, merged again whenever the learner sends weights."""

    def __init__(self, rollout_actor, tokenizer, mesh, rollout_config):
        self.actor = rollout_actor  # the trained model
        config = rollout_actor.config
        cache = base_rollout.CacheConfig(
            cache_size=rollout_config.kv_cache_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        super().__init__(adalora.merge(rollout_actor), tokenizer, cache)

    def update_params(self, params, filter_types=None):
        with jax.transfer_guard("allow"):  # on a CPU, Tunix forbids to transfer the scales
            merged = adalora.merge(self.actor)
        super().update_params(nnx.state(merged, nnx.Param))

    def model(self):
        return None  # as Tunix's vLLM rollout: not a model with the leaves of the trained one


class Tokenizer:
    """Tokens as decimal numbers, separated by spaces."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def pad_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2


class Run(NamedTuple):
    cluster: Any
    rewards: list[float]  # mean of each batch

    @property
    def trained(self) -> Any:
        return self.cluster.actor_trainer.model

    @property
    def rollout(self) -> Any:
        return self.cluster.rollout._sampler.transformer

    @property
    def allocator(self) -> adalora.AllocatorState:
        trainer = self.cluster.actor_trainer
        return adalora.allocator_state(trainer.optimizer.opt_state)


@functools.cache
def run_of(engine: str | type) -> Run:
    means = []

    def reward(prompts, completions, **_):
        found = [sum(int(word) < 16 for word in text.split()) for text in completions]
        means.append(float(np.mean(found)))
        return found

    # Two meshes of one device: they differ in the order of the axes.
    mesh = lambda *axes: Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1), axes, axis_types=(AxisType.Auto,) * 2
    )
    training, rollout = mesh("fsdp", "tp"), mesh("tp", "fsdp")
    role = rl_cluster.Role
    with jax.numpy_rank_promotion("allow"):  # Tunix's code broadcasts
        base = tunix.build("qwen3")
        state = nnx.state(base)
        placed = jax.device_put(state, nnx.get_named_sharding(state, training))
        base = nnx.merge(nnx.graphdef(base), placed)
        cluster = reinforce(
            base,
            CONFIG,
            Tokenizer(),
            reward,
            [{"prompts": np.array(["3 4 5", "6 7 8"])}] * CONFIG.total_step,
            {role.ACTOR: training, role.REFERENCE: training, role.ROLLOUT: rollout},
            base_rollout.RolloutConfig(
                max_tokens_to_generate=6, max_prompt_length=4, kv_cache_size=16
            ),
            engine,
        )
    return Run(cluster, means)


EACH = pytest.mark.parametrize("engine", ["vanilla", MergedRollout])


@EACH
def test_rollout_model_receives_trained_weights_and_rewards_rise(engine):
    run = run_of(engine)
    assert run.cluster.global_steps == CONFIG.total_step
    assert run.rollout is not run.trained
    with jax.numpy_rank_promotion("allow"):
        found, trained, start = map(tunix.logits, (run.rollout, run.trained, tunix.build("qwen3")))
    assert np.mean(run.rewards[-3:]) > np.mean(run.rewards[:3])
    if engine == "vanilla":
        sent = adalora.nnx.adapters(run.rollout)
        jax.tree.map(np.testing.assert_array_equal, sent, adalora.nnx.adapters(run.trained))
        np.testing.assert_array_equal(found, trained)
    else:
        assert not nnx.state(run.rollout, nnx.LoRAParam)
        np.testing.assert_allclose(found, trained, rtol=1e-4, atol=2e-5)
    assert np.abs(found - start).max() > 1e-3


@EACH
def test_budget_is_met_and_base_is_frozen(engine):
    run = run_of(engine)
    adapters, state = adalora.nnx.adapters(run.trained), run.allocator
    assert int(state.step) == CONFIG.total_step
    assert sum(adalora.ranks(state).values()) == 2 * len(adapters)
    masks = pytree.leaves_with_path(state.masks)
    for path, adapter in adapters.items():
        np.testing.assert_array_equal(adapter.lam != 0, masks[path], err_msg=path)
    found, original = tunix.base_bits(run.trained), tunix.base_bits(tunix.build("qwen3"))
    assert set(found) == set(original)
    for path, value in found.items():
        np.testing.assert_array_equal(value, original[path], err_msg=path)
