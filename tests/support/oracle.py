"""The paper's algorithm in plain float64 NumPy loops, the reference for the package.

AdaLoRA, arXiv 2303.10512: Algorithm 1 and Eqs. 3 to 11, with the cubic schedule of the authors'
code in place of Eq. 14 as printed. Nothing is imported from the package. A matrix is
``{"p": [r, out], "lam": [r], "q": [r, in]}``; a model is a list of them, in the allocator's order.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """The hyper-parameters, under PEFT's names."""

    total_step: int
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    lora_alpha: float = 8.0
    scale: float | None = None
    budget_schedule: str = "cubic"
    budget_unit: str = "triplets"
    score: Any = "sensitivity_uncertainty"  # a name, or a function of one of the names below
    score_reduction: str = "triplet"
    orthogonality: str = "frobenius"
    sensitivity_timing: str = "updated"
    freeze_pruned: bool = False
    allow_regrowth: bool = True
    lambda_lr_scale: float = 1.0
    prox: str | None = None
    prox_weight: float = 0.0


# The model -----------------------------------------------------------------------------------


def forward(matrix, x, kernel, scale):
    """Compute Eq. 3, ``h = x W + s Σ_i (x · q_i) λ_i p_i``."""
    y = x @ kernel
    for i in range(len(matrix["lam"])):
        y = y + scale * matrix["lam"][i] * np.outer(x @ matrix["q"][i], matrix["p"][i])
    return y


def task(matrix, batch, scale):
    """Return the mean squared error of one adapted layer and its hand-derived gradient."""
    x, kernel, target = batch
    error = forward(matrix, x, kernel, scale) - target
    slope = 2 * error / error.size
    gradient = {name: np.zeros_like(value) for name, value in matrix.items()}
    for i in range(len(matrix["lam"])):
        xq, ep = x @ matrix["q"][i], slope @ matrix["p"][i]
        gradient["lam"][i] = scale * np.sum(xq * ep)
        gradient["p"][i] = scale * matrix["lam"][i] * (xq @ slope)
        gradient["q"][i] = scale * matrix["lam"][i] * (ep @ x)
    return np.mean(error**2), gradient


def regulariser(m, form):
    """Compute Eq. 4 for one P or Q, ``‖M Mᵀ − I‖²_F`` or the norm unsquared, and its gradient."""
    deviation = m @ m.T - np.eye(len(m))
    norm = math.sqrt(np.sum(deviation**2))
    if form == "squared":
        return norm**2, 4 * deviation @ m
    return norm, 2 * deviation @ m / norm if norm > 0 else np.zeros_like(m)


def objective(matrices, batches, settings):
    """Return the training objective, the layers' errors plus γ times Eq. 4, and its gradients."""
    scale = settings.scale or settings.lora_alpha / settings.init_r
    weight = settings.orth_reg_weight
    if settings.orthogonality == "frobenius":
        weight = weight / (2 * len(matrices))  # the mean over all P and Q, where Eq. 4 has the sum
    total, gradients = 0.0, []
    for matrix, batch in zip(matrices, batches):
        loss, gradient = task(matrix, batch, scale)
        total += loss
        for name in ("p", "q"):
            value, slope = regulariser(matrix[name], settings.orthogonality)
            total += weight * value
            gradient[name] = gradient[name] + weight * slope
        gradients.append(gradient)
    return total, gradients


# The optimizers ------------------------------------------------------------------------------


def sgd(rate):
    """Return gradient descent, Eq. 5, as in Algorithm 1."""
    return lambda state, gradient: (state, -rate * gradient)


def adam(rate, b1=0.9, b2=0.999, eps=1e-8):
    """Return Adam for one array (Kingma and Ba, Algorithm 1)."""

    def step(state, gradient):
        count, m, v = state or (0, 0.0, 0.0)
        count += 1
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        m_hat, v_hat = m / (1 - b1**count), v / (1 - b2**count)
        return (count, m, v), -rate * m_hat / (np.sqrt(v_hat) + eps)

    return step


