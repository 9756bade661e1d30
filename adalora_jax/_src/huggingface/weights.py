"""The tensors of a Hugging Face checkpoint, as the headers of its files describe them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adalora_jax._src.huggingface.names import hf_names
from adalora_jax._src.tensorfile import Spec, TensorFile, read_json, resolve_within

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_CONV1D = {"gpt2": frozenset(hf_names("gpt2").conv1d)}  # by model_type


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensor headers of a checkpoint; no tensor is read yet."""

    folder: Path
    files: dict[str, dict[str, Spec]]  # {file: {tensor: Spec}}
    metadata: dict[str, dict[str, str]]  # {file: its header's metadata}
    index: dict[str, Any] | None  # the index of a sharded checkpoint; None for a single file

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """The specs of all tensors, by name."""
        return {name: spec for specs in self.files.values() for name, spec in specs.items()}

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """The content of the model's ``config.json``; None if that file does not exist."""
        exists = (self.folder / "config.json").exists()
        return read_json(resolve_within(self.folder, "config.json")) if exists else None

    def file_of(self, tensor: str) -> str:
        """Return the name of the file that stores a tensor."""
        return next(name for name, specs in self.files.items() if tensor in specs)

    def find(self, key: str) -> str | None:
        """Return the name of the tensor ``key``, or of the only one that differs by a prefix.

        Returns:
          ``key`` itself if such a tensor exists; otherwise the single name that is ``key`` with
          leading components added or removed; None if no name or several names match.

        >>> files = {"": {"bert.pooler.dense.weight": Spec("F32", (), 4)}}
        >>> weights = Weights(Path(), files, {}, None)
        >>> weights.find("pooler.dense.weight")
        'bert.pooler.dense.weight'
        """
        specs = self.specs
        if key in specs:
            return key
        near = [name for name in specs if key.endswith(f".{name}") or name.endswith(f".{key}")]
        return near[0] if len(near) == 1 else None

    def conv1d(self, modules: Iterable[str]) -> set[str]:
        """Return the modules that are a Conv1D in a model of the config's ``model_type``."""
        kind = (self.config or {}).get("model_type")
        known = _CONV1D.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
        return {name for name in modules if name.rpartition(".")[2] in known}


def read_weights(folder: Path, only: str | None = None) -> Weights:
    """Read the headers of the checkpoint in a folder, or of one of its safetensors files.

    Args:
      folder: the checkpoint's folder.
      only: the name of the one file to read; None for the whole checkpoint.

    Raises:
      FileNotFoundError: ``folder`` does not exist, or a safetensors file is missing.
      ValueError: a file is damaged or malicious, or the index contradicts the files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}`: is not a folder; pass the base model's folder.")
    index, places = None, None
    if only is None and (folder / INDEX).exists():
        path = resolve_within(folder, INDEX)
        index = read_json(path)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(
                f"`{path}`: has no weight_map from tensors to files; save the base with "
                "transformers."
            )
        names = list(dict.fromkeys(map(str, places.values())))
        if wrong := [name for name in names if not name.endswith(".safetensors")]:
            raise ValueError(
                f"`{path}`: names {wrong[0][:99]!r}, which is not a safetensors file; save the "
                "base with transformers, which writes safetensors."
            )
    elif only is not None or (folder / SINGLE).exists():
        names = [only or SINGLE]
    else:
        raise FileNotFoundError(
            f"`{folder}`: has neither {SINGLE} nor {INDEX}, and pickled weights are not opened "
            "here; load the base with transformers and save it, which writes safetensors."
        )
    files, metadata = {}, {}
    for name in names:
        with TensorFile(resolve_within(folder, name)) as file:
            files[name], metadata[name] = file.specs, file.metadata
    weights = Weights(folder, files, metadata, index)
    if places is not None:
        found = {tensor: name for name, specs in files.items() for tensor in specs}
        if found != places or len(found) != sum(map(len, files.values())):
            odd = sorted(t for t in {*found, *places} if found.get(t) != places.get(t))
            raise ValueError(
                f"`{folder / INDEX}`: contradicts the files it names: "
                f"{', '.join(repr(name[:99]) for name in odd[:3]) or 'a tensor is in two files'}; "
                "save the base again with transformers."
            )
    return weights
