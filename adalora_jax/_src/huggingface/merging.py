"""Merging of adapters into a Hugging Face checkpoint of the base model, tensor by tensor."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adalora_jax._src.core import pytree
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.evaluation import rank_pattern
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.huggingface.files import read_adapter
from adalora_jax._src.huggingface.matrices import LowRankMatrix, common_scale, to_matrices
from adalora_jax._src.huggingface.names import Names, as_names, hf_names
from adalora_jax._src.huggingface.saved import saved_to_torch
from adalora_jax._src.huggingface.tying import Change, tied_to, untie, untied
from adalora_jax._src.huggingface.weights import INDEX, Weights, read_weights
from adalora_jax._src.tensorfile import (
    FLOATS,
    TensorFile,
    atomic_directory,
    atomic_write,
    folder_path,
    open_regular,
    resolve_within,
    spec_of,
    stream_tensors,
    to_bytes,
    writing_to,
)

# Weights in other formats are not copied, because they would be the base's, unmerged.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
_OTHER_WEIGHTS += (".onnx", ".onnx_data", ".ot", ".tflite")
# Families whose module names differ from their checkpoints' names in some version.
_RENAMED = (("vit", "vit_v4"), ("vit_v4", "vit"))


def merge_pretrained(
    adapter: str | os.PathLike[str] | Mapping[str, PyTree],
    base_directory: str | os.PathLike[str],
    out_directory: str | os.PathLike[str],
    *,
    config: AdaLoraConfig | None = None,
    masks: PyTree = None,
    names: Names = None,
    tied: bool | None = None,
    safe: bool = True,
    progress: Callable[[list[str]], Iterable[str]] | None = None,
) -> None:
    """Write the base model's checkpoint with the adapter's increments added to its weights.

    A merged weight is ``W + scale · pᵀ diag(λ) q`` (`AdaLoRA, Eq. (3)
    <https://arxiv.org/abs/2303.10512>`_), with the active triplets only. It is computed in at least
    float32 and rounded once, to the dtype of ``W``. Parameters of ``modules_to_save`` replace the
    base's, in its dtype, or are added. All other tensors are copied byte for byte, in as many files
    as the base has, and so are the folder's other files, except hidden ones and weights in other
    formats. One tensor of the base is in memory at a time. If the base ties its head to its
    embedding and the two differ after the merge, both are stored and ``config.json`` gets
    ``tie_word_embeddings: false``. ``out_directory`` is written atomically.

    Args:
      adapter: the folder of a PEFT adapter (AdaLoRA or LoRA) or its id on the Hub, as in
        :func:`load_pretrained <adalora_jax.huggingface.load_pretrained>`, or a dict of adapters as
        in :func:`save_pretrained <adalora_jax.huggingface.save_pretrained>`.
      base_directory: a folder with ``model.safetensors``, or with ``model.safetensors.index.json``
        and the files it names.
      out_directory: the folder to write, outside of ``base_directory``. It must not exist, or be
        empty.
      config: the run's config, for a dict of adapters; only its ``fan_in_fan_out`` is read.
      masks, names: for a dict of adapters, as in ``save_pretrained``.
      tied: whether a head that is not in the adapter, and that the base ties to an embedding which
        the adapter changes, changes with it (True) or keeps the base's weight (False). Without it,
        False for the folder of an adapter, as in PEFT; for a dict of adapters it must be passed in
        this case.
      safe: raise an error if a merged weight is not finite.
      progress: function that wraps the list of tensors during iteration, such as ``tqdm.tqdm``.

    Raises:
      TypeError: ``config`` is not an :class:`~adalora_jax.AdaLoraConfig`.
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged or malicious; an increment does not fit a weight of the base, or
        its Flax layer does not compute with the sum of weight and increment; a weight's dtype is
        not one of floating-point numbers; a merged weight is not finite (with ``safe``); the new
        value of a tied head cannot be determined; or ``out_directory`` is not empty or is inside of
        ``base_directory``.
      OSError: ``out_directory`` cannot be written.

    >>> import pathlib, tempfile
    >>> from adalora_jax import Adapter
    >>> from safetensors.numpy import load_file, save_file
    >>> adapter = Adapter(np.ones((4, 2)), np.ones(4), np.ones((4, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     base, out = pathlib.Path(folder, "base"), pathlib.Path(folder, "out")
    ...     base.mkdir()
    ...     weights = {"query.weight": np.zeros((2, 3), np.float32)}
    ...     save_file(weights, base / "model.safetensors")
    ...     merge_pretrained({"query": adapter}, base, out)
    ...     print(load_file(out / "model.safetensors")["query.weight"][0])
    [4. 4. 4.]
    """
    if config is not None:
        check_config(config)
    if isinstance(adapter, Mapping):
        _check_mergeable(adapter)
        names, scale = as_names(names), common_scale(adapter, 1.0)
        pattern = None if masks is None else rank_pattern(masks)
        matrices, _ = to_matrices(adapter, scale, pattern, names)
        saved = saved_to_torch(adapter, names)
        flagged = config is not None and config.fan_in_fan_out
        conv1d = {name for name in matrices if flagged or names.is_conv1d(name)}
    else:
        file = read_adapter(adapter)
        matrices, saved, scale = file.matrices, file.saved, file.config.scaling
        conv1d = set(matrices) if file.config.fan_in_fan_out else set()
        tied = bool(tied)  # PEFT does not change the head.
    base = read_weights(folder_path("base_directory", base_directory))
    out = folder_path("out_directory", out_directory)
    if out.resolve().is_relative_to(base.folder.resolve()):
        raise ValueError(
            f"`out_directory={str(out)!r}`: is inside the base's folder; name another folder."
        )
    conv1d |= base.conv1d(matrices)
    active = {name: matrix.active() for name, matrix in matrices.items() if matrix.mask.any()}
    changes = _changes(base, active, saved, conv1d)
    settings = untied(base.config or {}) if untie(base, changes, tied) else None
    with writing_to("out_directory", out_directory), atomic_directory(out) as folder:
        _copy_others(base, folder, settings)
        _write(base, changes, scale, folder, safe, progress or (lambda tensors: tensors))


def _check_mergeable(adapters: Mapping[str, PyTree]) -> None:
    """Raise if an adapter's Flax layer does not compute with the sum of weight and increment."""
    for path, adapter in pytree.adapters(adapters).items():
        note = adapter.layout.note if adapter.layout else ""
        if note:
            raise ValueError(
                f"`adapter`: the increment of {path!r} cannot be merged: {note}; if the PyTorch "
                "model does compute with the sum, write the adapter with save_pretrained and merge "
                "its folder."
            )


def _changes(
    base: Weights,
    matrices: Mapping[str, LowRankMatrix],
    saved: Mapping[str, np.ndarray],
    conv1d: set[str],
) -> dict[str, Change]:
    """Return the changes by tensor of the base, with names, shapes and dtypes checked."""
    specs = base.specs
    changes: dict[str, Change] = {}
    for name, matrix in matrices.items():
        key = next(filter(None, (base.find(f"{n}.weight") for n in _names(name))), None)
        source = tied_to(base, f"{name}.weight") if key is None else None
        if key is None and source is None:
            near = difflib.get_close_matches(f"{name}.weight", specs, 3, 0.3)
            raise ValueError(
                f"`{base.folder}`: has no weight for {name!r}, and the nearest names are "
                f"{', '.join(near) or 'none'}; pass the base that the adapter was trained for."
            )
        key, stored = key or f"{name}.weight", source or key or ""
        shape, ins, outs = specs[stored].shape, matrix.q.shape[1], matrix.p.shape[1]
        straight = len(shape) >= 2 and shape[0] == outs and math.prod(shape[1:]) == ins
        matches_transposed = shape == (ins, outs)
        if not straight and not matches_transposed:
            raise ValueError(
                f"`adapter`: {name!r} is for {ins} inputs and {outs} outputs, but {stored!r} of "
                f"the base has shape {list(shape)}; pass the base that the adapter was trained for."
            )
        if specs[stored].dtype not in FLOATS:
            raise ValueError(
                f"`{base.folder}`: {stored!r} has dtype {specs[stored].dtype}, which cannot be "
                "merged into; pass a base with floating-point weights."
            )
        is_transposed = matches_transposed and (not straight or name in conv1d)
        changes[key] = Change(matrix, is_transposed, source=source)
    for name, value in saved.items():
        key = base.find(name) or name
        if key in changes:
            raise ValueError(
                f"`adapter`: {key!r} has both an adapter and a saved value; remove one of the two."
            )
        spec = specs.get(key)
        if spec is not None and (spec.shape != value.shape or spec.dtype not in FLOATS):
            raise ValueError(
                f"`adapter`: {name!r} has shape {list(value.shape)}, but {key!r} of the base is a "
                f"{spec.dtype} tensor of shape {list(spec.shape)}; pass the base that the adapter "
                "was trained for."
            )
        changes[key] = Change(value=value if spec is None else value.astype(FLOATS[spec.dtype]))
    return changes


def _names(module: str) -> list[str]:
    """Return the names that a module may have in a checkpoint."""
    result = [module]
    for one, other in _RENAMED:
        for prefix in (None, ""):
            with contextlib.suppress(ValueError):
                place = hf_names(one, prefix=prefix).to_flax(module)[0][0]
                result.append(hf_names(other, prefix=prefix).to_hf(place.path)[0][0])
    return result


def _write(
    base: Weights,
    changes: Mapping[str, Change],
    scale: float,
    folder: Path,
    safe: bool,
    progress: Callable[[list[str]], Iterable[str]],
) -> None:
    files = {name: dict(specs) for name, specs in base.files.items()}
    last = next(reversed(files))
    for name, change in changes.items():
        if change.source is not None:
            files[base.file_of(change.source)][name] = base.specs[change.source]
        elif name not in base.specs and change.value is not None:
            files[last][name] = spec_of(change.value)
    steps = iter(progress([tensor for specs in files.values() for tensor in specs]))
    for name, specs in files.items():
        with (
            TensorFile(resolve_within(base.folder, name)) as source,
            atomic_write(folder / name) as target,
        ):

            def data(tensor: str, source: TensorFile = source) -> Iterator[bytes]:
                next(steps, None)
                change = changes.get(tensor, Change())
                if change.matrix is not None:
                    weight = source.read(change.source or tensor)
                    yield to_bytes(_merged(weight, change, change.matrix, scale, tensor, safe))
                elif change.value is not None:
                    yield to_bytes(change.value)
                else:
                    yield from source.chunks(change.source or tensor)

            stream_tensors(target, specs, data, base.metadata[name])
    next(steps, None)  # Exhausting the iterator closes a progress bar.
    if base.index is not None:
        places = {tensor: name for name, specs in files.items() for tensor in specs}
        size = sum(spec.nbytes for specs in files.values() for spec in specs.values())
        about = base.index.get("metadata")
        about = {**(about if isinstance(about, dict) else {}), "total_size": size}
        with atomic_write(folder / INDEX) as target:
            target.write(json.dumps({"metadata": about, "weight_map": places}, indent=2).encode())


def _merged(
    weight: np.ndarray, change: Change, matrix: LowRankMatrix, scale: float, name: str, safe: bool
) -> np.ndarray:
    """Return ``W + s · pᵀ diag(λ) q``, rounded once to the dtype of W."""
    wide = np.promote_types(weight.dtype, np.float32)
    p, lam, q = (leaf.astype(wide) for leaf in matrix[:3])
    delta = (p * (lam * wide.type(scale))[:, None]).T @ q
    delta = delta.T if change.transposed else delta.reshape(weight.shape)
    with np.errstate(over="ignore"):
        merged = (weight.astype(wide) + delta).astype(weight.dtype)
    if safe and not np.isfinite(merged.astype(wide)).all():
        raise ValueError(
            f"`adapter`: the merged weight {name!r} is not finite in {weight.dtype}; check the "
            "adapter, or convert the base to a wider dtype."
        )
    return merged


def _copy_others(base: Weights, folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Copy the files of a checkpoint, except weights and hidden ones.

    Args:
      base: the checkpoint.
      folder: the destination.
      settings: the content of the new ``config.json``; None to copy the base's.

    Raises:
      ValueError: a link points out of the checkpoint's folder.
    """
    for root, folders, names in os.walk(base.folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        subfolder = Path(root).relative_to(base.folder)
        for name in sorted(names):
            path = subfolder / name
            if name.startswith(".") or name.endswith((*_OTHER_WEIGHTS, ".index.json")):
                continue
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
            source = open_regular(resolve_within(base.folder, path.as_posix()))
            with source, atomic_write(folder / path) as target:
                if settings is not None and path.as_posix() == "config.json":
                    target.write(f"{json.dumps(settings, indent=2)}\n".encode())
                else:
                    shutil.copyfileobj(source, target)
