"""The command line of the demo: ``python -m adalora_jax.demo --help``."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
import time
from collections.abc import Sequence

_MIN_STEPS = 10  # fewer leave no room for warm-up, pruning and the final phase


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo with these arguments, those of the command line by default."""
    arguments = _parser().parse_args(argv)
    started = time.perf_counter()
    try:
        from adalora_jax.demo import report, train
    except ModuleNotFoundError as error:
        sys.exit(f'{error.name} is missing: pip install "adalora-jax[demo]" brings it.')
    framework = importlib.import_module(f"adalora_jax.demo.in_{arguments.framework}")
    runs = train.compare(framework, arguments.steps, arguments.seed)
    picture = report.save_picture(runs, arguments.out)
    print(f"\n{report.accuracy_table(runs)}\n\n{report.rank_table(runs)}\n")
    print(f"The rank of every adapter over time: {picture}")
    print(f"{time.perf_counter() - started:.0f} seconds in all.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adalora_jax.demo",
        description="Pre-trains a small Vision Transformer on the handwritten digits 0-4 and "
        "adapts it to 5-9: frozen base, LoRA, AdaLoRA, full fine-tuning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--framework", choices=["linen", "nnx"], default="linen", help="which side of Flax")
    option("--steps", type=_integer(_MIN_STEPS, 10**6), default=300, help="of each training run")
    option("--seed", type=_integer(0, 2**32 - 1), default=0, help="of the split and the weights")
    option("--out", type=_folder, default="adalora-demo", help="folder for the picture")
    return parser


def _integer(lowest: int, highest: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not an integer from {lowest} to {highest}"
            )
        return value

    return parse


def _folder(text: str) -> pathlib.Path:
    """A folder that exists from now on, so that a wrong one is refused before any training."""
    try:
        pathlib.Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no folder can be made at {text!r}: {error}") from None
    return pathlib.Path(text)


if __name__ == "__main__":
    main()
