"""The PEFT side: get_peft_model, a torch optimizer, update_and_allocate after every step."""

from __future__ import annotations

import types
from collections.abc import Iterator

import numpy as np
import pytest

from parity.cases import MODELS, Case, Inputs, Model, Snapshot, inputs

torch = pytest.importorskip("torch", reason="needs torch: pip install '.[parity]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install '.[parity]'")

# The models are so small that threads cost more than the work they share.
torch.set_num_threads(1)


class Torch(torch.nn.Module):
    """A model of the cases, called as PEFT expects: (x, y) to an object with a ``loss``."""

    def __init__(self, model: Model, weights: dict[str, dict[str, np.ndarray]], dtype):
        super().__init__()
        self.model = model
        for name, (in_features, out_features) in model.layers.items():
            layer = torch.nn.Linear(in_features, out_features, dtype=dtype)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weights[name]["kernel"].T))
                layer.bias.copy_(torch.from_numpy(weights[name]["bias"]))
            setattr(self, name, layer)

    def forward(self, x, y):
        output = self.model.forward(lambda name, x: getattr(self, name)(x), torch, x)
        return types.SimpleNamespace(loss=self.model.loss(torch, output, y), output=output)


def base_model(case: Case, dtype=torch.float32, given: Inputs | None = None) -> Torch:
    return Torch(MODELS[case.model], (given or inputs(case)).weights, dtype)


def build(case: Case, dtype=torch.float32, given: Inputs | None = None) -> peft.PeftModel:
    """Return the adapted model with PEFT's own initial adapters.

    In a float64 model the scale is frozen by hand: PEFT makes a trainable parameter of it, see
    ``test_scale_drifts_in_peft_unless_float32_and_is_fixed_here``.
    """
    torch.manual_seed(case.seed)
    config = peft.AdaLoraConfig(
        target_modules=list(MODELS[case.model].adapted),
        modules_to_save=["head"] if case.trained_head else None,
        **case.config,
    )
    peft_model = peft.get_peft_model(base_model(case, dtype, given), config)
    for name, parameter in peft_model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    return peft_model


def config_of(peft_model: peft.PeftModel) -> peft.AdaLoraConfig:
    return peft_model.peft_config["default"]


def adapters(peft_model: peft.PeftModel, values=lambda parameter, name: parameter):
    """Return ``{layer: (p [r, out], lam [r], q [r, in])}`` of the weights or other ``values``."""
    result = {}
    for name, layer in peft_model.base_model.model.named_modules():
        if hasattr(layer, "lora_E"):
            a, b, e = (
                values(getattr(layer, kind)["default"], f"{name}.{kind}.default")
                for kind in ("lora_A", "lora_B", "lora_E")
            )
            result[name] = (array(b).T, array(e)[:, 0], array(a))
    return result


def array(tensor) -> np.ndarray:
    """Return a copy, because the tensor continues to change."""
    return tensor.detach().numpy().copy()


def masks(peft_model: peft.PeftModel) -> dict[str, np.ndarray]:
    """Return the masks in effect; all true as long as PEFT has made none."""
    pattern = config_of(peft_model).rank_pattern or {}
    return {
        name: np.array(pattern.get(f"{name}.lora_E.default", np.ones(lam.shape)), bool)
        for name, (_, lam, _) in adapters(peft_model).items()
    }


def nonzero(peft_model: peft.PeftModel) -> int:
    """Count the triplets that are not zero in the model at present."""
    return sum(int((lam != 0).sum()) for _, lam, _ in adapters(peft_model).values())


def optimizer(peft_model: peft.PeftModel, case: Case) -> torch.optim.Optimizer:
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    if case.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=case.learning_rate, weight_decay=0.01)
    return torch.optim.SGD(parameters, lr=case.learning_rate, momentum=0.9)


def train(
    case: Case, peft_model: peft.PeftModel, given: Inputs | None = None
) -> Iterator[Snapshot]:
    """Train with PEFT as its documentation says; yield a snapshot after each step."""
    given = given or inputs(case)
    allocator = peft_model.base_model.rankallocator
    dtype = next(peft_model.parameters()).dtype
    opt = optimizer(peft_model, case)
    for step, arrays in enumerate(zip(given.x, given.y)):
        x, y = (torch.tensor(array, dtype=dtype) for array in arrays)
        # base_model, because PeftModel without a task type would bypass the orthogonality term.
        loss = peft_model.base_model(x, y).loss
        loss.backward()
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(peft_model.parameters(), case.clip)
        if step == case.overflow:  # as under loss scaling, the optimizer skips the step
            for parameter in opt.param_groups[0]["params"]:
                parameter.grad.fill_(torch.inf)
        else:
            opt.step()
        peft_model.base_model.update_and_allocate(step)
        opt.zero_grad()
        averages = [
            adapters(peft_model, lambda _, name, kept=kept: kept[name]) if kept else None
            for kept in (allocator.exp_avg_ipt, allocator.exp_avg_unc)
        ]
        yield Snapshot(
            loss=loss.item(),
            budget=allocator.budget_schedule(step)[0],
            masks=masks(peft_model),
            adapters=adapters(peft_model),
            sensitivity=averages[0],
            uncertainty=averages[1],
            head=head(peft_model) if case.trained_head else {},
        )


def head(peft_model: peft.PeftModel) -> dict[str, np.ndarray]:
    layer = peft_model.base_model.model.head.modules_to_save["default"]
    return {"kernel": array(layer.weight).T, "bias": array(layer.bias)}
