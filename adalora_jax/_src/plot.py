"""Figures of the allocator's decisions: the rank of every adapter, over time, and the scores.

A run is drawn from a list of the results of :func:`adalora_jax.info`, one per step or one every few
steps; they may stay on the device until they are drawn. The stacked result of ``jax.lax.scan`` is
accepted, too. Every function returns a new :class:`matplotlib.figure.Figure`, which a notebook
displays and ``figure.savefig("ranks.png")`` writes. ``pyplot`` and its global state are not used.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from adalora_jax._src.core import evaluation, pytree
from adalora_jax._src.core.monitor import AllocatorInfo

_COLOURS = "viridis"
_RANK_COLOURS = "YlGnBu"  # light for rank 0, dark for high ranks
_BUDGET = {"label": "budget", "color": "tab:orange", "lw": 3, "alpha": 0.6}
_LIVE = {"label": "active triplets", "color": "black", "lw": 1}
_WIDTH = 9.0  # inches; width of a figure over time
_ROW = 0.24  # inches; height of a row of text
_TALLEST = 14.0  # inches; above this height rows get thinner and only some are labelled
_ITSELF = "·"  # module name of an adapter whose path ends with the layer's number


def rank_heatmap(
    ranks: Mapping[str, int] | AllocatorInfo,
    *,
    highest: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw ranks as a table of layers × modules, one coloured cell per adapter.

    The first number in a path is its layer and the remainder is the module: ``blocks/0/query`` and
    ``blocks_0/query`` are both layer 0, module ``query``. ``blocks/query[0]``, slice 0 of a stack,
    is layer 0, module ``blocks/query``. Paths without a number share one row.

    Args:
      ranks: ``{path: rank}``, as :func:`adalora_jax.ranks` returns it; or an
        :class:`AllocatorInfo`.
      highest: the rank at the upper end of the colour scale, such as ``config.init_r``; by default
        the highest rank in ``ranks``.
      title: the title of the figure.

    Returns:
      The figure, with one row per layer, one column per module.

    Raises:
      ValueError: ``ranks`` is empty, an info contains several steps, or ``highest`` is below 1.

    >>> figure = rank_heatmap({"blocks/0/query": 2, "blocks/0/up": 5, "blocks/1/up": 7})
    >>> table = figure.axes[0]
    >>> [label.get_text() for label in table.get_xticklabels()]
    ['query', 'up']
    >>> [cell.get_text() for cell in table.texts]
    ['2', '5', '7']
    """
    ranks = _ranks(ranks)
    if not ranks:
        raise ValueError("`ranks={}`: is empty; pass the result of adalora_jax.ranks(state).")
    _check_highest(highest)
    places = {path: _place(path) for path in ranks}
    if len(set(places.values())) < len(places):  # such as Dense0 and Dense_0
        places = {path: (("", ()), path) for path in ranks}
    layers = sorted({layer for layer, _ in places.values()})
    modules = list(dict.fromkeys(module for _, module in places.values()))
    table = np.full((len(layers), len(modules)), np.nan)
    for path, (layer, module) in places.items():
        table[layers.index(layer), modules.index(module)] = ranks[path]

    height = min(0.9 + 1.4 * _ROW * len(layers), _TALLEST)
    figure = _figure(2.2 + 0.75 * len(modules), height + 0.5)
    axes = figure.subplots()
    colours = _rank_colours(highest or max(ranks.values()) or 1)
    image = axes.imshow(table, aspect="auto", **colours)
    for (row, column), rank in np.ndenumerate(table):
        if not np.isnan(rank):
            colour = "white" if np.asarray(image.norm(rank)) > 0.6 else "black"
            axes.text(
                column, row, f"{rank:.0f}", fontsize=9, ha="center", va="center", color=colour
            )
    turned = {"rotation": 45, "ha": "right"} if max(map(len, modules)) > 8 else {}
    axes.set_xticks(range(len(modules)), modules, fontsize=9, **turned)
    names = _layer_names(layers)
    _label_rows(axes, names, height)
    axes.set_ylabel("layer" if any(names) else "")
    axes.set_title(title or "rank of every adapter", fontsize=11)
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(integer=True))
    return figure


