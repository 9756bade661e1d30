"""The two files of a PEFT adapter: validated when read, replaced atomically when written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.huggingface.matrices import LowRankMatrix
from adalora_jax._src.tensorfile import (
    FLOATS,
    MAX_JSON,
    TensorFile,
    atomic_write,
    digest,
    folder_path,
    leftovers,
    read_json,
    resolve_within,
    save_tensors,
    sync_folder,
    temporary_path,
    writing_to,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_PREVIOUS = f".{CONFIG}.previous.tmp"  # the old config, until the new weights are in place
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([ABE])(\.weight)?")
# Key components of a raw state dict that PEFT's save_pretrained removes.
_RAW = re.compile(
    r"\.(?:lora_[ABE]|modules_to_save)\.(?!weight$|bias$)([^.\s/]{1,99})(?:\.|$)"
    r"|\.(?:original_module|base_layer)\."
)
_HUB_ID = re.compile(r"[a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*", re.ASCII)  # owner/name
_MOST = 2**31 - 1
_LONGEST = 256  # characters of a module's name, which name maps match with regexes

# Config keys by the type of their values. AdaLoraConfig checks the values themselves.
_INTEGERS = {"r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step"}
_NUMBERS = {"lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight"}
_FLAGS = {"fan_in_fan_out", "use_dora", "use_rslora", "lora_bias", "inference_mode"}
_NAMES = {"target_modules", "exclude_modules", "modules_to_save", "layers_pattern"}
_TEXTS = {"peft_type", "task_type", "bias", "base_model_name_or_path", "revision"}
# Options of plain LoRA that change its computation, with the values that mean "not used".
_LORA_UNSUPPORTED = {
    "bias": ("none",),
    "ensure_weight_tying": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "arrow_config": (),
    "monteclora_config": (),
    "kasa_config": (),
    "alora_invocation_tokens": ([],),
}
# Initialisations that subtract the initial increment from the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# LoRA's other keys: either read here, or relevant only for training and PEFT's bookkeeping.
_LORA_KNOWN = _INTEGERS | _NUMBERS | _FLAGS | _NAMES | _TEXTS | set(_LORA_UNSUPPORTED)
_LORA_KNOWN |= {"rank_pattern", "alpha_pattern", "layers_to_transform", "init_lora_weights"}
_LORA_KNOWN |= {"auto_mapping", "peft_version", "runtime_config", "qalora_group_size"}
_LORA_KNOWN |= {"megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"}
_LORA_KNOWN |= {"lora_ga_config", "velora_config"}


class AdapterFile(NamedTuple):
    """The content of a PEFT adapter's folder, with the names of the PyTorch model."""

    config: AdaLoraConfig
    matrices: dict[
        str, LowRankMatrix
    ]  # by module; the increment is config.scaling · pᵀ diag(lam) q
    saved: dict[str, np.ndarray]  # by parameter: those of modules_to_save
    patterns: dict[str, list[bool]]  # PEFT's rank_pattern, by module; empty if it is not set
    kernels: dict[str, tuple[int, ...]]  # kernel sizes by module, where the shapes contain them