# The allocator -------------------------------------------------------------------------------


def budget(settings, step, matrices, initial=None):
    """Return b(t), the budget of all matrices together."""
    initial = settings.init_r * matrices if initial is None else initial
    target = min(settings.target_r * matrices, initial)
    if step <= settings.tinit:
        return initial
    if step >= final_step(settings):
        return target
    start, end = settings.tinit, settings.total_step - settings.tfinal
    remaining = 1 - (step - start) / (end - start)
    if settings.budget_schedule == "grow":
        first = min(matrices, target)
        return math.floor(first + (1 - remaining) * (target - first))
    if settings.budget_schedule == "linear":
        return math.floor(initial - (1 - remaining) * (initial - target))
    return math.floor((initial - target) * remaining**3 + target)


def final_step(settings):
    """Return the step of the final mask: ``T − tfinal``, at most the last step."""
    return min(settings.total_step - settings.tfinal, settings.total_step - 1)


def element_score(settings, weight, raw, sensitivity, uncertainty):
    """Return s(w) of one element."""
    return {
        "sensitivity_uncertainty": sensitivity * uncertainty,  # Eq. 11
        "smoothed_sensitivity": sensitivity,  # Eq. 9, the ablation of Table 4
        "sensitivity": raw,  # Eq. 8
        "upper_confidence": sensitivity + uncertainty,
        "sensitivity_over_uncertainty": (
            0 if sensitivity == 0 else min(sensitivity / max(uncertainty, 1e-300), 1e6)
        ),
        "signal_to_noise": math.sqrt(sensitivity**2 + 1e-4 * weight**2),
    }[getattr(settings.score, "__name__", settings.score)]


def triplet_score(settings, weight, raw, sensitivity, uncertainty, i):
    """Compute Eq. 7, ``S_i = s(λ_i) + mean_j s(p_ij) + mean_j s(q_ij)``; or ``|λ_i|`` (Table 4)."""
    if settings.score == "magnitude":
        return abs(weight["lam"][i])

    def score(name, index):
        evidence = (weight, raw, sensitivity, uncertainty)
        return element_score(settings, *(values[name][index] for values in evidence))

    total = score("lam", i)
    if settings.score_reduction == "triplet":
        for name in ("p", "q"):
            width = weight[name].shape[1]
            total += sum(score(name, (i, j)) for j in range(width)) / width
    return total


def cost(settings, matrix):
    """Return the budget cost of one triplet of a matrix."""
    sizes = matrix["p"].shape[1] + matrix["q"].shape[1]
    return {"triplets": 1, "parameters": sizes + 1, "flops": 2 * sizes + 1}[settings.budget_unit]


def top(scores, budget, costs=None):
    """Return masks of the best triplets within a budget, and the margin of the decision.

    The best triplets of all matrices are taken one by one, ties by position, until one exceeds the
    budget. The margin is the gap between the worst survivor and the best triplet left out, relative
    to the survivor: infinite if they are equal, so that only the order decides.
    """
    ranked = sorted(
        ((k, i) for k, row in enumerate(scores) for i in range(len(row))),
        key=lambda place: (-scores[place[0]][place[1]], place),
    )
    masks = [np.zeros(len(row), bool) for row in scores]
    costs = costs or [1] * len(scores)
    count = 0
    for k, i in ranked:
        if costs[k] > budget:
            break
        masks[k][i] = True
        budget, count = budget - costs[k], count + 1
    if not 0 < count < len(ranked):
        return masks, math.inf
    last, first_out = (scores[k][i] for k, i in ranked[count - 1 : count + 1])
    return masks, math.inf if last == first_out else (last - first_out) / abs(last)


