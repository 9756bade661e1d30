"""Conversion between the keys of Hugging Face PEFT's AdaLoRA config and this library's."""

from __future__ import annotations

import json
import os
import re
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

# Keys of a PEFT `adapter_config.json` that describe the origin of a model or how PEFT runs it. They
# do not change AdaLoRA's computation.
_PEFT_BOOKKEEPING = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "r",  # AdaLoRA starts at init_r
    "revision",
    "runtime_config",
    "task_type",
}
# Keys that change the training of PEFT's AdaLoRA: the values that mean "not used", what PEFT does
# otherwise, and what to write instead.
_PEFT_UNSUPPORTED = {
    "bias": (
        ("none",),
        "PEFT would train biases of the base, which stay frozen here",
        "leave bias out, or name the biases to train in modules_to_save",
    ),
    "ensure_weight_tying": (
        (False,),
        "PEFT would train tied weights as one, which is not done here",
        "leave ensure_weight_tying out",
    ),
    "layer_replication": (
        ([],),
        "PEFT would repeat layers of the base, which is not changed here",
        "leave layer_replication out, and repeat the layers in the Flax model",
    ),
    "target_parameters": (
        ([],),
        "AdaLoRA adapts the weights of layers, in PEFT too",
        "leave target_parameters out, or name layers in target_modules",
    ),
    "trainable_token_indices": (
        ([], {}),
        "PEFT would train rows of the embedding, which stays frozen here",
        "leave trainable_token_indices out, or name the whole embedding in modules_to_save",
    ),
}
# Keys that PEFT's AdaLoRA config inherits from LoRA but does not use, with their values for "off".
_PEFT_IGNORED = {
    "alora_invocation_tokens": ([],),
    "alpha_pattern": ({},),
    "arrow_config": (),
    "corda_config": (),
    "eva_config": (),
    "kasa_config": (),
    "lora_bias": (False,),
    "lora_ga_config": (),
    "megatron_config": ({},),
    "megatron_core": ("megatron.core",),
    "monteclora_config": (),
    "qalora_group_size": (16,),
    "use_bdlora": (False,),
    "use_qalora": (False,),
    "use_rslora": (False,),
    "velora_config": (),
}


