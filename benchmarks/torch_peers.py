"""Fine-tuning methods in PyTorch: PEFT on models of transformers in the shapes of ``networks``.

Needs ``pip install ".[parity]"``. Runs on a GPU if PyTorch has one. AdamW is fused, attention is
``sdpa``, and GELU is the same approximation as in JAX. AdaLoRA allocates at every step, as in JAX.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import tempfile
import warnings
from typing import Any

import numpy as np
import peft
import torch
import transformers

from benchmarks.networks import Shape, Unsupported, data

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# All peers of all models compile the same few functions.
torch._dynamo.config.recompile_limit = 64


class Step:
    """Training step and its state; a call takes one step and returns its loss."""

    def __init__(self, name: str, shape: Shape, rank: int, dropout: float):
        torch.manual_seed(0)
        self.steps, self.allocate, self.optimizer = 0, None, None
        self.batch, self.model = batch(shape), model(shape)
        if name == "torch-frozen":
            self.model.requires_grad_(False)
            # The backward pass ends at the output of the embedding.
            _embedding(self.model).register_forward_hook(lambda *call: call[-1].requires_grad_())
            self.forward = self.model
            return
        settings = _config(name, shape, _targets(self.model), rank, dropout)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            adapted = peft.get_peft_model(self.model, settings, **_as_base)
        # The forward method of ``PeftModel`` omits the penalty without a task type.
        self.model = self.forward = adapted.base_model
        for key, parameter in self.model.named_parameters():
            if "ranknum" in key:  # the scale, which PEFT trains if it is not float32
                parameter.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-3, weight_decay=1e-4, fused=True)
        if "adalora" in name:
            self.allocate = self.model.update_and_allocate
        if name.endswith("compiled"):
            self.forward = torch.compile(self.model, dynamic=False)
            try:
                self()
            except torch._dynamo.exc.TorchDynamoException as error:
                raise Unsupported(f"torch.compile: {str(error).splitlines()[0]}") from error

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self) -> torch.Tensor:
        loss = self.forward(**self.batch).loss
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
        if self.allocate:
            self.allocate(self.steps)
        if self.optimizer:
            self.optimizer.zero_grad()
        self.steps += 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss.detach()


_as_base = {"autocast_adapter_dtype": False}  # adapters in the precision of the base


def model(shape: Shape) -> Any:
    """Return a model of transformers, with random weights and without dropout."""
    sizes = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "hidden_act": "gelu_pytorch_tanh",
        "num_labels": shape.classes,
        **_sdpa,
    }
    text = {"vocab_size": shape.vocabulary, "max_position_embeddings": shape.length}
    none = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    if shape.kind == "bert":
        config = transformers.BertConfig(**sizes, **text, **dict.fromkeys(none, 0.0))
        found = transformers.BertForSequenceClassification(config)
    elif shape.kind == "vit":
        image = {"image_size": shape.image, "patch_size": shape.patch}
        config = transformers.ViTConfig(**sizes, **image, **dict.fromkeys(none, 0.0))
        found = transformers.ViTForImageClassification(config)
    elif shape.kind == "gpt":
        config = transformers.GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.length,
            n_embd=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            n_inner=shape.hidden,
            activation_function="gelu_pytorch_tanh",
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **_sdpa,
            **_causal,
        )
        found = transformers.GPT2LMHeadModel(config)
    else:
        sizes["hidden_act"] = "silu"
        config = transformers.LlamaConfig(
            **sizes, **text, num_key_value_heads=shape.heads, **_causal
        )
        found = transformers.LlamaForCausalLM(config)
    if shape.scan:  # the JAX models recompute activations
        name = "activation_checkpointing_enable"  # name in newer releases
        enable = getattr(found, name, found.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return found.to(DEVICE, getattr(torch, shape.dtype)).train()


_sdpa = {"attn_implementation": "sdpa"}
_causal = {
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def batch(shape: Shape) -> dict[str, torch.Tensor]:
    inputs, labels = data(shape)
    if shape.kind == "vit":
        images = torch.tensor(inputs.transpose(0, 3, 1, 2).astype(np.float32))
        found = {"pixel_values": images.to(getattr(torch, shape.dtype)), "labels": labels}
    else:  # a causal model of transformers shifts the labels
        found = {"input_ids": inputs, "labels": labels if shape.kind == "bert" else inputs}

    def as_tensor(x):
        return x if torch.is_tensor(x) else torch.from_numpy(x.astype(np.int64))

    return {name: as_tensor(x).to(DEVICE) for name, x in found.items()}


def memory(step: Step) -> dict[str, int]:
    """Return the bytes of the adapters, the training state, and the temporaries of a step."""
    step(), step()  # these create the complete state

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    adapters = size(step.trainable)
    state = adapters + size(t for s in step.optimizer.state.values() for t in s.values())
    if step.allocate:
        allocator = step.model.rankallocator
        averages = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        state += sum(size(kept.values()) for kept in averages)
    return {"adapters": adapters, "training state": state, "temporaries": _temporaries(step)}


def _temporaries(step: Step) -> int:
    """Return the peak of the bytes allocated during a step, minus those allocated before it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    changes = (event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))
    return max(itertools.accumulate(changes, initial=0))


def _targets(model) -> list[str]:
    """Return the linear layers of the blocks; their names vary with the release of transformers."""
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, linear) and re.search(r"\.(layer|layers|h)\.\d+\.", name)
    ]


def _config(name, shape, targets, rank, dropout):
    how = {
        "target_modules": targets,
        "lora_alpha": rank,
        "lora_dropout": dropout,
        "fan_in_fan_out": shape.kind == "gpt",
    }
    if "adalora" not in name:
        return peft.LoraConfig(r=rank, **how)
    return peft.AdaLoraConfig(
        total_step=100_000,
        init_r=rank,
        target_r=max(1, rank * 2 // 3),
        tinit=0,
        tfinal=0,
        deltaT=1,
        **{**how, "lora_alpha": rank * rank},  # PEFT divides by the rank again
    )


def _embedding(model):
    """Return the module that embeds the inputs."""
    name = "patch_embeddings.projection" if model.config.model_type == "vit" else None
    if name:
        return next(m for key, m in model.named_modules() if key.endswith(name))
    return model.get_input_embeddings()
