"""The command line ``python -m adalora_jax``: advice before training, inspection and export."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from adalora_jax._src import advice
from adalora_jax._src.core import compaction, evaluation, pytree
from adalora_jax._src.core.config import AdaLoraConfig


class Found(NamedTuple):
    """Adapters read from a folder in any supported format."""

    description: str
    adapters: dict[str, Any]
    masks: Any
    config: AdaLoraConfig
    step: int | None = None  # of a checkpoint
    budget: int | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command with these arguments, by default those of the command line."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ModuleNotFoundError as error:
        sys.exit(f'{error.name} is missing: install it with pip install "adalora-jax[cli]".')
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # the shells' exit status for SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adalora_jax",
        description="Advise before training, inspect and export adapters.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "folder",
        type=pathlib.Path,
        metavar="DIR",
        help="a checkpoint of adalora_jax, a folder of its CheckpointManager (the last step is "
        "read), or an AdaLoRA or LoRA adapter of Hugging Face PEFT",
    )
    before = commands.add_parser(
        "advise", help="compare training data with adapters, and print settings to start with"
    )
    advice.add_options(before)
    look = commands.add_parser(
        "inspect", parents=[folder], help="print ranks, budget, sizes and step"
    )
    look.set_defaults(run=lambda arguments: print(_description(arguments.folder)))
    export = commands.add_parser(
        "export", parents=[folder], help="write the adapters in another format"
    )
    option = export.add_argument
    option(
        "--to",
        required=True,
        choices=["peft", "lora", "merged"],
        help="peft: an AdaLoRA adapter of PEFT; lora: a plain LoRA adapter, with λ multiplied "
        "into it; merged: the base model's checkpoint with the increments added to its weights",
    )
    option("--out", required=True, type=pathlib.Path, help="the folder to write, new or empty")
    option(
        "--names",
        type=_names,
        help="the layers' names in PyTorch: a family such as bert or llama, or a JSON file with "
        "{name in Flax: name in PyTorch}; by default the names in Flax, with dots",
    )
    option("--base", type=pathlib.Path, help="for merged: the base model's folder (safetensors)")
    option("--base-model", help="for peft and lora: the base model's name, for the config")
    option("--task-type", help="for peft and lora: PEFT's task type, such as CAUSAL_LM")
    export.set_defaults(run=_export)
    return parser


def _names(text: str) -> Any:
    if not text.endswith(".json"):
        return text
    try:
        return dict(json.loads(pathlib.Path(text).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def _find(folder: pathlib.Path) -> Found:
    """Read the adapters in a folder.

    Raises:
      ValueError, FileNotFoundError: it holds none.
    """
    # An interrupted save may have left only the weights; load_pretrained handles that.
    if any((folder / f"adapter_{name}").is_file() for name in ("config.json", "model.safetensors")):
        from adalora_jax import huggingface

        loaded = huggingface.load_pretrained(folder)
        return Found("adapter of PEFT", loaded.adapters, loaded.masks, loaded.config)
    from adalora_jax import checkpoint

    steps = [f for f in folder.glob("*") if f.name.isdecimal() and (f / "adalora").is_dir()]
    saved = checkpoint.restore(max(steps, key=lambda f: int(f.name)) if steps else folder)
    description = f"checkpoint of adalora_jax {saved.version}"
    masks, budget = saved.allocator.masks, int(saved.allocator.budget)
    return Found(description, saved.adapters, masks, saved.config, saved.step, budget)


def _description(folder: pathlib.Path) -> str:
    """Return the text that ``inspect`` prints."""
    found = _find(folder)
    adapters, config = pytree.adapters(found.adapters), found.config
    active = sum(evaluation.ranks(found.masks).values())
    whole = sum(adapter.lam.size for adapter in adapters.values())
    nbytes = sum(leaf.nbytes for adapter in adapters.values() for leaf in adapter)
    stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    budget = "" if found.budget is None else f", budget {found.budget}"
    lines = [
        f"{found.description} in {folder}",
        f"{compaction.summary(adapters, found.masks)}",
        f"triplets: {active} of {whole} active{budget}",
        f"config: init_r {config.init_r}, target_r {config.target_r}, scale {config.scaling:.4g}",
        f"size: {nbytes:,} bytes of adapters; {stored:,} bytes on disk",
    ]
    if found.step is not None:
        lines.append(f"step: {found.step} of {config.total_step}, {_phase(found.step, config)}")
    leaves = jax.tree_util.tree_flatten_with_path(found.adapters, is_leaf=pytree.is_adapter)[0]
    others = [pytree.leaf_name(path) for path, node in leaves if not pytree.is_adapter(node)]
    if others:
        lines.append(f"also trained: {', '.join(sorted(others))}")
    return "\n".join(lines)


def _phase(step: int, config: AdaLoraConfig) -> str:
    """Return the phase of a run after ``step`` updates."""
    if step <= config.tinit + 1:
        return "in the warm-up"
    return "in the final phase" if step > config.final_step else "while the budget changes"


def _export(arguments: argparse.Namespace) -> None:
    from adalora_jax import huggingface

    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`--out {out}`: exists and is not an empty folder; name another folder.")
    if (arguments.to == "merged") != (arguments.base is not None):
        if arguments.base is None:
            raise ValueError("`--to merged`: needs --base; pass the base model's folder.")
        raise ValueError(f"`--base {arguments.base}`: is only for --to merged; leave it out.")
    if arguments.to == "merged":
        for name in ("base_model", "task_type"):
            if (value := getattr(arguments, name)) is not None:
                option = f"--{name.replace('_', '-')} {value}"
                raise ValueError(f"`{option}`: is only for --to peft and --to lora; leave it out.")
    found = _find(arguments.folder)
    common = {"masks": found.masks, "names": arguments.names}
    if arguments.to == "merged":
        import tqdm

        bar = functools.partial(tqdm.tqdm, unit="tensor", desc="merging")
        huggingface.merge_pretrained(
            *(found.adapters, arguments.base, out), config=found.config, progress=bar, **common
        )
    else:
        write = huggingface.save_pretrained if arguments.to == "peft" else huggingface.save_as_lora
        about = {"base_model": arguments.base_model, "task_type": arguments.task_type}
        write(out, found.adapters, found.config, **common, **about)
    print(f"{arguments.to}: {out}")


if __name__ == "__main__":
    main()
