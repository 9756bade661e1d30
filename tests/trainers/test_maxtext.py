"""MaxText's SFT trainer on a tiny model, with our adapters and optimizer.

MaxText is unmodified: the adapters replace the function that would apply Qwix's LoRA.
"""

from __future__ import annotations

import functools
import os
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adalora_jax as adalora
from adalora_jax._src.core import pytree
from trainers import experts

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),  # MaxText's and its dependencies', about each other
]

try:
    from maxtext.configs import pyconfig
    from maxtext.layers import initializers, moe
    from maxtext.optimizers import optimizers
    from maxtext.trainers.post_train.sft import train_sft
    from maxtext.utils import globals as paths
    from maxtext.utils import lora_utils, maxtext_utils
except ImportError:
    pytest.skip("needs MaxText: pip install '.[maxtext]'", allow_module_level=True)

CONFIG = adalora.AdaLoraConfig(
    total_step=6,
    tinit=1,
    tfinal=2,
    init_r=4,
    target_r=2,
    scale=4.0,
    target_modules="all-linear",
    orth_reg_in_update=True,
)
OPTIONS = {
    "run_name": "test",
    "decoder_block": "llama2",
    "base_emb_dim": 16,
    "base_mlp_dim": 32,
    "base_num_decoder_layers": 2,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_target_length": 16,
    "per_device_batch_size": 2,
    "param_scan_axis": 0,  # the axis along which layers are stacked; ours is the first, too
    "attention": "dot_product",
    "dataset_type": "synthetic",
    "steps": CONFIG.total_step,
    "learning_rate": 1e-2,
    "lora.enable_lora": True,
    "lora.lora_rank": 4,  # MaxText wants one; the adapters' is CONFIG's
    "enable_checkpointing": False,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "enable_tensorboard": False,
    "skip_jax_distributed_system": True,
    "hardware": "cpu",
}


def fine_tune(mt_config, config):
    get_optimizer = optimizers.get_optimizer

    def adapt(model, mesh, mt_config):
        return adalora.nnx.adapt(model, config, rngs=nnx.Rngs(0))

    def optimizer(*args, **kwargs):
        return adalora.adalora(get_optimizer(*args, **kwargs), config)

    with (
        mock.patch.object(lora_utils, "apply_lora_to_model", adapt),
        mock.patch.object(optimizers, "get_optimizer", optimizer),
    ):
        trainer, _ = train_sft.train(mt_config)
    return adalora.nnx.eval_model(trainer.model, trainer.optimizer), trainer


@functools.cache
def run(folder: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Return the trained model, its trainer, and a copy of the base's parameters."""
    path = os.path.join(paths.MAXTEXT_CONFIGS_DIR, "post_train", "sft.yml")
    options = [f"{name}={value}" for name, value in OPTIONS.items()]
    mt_config = pyconfig.initialize(["", path, f"base_output_directory={folder}", *options])
    base, from_pretrained = {}, train_sft.model_creation_utils.from_pretrained

    def recorded(config):
        model, mesh = from_pretrained(config)
        base.update(parameters(model))
        return model, mesh

    with (
        mock.patch.object(train_sft.model_creation_utils, "from_pretrained", recorded),
        jax.numpy_rank_promotion("allow"),
    ):
        return *fine_tune(mt_config, CONFIG), base


def parameters(model: Any) -> dict[str, np.ndarray]:
    """Return a copy of all parameters that are not trained, by path."""
    is_base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    flat = jax.tree_util.tree_leaves_with_path(nnx.state(model, is_base))
    return {jax.tree_util.keystr(path): np.array(value) for path, value in flat}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(str(tmp_path_factory.mktemp("maxtext")))


def test_ranks_of_scanned_layers_shrink_to_budget(trained):
    model, trainer, _ = trained
    state = adalora.allocator_state(trainer.optimizer.opt_state)
    ranks = adalora.ranks(state)
    assert int(state.step) == trainer.train_steps == CONFIG.total_step
    assert len(ranks) == 2 * 7 + 1  # of two layers, and of the head
    assert sum(ranks.values()) == 2 * len(ranks)
    masks = pytree.leaves_with_path(state.masks)
    for path, adapter in adalora.nnx.adapters(model).items():
        np.testing.assert_array_equal(adapter.lam != 0, masks[path], err_msg=path)


def test_base_is_bitwise_unchanged(trained):
    model, _, base = trained
    found = parameters(model)
    assert base
    assert set(found) == set(base)
    for path, value in found.items():
        np.testing.assert_array_equal(value, base[path], err_msg=path)


# The weights of experts, as paths in the parameters; they are [expert, in, out].
EXPERTS = {"(wi_0|wi_1|wo)/value": adalora.Layout(ins=(1,), outs=(2,), stack=(0,))}


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "sparse"])
def mixture(request, tmp_path_factory):
    """MaxText's mixture of experts, in the mesh of its config and without a TPU's kernels."""
    settings = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "base_moe_mlp_dim": 32,
        "dtype": "float32",
        "megablox": False,
    }
    settings |= {"base_output_directory": tmp_path_factory.mktemp("maxtext")}
    settings |= {"decoder_block": "mixtral", "sparse_matmul": request.param}
    unused = ("lora", "steps", "learning_rate", "param_scan_axis")
    options = {n: v for n, v in OPTIONS.items() if n.partition(".")[0] not in unused} | settings
    path = os.path.join(paths.MAXTEXT_CONFIGS_DIR, "base.yml")
    config = pyconfig.initialize(["", path, *(f"{n}={v}" for n, v in options.items())])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    init = initializers.nd_dense_init(1.0, "fan_in", "truncated_normal")
    with jax.set_mesh(mesh), jax.numpy_rank_promotion("allow"):
        yield moe.RoutedMoE(
            *(config, 4, 2, mesh, init, ("embed", None)), intermediate_dim=32, rngs=nnx.Rngs(0)
        )


def test_mixture_of_experts_raises_with_way_out(mixture):
    config = CONFIG.replace(target_modules=["layers/0"])
    with pytest.raises(ValueError, match=r"'layers/0' cannot be adapted, .*functional.adapt\("):
        adalora.nnx.adapt(nnx.Sequential(mixture), config)


def test_experts_are_trained_by_functional_adapt_each_with_its_ranks(mixture):
    graph, params, rest = nnx.split(mixture, nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graph, params, rest)(x)[0]

    def loss(y, x):
        return jnp.mean((y - jnp.sin(x)) ** 2)

    config = CONFIG.replace(target_modules="wi_0|wi_1|wo")
    x = jax.random.normal(jax.random.key(2), (2, 16, 16))
    experts.train_and_check(fn, params, config, [x] * config.total_step, loss, 4, EXPERTS)
