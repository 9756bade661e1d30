"""Training loop and measurements of the demo."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

import adalora_jax as adalora
from adalora_jax.demo.data import batches, load
from adalora_jax.demo.methods import Method, Progress, adaptations, pretraining

_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"  # fits 80 columns
_SHOW_EVERY = 10  # steps; reading a value from the device blocks until its step is done


class Learner(Protocol):
    """Interface of a training run of one method, implemented by ``in_linen`` and ``in_nnx``."""

    @property
    def base(self) -> PyTree:
        """Fully fine-tuned model, the base of the other methods."""
        ...

    @property
    def trainable(self) -> PyTree:
        """Tree that the optimizer updates: adapters and ``modules_to_save``, or the whole model."""
        ...

    @property
    def opt_state(self) -> PyTree:
        """State of the optimizer."""
        ...

    def step(self, pixels: np.ndarray, digits: np.ndarray) -> Progress:
        """Run one optimizer step on one batch."""
        ...

    def finish(self) -> None:
        """Make the final mask if it is still missing, and apply the masks for evaluation."""
        ...

    def logits(self, pixels: np.ndarray) -> jax.Array:
        """Return the logits of images: ``[n, 10]``, one row per image."""
        ...


class Run(NamedTuple):
    """Finished training run of one method, with its measurements.

    Attributes:
      method: the method.
      learner: the model and optimizer after training.
      history: the results of each step, on the host.
      accuracy: share of test images that are classified correctly, in [0, 1].
      trained: number of parameters that the optimizer changes at the start.
      kept: ``trained`` without the parameters of triplets that are pruned at the end.
    """

    method: Method
    learner: Learner
    history: list[Progress]
    accuracy: float
    trained: int
    kept: int


def compare(framework: ModuleType, steps: int, seed: int) -> list[Run]:
    """Pre-train a base on 0-4 and adapt it to 5-9 by each method, on the same batches.

    Args:
      framework: the module ``in_linen`` or ``in_nnx``.
      steps: number of steps of the pre-training and of each method.
      seed: seed of the weights, the split into training and test images, and the batches.

    Returns:
      One run per method, without the pre-training.
    """
    fresh = framework.create(seed)
    base = fit(framework, fresh, pretraining(steps), range(5), steps, seed).learner.base
    return [
        fit(framework, base, method, range(5, 10), steps, seed) for method in adaptations(steps)
    ]


def fit(
    framework: ModuleType, base: PyTree, method: Method, digits: range, steps: int, seed: int
) -> Run:
    """Train ``base`` by one method with a progress bar, and measure the result."""
    train, test = load(digits, seed)
    learner: Learner = framework.Learner(base, method, seed)
    history = []
    with tqdm(total=steps, desc=method.title.ljust(20), bar_format=_BAR) as bar:
        for batch in batches(train, steps, seed):
            history.append(learner.step(batch.pixels, batch.digits))
            bar.update()
            if bar.n % _SHOW_EVERY == 0 or bar.n == steps:
                bar.set_postfix(_shown(history[-1]))
    learner.finish()
    right = np.argmax(learner.logits(test.pixels), axis=-1) == test.digits
    trained = _trained(learner, method)
    return Run(
        method,
        learner,
        jax.device_get(history),
        accuracy=float(right.mean()),
        trained=trained,
        kept=trained - _pruned(learner, method),
    )


def _trained(learner: Learner, method: Method) -> int:
    labels = jax.tree.leaves(adalora.param_labels(learner.trainable))
    leaves = zip(jax.tree.leaves(learner.trainable), labels)
    return sum(leaf.size for leaf, label in leaves if label not in method.fixed)


def _pruned(learner: Learner, method: Method) -> int:
    if not method.adaptive:
        return 0
    ranks = adalora.ranks(adalora.allocator_state(learner.opt_state))
    return sum(
        (len(adapter.lam) - ranks[path]) * (adapter.p.shape[-1] + 1 + adapter.q.shape[-1])
        for path, adapter in adalora.adapters(learner.trainable).items()
    )


def _shown(progress: Progress) -> dict[str, str]:
    shown = {"loss": f"{float(progress.loss):.3f}"}
    if progress.masks is not None:
        ranks = adalora.ranks(progress.masks)
        shown["mean rank"] = f"{np.mean(list(ranks.values())):.2f}"
    return shown
