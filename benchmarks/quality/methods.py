"""Methods of the comparison: a config of the library and the trainable parameters of each."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

import adalora_jax as adalora


@dataclasses.dataclass(frozen=True)
class Method:
    """Fine-tuning method. Only its learning rate is tuned."""

    title: str
    form: Literal["full", "frozen", "lora", "svd"] = "svd"  # the trainable parameters
    start: int = 2  # initial rank, as a multiple of the final rank
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # of fields in adalora_config
    p_rate: float = 1.0  # learning rate of p, as a multiple of q's
    only_main: bool = False  # True: only run at the first budget
    # When ranks are allotted if ``start`` is above 1.
    allotted: Literal["in training", "at the start", "at the end"] = "in training"

    @property
    def family(self) -> str:
        """Name of the family whose learning rates the method uses."""
        if self.config.get("init") == "lambda_one":  # starts as LoRA
            return "lora"
        return {"full": "full", "frozen": "lora", "lora": "lora", "svd": "adalora"}[self.form]

    @property
    def shift(self) -> int:
        """Offset of the first learning rate from that of the family, in steps of ``RATES``.

        It is negative for a larger scale, or for a p with a multiple of the learning rate.
        """
        return -1 if self.p_rate > 1 or "scale" in self.config else 0

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the factors that the optimizer updates."""
        return {"svd": ("p", "lam", "q"), "lora": ("p", "q")}.get(self.form, ())

    @property
    def allocates(self) -> bool:
        trained = self.form in ("lora", "svd")
        return trained and self.start > 1 and self.allotted == "in training"

    def adalora_config(self, rank: int, steps: int, targets, head) -> adalora.AdaLoraConfig:
        """Return the config; warm-up takes 10 % of the steps, the final phase 30 %."""
        init_r = rank * self.start
        fields = {
            "total_step": steps,
            "init_r": init_r,
            "target_r": rank,
            "tinit": steps // 10,
            "tfinal": 3 * steps // 10,
            "lora_alpha": init_r,  # a scale of 1
            "target_modules": list(targets),
            "modules_to_save": list(head) or None,
            "init": "gaussian" if self.form == "svd" else "lambda_one",
            "orth_reg_weight": 0.5 if self.form == "svd" else 0.0,
        }
        return adalora.AdaLoraConfig(**fields | self.config)


def triplet_size(inputs: adalora.scores.ScoreInputs) -> jax.Array:
    """Return ``|λ| ‖p‖ ‖q‖``, the magnitude per triplet; 0 for a pruned triplet."""
    p, lam, q = inputs.weight
    return jnp.abs(lam) * jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(q, axis=-1)


def signal_to_noise(inputs: adalora.scores.ScoreInputs) -> jax.Array:
    """Return ``|w| / σ`` per triplet, with σ the deviation of the posterior (Chen and Garner 2024).

    With the Fisher information ``(Ī / w)²`` and a prior of precision ``δ = 1e-4``, this is
    ``√(Ī² + δ w²)``.
    """
    return adalora.scores.triplet_mean(
        jax.tree.map(lambda w, s: jnp.hypot(s, 1e-2 * w), inputs.weight, inputs.sensitivity)
    )


def _adalora(title: str, start: int = 2, **config: Any) -> Method:
    return Method(f"AdaLoRA, {title}", start=start, config=config, only_main=True)


# Baselines: scale 1, run at every budget unless ``only_main``.
BASELINES = {
    "frozen": Method("frozen base", "frozen", 1, only_main=True),
    "full": Method("full fine-tuning", "full", 1, only_main=True),
    "lora": Method("LoRA", "lora", 1),
    "lora-plus": Method("LoRA+: learning rate of p × 16", "lora", 1, p_rate=16),
    "svd-lora": Method("SVD-LoRA: trained λ, no pruning", "svd", 1),
    "pruned-lora": Method("LoRA pruned by magnitude", "lora", 2, {"score": triplet_size}),
    "adalora": Method("AdaLoRA as in PEFT", "svd", 2),
}
# Ablations of the paper's Tables 4 and 5, and further scores.
ABLATIONS = {
    "score-smoothed": _adalora("score: smoothed sensitivity", score="smoothed_sensitivity"),
    "score-sensitivity": _adalora("score: sensitivity", score="sensitivity"),
    "score-signal": _adalora("score: signal to noise", score=signal_to_noise),
    "score-magnitude": _adalora("score: magnitude of λ", score="magnitude"),
    "no-orthogonality": _adalora("no orthogonality", orth_reg_weight=0.0),
    "squared-orthogonality": _adalora("squared orthogonality", orthogonality="squared"),
}
_COMBINED = {"init": "orthonormal", "lambda_lr_scale": 10}
# Options that might improve AdaLoRA, and those of them that LoRA supports.
IMPROVEMENTS = {
    "lora-x4": Method("LoRA, scale × 4", "lora", 1, {"scale": 4}),
    "lora-x8": Method("LoRA, scale × 8", "lora", 1, {"scale": 8}, only_main=True),
    "x4": _adalora("scale × 4", scale=4),
    "x8": _adalora("scale × 8", scale=8),
    "lam10": _adalora("learning rate of λ × 10", lambda_lr_scale=10),
    "orthonormal": _adalora("orthonormal init", init="orthonormal"),
    "orthonormal-lam10": Method("AdaLoRA, orthonormal init, λ × 10", config=_COMBINED),
    "x4-lam10": Method("AdaLoRA, scale × 4, λ × 10", config={"scale": 4, "lambda_lr_scale": 10}),
    "orthonormal-x4-lam10": _adalora("orthonormal init, scale × 4, λ × 10", **_COMBINED, scale=4),
    "start4": _adalora("initial rank 4 × the final", start=4),
    "start4-orthonormal-lam10": _adalora(
        "initial rank × 4, orthonormal init, λ × 10", start=4, **_COMBINED
    ),
    "start4-x4-lam10": _adalora(
        "initial rank × 4, scale × 4, λ × 10", 4, scale=4, lambda_lr_scale=10
    ),
    "every10": _adalora("a mask every 10 steps", deltaT=10),
    "every10-held": _adalora(
        "a mask every 10 steps, pruned λ frozen", deltaT=10, freeze_pruned=True
    ),
    "unrevived": _adalora("no regrowth", allow_regrowth=False),
}
# Candidates for a default, which ``crossover`` compares; they are only run if asked for.
CANDIDATES = {
    "lambda-one": _adalora("LoRA's init, trained λ", init="lambda_one", orth_reg_weight=0.0),
    "truncated": Method(
        "LoRA, truncated at the end", "lora", 2, only_main=True, allotted="at the end"
    ),
    "by-variance": Method(
        "LoRA, ranks by the inputs' variance", "lora", 2, only_main=True, allotted="at the start"
    ),
    "unrevived4": _adalora("initial rank × 4, no regrowth", 4, allow_regrowth=False),
}
# LoRA and AdaLoRA at several scales, which only ``scales`` runs.
SCALES = {
    f"{name}-at-{scale:g}": dataclasses.replace(
        BASELINES[name], title=f"{title} at scale {scale:g}", config={"scale": scale}
    )
    for name, title in (("lora", "LoRA"), ("adalora", "AdaLoRA"))
    for scale in (0.125, 1, 2, 5)
}
METHODS = {**BASELINES, **ABLATIONS, **IMPROVEMENTS, **CANDIDATES, **SCALES}
