"""Tasks in memory: base model, examples, number of steps, and measure."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from benchmarks.quality.models import DIGITS, MINILM, PROSE, SentenceEncoder, Transformer


class Splits(NamedTuple):
    """Indices of the examples of each seed, ``[seeds, ...]``, and the numbers of the seeds."""

    batches: np.ndarray  # [seeds, steps, batch]
    validation: np.ndarray  # [seeds, n]
    test: np.ndarray  # [seeds, n]; not used for any selection
    number: np.ndarray  # [seeds]; also the seed of the adapters


class Task(NamedTuple):
    """Frozen model and the data to adapt it to."""

    name: str
    title: str
    measure: str
    sign: int  # 1 if higher is better, -1 if lower is
    module: nn.Module
    base: Any  # the pre-trained variables
    inputs: np.ndarray
    labels: np.ndarray
    splits: Splits
    targets: tuple[str, ...]
    head: tuple[str, ...]  # modules trained in addition to the adapters
    head_rate: float  # their learning rate, the same for all methods
    steps: int
    budgets: tuple[int | str, ...]  # see :meth:`adapted`; every method runs at the first
    rates: dict[str, int]  # {family: offset of its first rate from 1e-4}, in steps of RATES

    def adapted(self, budget: int | str) -> tuple[int, tuple[str, ...]]:
        """Return the average final rank and the adapted modules.

        The budget ``"qv"`` is rank 1 in the query and value modules only.
        """
        if budget != "qv":
            return int(budget), self.targets
        return 1, tuple(name for name in self.targets if name.endswith(("query", "value")))

    def logits(self, apply: Any, rows: jax.Array) -> jax.Array:
        return apply(jnp.asarray(self.inputs)[rows])

    def loss(self, apply: Any, rows: jax.Array) -> jax.Array:
        """Return the mean cross-entropy of these examples."""
        wanted = jnp.asarray(self.labels)[rows].astype(jnp.int32)
        logits = self.logits(apply, rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    def score(self, apply: Any, rows: jax.Array) -> jax.Array:
        """Return the measure of these examples: accuracy in %, or bits per character."""
        if self.sign < 0:
            return self.loss(apply, rows) / jnp.log(2.0)
        right = self.logits(apply, rows).argmax(-1) == jnp.asarray(self.labels)[rows]
        return 100 * right.mean()


class Plan(NamedTuple):
    """Task without its data; the fields are those of :class:`Task`."""

    title: str
    measure: str
    sign: int
    module: Callable[[dict[str, np.ndarray]], nn.Module]
    targets: tuple[str, ...]
    head: tuple[str, ...]
    head_rate: float
    steps: int
    batch: int
    budgets: tuple[int | str, ...]
    rates: dict[str, int]


OURS = ("query", "key", "value", "out", "up", "down")
BERTS = tuple(f"attention_self_{name}" for name in ("query", "key", "value"))
BERTS += ("attention_output_dense", "intermediate_dense", "output_dense")


def _minilm(file: dict[str, np.ndarray]) -> nn.Module:
    def size(name, axis):
        return file[f"base/{name}"].shape[axis]

    return SentenceEncoder(
        **MINILM,
        outputs=size("head/bias", 0),
        vocabulary=size("word_embeddings/embedding", 0),
        positions=size("position_embeddings/embedding", 0),
    )


_PLANS = {
    "digits": Plan(
        title="Digits: a Vision Transformer trained on the digits 0-4 learns 5-9 from 50 images",
        measure="test accuracy, %",
        sign=1,
        module=lambda _: Transformer(**DIGITS),
        targets=OURS,
        head=("head",),
        head_rate=1e-2,
        steps=200,
        batch=25,
        budgets=(1, "qv", 2, 4),
        rates={"full": 0, "lora": 3, "adalora": 3},
    ),
    "prose": Plan(
        title="Prose: a model of Python code learns the language reference from 300 passages",
        measure="bits per character of test passages",
        sign=-1,
        module=lambda _: Transformer(**PROSE),
        targets=OURS,
        head=(),
        head_rate=0.0,
        steps=200,
        batch=16,
        budgets=(1, "qv", 2),
        rates={"full": -2, "lora": 1, "adalora": 3},
    ),
    "docstrings": Plan(
        title="Docstrings: MiniLM learns to classify docstrings by package from 200 examples",
        measure="test accuracy, %",
        sign=1,
        module=_minilm,
        targets=BERTS,
        head=("head",),
        head_rate=1e-2,
        steps=120,
        batch=16,
        budgets=(1, "qv", 2, 4),
        rates={"full": -2, "lora": 2, "adalora": 2},
    ),
}
NAMES = tuple(_PLANS)
PARTS = ("train", "validation", "test")
BUDGETS = tuple(dict.fromkeys(str(b) for plan in _PLANS.values() for b in plan.budgets))
_AS_PLANNED = set(Plan._fields) - {"module", "batch"}


def load(name: str, folder: pathlib.Path, seeds: int) -> Task:
    """Load a task from its file."""
    file = read(name, folder)
    return assembled(name, _PLANS[name], file, {part: file[part][:seeds] for part in PARTS})


def read(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of a task's file."""
    with np.load(folder / f"{name}.npz") as opened:
        return {key: opened[key] for key in opened.files}


def base_of(file: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the variables of the pre-trained model in a task's file."""
    base = {key[5:]: value for key, value in file.items() if key.startswith("base/")}
    base = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in base.items()}
    return {"params": traverse_util.unflatten_dict(base, sep="/")}


def assembled(
    name: str, plan: Plan, file: dict[str, np.ndarray], parts: dict[str, np.ndarray]
) -> Task:
    """Return a task with these parts, each ``[seeds, n]``: indices of the file's examples."""
    batches = []
    for seed, rows in enumerate(parts["train"]):
        random = np.random.default_rng(seed)
        order = [random.permutation(rows) for _ in range(1 + plan.steps * plan.batch // len(rows))]
        order = np.concatenate(order)[: plan.steps * plan.batch]
        batches.append(order.reshape(plan.steps, plan.batch))
    seeds = np.arange(len(batches))
    splits = Splits(np.stack(batches), parts["validation"], parts["test"], seeds)
    return Task(
        name=name,
        module=plan.module(file),
        base=base_of(file),
        inputs=file["inputs"] if file["inputs"].dtype.kind == "f" else file["inputs"].astype("i4"),
        labels=file["labels"].astype("i4"),
        splits=splits,
        **{key: value for key, value in plan._asdict().items() if key in _AS_PLANNED},
    )


def shortened(task: Task, steps: int) -> Task:
    """Return the task with fewer steps, fewer examples and one budget, for a smoke test."""
    batches, validation, test, number = task.splits
    splits = Splits(batches[:, :steps, :8], validation[:, :50], test[:, :50], number)
    return task._replace(splits=splits, steps=steps, budgets=task.budgets[:1])


def python_of(names: Iterable[str], folder: pathlib.Path) -> str:
    """Return the version of Python whose standard library the files contain.

    Raises:
      ValueError: the files contain different versions.
    """
    found = {str(np.load(folder / f"{name}.npz")["python"]) for name in names}
    if len(found) > 1:
        raise ValueError(f"{folder} has tasks of Python {', '.join(sorted(found))}: remove some.")
    return found.pop()
