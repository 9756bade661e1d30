"""Heads tied to the embedding of a checkpoint, and the merged models that must store both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from adalora_jax._src.huggingface.matrices import LowRankMatrix
from adalora_jax._src.huggingface.reading import EMBEDDINGS, HEAD
from adalora_jax._src.huggingface.weights import Weights
from adalora_jax._src.tensorfile import TensorFile, resolve_within

_FLAG = "tie_word_embeddings"
# Keys under which a composite config stores the config of the model that has the head.
_NESTED = ("text_config", "language_config", "llm_config", "decoder", "generator", "thinker_config")
_WITH_HEAD = re.compile(
    r"CausalLM|LMHead|ConditionalGeneration|MaskedLM|PreTraining|ImageTextToText"
)
# The embedding of a decoder whose head is the sibling module ``lm_head``.
_DECODER = re.compile(
    r"((?:.+\.)?)(?:model|transformer)\.(?:language_model\.|decoder\.)?(?:embed_tokens|wte)\.weight"
)
_WAY_OUT = (
    "store the head in the base first: load it with transformers, copy the embedding to the "
    f"head, set {_FLAG} to false and save it"
)


class Change(NamedTuple):
    """The change of one tensor of the base: an increment, or a replacement."""

    matrix: LowRankMatrix | None = None  # the increment
    transposed: bool = False  # whether the weight is [in, out]
    value: np.ndarray | None = None  # the replacement
    source: str | None = None  # the base's tensor that a new tensor is copied from


def tied_to(base: Weights, name: str) -> str | None:
    """Return the embedding that the base stores in place of the weight ``name`` of a tied head.

    None if ``name`` is not the weight of a head that the base ties to exactly one embedding.

    >>> from pathlib import Path
    >>> from adalora_jax._src.tensorfile import Spec
    >>> weights = Weights(Path(), {"": {"model.embed_tokens.weight": Spec("F32", (), 4)}}, {}, None)
    >>> weights.__dict__["config"] = {"tie_word_embeddings": True}
    >>> tied_to(weights, "lm_head.weight")
    'model.embed_tokens.weight'
    """
    flags = _flags(base.config or {_FLAG: False})
    embeddings = _embeddings(base.specs)
    is_tied = HEAD.fullmatch(name) and (any(flags) or not flags) and not _heads(base.specs)
    return embeddings[0] if is_tied and len(embeddings) == 1 else None


def untie(base: Weights, changes: dict[str, Change], tied: bool | None) -> bool:
    """Add to ``changes`` the change of a tied head that a changed embedding requires.

    Args:
      base: the checkpoint.
      changes: the changes by tensor; the head's is added in place.
      tied: whether a head that is not in ``changes`` changes with the embedding; None if that is
        unknown.

    Returns:
      True if the head and the embedding differ afterwards, so that the config has to set
      ``tie_word_embeddings`` to false.

    Raises:
      ValueError: the new value of the head, or its name in the checkpoint, cannot be determined.
    """
    flags = _flags(base.config or {_FLAG: False})
    names = {**base.specs, **changes}
    embeddings, heads = _embeddings(names), _heads(names)
    # A new tensor with the embedding's shape is a head under another name.
    shapes = [base.specs[name].shape for name in embeddings if name in base.specs]
    new = {n: c.value for n, c in changes.items() if n not in base.specs}
    heads += [n for n, v in new.items() if v is not None and v.shape in shapes and n not in heads]
    has_head = heads or any(flags) or _has_head(base.config or {})
    if (flags and not any(flags)) or not has_head or not changes.keys() & {*embeddings, *heads}:
        return False
    if not embeddings:
        return True
    if len(embeddings) > 1 or len(heads) > 1:
        raise ValueError(
            f"`{base.folder}`: ties {', '.join(map(repr, [*embeddings, *heads]))}, and the adapter "
            f"changes some of them; {_WAY_OUT}."
        )
    embedding, head = embeddings[0], heads[0] if heads else None
    if head and head not in base.specs and "." not in embedding.removesuffix(".weight"):
        raise ValueError(
            f"`{base.folder}`: {head!r} cannot be stored next to {embedding!r}, which has no "
            "prefix; save the base with transformers as the model that has the head."
        )
    differ = head in base.specs and not _equal(base, embedding, head)
    if differ and not (flags and all(flags)):
        return any(flags)  # Values differ: not tied, even if the model's default is to tie them.
    if head in changes and (value := changes[head].value) is not None:
        return not _is_value(base, embedding, changes.get(embedding), value)
    if differ:
        raise ValueError(
            f"`{base.folder}`: has {_FLAG}, but stores a {head!r} that differs from {embedding!r}, "
            "and the version of transformers decides which of them is the head; set "
            f"{_FLAG} to false in its config.json if it is {head!r}, or remove that tensor."
        )
    if head in changes:
        return True
    if tied is None:
        raise ValueError(
            f"`tied=None`: the base in {base.folder} ties its head to {embedding!r}, which the "
            "adapters change, and it is not known whether the head changed with it; pass tied=True "
            "if the trained model reads one parameter for both, or tied=False if its head kept the "
            "weight of the base."
        )
    if tied:
        if head is not None:
            changes[head] = changes[embedding]
        return False
    if head is None:
        changes[_head_of(base, embedding)] = Change(source=embedding)
    return True


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config with ``tie_word_embeddings`` set to false, nested configs included.

    >>> untied({"model_type": "llava", "text_config": {"tie_word_embeddings": True}})
    {'model_type': 'llava', 'text_config': {'tie_word_embeddings': False}, \
'tie_word_embeddings': False}
    """
    nested = {name: untied(inner) for name, inner in _nested(config).items()}
    return {**config, **nested, _FLAG: False}