def rank_history(
    history: Iterable[Mapping[str, int]] | Iterable[AllocatorInfo] | AllocatorInfo,
    *,
    steps: Sequence[int] | None = None,
    budget: Sequence[int] | None = None,
    highest: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the rank of every adapter over time, below curves of their sum and of the budget.

    Rows have the order of the first entry of a history of dicts, and of the layers' numbers in a
    history of infos. If the modules of every layer are adjacent, as in ``blocks_0/query``,
    ``blocks_0/up``, ``blocks_1/query``, ..., lines separate the layers, and the layer is not
    repeated in each row. If every row has a label, the number at its right end is its final rank.

    Args:
      history: infos, as in :func:`rank_curves`; or one ``{path: rank}`` per step, as
        :func:`adalora_jax.ranks` returns it.
      steps: the step of each entry of ``history``; without it they are numbered from 0. Not
        accepted with infos, which contain their steps.
      budget: the budget at each entry, ``allocator_state(opt_state).budget``. Not accepted with
        infos, which contain their budgets.
      highest: as in :func:`rank_heatmap`.
      title: the title of the figure.

    Returns:
      The figure, with the curves and one row per adapter (per slice of a stack) coloured by rank.

    Raises:
      ValueError: ``history`` is empty, mixes infos with dicts, or its entries name different
        adapters; ``highest`` is below 1; ``steps`` is not strictly increasing;
        ``steps`` or ``budget`` has another length, or is given with infos.

    >>> history = [{"query": 4, "up": 4}, {"query": 2, "up": 4}, {"query": 1, "up": 3}]
    >>> figure = rank_history(history, steps=[0, 10, 20], budget=[8, 6, 4])
    >>> curves, rows = figure.axes[:2]
    >>> [label.get_text() for label in rows.get_yticklabels()]
    ['query', 'up']
    >>> [label.get_text() for label in rows.child_axes[0].get_yticklabels()]
    ['1', '3']
    """
    infos, history = _infos(history)
    if infos and history:
        raise ValueError("`history`: has both infos and other entries; pass entries of one kind.")
    if infos:
        for name, values in (("steps", steps), ("budget", budget)):
            if values is not None:
                raise ValueError(
                    f"`{name}`: is given with infos, which contain it; leave {name} out, or pass "
                    "{path: rank} dicts as history."
                )
        steps, budget = _steps(infos), [int(info.budget) for info in infos]
        history = [_ranks(info) for info in infos]
    if not history or not history[0]:
        raise ValueError("`history`: is empty; pass one {path: rank} per step.")
    _check_highest(highest)
    paths = list(history[0])
    for index, entry in enumerate(history):
        if set(entry) != set(paths):
            raise ValueError(
                f"`history[{index}]`: names other adapters than history[0], since "
                f"{sorted(set(entry) ^ set(paths))[:5]} are in only one of them; pass entries of "
                "one run."
            )
    steps = range(len(history)) if steps is None else steps
    for name, values in (("steps", steps), ("budget", budget)):
        if values is not None and len(values) != len(history):
            raise ValueError(
                f"`{name}`: has {len(values)} entries for the {len(history)} of history; "
                "pass one for each."
            )
    if any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError(
            f"`{'history' if infos else 'steps'}`: the steps must increase from each entry to the "
            "next; pass the entries in the order of their steps, with no step twice."
        )
    table = np.array([[entry[path] for entry in history] for path in paths])
    figure, curves, rows = _over_rows(len(paths), title or "rank of every adapter over time")
    edges = _edges(steps)
    if budget is not None:
        _stairs(curves, budget, edges, **_BUDGET)
    _stairs(curves, table.sum(axis=0), edges, **_LIVE)
    curves.set_ylim(bottom=0)
    curves.set_ylabel("triplets")
    curves.legend(fontsize=10, loc="upper right", frameon=False)
    layers, modules = _grouped(paths)
    colours = _rank_colours(highest or int(table.max()) or 1)
    image = _coloured(rows, edges, table, modules, colours)
    stride = _label_rows(rows, modules, _rows_height(len(paths)))
    if stride == 1:
        final = rows.secondary_yaxis("right")
        final.set_yticks(range(len(paths)), map(str, table[:, -1]), fontsize=10, weight="bold")
        final.tick_params(length=0)
        header = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 9}
        rows.annotate("final\nrank", (1, 1), (8, 3), ha="center", va="bottom", **header)
    if layers:
        _label_layers(rows, layers, [] if stride > 1 else modules)
    figure.colorbar(image, ax=rows, label="rank", ticks=MaxNLocator(integer=True), pad=0.02)
    return figure


def rank_curves(
    infos: Iterable[AllocatorInfo] | AllocatorInfo, *, title: str | None = None
) -> Figure:
    """Draw the budget and the number of active triplets over time, and the distribution of ranks.

    The budget is ``b(t)`` of `AdaLoRA, Eq. (12) <https://arxiv.org/abs/2303.10512>`_. The second
    plot shows the mean rank, the interquartile range over all matrices, and the range from the
    lowest to the highest rank, so it is readable for any number of matrices.

    Args:
      infos: the results of :func:`adalora_jax.info` during a run, in the order of their steps; or
        one :class:`AllocatorInfo` with a leading axis of steps, as from ``jax.lax.scan``.
      title: the title of the figure.

    Returns:
      The figure, with two plots over the same steps.

    Raises:
      ValueError: ``infos`` is empty, contains objects of other types, names different adapters, or
        its steps are not strictly increasing.

    >>> masks = [np.array([[True, True], [True, last]]) for last in (True, False)]
    >>> infos = [AllocatorInfo(i, 4 - i, 4 - i, {"up": m}, {}) for i, m in enumerate(masks)]
    >>> totals, spread = rank_curves(infos).axes
    >>> [line.get_label() for line in spread.patches]
    ['lowest to highest', 'interquartile range', 'mean']
    """
    infos = _checked(infos)
    edges = _edges(_steps(infos))
    ranks = np.array([list(_ranks(info).values()) for info in infos])
    figure = _figure(_WIDTH, 4.2)
    totals, spread = figure.subplots(2, 1, sharex=True)
    _stairs(totals, [int(info.budget) for info in infos], edges, **_BUDGET)
    _stairs(totals, ranks.sum(axis=1), edges, **_LIVE)
    totals.set_ylabel("triplets")
    totals.set_title(title or "budget and ranks over time", fontsize=11)
    lowest, *quarters, highest = np.quantile(ranks, (0, 0.25, 0.75, 1), axis=1)
    band = {"fill": True, "color": "tab:blue", "lw": 0}
    spread.stairs(highest, edges, baseline=lowest, label="lowest to highest", alpha=0.15, **band)
    label = "interquartile range"
    spread.stairs(quarters[1], edges, baseline=quarters[0], label=label, alpha=0.35, **band)
    _stairs(spread, ranks.mean(axis=1), edges, label="mean", color="tab:blue", lw=1.5)
    spread.set_ylabel("rank of an adapter")
    spread.set_xlabel("step")
    for axes in (totals, spread):
        axes.set_ylim(bottom=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.legend(fontsize=9, loc="lower left", frameon=False)
    return figure


def importance_history(
    infos: Iterable[AllocatorInfo] | AllocatorInfo, *, title: str | None = None
) -> Figure:
    """Draw the importance of every adapter over time: the sum of its triplets' scores.

    The scores are those that rank the triplets, ``S_i`` of `AdaLoRA, Eq. (7)
    <https://arxiv.org/abs/2303.10512>`_ by default. Colours are logarithmic and span at most six
    orders of magnitude below the highest sum; lower sums have the darkest colour, and sums of 0
    have none. The curves above show the highest, mean and lowest score of the active triplets;
    triplets below the lowest are pruned.

    Args:
      infos: as in :func:`rank_curves`.
      title: the title of the figure.

    Returns:
      The figure, with the curves and one row per adapter (per slice of a stack) coloured by
      importance.

    Raises:
      ValueError: as in :func:`rank_curves`.

    >>> masks = {"up": np.array([True, False])}
    >>> scores = [{"up": np.array([4.0, 2.0]) / (1 + i)} for i in range(3)]
    >>> infos = [AllocatorInfo(i, 1, 1, masks, score) for i, score in enumerate(scores)]
    >>> curves, rows, _ = importance_history(infos).axes
    >>> rows.collections[0].get_array().data.tolist()
    [[6.0, 3.0, 2.0]]
    """
    infos = _checked(infos)
    edges = _edges(_steps(infos))
    sums = [_rows({path: s.sum(axis=-1) for path, s in info.scores.items()}) for info in infos]
    table = np.array([list(row.values()) for row in sums], float).T
    figure, curves, rows = _over_rows(len(table), title or "importance of every adapter over time")

    def flat(arrays: Mapping[str, ArrayLike]) -> np.ndarray:
        return np.concatenate([np.ravel(array) for array in arrays.values()])

    scores_of_active = [flat(info.scores)[flat(info.masks).astype(bool)] for info in infos]
    for name, function, style in (
        ("highest", np.max, {"color": "tab:blue", "lw": 1}),
        ("mean of active", np.mean, {"color": "black", "lw": 1}),
        ("lowest of active", np.min, {"color": "tab:orange", "lw": 2, "alpha": 0.8}),
    ):
        values = [
            _positive(function(scores)) if scores.size else np.nan for scores in scores_of_active
        ]
        _stairs(curves, values, edges, label=name, **style)
    curves.set_yscale("log")
    curves.set_ylabel("score of a triplet")
    curves.legend(fontsize=9, loc="lower right", frameon=False, ncols=3)
    top = table[np.isfinite(table)].max(initial=0) or 1.0
    colours = {"norm": LogNorm(max(top * 1e-6, table[table > 0].min(initial=top) / 2), top)}
    shares = table[:, -1] / (table[:, -1].sum() or 1)
    digits = 0 if len(table) < 30 else 1
    names = [f"{path}  {share:.{digits}%}" for path, share in zip(sums[0], shares)]
    image = _coloured(rows, edges, table, names, {"cmap": _COLOURS, **colours})
    _label_rows(rows, names, _rows_height(len(names)))
    rows.set_ylabel("adapter and final share")
    figure.colorbar(image, ax=rows, label="sum of scores", pad=0.02)
    return figure


def lifetimes(
    infos: Iterable[AllocatorInfo] | AllocatorInfo, *, title: str | None = None
) -> Figure:
    """Draw when each triplet was pruned: one cell per triplet, coloured by its last pruning step.

    Cells of triplets that are active at the end are white. Grey cells are padding, where adapters
    have different initial ranks. A star marks a triplet that was pruned more than once.

    Args:
      infos: as in :func:`rank_curves`. A triplet pruned between two infos counts as pruned at the
        later one.
      title: the title of the figure.

    Returns:
      The figure, with one row per adapter (per slice of a stack), one column per triplet.

    Raises:
      ValueError: as in :func:`rank_curves`.

    >>> masks = np.array([[1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0]], bool)
    >>> infos = [AllocatorInfo(10 * i, 3, 3, {"up": mask}, {}) for i, mask in enumerate(masks)]
    >>> [cell.get_text() for cell in lifetimes(infos).axes[0].texts]
    ['30*', '', '10']
    """
    infos = _checked(infos)
    steps = _steps(infos)
    histories = {}  # {row: [infos, r]}
    for path in sorted(infos[0].masks, key=_natural):
        masks = np.array([np.asarray(info.masks[path], bool) for info in infos])
        for index in np.ndindex(masks.shape[1:-1]):
            histories[pytree.row_name(path, index)] = masks[(slice(None), *index)]
    width = max(active.shape[-1] for active in histories.values())
    died = np.full((len(histories), width), np.nan)
    labels = np.full(died.shape, "", object)
    for row, active in enumerate(histories.values()):
        before = np.concatenate([np.ones_like(active[:1]), active[:-1]])
        deaths = before & ~active
        for column in np.flatnonzero(~active[-1]):
            died[row, column] = steps[np.flatnonzero(deaths[:, column])[-1]]
            star = "*" if deaths[:, column].sum() > 1 else ""
            labels[row, column] = f"{died[row, column]:.0f}{star}"

    height = min(0.5 + _ROW * len(histories), _TALLEST)
    figure = _figure(2.8 + 0.5 * width, height + 0.8)
    axes = figure.subplots()
    image = axes.imshow(died, cmap=_COLOURS, vmin=0, vmax=steps[-1] or 1, aspect="auto")
    if height < _TALLEST:
        for (row, column), label in np.ndenumerate(labels):
            dark = label and np.asarray(image.norm(died[row, column])) <= 0.6
            colour = "white" if dark else "black"
            axes.text(column, row, label, fontsize=8, ha="center", va="center", color=colour)
    for row, active in enumerate(histories.values()):
        if missing := width - active.shape[-1]:
            start = active.shape[-1] - 0.5, row - 0.5
            axes.add_patch(Rectangle(start, missing, 1, facecolor="lightgray", lw=0))
    axes.set_yticks(np.arange(len(histories) - 1) + 0.5, minor=True)
    axes.set_xticks(np.arange(width - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="lightgray", lw=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(width))
    axes.tick_params(axis="x", labelsize=8)
    _label_rows(axes, [f"{row}  {active[-1].sum()}" for row, active in histories.items()], height)
    axes.set_xlabel("triplet")
    axes.set_ylabel("adapter and final rank")
    axes.set_title(title or "step at which each triplet was pruned (white: active)", fontsize=11)
    figure.colorbar(image, ax=axes, label="step", pad=0.02)
    return figure


def _checked(infos: AllocatorInfo | Iterable[AllocatorInfo]) -> list[AllocatorInfo]:
    """Return a run's infos as NumPy arrays, one info per recorded step.

    Raises:
      ValueError: as in :func:`rank_curves`.
    """
    found, others = _infos(infos)
    if others or not found:
        problem = f"contains a {type(others[0]).__name__}" if others else "is empty"
        raise ValueError(f"`infos`: {problem}; pass one or more results of adalora_jax.info.")
    if any(set(info.masks) != set(found[0].masks) for info in found):
        raise ValueError("`infos`: the entries name different adapters; pass entries of one run.")
    if any(after <= before for before, after in itertools.pairwise(_steps(found))):
        raise ValueError(
            "`infos`: the steps must increase from each entry to the next; pass the entries in the "
            "order of their steps, with no step twice."
        )
    return found


def _infos(
    history: Iterable[AllocatorInfo | Mapping[str, int]] | AllocatorInfo,
) -> tuple[list[AllocatorInfo], list[Any]]:
    """Return the infos in ``history``, fetched in one transfer, and all other entries."""
    if isinstance(history, AllocatorInfo):
        info: AllocatorInfo = jax.device_get(history)
        count = np.size(info.step)
        stacked = info if np.ndim(info.step) else jax.tree.map(lambda x: x[None], info)
        history = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
    history = list(history)
    found = jax.device_get([entry for entry in history if isinstance(entry, AllocatorInfo)])
    return found, [entry for entry in history if not isinstance(entry, AllocatorInfo)]


def _steps(infos: Sequence[AllocatorInfo]) -> list[int]:
    return [int(info.step) for info in infos]


def _ranks(ranks: Mapping[str, int] | AllocatorInfo) -> Mapping[str, int]:
    if not isinstance(ranks, AllocatorInfo):
        return ranks
    if np.ndim(ranks.step):
        raise ValueError(
            f"`ranks`: is an info with {np.shape(ranks.step)} steps; pass that of one step, "
            "jax.tree.map(lambda leaf: leaf[i], infos)."
        )
    by_path = evaluation.ranks(ranks)
    return {path: by_path[path] for path in sorted(by_path, key=_natural)}


def _rows(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return one value per matrix; every slice of a stack is a separate matrix."""
    return {
        pytree.row_name(path, index): values[path][index]
        for path in sorted(values, key=_natural)
        for index in np.ndindex(np.shape(values[path]))
    }


def _natural(path: str) -> list[int | str]:
    """Return a sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _positive(value: np.floating) -> float:
    return float(value) if value > 0 else np.nan


class _Figure(Figure):
    """A figure that a notebook displays although ``pyplot`` does not manage it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    return _Figure(figsize=(min(width, 16), height), dpi=100, layout="constrained")


def _over_rows(count: int, title: str) -> tuple[Figure, Axes, Axes]:
    """Create a figure with curves above one coloured row per adapter, over the same steps."""
    height = _rows_height(count)
    figure = _figure(_WIDTH, height + 2.0)
    curves, rows = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, height])
    curves.set_title(title, fontsize=11)
    rows.set_xlabel("step")
    return figure, curves, rows


