"""Which layers are adapted: patterns, predicates, ranks; and the table that says so."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adalora_jax import sharding
from adalora_jax.adapter import Adapter, init_adapter
from adalora_jax.compaction import table
from adalora_jax.config import AdaLoraConfig
from adalora_jax.layers import SUPPORTED
from adalora_jax.layout import Layout
from adalora_jax.rankspec import RankSpec

_LINEAR_KINDS = ("dense", "general", "einsum")


class Candidate(NamedTuple):
    """A module of the model, as selection sees it."""

    module: Any
    layer: Layout | None = None  # None where it cannot be adapted
    shape: tuple[int, ...] = ()  # of the whole weight, stacked axes included
    refused: str = ""  # why it cannot be adapted although it has a weight
    note: str = ""  # why its increment cannot be merged
    dropout: bool = True  # its scope has random numbers for dropout


class Target(NamedTuple):
    """A weight that is adapted: how it reads as matrices, and the rank it starts with."""

    layer: Layout
    shape: tuple[int, ...]
    rank: int


def select(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> dict[str, Target]:
    """The layers that ``config`` asks for, by path, sorted.

    ``target_modules`` means what it means in PEFT: a list of names, each matching the paths that
    end with it at a separator; or one regex that must match a whole path; or ``"all-linear"``. It
    may also be a function ``(path, module) -> bool | RankSpec``, see :func:`resolve`. Paths are
    written ``encoder/layers_0/query``; ``encoder.layers_0.query`` matches as well.

    A name in a list is meant literally, so each must lead to a layer that can be adapted. A regex
    or a function picks among the layers that can.

    Args:
      candidates: every module of the model by path.
      config: patterns, ranks.

    Raises:
      ValueError: nothing is selected, a name of the list matches nothing, or names a module that
        cannot be adapted; with the nearest paths there are. Or a function gave a RankSpec.
    """
    chosen = _chosen(candidates, config)
    if specs := _specs(chosen, config):
        path = next(iter(specs))
        raise ValueError(
            f"target_modules gave {specs[path]} for {path!r}, which only this call would know: "
            "write it into the config with config = adalora_jax.linen.resolve(model, config, "
            "variables, *inputs) or adalora_jax.nnx.resolve(model, config), and use that config."
        )
    ranks = _ranks(list(chosen), config)
    return {
        path: Target(dataclasses.replace(c.layer, note=c.note), c.shape, ranks[path])
        for path, c in chosen.items()
        if c.layer
    }


def resolve(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> AdaLoraConfig:
    """``config`` with a function as ``target_modules`` replaced by what it chose.

    The optimizer and merging see paths, not modules, so the function cannot tell them the ranks
    it chose; and a config without functions can be saved. Each RankSpec becomes an entry of
    ``rank_limits``, before those there are.
    """
    if not callable(config.target_modules):
        return config
    chosen = _chosen(candidates, config)
    # The pattern of a path also matches longer paths with the same end: those come first.
    specs = sorted(_specs(chosen, config).items(), key=lambda item: (-len(item[0]), item[0]))
    limits = [(re.escape(path), spec) for path, spec in specs]
    return config.replace(
        target_modules=f"(?:{'|'.join(map(re.escape, chosen))})",
        rank_limits=[*limits, *(config.rank_limits or ())] or None,
    )


def _specs(chosen: Mapping[str, Candidate], config: AdaLoraConfig) -> dict[str, RankSpec]:
    """The RankSpecs that a function as ``target_modules`` gives."""
    if not callable(config.target_modules):
        return {}
    verdicts = {path: config.target_modules(path, c.module) for path, c in chosen.items()}
    return {path: spec for path, spec in verdicts.items() if isinstance(spec, RankSpec)}


def _chosen(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> dict[str, Candidate]:
    """The candidates that are selected, in the order of their paths."""
    wanted = config.target_modules
    if wanted is None:
        raise ValueError(
            "target_modules=None: say which layers to adapt, as name suffixes, a regex or "
            f"'all-linear'. {_nearest('', candidates)}"
        )
    named = isinstance(wanted, tuple)
    matched = {path for path, c in candidates.items() if _matches(wanted, path, c)}
    candidates = {p: c._replace(layer=None) if c.refused else c for p, c in candidates.items()}
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
        refused = [path for path in kept if candidates[path].refused]
        raise ValueError(_cannot_adapt(min(refused or kept), candidates))
    if not chosen:
        filters = {n: getattr(config, n) for n in ("exclude_modules", "layers_to_transform")}
        after = "".join(f", {n}={v!r}" for n, v in filters.items() if v is not None)
        shown = wanted if isinstance(wanted, str) else ""
        raise ValueError(
            f"target_modules={wanted!r}{after} selects no layer. {_nearest(shown, candidates)}"
        )
    return {path: candidates[path] for path in chosen}


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
    key: jax.Array,
    targets: Mapping[str, Target],
    config: AdaLoraConfig,
    shardings: Mapping[str, Adapter] | None = None,
) -> dict[str, Adapter]:
    """Adapters for all targets, in one jitted call, each made where ``shardings`` says.

    Weights that read alike are initialised together: a deep model compiles as fast as a shallow
    one. The values do not depend on the mesh.

    Raises:
      TypeError: ``key`` is no PRNG key.
    """
    alike: dict[Any, list[int]] = {}
    for index, (layer, shape, rank) in enumerate(targets.values()):
        alike.setdefault((*layer.matrix(shape), rank), []).append(index)

    def init(key):
        keys = jax.random.split(key, len(targets))
        fresh: dict[int, Adapter] = {}
        for shape, members in alike.items():
            many = _init_alike(keys[jnp.array(members)], *shape, config=config)
            for n, index in enumerate(members):
                fresh[index] = jax.tree.map(operator.itemgetter(n), many)
        return {path: fresh[index]._replace(**known[path]) for index, path in enumerate(targets)}

    known = facts(targets, config)
    shardings = shardings and {path: a._replace(**known[path]) for path, a in shardings.items()}
    return sharding.placed(init, shardings, key)


def facts(targets: Mapping[str, Target], config: AdaLoraConfig) -> dict[str, dict[str, Any]]:
    """Return ``{path: static fields}`` of the adapters: by them each knows its weight."""
    return {
        path: {
            "scale": config.scale_of(path),
            "layout": dataclasses.replace(target.layer, shape=tuple(target.shape)),
        }
        for path, target in targets.items()
    }


def _init_alike(keys, stack, in_features, out_features, rank, config) -> Adapter:
    """One adapter a key, stacked."""
    one = lambda key: init_adapter(key, in_features, out_features, config, rank=rank, stack=stack)
    return jax.vmap(one)(keys)


def describe(targets: Mapping[str, Target], config: AdaLoraConfig) -> str:
    """A table of what would be adapted: shapes, starting ranks, parameters and cost.

    The cost is the adapter's share of the weight: of its parameters, and for a dense layer of its
    multiply-adds. The last line is the memory that comes on top of the base model.

    >>> dense = Target(Layout(), (60, 40), 2)
    >>> print(describe({"query": dense}, AdaLoraConfig(total_step=10)))
    layer    kind     matrices   in   out   rank   parameters   kernel    cost
    query    dense           1   60    40      2          202     2400   8.4 %
    total                    1                 2          202     2400   8.4 %
    memory: adapters 808 bytes, importance 1.6 kB
    """
    rows = []
    for path, (layer, shape, rank) in targets.items():
        stack, ins, outs = layer.matrix(shape)
        n = math.prod(stack)
        count, kernel = n * rank * (ins + outs + 1), n * ins * outs
        rows.append((path, layer.kind, n, ins, outs, rank, count, kernel, _percent(count, kernel)))
    matrices, count, kernel = (sum(row[i] for row in rows) for i in (2, 6, 7))
    rank = sum(row[2] * row[5] for row in rows)
    total = ("total", "", matrices, "", "", rank, count, kernel, _percent(count, kernel))
    header = ("layer", "kind", "matrices", "in", "out", "rank", "parameters", "kernel", "cost")
    adapters = count * jnp.dtype(config.param_dtype).itemsize
    importance = count * 2 * 4 + rank  # two float32 averages a parameter, a boolean a triplet
    memory = f"memory: adapters {_bytes(adapters)}, importance {_bytes(importance)}"
    return f"{table([header, *rows, total], left=2)}\n{memory}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if isinstance(count, float) else f"{count} {unit}"
        count = count / 1000
    return f"{count:.1f} GB"


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
    """What ``init_r`` and ``rank_limits`` say, or else an earlier run's ``rank_pattern``."""
    ranks = {path: config.spec_of(path).init_r for path in paths}
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
    if reason := candidates[path].refused:
        return f"target_modules: {path!r} cannot be adapted: {reason}."
    kind = type(candidates[path].module).__name__
    inside = [p for p, c in candidates.items() if p.startswith(f"{path}/") and c.layer is not None]
    instead = f"Name the layers in it: {', '.join(inside[:8])}." if inside else ""
    return (
        f"target_modules: {path!r} is a {kind}, which cannot be adapted; kinds that can: "
        f"{SUPPORTED}. {instead or _nearest(path, candidates)}"
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
