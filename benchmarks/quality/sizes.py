"""Tasks of ``crossover``: each has training sets of several sizes, with their numbers of steps."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.models import FASHION, TOPICS, WORDNET, SentenceEncoder, Transformer

# {task: {number of training examples: (number of steps, ranks)}}
SIZES = {
    "fashion": {100: (200, (1,)), 600: (400, (1,)), 4000: (2000, (1, 8)), 16000: (2500, (1,))},
    "topics": {20: (60, (8,)), 60: (100, (1, 8)), 300: (300, (1, 8)), 1000: (1000, (1, 8))},
    "glosses": {300: (300, (1,))},
    "german": {300: (300, (1,))},
    "wordnet": {1900: (240, (1,))},  # 50 of each class
}
_TOPICS = tasks.Plan(
    title="a model of Python code learns the language reference",
    measure="bits per character of test passages",
    sign=-1,
    module=lambda _: Transformer(**TOPICS),
    targets=tasks.OURS,
    head=(),
    head_rate=0.0,
    steps=0,
    batch=8,
    budgets=(1,),
    rates={"full": 0, "lora": 4, "adalora": 7},
)
_FAR = _TOPICS._replace(rates={"full": 2, "lora": 7, "adalora": 7})  # from the base's texts
_PLANS = {
    "fashion": tasks.Plan(
        title="a Vision Transformer trained on trousers, bags and shoes learns five kinds of tops",
        measure="test accuracy, %",
        sign=1,
        module=lambda _: Transformer(**FASHION),
        targets=tasks.OURS,
        head=("head",),
        head_rate=1e-2,
        steps=0,
        batch=32,
        budgets=(1,),
        rates={"full": 4, "lora": 5, "adalora": 6},
    ),
    "topics": _TOPICS,
    "glosses": _FAR._replace(title="a model of Python code learns the glosses of WordNet"),
    "german": _FAR._replace(title="a model of Python code learns German quotations"),
    "wordnet": tasks.Plan(
        title="the last two layers of MiniLM learn to classify the glosses of WordNet by topic",
        measure="test accuracy, %",
        sign=1,
        module=lambda file: SentenceEncoder(**WORDNET, outputs=len(file["base/head/bias"])),
        targets=tasks.BERTS,
        head=("head",),
        head_rate=1e-2,
        steps=0,
        batch=32,
        budgets=(1,),
        rates={"full": 0, "lora": 4, "adalora": 5},
    ),
}


def load(name: str, folder: pathlib.Path, seeds: int) -> dict[int, tasks.Task]:
    """Load ``{number of training examples: task}`` from the file of a task."""
    file = tasks.read(name, folder)
    found = {}
    for size, (steps, ranks) in SIZES[name].items():
        plan = _PLANS[name]._replace(steps=steps, budgets=ranks)
        parts = {part: file[f"{part}/{size}"][:seeds] for part in tasks.PARTS}
        found[size] = tasks.assembled(f"{name}-{size}", plan, file, parts)
    return found


def about(task: tasks.Task, name: str, size: int, folder: pathlib.Path) -> dict[str, Any]:
    """Return the facts of a task that its results record.

    The loss identifies the base model, None if it was not trained here. Results of different bases
    must not be compared, and not every machine makes the same base of fashion.
    """
    file, fields = tasks.read(name, folder), ("title", "measure", "sign", "steps", "budgets")
    loss = float(file["loss"])
    data = {
        "data": name,
        "examples": size,
        "passes": task.splits.batches[0].size / size,
        "bits wanted": round(size * float(file["wanted"])),
        "loss of the base": None if math.isnan(loss) else round(loss, 4),
    }
    return {**{name: getattr(task, name) for name in fields}, **data}