def _rows_height(count: int) -> float:
    return min(0.5 + _ROW * count, _TALLEST)


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Return the edges of the steps' intervals: the values at a step hold until the next one."""
    return np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)


def _stairs(axes: Axes, values: ArrayLike, edges: np.ndarray, **style: Any) -> None:
    axes.stairs(values, edges, baseline=None, fill=False, **style)


def _coloured(
    axes: Axes, edges: np.ndarray, table: np.ndarray, names: list[str], colours: Mapping[str, Any]
) -> QuadMesh:
    """Draw one row of coloured cells per name."""
    places = np.arange(len(names) + 1) - 0.5
    image = axes.pcolormesh(edges, places, table, **colours)
    axes.invert_yaxis()
    return image


def _check_highest(highest: int | None) -> None:
    if highest is not None and not highest >= 1:
        raise ValueError(f"`highest={highest!r}`: must be at least 1; pass config.init_r.")


def _rank_colours(highest: int) -> dict[str, Any]:
    """Return a colour scale with one band per rank from 0 to ``highest``."""
    cmap = matplotlib.colormaps[_RANK_COLOURS].resampled(highest + 1)
    return {"cmap": cmap, "vmin": -0.5, "vmax": highest + 0.5}


def _label_rows(axes: Axes, names: list[str], height: float) -> int:
    """Label every row if there is room, and otherwise every second, third, ... row.

    Returns:
      The distance of labelled rows.
    """
    stride = int(np.ceil(len(names) * 0.6 * _ROW / height))
    axes.set_yticks(range(0, len(names), stride), names[::stride], fontsize=9)
    return stride


