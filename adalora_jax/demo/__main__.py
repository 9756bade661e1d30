"""Command line of the demo: ``python -m adalora_jax.demo --help``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

PICTURE = "ranks.png"
_INTERRUPTED = 130  # the shells' exit status for SIGINT
_MIN_STEPS = 10  # fewer are too few for warm-up, pruning and the final phase


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo with the arguments ``argv``, by default those of the command line."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except ModuleNotFoundError as error:
        sys.exit(f'{error.name} is missing: install it with pip install "adalora-jax[demo]".')
    except KeyboardInterrupt:
        print("\ninterrupted: no picture was drawn", file=sys.stderr, flush=True)
        sys.exit(_INTERRUPTED)


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    # Imported here, because they need the packages of the extra ``demo``.
    from adalora_jax.demo import report, train

    framework = importlib.import_module(f"adalora_jax.demo.in_{arguments.framework}")
    runs = train.compare(framework, arguments.steps, arguments.seed)
    print(f"\n{report.accuracy_table(runs)}\n\n{report.rank_table(runs)}\n")
    picture = arguments.out / PICTURE
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report.save_picture(runs, picture)
    except OSError as error:
        sys.exit(f"error: {picture} cannot be written: {error.strerror}")
    print(f"picture of the ranks during training: {picture}")
    print(f"{time.perf_counter() - started:.0f} seconds in all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adalora_jax.demo",
        description="Pre-trains a small Vision Transformer on the handwritten digits 0-4 and "
        "adapts it to 5-9: frozen base, LoRA, AdaLoRA, full fine-tuning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--framework", choices=["linen", "nnx"], default="linen", help="Flax API of the model")
    option("--steps", type=_integer(_MIN_STEPS, 10**6), default=300, help="steps per run")
    option("--seed", type=_integer(0, 2**32 - 1), default=0, help="seed of the split and weights")
    option("--out", type=_folder, default="adalora-demo", help="folder for the picture")
    return parser


def _integer(lowest: int, highest: int) -> Callable[[str], int]:
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
    """Return the path of a folder, after a check that a picture can be written to it.

    The check runs before training. Folders that it creates are removed again, so that none remain
    if the demo is interrupted.

    Raises:
      argparse.ArgumentTypeError: no picture can be written.
    """
    folder = pathlib.Path(text)
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if (picture := folder / PICTURE).exists():
            picture.open("r+b").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"no picture can be written to {text!r}: {error.strerror}; name another folder"
        ) from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it was not created, or has files of others by now
                path.rmdir()
    return folder


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:
            os._exit(_INTERRUPTED)  # after an interrupted compilation, a normal exit may crash
        raise
