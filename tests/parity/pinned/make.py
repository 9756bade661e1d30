"""Train with PEFT and record the results, for ``tests/parity/test_pinned.py``.

Needs the extra ``parity``. From the folder ``tests``::

    python -m parity.pinned.make

Writes one ``<case>.npz`` per case below, and ``adapter_config.json`` as PEFT saves it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import tempfile

import numpy as np

from parity.cases import Case, Inputs, Snapshot, inputs

FOLDER = pathlib.Path(__file__).parent
CASES = {
    "adamw": Case(
        "chain3",
        {"total_step": 120, "init_r": 6, "target_r": 3, "tinit": 15, "tfinal": 30},
        learning_rate=2e-3,
    ),
    "sgd": Case(
        "chain2",
        {
            "total_step": 100,
            "init_r": 8,
            "target_r": 5,
            "tfinal": 20,
            "deltaT": 4,
            "lora_alpha": 32,
            "beta1": 0.7,
            "beta2": 0.9,
        },
        optimizer="sgd",
        learning_rate=1e-2,
    ),
    "clipped": Case(
        "block6",
        {
            "total_step": 65,
            "init_r": 6,
            "target_r": 2,
            "tinit": 5,
            "tfinal": 15,
            "deltaT": 10,
            "orth_reg_weight": 0.1,
        },
        clip=1.0,
        learning_rate=2e-3,
        trained_head=True,
    ),
}
# Smallest relative gap of scores at the threshold, because rounding differs between machines.
GAP = 1e-3


def main() -> None:
    from parity import peft_side

    for name, case in CASES.items():
        given = inputs(case)
        # float16 halves the file; the run starts from the rounded numbers.
        given = given._replace(x=np.float16(given.x), y=np.float16(given.y))
        peft_model = peft_side.build(case, given=given)
        config = peft_side.config_of(peft_model).to_dict()
        initial = peft_side.adapters(peft_model)
        snapshots = list(peft_side.train(case, peft_model, given))
        check_gaps(name, case, snapshots)
        config["target_modules"] = sorted(config["target_modules"])
        about = {
            "case": dataclasses.asdict(case),
            "peft_config": config,
            "torch": peft_side.torch.__version__,
            "peft": peft_side.peft.__version__,
        }
        np.savez_compressed(
            FOLDER / f"{name}.npz", about=json.dumps(about), **arrays(given, initial, snapshots)
        )
        with tempfile.TemporaryDirectory() as folder:
            peft_model.save_pretrained(folder)
            shutil.copy(pathlib.Path(folder, "adapter_config.json"), FOLDER)


def arrays(given: Inputs, initial, snapshots: list[Snapshot]) -> dict[str, np.ndarray]:
    """Collect losses, budgets, masks and λ of every step; p, q and the averages of some."""
    names = list(initial)
    steps = len(snapshots)
    joined = lambda per_layer: np.concatenate([per_layer[name] for name in names])
    result = {
        "x": given.x,
        "y": given.y,
        "loss": np.array([s.loss for s in snapshots], np.float32),
        "budget": np.array([s.budget for s in snapshots], np.int16),
        "masks": np.array([joined(s.masks) for s in snapshots]),
        "lam": np.array([joined({n: a[1] for n, a in s.adapters.items()}) for s in snapshots]),
    }
    for layer, weights in given.weights.items():
        for key, value in weights.items():
            result[f"weights/{layer}/{key}"] = np.float32(value)
    some = {
        "initial": {"adapters": initial},
        f"step{steps // 2}": snapshots[steps // 2]._asdict(),
        f"step{steps - 1}": snapshots[-1]._asdict(),
    }
    for when, trees in some.items():
        for kind in ("adapters", "sensitivity", "uncertainty"):
            for layer, leaves in (trees.get(kind) or {}).items():
                for field, leaf in zip(("p", "lam", "q"), leaves):
                    result[f"{when}/{kind}/{layer}/{field}"] = leaf
    return result


def check_gaps(name: str, case: Case, snapshots: list[Snapshot]) -> None:
    """Exit if rounding could decide what is pruned."""
    scores = None
    for step, snapshot in enumerate(snapshots):
        if snapshot.sensitivity is not None:
            scores = []
            for layer, sensitivity in snapshot.sensitivity.items():
                p, lam, q = (s * u for s, u in zip(sensitivity, snapshot.uncertainty[layer]))
                scores.extend(p.mean(-1) + lam + q.mean(-1))
            scores = np.sort(scores)[::-1]
        final = step == case.config["total_step"] - case.config["tfinal"]
        due = step % case.config.get("deltaT", 1) == 0 and snapshot.sensitivity is not None
        if snapshot.budget < len(scores) and (due or final):
            kept, dropped = scores[snapshot.budget - 1 : snapshot.budget + 1]
            if kept - dropped < GAP * kept:
                raise SystemExit(f"{name}: near tie at step {step}, take another seed")


if __name__ == "__main__":
    main()