def read_adapter(directory: str | os.PathLike[str], revision: str | None = None) -> AdapterFile:
    """Read an AdaLoRA or plain LoRA adapter that PEFT wrote, from a folder or from the Hub.

    Args:
      directory: a folder, or the adapter's id on the Hub.
      revision: a branch, tag or commit on the Hub.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged or malicious, contradicts the other one, or uses an unsupported
        option (the message names the file).
    """
    folder = folder_path("directory", directory)
    if isinstance(directory, str) and _HUB_ID.fullmatch(directory) and not os.path.lexists(folder):
        folder = _download(directory, revision)
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}`: is not a folder; pass the folder that has {CONFIG}.")
    if not (folder / WEIGHTS).exists():
        _check_pickles(folder)
    path = resolve_within(folder, _config_name(folder))
    stored = read_json(path)
    settings = {key: value for key, value in stored.items() if value is not None}
    if "peft_type" not in settings:
        raise ValueError(
            f"`{path}`: has no peft_type, so it is not the config of a PEFT adapter; pass the "
            "folder that save_pretrained wrote."
        )
    try:
        _check_types(settings)
        kind = str(settings["peft_type"]).upper()
        if kind not in ("ADALORA", "LORA"):
            raise ValueError(
                f"`peft_type={kind[:99]!r}`: must be 'ADALORA' or 'LORA'; pass the folder of an "
                "AdaLoRA or LoRA adapter."
            )
        if kind == "ADALORA" and "total_step" not in settings:
            raise ValueError(
                f"`total_step`: is {'null' if 'total_step' in stored else 'missing'}, but AdaLoRA "
                "needs it; set it in the file to the number of optimizer steps of the training."
            )
        config = AdaLoraConfig.from_peft(settings) if kind == "ADALORA" else None
        if config is None:
            _check_lora(settings)
    except ValueError as error:
        raise ValueError(f"`{path}`: {str(error)[:500]}") from None
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"`{path}`: has an invalid value, {str(error)[:200]}; save the adapter again with PEFT."
        ) from None
    with TensorFile(resolve_within(folder, WEIGHTS), MAX_JSON) as file:
        layout, saved = _layout(file, kind)
        tensors = {name: file.read(name) for name in file.specs}
        if (
            not file.is_current()
            or read_json(resolve_within(folder, _config_name(folder))) != stored
        ):
            raise ValueError(f"`{folder}`: changed while it was read; read it again.")
    try:
        factors = {
            name: [tensors[keys[letter]] for letter in ("A", "B", "E") if letter in keys]
            for name, keys in layout.items()
        }
        trained = {name: tensors[key] for name, key in saved.items()}
        if config is None:
            return _lora(settings, factors, trained)
        return _adalora(config, factors, trained)
    except ValueError as error:
        raise ValueError(f"`{folder}`: {error}") from None


def _download(name: str, revision: str | None) -> Path:
    """Return the folder in the cache with an adapter's two files from the Hub.

    Raises:
      FileNotFoundError: ``huggingface_hub`` is missing, or the files cannot be downloaded.
    """
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"`{name}`: is not a folder; pass the folder that has {CONFIG}, or pip install "
            "huggingface_hub to read an adapter by its id on the Hub."
        ) from None
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=[CONFIG, WEIGHTS]
            )
        )
    except (OSError, ValueError) as error:  # an invalid id is a ValueError
        raise FileNotFoundError(
            f"`{name}`: is not a folder, and could not be downloaded from the Hub: "
            f"{str(error)[:500]}; pass the folder that has {CONFIG}, or the id of an adapter."
        ) from error
    if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).exists()]:
        raise FileNotFoundError(
            f"`{name}`: is a repository on the Hub without {' and '.join(missing)}; pass the id of "
            f"an adapter that has both, or load it with PEFT and save it, which writes {WEIGHTS}."
        )
    return folder


def write_adapter(
    directory: str | os.PathLike[str],
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Write the two files of an adapter, replacing an existing adapter atomically.

    Even if the process is killed, :func:`read_adapter` reads either the complete old adapter or the
    complete new one. The folder never contains an ``adapter_config.json`` that belongs to other
    weights, so PEFT never reads a mismatched pair. Only one process at a time may write to it.

    Raises:
      ValueError: the config is too large, or a tensor has an unsupported dtype.
      OSError: the folder cannot be written.
    """
    folder = folder_path("directory", directory)
    # Only the top level is sorted: the order of a pattern's keys is significant.
    text = json.dumps(dict(sorted(settings.items())), indent=2, allow_nan=False) + "\n"
    if len(text) > MAX_JSON:
        raise ValueError(
            f"`{folder / CONFIG}`: would have {len(text)} characters, but at most {MAX_JSON} can "
            "be read; shorten rank_pattern."
        )
    with writing_to("directory", directory):
        folder.mkdir(parents=True, exist_ok=True)
        _complete_or_undo(folder)
        try:
            weights = temporary_path(folder / WEIGHTS)
            with atomic_write(weights) as file:
                save_tensors(file, tensors)
            with atomic_write(folder / _pending(weights)) as file:
                file.write(text.encode())
            if (folder / CONFIG).exists():
                os.replace(folder / CONFIG, folder / _PREVIOUS)
            sync_folder(folder)
            os.replace(weights, folder / WEIGHTS)  # From here on readers see the new adapter.
            sync_folder(folder)
        except BaseException:
            # Report the original error; the next save calls _complete_or_undo again.
            with contextlib.suppress(OSError):
                _complete_or_undo(folder)
            raise
        _complete_or_undo(folder)


def _complete_or_undo(folder: Path) -> None:
    """Complete or roll back an interrupted save, and remove temporary files.

    The save is completed if its weights are in place.
    """
    name = _config_name(folder)
    if name != CONFIG:
        os.replace(folder / name, folder / CONFIG)
        sync_folder(folder)
    for path in [*leftovers(folder / CONFIG), *leftovers(folder / WEIGHTS)]:
        path.unlink(missing_ok=True)


def _config_name(folder: Path) -> str:
    """Return the name of the config that belongs to the weights.

    This is ``adapter_config.json``, unless a save is in progress or was interrupted and that file
    is absent. Then it is the new config, whose name contains the digest of its weights, if those
    are in place, and otherwise the previous config.
    """
    kept = {path.name for path in leftovers(folder / CONFIG)}
    if not kept or os.path.lexists(folder / CONFIG):
        return CONFIG
    if (folder / WEIGHTS).exists() and (name := _pending(resolve_within(folder, WEIGHTS))) in kept:
        return name
    return _PREVIOUS if _PREVIOUS in kept else CONFIG


def _pending(weights: Path) -> str:
    return f".{CONFIG}.{digest(weights)}.tmp"


def _check_pickles(folder: Path) -> None:
    found = [name for name in _PICKLES if (folder / name).exists()]
    if found:
        raise ValueError(
            f"`{folder / found[0]}`: is a pickle, which could run any code and is not opened here; "
            "if you trust it, convert it with PEFT, PeftModel.from_pretrained(base_model, "
            "directory).save_pretrained(other_directory)."
        )
    raise FileNotFoundError(
        f"`{folder / WEIGHTS}`: does not exist; pass the folder that save_pretrained wrote."
    )


def _check_types(settings: Mapping[str, Any]) -> None:
    """Raise if a value's type is not PEFT's, or a number is too large or not finite."""
    for key, value in settings.items():
        if not key.isprintable() or len(key) > _LONGEST:
            raise ValueError(
                f"`{key[:99]!r}`: must be a printable key of at most {_LONGEST} characters; save "
                "the adapter again with PEFT."
            )
        if key in _INTEGERS:
            good, kind = _is_integer(value), "an integer"
        elif key in _NUMBERS:
            good, kind = _is_number(value), "a number"
        elif key in _FLAGS:
            good, kind = isinstance(value, bool), "true or false"
        elif key in _TEXTS:
            good, kind = isinstance(value, str), "a string"
        elif key in _NAMES:
            good = isinstance(value, str) or _all(value, lambda v: isinstance(v, str))
            kind = "a string or a list of strings"
        elif key == "layers_to_transform":
            good, kind = _is_integer(value) or _all(value, _is_integer), "an integer or a list"
        elif key == "init_lora_weights":
            good, kind = isinstance(value, (bool, str)), "true, false or a string"
        elif key in ("rank_pattern", "alpha_pattern"):
            good, kind = isinstance(value, dict), "an object"
        else:
            continue
        if not good:
            raise ValueError(
                f"`{key}={str(value)[:99]!r}`: must be {kind}; save the adapter again with PEFT."
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _all(values: object, test: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(test, values))


def _layout(file: TensorFile, kind: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return ``{module: {A, B, E: tensor}}`` and ``{parameter: tensor}`` of tensor names.

    Raises:
      ValueError: a name, shape or dtype is not that of PEFT's format, or a factor is missing.
    """
    layout: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for key, spec in file.specs.items():
        found = _KEY.fullmatch(key)
        name = found[1] if found else key.removeprefix(PREFIX)
        if stray := _RAW.search(key):
            raise ValueError(
                f"`{file.path}`: {key[:_LONGEST]!r} is from a raw state dict, with "
                + (f"the adapter's name {stray[1]!r}" if stray[1] else "PEFT's wrappers")
                + " in its keys; save with the save_pretrained of PEFT, which removes it, or "
                "rename the keys."
            )
        levels = re.fullmatch(r"[^\s/\\.]+(\.[^\s/\\.]+)*", name[:_LONGEST])
        if not key.startswith(PREFIX) or not levels or len(name) > _LONGEST:
            raise ValueError(
                f"`{file.path}`: {key[:99]!r} is not the name of a tensor in PEFT's format, "
                f"{PREFIX}<module>.<tensor>; save the adapter again with PEFT."
            )
        if spec.dtype not in FLOATS:
            raise ValueError(
                f"`{file.path}`: {key!r} has dtype {spec.dtype}, but only {', '.join(FLOATS)} can "
                "be computed with; convert or dequantise it first."
            )
        if found and bool(found[3]) == (kind == "LORA"):
            layout.setdefault(name, {})[found[2]] = key
        elif ".lora_" in key:
            raise ValueError(
                f"`{file.path}`: {key!r} is not a tensor of {kind}, and embeddings, DoRA and "
                "biases of adapters cannot be read; merge the adapter with PEFT."
            )
        else:
            saved[name] = key
    letters = set("AB") if kind == "LORA" else set("ABE")
    for name, keys in layout.items():
        if set(keys) != letters:
            present, required = (
                ", ".join(f"lora_{x}" for x in sorted(xs)) for xs in (keys, letters)
            )
            raise ValueError(
                f"`{file.path}`: {name!r} has {present}, but must have {required}; save the "
                "adapter again with PEFT."
            )
        shapes = {letter: file.specs[key].shape for letter, key in keys.items()}
        a, b, e = shapes["A"], shapes["B"], shapes.get("E")
        axes = len(a) == len(b) == 2 or (kind == "LORA" and len(a) == len(b) > 2)
        if not axes or b[1] != a[0] or any(n != 1 for n in b[2:]) or e not in (None, (a[0], 1)):
            raise ValueError(
                f"`{file.path}`: {name!r} has factors of shapes {shapes}, but A must be [r, in], B "
                "[out, r] and E [r, 1]; save the adapter again with PEFT."
            )
    if not layout:
        raise ValueError(
            f"`{file.path}`: contains no adapter of peft_type {kind!r}; pass the folder that "
            "save_pretrained wrote."
        )
    return layout, saved


def _adalora(
    config: AdaLoraConfig, factors: Mapping[str, list[np.ndarray]], saved: dict[str, np.ndarray]
) -> AdapterFile:
    patterns = {
        path.replace("/", "."): np.array(keep, bool) for path, keep in config.rank_pattern or ()
    }
    if unknown := sorted(set(patterns) - set(factors)):
        raise ValueError(
            f"`rank_pattern`: names {unknown[0]!r}, which has no tensors in {WEIGHTS}; save the "
            "adapter again with PEFT."
        )
    matrices = {}
    for name, (a, b, e) in factors.items():
        rows, pattern = len(a), patterns.get(name)
        if pattern is None and rows != config.init_r:
            raise ValueError(
                f"`init_r={config.init_r}`: {name!r} has rank {rows}, and rank_pattern has no "
                "entry for it; save the adapter again with PEFT."
            )
        if pattern is not None and (
            pattern.ndim != 1
            or len(pattern) != config.init_r
            or rows not in (len(pattern), int(pattern.sum()))
        ):
            raise ValueError(
                f"`rank_pattern[{name!r}]`: keeps {int(pattern.sum())} of {pattern.size}, but the "
                f"module has rank {rows}, and init_r={config.init_r}; save the adapter again with "
                "PEFT."
            )
        mask = np.ones(rows, bool)
        if pattern is not None and rows == len(pattern):
            mask = pattern
        lam = e[:, 0]
        if config.lora_alpha <= 0 and pattern is not None:
            # PEFT's scale is then r / init_r with the remaining rank r.
            wide = np.promote_types(lam.dtype, np.float32)
            lam = (lam.astype(wide) * (int(pattern.sum()) / config.init_r)).astype(wide)
        matrices[name] = LowRankMatrix(b.T, lam, a, mask)
    return AdapterFile(
        config, matrices, saved, {name: keep.tolist() for name, keep in patterns.items()}, {}
    )


def _check_lora(settings: Mapping[str, Any]) -> None:
    for key, unused in _LORA_UNSUPPORTED.items():
        if key in settings and settings[key] not in unused:
            raise ValueError(
                f"`{key}={str(settings[key])[:99]!r}`: is not supported here; merge the adapter "
                "with PEFT."
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"`init_lora_weights={start[:99]!r}`: changes the base's weights before training; "
            "convert the adapter with PEFT, save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or merge it there."
        )
    unknown = [key for key in sorted(set(settings) - _LORA_KNOWN) if settings[key] is not False]
    if unknown := [key for key in unknown if settings[key] not in ("", [], {})]:
        # Attribute the warning to the caller of load_pretrained or merge_pretrained.
        warnings.warn(
            f"`{CONFIG}`: the keys {', '.join(unknown)} are unknown and ignored; check that they "
            "do not change the computation.",
            stacklevel=4,
        )
    for pattern, test in (("rank_pattern", _is_integer), ("alpha_pattern", _is_number)):
        for key, value in settings.get(pattern, {}).items():
            if not test(value):
                kind = "an integer" if pattern == "rank_pattern" else "a number"
                raise ValueError(
                    f"`{pattern}[{key[:99]!r}]={str(value)[:99]!r}`: must be {kind}; save the "
                    "adapter again with PEFT."
                )
            if not re.fullmatch(r"\^?[\w.\-]+", key):
                raise ValueError(
                    f"`{pattern}`: {key[:99]!r} is a regex, which is not run here; list the names "
                    "of the modules instead."
                )


def _lora(
    settings: Mapping[str, Any],
    factors: Mapping[str, list[np.ndarray]],
    saved: dict[str, np.ndarray],
) -> AdapterFile:
    """Return a plain LoRA adapter with each module's scale as its λ, and a config of one step."""
    alphas = settings.get("alpha_pattern", {})
    matrices = {}
    for name, (a, b) in factors.items():
        rank = len(a)
        match = next((key for key in alphas if _names_module(key, name)), None)
        alpha = settings.get("lora_alpha", 8) if match is None else alphas[match]
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank) if rank else 1.0
        matrices[name] = LowRankMatrix(
            b.reshape(len(b), rank).T,
            np.full(rank, scale, np.float32),
            a.reshape(rank, math.prod(a.shape[1:])),
            np.ones(rank, bool),
        )
    largest = max(1, *(len(matrix.lam) for matrix in matrices.values()))
    config = AdaLoraConfig(
        total_step=1,
        init_r=largest,
        target_r=largest,
        lora_alpha=largest,
        fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
        target_modules=tuple(matrices),
    )
    kernels = {name: a.shape[2:] for name, (a, _) in factors.items() if a.ndim > 2}
    return AdapterFile(config, matrices, saved, {}, kernels)


def _names_module(key: str, name: str) -> bool:
    """Return whether a pattern's key names a module, by PEFT's rule without regexes."""
    if key.startswith("^"):
        return name == key[1:]
    return name == key or name.endswith(f".{key}")