def _nested(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: config[name] for name in _NESTED if isinstance(config.get(name), Mapping)}


def _flags(config: Mapping[str, Any]) -> list[bool]:
    """Return the tying flags of a config and its nested configs; empty if none is set."""
    flags = [bool(config[_FLAG])] if config.get(_FLAG) is not None else []
    return flags + [flag for inner in _nested(config).values() for flag in _flags(inner)]


def _has_head(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(_WITH_HEAD.search(str(name)) for name in names)


def _embeddings(names: Iterable[str]) -> list[str]:
    ends = tuple(f".{last}.weight" for last in EMBEDDINGS)
    return [name for name in names if f".{name}".endswith(ends)]


def _heads(names: Iterable[str]) -> list[str]:
    return [name for name in names if HEAD.fullmatch(name)]


def _head_of(base: Weights, embedding: str) -> str:
    found = _DECODER.fullmatch(embedding)
    if found is None or (base.config or {}).get("is_encoder_decoder"):
        raise ValueError(
            f"`{base.folder}`: ties its head to {embedding!r}, which the adapter changes, but the "
            f"name of the head is not known; {_WAY_OUT}, or pass tied=True if it may change with "
            "the embedding."
        )
    return f"{found[1]}lm_head.weight"


def _equal(base: Weights, one: str, other: str) -> bool:
    """Return whether two tensors of the base are equal, bit for bit."""
    if base.specs[one][:2] != base.specs[other][:2]:
        return False
    with _open(base, one) as first, _open(base, other) as second:
        return all(a == b for a, b in zip(first.chunks(one), second.chunks(other)))


def _is_value(base: Weights, embedding: str, change: Change | None, value: np.ndarray) -> bool:
    """Return whether the embedding equals ``value`` once its change is applied."""
    if change is not None:
        final = change.value
    else:
        with _open(base, embedding) as file:
            final = file.read(embedding)
    return final is not None and np.array_equal(
        final.astype(np.promote_types(final.dtype, np.float32)),
        value.astype(np.promote_types(value.dtype, np.float32)),
    )


def _open(base: Weights, tensor: str) -> TensorFile:
    return TensorFile(resolve_within(base.folder, base.file_of(tensor)))
