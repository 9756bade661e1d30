"""Selection of layers by pattern or predicate, their ranks, and a table of the selection."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from adalora_jax._src.core import rank_spec
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.init import init_adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.protocols import TargetFunction
from adalora_jax._src.core.rank_spec import RankSpec
from adalora_jax._src.core.text import table
from adalora_jax._src.modules import sharding
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.layers import SUPPORTED

_Pattern: TypeAlias = str | Collection[str] | TargetFunction
_LINEAR_KINDS = ("dense", "general", "einsum", "weight")


class Target(NamedTuple):
    """A weight that is adapted.

    Attributes:
      layer: how the weight is read as matrices.
      shape: shape of the whole weight, stacked axes included.
      rank: triplets per matrix at the start.
      note: why the increment cannot be merged; empty if it can.
    """

    layer: Layout
    shape: tuple[int, ...]
    rank: int
    note: str = ""


def select(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> dict[str, Target]:
    """Return the layers that ``config`` selects, sorted by path.

    ``target_modules`` is defined as in PEFT: a list of names, each of which matches the paths that
    end with it at a separator; one regex that must match a whole path; or ``"all-linear"``. It may
    also be a function ``(path, module) -> bool | RankSpec``, see :func:`resolve`. Paths are
    written ``encoder/layers_0/query``; ``encoder.layers_0.query`` matches as well.

    Every module that a name in a list selects must be adaptable. A regex or a function selects
    among the adaptable layers only. Each pattern of ``exclude_modules`` must match a module, each
    pattern of ``rank_overrides`` an adapted layer.

    Args:
      candidates: every module of the model by path.
      config: patterns and ranks.

    Raises:
      ValueError: nothing is selected; a pattern or an index matches nothing; a name in the list
        selects a module that cannot be adapted, or only modules that ``modules_to_save`` trains;
        ``exclude_modules`` names a module that only contains layers; or a function returned a
        RankSpec. The message names the nearest paths.
    """
    chosen = _chosen(candidates, config)
    if specs := _specs(chosen, config):
        path = next(iter(specs))
        raise ValueError(
            f"`target_modules`: the function returns {specs[path]} for {path!r}, which the "
            "optimizer would not know; write it into the config with config = "
            "adalora_jax.linen.resolve(model, config, variables, *inputs), "
            "adalora_jax.nnx.resolve(model, config) or "
            "adalora_jax.functional.resolve(fn, params, config, *inputs), and use that config."
        )
    for pattern, _ in config.rank_overrides or ():
        if not any(rank_spec.matches(pattern, path) for path in chosen):
            raise ValueError(
                f"`rank_overrides`: {pattern!r} matches no adapted layer; name one of the adapted "
                f"layers: {', '.join(list(chosen)[:10])}."
            )
    ranks = _ranks(list(chosen), config)
    return {p: Target(c.layer, c.shape, ranks[p], c.note) for p, c in chosen.items() if c.layer}


def resolve(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> AdaLoraConfig:
    """Return ``config`` with a ``target_modules`` function replaced by the paths it selects.

    The optimizer and merging see paths, not modules, so they cannot call the function to learn its
    ranks; and a config without functions can be saved. Each RankSpec becomes an entry of
    ``rank_overrides``, before the existing entries.
    """
    if not callable(config.target_modules):
        return config
    chosen = _chosen(candidates, config)
    # The pattern of a path also matches longer paths with the same end, so these come first.
    specs = sorted(_specs(chosen, config).items(), key=lambda item: (-len(item[0]), item[0]))
    limits = [(re.escape(path), spec) for path, spec in specs]
    return config.replace(
        target_modules=f"(?:{'|'.join(map(re.escape, chosen))})",
        rank_overrides=[*limits, *(config.rank_overrides or ())] or None,
    )


def _specs(chosen: Mapping[str, Candidate], config: AdaLoraConfig) -> dict[str, RankSpec]:
    """Return the RankSpecs that a ``target_modules`` function returns, by path."""
    if not callable(config.target_modules):
        return {}
    verdicts = {path: config.target_modules(path, c.module) for path, c in chosen.items()}
    return {path: spec for path, spec in verdicts.items() if isinstance(spec, RankSpec)}


def _chosen(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> dict[str, Candidate]:
    """Return the selected candidates, sorted by path."""
    kept = _matched(candidates, config)
    for path in kept if isinstance(config.target_modules, tuple) else ():
        if not _adaptable(candidates[path]):
            raise ValueError(_cannot_adapt(path, candidates))
    chosen = [path for path in kept if _adaptable(candidates[path])]
    if not chosen and kept:
        reasons = [f"{p!r}: {c.cannot_adapt}" for p in kept if (c := candidates[p]).cannot_adapt]
        if not reasons:
            raise ValueError(_cannot_adapt(kept[0], candidates))
        raise ValueError(
            f"`target_modules={config.target_modules!r}`: selects no layer that can be adapted: "
            f"{'; '.join(reasons[:8])}; {_nearest('', candidates)}."
        )
    if not chosen:
        raise ValueError(_selects_nothing(candidates, config))
    return {path: candidates[path] for path in chosen}


def _matched(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> list[str]:
    """Return the sorted paths that the patterns of ``config`` select, adaptable or not.

    Raises:
      ValueError: ``target_modules`` is None, a pattern or an index matches nothing, a name selects
        only modules that ``modules_to_save`` trains, or an excluded module only contains layers.
    """
    pattern, excluded = config.target_modules, config.exclude_modules
    if pattern is None:
        raise ValueError(
            "`target_modules=None`: no layer is selected; pass name suffixes, a regex or "
            f"'all-linear'; {_nearest('', candidates)}."
        )
    for name in pattern if isinstance(pattern, tuple) else ():
        _require_match("target_modules", name, (name,), candidates)
    for name in excluded if isinstance(excluded, tuple) else ():
        _require_match("exclude_modules", name, (name,), candidates)
    if isinstance(excluded, str):
        _require_match("exclude_modules", excluded, excluded, candidates)
    for name in excluded if isinstance(excluded, tuple) else ():
        _check_container(name, candidates)
    matched = [
        path
        for path, candidate in candidates.items()
        if _matches(pattern, path, candidate)
        and not (excluded and _matches(excluded, path, candidate))
    ]
    for name in pattern if isinstance(pattern, tuple) else ():
        named = [path for path in matched if _is_suffix(name, path)]
        if named and all(saved_params(path, config) for path in named):
            raise ValueError(
                f"`target_modules={pattern!r}`: {name!r} selects no layer, because modules_to_save "
                f"already trains {', '.join(map(repr, named[:8]))} as a whole; name a layer in "
                "only one of the two."
            )
    matched = [path for path in matched if not saved_params(path, config)]
    _require_indices(matched, config)
    return sorted(path for path in matched if _layer_index_matches(path, config))


def _check_container(name: str, candidates: Mapping[str, Candidate]) -> None:
    """Raise an error if a name in ``exclude_modules`` matches only containers of layers."""
    found = [path for path, c in candidates.items() if _is_suffix(name, path)]
    inside = [p for p, c in candidates.items() if c.layer and p.startswith(f"{found[0]}/")]
    if inside and not any(candidates[path].layer for path in found):
        raise ValueError(
            f"`exclude_modules`: {name!r} matches {found[0]!r}, which contains layers but is not a "
            f"layer, so it excludes nothing; name the layers ({', '.join(inside[:8])}), or use the "
            f"regular expression '.*{re.escape(name)}/.*'."
        )


def _require_indices(paths: Sequence[str], config: AdaLoraConfig) -> None:
    """Raise an error if some indices of ``layers_to_transform`` match a path and others do not."""
    indices = config.layers_to_transform
    if indices is None or not paths:
        return
    known = {_layer_index(path, cast("Any", config.layers_pattern)) for path in paths} - {None}
    indices = indices if isinstance(indices, tuple) else (indices,)
    for index in indices:
        if index not in known and known & {*indices}:
            raise ValueError(
                f"`layers_to_transform`: no layer that target_modules selects has the index "
                f"{index}; pass some of the indices {sorted(cast('Any', known))}."
            )


def _require_match(
    field: str,
    name: str,
    pattern: _Pattern,
    candidates: Mapping[str, Candidate],
) -> None:
    if not any(_matches(pattern, path, c) for path, c in candidates.items()):
        raise ValueError(
            f"`{field}`: {name!r} matches no module; {_whole_path(pattern)}"
            f"{_nearest(name, candidates)}."
        )


def _selects_nothing(candidates: Mapping[str, Candidate], config: AdaLoraConfig) -> str:
    """Return the error message for an empty selection: its cause, or the nearest paths."""
    pattern = cast("_Pattern", config.target_modules)
    names = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    filters = {name: value for name in names if (value := getattr(config, name)) is not None}
    start = f"`target_modules={pattern!r}"
    matched = sorted(path for path, c in candidates.items() if _matches(pattern, path, c))
    if trained := [path for path in matched if saved_params(path, config)]:
        return (
            f"{start}, modules_to_save={config.modules_to_save!r}`: no layer is selected, because "
            f"modules_to_save already trains {', '.join(map(repr, trained[:8]))} as a whole; name "
            "a layer in only one of the two."
        )
    after = "".join(f", {name}={value!r}" for name, value in filters.items()) if matched else ""
    hint = "" if matched else _whole_path(pattern)
    near = _nearest(pattern if isinstance(pattern, str) else "", candidates)
    return f"{start}{after}`: no layer is selected; {hint}{near}."


def _whole_path(pattern: _Pattern) -> str:
    """Return a hint on how a string is matched, for the message if it matches nothing."""
    if not isinstance(pattern, str) or pattern == "all-linear":
        return ""
    return (
        "write a regular expression for the whole path, or a list of names, "
        f"{[pattern]!r}, for the ends of paths; "
    )


def _adaptable(candidate: Candidate) -> bool:
    return candidate.layer is not None and not candidate.cannot_adapt


def saved_params(path: str, config: AdaLoraConfig) -> bool:
    """Return whether ``modules_to_save`` names this path or a module that contains it.

    >>> saved_params("head/kernel", AdaLoraConfig(total_step=1, modules_to_save=["head"]))
    True
    """
    parts = path.split("/")
    prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(_is_suffix(name, p) for name in config.modules_to_save or () for p in prefixes)


def saved_roots(paths: Sequence[str], config: AdaLoraConfig) -> list[str]:
    """Return the outermost of ``paths`` and their parents that ``modules_to_save`` names.

    Raises:
      ValueError: a name in ``modules_to_save`` matches nothing.
    """
    parents = {
        "/".join(path.split("/")[:n]) for path in paths for n in range(1, len(path.split("/")) + 1)
    }
    for name in config.modules_to_save or ():
        if not any(_is_suffix(name, path) for path in parents):
            near = ", ".join(_by_similarity(name, parents)[:5])
            raise ValueError(
                f"`modules_to_save`: {name!r} matches no parameter or module; name one of the "
                f"nearest: {near}."
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
    """Initialise the adapters of all targets in one jitted call, with the given shardings.

    Weights with the same matrix shapes and rank are initialised together, so a deep model compiles
    as fast as a shallow one. The values do not depend on the mesh.

    Raises:
      TypeError: ``key`` is not a PRNG key.
    """
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed or dtype == jnp.uint32):  # legacy keys are of uint32
        raise TypeError(f"`key={type(key).__name__}`: is not a PRNG key; pass jax.random.key(0).")
    groups: dict[Any, list[int]] = {}
    for index, target in enumerate(targets.values()):
        groups.setdefault((*target.layer.matrix(target.shape), target.rank), []).append(index)

    def init(key: jax.Array) -> dict[str, Adapter]:
        keys = jax.random.split(key, len(targets))
        fresh: dict[int, Adapter] = {}
        for shape, members in groups.items():
            many = _init_group(keys[jnp.array(members)], *shape, config=config)
            for n, index in enumerate(members):
                fresh[index] = jax.tree.map(operator.itemgetter(n), many)
        return {path: fresh[index]._replace(**known[path]) for index, path in enumerate(targets)}

    known = static_fields(targets, config)
    shardings = shardings and {path: a._replace(**known[path]) for path, a in shardings.items()}
    return sharding.jit_with_shardings(init, shardings, key)


def static_fields(
    targets: Mapping[str, Target], config: AdaLoraConfig
) -> dict[str, dict[str, Any]]:
    """Return ``{path: static fields}`` of the adapters: scale and layout of each weight."""
    return {
        path: {
            "scale": config.scale_of(path),
            "layout": dataclasses.replace(
                target.layer, shape=tuple(target.shape), note=target.note
            ),
        }
        for path, target in targets.items()
    }


def _init_group(
    keys: jax.Array,
    stack: tuple[int, ...],
    in_features: int,
    out_features: int,
    rank: int,
    config: AdaLoraConfig,
) -> Adapter:
    """Return one adapter per key, stacked."""

    def one(key: jax.Array) -> Adapter:
        return init_adapter(key, in_features, out_features, config, rank=rank, stack=stack)

    return jax.vmap(one)(keys)


def describe(
    targets: Mapping[str, Target],
    config: AdaLoraConfig,
    candidates: Mapping[str, Candidate] | None = None,
    parameters: Mapping[str, tuple[int, ...]] | None = None,
) -> str:
    """Return a table of the targets: shapes, starting ranks, parameters and cost.

    The cost is the adapter's size relative to the weight: in parameters, and for a dense layer
    also in multiply-adds. The lines below the table list the memory needed in addition to the base
    model, the parameters that ``modules_to_save`` trains, the ``candidates`` that the config
    selects but that cannot be adapted, and the ``parameters`` of two or more axes that no known
    layer holds.

    >>> dense = Target(Layout(), (60, 40), 2)
    >>> print(describe({"query": dense}, AdaLoraConfig(total_step=10)))
    layer    kind     matrices   in   out   rank   parameters   kernel    cost
    query    dense           1   60    40      2          202     2400   8.4 %
    total                    1                 2          202     2400   8.4 %
    memory: adapters 808 bytes, importance 1.6 kB
    """
    rows = []
    for path, (layer, shape, rank, _) in targets.items():
        stack, ins, outs = layer.matrix(shape)
        n = math.prod(stack)
        count, kernel = n * rank * (ins + outs + 1), n * ins * outs
        rows.append((path, layer.kind, n, ins, outs, rank, count, kernel, _percent(count, kernel)))
    matrices, count, kernel = (sum(row[i] for row in rows) for i in (2, 6, 7))
    rank = sum(row[2] * row[5] for row in rows)
    total = ("total", "", matrices, "", "", rank, count, kernel, _percent(count, kernel))
    header = ("layer", "kind", "matrices", "in", "out", "rank", "parameters", "kernel", "cost")
    adapters = count * jnp.dtype(config.param_dtype).itemsize
    importance = count * 2 * 4 + rank  # two float32 averages per parameter, a boolean per triplet
    memory = f"memory: adapters {_bytes(adapters)}, importance {_bytes(importance)}"
    matched = {p: candidates[p] for p in _matched(candidates, config)} if candidates else {}
    reasons = {p: c.cannot_adapt for p, c in matched.items() if c.cannot_adapt}
    lines = [f"not adapted: {p} {matched[p].shape}: {reason}" for p, reason in reasons.items()]
    trained = _trained_along(parameters or {}, config)
    left_out = _unadapted(parameters or {}, candidates or {}, config)
    return "\n".join([table([header, *rows, total], left=2), memory, *trained, *lines, *left_out])


def _trained_along(parameters: Mapping[str, tuple[int, ...]], config: AdaLoraConfig) -> list[str]:
    """Return a line that lists the parameters that ``modules_to_save`` trains, if any."""
    if not config.modules_to_save or not parameters:
        return []
    return [f"also trained: {', '.join(saved_roots(list(parameters), config))}"]


def _unadapted(
    parameters: Mapping[str, tuple[int, ...]],
    candidates: Mapping[str, Candidate],
    config: AdaLoraConfig,
) -> list[str]:
    """Return a line that lists the matrices that no known layer holds, if any.

    Parameters of one shape whose paths differ only in numbers are one entry.
    """
    weights = [(path, c.layer.weight) for path, c in candidates.items() if c.layer]
    held = {f"{path}/{weight}".lstrip("/") for path, weight in weights}
    # In a scope that several layers share, the path of a layer is that of its weight.
    held |= {path for path, weight in weights if path.rpartition("/")[2] == weight}
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for path, shape in parameters.items():
        # Biases and norm scales of stacked layers have two axes as well.
        if len(shape) < 2 or path.rpartition("/")[2] in ("bias", "scale"):
            continue
        if saved_params(path, config):
            continue
        # A weight of packed integers consists of several arrays, each with a path of its own.
        if held.isdisjoint(itertools.accumulate(path.split("/"), "{}/{}".format)):
            alike.setdefault((re.sub(r"\d+", "*", path), shape), []).append(path)
    if not alike:
        return []
    shown = [
        f"{role} {shape} x {len(paths)}" if len(paths) > 1 else f"{paths[0]} {shape}"
        for (role, shape), paths in alike.items()
    ]
    return [
        f"in no layer of a known kind: {', '.join(shown)}. To adapt one, declare the class of its "
        "module: adapt(..., layers={Class: Layout(...)})"
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if isinstance(count, float) else f"{count} {unit}"
        count = count / 1000
    return f"{count:.1f} GB"


def _matches(pattern: _Pattern, path: str, candidate: Candidate) -> bool:
    if callable(pattern):
        return bool(pattern(path, candidate.module))
    if pattern == "all-linear":
        return candidate.layer is not None and candidate.layer.kind in _LINEAR_KINDS
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, form) for form in (path, path.replace("/", ".")))
    return any(_is_suffix(name, path) for name in pattern)


def _is_suffix(name: str, path: str) -> bool:
    """Return whether the path is the name or ends with it at a separator, as in PEFT."""
    name, path = name.replace(".", "/").strip("/"), path.replace(".", "/")
    return path == name or path.endswith(f"/{name}")


def _layer_index_matches(path: str, config: AdaLoraConfig) -> bool:
    indices = config.layers_to_transform
    if indices is None or indices == ():
        return True
    index = _layer_index(path, cast("Any", config.layers_pattern))
    return index in (indices if isinstance(indices, tuple) else (indices,))


def _layer_index(path: str, names: tuple[str, ...] | None) -> int | None:
    """Return the layer index in ``path``: 3 for ``h/3/mlp/up`` and for ``block_3/mlp/up``.

    As in PEFT, the index is a path component that is a number, the last one if there are several,
    and ``layers_pattern`` can name the component before it. Without such a component it is the
    number at the end of the first name with one (``block_3``), as in linen's default names.
    """
    parents = path.rpartition("/")[0]
    for name in names or (r"[^/]+",):
        # A pattern may have groups itself, so the index is the last group.
        found = list(re.finditer(rf"(?:^|/)(?:{name})/(\d+)(?=/|$)", parents))[-1:]
        found = found or list(re.finditer(rf"(?:^|/)(?:{name})_(\d+)(?=/|$)", parents))[:1]
        if found:
            return int(found[0][found[0].re.groups])
    return None


def _ranks(paths: Sequence[str], config: AdaLoraConfig) -> dict[str, int]:
    """Return starting ranks by path: an earlier run's ``rank_pattern``, else ``rank_overrides``.

    Layers in neither have rank ``init_r``.
    """
    ranks = {path: config.spec_of(path).init_r for path in paths}
    for name, rank in config.rank_pattern or ():
        name = name.removesuffix(".lora_E").removeprefix("base_model.model.")
        found = [path for path in paths if _is_suffix(path, name) or _is_suffix(name, path)]
        if not found:
            raise ValueError(
                f"`rank_pattern`: {name!r} is not an adapted layer; name one of the adapted "
                f"layers: {', '.join(paths[:10])}."
            )
        ranks |= dict.fromkeys(found, _rank(cast("Any", rank)))
    return ranks


def _rank(rank: int | tuple[Any, ...]) -> int:
    """Return the rank given as a number or as booleans; of a stack, the largest."""
    if isinstance(rank, int):
        return rank
    return max(map(_rank, rank)) if any(isinstance(entry, tuple) for entry in rank) else sum(rank)


def _cannot_adapt(path: str, candidates: Mapping[str, Candidate]) -> str:
    reason, kind = candidates[path].cannot_adapt, type(candidates[path].module).__name__
    if reason:
        return f"`target_modules`: {path!r} cannot be adapted, because {reason}; leave it out."
    inside = [p for p, c in candidates.items() if p.startswith(f"{path}/") and _adaptable(c)]
    instead = f"name the layers in it: {', '.join(inside[:8])}" if inside else ""
    if not inside and (declaration := candidates[path].declaration):
        instead = f"declare what it computes, as in adapt(..., {declaration}), or leave it out"
    return (
        f"`target_modules`: {path!r} is a {kind}, which cannot be adapted (kinds that can: "
        f"{SUPPORTED}); {instead or _nearest(path, candidates)}."
    )


def _nearest(name: str, candidates: Mapping[str, Candidate]) -> str:
    """Return the way out of an error: the layers to name, nearest to ``name`` first."""
    paths = [path for path, candidate in candidates.items() if _adaptable(candidate)]
    if not paths:
        return f"pass a model with a layer that can be adapted, of these kinds: {SUPPORTED}"
    near = _by_similarity(name, paths)[:8]
    return f"name one of the nearest layers that can be adapted: {', '.join(near)}"


def _by_similarity(name: str, paths: Iterable[str]) -> list[str]:
    """Return the paths sorted by similarity of path or last name to ``name``, nearest first."""
    plain = re.sub(r"[^\w/]+", "", name.replace(".", "/"))

    def ratio(path: str) -> float:
        return difflib.SequenceMatcher(None, plain, path).ratio()

    return sorted(sorted(paths), key=lambda p: -max(ratio(p), ratio(p.rpartition("/")[2])))
