"""Adaptation methods that the demo compares, independent of the Flax API."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PyTree

import adalora_jax as adalora


class Progress(NamedTuple):
    """Results of a train step, which remain on the device.

    Attributes:
      loss: mean loss of the batch, ``[]`` float32, without the penalty.
      budget: number of triplets that the allocator allows, ``[]`` int32; None without AdaLoRA.
      masks: the allocator's boolean masks of active triplets; None without AdaLoRA.
    """

    loss: jax.Array
    budget: jax.Array | None = None
    masks: Any = None


@dataclasses.dataclass(frozen=True)
class Method:
    """Training method: an optimizer and the adapters that it trains.

    Attributes:
      title: name in the output.
      optimizer: the optimizer.
      config: config of the adapters; None: the base itself is trained.
      fixed: names of the adapters' factors that the optimizer does not change.
      adaptive: whether the optimizer is ``adalora_jax.adalora``.
    """

    title: str
    optimizer: optax.GradientTransformation
    config: adalora.AdaLoraConfig | None = None
    fixed: tuple[str, ...] = ()
    adaptive: bool = False

    def penalty(self, trainable: PyTree) -> jax.Array | float:
        """Return the orthogonality penalty for the training loss; 0 without AdaLoRA."""
        if self.adaptive and self.config is not None:
            return adalora.orthogonality(trainable, self.config)
        return 0.0

    def progress(self, loss: jax.Array, opt_state: optax.OptState) -> Progress:
        """Return the results of one step."""
        if not self.adaptive:
            return Progress(loss)
        allocator = adalora.allocator_state(opt_state)
        return Progress(loss, allocator.budget, allocator.masks)


def pretraining(steps: int) -> Method:
    """Return the method that pre-trains the base."""
    return Method("pre-training on 0-4", adamw(2e-3, steps))


def adaptations(steps: int) -> list[Method]:
    """Return the adaptation methods that the demo compares.

    All of them train the classifier (``modules_to_save``), since a model of the digits 0-4 cannot
    classify 5-9. Each method has the best learning rate of a coarse search over rates about a
    factor of 3 apart, by accuracy on the test images of seeds 10 to 12, or 10 to 14 for LoRA and
    AdaLoRA; the default seed was not used. At three times its rate, LoRA loses a third of its
    accuracy, and AdaLoRA loses none.
    """
    config = adalora.AdaLoraConfig.recommended(
        steps,
        target_r=2,
        target_modules=["query", "key", "value", "out", "up", "down"],
        modules_to_save=["head"],
    )
    # LoRA is the adapter with λ fixed at 1 and with the final rank from the start in every layer.
    lora = config.replace(init_r=config.target_r, init="lambda_one")
    return [
        # With p fixed at 0, too, adapter outputs are 0, and only the classifier is trained.
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
    """Return AdamW with a learning rate that falls linearly to 0 over the run."""
    return optax.adamw(optax.linear_schedule(learning_rate, 0.0, steps))


def without(inner: optax.GradientTransformation, *fixed: str) -> optax.GradientTransformation:
    """Return ``inner`` without updates of the named factors of the adapters."""
    parts: dict[Hashable, optax.GradientTransformation] = {}
    for label in ("p", "lam", "q", "other"):
        parts[label] = optax.set_to_zero() if label in fixed else inner
    return optax.partition(parts, adalora.param_labels)


def patches(pixels: jax.Array) -> jax.Array:
    """Split images into 16 patches of 2 × 2 pixels: ``[n, 8, 8]`` to ``[n, 16, 4]``."""
    blocks = pixels.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
    return blocks.reshape(-1, 16, 4)


def cross_entropy(logits: jax.Array, digits: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of a batch, for ``[n, 10]`` logits and ``[n]`` digits."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()
