"""The loop around the train step, and what is measured afterwards."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

import adalora_jax as adalora
from adalora_jax.demo.data import batches, load
from adalora_jax.demo.methods import Method, Progress, adaptations, pretraining

_SHOW_EVERY = 10  # steps; reading a number off the device waits for the step that makes it


class Learner(Protocol):
    """What ``in_linen`` and ``in_nnx`` both provide: one method at work on a model."""

    @property
    def base(self) -> Any:
        """The model as full fine-tuning left it, to be the base of other methods."""
        ...

    @property
    def trainable(self) -> Any:
        """The tree that the optimizer updates: adapters, and whatever trains beside them."""
        ...

    @property
    def opt_state(self) -> Any:
        """The optimizer's state."""
        ...

    def step(self, pixels: np.ndarray, digits: np.ndarray) -> Progress:
        """One optimizer step on one batch."""
        ...

    def finish(self) -> None:
        """End the run within its budget, and apply the masks for evaluation."""
        ...

    def logits(self, pixels: np.ndarray) -> jax.Array:
        """``[n, 10]``, one row an image."""
        ...


class Run(NamedTuple):
    """One method, trained and measured."""

    method: Method
    learner: Learner
    history: list[Progress]
    accuracy: float  # on test images
    trained: int  # parameters that the optimizer changes at first
    kept: int  # those that are left at the end, when pruned triplets are not counted


def compare(framework: Any, steps: int, seed: int) -> list[Run]:
    """Pre-trains a base on 0-4 and adapts it to 5-9 by each method, over the same batches.

    Args:
      framework: the module ``in_linen`` or ``in_nnx``.
      steps: of the pre-training, and of each method.
      seed: of the weights, the split into training and test images, and the batches.
    """
    fresh = framework.create(seed)
    base = fit(framework, fresh, pretraining(steps), range(5), steps, seed).learner.base
    return [
        fit(framework, base, method, range(5, 10), steps, seed) for method in adaptations(steps)
    ]


def fit(framework: Any, base: Any, method: Method, digits: range, steps: int, seed: int) -> Run:
    """Trains ``base`` by one method, shows how it goes, and measures the outcome."""
    train, test = load(digits, seed)
    learner: Learner = framework.Learner(base, method, seed)
    history = []
    with tqdm(total=steps, desc=method.title.ljust(20)) as bar:
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
    live = adalora.ranks(adalora.allocator_state(learner.opt_state))
    return sum(
        (len(adapter.lam) - live[path]) * (adapter.p.shape[-1] + 1 + adapter.q.shape[-1])
        for path, adapter in adalora.adapters(learner.trainable).items()
    )


def _shown(progress: Progress) -> dict[str, str]:
    shown = {"loss": f"{float(progress.loss):.3f}"}
    if progress.budget is not None:
        live = adalora.ranks(progress.masks)
        shown["budget"] = str(int(progress.budget))
        shown["mean rank"] = f"{np.mean(list(live.values())):.2f}"
    return shown
