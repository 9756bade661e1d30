"""Tunix's own models at tiny sizes, its trainer around them, and their Hugging Face layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import adalora_jax as adalora

REASON = "needs google-tunix: pip install '.[tunix]'"
hooks = pytest.importorskip("tunix.sft.hooks", reason=REASON)
peft_trainer = pytest.importorskip("tunix.sft.peft_trainer", reason=REASON)
utils = pytest.importorskip("tunix.sft.utils", reason=REASON)
models = {
    name: pytest.importorskip(f"tunix.models.{name}.model", reason=REASON)
    for name in ("llama3", "qwen2", "qwen3", "gemma", "gemma3", "gemma4")
}

VOCABULARY, BATCH, LENGTH = 32, 4, 8
# Fewer heads for keys and values than for queries: two axes of equal size would hide a mistake.
SIZES = {
    "num_layers": 2,
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}
_LLAMA = {"vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-5}
_GEMMA = {"num_embed": VOCABULARY, "sliding_window_size": 4}


def config_of(family: str, **changes: Any) -> Any:
    """Return a tiny ModelConfig of the family."""
    module = models[family]
    options = SIZES | (_GEMMA if family.startswith("gemma") else _LLAMA)
    if family == "gemma":  # Gemma 2, by its options
        kinds = (module.AttentionType.LOCAL_SLIDING, module.AttentionType.GLOBAL)
        norms = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
        options |= norms | {"final_logit_softcap": 30.0, "attention_types": kinds}
    if family == "gemma3":
        options |= {"param_dtype": jnp.float32}
    if family == "gemma4":  # with per-layer inputs, as in its small models
        kinds = (module.AttentionType.LOCAL_SLIDING, module.AttentionType.GLOBAL)
        options |= {"per_layer_input_dim": 4, "global_key_size": 8, "attention_pattern": kinds}
    return module.ModelConfig(**{**options, **changes})


@functools.cache
def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a base model with random weights; the same object each time.

    Weights that Tunix initialises to zero are random, too: a feed-forward block whose three kernels
    are all zero has no gradient.
    """
    classes = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama3": "Llama3"}
    cls = getattr(models[family], classes.get(family, family.capitalize()))
    model = nnx.jit(lambda: cls(config_of(family, **changes), rngs=nnx.Rngs(seed)))()
    rng = np.random.default_rng(seed)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and variable.ndim > 1:
            noise = 0.15 * rng.standard_normal(variable.shape)
            variable.set_value(jnp.asarray(noise, variable.dtype))
    return model


