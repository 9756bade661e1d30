"""Heads that a checkpoint ties to its embedding: which merged models must store both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adalora_jax._src.huggingface.matrices import Matrix
from adalora_jax._src.huggingface.reading import EMBEDDINGS, HEAD
from adalora_jax._src.huggingface.weights import Weights
from adalora_jax._src.tensorfile import TensorFile, inside

_FLAG = "tie_word_embeddings"
# Where a config of several models has that of the one with the head.
_NESTED = ("text_config", "language_config", "llm_config", "decoder", "generator", "thinker_config")
_WITH_HEAD = re.compile(
    r"CausalLM|LMHead|ConditionalGeneration|MaskedLM|PreTraining|ImageTextToText"
)
# An embedding inside a model whose head is lm_head beside it.
_DECODER = re.compile(
    r"((?:.+\.)?)(?:model|transformer)\.(?:language_model\.|decoder\.)?(?:embed_tokens|wte)\.weight"
)
_WAY_OUT = (
    "store the head in the base first: load it with transformers, copy the embedding to the "
    f"head, set {_FLAG} to false and save it"
)


class Change(NamedTuple):
    """What happens to one tensor of the base."""

    matrix: Matrix | None = None  # its increment
    transposed: bool = False  # of a weight that is [in, out]
    value: np.ndarray | None = None  # or what takes its place
    source: str | None = None  # the tensor of the base that a new one begins as


def tied_to(base: Weights, name: str) -> str | None:
    """Returns the embedding that is the weight ``name`` of a head, where the base stores it once.

    >>> from pathlib import Path
    >>> from adalora_jax._src.tensorfile import Spec
    >>> weights = Weights(Path(), {"": {"model.embed_tokens.weight": Spec("F32", ())}}, {}, None)
    >>> weights.__dict__["config"] = {"tie_word_embeddings": True}
    >>> tied_to(weights, "lm_head.weight")
    'model.embed_tokens.weight'
    """
    flags = _flags(base.config or {_FLAG: False})
    embeddings = _embeddings(base.specs)
    is_tied = HEAD.fullmatch(name) and (any(flags) or not flags) and not _heads(base.specs)
    return embeddings[0] if is_tied and len(embeddings) == 1 else None


def untie(base: Weights, changes: dict[str, Change], tied: bool | None) -> bool:
    """Adds the changes of a tied head that those of its embedding ask for.

    Args:
      base: the checkpoint.
      changes: by tensor, in which the head's is added.
      tied: whether a head that is not in ``changes`` moves with the embedding; None if that is
        unknown.

    Returns:
      Whether the head and the embedding are no longer the same, so that the config must say so.

    Raises:
      ValueError: what the head becomes is not known, or under which name it is stored.
    """
    flags = _flags(base.config or {_FLAG: False})
    names = {**base.specs, **changes}
    embeddings, heads = _embeddings(names), _heads(names)
    # A head of another name is new, and has the shape of the embedding.
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
            f"the base in {base.folder} ties {', '.join(map(repr, [*embeddings, *heads]))}, of "
            f"which the adapter changes some: {_WAY_OUT}."
        )
    embedding, head = embeddings[0], heads[0] if heads else None
    if head and head not in base.specs and "." not in embedding.removesuffix(".weight"):
        raise ValueError(
            f"{head!r} cannot be stored beside {embedding!r}, which has no prefix: save the base "
            "with transformers as the model that has the head."
        )
    differ = head in base.specs and not _equal(base, embedding, head)
    if differ and not (flags and all(flags)):
        return any(flags)  # not tied, whatever the default of its model
    if head in changes and (value := changes[head].value) is not None:
        return not _is_value(base, embedding, changes.get(embedding), value)
    if differ:
        raise ValueError(
            f"the base in {base.folder} has {_FLAG}, but stores another {head!r} than "
            f"{embedding!r}: which one the head is depends on the version of transformers. Set "
            f"{_FLAG} to false in its config.json if it is {head!r}, or remove that tensor."
        )
    if head in changes:
        return True
    if tied is None:
        raise ValueError(
            f"`tied=None`: the base in {base.folder} ties its head to {embedding!r}, which the "
            "adapters change, but whether the head changed with it is not known: pass tied=True "
            "if the model that was trained reads one parameter for both, or tied=False if its head "
            "kept the weight of the base."
        )
    if tied:
        if head is not None:
            changes[head] = changes[embedding]
        return False
    if head is None:
        changes[_head_of(base, embedding)] = Change(source=embedding)
    return True


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's config for a head that is not its embedding.

    >>> untied({"model_type": "llava", "text_config": {"tie_word_embeddings": True}})
    {'model_type': 'llava', 'text_config': {'tie_word_embeddings': False}, \
'tie_word_embeddings': False}
    """
    nested = {name: untied(inner) for name, inner in _nested(config).items()}
    return {**config, **nested, _FLAG: False}


def _nested(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: config[name] for name in _NESTED if isinstance(config.get(name), Mapping)}


def _flags(config: Mapping[str, Any]) -> list[bool]:
    """What a config and those in it say; nothing where all leave it to the model's default."""
    flags = [bool(config[_FLAG])] if config.get(_FLAG) is not None else []
    return flags + [flag for inner in _nested(config).values() for flag in _flags(inner)]


def _has_head(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(_WITH_HEAD.search(str(name)) for name in names)


def _embeddings(names: Mapping[str, Any]) -> list[str]:
    ends = tuple(f".{last}.weight" for last in EMBEDDINGS)
    return [name for name in names if f".{name}".endswith(ends)]


def _heads(names: Mapping[str, Any]) -> list[str]:
    return [name for name in names if HEAD.fullmatch(name)]


def _head_of(base: Weights, embedding: str) -> str:
    found = _DECODER.fullmatch(embedding)
    if found is None or (base.config or {}).get("is_encoder_decoder"):
        raise ValueError(
            f"the base in {base.folder} ties its head to {embedding!r}, which the adapter "
            f"changes, but what the head is called is not known: {_WAY_OUT}; or pass tied=True if "
            "it may change with the embedding."
        )
    return f"{found[1]}lm_head.weight"


def _equal(base: Weights, one: str, other: str) -> bool:
    """Whether two tensors of the base are the same, bit for bit."""
    if base.specs[one][:2] != base.specs[other][:2]:
        return False
    with _open(base, one) as first, _open(base, other) as second:
        return all(a == b for a, b in zip(first.chunks(one), second.chunks(other)))


def _is_value(base: Weights, embedding: str, change: Change | None, value: np.ndarray) -> bool:
    """Whether the embedding becomes, or stays, this value."""
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
    return TensorFile(inside(base.folder, base.file_of(tensor)))