_TASK_TYPES = (
    *("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
)


def check_accepted(
    task_type: object,
    bias: object,
    inference_mode: object,
    peft_type: object,
    r: object,
    use_dora: object,
    loftq_config: object,
    use_rslora: object,
    layer_replication: object,
    trainable_token_indices: object,
) -> None:
    """Check PEFT's arguments that a config accepts but does not store.

    Raises:
      ValueError: an argument sets an option that is not supported here.

    >>> check_accepted("CAUSAL_LM", "all", False, "ADALORA", None, False, None, False, None, None)
    Traceback (most recent call last):
        ...
    ValueError: `bias='all'`: PEFT would train biases of the base, which stay frozen here; leave \
bias out, or name the biases to train in modules_to_save.
    """
    if task_type is not None and task_type not in _TASK_TYPES:
        raise ValueError(
            f"`task_type={task_type!r}`: is not one of PEFT's, {', '.join(_TASK_TYPES)}; leave "
            "task_type out, since it has no effect here."
        )
    for key, value in {
        "bias": bias,
        "layer_replication": layer_replication,
        "trainable_token_indices": trainable_token_indices,
    }.items():
        unused, problem, instead = _PEFT_UNSUPPORTED[key]
        if value not in (None, *unused):
            raise ValueError(f"`{key}={value!r}`: {problem}; {instead}.")
    if not isinstance(inference_mode, bool):
        raise ValueError(
            f"`inference_mode={inference_mode!r}`: must be True or False; leave "
            "inference_mode out, since it has no effect here."
        )
    if peft_type not in (None, "ADALORA"):
        raise ValueError(f"`peft_type={peft_type!r}`: is not 'ADALORA'; leave peft_type out.")
    if r is not None:
        raise ValueError(
            f"`r={r!r}`: is not used by AdaLoRA; set init_r, the rank at the start, and target_r, "
            "the average rank at the end."
        )
    if use_dora:
        raise ValueError(f"`use_dora={use_dora!r}`: AdaLoRA has no DoRA form; leave use_dora out.")
    if loftq_config:
        raise ValueError(
            f"`loftq_config={loftq_config!r}`: the SVD form has no LoftQ initialisation; quantize "
            "the base model and leave loftq_config out."
        )
    if use_rslora:
        raise ValueError(
            f"`use_rslora={use_rslora!r}`: PEFT's AdaLoRA ignores it and scales by "
            "lora_alpha / init_r; leave use_rslora out, or set scale to "
            "lora_alpha / sqrt(init_r), rsLoRA's factor."
        )


def check_no_peft_names(unknown: set[str]) -> None:
    """Raise an error for arguments that only PEFT's config has.

    Args:
      unknown: names of arguments that ``AdaLoraConfig`` does not have.

    Raises:
      TypeError: PEFT has some of them; the message has their names and points to ``from_peft``.

    >>> check_no_peft_names({"revision"})
    Traceback (most recent call last):
        ...
    TypeError: `revision`: AdaLoraConfig does not take this argument of PEFT's; remove it, or \
pass a whole PEFT config with AdaLoraConfig.from_peft({...}).
    """
    if found := sorted(
        unknown.intersection(_PEFT_BOOKKEEPING | {*_PEFT_UNSUPPORTED, *_PEFT_IGNORED})
    ):
        raise TypeError(
            f"`{', '.join(found)}`: AdaLoraConfig does not take "
            f"{'this argument' if len(found) == 1 else 'these arguments'} of PEFT's; remove "
            f"{'it' if len(found) == 1 else 'them'}, or pass a whole PEFT config with "
            "AdaLoraConfig.from_peft({...})."
        )


def read(source: Mapping[str, Any] | str | os.PathLike[str], fields: set[str]) -> dict[str, Any]:
    """Return the keyword arguments for ``AdaLoraConfig`` from a PEFT AdaLoRA config.

    Unknown keys, and keys that PEFT's AdaLoRA does not use, are dropped with a ``UserWarning``.

    Args:
      source: a mapping, the path of an ``adapter_config.json``, or of its folder.
      fields: the keys that have the same meaning here.

    Raises:
      TypeError: ``source`` is neither a mapping nor a path.
      ValueError: the config is not an AdaLoRA config, or sets an option that is not supported here.
      OSError: the file cannot be read.

    >>> read({"peft_type": "ADALORA", "init_r": 8, "revision": None}, {"init_r"})
    {'init_r': 8}
    """
    if not isinstance(source, (Mapping, str, os.PathLike)):
        raise TypeError(
            f"`source={reprlib.repr(source)}`: is neither a mapping nor a path; pass "
            "peft.AdaLoraConfig.to_dict() or the path of an adapter_config.json."
        )
    if not isinstance(source, Mapping):
        path = os.fspath(source)
        if os.path.isdir(path):
            path = os.path.join(path, "adapter_config.json")
        with open(path, encoding="utf-8") as file:
            source = json.load(file)
        if not isinstance(source, Mapping):
            raise ValueError(
                f"`{path}`: does not contain a JSON object; pass the adapter_config.json of a PEFT "
                "adapter."
            )
        if source.get("peft_type") is None:
            raise ValueError(
                f"`{path}`: has no peft_type, so it is not the config of a PEFT adapter; pass an "
                "adapter_config.json that PEFT wrote."
            )
    kind = source.get("peft_type")
    kind = "ADALORA" if kind is None else str(getattr(kind, "value", kind))
    if kind.upper() != "ADALORA":
        raise ValueError(
            f"`peft_type={kind!r}`: is not 'ADALORA'; pass the config of an AdaLoRA adapter, or "
            "read a LoRA adapter with huggingface.load_pretrained."
        )
    for key, (unused, problem, instead) in _PEFT_UNSUPPORTED.items():
        if source.get(key) not in (None, *unused):
            raise ValueError(
                f"`{key}={source[key]!r}`: {problem}; {instead}, or merge a trained adapter with "
                "PEFT."
            )
    values = {key: value for key, value in source.items() if key in fields}
    ignored = [k for k, unused in _PEFT_IGNORED.items() if source.get(k) not in (None, *unused)]
    if isinstance(init := values.get("init_lora_weights"), str) and init != "loftq":
        ignored.append("init_lora_weights")
        values["init_lora_weights"] = True
    if ignored:
        settings = ", ".join(f"{key}={source[key]!r}" for key in sorted(ignored))
        warnings.warn(
            f"`source`: PEFT's AdaLoRA does not use {settings}; remove these keys.", stacklevel=3
        )
    known = fields.union(_PEFT_BOOKKEEPING, _PEFT_UNSUPPORTED, _PEFT_IGNORED)
    if unknown := sorted(map(str, set(source) - known)):
        warnings.warn(
            f"`source`: the keys {', '.join(unknown)} are unknown and ignored; check that they do "
            "not change the computation.",
            stacklevel=3,
        )
    # PEFT stores them as sets and saves them in arbitrary order; `checks.names` sorts sets.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), (list, tuple)):
            values[name] = set(values[name])
    if values.get("rank_pattern") is not None:
        values["rank_pattern"] = _read_pattern(values["rank_pattern"])
    return values


def written_pattern(pattern: tuple[tuple[str, Any], ...], init_r: int) -> dict[str, list[bool]]:
    """Return a ``rank_pattern`` with PEFT's keys.

    Args:
      pattern: pairs of path and booleans, one per triplet; an empty tuple is rank 0.
      init_r: number of booleans to write for rank 0.

    Raises:
      ValueError: an entry is a rank instead of booleans.

    >>> written_pattern((("encoder/query", (True, False)), ("key", ())), init_r=2)
    {'encoder.query.lora_E': [True, False], 'key.lora_E': [False, False]}
    """
    for path, keep in pattern:
        if not isinstance(keep, tuple):
            raise ValueError(
                f"`rank_pattern[{path!r}]={keep}`: is a rank, but PEFT stores which triplets are "
                "active; pass a list of booleans, one per triplet."
            )
    return {
        path.replace("/", ".") + ".lora_E": list(keep) or [False] * init_r for path, keep in pattern
    }


def _read_pattern(value: object) -> dict[str, list[bool]]:
    """Return PEFT's ``rank_pattern`` with this library's paths.

    PEFT's keys end in ``.lora_E``, followed by the adapter's name during training.

    Raises:
      ValueError: a key or value has another form.
    """
    form = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_E(?:\.[^.]+)?")
    result = {}
    for key, keep in value.items() if isinstance(value, Mapping) else [("", value)]:
        path = form.fullmatch(str(key))
        if path is None or not isinstance(keep, (list, tuple)):
            raise ValueError(
                f"`rank_pattern={value!r}`: does not have the form that PEFT's AdaLoRA saves, "
                "{'<path>.lora_E': [True, False, ...]}; leave it out."
            )
        result[path[1].replace(".", "/")] = list(keep)
    return result
