"""Which layers are adapted: patterns, predicates, ranks; and the table that says so."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax

from adalora_jax.adapter import Adapter, init_adapter
from adalora_jax.compaction import table
from adalora_jax.config import AdaLoraConfig
from adalora_jax.layers import SUPPORTED, Layer

_LINEAR_KINDS = ("dense", "general", "einsum")


class Candidate(NamedTuple):
    """A module of the model, as selection sees it."""

    module: Any
    layer: Layer | None  # None where it cannot be adapted
    shape: tuple[int, ...] | None  # of the whole weight, stacked axes included


class Target(NamedTuple):
    """A weight that is adapted: how it reads as matrices, and the rank it starts with."""

    layer: Layer
    shape: tuple[int, ...]
    rank: int

    def init(self, key: chex.PRNGKey, config: AdaLoraConfig) -> Adapter:
        """A fresh adapter for this weight."""
        stack, in_features, out_features = self.layer.matrix(self.shape)
        return init_adapter(key, in_features, out_features, config, rank=self.rank, stack=stack)


def select(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> dict[str, Target]:
    """The layers that ``config`` asks for, by path, sorted.

    ``target_modules`` means what it means in PEFT: a list of names, each matching the paths that
    end with it at a separator; or one regex that must match a whole path; or ``"all-linear"``. It
    may also be a function ``(path, module) -> bool``. Paths are written ``encoder/layers_0/query``;
    ``encoder.layers_0.query`` matches as well.

    A name in a list is meant literally, so each must lead to a layer that can be adapted. A regex
    or a function picks among the layers that can.

    Args:
      candidates: every module of the model by path.
      config: patterns, ranks.

    Raises:
      ValueError: nothing is selected, a name of the list matches nothing, or names a module that
        cannot be adapted; with the nearest paths there are.
    """
    wanted = config.target_modules
    if wanted is None:
        raise ValueError(
            "target_modules=None: say which layers to adapt, as name suffixes, a regex or "
            f"'all-linear'. {_nearest('', candidates)}"
        )
    named = isinstance(wanted, tuple)
    matched = {path for path, c in candidates.items() if _matches(wanted, path, c)}
    for name in wanted if named else ():
        if not any(_matches((name,), path, c) for path, c in candidates.items()):
            raise ValueError(
                f"target_modules: {name!r} matches no module. {_nearest(name, candidates)}"
            )
    kept = {
        path
        for path in matched
        if not (config.exclude_modules and _matches(config.exclude_modules, path, candidates[path]))
        and not saved(path, config)
        and _layer_index_matches(path, config)
    }
    for path in sorted(kept) if named else ():
        if candidates[path].layer is None:
            raise ValueError(_cannot_adapt(path, candidates))
    chosen = sorted(path for path in kept if candidates[path].layer is not None)
    if not chosen and kept:
        raise ValueError(_cannot_adapt(min(kept), candidates))
    if not chosen:
        filters = {n: getattr(config, n) for n in ("exclude_modules", "layers_to_transform")}
        after = "".join(f", {n}={v!r}" for n, v in filters.items() if v is not None)
        shown = wanted if isinstance(wanted, str) else ""
        raise ValueError(
            f"target_modules={wanted!r}{after} selects no layer. {_nearest(shown, candidates)}"
        )
    ranks = _ranks(chosen, config)
    return {p: Target(candidates[p].layer, candidates[p].shape, ranks[p]) for p in chosen}


def saved(path: str, config: AdaLoraConfig) -> bool:
    """Whether ``modules_to_save`` names this path, or a module that holds it.

    >>> saved("head/kernel", AdaLoraConfig(total_step=1, modules_to_save=["head"]))
    True
    """
    parts = path.split("/")
    prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(_is_suffix(name, p) for name in config.modules_to_save or () for p in prefixes)


def saved_roots(paths: Sequence[str], config: AdaLoraConfig) -> list[str]:
    """The outermost nodes among parameter ``paths`` and their parents that are to be saved.

    Raises:
      ValueError: a name in ``modules_to_save`` matches nothing.
    """
    parents = {
        "/".join(path.split("/")[:n]) for path in paths for n in range(1, len(path.split("/")) + 1)
    }
    for name in config.modules_to_save or ():
        if not any(_is_suffix(name, path) for path in parents):
            near = ", ".join(difflib.get_close_matches(name, sorted(parents), 5, 0.3))
            raise ValueError(
                f"modules_to_save: {name!r} matches no parameter or module; the nearest: {near}."
            )
    roots = [
        p for p in sorted(parents) if any(_is_suffix(n, p) for n in config.modules_to_save or ())
    ]
    return [p for p in roots if not any(p.startswith(f"{other}/") for other in roots)]


def init_all(
    key: chex.PRNGKey, targets: Mapping[str, Target], config: AdaLoraConfig
) -> dict[str, Adapter]:
    """Adapters for all targets, in one jitted call.

    Raises:
      TypeError: ``key`` is no PRNG key.
    """

    @jax.jit
    def init(key):
        keys = jax.random.split(key, len(targets))
        return {path: t.init(k, config) for k, (path, t) in zip(keys, targets.items())}

    return init(key)


def describe(targets: Mapping[str, Target], config: AdaLoraConfig) -> str:
    """A table of what would be adapted: shapes, starting ranks, parameters.

    >>> dense = Target(Layer("dense", "kernel", (), (0,), (1,)), (6, 4), 2)
    >>> print(describe({"query": dense}, AdaLoraConfig(total_step=10)))
    layer    kind     matrices   in   out   rank   parameters   kernel
    query    dense           1    6     4      2           22       24
    total                    1                 2           22       24
    """
    rows = []
    for path, (layer, shape, rank) in targets.items():
        stack, ins, outs = layer.matrix(shape)
        n = math.prod(stack)
        count = n * rank * (ins + outs + 1)
        rows.append((path, layer.kind, n, ins, outs, rank, count, n * ins * outs))
    sums = [sum(row[i] for row in rows) for i in range(2, 8)]
    total_rank = sum(row[2] * row[5] for row in rows)
    total = ("total", "", sums[0], "", "", total_rank, *sums[4:])
    header = ("layer", "kind", "matrices", "in", "out", "rank", "parameters", "kernel")
    return table([header, *rows, total], left=2)


def _matches(wanted: Any, path: str, candidate: Candidate) -> bool:
    if callable(wanted):
        return bool(wanted(path, candidate.module))
    if wanted == "all-linear":
        return candidate.layer is not None and candidate.layer.kind in _LINEAR_KINDS
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(f"target_modules={wanted!r} is no regex: {error}.") from None
        return any(pattern.fullmatch(form) for form in (path, path.replace("/", ".")))
    return any(_is_suffix(name, path) for name in wanted)


def _is_suffix(name: str, path: str) -> bool:
    """PEFT's rule: the path is the name, or ends with it at a separator."""
    name, path = name.replace(".", "/").strip("/"), path.replace(".", "/")
    return path == name or path.endswith(f"/{name}")


