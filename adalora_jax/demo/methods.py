"""The four ways of adapting a model that the demo compares, whichever Flax it is written in."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import optax

import adalora_jax as adalora


class Progress(NamedTuple):
    """What a train step reports. It comes out of the compiled step and stays on the device."""

    loss: jax.Array
    budget: jax.Array | None = None  # triplets allowed; None without AdaLoRA
    masks: Any = None  # which triplets live, for adalora.ranks


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of training: the optimizer, and the adapters it trains."""

    title: str
    optimizer: optax.GradientTransformation
    config: adalora.AdaLoraConfig | None = None  # None: no adapters, the base itself is trained
    fixed: tuple[str, ...] = ()  # the factors of the adapters that the optimizer leaves alone
    adaptive: bool = False  # whether the optimizer is AdaLoRA's

    def penalty(self, trainable: Any) -> jax.Array | float:
        """What is added to the loss in training."""
        if self.adaptive and self.config is not None:
            return adalora.orthogonality(trainable, self.config)
        return 0.0

    def progress(self, loss: jax.Array, opt_state: Any) -> Progress:
        """The report of one step."""
        if not self.adaptive:
            return Progress(loss)
        allocator = adalora.allocator_state(opt_state)
        return Progress(loss, allocator.budget, allocator.masks)


def pretraining(steps: int) -> Method:
    """How the base itself is made."""
    return Method("pre-training on 0-4", adamw(2e-3, steps))


def adaptations(steps: int) -> list[Method]:
    """What is then compared.

    The classifier trains along in all of them (``modules_to_save``): without that a model of the
    digits 0-4 can say nothing of 5-9. Each method has the best learning rate of a coarse search, in
    steps of about 3, by the test images of other seeds than the default: 10 to 12, and 10 to 14
    for LoRA and AdaLoRA. From twice that rate on those two get worse.
    """
    config = adalora.AdaLoraConfig(
        total_step=steps,
        init_r=6,
        target_r=2,
        tinit=steps // 10,
        tfinal=3 * steps // 10,
        lora_alpha=6,  # a scale of 1, for LoRA as well
        target_modules=["query", "key", "value", "out", "up", "down"],
        modules_to_save=["head"],
    )
    # LoRA is the adapter with λ held at 1 and the final rank from the start, in every layer alike.
    lora = config.replace(init_r=config.target_r, lora_alpha=2, init="lambda_one")
    return [
        # With p held at 0, too, an adapter does nothing: only the classifier is trained.
        Method(
            "frozen base", without(adamw(1e-1, steps), "p", "lam", "q"), lora, ("p", "lam", "q")
        ),
        Method(f"LoRA, rank {lora.target_r}", without(adamw(3e-2, steps), "lam"), lora, ("lam",)),
        Method(
            f"AdaLoRA, rank {config.init_r} to {config.target_r}",
            adalora.adalora(adamw(3e-2, steps), config),
            config,
            adaptive=True,
        ),
        Method("full fine-tuning", adamw(3e-3, steps)),
    ]


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a learning rate that falls to 0 over the run."""
    return optax.adamw(optax.linear_schedule(learning_rate, 0.0, steps))


def without(inner: optax.GradientTransformation, *fixed: str) -> optax.GradientTransformation:
    """``inner`` for everything except the named factors of the adapters, which stay as they are."""
    parts: dict[Hashable, optax.GradientTransformation] = {}
    for label in ("p", "lam", "q", "other"):
        parts[label] = optax.set_to_zero() if label in fixed else inner
    return optax.partition(parts, adalora.param_labels)


def patches(pixels: jax.Array) -> jax.Array:
    """16 patches of 2 × 2 pixels: ``[n, 8, 8]`` becomes ``[n, 16, 4]``."""
    blocks = pixels.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
    return blocks.reshape(-1, 16, 4)


def cross_entropy(logits: jax.Array, digits: jax.Array) -> jax.Array:
    """The mean loss of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()