def _grouped(paths: list[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the layers of adjacent rows, with their numbers of rows, and the rows' modules.

    Without several rows per layer, or if the rows of a layer are not adjacent, there are no layers,
    and the modules are the paths.

    >>> _grouped(["blocks_0/query", "blocks_0/up", "blocks_1/query", "head"])
    ([('blocks 0', 2), ('blocks 1', 1), ('', 1)], ['query', 'up', 'query', 'head'])
    >>> _grouped(["blocks_0/up", "blocks_1/up"])
    ([], ['blocks_0/up', 'blocks_1/up'])
    """
    places = [_place(path) for path in paths]
    groups = [(layer, len([*rows])) for layer, rows in itertools.groupby(p[0] for p in places)]
    layers = [layer for layer, _ in groups]
    numbered = [layer for layer in layers if layer[1]]
    if len(set(numbered)) < len(numbered) or len(layers) in (1, len(paths)):
        return [], paths
    several = len({prefix for prefix, numbers in layers if numbers}) > 1

    def name(prefix: str) -> str:
        return prefix if several else prefix.rpartition("/")[2]

    return [
        (" ".join(filter(None, [name(prefix), ",".join(map(str, numbers))])), count)
        for (prefix, numbers), count in groups
    ], [module for _, module in places]


def _label_layers(axes: Axes, layers: list[tuple[str, int]], modules: list[str]) -> None:
    """Write the layers left of the rows' labels, and draw a line between layers.

    Args:
      axes: the rows.
      layers: names and numbers of rows.
      modules: the labels of the rows; none if only layers are labelled.
    """
    ends = list(itertools.accumulate(count for _, count in layers))
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", lw=4 if modules else 0.5)
    stride = 1
    if not modules:
        stride = int(np.ceil(len(layers) * 0.6 * _ROW / _rows_height(ends[-1])))
    width = max((_text_width(name, 9) for name in modules), default=0)
    axes.tick_params(axis="y", length=0)
    if not modules:
        axes.set_yticks([])
    for (name, count), end in list(zip(layers, ends))[::stride]:
        axes.annotate(
            name,
            (0, end - count / 2 - 0.5),
            (-width - 12, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=10,
            ha="right",
            va="center",
        )


def _text_width(text: str, size: float) -> float:
    """Return the width of a text in points."""
    return TextPath((0, 0), text, size=size).get_extents().width if text else 0.0


def _place(path: str) -> tuple[tuple[str, tuple[int, ...]], str]:
    """Return the layer and the module of a path.

    The layer is a prefix and a tuple of numbers, so that layer 10 sorts after layer 9.

    >>> _place("encoder/layers_3/attention/query")
    (('encoder/layers', (3,)), 'attention/query')
    >>> _place("layers/query[3]"), _place("head")
    ((('', (3,)), 'layers/query'), (('', ()), 'head'))
    """
    names = path.split("/")
    for i, name in enumerate(names):
        if numbered := re.fullmatch(r"(.*?)_?(\d+)", name):
            prefix = "/".join([*names[:i], *filter(None, [numbered[1]])])
            return (prefix, (int(numbered[2]),)), "/".join(names[i + 1 :]) or _ITSELF
    if stacked := re.fullmatch(r"(.*)\[([\d,]+)\]", path):
        return ("", tuple(map(int, stacked[2].split(",")))), stacked[1]
    return ("", ()), path


def _layer_names(layers: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Return the layers' numbers, with their prefixes if there are several prefixes."""
    several = len({prefix for prefix, numbers in layers if numbers}) > 1
    names = []
    for prefix, numbers in layers:
        number = ",".join(map(str, numbers))
        names.append(f"{prefix}/{number}".strip("/") if several else number)
    return names