def _layer_index_matches(path: str, config: AdaLoraConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return True
    index = _layer_index(path, config.layers_pattern)
    return index is not None and index in (wanted if isinstance(wanted, tuple) else (wanted,))


def _layer_index(path: str, names: tuple[str, ...] | None) -> int | None:
    """The index of the layer that holds ``path``: 3 of ``h/3/mlp/up`` and of ``block_3/mlp/up``.

    As in PEFT, a number that is a path component of its own counts, the last one where there are
    several, and ``layers_pattern`` can name the list. Without such a component the number that
    ends the first name is taken, as in linen's own names.
    """
    parents = path.rpartition("/")[0]
    for name in names or (r"[^/]+",):
        found = re.findall(rf"(?:^|/){name}/(\d+)(?=/|$)", parents)
        found = found[-1:] or re.findall(rf"(?:^|/){name}_(\d+)(?=/|$)", parents)[:1]
        if found:
            return int(found[0])
    return None


def _ranks(paths: Sequence[str], config: AdaLoraConfig) -> dict[str, int]:
    """``init_r``, or what an earlier run's ``rank_pattern`` says."""
    ranks = dict.fromkeys(paths, config.init_r)
    for name, rank in config.rank_pattern or ():
        name = name.removesuffix(".lora_E").removeprefix("base_model.model.")
        found = [path for path in paths if _is_suffix(path, name) or _is_suffix(name, path)]
        if not found:
            raise ValueError(
                f"rank_pattern: {name!r} is no adapted layer; they are {', '.join(paths[:10])}."
            )
        ranks |= dict.fromkeys(found, _rank(rank))
    return ranks


def _rank(rank: Any) -> int:
    """Of a number, of the booleans of one adapter, or of the largest in a stack."""
    if isinstance(rank, int):
        return rank
    return sum(rank) if isinstance(rank[0], bool) else max(map(_rank, rank))


def _cannot_adapt(path: str, candidates: Mapping[str, Candidate]) -> str:
    kind = type(candidates[path].module).__name__
    inside = [p for p, c in candidates.items() if p.startswith(f"{path}/") and c.layer is not None]
    way_out = f"name the layers in it: {', '.join(inside[:8])}" if inside else "leave it out"
    return (
        f"target_modules: {path!r} is a {kind}, which cannot be adapted; {way_out}. "
        f"Kinds that can: {SUPPORTED}."
    )


def _nearest(name: str, candidates: Mapping[str, Candidate]) -> str:
    paths = [path for path, candidate in candidates.items() if candidate.layer is not None]
    if not paths:
        return f"The model has no layer that can be adapted; kinds that can: {SUPPORTED}."
    plain = re.sub(r"[^\w/]+", "", name.replace(".", "/"))
    near = sorted(paths, key=lambda path: -_similarity(plain, path))[:8]
    return f"The nearest layers that can be adapted: {', '.join(near)}."


def _similarity(name: str, path: str) -> float:
    tails = [path, path.rpartition("/")[2]]
    return max(difflib.SequenceMatcher(None, name, tail).ratio() for tail in tails)
