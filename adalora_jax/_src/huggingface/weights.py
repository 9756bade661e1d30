"""The weights of a Hugging Face checkpoint, by what the headers of its files say."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adalora_jax._src.huggingface.names import hf_names
from adalora_jax._src.tensorfile import Spec, TensorFile, inside, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_CONV1D = {"gpt2": frozenset(hf_names("gpt2").conv1d)}  # by model_type


@dataclasses.dataclass(frozen=True)
class Weights:
    """What is where in a checkpoint; nothing of it is read yet."""

    folder: Path
    files: dict[str, dict[str, Spec]]  # {file: {tensor: Spec}}
    metadata: dict[str, dict[str, str]]  # of each file
    index: dict[str, Any] | None  # of a sharded checkpoint

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """Of all tensors."""
        return {name: spec for specs in self.files.values() for name, spec in specs.items()}

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """The model's ``config.json``, if there is one."""
        there = (self.folder / "config.json").exists()
        return read_json(inside(self.folder, "config.json")) if there else None

    def file_of(self, tensor: str) -> str:
        """Returns the name of the file that has a tensor."""
        return next(name for name, specs in self.files.items() if tensor in specs)

    def find(self, key: str) -> str | None:
        """The tensor of that name; or of that name with or without a prefix, if there is one such.

        >>> weights = Weights(Path(), {"": {"bert.pooler.dense.weight": Spec("F32", ())}}, {}, None)
        >>> weights.find("pooler.dense.weight")
        'bert.pooler.dense.weight'
        """
        specs = self.specs
        if key in specs:
            return key
        near = [name for name in specs if key.endswith(f".{name}") or name.endswith(f".{key}")]
        return near[0] if len(near) == 1 else None

    def conv1d(self, modules: Iterable[str]) -> set[str]:
        """Those of the modules that are a Conv1D by what the config says the model is."""
        kind = (self.config or {}).get("model_type")
        known = _CONV1D.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
        return {name for name in modules if name.rpartition(".")[2] in known}


def read_weights(folder: Path, only: str | None = None) -> Weights:
    """Looks through the checkpoint in a folder, or through one safetensors file of it.

    Raises:
      FileNotFoundError: there are no safetensors files.
      ValueError: one is damaged or malicious, or the index contradicts them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: pass that of the base model.")
    index, places = None, None
    if only is None and (folder / INDEX).exists():
        path = inside(folder, INDEX)
        index = read_json(path)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{path} has no weight_map of tensors to files.")
        names = list(dict.fromkeys(map(str, places.values())))
        if wrong := [name for name in names if not name.endswith(".safetensors")]:
            raise ValueError(f"{path} names {wrong[0][:99]!r}, which is no safetensors file.")
    elif only is not None or (folder / SINGLE).exists():
        names = [only or SINGLE]
    else:
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}. Pickled weights are not opened here: "
            "load and save the base with transformers, which writes safetensors."
        )
    files, metadata = {}, {}
    for name in names:
        with TensorFile(inside(folder, name)) as file:
            files[name], metadata[name] = file.specs, file.metadata
    weights = Weights(folder, files, metadata, index)
    if places is not None:
        found = {tensor: name for name, specs in files.items() for tensor in specs}
        if found != places or len(found) != sum(map(len, files.values())):
            odd = sorted(t for t in {*found, *places} if found.get(t) != places.get(t))
            raise ValueError(
                f"{folder / INDEX} and the files it names differ in what is where: "
                f"{', '.join(repr(name[:99]) for name in odd[:3]) or 'a tensor is there twice'}."
            )
    return weights