def batches(count: int, seed: int = 0) -> list[Any]:
    """Draw training inputs: numbers that increase by three, which can be learnt, and padding."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = (rng.integers(VOCABULARY, size=(BATCH, 1)) + 3 * np.arange(LENGTH)) % VOCABULARY
        mask = np.arange(LENGTH) < rng.integers(5, LENGTH + 1, size=(BATCH, 1))
        found.append(peft_trainer.TrainingInput(tokens.astype(np.int32), mask))
    return found


def model_inputs(batch: Any) -> dict[str, jax.Array]:
    """Return the arguments of the loss, made as in Tunix's examples."""
    mask = jnp.asarray(batch.input_mask)
    return {
        "input_tokens": jnp.asarray(batch.input_tokens),
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


@nnx.jit
def forward(model: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    """Compute the logits of a batch's arguments."""
    return model(inputs["input_tokens"], inputs["positions"], None, inputs["attention_mask"])[0]


def logits(model: Any) -> jax.Array:
    """Compute the logits of a batch that is not trained on."""
    return forward(model, model_inputs(batches(1, seed=9)[0]))


class Loss:
    """Cross-entropy of the next token, and the penalty; counts how often it is traced."""

    def __init__(self, config: adalora.AdaLoraConfig):
        self.config, self.traces = config, 0

    def function(self) -> Callable[..., jax.Array]:
        def loss(model, input_tokens, input_mask, positions, attention_mask):
            self.traces += 1
            found = model(input_tokens, positions, None, attention_mask)[0][:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                found.astype(jnp.float32), input_tokens[:, 1:]
            )
            weights = input_mask[:, 1:].astype(losses.dtype)
            penalty = adalora.orthogonality(nnx.state(model, nnx.LoRAParam), self.config)
            return (losses * weights).sum() / weights.sum() + penalty

        return loss


class Watch(hooks.TrainingHooks):
    """Tunix hooks that record the allocator's step and active triplets when each step begins."""

    def __init__(self):
        self.steps, self.active = [], []

    def on_train_start(self, train_ctx):
        pass

    def on_train_end(self, train_ctx):
        pass

    def on_train_step_start(self, train_ctx):
        state = adalora.allocator_state(train_ctx.optimizer.opt_state)
        self.steps.append(int(state.step))
        self.active.append(sum(adalora.ranks(state).values()))

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        pass

    def on_eval_step_start(self, train_ctx):
        pass

    def on_eval_step_end(self, train_ctx, eval_loss):
        pass


class Run(NamedTuple):
    """The results of a training run."""

    model: Any  # the adapted one, which the trainer trains in place
    trainer: Any
    loss: Loss
    watch: Watch

    @property
    def allocator(self) -> adalora.AllocatorState:
        return adalora.allocator_state(self.trainer.optimizer.opt_state)

    @property
    def end(self) -> list[np.ndarray]:
        """Return all state of the run, for bitwise comparison."""
        state = nnx.state(self.model, nnx.LoRAParam), nnx.state(self.trainer.optimizer)
        return [np.array(leaf) for leaf in jax.tree.leaves(nnx.as_pure(state))]

    def small(self) -> Any:
        """Return the model with the ranks that training selected."""
        adapters = adalora.nnx.adapters(self.model)
        compacted = adalora.compact(adapters, self.allocator.masks)
        return adalora.nnx.with_adapters(self.model, compacted)


def train(
    base: Any,
    config: adalora.AdaLoraConfig,
    *,
    seed: int = 1,
    steps: int | None = None,
    folder: Any = None,
    evaluate: bool = False,
    **options: Any,
) -> Run:
    """Adapt a model and train it with Tunix's ``PeftTrainer``, for ``steps`` or to the end."""
    model = adalora.nnx.adapt(base, config, nnx.Rngs(seed))
    if folder is not None:
        options["checkpoint_root_directory"] = str(folder)
        options["checkpointing_options"] = ocp.CheckpointManagerOptions(save_interval_steps=2)
    trainer = peft_trainer.PeftTrainer(
        model,
        adalora.adalora(optax.adamw(1e-2), config),
        peft_trainer.TrainingConfig(
            eval_every_n_steps=2, max_steps=steps or config.total_step, **options
        ),
    )
    loss, watch = Loss(config), Watch()
    trainer = trainer.with_gen_model_input_fn(model_inputs).with_loss_fn(loss.function())
    trainer.with_training_hooks(watch)
    each = options.get("gradient_accumulation_steps") or 1
    trainer.train(batches(each * config.total_step), batches(1, seed=5) if evaluate else None)
    return Run(model, trainer, loss, watch)


def to_hugging_face(model: Any) -> dict[str, np.ndarray]:
    """Convert a Llama, Qwen or Gemma 3 model to Hugging Face's tensor names and layout."""
    tensors: dict[str, np.ndarray] = {}
    flat = {
        "/".join(map(str, path)): np.asarray(value.get_value())
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    out_in = lambda w, ins: np.ascontiguousarray(w.reshape(np.prod(w.shape[:ins]), -1).T)
    gemma_norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn/_query_norm": "self_attn.q_norm",
        "attn/_key_norm": "self_attn.k_norm",
    }
    for path, value in flat.items():
        parts = path.split("/")
        layer = ".".join(["model", *parts[:2]])
        module, name = "/".join(parts[2:-1]), parts[-2]
        if path == "embedder/input_embedding":
            tensors["model.embed_tokens.weight"] = value
        elif parts[0] == "final_norm":
            tensors["model.norm.weight"] = value
        elif parts[0] == "lm_head":
            tensors["lm_head.weight"] = out_in(value, 1)
        elif module in gemma_norms:
            tensors[f"{layer}.{gemma_norms[module]}.weight"] = value
        elif name == "q_einsum":  # N D H
            tensors[f"{layer}.self_attn.q_proj.weight"] = out_in(value.swapaxes(0, 1), 1)
        elif name == "kv_einsum":  # C K D H
            for part, own in zip("kv", value):
                tensors[f"{layer}.self_attn.{part}_proj.weight"] = out_in(own.swapaxes(0, 1), 1)
        elif name in ("o_proj", "attn_vec_einsum"):
            tensors[f"{layer}.self_attn.o_proj.weight"] = out_in(value, 2)
        elif name.endswith("_proj"):
            part = "self_attn" if parts[2] == "attn" else parts[2]
            tensors[f"{layer}.{part}.{name}.weight"] = out_in(value, 1)
        else:
            part = module.replace("attn/", "self_attn.")
            tensors[f"{layer}.{part}.weight"] = value
    return tensors


def base_bits(model: Any) -> dict[str, np.ndarray]:
    """Return a copy of all leaves that are not trained, by path."""
    is_base = lambda path, leaf: not isinstance(leaf, nnx.LoRAParam)
    flat = jax.tree_util.tree_leaves_with_path(nnx.state(model, is_base))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.array(v) for p, v in flat}
