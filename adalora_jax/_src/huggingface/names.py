"""Maps between module names in Flax models and in the PyTorch models of Hugging Face."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias


class ParamLocation(NamedTuple):
    """The location of a matrix: a weight's path, a slice of its stack, a part of its outputs."""

    path: str
    stack_index: tuple[int, ...] = ()  # the slice's index on the stack
    part: tuple[int, int] = (0, 1)  # part 0 of 1: all of the outputs


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Pairs ``(Flax, Hugging Face)`` of module names, applied in both directions.

    ====================  =========================================================================
    in a name             meaning
    ====================  =========================================================================
    ``{i}``               a number; the placeholder may be any single letter
    ``{path}``            any part of a path, with its separators translated; the placeholder may
                          be any longer word
    ``name[{i}]``         Flax side only: slice i of a weight with a stack axis, as from ``nn.scan``
    ``name[1]``           the same with a fixed index, as in a weight that holds keys and values
    ``name:0/3``          the first of three equal parts of the outputs, on either side: for a layer
                          that computes queries, keys and values in one projection
    ====================  =========================================================================

    The first pair that matches a name is used. Functions that take a NameMap also take a dict or a
    list of pairs.

    Attributes:
      pairs: the pairs of names; the constructor also takes a dict.
      conv1d: the last components of the names of the PyTorch modules that are a ``Conv1D``, whose
        weights are ``[in, out]`` as in Flax (GPT-2's).

    Raises:
      ValueError: a pair cannot be parsed, or its sides have different placeholders.

    >>> names = NameMap([("blocks/attn/query[{i}]", "model.layers.{i}.self_attn.q_proj")])
    >>> names.to_hf("blocks/attn/query", (7,))
    [('model.layers.7.self_attn.q_proj', (0, 1), (0, 1))]
    >>> names.to_flax("model.layers.7.self_attn.q_proj")
    [(ParamLocation(path='blocks/attn/query', stack_index=(7,), part=(0, 1)), (0, 1))]
    """

    pairs: tuple[tuple[str, str], ...]
    conv1d: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pairs: Any = self.pairs.items() if isinstance(self.pairs, Mapping) else self.pairs
        try:
            pairs = tuple((str(flax), str(hf)) for flax, hf in pairs)
        except (TypeError, ValueError):
            raise ValueError(
                f"`names={self.pairs!r}`: must be pairs (name in Flax, name in Hugging Face); pass "
                "a list such as [('layers/{i}/query', 'model.layers.{i}.query')]."
            ) from None
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "conv1d", tuple(self.conv1d))
        for pair in pairs:
            ours, theirs = (_template(name) for name in pair)
            if theirs.index or set(ours.fields) != set(theirs.fields):
                raise ValueError(
                    f"`names`: the pair {pair!r} must have the same placeholders on both sides, "
                    "and an index in brackets only on the first; write it like ('query[{i}]', "
                    "'layers.{i}.query')."
                )

    def to_hf(
        self, path: str, index: tuple[int, ...] = ()
    ) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """Return the PyTorch modules of one matrix of a Flax weight.

        Args:
          path: the path of the weight.
          index: the matrix's index on the weight's stack axes.

        Returns:
          ``(name, part of this matrix's outputs, part of that module's outputs)`` for each module;
          part k of n is ``(k, n)``.

        Raises:
          ValueError: no pair matches (the message lists the nearest), or ``path`` contains a dot.

        >>> NameMap({"attn/query": "attn.qkv:0/3"}).to_hf("attn/query")
        [('attn.qkv', (0, 1), (0, 3))]
        """
        if "." in path:
            raise ValueError(
                f"`path={path!r}`: has a dot in a name, which separates modules in PyTorch; pass "
                "the adapters under other paths."
            )
        found = self.match(path, index)
        if not found:
            raise ValueError(self._unmapped(path, index, 0))
        return found

    def match(
        self, path: str, index: tuple[int, ...] = ()
    ) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """Return the PyTorch modules of one matrix of a Flax weight, if a pair matches.

        Args:
          path: the path of the weight.
          index: the matrix's index on the weight's stack axes.

        Returns:
          The result of :meth:`to_hf`, or an empty list if no pair matches.

        >>> NameMap({"query": "q_proj"}).match("query"), NameMap({"query": "q_proj"}).match("key")
        ([('q_proj', (0, 1), (0, 1))], [])
        """
        found: dict[int, tuple[str, tuple[int, int], tuple[int, int]]] = {}
        count = 0
        for ours, theirs in self._templates:
            values = ours.match(path, index)
            if values is None or (found and ours.part[1] != count):
                continue
            count = ours.part[1]
            found.setdefault(ours.part[0], (theirs.fill(values, "."), ours.part, theirs.part))
        return [found[part] for part in sorted(found)] if len(found) == count else []

    def to_flax(self, name: str) -> list[tuple[ParamLocation, tuple[int, int]]]:
        """Return the places of a PyTorch module's outputs in the Flax model.

        Args:
          name: the name of the module.

        Returns:
          ``(place, part of the module's outputs)`` for each part; part k of n is ``(k, n)``. A
          place is a tuple ``(path, at, part)``: the path of the weight, the index on its stack axes
          and the part of its outputs.

        Raises:
          ValueError: no pair matches (the message lists the nearest).

        >>> names = NameMap({"attn/query": "attn.qkv:0/2", "attn/key": "attn.qkv:1/2"})
        >>> [(place.path, part) for place, part in names.to_flax("attn.qkv")]
        [('attn/query', (0, 2)), ('attn/key', (1, 2))]
        """
        found: dict[int, tuple[ParamLocation, tuple[int, int]]] = {}
        count = 0
        for ours, theirs in self._templates:
            values = theirs.match(name.replace(".", "/"), ())
            if values is None or (found and theirs.part[1] != count):
                continue
            count = theirs.part[1]
            place = ParamLocation(ours.fill(values, "/"), ours.index_of(values), ours.part)
            found.setdefault(theirs.part[0], (place, theirs.part))
        if not found:
            raise ValueError(self._unmapped(name, (), 1))
        return [found[part] for part in sorted(found)]

    def is_conv1d(self, name: str) -> bool:
        """Return whether a PyTorch module stores its weight as ``[in, out]``.

        Args:
          name: the name of the module.

        Returns:
          True if its last component is in ``conv1d``.

        >>> hf_names("gpt2").is_conv1d("transformer.h.0.attn.c_attn")
        True
        """
        return name.rpartition(".")[2] in self.conv1d

    @functools.cached_property
    def _templates(self) -> list[tuple[_Template, _Template]]:
        return [(_template(flax), _template(hf)) for flax, hf in self.pairs]

    def _unmapped(self, name: str, index: tuple[int, ...], side: int) -> str:
        known = sorted({pair[side] for pair in self.pairs})
        plain = re.sub(r"\d+", "{i}", name)
        near = sorted(known, key=lambda k: -difflib.SequenceMatcher(None, plain, k).ratio())[:3]
        stack = f" with {len(index)} stack axes" if index else ""
        return (
            f"`names`: {name[:200]!r}{stack} matches no pair, and the nearest names that do are "
            f"{', '.join(near) or 'none'}; pass names=[('name/in/flax/{{i}}', "
            "'name.in.huggingface.{i}'), ...], see huggingface.NameMap, or another family of "
            "huggingface.hf_names."
        )


@dataclasses.dataclass(frozen=True)
class _Template:
    """One side of a pair, parsed."""

    text: str  # with / as the separator, on both sides
    index: tuple[str, ...]  # numbers and placeholders
    part: tuple[int, int]  # (k, n): part k of n of the outputs

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        return tuple(re.findall(r"\{(\w+)\}", self.text + "".join(self.index)))

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", self.text)
        seen: set[str] = set()
        for n, piece in enumerate(pieces):
            if n % 2 == 0:
                pieces[n] = re.escape(piece)
            elif piece in seen:
                pieces[n] = f"(?P={piece})"
            else:
                seen.add(piece)
                pieces[n] = rf"(?P<{piece}>{'0|[1-9][0-9]{0,5}' if len(piece) == 1 else '.+?'})"
        return re.compile("".join(pieces))

    def match(self, path: str, index: tuple[int, ...]) -> dict[str, str] | None:
        """Return the values of the placeholders, or None if path or index do not match."""
        if len(index) != len(self.index) or (found := self._regex.fullmatch(path)) is None:
            return None
        values = found.groupdict()
        for entry, number in zip(self.index, map(str, index)):
            if entry.startswith("{"):
                entry = values.setdefault(entry[1:-1], number)
            if entry != number:
                return None
        return values

    def fill(self, values: Mapping[str, str], separator: str) -> str:
        text = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], self.text)
        return text.replace("/", separator)

    def index_of(self, values: Mapping[str, str]) -> tuple[int, ...]:
        numbers = (values[i[1:-1]] if i.startswith("{") else i for i in self.index)
        return tuple(map(int, numbers))


@functools.lru_cache(maxsize=4096)
def _template(name: str) -> _Template:
    placeholder = r"(?:\{[a-zA-Z]\}|\d+)"
    form = rf"([^\[\]:]+?)(?:\[({placeholder}(?:,{placeholder})*)\])?(?::(\d+)/(\d+))?"
    found = re.fullmatch(form, name.replace(" ", ""))
    rest = re.sub(r"\{[a-zA-Z]\w*\}", "", found[1]) if found else "{"
    part = (int(found[3]), int(found[4])) if found and found[3] else (0, 1)
    if found is None or "{" in rest or "}" in rest or part[0] >= part[1]:
        raise ValueError(
            f"`names`: {name!r} cannot be read; write it like 'layers/{{i}}/query', "
            "'layers/query[{i}]' or 'attn/qkv:0/3'."
        )
    index = tuple(found[2].split(",")) if found[2] else ()
    return _Template(found[1].replace(".", "/"), index, part)


IDENTITY = NameMap((("{path}", "{path}"),))

# Module names within a layer, in two Flax variants: the Flax port in transformers (up to version
# 4), which uses the PyTorch names, and Flax's built-in attention.
_BERT = (
    ("attention/self/{query}", "attention.self.{query}"),
    ("attention/output/dense", "attention.output.dense"),
    ("intermediate/dense", "intermediate.dense"),
    ("output/dense", "output.dense"),
    ("attention/query", "attention.self.query"),
    ("attention/key", "attention.self.key"),
    ("attention/value", "attention.self.value"),
    ("attention/out", "attention.output.dense"),
    ("attention/output/LayerNorm", "attention.output.LayerNorm"),
    ("output/LayerNorm", "output.LayerNorm"),
)
_VIT_V4 = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
}
# transformers 5 renamed the layers of ViT, but not the tensors in its checkpoints.
_VIT = {
    "attention/attention/query": ("attention.q_proj", "attention.attention.query"),
    "attention/attention/key": ("attention.k_proj", "attention.attention.key"),
    "attention/attention/value": ("attention.v_proj", "attention.attention.value"),
    "attention/output/dense": ("attention.o_proj", "attention.output.dense"),
    "intermediate/dense": ("mlp.fc1", "intermediate.dense"),
    "output/dense": ("mlp.fc2", "output.dense"),
    "attention/query": ("attention.q_proj", "attention.attention.query"),
    "attention/key": ("attention.k_proj", "attention.attention.key"),
    "attention/value": ("attention.v_proj", "attention.attention.value"),
    "attention/out": ("attention.o_proj", "attention.output.dense"),
    **{f"attention/{n}_proj": (f"attention.{n}_proj", hf) for n, hf in _VIT_V4.items()},
    "mlp/fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp/fc2": ("mlp.fc2", "output.dense"),
    "layernorm_before": ("layernorm_before", "layernorm_before"),
    "layernorm_after": ("layernorm_after", "layernorm_after"),
}
_GPT2 = (
    ("attn/c_attn", "attn.c_attn"),
    ("attn/c_proj", "attn.c_proj"),
    ("mlp/c_fc", "mlp.c_fc"),
    ("mlp/c_proj", "mlp.c_proj"),
    *((f"{attn}/query", "attn.c_attn:0/3") for attn in ("attn", "attention")),
    *((f"{attn}/key", "attn.c_attn:1/3") for attn in ("attn", "attention")),
    *((f"{attn}/value", "attn.c_attn:2/3") for attn in ("attn", "attention")),
    *((f"{attn}/out", "attn.c_proj") for attn in ("attn", "attention")),
    ("ln_1", "ln_1"),
    ("ln_2", "ln_2"),
)
_PROJECTIONS = tuple(f"{name}_proj" for name in "qkvo")
_LLAMA = (
    *((f"self_attn/{name}", f"self_attn.{name}") for name in _PROJECTIONS),
    *((f"mlp/{name}_proj", f"mlp.{name}_proj") for name in ("gate", "up", "down")),
    *((f"attn/{name}", f"self_attn.{name}") for name in _PROJECTIONS),  # Tunix
    *((f"{a}/{n}_norm", f"self_attn.{n}_norm") for a in ("self_attn", "attn") for n in "qk"),
    ("input_layernorm", "input_layernorm"),
    ("post_attention_layernorm", "post_attention_layernorm"),
)
_GEMMA = (
    *_LLAMA,
    ("attn/q_einsum", "self_attn.q_proj"),
    ("attn/kv_einsum[0]", "self_attn.k_proj"),
    ("attn/kv_einsum[1]", "self_attn.v_proj"),
    *((f"attn/qkv_einsum[{n}]", f"self_attn.{name}") for n, name in enumerate(_PROJECTIONS[:3])),
    ("attn/attn_vec_einsum", "self_attn.o_proj"),
    ("mlp/gating_einsum[0]", "mlp.gate_proj"),
    ("mlp/gating_einsum[1]", "mlp.up_proj"),
    ("mlp/gating_einsum:0/2", "mlp.gate_proj"),
    ("mlp/gating_einsum:1/2", "mlp.up_proj"),
    ("mlp/linear", "mlp.down_proj"),
    ("pre_attention_norm", "input_layernorm"),
)
_GEMMA1 = (*_GEMMA, ("pre_ffw_norm", "post_attention_layernorm"))
_GEMMA3 = (  # and Gemma 2
    *_GEMMA,
    *((name, name) for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_attn_norm", "post_attention_layernorm"),
    ("pre_ffw_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("attn/_query_norm", "self_attn.q_norm"),
    ("attn/_key_norm", "self_attn.k_norm"),
)
# Modules outside of the list of layers.
_OTHER_BERT = (("embeddings/{word}", "embeddings.{word}"),)
_OTHER_VIT = (*_OTHER_BERT, ("layernorm", "layernorm"))
_OTHER_GPT2 = tuple((name, name) for name in ("wte", "wpe", "ln_f"))
_OTHER_LLAMA = (
    ("embed_tokens", "embed_tokens"),
    ("norm", "norm"),
    ("embedder", "embed_tokens"),
    ("final_norm", "norm"),
)
_HEADS = ("classifier", "score", "qa_outputs", "lm_head", "pooler.dense", "cls.{word}")


class _Family(NamedTuple):
    layers: str  # the list of layers in the PyTorch model, without the prefix
    prefix: str  # the prefix of these names in a model with a head
    parts: tuple[tuple[str, str], ...]
    flax_layers: tuple[str, ...]  # names of the list in Flax models
    other_modules: tuple[tuple[str, str], ...]
    conv1d: tuple[str, ...] = ()


_ENCODER = ("encoder/layer", "encoder/layers")
_FAMILIES = {
    "bert": _Family("encoder.layer", "bert", _BERT, _ENCODER, _OTHER_BERT),
    "gpt2": _Family(
        *("h", "transformer", _GPT2, ("h", "layers"), _OTHER_GPT2), ("c_attn", "c_proj", "c_fc")
    ),
    **{
        name: _Family("layers", "model", parts, lists, _OTHER_LLAMA)
        for name, parts, lists in (
            ("llama", _LLAMA, ("layers",)),
            ("gemma", _GEMMA1, ("layers", "layer")),
            ("gemma2", _GEMMA3, ("layers", "layer")),
            ("gemma3", _GEMMA3, ("layers", "layer")),
            ("mistral", _LLAMA, ("layers",)),
            ("qwen2", _LLAMA, ("layers",)),
            ("qwen3", _LLAMA, ("layers",)),
        )
    },
    **{
        name: _Family(
            *(layers, "vit", tuple((flax, hf[version]) for flax, hf in _VIT.items())),
            *((*_ENCODER, "layers"), _OTHER_VIT),
        )
        for version, (name, layers) in enumerate((("vit", "layers"), ("vit_v4", "encoder.layer")))
    },
}


@functools.lru_cache(maxsize=256)
def hf_names(family: str, *, root: str | None = None, prefix: str | None = None) -> NameMap:
    """Return the name map of a family of models, such as bert, llama or gemma3.

    It covers the Flax models in transformers (up to version 4), Tunix and google-deepmind/gemma,
    and layers built on Flax's attention modules, with layers named ``layers/3`` or ``layers_3``, or
    stacked in ``layers``. If several Flax names match a PyTorch module, a file is read with the
    first one, unless ``load_pretrained(like=...)`` selects another. ``"vit"`` has the names of
    transformers 5, ``"vit_v4"`` those of transformers 4.

    Only names are translated, not the order of rows: in a Flax model whose rotary embedding pairs
    other features than the PyTorch model's (Meta's Llama, MaxText), rows are ordered differently.

    Args:
      family: bert, gpt2, llama, mistral, gemma, gemma2, gemma3, qwen2, qwen3, vit or vit_v4.
      root: path of the module that contains the list of layers in the Flax model. None accepts both
        an empty path and the PyTorch model's prefix.
      prefix: prefix of the layers' names in the PyTorch model. None is the prefix in a model with a
        head (``"bert"``, ``"transformer"``, ``"model"`` or ``"vit"``); ``""`` is for a model
        without a head.

    Returns:
      The :class:`NameMap` of the family.

    Raises:
      ValueError: ``family`` is unknown.

    >>> hf_names("llama").to_hf("layers/3/attn/q_proj")[0][0]
    'model.layers.3.self_attn.q_proj'
    >>> [name for name, *_ in hf_names("gemma").to_hf("layer_3/attn/kv_einsum", (1,))]
    ['model.layers.3.self_attn.v_proj']
    """
    if family not in _FAMILIES:
        raise ValueError(
            f"`names={family!r}`: must be one of {', '.join(_FAMILIES)}, or pairs of names; use "
            "one of them."
        )
    known = _FAMILIES[family]
    prefix = known.prefix if prefix is None else prefix.strip(".")
    roots = (prefix.replace(".", "/"), "") if root is None else (root.strip("/"),)
    theirs = ".".join(filter(None, (prefix, known.layers)))
    pairs = []
    for stack, r, layers in _orders(roots, known.flax_layers):
        ours = "/".join(filter(None, (r, layers)))
        for part, hf in known.parts:
            name = f"{ours}{stack}{part}" if "{i}" in stack else _stacked(f"{ours}/{part}")
            pairs.append((name, f"{theirs}.{{i}}.{hf}"))
    for r in roots:
        pairs += [
            ("/".join(filter(None, (r, ours))), ".".join(filter(None, (prefix, theirs))))
            for ours, theirs in known.other_modules
        ]
    for head in _HEADS:
        name = head.replace(".", "/")
        pairs.append((name, head))
        pairs += [(f"{r}/{name}", f"{prefix}.{head}") for r in roots if r and prefix]
    return NameMap(tuple(dict.fromkeys(pairs)), known.conv1d)


def _orders(roots: Sequence[str], lists: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return ``(separator, root, list)`` of names, the likelier and the PyTorch names first.

    Separate layers are likelier than stacked ones.
    """
    return [(s, r, layers) for s in ("/{i}/", "_{i}/", "/") for r in roots for layers in lists]


def _stacked(name: str) -> str:
    """Add a stack index to a name.

    ``a/b`` becomes ``a/b[{i}]``, ``a/b[1]`` becomes ``a/b[{i},1]``, and ``a/b:0/2`` becomes
    ``a/b[{i}]:0/2``.
    """
    path, colon, part = name.partition(":")
    path = path.replace("[", "[{i},") if "[" in path else f"{path}[{{i}}]"
    return f"{path}{colon}{part}"


Names: TypeAlias = NameMap | str | Mapping[str, str] | Iterable[tuple[str, str]] | None


def as_names(
    names: Names,
) -> NameMap:
    """Convert the argument ``names`` to a :class:`NameMap`; None translates ``/`` to ``.``.

    >>> as_names(None).to_hf("encoder/query")[0][0]
    'encoder.query'
    """
    if names is None:
        return IDENTITY
    if isinstance(names, NameMap):
        return names
    if isinstance(names, str):
        return hf_names(names)
    return NameMap(names)  # pyright: ignore[reportArgumentType]