class Allocator:
    """Lines 4 to 6 and 8 of Algorithm 1: importance, budget, masks."""

    def __init__(self, matrices, settings):
        zeros = lambda: [{k: np.zeros_like(v) for k, v in m.items()} for m in matrices]
        self.settings = settings
        self.step = 0
        self.ranks = [len(matrix["lam"]) for matrix in matrices]
        self.costs = [cost(settings, matrix) for matrix in matrices]
        self.budget = self.allowed()
        self.masks = [np.ones(rank, bool) for rank in self.ranks]
        self.sensitivity, self.uncertainty = zeros(), zeros()
        self.finalised = False
        self.margin = math.inf  # relative margin of the last decision

    def allowed(self):
        initial = sum(rank * each for rank, each in zip(self.ranks, self.costs))
        return budget(self.settings, self.step, sum(self.costs), initial)

    def update(self, weights, gradients):
        """Run one step and return the masks to multiply λ by: all true where λ may grow back."""
        settings, step = self.settings, self.step
        raw = [
            {name: np.abs(weight[name] * gradient[name]) for name in weight}  # Eq. 8
            for weight, gradient in zip(weights, gradients)
        ]
        final = step >= final_step(settings)
        budgeting = settings.tinit < step and not final and step % settings.deltaT == 0
        due = budgeting or (final and not self.finalised)
        if all(np.isfinite(values).all() for row in raw for values in row.values()):
            if step < settings.total_step - settings.tfinal:
                self.accumulate(raw)
            self.budget = self.allowed()
            if due:
                self.decide(weights, raw)
                self.finalised = final
            self.step += 1
        if due or final or settings.freeze_pruned or not settings.allow_regrowth:
            return self.masks
        return [np.ones_like(mask) for mask in self.masks]

    def accumulate(self, raw):
        b1, b2 = self.settings.beta1, self.settings.beta2
        for row, sensitivity, uncertainty in zip(raw, self.sensitivity, self.uncertainty):
            for name, value in row.items():
                sensitivity[name] = b1 * sensitivity[name] + (1 - b1) * value  # Eq. 9
                deviation = np.abs(value - sensitivity[name])
                uncertainty[name] = b2 * uncertainty[name] + (1 - b2) * deviation  # Eq. 10

    def decide(self, weights, raw):
        settings = self.settings
        evidence = zip(weights, raw, self.sensitivity, self.uncertainty)
        scores = [
            [triplet_score(settings, *one, i) for i in range(rank)]
            for one, rank in zip(evidence, self.ranks)
        ]
        if not settings.allow_regrowth:  # pruned triplets rank below all active ones
            scores = [np.where(mask, row, -np.inf) for row, mask in zip(scores, self.masks)]
        self.masks, self.margin = top(scores, self.budget, self.costs)


# The whole run -------------------------------------------------------------------------------


class Step(NamedTuple):
    """The results of one training step."""

    loss: float
    budget: int
    masks: list
    margin: float
    matrices: list
    sensitivity: list
    uncertainty: list


def train(matrices, batches, settings, optimizer):
    """Run Algorithm 1 over all steps; ``batches[t][k]`` is matrix k's ``(x, kernel, target)``."""
    allocator, states, history = Allocator(matrices, settings), {}, []
    for batch in batches:
        loss, gradients = objective(matrices, batch, settings)
        updated = []
        for k, (matrix, gradient) in enumerate(zip(matrices, gradients)):
            new = {}
            for name in matrix:
                states[k, name], move = optimizer(states.get((k, name)), gradient[name])
                move = settings.lambda_lr_scale * move if name == "lam" else move
                new[name] = matrix[name] + move
            if settings.prox:  # the proximal operator of η ‖λ‖₁
                shrunk = np.maximum(np.abs(new["lam"]) - settings.prox_weight, 0)
                new["lam"] = np.sign(new["lam"]) * shrunk
            updated.append(new)
        seen = updated if settings.sensitivity_timing == "updated" else matrices
        keep = allocator.update(seen, gradients)
        for matrix, mask in zip(updated, keep):
            matrix["lam"] = np.where(mask, matrix["lam"], 0.0)  # Eq. 6
        matrices = updated
        averages = [[dict(m) for m in a] for a in (allocator.sensitivity, allocator.uncertainty)]
        decision = (allocator.budget, allocator.masks, allocator.margin)
        history.append(Step(loss, *decision, matrices, *averages))
    return history
